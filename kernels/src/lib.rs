//! Device code of ultramem.

pub mod combine;
mod device;
mod element;
mod error;
pub mod expand;
mod norm;
mod product;
pub mod query;
pub mod score;
mod select;
mod tensor;

pub use element::ElementType;
pub use error::Error;
pub use norm::Norm;
pub use tensor::{Tensor, empty, fits_binding, from_f32, from_u32, supports};

/// The kernels' result.
pub type Result<T> = core::result::Result<T, Error>;
