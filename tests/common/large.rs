//! A value table past 2³² bytes and past 2³² elements, read at the rows where an address of 31, 32 or 33 bits would end. The table's other
//! rows are never written: where an address is cut short, what is read is not what is expected.

use std::collections::BTreeSet;

use cubecl::prelude::*;
use ultramem::kernels::combine::Chosen;
use ultramem::kernels::expand::{ExpandStrategy, Memory, expand};
use ultramem::kernels::query::ProjectStrategy;
use ultramem::kernels::{Error, empty, from_f32, from_u32};
use ultramem::{ElementType, HostTensor};

/// Numbers of a value row.
pub const WIDTH: usize = 384;
const HIDDEN: usize = 64;
const TOKENS: usize = 3;
const TOP_M: usize = 16;
const UNITS: u32 = 128;

/// The number at `column` of `row`, exact in every element type.
fn number(row: usize, column: usize) -> f64 {
    ((row % 61 * 7 + column * 3) % 64) as f64 / 32.0 - 1.0
}

/// Writes [`number`]s from `first_row` on.
#[cube(launch_unchecked)]
fn fill_kernel<E: Float>(numbers: &mut Array<E>, first_row: u32, #[define(E)] _dtype: StorageType) {
    let row = first_row + ABSOLUTE_POS as u32 / WIDTH as u32;
    let column = ABSOLUTE_POS as u32 % WIDTH as u32;
    numbers[ABSOLUTE_POS] = E::cast_from(f32::cast_from((row % 61 * 7 + column * 3) % 64) / 32.0 - 1.0);
}

fn fill<R: Runtime>(
    client: &ComputeClient<R>,
    numbers: ArrayArg<R>,
    first_row: usize,
    rows: usize,
    dtype: ElementType,
) {
    // SAFETY: the numbers are `rows` whole rows, each a whole number of cubes.
    unsafe {
        fill_kernel::launch_unchecked::<R>(
            client,
            CubeCount::Static((rows * WIDTH) as u32 / UNITS, 1, 1),
            CubeDim::new_1d(UNITS),
            numbers,
            first_row as u32,
            dtype.storage(),
        );
    }
}

/// The slots of every token: the table's ends, both sides of each boundary that lies in it, and rows in between.
fn slots(rows: usize, bytes: usize) -> Vec<usize> {
    let boundaries = [1usize << 31, 1 << 32, 1 << 33].map(|limit| [limit / WIDTH, limit / bytes / WIDTH]);
    let around = boundaries.into_iter().flatten().flat_map(|row| [row, row + 1]);
    let mut chosen: Vec<usize> = [0, rows - 1].into_iter().chain(around).filter(|&row| row < rows).collect();
    while chosen.len() < TOKENS * TOP_M {
        chosen.push((chosen.len() * 2_654_435_761) % rows);
    }
    chosen
}

/// Reads and projects rows of a table of `rows` rows by every strategy and compares with sums in f64.
pub fn hold<R: Runtime>(client: &ComputeClient<R>, rows: usize, dtype: ElementType) -> Result<(), Error> {
    let slots = slots(rows, dtype.size());
    let scores: Vec<f32> = (0..slots.len()).map(|i| (i * 37 % 23) as f32 / 23.0 - 0.5).collect();
    let values = empty(client, "values", &[rows, WIDTH], dtype.storage())?;
    let row_bytes = (WIDTH * dtype.size()) as u64;
    for row in slots.iter().copied().collect::<BTreeSet<_>>() {
        let (before, after) = (row as u64 * row_bytes, (rows - row - 1) as u64 * row_bytes);
        let handle = values.handle.clone().offset_start(before).offset_end(after);
        // SAFETY: what is left of the buffer is one row.
        fill(client, unsafe { ArrayArg::from_raw_parts(handle, WIDTH) }, row, 1, dtype);
    }
    let weight = empty(client, "weight", &[WIDTH, HIDDEN], dtype.storage())?;
    // SAFETY: the weight has as many numbers as HIDDEN rows.
    fill(client, unsafe { ArrayArg::from_raw_parts(weight.handle.clone(), WIDTH * HIDDEN) }, 0, HIDDEN, dtype);

    let indices: Vec<u32> = slots.iter().map(|&slot| slot as u32).collect();
    let chosen = Chosen {
        slots: from_u32(client, &[TOKENS, 1, TOP_M], &indices)?,
        scores: from_f32(client, &[TOKENS, 1, TOP_M, 1], &scores)?,
    };
    let memory = Memory { values: &values, weight: &weight, shuffle: None, gate: None };
    let expected = expected(&slots, &scores);
    for strategy in [ExpandStrategy::Fused, ExpandStrategy::Pooled(ProjectStrategy::Tile)] {
        let output = expand(client, &chosen, &memory, strategy)?;
        let bytes = client.read_one(output.handle).unwrap().to_vec();
        let found = HostTensor::new([TOKENS, HIDDEN], dtype, bytes).unwrap().to_f32();
        let error: f64 = found.iter().zip(&expected).map(|(&f, e)| (f64::from(f) - e).powi(2)).sum();
        let norm: f64 = expected.iter().map(|e| e * e).sum();
        assert!(error <= 1e-4 * norm, "{rows} rows, {dtype}, {strategy:?}: {} of {}", error.sqrt(), norm.sqrt());
    }
    Ok(())
}

fn expected(slots: &[usize], scores: &[f32]) -> Vec<f64> {
    let weight = |column: usize, out: usize| number((column * HIDDEN + out) / WIDTH, (column * HIDDEN + out) % WIDTH);
    let token = |(slots, scores): (&[usize], &[f32])| {
        let pooled = |column| slots.iter().zip(scores).map(|(&row, &s)| f64::from(s) * number(row, column)).sum();
        let pooled: Vec<f64> = (0..WIDTH).map(pooled).collect();
        (0..HIDDEN).map(|out| (0..WIDTH).map(|column| pooled[column] * weight(column, out)).sum()).collect::<Vec<f64>>()
    };
    slots.chunks(TOP_M).zip(scores.chunks(TOP_M)).flat_map(token).collect()
}
