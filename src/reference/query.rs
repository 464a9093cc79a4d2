//! Query: `q = norm(W_q x + b_q)`, the bias and the norm where the layer has them, rounded as it is multiplied with keys.
//!
//! `input` `[tokens, hidden_size]` and `W_q` `[query_pairs · 2 · key_dim, hidden_size]` give `[tokens, query_pairs, 2,
//! key_dim]`: a row query and a column query, each normalised over `key_dim` with the weight that all of them share.

use rayon::prelude::*;

use super::{affine, normalise, numbers, round, to_f64, whole_rows};
use crate::{MemoryConfig, Result, Weight, Weights};

/// The normalised and rounded queries `[tokens, query_pairs, 2, key_dim]` of `input` `[tokens, hidden_size]` (arXiv 1907.05242
/// section 3.1).
///
/// # Errors
/// [`Error::Tensor`](crate::Error::Tensor) or [`Error::Length`](crate::Error::Length) if `weights` do not fit `config`
/// or `input` is not whole rows.
pub fn query(config: &MemoryConfig, weights: &Weights<'_>, input: &[f32]) -> Result<Vec<f64>> {
    weights.check(config)?;
    whole_rows("input", input.len(), "hidden_size", config.hidden_size)?;
    let norm_weight = numbers(weights, Weight::QueryNorm);
    let mut queries = raw(config, weights, input);
    if config.capabilities.normalises_queries {
        queries.par_chunks_exact_mut(config.key_dim).for_each(|half| normalise(config, &norm_weight, half));
    }
    round(weights, &mut queries);
    Ok(queries)
}

/// The queries before their norm.
pub(super) fn raw(config: &MemoryConfig, weights: &Weights<'_>, input: &[f32]) -> Vec<f64> {
    let (projection, bias) = (numbers(weights, Weight::QueryProj), numbers(weights, Weight::QueryBias));
    let query = |token: &[f32]| affine(&projection, &bias, &to_f64(token));
    let queries: Vec<_> = input.par_chunks_exact(config.hidden_size).map(query).collect();
    queries.concat()
}
