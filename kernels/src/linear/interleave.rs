//! Interleaved vectors: number `d` of vector `k` of `step` vectors lies at `d · step + k`, as keys have their ranks. What is read and
//! written at once are `N` numbers of each of them, `step` memory vectors of `N` numbers; all places are known when a kernel is compiled.

use cubecl::prelude::*;

/// `count` memory vectors from `first` on.
#[cube]
pub(crate) fn load<E: Float, N: Size>(
    numbers: &Array<Vector<E, N>>,
    first: usize,
    #[comptime] count: usize,
) -> Array<Vector<f32, N>> {
    let mut vectors = Array::<Vector<f32, N>>::new(count);
    #[unroll]
    for v in 0..count {
        vectors[v] = Vector::cast_from(numbers[first + v]);
    }
    vectors
}

/// The numbers of vector `k` in `mixed`, `step` memory vectors.
#[cube]
pub(crate) fn strand<N: Size>(
    mixed: &Array<Vector<f32, N>>,
    #[comptime] k: usize,
    #[comptime] step: usize,
) -> Vector<f32, N> {
    let width = N::value();
    let mut numbers = Vector::<f32, N>::new(0.0);
    #[unroll]
    for n in 0..width {
        numbers[n] = mixed[comptime!((n * step + k) / width)][comptime!((n * step + k) % width)];
    }
    numbers
}

/// Memory vector `v` of what `step` vectors from `strands[first]` on are when interleaved.
#[cube]
pub(crate) fn interleaved<N: Size>(
    strands: &Array<Vector<f32, N>>,
    #[comptime] first: usize,
    #[comptime] v: usize,
    #[comptime] step: usize,
) -> Vector<f32, N> {
    let width = N::value();
    let mut numbers = Vector::<f32, N>::new(0.0);
    #[unroll]
    for n in 0..width {
        numbers[n] = strands[comptime!(first + (v * width + n) % step)][comptime!((v * width + n) / step)];
    }
    numbers
}
