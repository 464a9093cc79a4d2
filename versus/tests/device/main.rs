//! The kernels of what memory layers are compared with, and whole models, on a device, held against the oracle. The same tests run on wgpu
//! with WGSL and, with the feature `vulkan`, with SPIR-V; with `cuda` and without `wgpu` on CUDA, in bf16 too.

#![cfg(any(feature = "wgpu", feature = "cuda"))]

#[path = "../../../tests/common/device.rs"]
mod device;

mod decoder;
mod kernels;
mod launches;
