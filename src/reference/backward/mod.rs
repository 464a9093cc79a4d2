//! Backward: the gradients of `sum(output · grad_output)` for the input and for every weight, one file a stage.
//!
//! The selections are constants, and so are `u` and `v`, which only select: the chosen slots `[tokens, heads, top_m]` say all
//! that is needed, for a kept key that no slot uses has no gradient. Everything is computed slot by slot from the layer's
//! definition: `S_row[i]`, `S_col[j]` and the scores of the slot `i · side_keys + j`, in f64.

mod combine;
mod expand;
mod query;
mod score;
mod weigh;

use std::collections::BTreeMap;

use super::{Chosen, below, dot, length, normalise, query as queries_of, weigh as weigh_of, whole_rows};
use crate::weights::names::core_name;
use crate::{HostTensor, MemoryConfig, Norm, PerWeight, Result, Scores, Weight, Weights};

/// Gradients of one backward pass, each in the shape of what it is the gradient of.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Gradients {
    /// `[tokens, hidden_size]`.
    pub input: Vec<f64>,
    /// Of every weight but the tables; empty where the layer does not have it, or its output does not depend on it. Keys are
    /// `[heads, 2, side_keys, key_dim, tucker_rank]`.
    pub tensors: PerWeight<Vec<f64>>,
    /// The chosen rows of the value table, each with its `[value_dim]`.
    pub values: BTreeMap<usize, Vec<f64>>,
    /// The chosen rows of the pre-values, each with its `[pre_dim]`.
    pub pre_values: BTreeMap<usize, Vec<f64>>,
}

impl Gradients {
    /// The gradient of a weight, dense; of a table, zeros but for the chosen rows.
    pub fn dense(&self, config: &MemoryConfig, weight: Weight) -> Vec<f64> {
        let (rows, width) = match weight {
            Weight::Values => (&self.values, config.value_dim),
            Weight::PreValues => (&self.pre_values, config.pre_dim),
            _ => return self.tensors[weight].clone(),
        };
        let mut dense = vec![0.0; config.table_rows() * width];
        for (row, gradient) in rows {
            dense[row * width..][..width].copy_from_slice(gradient);
        }
        dense
    }

    /// The gradients as a file holds them, dense and in f32: `grad_input`, and `grad.<name>` for each weight that the layer learns, by its
    /// name in a checkpoint.
    ///
    /// # Errors
    /// [`Error::Length`](crate::Error::Length) for gradients that are not of a layer of this `config`.
    pub fn named(&self, config: &MemoryConfig) -> Result<Vec<(String, HostTensor<'static>)>> {
        let tensor = |shape: &[usize], numbers: &[f64]| {
            let numbers: Vec<f32> = numbers.iter().map(|&x| x as f32).collect();
            HostTensor::from_f32(shape, &numbers)
        };
        let tokens = self.input.len() / config.hidden_size;
        let mut named = vec![("grad_input".to_string(), tensor(&[tokens, config.hidden_size], &self.input)?)];
        for weight in Weight::ALL.into_iter().filter(|weight| weight.learns(config)) {
            let (shape, numbers) = (weight.shape(config), self.dense(config, weight));
            if weight == Weight::Cores {
                length("gradient of the cores", numbers.len(), shape.iter().product())?;
                for (core, numbers) in numbers.chunks_exact(shape[1..].iter().product()).enumerate() {
                    named.push((format!("grad.{}", core_name(core)), tensor(&shape[1..], numbers)?));
                }
            } else {
                named.push((format!("grad.{}", weight.name(config)), tensor(&shape, &numbers)?));
            }
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
    let chosen =
        Chosen { slots: slots.to_vec(), scores: combine::slot_scores(config, weights, &sides), totals: vec![] };
    let weighed = weigh_of(config, weights, input, &chosen)?;
    let expand = expand::backward(config, weights, input, slots, &weighed.scores, grad_output)?;
    let weigh = weigh::backward(config, weights, input, slots, &chosen.scores, &weighed, expand.scores)?;
    let combine = combine::backward(config, weights, &sides, &chosen.scores, &weigh.scores);
    let score = score::backward(config, weights, input, &queries, slots, &combine.sides);
    let mut found = Gradients {
        input: vec![0.0; input.len()],
        values: expand.values,
        pre_values: weigh.pre_values,
        ..Gradients::default()
    };
    if config.capabilities.weigh.is_some_and(|weigh| !weigh.projected) {
        found.input.iter_mut().zip(&weigh.z).for_each(|(input, z)| *input += z);
    }
    for (map, bias, grad) in [
        (Weight::QueryProj, Some(Weight::QueryBias), score.query),
        (Weight::PreValuesProj, None, weigh.z),
        (Weight::GateProj, Some(Weight::GateBias), expand.gate),
        (Weight::OutputGate, Some(Weight::OutputGateBias), expand.output_gate),
    ] {
        let (weight, of_bias) = query::backward(config, weights, map, input, &grad, &mut found.input);
        found.tensors[map] = weight;
        bias.into_iter().for_each(|bias| found.tensors[bias] = of_bias.clone());
    }
    for (weight, gradient) in [
        (Weight::QueryNorm, score.query_norm),
        (Weight::Keys, score.keys),
        (Weight::KeysNorm, score.keys_norm),
        (Weight::Cores, combine.cores),
        (Weight::ValuesProj, expand.values_proj),
        (Weight::ValuesBias, expand.bias),
    ] {
        found.tensors[weight] = gradient;
    }
    Weight::ALL.into_iter().filter(|weight| !weight.learns(config)).for_each(|weight| found.tensors[weight].clear());
    Ok(found)
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
