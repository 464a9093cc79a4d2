//! What our kernels are measured against, and the layers that both are given.
//!
//! [`Case`] lists the shapes of the comparison and makes random weights and inputs for them. With the feature `composition`,
//! `Composition` is the layer in stock Burn operations.

mod case;
#[cfg(feature = "composition")]
mod composition;

pub use case::Case;
#[cfg(feature = "composition")]
pub use composition::{Chosen, Composition, Kept};
/// The runtime that is measured: wgpu's, or CUDA's where that alone is built.
#[cfg(all(feature = "cuda", not(feature = "wgpu")))]
pub use cubecl::cuda::CudaRuntime as Adapter;
#[cfg(feature = "wgpu")]
pub use cubecl::wgpu::WgpuRuntime as Adapter;
