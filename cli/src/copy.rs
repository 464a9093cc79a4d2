//! What the device's memory gives: the bandwidth of a plain copy, against which every stage is held.
//!
//! One kernel copies a large buffer with vectors of four f32, each unit a strided share of it. It moves twice the buffer's
//! bytes, and both are counted.

use cubecl::prelude::*;

use crate::engine::{timed, times};
use crate::failure::Result;

/// Each of `count` vectors from `input` to `output`, `CUBE_COUNT · CUBE_DIM` apart for one unit.
#[cube(launch_unchecked)]
fn copy_kernel<N: Size>(input: &Array<Vector<f32, N>>, output: &mut Array<Vector<f32, N>>, count: u32) {
    let step = CUBE_COUNT * CUBE_DIM as usize;
    for at in range_stepped(ABSOLUTE_POS, count as usize, step) {
        output[at] = input[at];
    }
}

/// Gigabytes per second, read and written: the median of a few copies.
pub fn copy_gb_s<R: Runtime>(client: &ComputeClient<R>, samples: usize) -> Result<f64> {
    let properties = client.properties();
    let vectors = (properties.memory.max_page_size / 2).min(LARGEST) as usize / VECTOR_BYTES;
    let bytes = vectors * VECTOR_BYTES;
    let units = properties.hardware.max_units_per_cube.min(UNITS);
    let cubes = vectors.div_ceil(units as usize).min(CUBES) as u32;
    let (input, output) = (client.empty(bytes), client.empty(bytes));
    let run = || {
        // SAFETY: both buffers hold `vectors` vectors, and no unit goes past `count`.
        unsafe {
            copy_kernel::launch_unchecked::<R>(
                client,
                CubeCount::Static(cubes, 1, 1),
                CubeDim::new_1d(units),
                VECTOR,
                ArrayArg::from_raw_parts(input.clone(), vectors),
                ArrayArg::from_raw_parts(output.clone(), vectors),
                vectors as u32,
            );
        }
        Ok(())
    };
    timed(client, &run, 1)?;
    let found = (0..samples.clamp(3, MOST_SAMPLES)).map(|_| timed(client, &run, 1)).collect::<Result<_>>()?;
    Ok(2.0 * bytes as f64 / times(found).median / 1e6)
}

/// Elements of a vector.
const VECTOR: usize = 4;
const VECTOR_BYTES: usize = VECTOR * size_of::<f32>();
/// Well beyond the caches of any device, and no burden to its memory.
const LARGEST: u64 = 512 << 20;
const UNITS: u32 = 256;
const CUBES: usize = 8192;
const MOST_SAMPLES: usize = 10;
