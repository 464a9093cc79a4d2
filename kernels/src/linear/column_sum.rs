//! Column sums in a fixed order: of weight gradients that each token, or each key, has made apart.

use cubecl::prelude::*;

use crate::Result;
use crate::launch::device::Device;
use crate::launch::loops::check_loops;
use crate::launch::tensor::{Tensor, arg, empty, f32_storage};

/// Rows that one unit adds up: two launches for up to its square.
const CHUNK: usize = 64;

/// Rows that a column sum over `rows` rows reads and that it writes, over all its launches.
pub fn column_sum_rows(rows: usize) -> (usize, usize) {
    let chunks = rows.div_ceil(CHUNK);
    let (read, written) = if chunks <= 1 { (0, 0) } else { column_sum_rows(chunks) };
    (rows.saturating_add(read), chunks + written)
}

/// `sums[c] = Σ_r rows[r, c]` of f32 `[rows, width]`, in chunks of rows, chunk by chunk: the same bits in every run.
pub(crate) fn column_sum<R: Runtime>(client: &ComputeClient<R>, rows: &Tensor<R>) -> Result<Tensor<R>> {
    let device = Device::of(client);
    let mut rows = rows.clone();
    loop {
        let (count, width) = (rows.shape()[0], rows.shape()[1]);
        let chunks = count.div_ceil(CHUNK);
        let sums = empty(client, "column sums", &[chunks, width], f32_storage())?;
        let vector = device.width(4, &[width]);
        let vectors = width / vector;
        let units = device.flat(chunks * vectors);
        check_loops("column_sum_kernel", CHUNK)?;
        // SAFETY: a unit reads one column of vectors in rows below `count` and writes one sum.
        unsafe {
            column_sum_kernel::launch_unchecked::<R>(
                client,
                device.grid((chunks * vectors).div_ceil(units))?,
                CubeDim::new_1d(units as u32),
                vector,
                arg(&rows, vector),
                arg(&sums, vector),
                count as u32,
                vectors as u32,
                units,
            );
        }
        if chunks == 1 {
            return Ok(sums.reshaped(vec![width]));
        }
        rows = sums;
    }
}

#[cube(launch_unchecked)]
fn column_sum_kernel<N: Size>(
    rows: &Array<Vector<f32, N>>,
    sums: &mut Array<Vector<f32, N>>,
    count: u32,
    vectors: u32,
    #[comptime] units: usize,
) {
    let item = CUBE_POS * units + UNIT_POS as usize;
    let vectors = vectors as usize;
    if item >= (count as usize).div_ceil(CHUNK) * vectors {
        terminate!();
    }
    let first = item / vectors * CHUNK;
    let mut sum = Vector::<f32, N>::new(0.0);
    for row in first..min(first + CHUNK, count as usize) {
        sum += rows[row * vectors + item % vectors];
    }
    sums[item] = sum;
}
