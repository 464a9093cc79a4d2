//! Products with a matrix that is prepared for many of them: `out = x Wᵀ`, `x` `[rows, depth]`, `W` `[columns, depth]`.
//!
//! `W` lies in panels of 64 of its rows, the depth outermost, zeros past the last one: `[panels, depth, 64]`. A tile of six rows of `x` and a panel is
//! summed in registers. Every sum is taken in the order of the depth, so a row's numbers have the same bits in a product of any number of rows, on any
//! number of threads.
//!
//! Moves each panel, 256 bytes a number of the depth, once per 96 rows, and `x` once per panel, from the cache. Scratch: `x` once more, tile by tile.
//! Panics at an output that is not `[rows, columns]`: lengths are checked where the layer is made.

use std::cmp::Ordering;
use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::numbers::Aligned;
use crate::output::Output;

/// Rows of `W` in a panel.
const WIDTH: usize = 64;
/// Numbers of the depth that are summed at a time: so much of a panel stays in the first cache while all rows pass.
const DEPTH: usize = 96;
/// Rows of `x` that a task multiplies.
const ROWS: usize = 96;
/// Rows of `x` in a tile.
const TILE: usize = 6;

/// A matrix in panels, f32.
#[derive(Debug, Clone, Default)]
pub(crate) struct Panels {
    /// `[panels, depth, 64]`.
    numbers: Aligned,
    depth: usize,
    /// Rows of `W`: columns of the output.
    columns: usize,
}

impl Panels {
    /// Of a matrix `[columns, depth]`.
    pub fn new(matrix: &[f32], depth: usize) -> Self {
        let columns = matrix.len() / depth;
        let mut numbers = Aligned::zeros(columns.div_ceil(WIDTH) * WIDTH * depth);
        let panels = numbers.par_chunks_exact_mut(WIDTH * depth).zip(matrix.par_chunks(WIDTH * depth));
        panels.for_each(|(panel, rows)| {
            // Few numbers of each row at a time, so that what is written next to each other is still in the cache.
            for from in (0..depth).step_by(16) {
                for (column, row) in rows.chunks_exact(depth).enumerate() {
                    let panel = panel[from * WIDTH..].chunks_exact_mut(WIDTH);
                    panel.zip(&row[from..depth.min(from + 16)]).for_each(|(panel, &x)| panel[column] = x);
                }
            }
        });
        Self { numbers, depth, columns }
    }

    /// `out += x Wᵀ` on all cores.
    pub fn add_product(&self, out: &mut [f32], x: &[f32]) {
        let (rows, panels) = (x.len() / self.depth, self.columns.div_ceil(WIDTH));
        let x = &in_tiles(x, self.depth);
        let out = Output::new(out, rows, self.columns);
        (0..rows.div_ceil(ROWS) * panels).into_par_iter().for_each(|task| {
            let first = task / panels * ROWS;
            self.multiply(&out, x, first..rows.min(first + ROWS), task % panels, true);
        });
    }

    /// `out = x Wᵀ` on this core.
    pub fn product_here(&self, out: &mut [f32], x: &[f32]) {
        let rows = x.len() / self.depth;
        let x = &in_tiles(x, self.depth);
        let out = Output::new(out, rows, self.columns);
        (0..self.columns.div_ceil(WIDTH)).for_each(|panel| self.multiply(&out, x, 0..rows, panel, false));
    }

    /// Writes some rows of one panel's columns, which no other task has.
    fn multiply(&self, out: &Output<'_>, x: &[f32], rows: Range<usize>, panel: usize, add: bool) {
        let columns = panel * WIDTH..self.columns.min((panel + 1) * WIDTH);
        let panel = &self.numbers[panel * WIDTH * self.depth..][..WIDTH * self.depth];
        pulp::Arch::new().dispatch(Multiply { panel, depth: self.depth, x, out, rows, columns, add });
    }
}

/// Rows of `depth` numbers in tiles of six, the last of what is left: of each the depth outermost, `[tiles, depth, rows of the tile]`.
fn in_tiles(x: &[f32], depth: usize) -> Vec<f32> {
    let mut tiles = vec![0.0; x.len()];
    let parts = tiles.par_chunks_mut(TILE * depth).zip(x.par_chunks(TILE * depth)).with_min_len(16);
    parts.for_each(|(tile, x)| {
        let rows = x.len() / depth;
        for (r, row) in x.chunks_exact(depth).enumerate() {
            tile[r..].iter_mut().step_by(rows).zip(row).for_each(|(tile, x)| *tile = *x);
        }
    });
    tiles
}

/// Some rows of `x` times one panel.
struct Multiply<'a> {
    /// `[depth, 64]`.
    panel: &'a [f32],
    depth: usize,
    /// In tiles.
    x: &'a [f32],
    out: &'a Output<'a>,
    rows: Range<usize>,
    columns: Range<usize>,
    add: bool,
}

impl WithSimd for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // A tile's sums take up most of the registers.
        if S::REGISTER_COUNT >= 32 { self.run::<S, 4>(simd) } else { self.run::<S, 2>(simd) }
    }
}

impl<'a> Multiply<'a> {
    #[inline(always)]
    fn run<S: Simd, const VECTORS: usize>(&self, simd: S) {
        for from in (0..self.depth).step_by(DEPTH) {
            let depth = from..self.depth.min(from + DEPTH);
            for first in self.rows.clone().step_by(TILE) {
                match self.rows.end - first {
                    1 => self.tile::<S, VECTORS, 1>(simd, first, depth.clone()),
                    2 => self.tile::<S, VECTORS, 2>(simd, first, depth.clone()),
                    3 => self.tile::<S, VECTORS, 3>(simd, first, depth.clone()),
                    4 => self.tile::<S, VECTORS, 4>(simd, first, depth.clone()),
                    5 => self.tile::<S, VECTORS, 5>(simd, first, depth.clone()),
                    _ => self.tile::<S, VECTORS, 6>(simd, first, depth.clone()),
                }
            }
        }
    }

    /// `R` rows of `x` from row `first` on, with all columns, some vectors of them at a time.
    #[inline(always)]
    fn tile<S: Simd, const VECTORS: usize, const R: usize>(&self, simd: S, first: usize, depth: Range<usize>) {
        let (x, _) = self.x[first * self.depth..][depth.start * R..depth.end * R].as_chunks::<R>();
        let (panel, _) = self.panel[depth.start * WIDTH..depth.end * WIDTH].as_chunks::<WIDTH>();
        let (step, add) = (VECTORS * S::F32_LANES, self.add || depth.start > 0);
        let count = self.columns.len();
        for at in (0..count).step_by(step) {
            let columns = self.columns.start + at..self.columns.start + count.min(at + step);
            let zero = [simd.splat_f32s(0.0); VECTORS];
            let mut sums = [zero; R];
            if add {
                sums.iter_mut()
                    .enumerate()
                    .for_each(|(r, sums)| *sums = load(simd, self.piece(first + r, columns.clone())));
            }
            for (x, panel) in x.iter().zip(panel) {
                let (vectors, _) = S::as_simd_f32s(&panel[at..][..step]);
                for (sums, &x) in sums.iter_mut().zip(x) {
                    let x = simd.splat_f32s(x);
                    for (sum, vector) in sums.iter_mut().zip(vectors) {
                        *sum = simd.mul_add_e_f32s(x, *vector, *sum);
                    }
                }
            }
            for (r, sums) in sums.into_iter().enumerate() {
                store(simd, sums, self.piece(first + r, columns.clone()));
            }
        }
    }

    #[inline(always)]
    fn piece(&self, row: usize, columns: Range<usize>) -> &'a mut [f32] {
        // SAFETY: this task has these rows and columns for itself, and takes one piece at a time.
        unsafe { self.out.piece(row, columns) }
    }
}

/// Up to `VECTORS` vectors, zeros past the last number.
#[inline(always)]
fn load<S: Simd, const VECTORS: usize>(simd: S, numbers: &[f32]) -> [S::f32s; VECTORS] {
    let (whole, rest) = S::as_simd_f32s(numbers);
    let mut vectors = [simd.splat_f32s(0.0); VECTORS];
    for (v, vector) in vectors.iter_mut().enumerate() {
        match v.cmp(&whole.len()) {
            Ordering::Less => *vector = whole[v],
            Ordering::Equal => *vector = simd.partial_load_f32s(rest),
            Ordering::Greater => {}
        }
    }
    vectors
}

/// As many of the vectors' numbers as `numbers` has room for.
#[inline(always)]
fn store<S: Simd, const VECTORS: usize>(simd: S, vectors: [S::f32s; VECTORS], numbers: &mut [f32]) {
    let (whole, rest) = S::as_mut_simd_f32s(numbers);
    for (v, vector) in vectors.into_iter().enumerate() {
        match v.cmp(&whole.len()) {
            Ordering::Less => whole[v] = vector,
            Ordering::Equal => simd.partial_store_f32s(rest, vector),
            Ordering::Greater => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Numbers in [-1, 1) that look like chance.
    fn numbers(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let next = |_| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(next).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn is_the_product_and_the_same_for_any_number_of_rows(
            rows in 1..230usize, columns in 1..200usize, depth in 1..300usize, seed: u64,
        ) {
            let (x, matrix) = (numbers(rows * depth, seed), numbers(columns * depth, seed ^ 1));
            let panels = Panels::new(&matrix, depth);
            let before = numbers(rows * columns, seed ^ 2);
            let (mut sum, mut product) = (before.clone(), vec![f32::NAN; rows * columns]);
            panels.add_product(&mut sum, &x);
            panels.product_here(&mut product, &x);
            for (at, (&sum, &product)) in sum.iter().zip(&product).enumerate() {
                let (x, row) = (&x[at / columns * depth..][..depth], &matrix[at % columns * depth..][..depth]);
                let expected: f64 = x.iter().zip(row).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                // A sum of so many terms of at most one, each rounded.
                let bound = depth as f64 * (depth as f64).sqrt() * f64::from(f32::EPSILON) + 1e-6;
                prop_assert!((f64::from(product) - expected).abs() <= bound, "{at}: {product}, not {expected}");
                prop_assert!((f64::from(sum) - expected - f64::from(before[at])).abs() <= bound, "{at}: {sum}");
            }
            let mut last = vec![f32::NAN; columns];
            panels.product_here(&mut last, &x[(rows - 1) * depth..]);
            prop_assert_eq!(&last[..], &product[(rows - 1) * columns..]);
        }
    }
}
