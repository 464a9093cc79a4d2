//! The small matrix product inside the stages: a tile of rows, in shared or global memory, times a weight in global memory.
//!
//! A unit keeps a block of `tile` rows by `columns` vectors of sums in registers, so that a weight vector that is read serves every
//! row of the tile, and a vector of the rows serves every column of the unit.

use cubecl::prelude::*;

/// The columns of a weight that a unit works on: `first`, `first + stride`, …, those past `last` standing for the last.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Columns {
    pub first: usize,
    pub last: usize,
    #[cube(comptime)]
    pub stride: usize,
    #[cube(comptime)]
    pub count: usize,
}

#[cube]
impl Columns {
    /// The column `index` of this unit.
    pub fn at(&self, #[comptime] index: usize) -> usize {
        min(self.first + comptime!(index * self.stride), self.last)
    }

    /// Whether column `index` is one of its own and not a stand-in.
    pub fn holds(&self, #[comptime] index: usize) -> bool {
        self.first + comptime!(index * self.stride) <= self.last
    }
}

/// The rows of a tile: `first`, `first + 1`, …, those past `last` standing for the last; each is `pitch` vectors long.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Rows {
    pub first: usize,
    pub last: usize,
    pub pitch: usize,
    #[cube(comptime)]
    pub count: usize,
}

#[cube]
impl Rows {
    /// The `count` rows of a tile that lies in shared memory, each `pitch` vectors long.
    pub fn of_tile(#[comptime] pitch: usize, #[comptime] count: usize) -> Rows {
        Rows { first: 0usize.runtime(), last: comptime!(count - 1).runtime(), pitch: pitch.runtime(), count }
    }
}

/// `sums[c · rows.count + t] += Σ_k input[rows.at(t), k] · weight[base + k · step + columns.at(c)]` for all k of a row.
#[cube]
pub(crate) fn accumulate<I: Float, E: Float, N: Size, W: Size>(
    input: &Slice<Vector<I, W>>,
    rows: Rows,
    weight: &Array<Vector<E, N>>,
    sums: &mut Array<Vector<f32, N>>,
    base: usize,
    columns: Columns,
    step: usize,
) {
    let width = W::value();
    for k in 0..rows.pitch {
        let mut row = Array::<Vector<f32, W>>::new(rows.count);
        #[unroll]
        for t in 0..rows.count {
            row[t] = Vector::cast_from(input[min(rows.first + t, rows.last) * rows.pitch + k]);
        }
        #[unroll]
        for c in 0..columns.count {
            let mut lines = Array::<Vector<f32, N>>::new(width);
            #[unroll]
            for w in 0..width {
                lines[w] = Vector::cast_from(weight[base + (k * width + w) * step + columns.at(c)]);
            }
            // All of a sum's terms in a row: one reading and one writing of a sum that does not fit a register.
            #[unroll]
            for t in 0..rows.count {
                let mut sum = sums[c * rows.count + t];
                #[unroll]
                for w in 0..width {
                    sum = fma(lines[w], Vector::new(row[t][w]), sum);
                }
                sums[c * rows.count + t] = sum;
            }
        }
    }
}

/// A unit's block of sums, all zero.
#[cube]
pub(crate) fn zero_sums<N: Size>(#[comptime] count: usize) -> Array<Vector<f32, N>> {
    let mut sums = Array::<Vector<f32, N>>::new(count);
    #[unroll]
    for i in 0..count {
        sums[i] = Vector::new(0.0);
    }
    sums
}

/// Sum of a vector's components.
#[cube]
pub(crate) fn component_sum<N: Size>(vector: Vector<f32, N>) -> f32 {
    let mut sum = 0.0f32;
    #[unroll]
    for n in 0..N::value() {
        sum += vector[n];
    }
    sum
}
