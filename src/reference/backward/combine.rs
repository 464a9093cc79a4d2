//! Backward of combine: through the Tucker core, or through the sum and the softmax of product keys.
//!
//! A slot's side scores are `[2, tucker_rank]`: `S_row[i]`, then `S_col[j]`.

use super::super::{dot, linear, numbers};
use crate::{MemoryConfig, Weight, Weights};

pub(super) struct Gradients {
    /// `[tokens, heads, top_m, 2, tucker_rank]`.
    pub sides: Vec<f64>,
    /// `[cores, heads, tucker_rank, tucker_rank]`; empty for product keys.
    pub cores: Vec<f64>,
}

/// The scores of every slot, `[tokens, heads, top_m, cores]`.
pub(super) fn slot_scores(config: &MemoryConfig, weights: &Weights<'_>, sides: &[f64]) -> Vec<f64> {
    let rank = config.tucker_rank;
    if !config.tucker() {
        let totals: Vec<f64> = sides.chunks_exact(2).map(|side| side[0] + side[1]).collect();
        return totals.chunks_exact(config.top_m).flat_map(softmax).collect();
    }
    let cores = numbers(weights, Weight::Cores);
    let of_slot = |(at, side): (usize, &[f64])| {
        let (row, column) = side.split_at(rank);
        let score = |k: usize| dot(row, &linear(&cores[core_at(config, at, k)..][..rank * rank], column));
        (0..config.cores).map(score).collect::<Vec<_>>()
    };
    sides.chunks_exact(2 * rank).enumerate().flat_map(of_slot).collect()
}

pub(super) fn backward(
    config: &MemoryConfig,
    weights: &Weights<'_>,
    sides: &[f64],
    scores: &[f64],
    grad_scores: &[f64],
) -> Gradients {
    if !config.tucker() {
        let heads = scores.chunks_exact(config.top_m).zip(grad_scores.chunks_exact(config.top_m));
        return Gradients {
            sides: heads.flat_map(|(scores, grad)| softmax_backward(scores, grad)).collect(),
            cores: vec![],
        };
    }
    let rank = config.tucker_rank;
    let cores = numbers(weights, Weight::Cores);
    let mut out = Gradients { sides: vec![0.0; sides.len()], cores: vec![0.0; cores.len()] };
    let slots = sides.chunks_exact(2 * rank).zip(grad_scores.chunks_exact(config.cores));
    for (at, ((side, grad_scores), grad_side)) in slots.zip(out.sides.chunks_exact_mut(2 * rank)).enumerate() {
        for (k, grad) in grad_scores.iter().enumerate() {
            let first = core_at(config, at, k);
            for (a, b) in (0..rank).flat_map(|a| (0..rank).map(move |b| (a, b))) {
                let core = first + a * rank + b;
                out.cores[core] += grad * side[a] * side[rank + b];
                grad_side[a] += grad * cores[core] * side[rank + b];
                grad_side[rank + b] += grad * cores[core] * side[a];
            }
        }
    }
    out
}

/// Where core `k` of the head of slot `at` begins.
fn core_at(config: &MemoryConfig, at: usize, k: usize) -> usize {
    let head = at / config.top_m % config.heads;
    (k * config.heads + head) * config.tucker_rank * config.tucker_rank
}

fn softmax(totals: &[f64]) -> Vec<f64> {
    let largest = totals.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = totals.iter().map(|total| (total - largest).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.iter().map(|power| power / sum).collect()
}

/// Of one head's totals, twice each: both sides have the same gradient.
fn softmax_backward(scores: &[f64], grad: &[f64]) -> Vec<f64> {
    let mean = dot(scores, grad);
    scores.iter().zip(grad).flat_map(|(score, grad)| [score * (grad - mean); 2]).collect()
}
