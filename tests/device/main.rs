//! The kernels on a device, held against PyTorch's results and against the oracle. The same tests run on wgpu with WGSL
//! and, with the feature `vulkan`, with SPIR-V; with `cuda` and without `wgpu` on CUDA, in bf16 too.

#![cfg(all(any(feature = "wgpu", feature = "cuda"), feature = "files"))]

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/device.rs"]
mod device;
#[path = "../common/dimensions.rs"]
mod dimensions;
#[path = "../common/large.rs"]
mod large;
#[path = "../common/top_m.rs"]
mod top_m;

mod backward;
mod goldens;
mod grids;
mod hostile;
mod invariant;
mod large_tables;
mod launches;
mod limits;
mod many_slots;
#[cfg(feature = "wgpu")]
mod memory;
mod optimiser;
mod order;
mod pages;
mod random;
mod selection;
mod shapes;
