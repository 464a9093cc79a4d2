//! Backward of weigh, with `d = z · P[row]`: `∂s_k = ∂w_k · act(d)`, `∂d = act'(d) · Σ_k ∂w_k · s_k`, `∂z = Σ ∂d · P[row]` and
//! `∂P[row] = Σ ∂d · z`.

use std::collections::BTreeMap;

use super::super::weigh::{activate, activate_backward, read, sources};
use super::super::{Weighed, dot};
use crate::{MemoryConfig, Result, Weight, Weights};

pub(super) struct Gradients {
    /// `[tokens, heads, top_m, cores]`, of the scores before they are weighed.
    pub scores: Vec<f64>,
    /// `[tokens, pre_dim]`.
    pub z: Vec<f64>,
    pub pre_values: BTreeMap<usize, Vec<f64>>,
}

/// Of the `scores` `[tokens, heads, top_m, cores]` of `slots`, and the gradient of the weighed ones.
pub(super) fn backward(
    config: &MemoryConfig,
    weights: &Weights<'_>,
    input: &[f32],
    slots: &[u32],
    scores: &[f64],
    weighed: &Weighed,
    grad_weighed: Vec<f64>,
) -> Result<Gradients> {
    let Some(weigh) = config.capabilities.weigh else {
        return Ok(Gradients { scores: grad_weighed, z: Vec::new(), pre_values: BTreeMap::new() });
    };
    let (entries, pre_dim, z) = (config.heads * config.top_m, config.pre_dim, sources(config, weights, input));
    let mut out =
        Gradients { scores: Vec::with_capacity(scores.len()), z: vec![0.0; z.len()], pre_values: BTreeMap::new() };
    let of_slots = scores.chunks_exact(config.cores).zip(grad_weighed.chunks_exact(config.cores));
    for (at, ((scores, grad), &d)) in of_slots.zip(&weighed.products).enumerate() {
        let factor = activate(d, weigh.activation);
        out.scores.extend(grad.iter().map(|grad| grad * factor));
        let grad_d = dot(grad, scores) * activate_backward(d, weigh.activation);
        let read = read(config, weights, Weight::PreValues, slots[at])?;
        let of_token = at / entries * pre_dim..(at / entries + 1) * pre_dim;
        let grad_row = out.pre_values.entry(read.row).or_insert_with(|| vec![0.0; pre_dim]);
        for (c, t) in of_token.enumerate() {
            out.z[t] += grad_d * read.numbers[c];
            grad_row[c] += grad_d * z[t];
        }
    }
    Ok(out)
}
