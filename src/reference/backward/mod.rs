//! Backward: the gradients of `sum(output · grad_output)` for the input and for every weight, one file a stage.
//!
//! The selections are constants, and so are `u` and `v`, which only select: the chosen slots `[tokens, heads, top_m]` say all
//! that is needed, for a kept key that no slot uses has no gradient. Everything is computed slot by slot from the layer's
//! definition: `S_row[i]`, `S_col[j]` and the scores of the slot `i · side_keys + j`, in f64.

mod combine;
mod expand;
mod query;
mod score;

use std::collections::BTreeMap;

use super::{Chosen, below, dot, length, normalise, query as queries_of, whole_rows};
use crate::checkpoint::core_name;
use crate::weights::{GATE_PROJ, KEYS_NORM, layout};
use crate::{HostTensor, MemoryConfig, Norm, Result, Scores, Weights};

/// Gradients of one backward pass, each in the shape of what it is the gradient of.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients {
    /// `[tokens, hidden_size]`.
    pub input: Vec<f64>,
    /// `[query_heads · 2 · key_dim, hidden_size]`.
    pub query_proj: Vec<f64>,
    /// `[key_dim]`.
    pub query_norm: Vec<f64>,
    /// `[heads, 2, side_keys, key_dim, tucker_rank]`.
    pub keys: Vec<f64>,
    /// `[key_dim]`; zeros where the keys are taken as they are.
    pub keys_norm: Vec<f64>,
    /// `[cores, heads, tucker_rank, tucker_rank]`; empty for product keys.
    pub cores: Vec<f64>,
    /// The chosen rows of the value table, each with its `[value_dim]`.
    pub values: BTreeMap<usize, Vec<f64>>,
    /// `[hidden_size, expansion · value_dim]`.
    pub values_proj: Vec<f64>,
    /// `[value_dim, hidden_size]`; empty without a gate.
    pub gate_proj: Vec<f64>,
}

impl Gradients {
    /// The gradients as a file holds them, dense and in f32: `grad_input`, and `grad.<name>` for each weight of the layer by its name in a
    /// checkpoint. Keys that are taken as they are have no gradient for their norm.
    ///
    /// # Errors
    /// [`Error::Length`](crate::Error::Length) for gradients that are not of a layer of this `config`.
    pub fn named(&self, config: &MemoryConfig) -> Result<Vec<(String, HostTensor<'static>)>> {
        let mut values = vec![0.0; config.rows() * config.value_dim];
        for (row, gradient) in &self.values {
            values[row * config.value_dim..][..config.value_dim].copy_from_slice(gradient);
        }
        let tensor = |shape: Vec<usize>, numbers: &[f64]| {
            let numbers: Vec<f32> = numbers.iter().map(|&x| x as f32).collect();
            HostTensor::from_f32(shape, &numbers)
        };
        let (heads, rank) = (config.heads, config.tucker_rank);
        let tokens = self.input.len() / config.hidden_size;
        let mut named = vec![("grad_input".to_string(), tensor(vec![tokens, config.hidden_size], &self.input)?)];
        let own = [
            &self.query_proj,
            &self.query_norm,
            &self.keys,
            &self.keys_norm,
            &values,
            &self.values_proj,
            &self.gate_proj,
        ];
        for ((name, shape), numbers) in layout(config).into_iter().zip(own) {
            let absent = (name == KEYS_NORM && !config.capabilities.normalises_keys)
                || (name == GATE_PROJ && !config.capabilities.gated);
            if !absent {
                named.push((format!("grad.{name}"), tensor(shape, numbers)?));
            }
        }
        for (core, numbers) in self.cores.chunks_exact(heads * rank * rank).enumerate() {
            named.push((format!("grad.{}", core_name(core)), tensor(vec![heads, rank, rank], numbers)?));
        }
        Ok(named)
    }
}

/// The scores of given `slots` `[tokens, heads, top_m]`, whoever chose them, for `input` `[tokens, hidden_size]`; a softmax of product keys runs
/// over the given ones.
///
/// # Errors
/// As [`backward`].
pub fn score_slots(config: &MemoryConfig, weights: &Weights<'_>, input: &[f32], slots: &[u32]) -> Result<Chosen> {
    weights.check(config)?;
    let tokens = whole_rows("input", input.len(), "hidden_size", config.hidden_size)?;
    length("slots", slots.len(), tokens * config.heads * config.top_m)?;
    below("slots", slots, config.slots())?;
    let queries = queries_of(config, weights, input)?;
    let sides = score::side_scores(config, weights, &queries, slots);
    let scores = combine::slot_scores(config, weights, &sides);
    let totals = match config.capabilities.scores {
        Scores::Tucker => scores.chunks_exact(config.cores).map(|scores| scores.iter().sum()).collect(),
        Scores::Additive => sides.chunks_exact(2).map(|sides| sides[0] + sides[1]).collect(),
    };
    Ok(Chosen { slots: slots.to_vec(), scores, totals })
}

/// The gradients for `input` and `grad_output`, both `[tokens, hidden_size]`, and the `slots` that the forward pass chose.
///
/// # Errors
/// [`Error::Tensor`](crate::Error::Tensor) or [`Error::Length`](crate::Error::Length) for weights that do not fit `config`,
/// wrong lengths, or a slot that is not below `side_keys²`.
pub fn backward(
    config: &MemoryConfig,
    weights: &Weights<'_>,
    input: &[f32],
    slots: &[u32],
    grad_output: &[f32],
) -> Result<Gradients> {
    weights.check(config)?;
    let tokens = whole_rows("input", input.len(), "hidden_size", config.hidden_size)?;
    length("slots", slots.len(), tokens * config.heads * config.top_m)?;
    length("grad_output", grad_output.len(), input.len())?;
    below("slots", slots, config.slots())?;
    let queries = queries_of(config, weights, input)?;
    let sides = score::side_scores(config, weights, &queries, slots);
    let scores = combine::slot_scores(config, weights, &sides);
    let expand = expand::backward(config, weights, input, slots, &scores, grad_output)?;
    let combine = combine::backward(config, weights, &sides, &scores, &expand.scores);
    let score = score::backward(config, weights, input, &queries, slots, &combine.sides);
    let query = query::backward(config, weights, input, &score.query, &expand.gate);
    Ok(Gradients {
        input: query.input,
        query_proj: query.query_proj,
        query_norm: score.query_norm,
        keys: score.keys,
        keys_norm: score.keys_norm,
        cores: combine.cores,
        values: expand.values,
        values_proj: expand.values_proj,
        gate_proj: query.gate_proj,
    })
}

/// The gradient of a norm's input `x` from its output's gradient; adds the weight's to `grad_weight`.
fn normalise_backward(
    config: &MemoryConfig,
    weight: &[f64],
    x: &[f64],
    grad: &[f64],
    grad_weight: &mut [f64],
) -> Vec<f64> {
    let count = x.len() as f64;
    let mean = if config.norm == Norm::Layer { x.iter().sum::<f64>() / count } else { 0.0 };
    let scale = (x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / count + f64::from(config.norm_eps)).sqrt();
    let mut unit = x.to_vec();
    normalise(config, &vec![1.0; x.len()], &mut unit);
    let weighted: Vec<f64> = grad.iter().zip(weight).map(|(g, w)| g * w).collect();
    let along = dot(&weighted, &unit) / count;
    let across = if config.norm == Norm::Layer { weighted.iter().sum::<f64>() / count } else { 0.0 };
    grad_weight.iter_mut().zip(grad).zip(&unit).for_each(|((out, g), u)| *out += g * u);
    weighted.iter().zip(&unit).map(|(g, u)| (g - across - u * along) / scale).collect()
}
