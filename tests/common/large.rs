//! A value table past 2³² bytes and past 2³² elements, read and updated at the rows where an address of 31, 32 or 33 bits would end. The
//! table's other rows are never written: where an address is cut short, what is read is not what is expected.

use std::collections::BTreeSet;

use cubecl::prelude::*;
use cubecl::server::Handle;
use ultramem::kernels::combine::Chosen;
use ultramem::kernels::expand::{ExpandStrategy, Memory, Pooled, expand, expand_backward};
use ultramem::kernels::linear::ProjectStrategy;
use ultramem::kernels::optimiser::{Optimiser, Rule, Step};
use ultramem::kernels::{Error, RowSource, Tensor, empty, from_f32, from_u32};
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

/// A table of which the chosen rows alone are written, and what a forward and a backward pass read beside it.
struct Large<'a, R: Runtime> {
    client: &'a ComputeClient<R>,
    dtype: ElementType,
    slots: Vec<usize>,
    scores: Vec<f32>,
    chosen: Chosen<R>,
    values: Tensor<R>,
    /// `[WIDTH, HIDDEN]`, and the same numbers as `[HIDDEN, WIDTH]`.
    weight: [Tensor<R>; 2],
}

/// Reads and projects rows of a table of `rows` rows by every strategy, takes their gradients and updates them, and compares with sums
/// in f64.
pub fn hold<R: Runtime>(client: &ComputeClient<R>, rows: usize, dtype: ElementType) -> Result<(), Error> {
    let mut large = Large::new(client, rows, dtype)?;
    large.hold_forward()?;
    large.hold_update()
}

impl<'a, R: Runtime> Large<'a, R> {
    fn new(client: &'a ComputeClient<R>, rows: usize, dtype: ElementType) -> Result<Self, Error> {
        let slots = slots(rows, dtype.size());
        let scores: Vec<f32> = (0..slots.len()).map(|i| (i * 37 % 23) as f32 / 23.0 - 0.5).collect();
        let values = empty(client, "values", &[rows, WIDTH], dtype.storage())?;
        let weight = empty(client, "weight", &[WIDTH, HIDDEN], dtype.storage())?;
        // SAFETY: the weight has as many numbers as HIDDEN rows.
        fill(client, unsafe { ArrayArg::from_raw_parts(weight.handle.clone(), WIDTH * HIDDEN) }, 0, HIDDEN, dtype);
        let indices: Vec<u32> = slots.iter().map(|&slot| slot as u32).collect();
        let chosen = Chosen {
            slots: from_u32(client, &[TOKENS, 1, TOP_M], &indices)?,
            scores: from_f32(client, &[TOKENS, 1, TOP_M, 1], &scores)?,
        };
        let transposed = weight.reshaped(vec![HIDDEN, WIDTH]);
        let large = Self { client, dtype, slots, scores, chosen, values, weight: [weight, transposed] };
        for row in large.used() {
            // SAFETY: what is left of the buffer is one row.
            fill(client, unsafe { ArrayArg::from_raw_parts(large.row(row), WIDTH) }, row, 1, dtype);
        }
        Ok(large)
    }

    fn used(&self) -> BTreeSet<usize> {
        self.slots.iter().copied().collect()
    }

    /// A row of the table.
    fn row(&self, row: usize) -> Handle {
        let (rows, row_bytes) = (self.values.shape()[0], (WIDTH * self.dtype.size()) as u64);
        let (before, after) = (row as u64 * row_bytes, (rows - row - 1) as u64 * row_bytes);
        self.values.handle.clone().offset_start(before).offset_end(after)
    }

    fn memory(&self) -> Memory<'_, R> {
        Memory {
            values: std::slice::from_ref(&self.values),
            rows: RowSource::own(&[], 1, self.values.shape()[0]),
            weight: Some(&self.weight[0]),
            bias: None,
            gate: None,
            output_gate: None,
        }
    }

    fn assert_close(&self, what: &str, found: &[f32], expected: &[f64]) {
        assert_eq!(found.len(), expected.len(), "{what}");
        let error: f64 = found.iter().zip(expected).map(|(&f, e)| (f64::from(f) - e).powi(2)).sum();
        let norm: f64 = expected.iter().map(|e| e * e).sum();
        let (rows, dtype) = (self.values.shape()[0], self.dtype);
        assert!(error <= 1e-4 * norm, "{rows} rows, {dtype}, {what}: {} of {}", error.sqrt(), norm.sqrt());
    }

    fn read(&self, handle: Handle, dtype: ElementType) -> Vec<f32> {
        let bytes = self.client.read_one(handle).unwrap().to_vec();
        HostTensor::new([bytes.len() / dtype.size()], dtype, bytes).unwrap().to_f32()
    }

    fn hold_forward(&self) -> Result<(), Error> {
        let expected = expected(&self.slots, &self.scores);
        for strategy in [ExpandStrategy::Fused, ExpandStrategy::Pooled(ProjectStrategy::Tile)] {
            let output = expand(self.client, &self.chosen, &self.memory(), strategy)?;
            self.assert_close(&format!("{strategy:?}"), &self.read(output.handle.clone(), self.dtype), &expected);
        }
        Ok(())
    }

    fn hold_update(&mut self) -> Result<(), Error> {
        let gradient = |token: usize, out: usize| ((token * 5 + out * 3) % 16) as f32 / 16.0 - 0.5;
        let numbers: Vec<f32> = (0..TOKENS * HIDDEN).map(|at| gradient(at / HIDDEN, at % HIDDEN)).collect();
        let rounded = HostTensor::from_f32([TOKENS, HIDDEN], &numbers).unwrap();
        let handle = self.client.create_from_slice(rounded.cast(self.dtype).bytes());
        let grad_output = Tensor::new_contiguous(self.client, vec![TOKENS, HIDDEN], handle, self.dtype.storage());
        let (memory, tile) = (self.memory(), ProjectStrategy::Tile);
        let saved = Pooled { pooled: None, projected: None };
        let found =
            expand_backward(self.client, &self.chosen, &memory, Some(&self.weight[1]), saved, &grad_output, tile)?;

        let of_pooled = |token, column| -> f64 {
            (0..HIDDEN).map(|out| f64::from(gradient(token, out)) * number(out, column)).sum()
        };
        let entries = || self.slots.iter().enumerate().map(|(at, &row)| (at, at / TOP_M, row));
        let score = |token: usize, row: usize| (0..WIDTH).map(|c| of_pooled(token, c) * number(row, c)).sum();
        let scores: Vec<f64> = entries().map(|(_, token, row)| score(token, row)).collect();
        self.assert_close("gradient of the scores", &self.read(found.scores.handle.clone(), ElementType::F32), &scores);
        let row_gradient = |row: usize, column: usize| -> f64 {
            let own = entries().filter(|(_, _, other)| *other == row);
            own.map(|(at, token, _)| f64::from(self.scores[at]) * of_pooled(token, column)).sum()
        };
        let rate = 0.125;
        let mut optimiser = Optimiser::new(self.client, Rule::Sgd { momentum: 0.0 }, &[self.values.shape()[0]], WIDTH)?;
        optimiser.step(self.client, std::slice::from_mut(&mut self.values), &found.values, &Step::new(rate))?;
        for row in self.used() {
            let expected = (0..WIDTH).map(|c| number(row, c) - f64::from(rate) * row_gradient(row, c));
            let expected: Vec<f64> = expected.collect();
            self.assert_close(&format!("updated row {row}"), &self.read(self.row(row), self.dtype), &expected);
        }
        Ok(())
    }
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
