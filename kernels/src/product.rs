//! The small matrix product inside the stages: a tile of rows in shared memory times a weight in global memory.

use cubecl::prelude::*;

/// `sums[t] += Σ_k rows[t · pitch + k] · weight[first + k · step]` for `k` in `0..depth`: the rows of a tile against one column
/// of vectors of a weight `[depth, step]`. Each weight vector is read once for all rows of the tile.
#[cube]
pub(crate) fn accumulate<E: Float, N: Size>(
    rows: &SharedMemory<f32>,
    weight: &Array<Vector<E, N>>,
    sums: &mut Array<Vector<f32, N>>,
    first: usize,
    step: usize,
    depth: usize,
    #[comptime] pitch: usize,
    #[comptime] tile: usize,
) {
    for k in 0..depth {
        let column = Vector::<f32, N>::cast_from(weight[first + k * step]);
        #[unroll]
        for t in 0..tile {
            sums[t] += column * Vector::new(rows[t * pitch + k]);
        }
    }
}

/// A tile's sums, all zero.
#[cube]
pub(crate) fn zero_sums<N: Size>(#[comptime] tile: usize) -> Array<Vector<f32, N>> {
    let mut sums = Array::<Vector<f32, N>>::new(tile);
    #[unroll]
    for t in 0..tile {
        sums[t] = Vector::new(0.0);
    }
    sums
}
