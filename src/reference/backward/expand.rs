//! Backward of expand: to the scores of the slots, the rows that they read, W_o, its bias and the gates.

use std::collections::BTreeMap;

use super::super::expand::{Maps, sigmoid, silu};
use super::super::weigh::{Read, read};
use super::super::{dot, to_f64};
use crate::{MemoryConfig, Result, Weight, Weights};

pub(super) struct Gradients {
    /// `[tokens, heads, top_m, cores]`.
    pub scores: Vec<f64>,
    pub values: BTreeMap<usize, Vec<f64>>,
    /// `[hidden_size, pooled_blocks · value_dim]`; empty without a projection.
    pub values_proj: Vec<f64>,
    /// `[hidden_size]`.
    pub bias: Vec<f64>,
    /// Of `W_g x + b_g`, `[tokens, value_dim]`; empty without a gate.
    pub gate: Vec<f64>,
    /// Of `w · x + b`, `[tokens]`; empty without an output gate.
    pub output_gate: Vec<f64>,
}

/// Of `slots` and their weighed `scores`.
pub(super) fn backward(
    config: &MemoryConfig,
    weights: &Weights<'_>,
    input: &[f32],
    slots: &[u32],
    scores: &[f64],
    grad_output: &[f32],
) -> Result<Gradients> {
    let maps = Maps::of(weights);
    let mut out = Gradients {
        scores: Vec::with_capacity(scores.len()),
        values: BTreeMap::new(),
        values_proj: vec![0.0; maps.projection.len()],
        bias: vec![0.0; config.hidden_size],
        gate: Vec::new(),
        output_gate: Vec::new(),
    };
    let entries = config.heads * config.top_m;
    let tokens = input.chunks_exact(config.hidden_size).zip(grad_output.chunks_exact(config.hidden_size));
    let slots = slots.chunks_exact(entries).zip(scores.chunks_exact(entries * config.cores));
    for ((input, grad_output), (slots, scores)) in tokens.zip(slots) {
        let reads =
            slots.iter().map(|&slot| read(config, weights, Weight::Values, slot)).collect::<Result<Vec<_>>>()?;
        let scores: Vec<&[f64]> = scores.chunks_exact(config.cores).collect();
        out.add_token(config, &maps, &to_f64(input), &reads, &scores, to_f64(grad_output));
    }
    Ok(out)
}

impl Gradients {
    /// Adds one token's share.
    fn add_token(
        &mut self,
        config: &MemoryConfig,
        maps: &Maps,
        input: &[f64],
        reads: &[Read],
        scores: &[&[f64]],
        mut grad: Vec<f64>,
    ) {
        let (pooled_dim, slice) = (config.pooled_dim(), config.value_dim / config.cores);
        let first = |read: &Read| read.block % config.pooled_blocks() * config.value_dim;
        let mut pooled = vec![0.0; pooled_dim];
        for (read, scores) in reads.iter().zip(scores) {
            for (c, value) in read.numbers.iter().enumerate() {
                pooled[first(read) + c] += scores[c / slice] * value;
            }
        }
        let gate = maps.gate(input);
        let mut gated = pooled.clone();
        gated.iter_mut().zip(&gate).for_each(|(pooled, &g)| *pooled *= silu(g));
        if let Some(o) = maps.output_gate(input) {
            self.output_gate.push(dot(&grad, &maps.project(&gated)) * sigmoid(o) * (1.0 - sigmoid(o)));
            grad.iter_mut().for_each(|grad| *grad *= sigmoid(o));
        }
        self.bias.iter_mut().zip(&grad).for_each(|(bias, grad)| *bias += grad);
        let mut grad_pooled = grad.clone();
        if !maps.projection.is_empty() {
            grad_pooled = vec![0.0; pooled_dim];
            for (row, grad) in maps.projection.chunks_exact(pooled_dim).zip(&grad) {
                grad_pooled.iter_mut().zip(row).for_each(|(out, weight)| *out += weight * grad);
            }
            for (row, grad) in self.values_proj.chunks_exact_mut(pooled_dim).zip(&grad) {
                row.iter_mut().zip(&gated).for_each(|(out, pooled)| *out += grad * pooled);
            }
        }
        for (c, &g) in gate.iter().enumerate() {
            let open = sigmoid(g);
            self.gate.push(grad_pooled[c] * pooled[c] * open * (1.0 + g * (1.0 - open)));
            grad_pooled[c] *= silu(g);
        }
        for (read, scores) in reads.iter().zip(scores) {
            let mut grad_scores = vec![0.0; config.cores];
            let grad_values = self.values.entry(read.row).or_insert_with(|| vec![0.0; config.value_dim]);
            for (c, value) in read.numbers.iter().enumerate() {
                let grad = grad_pooled[first(read) + c];
                grad_scores[c / slice] += grad * value;
                grad_values[c] += grad * scores[c / slice];
            }
            self.scores.extend(grad_scores);
        }
    }
}
