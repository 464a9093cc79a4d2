//! Products: `out = a · b`, by panels where a matrix is prepared, `gemm`'s for many rows of others, dot products for a few.
//!
//! A product is cut into blocks of its output, each one task. How, the shape alone decides: any number of threads gives the same bits.
//!
//! Moves each operand once per block of the other's side; a few rows times a matrix move the matrix once.

use std::borrow::Cow;
use std::ops::Range;

use gemm::{Parallelism, gemm};
use rayon::prelude::*;

use crate::numbers::dots;
use crate::output::Output;
use crate::panels::Panels;

/// A linear map of the input: `W x + b`.
#[derive(Debug, Clone)]
pub struct Linear<'a> {
    /// `[outputs, inputs]`.
    pub weight: Cow<'a, [f32]>,
    /// `[outputs]`, if there is one.
    pub bias: Option<Cow<'a, [f32]>>,
    /// A copy of the weight for whoever multiplies many times.
    panels: Option<Panels>,
}

impl<'a> Linear<'a> {
    /// A map of weights that lie anywhere.
    pub fn new(weight: Cow<'a, [f32]>, bias: Option<Cow<'a, [f32]>>) -> Self {
        Self { weight, bias, panels: None }
    }

    /// The same with a copy of its weight in panels.
    pub(crate) fn prepared(self, inputs: usize) -> Self {
        Self { panels: Some(Panels::new(&self.weight, inputs)), ..self }
    }

    /// `x Wᵀ + b` for each row of `x` `[rows, inputs]`; the same bits in a call of any number of rows, if `invariant`.
    pub fn apply(&self, x: &[f32], inputs: usize, invariant: bool) -> Vec<f32> {
        let (rows, outputs) = (x.len() / inputs, self.weight.len() / inputs);
        let mut out = match &self.bias {
            Some(bias) => bias.repeat(rows),
            None => vec![0.0; rows * outputs],
        };
        let weight = Matrix::new(&self.weight, inputs).transposed();
        match &self.panels {
            Some(panels) => panels.add_product(&mut out, x),
            None if invariant || rows <= FEW => add_dots(&mut out, Matrix::new(x, inputs), weight),
            None => add_product(&mut out, Matrix::new(x, inputs), weight),
        }
        out
    }
}

/// A matrix in memory: `rows · columns` numbers, one row or one column after the other.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix<'a> {
    numbers: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Rows of `columns` numbers, one after the other.
    pub fn new(numbers: &'a [f32], columns: usize) -> Self {
        let rows = numbers.len() / columns;
        let numbers = &numbers[..rows * columns];
        Self { numbers, rows, columns, row_stride: columns, column_stride: 1 }
    }

    pub fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// The matrix from a row and a column on.
    fn from(self, row: usize, column: usize) -> &'a [f32] {
        &self.numbers[row * self.row_stride + column * self.column_stride..]
    }
}

/// Rows of `a` that are multiplied by dot products.
const FEW: usize = 4;
/// Rows and columns of a block of the output, unless there is less to do.
const BLOCK: usize = 256;
/// Multiply-adds that are worth a task.
const WORTH_A_TASK: usize = 1 << 18;

/// `out += a · b`, `out` `[a.rows, b.columns]`, on all cores.
pub(crate) fn add_product(out: &mut [f32], a: Matrix<'_>, b: Matrix<'_>) {
    if out.is_empty() {
        return;
    }
    let (rows, columns) = (a.rows.min(BLOCK), b.columns.min(BLOCK));
    let blocks_of_columns = b.columns.div_ceil(columns);
    let out = Output::new(out, a.rows, b.columns);
    let blocks = a.rows.div_ceil(rows) * blocks_of_columns;
    (0..blocks).into_par_iter().for_each(|at| {
        let (row, column) = (at / blocks_of_columns * rows, at % blocks_of_columns * columns);
        add_block(&out, row..(row + rows).min(a.rows), column..(column + columns).min(b.columns), a, b);
    });
}

/// Adds to one block of `out`. Two calls at one time are for blocks that share no number.
fn add_block(out: &Output<'_>, rows: Range<usize>, columns: Range<usize>, a: Matrix<'_>, b: Matrix<'_>) {
    assert!(a.columns == b.rows, "a product of {} columns and {} rows", a.columns, b.rows);
    let (block, stride) = out.block(&rows, &columns);
    let (m, n, k) = (rows.len(), columns.len(), a.columns);
    if m == 0 || n == 0 {
        return;
    }
    let (lhs, rhs) = (a.from(rows.start, 0), b.from(0, columns.start));
    // SAFETY: the block lies within the output, as `block` checks, and no other task has it; a matrix lies within its slice, as it is made.
    unsafe {
        gemm(
            m,
            n,
            k,
            block,
            1,
            stride as isize,
            true,
            lhs.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            rhs.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// `out += a · b` by a dot product each, of rows of `a` and columns of `b` that lie in one piece: the faster way for a few rows, and the one whose sums
/// do not depend on how many there are.
fn add_dots(out: &mut [f32], a: Matrix<'_>, b: Matrix<'_>) {
    if out.is_empty() {
        return;
    }
    let (rows, depth) = (a.rows, a.columns);
    let columns = (WORTH_A_TASK / (rows * depth).max(1)).max(1);
    let mut sums = vec![0.0; out.len()];
    sums.par_chunks_mut(columns * rows).enumerate().for_each(|(at, sums)| {
        dots(
            1,
            #[inline(always)]
            |place| (&a.from(place % rows, 0)[..depth], &b.from(0, at * columns + place / rows)[..depth]),
            sums,
        );
    });
    for (row, out) in out.chunks_exact_mut(b.columns).enumerate() {
        out.iter_mut().zip(sums[row..].iter().step_by(rows)).for_each(|(out, sum)| *out += sum);
    }
}
