//! The backward pass of a layer: expand → combine → score → query, each stage given what its forward pass left.
//!
//! What [`forward_saving`](MemoryLayer::forward_saving) keeps, in bytes per token:
//!
//! | what | bytes |
//! |---|---|
//! | queries before their norm | `4 · query_pairs · 2 · key_dim` |
//! | kept keys and their scores | `4 · heads · 2 · top_m · (1 + tucker_rank)` |
//! | slots and their scores | `4 · heads · top_m · (1 + cores)` |
//! | z, products and weighed scores | `4 · (pre_dim + heads · top_m · (1 + cores))`, where the layer weighs; no z where it is the input |
//! | pooled values | `pooled_blocks · value_dim` numbers of the layer's type, f32 for a table of several pages or without a projection; none with a gate |
//! | gate | `4 · value_dim`, with a gate |
//! | output gate and what it multiplies | `4 · (1 + hidden_size)`, with an output gate |
//!
//! No gathered row is kept: the rows are read again, once (twice with a gate). `ultramem_v1_1b` keeps 10.4 kB a token where its rows are 123 kB in bf16.
//!
//! A NaN or an infinity in one token's input or gradient reaches that token's `input` gradient and the rows of keys and values that
//! its slots name; of the weights that every token shares (all but keys and tables) it spoils all.

use std::collections::BTreeMap;

use cubecl::prelude::*;
use ultramem_kernels::combine::{Chosen, CombineGradients, combine_backward};
use ultramem_kernels::expand::{ExpandGradients, Pooled, expand, expand_backward, pool, project_pooled};
use ultramem_kernels::linear::ProjectStrategy;
use ultramem_kernels::query::{Map, query_backward};
use ultramem_kernels::score::{Kept, ScoreGradients, Scored, score_backward};
use ultramem_kernels::weigh::{WeighGradients, Weighed, weigh_backward};
use ultramem_kernels::{RowGradients, Tensor};

use super::forward::{Maps, missing};
use crate::{ElementType, Error, Forward, MemoryLayer, PerWeight, Result, Weight, reference};

/// What the forward pass leaves for the backward pass.
pub struct Saved<R: Runtime> {
    query: Tensor<R>,
    kept: Kept<R>,
    chosen: Chosen<R>,
    /// `z`, and the slots with weighed scores.
    weighed: Option<(Tensor<R>, Weighed<R>)>,
    /// Before the projection; None where a gate comes between.
    pooled: Option<Tensor<R>>,
    /// Before the output gate.
    projected: Option<Tensor<R>>,
    maps: Maps<R>,
}

impl<R: Runtime> Saved<R> {
    /// The keys that each token kept, and their scores.
    pub fn kept(&self) -> &Kept<R> {
        &self.kept
    }

    /// The slots and the scores that expand was given.
    fn expanded(&self) -> &Chosen<R> {
        self.weighed.as_ref().map_or(&self.chosen, |(_, weighed)| &weighed.chosen)
    }
}

impl<R: Runtime> Clone for Saved<R> {
    fn clone(&self) -> Self {
        Self {
            query: self.query.clone(),
            kept: self.kept.clone(),
            chosen: self.chosen.clone(),
            weighed: self.weighed.clone(),
            pooled: self.pooled.clone(),
            projected: self.projected.clone(),
            maps: self.maps.clone(),
        }
    }
}

/// The gradients of a backward pass, all in f32 but the input's.
pub struct Gradients<R: Runtime> {
    /// `[tokens, hidden_size]`, in the layer's element type.
    pub input: Tensor<R>,
    /// Of every weight but keys and tables, shaped as [`LayerWeights`](crate::LayerWeights) has it; None where the layer does not have it, or its
    /// output does not depend on it.
    pub tensors: PerWeight<Option<Tensor<R>>>,
    /// Of the keys as a table `[heads · 2 · side_keys, key_dim · tucker_rank]`: the keys of chosen slots alone.
    pub keys: RowGradients<R>,
    /// Of the value table `[table_rows, value_dim]`: the chosen rows alone.
    pub values: RowGradients<R>,
    /// Of the pre-values `[table_rows, pre_dim]`: the chosen rows alone; None where the layer does not weigh.
    pub pre_values: Option<RowGradients<R>>,
}

/// What comes through the maps of the input.
pub struct InputGradients<R: Runtime> {
    /// `[tokens, hidden_size]`, in the layer's element type.
    pub input: Tensor<R>,
    /// f32, of the maps' weights and biases.
    pub tensors: PerWeight<Option<Tensor<R>>>,
}

/// The gradients of what the input was mapped to, besides the queries; f32, each where the layer has the map.
pub struct MapGradients<R: Runtime> {
    /// `[tokens, value_dim]`: of the gate before its silu.
    pub gate: Option<Tensor<R>>,
    /// `[tokens]`: of the output gate before its sigmoid.
    pub output_gate: Option<Tensor<R>>,
    /// `[tokens, pre_dim]`: of `z`.
    pub z: Option<Tensor<R>>,
}

impl<R: Runtime> MemoryLayer<R> {
    /// [`forward`](Self::forward), and what [`backward`](Self::backward) needs of it. The same slots; the output may be rounded otherwise where
    /// `forward` pools and projects in one kernel.
    ///
    /// # Errors
    /// An input of another shape or type.
    pub fn forward_saving(&self, input: &Tensor<R>) -> Result<(Forward<R>, Saved<R>)> {
        let strategies = self.saving_strategies(input.shape().first().copied().unwrap_or(0));
        let query = self.query(input, strategies.query)?;
        let (kept, chosen) = self.retrieve(&query, strategies.score)?;
        let weighed = self.weigh(input, &chosen, strategies.query)?;
        let maps = self.maps(input, strategies.query)?;
        let mut saved = Saved { query, kept, chosen: chosen.clone(), weighed, pooled: None, projected: None, maps };
        let memory = self.memory(&saved.maps);
        if memory.gate.is_some() && memory.output_gate.is_none() {
            let output = expand(&self.client, saved.expanded(), &memory, strategies.expand)?;
            return Ok((Forward { output, chosen }, saved));
        }
        let pooled = pool(&self.client, saved.expanded(), &memory, strategies.query.is_invariant())?;
        let projected = project_pooled(&self.client, &pooled, &memory, strategies.query)?;
        let output = projected.output(&memory)?;
        let (ungated, finished) = (memory.gate.is_none(), memory.output_gate.is_some());
        saved.pooled = ungated.then_some(pooled);
        saved.projected = finished.then_some(projected.values);
        Ok((Forward { output, chosen }, saved))
    }

    /// The gradients of `Σ output · grad_output`, for the `input` that `saved` came of. Selections, `u` and `v` are constants. The same
    /// bits in every run: sums are taken in a fixed order, without atomics.
    ///
    /// - `input`, `grad_output` `[tokens, hidden_size]`, in the layer's element type
    ///
    /// # Errors
    /// Tensors of another shape or type.
    pub fn backward(&self, input: &Tensor<R>, saved: &Saved<R>, grad_output: &Tensor<R>) -> Result<Gradients<R>> {
        self.check_input(input)?;
        let expand = self.expand_backward(saved, grad_output)?;
        let weigh = self.weigh_backward(saved, &expand)?;
        let grad_scores = weigh.as_ref().map_or(&expand.scores, |weigh| &weigh.scores);
        let combine = self.combine_backward(saved, grad_scores)?;
        let score = self.score_backward(saved, &combine.sides)?;
        let (z, pre_values) = weigh.map_or((None, None), |weigh| (Some(weigh.z), Some(weigh.pre_values)));
        let maps = MapGradients { gate: expand.gate, output_gate: expand.output_gate, z };
        let InputGradients { input, mut tensors } = self.query_backward(input, &score.query, &maps)?;
        for (weight, gradient) in [
            (Weight::QueryNorm, score.query_norm),
            (Weight::KeysNorm, score.keys_norm),
            (Weight::Cores, combine.core),
            (Weight::ValuesProj, expand.weight),
            (Weight::ValuesBias, expand.bias),
        ] {
            tensors[weight] = gradient;
        }
        Ok(Gradients { input, tensors, keys: score.keys, values: expand.values, pre_values })
    }

    /// Stage 5, backwards: from `grad_output` `[tokens, hidden_size]` to the slots' scores, the chosen rows, W_o, its bias and the gates.
    ///
    /// # Errors
    /// A gradient of another shape or type.
    pub fn expand_backward(&self, saved: &Saved<R>, grad_output: &Tensor<R>) -> Result<ExpandGradients<R>> {
        let strategy = self.backward_product(saved.query.shape()[0]);
        let (memory, weight) = (self.memory(&saved.maps), self.weights.get(Weight::ValuesProj));
        let pooled = Pooled { pooled: saved.pooled.as_ref(), projected: saved.projected.as_ref() };
        Ok(expand_backward(&self.client, saved.expanded(), &memory, weight, pooled, grad_output, strategy)?)
    }

    /// Stage 4, backwards: from what came through expand to the scores before they were weighed, to `z` and to the pre-values; None where the
    /// layer does not weigh.
    ///
    /// # Errors
    /// Gradients of another shape.
    pub fn weigh_backward(&self, saved: &Saved<R>, expand: &ExpandGradients<R>) -> Result<Option<WeighGradients<R>>> {
        let (Some(pre_values), Some((z, weighed))) = (self.pre_values(), &saved.weighed) else { return Ok(None) };
        Ok(Some(weigh_backward(&self.client, &saved.chosen, weighed, z, &pre_values, expand)?))
    }

    /// Stage 3, backwards: from the slots' scores f32 `[tokens, heads, top_m, cores]` to the score vectors of their keys, and the core.
    ///
    /// # Errors
    /// A gradient of another shape or type.
    pub fn combine_backward(&self, saved: &Saved<R>, grad_scores: &Tensor<R>) -> Result<CombineGradients<R>> {
        let (side_keys, pair_score) = (self.config.side_keys, self.pair_score());
        Ok(combine_backward(&self.client, &saved.kept, side_keys, &pair_score, &saved.chosen, grad_scores)?)
    }

    /// Stage 2, backwards: from the keys' score vectors f32 `[tokens, heads, top_m, 2, tucker_rank]` to the queries, the keys and the norms.
    ///
    /// # Errors
    /// A gradient of another shape or type.
    pub fn score_backward(&self, saved: &Saved<R>, grad_sides: &Tensor<R>) -> Result<ScoreGradients<R>> {
        let (config, weights) = (&self.config, &self.weights);
        let keys_norm = weights.get(Weight::KeysNorm).filter(|_| config.capabilities.normalises_keys);
        let scored = Scored {
            queries: self.queries(&saved.query),
            keys: weights.get(Weight::Keys).ok_or_else(|| missing(Weight::Keys))?,
            keys_norm: keys_norm.map(|weight| (config.norm, config.norm_eps, weight)),
            prepared: &self.keys,
            slots: &saved.chosen.slots,
        };
        Ok(score_backward(&self.client, &scored, grad_sides)?)
    }

    /// Stage 1, backwards: from the queries f32 `[tokens, query_pairs · 2 · key_dim]` and whatever else the input is mapped to, to the input and to
    /// the maps' weights and biases.
    ///
    /// # Errors
    /// An input or a gradient of another shape or type, or a map's gradient that is missing or has no map.
    pub fn query_backward(
        &self,
        input: &Tensor<R>,
        grad_query: &Tensor<R>,
        grads: &MapGradients<R>,
    ) -> Result<InputGradients<R>> {
        self.check_input(input)?;
        let strategy = self.backward_product(input.shape()[0]);
        let column = |gate: &Tensor<R>| gate.reshaped(vec![gate.shape()[0], 1]);
        let output_gate = grads.output_gate.as_ref().map(column);
        let (mut weights, mut maps) = (Vec::new(), Vec::new());
        for (weight, bias, grad) in [
            (Weight::QueryProj, Some(Weight::QueryBias), Some(grad_query)),
            (Weight::PreValuesProj, None, grads.z.as_ref().filter(|_| Weight::PreValuesProj.is_in(&self.config))),
            (Weight::GateProj, Some(Weight::GateBias), grads.gate.as_ref()),
            (Weight::OutputGate, Some(Weight::OutputGateBias), output_gate.as_ref()),
        ] {
            let (own, grad) = match (self.weights.get(weight), grad) {
                (Some(own), Some(grad)) => (own, grad),
                (None, None) => continue,
                (_, grad) => {
                    let value = format!("{} for {}", if grad.is_some() { "given" } else { "missing" }, weight.olmo());
                    let expected = "given for the maps that the layer has, and for no other";
                    return Err(Error::Config { what: "gradient of a map of the input", value, expected });
                }
            };
            let biased = bias.is_some_and(|bias| bias.is_in(&self.config));
            weights.push((weight, bias));
            maps.push(Map { weight: own, biased, grad });
        }
        let more = grads.z.as_ref().filter(|_| !Weight::PreValuesProj.is_in(&self.config));
        let found = query_backward(&self.client, input, &maps, more, strategy)?;
        let mut tensors = PerWeight::default();
        for ((weight, bias), of_map) in weights.into_iter().zip(found.maps) {
            tensors[weight] = Some(of_map.weight);
            bias.into_iter().for_each(|bias| tensors[bias] = of_map.bias.clone());
        }
        Ok(InputGradients { input: found.input, tensors })
    }

    /// How the backward pass computes its products: as the forward pass usually does, but an f16 gradient is not given to matrix units, which would
    /// round its small numbers to zero.
    pub(crate) fn backward_product(&self, tokens: usize) -> ProjectStrategy {
        match self.dtype() {
            ElementType::F16 => ProjectStrategy::Tile,
            dtype => ProjectStrategy::choose(&self.client, tokens, dtype.storage()),
        }
    }

    /// Downloads gradients: the oracle's form, in f32 numbers. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if the device failed in what was enqueued before.
    pub fn read_gradients(&self, gradients: &Gradients<R>) -> Result<reference::Gradients> {
        let config = &self.config;
        let width = config.key_dim * config.tucker_rank;
        let mut keys = vec![0.0; config.heads * 2 * config.side_keys * width];
        for (key, gradient) in self.read_rows(&gradients.keys)? {
            keys[key * width..][..width].copy_from_slice(&gradient);
        }
        let mut found = reference::Gradients {
            input: widen(&self.read(&gradients.input)?),
            values: self.read_rows(&gradients.values)?,
            pre_values: gradients.pre_values.as_ref().map_or(Ok(BTreeMap::new()), |rows| self.read_rows(rows))?,
            ..reference::Gradients::default()
        };
        for weight in Weight::ALL {
            found.tensors[weight] = match &gradients.tensors[weight] {
                Some(gradient) => widen(&self.read(gradient)?),
                None => Vec::new(),
            };
        }
        found.tensors[Weight::Keys] = keys;
        Ok(found)
    }

    /// How many rows `gradients` lists. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if the device failed in what was enqueued before.
    pub fn used_rows(&self, gradients: &RowGradients<R>) -> Result<usize> {
        Ok(self.read_integers(gradients.count())?[0] as usize)
    }

    /// Downloads the listed rows. Waits for the device.
    fn read_rows(&self, gradients: &RowGradients<R>) -> Result<BTreeMap<usize, Vec<f64>>> {
        let count = self.used_rows(gradients)?;
        let width = gradients.gradients().shape()[1];
        let numbers = self.read(gradients.gradients())?;
        let rows = self.read_integers(gradients.rows())?;
        let listed = rows.iter().zip(numbers.chunks_exact(width)).take(count);
        Ok(listed.map(|(&row, gradient)| (row as usize, widen(gradient))).collect())
    }
}

fn widen(numbers: &[f32]) -> Vec<f64> {
    numbers.iter().map(|&x| f64::from(x)).collect()
}
