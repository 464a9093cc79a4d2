//! Normalisation over `key_dim`: which kind, and its device functions. The backward pass of both kinds is in `backward`.

mod backward;

use cubecl::prelude::*;

pub(crate) use self::backward::{NormGradients, Normed, norm_backward};
pub use self::backward::{NormPlan, NormSizes};

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
