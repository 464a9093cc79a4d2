//! Backward of expand: to the scores of the slots, the rows that they read, W_o and the gate.

use std::collections::BTreeMap;

use super::super::expand::silu;
use super::super::{linear, to_f64, widen};
use crate::{MemoryConfig, Result, Weights};

pub(super) struct Gradients {
    /// `[tokens, heads, top_m, cores]`.
    pub scores: Vec<f64>,
    pub values: BTreeMap<usize, Vec<f64>>,
    /// `[hidden_size, expansion · value_dim]`.
    pub values_proj: Vec<f64>,
    /// Of `W_g x`, `[tokens, value_dim]`; empty without a gate.
    pub gate: Vec<f64>,
}

/// A slot: its block's first column among the pooled values, its row, the row's values and its scores.
struct Read<'a> {
    first: usize,
    row: usize,
    values: Vec<f64>,
    scores: &'a [f64],
}

pub(super) fn backward(
    config: &MemoryConfig,
    weights: &Weights<'_>,
    input: &[f32],
    slots: &[u32],
    scores: &[f64],
    grad_output: &[f32],
) -> Result<Gradients> {
    let (pooled_dim, slice) = (config.pooled_dim(), config.value_dim / config.cores);
    let (values_proj, gate_proj) = (widen(&weights.values_proj), weights.gate_proj.as_ref().map(widen));
    let mut out = Gradients {
        scores: Vec::with_capacity(scores.len()),
        values: BTreeMap::new(),
        values_proj: vec![0.0; values_proj.len()],
        gate: Vec::new(),
    };
    let entries = config.heads * config.top_m;
    let tokens = input.chunks_exact(config.hidden_size).zip(grad_output.chunks_exact(config.hidden_size));
    let slots = slots.chunks_exact(entries).zip(scores.chunks_exact(entries * config.cores));
    for ((input, grad_output), (slots, scores)) in tokens.zip(slots) {
        let grad_output = to_f64(grad_output);
        let reads = read(config, weights, slots, scores);
        let mut pooled = vec![0.0; pooled_dim];
        for read in &reads {
            for (c, value) in read.values.iter().enumerate() {
                pooled[read.first + c] += read.scores[c / slice] * value;
            }
        }
        let mut grad_pooled = vec![0.0; pooled_dim];
        for (row, grad) in values_proj.chunks_exact(pooled_dim).zip(&grad_output) {
            grad_pooled.iter_mut().zip(row).for_each(|(out, weight)| *out += weight * grad);
        }
        if let Some(gate_proj) = &gate_proj {
            for (c, g) in linear(gate_proj, &to_f64(input)).into_iter().enumerate() {
                let sigmoid = 1.0 / (1.0 + (-g).exp());
                out.gate.push(grad_pooled[c] * pooled[c] * sigmoid * (1.0 + g * (1.0 - sigmoid)));
                pooled[c] *= silu(g);
                grad_pooled[c] *= silu(g);
            }
        }
        for (row, grad) in out.values_proj.chunks_exact_mut(pooled_dim).zip(&grad_output) {
            row.iter_mut().zip(&pooled).for_each(|(out, pooled)| *out += grad * pooled);
        }
        for read in &reads {
            let mut grad_scores = vec![0.0; config.cores];
            let grad_values = out.values.entry(read.row).or_insert_with(|| vec![0.0; config.value_dim]);
            for (c, value) in read.values.iter().enumerate() {
                let grad = grad_pooled[read.first + c];
                grad_scores[c / slice] += grad * value;
                grad_values[c] += grad * read.scores[c / slice];
            }
            out.scores.extend(grad_scores);
        }
    }
    Ok(out)
}

fn read<'a>(config: &MemoryConfig, weights: &Weights<'_>, slots: &[u32], scores: &'a [f64]) -> Vec<Read<'a>> {
    let one = |(&slot, scores): (&u32, &'a [f64])| {
        let address = weights.shuffle_index.as_ref().map_or(slot, |shuffle| shuffle[slot as usize]) as usize;
        let row = address % config.rows();
        let values = to_f64(&weights.values.row(row).unwrap_or_default());
        Read { first: address / config.rows() * config.value_dim, row, values, scores }
    };
    slots.iter().zip(scores.chunks_exact(config.cores)).map(one).collect()
}
