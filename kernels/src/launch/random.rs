//! Random numbers made on the device: weights for measurements, of tables that no host would fill in reasonable time.
//!
//! Writes each number once. A number is a hash of the seed and of its own place, so the same seed gives the same tensor.

use cubecl::prelude::*;

use crate::launch::device::Device;
use crate::launch::tensor::{Tensor, arg, empty, supports};
use crate::{ElementType, Result};

/// A tensor of `shape`, uniform in `[-scale, scale)`.
///
/// # Errors
/// A type that the device lacks, or a tensor larger than one binding.
pub fn random<R: Runtime>(
    client: &ComputeClient<R>,
    name: &'static str,
    shape: &[usize],
    dtype: ElementType,
    scale: f32,
    seed: u32,
) -> Result<Tensor<R>> {
    supports(client, dtype)?;
    let device = Device::of(client);
    let tensor = empty(client, name, shape, dtype.storage())?;
    if shape.contains(&0) {
        return Ok(tensor);
    }
    let numbers = shape.iter().product::<usize>();
    let width = device.width(dtype.size(), &[numbers]);
    let units = device.flat(numbers / width);
    let cubes = (numbers / width).div_ceil(units);
    // SAFETY: a unit writes one vector below the number of vectors.
    unsafe {
        random_kernel::launch_unchecked::<R>(
            client,
            device.grid(cubes)?,
            CubeDim::new_1d(units as u32),
            tensor.required_address_type(),
            width,
            arg(&tensor, width),
            scale,
            seed,
            cubes as u32,
            ((numbers / width - 1) % units) as u32,
            units,
            dtype.storage(),
        );
    }
    Ok(tensor)
}

/// `last_unit` is the last of the last cube's units that has a vector.
#[cube(launch_unchecked, address_type = "dynamic")]
fn random_kernel<E: Float, N: Size>(
    output: &mut Array<Vector<E, N>>,
    scale: f32,
    seed: u32,
    cubes: u32,
    last_unit: u32,
    #[comptime] units: usize,
    #[define(E)] _dtype: StorageType,
) {
    if CUBE_POS >= cubes as usize || (CUBE_POS == cubes as usize - 1 && UNIT_POS > last_unit) {
        terminate!();
    }
    let vector = hash(hash(seed + CUBE_POS as u32) + UNIT_POS);
    let mut numbers = Vector::<f32, N>::new(0.0);
    #[unroll]
    for n in 0..N::value() {
        let bits = hash(vector + n as u32) >> 8u32;
        numbers[n] = (f32::cast_from(bits) / 8_388_608.0 - 1.0) * scale;
    }
    output[CUBE_POS * units + UNIT_POS as usize] = Vector::cast_from(numbers);
}

/// Stirs 32 bits: every bit of the result hangs on every bit of `x`.
#[cube]
pub(crate) fn hash(x: u32) -> u32 {
    let mut bits = x ^ (x >> 16u32);
    bits *= 0x21f0_aaadu32;
    bits ^= bits >> 15u32;
    bits *= 0x735a_2d97u32;
    bits ^ (bits >> 15u32)
}

/// Stirs 32 bits on the host, as kernels do, so that every bit of the result hangs on every bit of `x`.
pub fn stir(x: u32) -> u32 {
    let mut bits = x ^ (x >> 16);
    bits = bits.wrapping_mul(0x21f0_aaad);
    bits ^= bits >> 15;
    bits = bits.wrapping_mul(0x735a_2d97);
    bits ^ (bits >> 15)
}
