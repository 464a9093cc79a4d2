//! Normalisation over `key_dim`: which kind, and its device functions.

use cubecl::prelude::*;

use crate::product::component_sum;

/// How a vector is normalised before it is scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Norm {
    /// RMSNorm: `x / sqrt(mean(x²) + eps) · weight`.
    Rms,
    /// LayerNorm without bias: `(x - mean(x)) / sqrt(var(x) + eps) · weight`.
    Layer,
}

/// What a vector's normalisation takes from the vector itself: `(x - mean) · scale · weight`.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Moments {
    pub mean: f32,
    pub scale: f32,
}

/// The scale of a vector of `size` numbers from their squares about the mean.
#[cube]
pub(crate) fn scale_of(squares: f32, eps: f32, #[comptime] size: usize) -> f32 {
    1.0 / f32::sqrt(squares / comptime!(size as f32) + eps)
}

/// The moments of `size` numbers at `first`, `first + step`, ….
#[cube]
pub(crate) fn moments<E: Float>(
    numbers: &Array<E>,
    first: usize,
    eps: f32,
    #[comptime] size: usize,
    #[comptime] step: usize,
    #[comptime] norm: Norm,
) -> Moments {
    let mut mean = 0.0f32;
    if comptime!(norm == Norm::Layer) {
        for k in 0..size {
            mean += f32::cast_from(numbers[first + k * step]);
        }
        mean /= comptime!(size as f32);
    }
    let mut squares = 0.0f32;
    for k in 0..size {
        let centred = f32::cast_from(numbers[first + k * step]) - mean;
        squares += centred * centred;
    }
    Moments { mean, scale: scale_of(squares, eps, size) }
}

/// What is fixed when [`norm_backward_kernel`] is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct NormPlan {
    pub norm: Norm,
    /// Numbers of a vector.
    pub size: usize,
    /// Vectors that are interleaved: number `d` of vector `v` lies at `d · step + v mod step` of its group.
    pub step: usize,
    /// Whether the groups of `numbers` are those that `listed` names, `used[0]` of them, or all in turn.
    pub listed: bool,
    pub units: usize,
}

/// Backward of a norm over the vectors of `numbers`, `[groups, size, step]`:
///
/// with `û = (x - mean) · scale` and `g = grad · weight`, `grad_numbers = (g - û · mean(g · û) - mean(g)) · scale`, the last mean for LayerNorm
/// only, `[groups, size, step]`. `grad`, `[groups · step, size]`, becomes each vector's part of the weight's gradient, `grad · û`. A unit
/// takes one vector.
#[cube(launch_unchecked)]
pub(crate) fn norm_backward_kernel<E: Float, N: Size>(
    numbers: &Array<E>,
    weight: &Array<Vector<f32, N>>,
    listed: &Array<u32>,
    used: &Array<u32>,
    grad: &mut Array<Vector<f32, N>>,
    grad_numbers: &mut Array<f32>,
    eps: f32,
    groups: u32,
    #[comptime] plan: NormPlan,
    #[define(E)] _dtype: StorageType,
) {
    let width = N::value();
    let vector = CUBE_POS * plan.units + UNIT_POS as usize;
    let group = vector / plan.step;
    let mut last = groups as usize;
    if plan.listed {
        last = min(last, used[0] as usize);
    }
    if group >= last {
        terminate!();
    }
    let mut source = group;
    if plan.listed {
        source = listed[group] as usize;
    }
    let area = comptime!(plan.size * plan.step);
    let first = source * area + vector % plan.step;
    let pieces = comptime!(plan.size / width);
    // One pass for the moments and the means: about the first number where a mean is taken, which lies near it.
    let mut centre = 0.0f32;
    if comptime!(plan.norm == Norm::Layer) {
        centre = f32::cast_from(numbers[first]);
    }
    let mut sums = Vector::<f32, N>::new(0.0);
    let mut squares = Vector::<f32, N>::new(0.0);
    let mut along = Vector::<f32, N>::new(0.0);
    let mut across = Vector::<f32, N>::new(0.0);
    for d in 0..pieces {
        let weighted = grad[vector * pieces + d] * weight[d];
        let piece = centred::<E, N>(numbers, first + d * comptime!(width * plan.step), centre, plan.step);
        squares += piece * piece;
        along += weighted * piece;
        if comptime!(plan.norm == Norm::Layer) {
            sums += piece;
            across += weighted;
        }
    }
    let count = comptime!(plan.size as f32);
    let (sum, across) = (component_sum::<N>(sums), component_sum::<N>(across));
    let mean = sum / count;
    let mut about_mean = component_sum::<N>(squares);
    if comptime!(plan.norm == Norm::Layer) {
        // No less than zero by rounding; a NaN, which this would swallow, is in the mean.
        about_mean = max(about_mean - mean * sum, 0.0);
    }
    let scale = scale_of(about_mean, eps, plan.size);
    let along = (component_sum::<N>(along) - mean * across) * scale * scale / count;
    let (centre, across) = (centre + mean, across / count);
    let out = group * area + vector % plan.step;
    for d in 0..pieces {
        let piece = centred::<E, N>(numbers, first + d * comptime!(width * plan.step), centre, plan.step);
        let given = grad[vector * pieces + d];
        let inner = (given * weight[d] - piece * Vector::new(along) - Vector::new(across)) * Vector::new(scale);
        #[unroll]
        for n in 0..width {
            grad_numbers[out + (d * width + n) * plan.step] = inner[n];
        }
        grad[vector * pieces + d] = given * piece * Vector::new(scale);
    }
}

/// A few numbers of a vector less `centre`: those at `first`, `first + step`, ….
#[cube]
fn centred<E: Float, N: Size>(
    numbers: &Array<E>,
    first: usize,
    centre: f32,
    #[comptime] step: usize,
) -> Vector<f32, N> {
    let mut piece = Vector::<f32, N>::new(0.0);
    #[unroll]
    for n in 0..N::value() {
        piece[n] = f32::cast_from(numbers[first + comptime!(n * step)]) - centre;
    }
    piece
}
