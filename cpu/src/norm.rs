//! Norms over `key_dim`, forwards and backwards: `y = (x - mean) / √(mean((x - mean)²) + eps) · weight`, the mean only of LayerNorm.

use ultramem_kernels::Norm;

use crate::numbers::dot;

/// `x` normalised in place.
#[inline(always)]
pub(crate) fn normalise((norm, eps): (Norm, f32), weight: &[f32], x: &mut [f32]) {
    let scale = centre(norm, eps, x);
    x.iter_mut().zip(weight).for_each(|(x, weight)| *x *= scale * weight);
}

/// Takes the mean from `x`, of LayerNorm, and returns one over the root.
#[inline(always)]
fn centre(norm: Norm, eps: f32, x: &mut [f32]) -> f32 {
    let count = x.len() as f32;
    if norm == Norm::Layer {
        let mean = x.iter().sum::<f32>() / count;
        x.iter_mut().for_each(|x| *x -= mean);
    }
    1.0 / (dot::<f32>(x, x) / count + eps).sqrt()
}

/// From the gradient of the norm's output to that of its input `x`, in place of `grad`; adds the weight's to `grad_weight`. `x` becomes the
/// normalised vector without its weight.
#[inline(always)]
pub(crate) fn normalise_backward(
    (norm, eps): (Norm, f32),
    weight: &[f32],
    x: &mut [f32],
    grad: &mut [f32],
    grad_weight: &mut [f32],
) {
    let count = x.len() as f32;
    let scale = centre(norm, eps, x);
    x.iter_mut().for_each(|x| *x *= scale);
    for (((sum, grad), weight), x) in grad_weight.iter_mut().zip(&mut *grad).zip(weight).zip(&*x) {
        *sum += *grad * x;
        *grad *= weight;
    }
    let along = dot::<f32>(grad, x) / count;
    let across = if norm == Norm::Layer { grad.iter().sum::<f32>() / count } else { 0.0 };
    grad.iter_mut().zip(&*x).for_each(|(grad, x)| *grad = (*grad - across - x * along) * scale);
}
