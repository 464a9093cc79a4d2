//! Weigh: the chosen slots' scores times what the pre-values make of the input.
//!
//! `s_k ·= act(z · P[row])` with `z = W_p x` (arXiv 2508.18756) or `z = x` (arXiv 2407.04153), and act the exact gelu or nothing.

use rayon::prelude::*;

use super::{Chosen, below, dot, length, linear, numbers, to_f64, whole_rows};
use crate::{Activation, Error, MemoryConfig, Result, Weight, Weights};

/// What [`weigh`] gives.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Weighed {
    /// `[tokens, heads, top_m, cores]`.
    pub scores: Vec<f64>,
    /// `z · P[row]`, `[tokens, heads, top_m]`; empty where the layer has no pre-values.
    pub products: Vec<f64>,
}

/// Weighs the scores of `chosen` for `input` `[tokens, hidden_size]`; a layer without pre-values leaves them as they are.
///
/// # Errors
/// [`Error::Tensor`] or [`Error::Length`] if `weights` do not fit `config`, `input` is not whole rows, or `chosen` has
/// other lengths than [`Chosen`] says or a slot that is not below `side_keys²`.
pub fn weigh(config: &MemoryConfig, weights: &Weights<'_>, input: &[f32], chosen: &Chosen) -> Result<Weighed> {
    weights.check(config)?;
    let tokens = whole_rows("input", input.len(), "hidden_size", config.hidden_size)?;
    let entries = config.heads * config.top_m;
    length("chosen.slots", chosen.slots.len(), tokens * entries)?;
    length("chosen.scores", chosen.scores.len(), tokens * entries * config.cores)?;
    below("chosen.slots", &chosen.slots, config.slots())?;
    let Some(weigh) = config.capabilities.weigh else {
        return Ok(Weighed { scores: chosen.scores.clone(), products: Vec::new() });
    };
    let z = sources(config, weights, input);
    let of_token = |(slots, z): (&[u32], &[f64])| -> Result<Vec<f64>> {
        slots.iter().map(|&slot| Ok(dot(&read(config, weights, Weight::PreValues, slot)?.numbers, z))).collect()
    };
    let tokens = chosen.slots.par_chunks_exact(entries).zip(z.par_chunks_exact(config.pre_dim));
    let products = tokens.map(of_token).collect::<Result<Vec<_>>>()?.concat();
    let scores = chosen.scores.chunks_exact(config.cores).zip(&products);
    let scores = scores.flat_map(|(scores, &d)| scores.iter().map(move |s| s * activate(d, weigh.activation)));
    Ok(Weighed { scores: scores.collect(), products })
}

/// `z` `[tokens, pre_dim]`: the input itself, or projected.
pub(super) fn sources(config: &MemoryConfig, weights: &Weights<'_>, input: &[f32]) -> Vec<f64> {
    let projection = numbers(weights, Weight::PreValuesProj);
    if projection.is_empty() {
        return to_f64(input);
    }
    input.chunks_exact(config.hidden_size).flat_map(|x| linear(&projection, &to_f64(x))).collect()
}

/// What a slot reads of a table.
pub(super) struct Read {
    /// Its virtual block.
    pub block: usize,
    /// The table's row.
    pub row: usize,
    /// The row's numbers.
    pub numbers: Vec<f64>,
}

/// Reads the row of a slot.
pub(super) fn read(config: &MemoryConfig, weights: &Weights<'_>, table: Weight, slot: u32) -> Result<Read> {
    let address = weights.shuffle_index.as_ref().map_or(slot, |shuffle| shuffle[slot as usize]) as usize;
    let (block, row) = config.place(address);
    let numbers = weights.get(table).and_then(|table| table.row(row)).ok_or_else(|| Error::Tensor {
        name: table.name(config),
        problem: format!("has no row {row} of {}", config.table_rows()),
    })?;
    Ok(Read { block, row, numbers: to_f64(&numbers) })
}

/// The activation of a product.
pub(super) fn activate(x: f64, activation: Activation) -> f64 {
    match activation {
        Activation::Identity => x,
        Activation::Gelu => x * cumulative(x),
    }
}

/// Its derivative.
pub(super) fn activate_backward(x: f64, activation: Activation) -> f64 {
    match activation {
        Activation::Identity => 1.0,
        Activation::Gelu => cumulative(x) + x * (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt(),
    }
}

/// The normal distribution's.
fn cumulative(x: f64) -> f64 {
    0.5 * libm::erfc(-x / std::f64::consts::SQRT_2)
}
