//! A device that has what every browser guarantees and no more, on any adapter: where a layer runs on it, it runs on WebGPU.

use cubecl::{future::block_on, wgpu::WgpuSetup};
use wgpu::{DeviceDescriptor, Features, Limits, MemoryHints};

use crate::{Error, Result};

/// Another device of `setup`'s adapter, with WebGPU's default limits: 8 storage buffers a kernel (one of which CubeCL takes), 256 units a
/// cube, 16 KiB of shared memory, 128 MiB a binding, 65,535 cubes a dimension. Of features it has those that WebGPU knows and the adapter
/// has. Make a device of it with [`cubecl::wgpu::init_device`]; a layer that does not fit is an [`Error`] with the numbers, as on any device.
///
/// # Errors
/// [`Error::Device`] where the adapter has less than that, and in a build whose kernels are compiled to SPIR-V (feature `vulkan`), which
/// WebGPU does not take.
pub fn webgpu_limits(setup: &WgpuSetup) -> Result<WgpuSetup> {
    if cfg!(feature = "vulkan") {
        let reason = "WebGPU takes WGSL alone, and this build compiles kernels to SPIR-V (feature vulkan)";
        return Err(Error::Device(reason.into()));
    }
    let descriptor = DeviceDescriptor {
        required_features: setup.adapter.features() & Features::all_webgpu_mask(),
        required_limits: Limits::default(),
        memory_hints: MemoryHints::MemoryUsage,
        ..Default::default()
    };
    let opened = block_on(setup.adapter.request_device(&descriptor));
    let (device, queue) = opened.map_err(|error| Error::Device(format!("WebGPU's default limits: {error}")))?;
    Ok(WgpuSetup { device, queue, ..setup.clone() })
}
