//! A bias, added in place: `map[t, o] += b[o]`. Reads and writes `[tokens, width]` once.

use cubecl::prelude::*;

use crate::Result;
use crate::launch::device::Device;
use crate::launch::plan::Launch;
use crate::launch::tensor::{Tensor, arg};

/// The launch that adds a bias to `[tokens, width]`.
pub(super) fn bias_launch(device: &Device, tokens: usize, width: usize) -> Launch {
    let items = tokens.saturating_mul(width / device.width(4, &[width]));
    Launch::flat(device, "add_bias_kernel", items, 0)
}

/// Adds `bias` f32 `[width]` to each row of `map` f32 `[tokens, width]`, whose shapes the caller has checked.
pub(super) fn add_bias<R: Runtime>(client: &ComputeClient<R>, map: &Tensor<R>, bias: &Tensor<R>) -> Result<()> {
    let (device, columns) = (Device::of(client), bias.shape()[0]);
    let count = map.shape().iter().product::<usize>();
    if count == 0 {
        return Ok(());
    }
    let width = device.width(4, &[columns]);
    let items = count / width;
    let launch = bias_launch(&device, count / columns, columns);
    let (grid, cube_dim) = launch.start(&device)?;
    // SAFETY: both are f32, and a unit touches its own vector below their number.
    unsafe {
        add_bias_kernel::launch_unchecked::<R>(
            client,
            grid,
            cube_dim,
            width,
            arg(map, width),
            arg(bias, width),
            items as u32,
            (columns / width) as u32,
            launch.units,
        );
    }
    Ok(())
}

#[cube(launch_unchecked)]
fn add_bias_kernel<N: Size>(
    map: &mut Array<Vector<f32, N>>,
    bias: &Array<Vector<f32, N>>,
    items: u32,
    columns: u32,
    #[comptime] units: usize,
) {
    let item = CUBE_POS * units + UNIT_POS as usize;
    if item < items as usize {
        map[item] += bias[item % columns as usize];
    }
}
