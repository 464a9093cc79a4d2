//! The backward pass of a layer: expand → combine → score → query, each stage given what its forward pass left.
//!
//! What [`forward_saving`](MemoryLayer::forward_saving) keeps, in bytes per token:
//!
//! | what | bytes |
//! |---|---|
//! | queries before their norm | `4 · query_heads · 2 · key_dim` |
//! | kept keys and their scores | `4 · heads · 2 · top_m · (1 + tucker_rank)` |
//! | slots and their scores | `4 · heads · top_m · (1 + cores)` |
//! | pooled values | `expansion · value_dim` numbers of the layer's type, f32 for a table of several pages; none for Memory+ |
//! | gate | `4 · value_dim` for Memory+ |
//!
//! No gathered row is kept: the rows are read again, once (twice for Memory+). `ultramem_v1_1b` keeps 10.4 kB a token where its rows are 123 kB in bf16.
//!
//! A NaN or an infinity in one token's input or gradient reaches that token's `input` gradient and the rows of keys and values that
//! its slots name; of the weights that every token shares (W_q, W_o, W_g, the norms, the core) it spoils all.

use std::collections::BTreeMap;

use cubecl::prelude::*;
use ultramem_kernels::combine::{Chosen, CombineGradients, combine_backward};
use ultramem_kernels::expand::{ExpandGradients, expand_backward, pool};
use ultramem_kernels::linear::{ProjectStrategy, project};
use ultramem_kernels::query::{Map, QueryGradients, query_backward};
use ultramem_kernels::score::{Kept, ScoreGradients, Scored, score_backward};
use ultramem_kernels::{RowGradients, Tensor};

use crate::{ElementType, Error, Forward, MemoryLayer, Result, reference};

/// What the forward pass leaves for the backward pass.
pub struct Saved<R: Runtime> {
    query: Tensor<R>,
    kept: Kept<R>,
    chosen: Chosen<R>,
    /// Before the projection; None where a gate comes between.
    pooled: Option<Tensor<R>>,
    gate: Option<Tensor<R>>,
}

impl<R: Runtime> Clone for Saved<R> {
    fn clone(&self) -> Self {
        Self {
            query: self.query.clone(),
            kept: self.kept.clone(),
            chosen: self.chosen.clone(),
            pooled: self.pooled.clone(),
            gate: self.gate.clone(),
        }
    }
}

/// The gradients of a backward pass, each shaped as [`LayerWeights`](crate::LayerWeights) has its weight, all in f32 but the input's.
pub struct Gradients<R: Runtime> {
    /// `[tokens, hidden_size]`, in the layer's element type.
    pub input: Tensor<R>,
    /// `[query_heads · 2 · key_dim, hidden_size]`.
    pub query_proj: Tensor<R>,
    /// `[key_dim]`.
    pub query_norm: Tensor<R>,
    /// Of the keys as a table `[heads · 2 · side_keys, key_dim · tucker_rank]`: the keys of chosen slots alone.
    pub keys: RowGradients<R>,
    /// `[key_dim]`; None where the keys are taken as they are.
    pub keys_norm: Option<Tensor<R>>,
    /// `[cores, heads, tucker_rank, tucker_rank]`; None for product keys.
    pub cores: Option<Tensor<R>>,
    /// Of the value table `[rows, value_dim]`: the chosen rows alone.
    pub values: RowGradients<R>,
    /// `[hidden_size, expansion · value_dim]`.
    pub values_proj: Tensor<R>,
    /// `[value_dim, hidden_size]`, for Memory+ alone.
    pub gate_proj: Option<Tensor<R>>,
}

impl<R: Runtime> MemoryLayer<R> {
    /// [`forward`](Self::forward), and what [`backward`](Self::backward) needs of it. The same slots; the output may be rounded otherwise where
    /// `forward` pools and projects in one kernel.
    ///
    /// # Errors
    /// An input of another shape or type.
    pub fn forward_saving(&self, input: &Tensor<R>) -> Result<(Forward<R>, Saved<R>)> {
        let strategies = self.strategies(input.shape().first().copied().unwrap_or(0));
        let query = self.query(input, strategies.query)?;
        let (kept, chosen) = self.retrieve(&query, strategies.score)?;
        let gate = self.gate(input, strategies.query)?;
        let (output, pooled) = match &gate {
            Some(gate) => (self.expand_gated(&chosen, Some(gate), strategies.expand)?, None),
            None => {
                let memory = self.memory(None);
                let pooled = pool(&self.client, &chosen, &memory)?;
                let output = project(&self.client, &pooled, memory.weight, memory.weight.dtype, strategies.query)?;
                (output, Some(pooled))
            }
        };
        let saved = Saved { query, kept, chosen: chosen.clone(), pooled, gate };
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
        let combine = self.combine_backward(saved, &expand.scores)?;
        let score = self.score_backward(saved, &combine.sides)?;
        let query = self.query_backward(input, &score.query, expand.gate.as_ref())?;
        Ok(Gradients {
            input: query.input,
            query_proj: query.weight,
            query_norm: score.query_norm,
            keys: score.keys,
            keys_norm: score.keys_norm,
            cores: combine.core,
            values: expand.values,
            values_proj: expand.weight,
            gate_proj: query.second_weight,
        })
    }

    /// Stage 4, backwards: from `grad_output` `[tokens, hidden_size]` to the slots' scores, the chosen rows, W_o and the gate.
    ///
    /// # Errors
    /// A gradient of another shape or type.
    pub fn expand_backward(&self, saved: &Saved<R>, grad_output: &Tensor<R>) -> Result<ExpandGradients<R>> {
        let strategy = self.backward_product(saved.query.shape()[0]);
        let (memory, weight) = (self.memory(saved.gate.as_ref()), &self.weights.values_proj);
        Ok(expand_backward(&self.client, &saved.chosen, &memory, weight, saved.pooled.as_ref(), grad_output, strategy)?)
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
        let scored = Scored {
            query: &saved.query,
            query_norm: &weights.query_norm,
            norm: config.norm,
            eps: config.norm_eps,
            keys: &weights.keys,
            keys_norm: config.capabilities.normalises_keys.then_some(&weights.keys_norm),
            prepared: &self.keys,
            slots: &saved.chosen.slots,
        };
        Ok(score_backward(&self.client, &scored, grad_sides)?)
    }

    /// Stage 1, backwards: from the queries f32 `[tokens, query_heads · 2 · key_dim]`, and the gate's gradient where there is a gate, to the
    /// input and W_q, and W_g.
    ///
    /// # Errors
    /// An input or a gradient of another shape or type, or a gate's gradient that is missing or has no gate.
    pub fn query_backward(
        &self,
        input: &Tensor<R>,
        grad_query: &Tensor<R>,
        grad_gate: Option<&Tensor<R>>,
    ) -> Result<QueryGradients<R>> {
        self.check_input(input)?;
        if self.config.capabilities.gated != grad_gate.is_some() {
            let (what, value) =
                ("gradient of a gate", if grad_gate.is_some() { "given" } else { "missing" }.to_string());
            return Err(Error::Config { what, value, expected: "given for a layer with a gate, and for no other" });
        }
        let (weights, strategy) = (&self.weights, self.backward_product(input.shape()[0]));
        let gate = weights.gate_proj.as_ref().zip(grad_gate).map(|(weight, grad)| Map { weight, grad });
        let map = Map { weight: &weights.query_proj, grad: grad_query };
        Ok(query_backward(&self.client, input, &map, gate.as_ref(), strategy)?)
    }

    /// How the backward pass computes its products: as the forward pass, but an f16 gradient is not given to matrix units, which would
    /// round its small numbers to zero.
    pub(crate) fn backward_product(&self, tokens: usize) -> ProjectStrategy {
        match self.dtype() {
            ElementType::F16 => ProjectStrategy::Tile,
            _ => self.strategies(tokens).query,
        }
    }

    /// Downloads gradients: the oracle's form, in f32 numbers. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if the device failed in what was enqueued before.
    pub fn read_gradients(&self, gradients: &Gradients<R>) -> Result<reference::Gradients> {
        let numbers = |tensor: &Tensor<R>| -> Result<Vec<f64>> { Ok(widen(&self.read(tensor)?)) };
        let optional = |tensor: &Option<Tensor<R>>| tensor.as_ref().map_or(Ok(Vec::new()), numbers);
        let config = &self.config;
        let (key_dim, rank) = (config.key_dim, config.tucker_rank);
        let mut keys = vec![0.0; config.heads * 2 * config.side_keys * key_dim * rank];
        for (key, gradient) in self.read_rows(&gradients.keys)? {
            keys[key * key_dim * rank..][..key_dim * rank].copy_from_slice(&gradient);
        }
        Ok(reference::Gradients {
            input: numbers(&gradients.input)?,
            query_proj: numbers(&gradients.query_proj)?,
            query_norm: numbers(&gradients.query_norm)?,
            keys,
            keys_norm: match &gradients.keys_norm {
                Some(weight) => numbers(weight)?,
                None => vec![0.0; key_dim],
            },
            cores: optional(&gradients.cores)?,
            values: self.read_rows(&gradients.values)?,
            values_proj: numbers(&gradients.values_proj)?,
            gate_proj: optional(&gradients.gate_proj)?,
        })
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
