//! CUDA devices: asks the driver before cubecl does, for cubecl panics where there is none.

use std::mem::MaybeUninit;

use cubecl::{
    Runtime,
    client::ComputeClient,
    cuda::{CudaDevice, CudaRuntime, install::cuda_path},
};
use cudarc::{
    driver::{
        result::{DriverError, device, init},
        sys,
    },
    nvrtc,
};

use super::{Adapter, Place};
use crate::failure::{Failure, Result};

/// The devices, or what is missing.
pub fn adapters() -> Result<Vec<Adapter>> {
    // SAFETY: tries to load the library under its usual names and runs no code of it but its initialisers.
    if !unsafe { sys::is_culib_present() } {
        return Err(Failure::new("no CUDA driver found (libcuda): install NVIDIA's, or use --backend wgpu"));
    }
    let asked = |error| Failure::new(format!("the CUDA driver does not answer: {}", reason(error)));
    init().map_err(asked)?;
    let count = device::get_count().map_err(asked)?;
    if count > 0 {
        check_compiler()?;
    }
    (0..count)
        .map(|index| {
            let name = device::get(index).and_then(device::get_name).map_err(asked)?;
            let place = Place::Cuda(CudaDevice::new(index as usize));
            Ok(Adapter { backend: "cuda", name, driver: driver_version(), place })
        })
        .collect()
}

/// The client of a device.
pub fn client(device: &CudaDevice) -> ComputeClient<CudaRuntime> {
    CudaRuntime::client(device)
}

/// Bytes of the device's memory.
pub fn memory(of: &CudaDevice) -> Option<u64> {
    let found = device::get(i32::try_from(of.index).ok()?).ok()?;
    // SAFETY: the device is one that the driver gave.
    unsafe { device::total_mem(found) }.ok().map(|bytes| bytes as u64)
}

/// Kernels are compiled on the machine that runs them, which takes more than the driver.
fn check_compiler() -> Result<()> {
    // SAFETY: as for the driver's library.
    if !unsafe { nvrtc::sys::is_culib_present() } {
        return Err(Failure::new("a CUDA driver answers, but its compiler is missing: install the NVRTC library"));
    }
    match cuda_path() {
        Some(_) => Ok(()),
        None => Err(Failure::new("a CUDA driver answers, but the CUDA headers are missing: set CUDA_PATH")),
    }
}

fn driver_version() -> String {
    let mut version = MaybeUninit::uninit();
    // SAFETY: the driver writes the number, or leaves it and returns an error, in which case it is not read.
    let version = unsafe { sys::cuDriverGetVersion(version.as_mut_ptr()).result().map(|()| version.assume_init()) };
    match version {
        Ok(version) => format!("CUDA {}.{}", version / 1000, version % 1000 / 10),
        Err(_) => "CUDA".to_string(),
    }
}

fn reason(error: DriverError) -> String {
    match error.error_string() {
        Ok(text) => text.to_string_lossy().into_owned(),
        Err(_) => format!("{:?}", error.0),
    }
}
