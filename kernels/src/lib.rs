//! Device code of ultramem: the stages of a memory layer as CubeCL kernels, each with its launch on device buffers.
//!
//! No model, no files, no framework. A launch checks shapes, types and limits, chooses nothing it was not told (each stage has a
//! strategy with a `choose`), enqueues and returns; none waits for the host.
//!
//! What the stages are made of is here for others to be made of: [`launch`] checks and sizes a launch, [`linear`] has the products,
//! [`order_key()`] the order in which scores are selected.

pub mod launch;
pub mod linear;
mod select;
mod stages;
mod table;

pub use launch::device::has_streams;
pub use launch::element::ElementType;
pub use launch::error::Error;
pub use launch::loops::{LOOPS_TARGET, MAX_LOOPS};
pub use launch::random::random;
pub use launch::tensor::{
    Tensor, check, empty, fits_binding, from_f32, from_u32, in_one_allocation, supports, u32_storage,
};
pub use linear::column_sum::ColumnSumPlans;
pub use linear::outer::{OuterPlan, OuterPlans, OuterSizes, WeightTiles};
pub use linear::transpose::transpose;
pub use select::order_key;
pub use select::top_m::{TopMPlan, top_m};
pub use stages::norm::{Norm, NormPlan, NormSizes};
pub use stages::retrieve::{RetrievePlan, RetrievePlans, retrieve};
pub use stages::{combine, expand, query, score, weigh};
pub use table::group::{HeadPlans, SortPlan, SortPlans, block_of};
pub use table::join::JoinPlans;
pub use table::optimiser;
pub use table::row_gradients::{RowGradients, ScatterPlan};
pub use table::row_products::ProductPlan;
pub use table::segment_sum::{SumPlans, SumSizes};
pub use table::source::{AddressPlan, RowSource, ShufflePlan};

/// The kernels' result.
pub type Result<T> = core::result::Result<T, Error>;
