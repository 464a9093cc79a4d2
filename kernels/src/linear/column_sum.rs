//! Column sums in a fixed order: of weight gradients that each token, or each key, has made apart.

use cubecl::prelude::*;

use crate::Result;
use crate::launch::device::Device;
use crate::launch::plan::Launch;
use crate::launch::tensor::{Tensor, arg, empty, f32_storage};

/// Rows that one unit adds up: two launches for up to its square.
const CHUNK: usize = 64;

/// Rows that a column sum over `rows` rows reads and that it writes, over all its launches.
pub fn column_sum_rows(rows: usize) -> (usize, usize) {
    let chunks = rows.div_ceil(CHUNK);
    let (read, written) = if chunks <= 1 { (0, 0) } else { column_sum_rows(chunks) };
    (rows.saturating_add(read), chunks + written)
}

/// The launches of a column sum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ColumnSumPlans {
    /// Numbers of a load.
    pub(crate) vector: usize,
    /// In their order, each adding up what the one before it left.
    pub launches: Vec<Launch>,
}

impl ColumnSumPlans {
    /// Plans the sum of `rows` rows of `width` numbers. Each launch is checked when it is made.
    pub fn of(device: &Device, rows: usize, width: usize) -> Self {
        let vector = device.width(4, &[width]);
        let chunks = core::iter::successors(Some(rows.div_ceil(CHUNK)), |&chunks| {
            (chunks > 1).then_some(chunks.div_ceil(CHUNK))
        });
        let items = chunks.map(|chunks| chunks.saturating_mul(width / vector));
        Self { vector, launches: items.map(|items| Launch::flat(device, "column_sum_kernel", items, CHUNK)).collect() }
    }
}

/// `sums[c] = Σ_r rows[r, c]` of f32 `[rows, width]`, in chunks of rows, chunk by chunk: the same bits in every run.
pub(crate) fn column_sum<R: Runtime>(client: &ComputeClient<R>, rows: &Tensor<R>) -> Result<Tensor<R>> {
    let device = Device::of(client);
    let width = rows.shape()[1];
    let ColumnSumPlans { vector, launches } = ColumnSumPlans::of(&device, rows.shape()[0], width);
    let mut rows = rows.clone();
    for launch in launches {
        let count = rows.shape()[0];
        let sums = empty(client, "column sums", &[count.div_ceil(CHUNK), width], f32_storage())?;
        let (grid, cube_dim) = launch.start(&device)?;
        // SAFETY: a unit reads one column of vectors in rows below `count` and writes one sum.
        unsafe {
            column_sum_kernel::launch_unchecked::<R>(
                client,
                grid,
                cube_dim,
                vector,
                arg(&rows, vector),
                arg(&sums, vector),
                count as u32,
                (width / vector) as u32,
                launch.units,
            );
        }
        rows = sums;
    }
    Ok(rows.reshaped(vec![width]))
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
