//! Backward of the linear maps of the input: the query's, and the gate's where there is one.

use super::super::{to_f64, widen};
use crate::{MemoryConfig, Weights};

pub(super) struct Gradients {
    /// `[tokens, hidden_size]`.
    pub input: Vec<f64>,
    /// `[query_heads · 2 · key_dim, hidden_size]`.
    pub query_proj: Vec<f64>,
    /// `[value_dim, hidden_size]`; empty without a gate.
    pub gate_proj: Vec<f64>,
}

pub(super) fn backward(
    config: &MemoryConfig,
    weights: &Weights<'_>,
    input: &[f32],
    grad_query: &[f64],
    grad_gate: &[f64],
) -> Gradients {
    let mut grad_input = vec![0.0; input.len()];
    let input = to_f64(input);
    let mut through = |weight: Vec<f64>, grad: &[f64]| {
        let (hidden, mut grad_weight) = (config.hidden_size, vec![0.0; weight.len()]);
        let width = weight.len() / hidden;
        for (t, grad) in grad.chunks_exact(width).enumerate() {
            for (o, grad) in grad.iter().enumerate() {
                for h in 0..hidden {
                    grad_weight[o * hidden + h] += grad * input[t * hidden + h];
                    grad_input[t * hidden + h] += grad * weight[o * hidden + h];
                }
            }
        }
        grad_weight
    };
    let query_proj = through(widen(&weights.query_proj), grad_query);
    let gate_proj = weights.gate_proj.as_ref().map_or_else(Vec::new, |gate| through(widen(gate), grad_gate));
    Gradients { input: grad_input, query_proj, gate_proj }
}
