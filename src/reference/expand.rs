//! Expand: the chosen slots' values, weighted, pooled over the heads and projected.
//!
//! `a = shuffle_index[slot]` is a virtual address: block `e = a / rows`, row `a mod rows`. `pooled[e, slice k] += s_k ·
//! V[row, slice k]` `[expansion, value_dim]`, then `y = W_o · pooled` `[hidden_size]`; Memory+ multiplies `pooled` by
//! `silu(W_g x)` first. Only the chosen rows of the table are read.

use rayon::prelude::*;

use super::{Chosen, below, length, linear, to_f64, whole_rows, widen};
use crate::{Error, MemoryConfig, Result, Weights};

/// The output `[tokens, hidden_size]` (arXiv 2411.12364 section 3.2, implicit value expansion; arXiv 2412.09764
/// section 3 for the gate). `input` `[tokens, hidden_size]` feeds the gate alone.
///
/// # Errors
/// [`Error::Tensor`] or [`Error::Length`] if `weights` do not fit `config`, `input` is not whole rows, or `chosen` has
/// other lengths than [`Chosen`] says or a slot that is not below `side_keys²`.
pub fn expand(config: &MemoryConfig, weights: &Weights<'_>, input: &[f32], chosen: &Chosen) -> Result<Vec<f64>> {
    weights.check(config)?;
    let tokens = whole_rows("input", input.len(), "hidden_size", config.hidden_size)?;
    let slots_width = config.heads * config.top_m;
    let scores_width = slots_width * config.cores;
    length("chosen.slots", chosen.slots.len(), tokens * slots_width)?;
    length("chosen.scores", chosen.scores.len(), tokens * scores_width)?;
    below("chosen.slots", &chosen.slots, config.slots())?;
    let projection = widen(&weights.values_proj);
    let gate = weights.gate_proj.as_ref().map(widen);
    let of_token = |token: usize| -> Result<Vec<f64>> {
        let slots = &chosen.slots[token * slots_width..][..slots_width];
        let scores = &chosen.scores[token * scores_width..][..scores_width];
        let mut pooled = pool(config, weights, slots, scores)?;
        if let Some(gate) = &gate {
            let input = to_f64(&input[token * config.hidden_size..][..config.hidden_size]);
            for (pooled, x) in pooled.iter_mut().zip(linear(gate, &input)) {
                *pooled *= silu(x);
            }
        }
        Ok(linear(&projection, &pooled))
    };
    let output: Vec<_> = (0..tokens).into_par_iter().map(of_token).collect::<Result<_>>()?;
    Ok(output.concat())
}

/// One token's weighted values `[expansion, value_dim]`.
fn pool(config: &MemoryConfig, weights: &Weights<'_>, slots: &[u32], scores: &[f64]) -> Result<Vec<f64>> {
    let slice = config.value_dim / config.cores;
    let mut pooled = vec![0.0; config.pooled_dim()];
    for (&slot, scores) in slots.iter().zip(scores.chunks_exact(config.cores)) {
        let address = weights.shuffle_index.as_ref().map_or(slot, |shuffle| shuffle[slot as usize]) as usize;
        let (block, row) = (address / config.rows(), address % config.rows());
        let value = weights.values.row(row).ok_or_else(|| missing_row(config, row))?;
        let pooled = &mut pooled[block * config.value_dim..][..config.value_dim];
        for (column, (pooled, value)) in pooled.iter_mut().zip(value).enumerate() {
            *pooled += scores[column / slice] * f64::from(value);
        }
    }
    Ok(pooled)
}

fn missing_row(config: &MemoryConfig, row: usize) -> Error {
    Error::Tensor { name: "values_for_look_up".into(), problem: format!("has no row {row} of {}", config.rows()) }
}

pub(super) fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}
