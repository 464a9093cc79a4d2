//! wgpu adapters, of the one graphics interface that cubecl uses on this system.

use cubecl::{
    Runtime,
    client::ComputeClient,
    future::block_on,
    wgpu::{AutoGraphicsApi, GraphicsApi, RuntimeOptions, WgpuDevice, WgpuRuntime, init_device, init_setup},
};
use wgpu::{AdapterInfo, Backends, DeviceType, Instance, InstanceDescriptor};

use super::{Adapter, Place};
use crate::failure::Result;

/// The adapters, discrete GPUs before integrated ones before software.
pub fn adapters() -> Result<Vec<Adapter>> {
    let backends = Backends::from(AutoGraphicsApi::backend());
    let instance = Instance::new(InstanceDescriptor { backends, ..InstanceDescriptor::new_without_display_handle() });
    let mut found: Vec<AdapterInfo> =
        block_on(instance.enumerate_adapters(backends)).iter().map(|adapter| adapter.get_info()).collect();
    found.sort_by_key(|info| rank(info.device_type));
    Ok((0..found.len()).map(|at| adapter(&found, at)).collect())
}

/// The client of a device.
pub fn client(device: &WgpuDevice) -> ComputeClient<WgpuRuntime> {
    WgpuRuntime::client(device)
}

/// The same adapter as a device with WebGPU's default limits.
pub fn webgpu(device: &WgpuDevice) -> Result<WgpuDevice> {
    let setup = init_setup::<AutoGraphicsApi>(device, RuntimeOptions::default());
    Ok(init_device(ultramem::webgpu_limits(&setup)?, RuntimeOptions::default()))
}

fn rank(kind: DeviceType) -> usize {
    match kind {
        DeviceType::DiscreteGpu => 0,
        DeviceType::IntegratedGpu => 1,
        DeviceType::VirtualGpu => 2,
        DeviceType::Other => 3,
        DeviceType::Cpu => 4,
    }
}

/// cubecl counts the adapters of each kind apart. The sort is stable, so its order is this one.
fn adapter(found: &[AdapterInfo], at: usize) -> Adapter {
    let info = &found[at];
    let index = found[..at].iter().filter(|other| other.device_type == info.device_type).count();
    let device = match info.device_type {
        DeviceType::DiscreteGpu => WgpuDevice::DiscreteGpu(index),
        DeviceType::IntegratedGpu => WgpuDevice::IntegratedGpu(index),
        DeviceType::VirtualGpu => WgpuDevice::VirtualGpu(index),
        DeviceType::Cpu => WgpuDevice::Cpu,
        DeviceType::Other => WgpuDevice::DefaultDevice,
    };
    let driver = format!("{:?}, {} {}", info.backend, info.driver, info.driver_info).trim().to_string();
    let shares_host = matches!(device, WgpuDevice::Cpu | WgpuDevice::IntegratedGpu(_));
    let place = Place::Wgpu { device, shares_host };
    Adapter { backend: "wgpu", name: info.name.clone(), driver, place }
}
