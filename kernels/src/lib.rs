//! Device code of ultramem: the four stages of a memory layer as CubeCL kernels, each with its launch on device buffers.
//!
//! No model, no files, no framework. A launch checks shapes, types and limits, chooses nothing it was not told (each stage has a
//! strategy with a `choose`), enqueues and returns; none waits for the host.

pub mod baseline;
pub mod combine;
mod device;
mod element;
mod error;
pub mod expand;
mod group;
mod interleave;
mod loops;
mod norm;
pub mod optimiser;
mod outer;
mod pages;
mod product;
pub mod query;
mod random;
mod retrieve;
mod row_gradients;
mod rows;
pub mod score;
mod select;
mod sort;
mod sums;
mod tensor;
mod transpose;

pub use element::ElementType;
pub use error::Error;
pub use group::{SortCost, block_of, sort_cost};
pub use loops::{LOOPS_TARGET, MAX_LOOPS};
pub use norm::{Norm, norm_tile};
pub use outer::{WeightTiles, weight_tiles};
pub use random::random;
pub use retrieve::{retrieve, retrieves_at_once};
pub use row_gradients::RowGradients;
pub use sums::column_sum_rows;
pub use tensor::{Tensor, check, empty, fits_binding, from_f32, from_u32, supports, u32_storage};
pub use transpose::transpose;

/// The kernels' result.
pub type Result<T> = core::result::Result<T, Error>;
