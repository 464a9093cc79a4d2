//! A tensor in another element type. Reads it once and writes it once.

use cubecl::ir::StorageType;
use cubecl::prelude::*;

use crate::Result;
use crate::launch::device::Device;
use crate::launch::plan::Launch;
use crate::launch::tensor::{Tensor, arg, empty, index};

/// The launch that casts `count` numbers.
pub(crate) fn cast_launch(device: &Device, count: usize) -> Launch {
    Launch::flat(device, "cast_kernel", count / device.width(4, &[count]), 0)
}

/// `tensor`, f32, f16 or bf16, in the type `dtype`; itself where that is its type.
pub(crate) fn cast<R: Runtime>(client: &ComputeClient<R>, tensor: &Tensor<R>, dtype: StorageType) -> Result<Tensor<R>> {
    if tensor.dtype == dtype {
        return Ok(tensor.clone());
    }
    let (device, count) = (Device::of(client), tensor.shape().iter().product::<usize>());
    let to = empty(client, "tensor in another type", tensor.shape(), dtype)?;
    if count == 0 {
        return Ok(to);
    }
    let width = device.width(4, &[count]);
    let vectors = index("numbers to cast", count / width)?;
    let launch = cast_launch(&device, count);
    let (grid, cube_dim) = launch.start(&device)?;
    // SAFETY: both tensors have one shape, and a unit touches its own vector below their number.
    unsafe {
        cast_kernel::launch_unchecked::<R>(
            client,
            grid,
            cube_dim,
            width,
            arg(tensor, width),
            arg(&to, width),
            vectors,
            launch.units,
            tensor.dtype,
            dtype,
        );
    }
    Ok(to)
}

#[cube(launch_unchecked)]
fn cast_kernel<E: Float, O: Float, N: Size>(
    from: &Array<Vector<E, N>>,
    to: &mut Array<Vector<O, N>>,
    vectors: u32,
    #[comptime] units: usize,
    #[define(E)] _from_type: StorageType,
    #[define(O)] _to_type: StorageType,
) {
    let item = CUBE_POS * units + UNIT_POS as usize;
    if item < vectors as usize {
        to[item] = Vector::cast_from(from[item]);
    }
}
