//! Column sums in a fixed order: of weight gradients that each token, or each key, has made apart.

use cubecl::prelude::*;

use crate::Result;
use crate::device::Device;
use crate::tensor::{Tensor, arg, empty, f32_storage};

/// Rows that one unit adds up: two launches for up to its square.
const CHUNK: usize = 64;

/// Rows that a column sum over `rows` rows reads and that it writes, over all its launches.
pub fn column_sum_rows(rows: usize) -> (usize, usize) {
    let chunks = rows.div_ceil(CHUNK);
    let (read, written) = if chunks <= 1 { (0, 0) } else { column_sum_rows(chunks) };
    (rows.saturating_add(read), chunks + written)
}

/// `sums[c] = Σ_r rows[r, c]` of f32 `[rows, width]`, in chunks of rows, chunk by chunk: the same bits in every run. With `used`,
/// u32 `[1]` and a number, only the first `used[0] · number` rows count.
pub(crate) fn column_sum<R: Runtime>(
    client: &ComputeClient<R>,
    rows: &Tensor<R>,
    used: Option<(&Tensor<R>, usize)>,
) -> Result<Tensor<R>> {
    let device = Device::of(client);
    let (mut rows, mut used) = (rows.clone(), used);
    loop {
        let (count, width) = (rows.shape()[0], rows.shape()[1]);
        let chunks = count.div_ceil(CHUNK);
        let sums = empty(client, "column sums", &[chunks, width], f32_storage())?;
        let vector = device.width(4, &[width]);
        let vectors = width / vector;
        let units = device.flat(chunks * vectors);
        // SAFETY: a unit reads one column of vectors in rows below `count` and writes one sum.
        unsafe {
            column_sum_kernel::launch_unchecked::<R>(
                client,
                device.grid((chunks * vectors).div_ceil(units))?,
                CubeDim::new_1d(units as u32),
                vector,
                arg(&rows, vector),
                arg(used.map_or(&rows, |(used, _)| used), 1),
                arg(&sums, vector),
                count as u32,
                vectors as u32,
                units,
                used.map(|(_, number)| number as u32),
            );
        }
        if chunks == 1 {
            return Ok(Tensor::new_contiguous(vec![width], sums.handle, sums.dtype));
        }
        (rows, used) = (sums, None);
    }
}

#[cube(launch_unchecked)]
fn column_sum_kernel<N: Size>(
    rows: &Array<Vector<f32, N>>,
    used: &Array<u32>,
    sums: &mut Array<Vector<f32, N>>,
    count: u32,
    vectors: u32,
    #[comptime] units: usize,
    #[comptime] per_used: Option<u32>,
) {
    let item = CUBE_POS * units + UNIT_POS as usize;
    let vectors = vectors as usize;
    if item >= (count as usize).div_ceil(CHUNK) * vectors {
        terminate!();
    }
    let mut last = count as usize;
    if comptime!(per_used.is_some()) {
        last = min(last, (used[0] * comptime!(per_used.unwrap_or(1))) as usize);
    }
    let first = item / vectors * CHUNK;
    let mut sum = Vector::<f32, N>::new(0.0);
    for row in first..min(first + CHUNK, last) {
        sum += rows[row * vectors + item % vectors];
    }
    sums[item] = sum;
}
