//! Backward of score: from the side scores of the slots to the query before its norm and to the keys.

use super::super::query::raw;
use super::super::score::scored_keys;
use super::super::{dot, numbers};
use super::normalise_backward;
use crate::{MemoryConfig, Weight, Weights};

pub(super) struct Gradients {
    /// `[tokens, query_pairs · 2 · key_dim]`, before the norm.
    pub query: Vec<f64>,
    pub query_norm: Vec<f64>,
    /// `[heads, 2, side_keys, key_dim, tucker_rank]`.
    pub keys: Vec<f64>,
    pub keys_norm: Vec<f64>,
}

/// The key and the query of one side of a slot: where they begin among the scored keys and the queries.
struct Pair {
    key: usize,
    query: usize,
}

fn pairs<'a>(config: &'a MemoryConfig, slots: &'a [u32]) -> impl Iterator<Item = Pair> + 'a {
    let (rank, key_dim, n) = (config.tucker_rank, config.key_dim, config.side_keys);
    slots.iter().enumerate().flat_map(move |(at, &slot)| {
        let (head, token) = (at / config.top_m % config.heads, at / config.top_m / config.heads);
        let keys = [slot as usize / n, slot as usize % n];
        [0, 1].map(|side| Pair {
            key: ((head * 2 + side) * n + keys[side]) * rank * key_dim,
            query: ((token * config.query_pairs() + head / config.heads_per_pair()) * 2 + side) * key_dim,
        })
    })
}

/// The side scores of every slot, `[tokens, heads, top_m, 2, tucker_rank]`.
pub(super) fn side_scores(config: &MemoryConfig, weights: &Weights<'_>, queries: &[f64], slots: &[u32]) -> Vec<f64> {
    let (keys, key_dim) = (scored_keys(config, weights), config.key_dim);
    let score =
        |pair: Pair, rho: usize| dot(&queries[pair.query..][..key_dim], &keys[pair.key + rho * key_dim..][..key_dim]);
    pairs(config, slots)
        .flat_map(|Pair { key, query }| (0..config.tucker_rank).map(move |rho| (Pair { key, query }, rho)))
        .map(|(pair, rho)| score(pair, rho))
        .collect()
}

pub(super) fn backward(
    config: &MemoryConfig,
    weights: &Weights<'_>,
    input: &[f32],
    queries: &[f64],
    slots: &[u32],
    grad_sides: &[f64],
) -> Gradients {
    let (keys, key_dim) = (scored_keys(config, weights), config.key_dim);
    let (mut grad_queries, mut grad_keys) = (vec![0.0; queries.len()], vec![0.0; keys.len()]);
    for (pair, grad) in pairs(config, slots).zip(grad_sides.chunks_exact(config.tucker_rank)) {
        for (rho, grad) in grad.iter().enumerate() {
            for d in 0..key_dim {
                let key = pair.key + rho * key_dim + d;
                grad_queries[pair.query + d] += grad * keys[key];
                grad_keys[key] += grad * queries[pair.query + d];
            }
        }
    }
    let mut query_norm = vec![0.0; key_dim];
    let query = if config.capabilities.normalises_queries {
        let (raw, norm) = (raw(config, weights, input), numbers(weights, Weight::QueryNorm));
        let through = raw.chunks_exact(key_dim).zip(grad_queries.chunks_exact(key_dim));
        through.flat_map(|(raw, grad)| normalise_backward(config, &norm, raw, grad, &mut query_norm)).collect()
    } else {
        grad_queries
    };
    let mut keys_norm = vec![0.0; key_dim];
    let keys = keys_backward(config, weights, &grad_keys, &mut keys_norm);
    Gradients { query, query_norm, keys, keys_norm }
}

/// From the scored keys' gradient `[.., tucker_rank, key_dim]` to the keys' `[.., key_dim, tucker_rank]`.
fn keys_backward(config: &MemoryConfig, weights: &Weights<'_>, grad: &[f64], grad_norm: &mut [f64]) -> Vec<f64> {
    let (rank, key_dim) = (config.tucker_rank, config.key_dim);
    let (keys, norm) = (numbers(weights, Weight::Keys), numbers(weights, Weight::KeysNorm));
    let mut out = vec![0.0; grad.len()];
    for (at, grad) in grad.chunks_exact(key_dim).enumerate() {
        let place = |d: usize| (at / rank * key_dim + d) * rank + at % rank;
        let raw: Vec<f64> = (0..key_dim).map(|d| keys[place(d)]).collect();
        let grad = match config.capabilities.normalises_keys {
            true => normalise_backward(config, &norm, &raw, grad, grad_norm),
            false => grad.to_vec(),
        };
        grad.iter().enumerate().for_each(|(d, grad)| out[place(d)] = *grad);
    }
    out
}
