//! Device code of ultramem.

mod element;
mod error;
mod norm;

pub use element::ElementType;
pub use error::Error;
pub use norm::Norm;

/// The kernels' result.
pub type Result<T> = core::result::Result<T, Error>;
