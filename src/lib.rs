//! Memory layers as GPU kernels in pure Rust.

mod config;
mod error;
mod weights;

pub use config::{Dimensions, ElementType, Kind, MemoryConfig, Norm};
pub use error::{Error, Result};
pub use weights::{HostTensor, Weights};
