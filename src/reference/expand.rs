//! Expand: the chosen slots' values, weighted, pooled over the heads and projected.
//!
//! `a = shuffle_index[slot]` is a virtual address: block `e = a / rows`, row `(a mod rows + offset) mod table_rows`. `pooled[e, slice k] += s_k ·
//! V[row, slice k]` `[pooled_blocks, value_dim]`, where blocks are summed e = 0 for all; a gate multiplies `pooled` by `silu(W_g x + b_g)`; then
//! `y = W_o · pooled + b_o` `[hidden_size]`, and an output gate multiplies y by `sigmoid(w · x + b)`. Only the chosen rows of the table are read.

use rayon::prelude::*;

use super::weigh::read;
use super::{affine, below, length, numbers, to_f64, whole_rows};
use crate::{MemoryConfig, Result, Weight, Weights};

/// The output `[tokens, hidden_size]` of `slots` `[tokens, heads, top_m]` and their `scores` `[tokens, heads, top_m, cores]`, weighed where the
/// layer weighs (arXiv 2411.12364 section 3.2, implicit value expansion; arXiv 2412.09764 section 3 for the gate). `input` `[tokens, hidden_size]`
/// feeds the gates alone.
///
/// # Errors
/// [`Error::Tensor`](crate::Error::Tensor) or [`Error::Length`](crate::Error::Length) if `weights` do not fit `config`, `input` is not whole rows, or for
/// other numbers of slots or scores, or a slot that is not below `side_keys²`.
pub fn expand(
    config: &MemoryConfig,
    weights: &Weights<'_>,
    input: &[f32],
    slots: &[u32],
    scores: &[f64],
) -> Result<Vec<f64>> {
    weights.check(config)?;
    let tokens = whole_rows("input", input.len(), "hidden_size", config.hidden_size)?;
    let slots_width = config.heads * config.top_m;
    let scores_width = slots_width * config.cores;
    length("slots", slots.len(), tokens * slots_width)?;
    length("scores", scores.len(), tokens * scores_width)?;
    below("slots", slots, config.slots())?;
    let maps = Maps::of(weights);
    let of_token = |token: usize| -> Result<Vec<f64>> {
        let input = to_f64(&input[token * config.hidden_size..][..config.hidden_size]);
        let slots = &slots[token * slots_width..][..slots_width];
        let mut pooled = pool(config, weights, slots, &scores[token * scores_width..][..scores_width])?;
        for (pooled, g) in pooled.iter_mut().zip(maps.gate(&input)) {
            *pooled *= silu(g);
        }
        let open = maps.output_gate(&input).map_or(1.0, sigmoid);
        Ok(maps.project(&pooled).into_iter().map(|y| y * open).collect())
    };
    let output: Vec<_> = (0..tokens).into_par_iter().map(of_token).collect::<Result<_>>()?;
    Ok(output.concat())
}

/// The stage's linear maps, widened; empty where the layer has none.
pub(super) struct Maps {
    pub projection: Vec<f64>,
    bias: Vec<f64>,
    gate: Vec<f64>,
    gate_bias: Vec<f64>,
    output_gate: Vec<f64>,
    output_gate_bias: Vec<f64>,
}

impl Maps {
    pub fn of(weights: &Weights<'_>) -> Self {
        let of = |weight| numbers(weights, weight);
        Self {
            projection: of(Weight::ValuesProj),
            bias: of(Weight::ValuesBias),
            gate: of(Weight::GateProj),
            gate_bias: of(Weight::GateBias),
            output_gate: of(Weight::OutputGate),
            output_gate_bias: of(Weight::OutputGateBias),
        }
    }

    /// The gate before its silu, `[value_dim]`; empty without one.
    pub fn gate(&self, input: &[f64]) -> Vec<f64> {
        affine(&self.gate, &self.gate_bias, input)
    }

    /// The output gate before its sigmoid.
    pub fn output_gate(&self, input: &[f64]) -> Option<f64> {
        affine(&self.output_gate, &self.output_gate_bias, input).first().copied()
    }

    /// The output before its gate.
    pub fn project(&self, pooled: &[f64]) -> Vec<f64> {
        if self.projection.is_empty() { pooled.to_vec() } else { affine(&self.projection, &self.bias, pooled) }
    }
}

/// One token's weighted values `[pooled_blocks, value_dim]`.
fn pool(config: &MemoryConfig, weights: &Weights<'_>, slots: &[u32], scores: &[f64]) -> Result<Vec<f64>> {
    let slice = config.value_dim / config.cores;
    let mut pooled = vec![0.0; config.pooled_dim()];
    for (&slot, scores) in slots.iter().zip(scores.chunks_exact(config.cores)) {
        let read = read(config, weights, Weight::Values, slot)?;
        let first = read.block % config.pooled_blocks() * config.value_dim;
        for (column, value) in read.numbers.iter().enumerate() {
            pooled[first + column] += scores[column / slice] * value;
        }
    }
    Ok(pooled)
}

pub(super) fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

pub(super) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}
