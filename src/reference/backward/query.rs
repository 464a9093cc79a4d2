//! Backward of a linear map of the input: the query's, those of the gates and of the pre-values.

use super::super::{numbers, to_f64};
use crate::{MemoryConfig, Weight, Weights};

/// Adds what `grad` `[tokens, width]`, of a map's output, gives the input to `grad_input`; returns the weight's gradient `[width, hidden_size]`
/// and the bias's `[width]`. A map that the layer lacks gives neither.
pub(super) fn backward(
    config: &MemoryConfig,
    weights: &Weights<'_>,
    map: Weight,
    input: &[f32],
    grad: &[f64],
    grad_input: &mut [f64],
) -> (Vec<f64>, Vec<f64>) {
    let (weight, input) = (numbers(weights, map), to_f64(input));
    let (hidden, width) = (config.hidden_size, weight.len() / config.hidden_size);
    let (mut grad_weight, mut grad_bias) = (vec![0.0; weight.len()], vec![0.0; width]);
    if width == 0 {
        return (grad_weight, grad_bias);
    }
    for (t, grad) in grad.chunks_exact(width).enumerate() {
        for (o, grad) in grad.iter().enumerate() {
            grad_bias[o] += grad;
            for h in 0..hidden {
                grad_weight[o * hidden + h] += grad * input[t * hidden + h];
                grad_input[t * hidden + h] += grad * weight[o * hidden + h];
            }
        }
    }
    (grad_weight, grad_bias)
}
