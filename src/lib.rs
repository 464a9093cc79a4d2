//! Memory layers as GPU kernels in pure Rust.

pub mod checkpoint;
mod config;
mod cost;
mod error;
mod layer;
pub mod reference;
mod table;
mod weights;
mod workspace;

pub use checkpoint::Checkpoint;
pub use config::{Dimensions, ElementType, Kind, MemoryConfig, Norm};
pub use cost::{Cost, StageCost};
pub use error::{Error, Result};
pub use layer::{Chosen, Forward, Kept, MemoryLayer, Strategies};
pub use table::ValueTable;
pub use ultramem_kernels as kernels;
pub use ultramem_kernels::Tensor;
pub use weights::{HostTensor, Weights};
