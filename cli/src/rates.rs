//! What a device gives at best: the bandwidth of a plain copy and the rate of a large square product. Every stage and every
//! step is held against the two, so each is the highest that was seen: a floor must be a floor.
//!
//! On a device, the copy: one kernel with vectors of four f32, each unit a strided share of the buffer. It moves twice the buffer's bytes, and
//! both are counted.

use std::cell::RefCell;
use std::hint::black_box;

use cubecl::prelude::*;
use rayon::prelude::*;
use serde_json::{Value, json};
use ultramem::ElementType;
use ultramem::kernels::empty;
use ultramem::kernels::linear::ProjectStrategy;
use ultramem::kernels::query::query;
use ultramem::processor::Linear;

use crate::failure::Result;
use crate::numbers::{flops, rate};
use crate::sampling::{Run, done, timed, waiting};

/// What a device gives at best.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Gigabytes per second, read and written.
    pub copy_gb_s: f64,
    /// Operations per millisecond.
    pub matrix_flop_ms: f64,
}

impl Rates {
    /// Measures a device, with products of `dtype`.
    pub fn measure<R: Runtime>(client: &ComputeClient<R>, dtype: ElementType) -> Result<Self> {
        Ok(Self { copy_gb_s: copy_gb_s(client)?, matrix_flop_ms: matrix_flop_ms(client, dtype)? })
    }

    /// Measures the processor: a copy on all cores, and products by the library that the layer takes, both f32.
    pub fn of_processor() -> Result<Self> {
        Ok(Self { copy_gb_s: host_copy_gb_s()?, matrix_flop_ms: host_flop_ms()? })
    }

    /// The least milliseconds for so many bytes and operations: the longer of the two.
    pub fn floor_ms(&self, bytes: u64, flops: u64) -> f64 {
        self.bytes_ms(bytes).max(flops as f64 / self.matrix_flop_ms)
    }

    /// The least milliseconds for so many bytes.
    pub fn bytes_ms(&self, bytes: u64) -> f64 {
        bytes as f64 / self.copy_gb_s / 1e6
    }

    /// Two lines that say what a floor is.
    pub fn text(&self) -> String {
        let (copy, product) = (rate(self.copy_gb_s), flops((self.matrix_flop_ms * 1e3) as u64));
        format!(
            "  A plain copy on this device moves {copy}, a large product does {product}/s.\n  A stage's floor is the longer of \
             its bytes at the one and its operations at the other.\n"
        )
    }

    /// What `--json` says of the rates.
    pub fn json(&self) -> [(&'static str, Value); 2] {
        [("copy_gb_s", json!(self.copy_gb_s)), ("matrix_tflop_s", json!(self.matrix_flop_ms / 1e9))]
    }
}

/// Each of `count` vectors from `input` to `output`, `CUBE_COUNT · CUBE_DIM` apart for one unit.
#[cube(launch_unchecked)]
fn copy_kernel<N: Size>(input: &Array<Vector<f32, N>>, output: &mut Array<Vector<f32, N>>, count: u32) {
    let step = CUBE_COUNT * CUBE_DIM as usize;
    for at in range_stepped(ABSOLUTE_POS, count as usize, step) {
        output[at] = input[at];
    }
}

/// The best of a few copies of a few sizes, all beyond the caches.
fn copy_gb_s<R: Runtime>(client: &ComputeClient<R>) -> Result<f64> {
    let properties = client.properties();
    let largest = properties.memory.max_page_size.min(LARGEST_COPY) as usize / VECTOR_BYTES;
    let units = properties.hardware.max_units_per_cube.min(UNITS);
    let mut best = 0.0f64;
    for vectors in [largest, largest / 2, largest / 4] {
        let bytes = vectors * VECTOR_BYTES;
        let (input, output) = (client.empty(bytes), client.empty(bytes));
        for most_cubes in [CUBES, CUBES / 32] {
            let cubes = vectors.div_ceil(units as usize).min(most_cubes) as u32;
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
            best = best.max(2.0 * bytes as f64 / shortest(client, &run)? / 1e6);
        }
    }
    Ok(best)
}

/// Elements of a vector.
const VECTOR: usize = 4;
const VECTOR_BYTES: usize = VECTOR * size_of::<f32>();
/// Well beyond the caches of any device, and no burden to its memory.
const LARGEST_COPY: u64 = 512 << 20;
const UNITS: u32 = 256;
const CUBES: usize = 8192;

/// The best of products of growing sides, square and tall, by each of the strategies.
fn matrix_flop_ms<R: Runtime>(client: &ComputeClient<R>, dtype: ElementType) -> Result<f64> {
    let mut best = 0.0f64;
    let units = match ProjectStrategy::choose(client, LARGEST_SIDE, dtype.storage()) {
        ProjectStrategy::Tile => ProjectStrategy::Cubek,
        units => units,
    };
    for (strategy, tall) in [ProjectStrategy::Tile, units].into_iter().flat_map(|it| [(it, 1), (it, TALL)]) {
        let mut side = SMALLEST_SIDE;
        while side <= LARGEST_SIDE {
            let input = empty(client, "input", &[tall * side, side], dtype.storage())?;
            let weight = empty(client, "weight", &[side, side], dtype.storage())?;
            let run = || Ok(query(client, &input, &weight, None, strategy).map(drop)?);
            let found = shortest(client, &run)?;
            best = best.max(2.0 * tall as f64 * (side as f64).powi(3) / found);
            // The next one takes eight times as long.
            if found > LONG_MS {
                break;
            }
            side *= 2;
        }
    }
    Ok(best)
}

const SMALLEST_SIDE: usize = 256;
const LARGEST_SIDE: usize = 8192;
/// Rows over columns of a tall product: a weight that stays in a cache serves them all.
const TALL: usize = 8;
/// A product that lasts this long hides its launch.
const LONG_MS: f64 = 15.0;

/// The shortest of a few runs, in milliseconds, after one that compiles.
fn shortest<R: Runtime>(client: &ComputeClient<R>, run: Run<'_>) -> Result<f64> {
    least(&waiting(client), run)
}

fn least(wait: Run<'_>, run: Run<'_>) -> Result<f64> {
    timed(wait, run, 1)?;
    (0..SAMPLES).try_fold(f64::INFINITY, |least, _| Ok(least.min(timed(wait, run, 1)?)))
}

const SAMPLES: usize = 5;

/// As [`copy_gb_s`], on all cores.
fn host_copy_gb_s() -> Result<f64> {
    let numbers = HOST_COPY / size_of::<f32>();
    let input = vec![1.0f32; numbers];
    let output = RefCell::new(vec![0.0f32; numbers]);
    let run = || {
        let mut output = output.borrow_mut();
        let pieces = output.par_chunks_mut(HOST_PIECE).zip(input.par_chunks(HOST_PIECE));
        pieces.for_each(|(output, input)| output.copy_from_slice(input));
        Ok(())
    };
    Ok(2.0 * HOST_COPY as f64 / least(&done, &run)? / 1e6)
}

/// The best of square and tall products.
fn host_flop_ms() -> Result<f64> {
    let mut best = 0.0f64;
    for (rows, side) in [(256, 256), (1024, 512), (1024, 1024), (2048, 1024)] {
        let input = vec![1.0; rows * side];
        let map = Linear::new(vec![1.0; side * side].into(), None);
        let run = || {
            black_box(map.apply(&input, side, false));
            Ok(())
        };
        best = best.max(2.0 * (rows * side * side) as f64 / least(&done, &run)?);
    }
    Ok(best)
}

/// Bytes: beyond the caches of most processors.
const HOST_COPY: usize = 256 << 20;
/// Numbers of a task.
const HOST_PIECE: usize = 1 << 18;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_floor_is_the_longer_of_bytes_and_operations() {
        let rates = Rates { copy_gb_s: 10.0, matrix_flop_ms: 1e6 };
        assert_eq!((rates.floor_ms(20_000_000, 1), rates.floor_ms(1, 5_000_000)), (2.0, 5.0));
    }
}
