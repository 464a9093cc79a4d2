//! Query: `q = norm(W_q x)`.
//!
//! `input` `[tokens, hidden_size]` and `W_q` `[query_heads · 2 · key_dim, hidden_size]` give `[tokens, query_heads, 2,
//! key_dim]`: a row query and a column query, each normalised over `key_dim` with the weight that all of them share.

use rayon::prelude::*;

use super::{linear, normalise, to_f64, whole_rows, widen};
use crate::{MemoryConfig, Result, Weights};

/// The normalised queries `[tokens, query_heads, 2, key_dim]` of `input` `[tokens, hidden_size]` (arXiv 1907.05242
/// section 3.1). `query_heads` is 1 where all heads share a query.
///
/// # Errors
/// [`Error::Tensor`](crate::Error::Tensor) or [`Error::Length`](crate::Error::Length) if `weights` do not fit `config`
/// or `input` is not whole rows.
pub fn query(config: &MemoryConfig, weights: &Weights<'_>, input: &[f32]) -> Result<Vec<f64>> {
    weights.check(config)?;
    whole_rows("input", input.len(), "hidden_size", config.hidden_size)?;
    let projection = widen(&weights.query_proj);
    let norm_weight = widen(&weights.query_norm);
    let query = |token: &[f32]| {
        let mut product = linear(&projection, &to_f64(token));
        for half in product.chunks_exact_mut(config.key_dim) {
            normalise(config, &norm_weight, half);
        }
        product
    };
    let queries: Vec<_> = input.par_chunks_exact(config.hidden_size).map(query).collect();
    Ok(queries.concat())
}
