//! Normalisation over `key_dim`: which kind, and its device functions.

use cubecl::prelude::*;

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

/// The mean and scale of a vector of `size` numbers from their sum and from the sum of squares about `mean`.
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
/// only, `[groups, size, step]`; and each vector's part of the weight's gradient, `weight_parts = grad · û`, `[groups · step, size]` as
/// `grad` is. A unit takes one vector.
#[cube(launch_unchecked)]
pub(crate) fn norm_backward_kernel<E: Float>(
    numbers: &Array<E>,
    weight: &Array<f32>,
    listed: &Array<u32>,
    used: &Array<u32>,
    grad: &Array<f32>,
    grad_numbers: &mut Array<f32>,
    weight_parts: &mut Array<f32>,
    eps: f32,
    groups: u32,
    #[comptime] plan: NormPlan,
    #[define(E)] _dtype: StorageType,
) {
    let vector = CUBE_POS * plan.units + UNIT_POS as usize;
    let group = vector / plan.step;
    let mut last = groups as usize;
    if plan.listed {
        last = min(last, used[0] as usize);
    }
    if group >= last {
        terminate!();
    }
    let area = comptime!(plan.size * plan.step);
    let mut source = group;
    if plan.listed {
        source = listed[group] as usize;
    }
    let first = source * area + vector % plan.step;
    let of = moments::<E>(numbers, first, eps, plan.size, plan.step, plan.norm);
    let mut along = 0.0f32;
    let mut across = 0.0f32;
    for d in 0..plan.size {
        let unit = (f32::cast_from(numbers[first + d * plan.step]) - of.mean) * of.scale;
        let weighted = grad[vector * plan.size + d] * weight[d];
        along += weighted * unit;
        across += weighted;
    }
    along /= comptime!(plan.size as f32);
    across /= comptime!(plan.size as f32);
    let out = group * area + vector % plan.step;
    for d in 0..plan.size {
        let unit = (f32::cast_from(numbers[first + d * plan.step]) - of.mean) * of.scale;
        let given = grad[vector * plan.size + d];
        let mut inner = given * weight[d] - unit * along;
        if comptime!(plan.norm == Norm::Layer) {
            inner -= across;
        }
        grad_numbers[out + d * plan.step] = inner * of.scale;
        weight_parts[vector * plan.size + d] = given * unit;
    }
}
