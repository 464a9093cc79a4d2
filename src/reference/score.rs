//! Score: how well each key of a side answers the query, and which keys are kept.
//!
//! `S_side[head, i, ρ] = q[side] · K̂[head, side, i, :, ρ]`, judged by `p_side[i] = q[side] · Σ_ρ w_side[head, ρ] · K̂[head, side, i, :, ρ]`.
//! In f16 and bf16 both forms of a key are rounded before they are multiplied.
//! `query` `[tokens, query_pairs, 2, key_dim]` and `keys` `[heads, 2, side_keys, key_dim, tucker_rank]` give the `top_m`
//! keys of each side and their `S` `[tokens, heads, 2, top_m, tucker_rank]`.

use rayon::prelude::*;

use super::{dot, normalise, numbers, round, selection_order, whole_rows};
use crate::{MemoryConfig, Result, Weight, Weights};

/// The keys that [`score`] keeps.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Kept {
    /// `[tokens, heads, 2, top_m]`, in ascending order of the key.
    pub keys: Vec<u32>,
    /// `p` of every key, kept or not, so that near ties can be judged: `[tokens, heads, 2, side_keys]`.
    pub approximate: Vec<f64>,
    /// `S` of the kept keys: `[tokens, heads, 2, top_m, tucker_rank]`.
    pub scores: Vec<f64>,
}

/// Scores every key of both sides and keeps the `top_m` of each (arXiv 2411.12364 section 3.1, Tucker decomposed
/// query-key retrieval; arXiv 1907.05242 section 3.2).
///
/// `query` is `[tokens, query_pairs, 2, key_dim]`, already normalised. The larger `p` is kept first, of equal ones the
/// smaller key, and never a NaN before a number.
///
/// # Errors
/// [`Error::Tensor`](crate::Error::Tensor) or [`Error::Length`](crate::Error::Length) if `weights` do not fit `config`
/// or `query` is not whole rows.
pub fn score(config: &MemoryConfig, weights: &Weights<'_>, query: &[f64]) -> Result<Kept> {
    weights.check(config)?;
    let query_width = config.query_pairs() * 2 * config.key_dim;
    whole_rows("query", query.len(), "query_pairs · 2 · key_dim", query_width)?;
    let (keys, projected) = (scored_keys(config, weights), projected_keys(config, weights));
    let side_len = config.side_keys * config.key_dim;
    let of_token = |token: &[f64]| {
        let mut kept = Kept::default();
        for head in 0..config.heads {
            let pair = head / config.heads_per_pair();
            for side in 0..2 {
                let query = &token[(pair * 2 + side) * config.key_dim..][..config.key_dim];
                let first = (head * 2 + side) * side_len;
                let keys = &keys[first * config.tucker_rank..][..side_len * config.tucker_rank];
                keep(config, keys, &projected[first..][..side_len], query, &mut kept);
            }
        }
        kept
    };
    let tokens: Vec<_> = query.par_chunks_exact(query_width).map(of_token).collect();
    let mut kept = Kept::default();
    for token in tokens {
        kept.keys.extend(token.keys);
        kept.approximate.extend(token.approximate);
        kept.scores.extend(token.scores);
    }
    Ok(kept)
}

/// The keys as they are scored, rank before width: `[heads, 2, side_keys, tucker_rank, key_dim]`.
pub(super) fn scored_keys(config: &MemoryConfig, weights: &Weights<'_>) -> Vec<f64> {
    let mut keys = normalised_keys(config, weights);
    round(weights, &mut keys);
    keys
}

fn normalised_keys(config: &MemoryConfig, weights: &Weights<'_>) -> Vec<f64> {
    let keys = numbers(weights, Weight::Keys);
    let norm_weight = numbers(weights, Weight::KeysNorm);
    let mut normalised = Vec::with_capacity(keys.len());
    for key in keys.chunks_exact(config.key_dim * config.tucker_rank) {
        for rank in 0..config.tucker_rank {
            let mut vector: Vec<f64> = key.iter().skip(rank).step_by(config.tucker_rank).copied().collect();
            if config.capabilities.normalises_keys {
                normalise(config, &norm_weight, &mut vector);
            }
            normalised.extend(vector);
        }
    }
    normalised
}

/// The keys as they are judged, `Σ_ρ w_side[head, ρ] · K̂[.., ρ]`: `[heads, 2, side_keys, key_dim]`.
fn projected_keys(config: &MemoryConfig, weights: &Weights<'_>) -> Vec<f64> {
    let mut projected = Vec::new();
    for (at, key) in normalised_keys(config, weights).chunks_exact(config.tucker_rank * config.key_dim).enumerate() {
        let side = at / config.side_keys;
        let judge = judge(config, weights, side / 2, side % 2);
        let number =
            |d: usize| judge.iter().enumerate().map(|(rank, w)| w * key[rank * config.key_dim + d]).sum::<f64>();
        projected.extend((0..config.key_dim).map(number));
    }
    round(weights, &mut projected);
    projected
}

/// `w_side[head, :]`: the weight of each rank in `p`. 1 for product keys.
fn judge(config: &MemoryConfig, weights: &Weights<'_>, head: usize, side: usize) -> Vec<f64> {
    if !config.tucker() {
        return vec![1.0];
    }
    let vectors = if side == 0 { &weights.core_u } else { &weights.core_v };
    vectors[head * config.tucker_rank..][..config.tucker_rank].iter().map(|&w| f64::from(w)).collect()
}

/// Scores the keys of one side for one token and head, and appends what is kept to `kept`.
fn keep(config: &MemoryConfig, keys: &[f64], projected: &[f64], query: &[f64], kept: &mut Kept) {
    let approximate: Vec<f64> = projected.chunks_exact(config.key_dim).map(|key| dot(query, key)).collect();
    let size = config.tucker_rank * config.key_dim;
    for key in largest(&approximate, config.top_m) {
        kept.keys.push(key as u32);
        kept.scores.extend(keys[key * size..][..size].chunks_exact(config.key_dim).map(|vector| dot(query, vector)));
    }
    kept.approximate.extend(approximate);
}

/// The places of the `count` largest numbers, ascending.
fn largest(numbers: &[f64], count: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..numbers.len()).collect();
    places.sort_by(|&a, &b| selection_order(numbers[a], numbers[b]).then(a.cmp(&b)));
    places.truncate(count);
    places.sort_unstable();
    places
}
