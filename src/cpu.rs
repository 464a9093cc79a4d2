//! A layer on the processor: f32 arithmetic on all cores, weights read where they lie. The stages are on the page of [`ultramem_cpu`].
//!
//! ```
//! use ultramem::{CpuLayer, Dimensions, MemoryConfig, Weights};
//!
//! # fn main() -> ultramem::Result<()> {
//! let config = MemoryConfig::new(Dimensions { side_keys: 32, top_m: 8, ..Dimensions::default() })?;
//! let weights = Weights::random(&config, 42);
//! let layer = CpuLayer::new(config.clone(), &weights)?;
//! let input = vec![0.5; 3 * config.hidden_size];
//! assert_eq!(layer.forward(&input)?.output.len(), input.len());
//! # Ok(())
//! # }
//! ```

use std::borrow::Cow;
use std::collections::BTreeMap;

pub use ultramem_cpu::{Forward as CpuForward, Gradients as CpuGradients, Saved as CpuSaved};
use ultramem_cpu::{Layer, Linear, Numbers, RowGradients, Shape};

use crate::{HostTensor, MemoryConfig, PerWeight, Result, Weight, Weights, reference};

/// A layer on the processor, its weights borrowed: tables are read in place, in whatever element type they have, mapped files among them. Queries
/// and keys are rounded to the keys' type (DESIGN §2, half precision); inputs and outputs are f32.
#[derive(Debug, Clone)]
pub struct CpuLayer<'a> {
    config: MemoryConfig,
    layer: Layer<'a>,
}

impl<'a> CpuLayer<'a> {
    /// Checks the weights, and prepares what is read otherwise than they have it: keys, and matrices that are not f32.
    ///
    /// # Errors
    /// Weights that do not fit `config`.
    pub fn new(config: MemoryConfig, weights: &'a Weights<'_>) -> Result<Self> {
        weights.check(&config)?;
        let layer = Borrowed::of(weights).layer(&config)?;
        Ok(Self { config, layer })
    }

    /// The same for many calls: with copies of its matrices in the order in which they are multiplied, and its tables in large pages where the system has them. Takes some two seconds a
    /// gigabyte.
    pub fn prepared(self) -> Self {
        Self { layer: self.layer.prepared(), ..self }
    }

    /// The same, giving a token the same bits in a forward pass of any number of tokens.
    pub fn with_invariance(self, invariant: bool) -> Self {
        Self { layer: self.layer.with_invariance(invariant), ..self }
    }

    /// Its configuration.
    pub fn config(&self) -> &MemoryConfig {
        &self.config
    }

    /// The layer as its stages take it.
    pub fn layer(&self) -> &Layer<'a> {
        &self.layer
    }

    /// The output for `input` `[tokens, hidden_size]`.
    ///
    /// # Errors
    /// An input that is not whole rows.
    pub fn forward(&self, input: &[f32]) -> Result<CpuForward> {
        Ok(self.layer.forward(input)?)
    }

    /// [`forward`](Self::forward), and what [`backward`](Self::backward) needs of it.
    ///
    /// # Errors
    /// An input that is not whole rows.
    pub fn forward_saving(&self, input: &[f32]) -> Result<(CpuForward, CpuSaved)> {
        Ok(self.layer.forward_saving(input)?)
    }

    /// The gradients of `Σ output · grad_output`, for the `input` that `saved` came of. Selections, `u` and `v` are constants.
    ///
    /// # Errors
    /// An input or a gradient of another length.
    pub fn backward(&self, input: &[f32], saved: &CpuSaved, grad_output: &[f32]) -> Result<CpuGradients> {
        Ok(self.layer.backward(input, saved, grad_output)?)
    }

    /// Gradients in the oracle's form: by weight, in f64.
    pub fn named(&self, gradients: &CpuGradients) -> reference::Gradients {
        let keys = dense(&gradients.keys, self.config.heads * 2 * self.config.side_keys);
        let mut found = reference::Gradients {
            input: reference::to_f64(&gradients.maps.input),
            values: rows(&gradients.values),
            pre_values: gradients.pre_values.as_ref().map_or_else(BTreeMap::new, rows),
            ..reference::Gradients::default()
        };
        found.tensors = by_weight(gradients).map(reference::to_f64);
        found.tensors[Weight::Keys] = reference::to_f64(&keys);
        found
    }
}

fn rows(gradients: &RowGradients) -> BTreeMap<usize, Vec<f64>> {
    gradients.iter().map(|(row, gradient)| (row as usize, reference::to_f64(gradient))).collect()
}

/// The gradient of a table of so many rows.
pub(crate) fn dense(gradients: &RowGradients, rows: usize) -> Vec<f32> {
    let mut all = vec![0.0; rows * gradients.width];
    for (row, gradient) in gradients.iter() {
        all[row as usize * gradients.width..][..gradients.width].copy_from_slice(gradient);
    }
    all
}

/// The gradients of all weights but keys and tables; empty where the layer has no such weight.
pub(crate) fn by_weight(gradients: &CpuGradients) -> PerWeight<&[f32]> {
    let maps = &gradients.maps;
    PerWeight::from_fn(|weight| {
        let numbers = match weight {
            Weight::QueryProj => &maps.query.weight,
            Weight::QueryBias => &maps.query.bias,
            Weight::QueryNorm => &gradients.query_norm,
            Weight::KeysNorm => &gradients.keys_norm,
            Weight::Cores => &gradients.cores,
            Weight::PreValuesProj => &maps.pre_projection.weight,
            Weight::ValuesProj => &gradients.projection.weight,
            Weight::ValuesBias => &gradients.projection.bias,
            Weight::GateProj => &maps.gate.weight,
            Weight::GateBias => &maps.gate.bias,
            Weight::OutputGate => &maps.output_gate.weight,
            Weight::OutputGateBias => &maps.output_gate.bias,
            Weight::Keys | Weight::Values | Weight::PreValues => return &[][..],
        };
        numbers.as_slice()
    })
}

/// The sizes of a layer of `config`, and what its stages do.
fn shape(config: &MemoryConfig) -> Shape {
    let norm = |there: bool| there.then_some((config.norm, config.norm_eps));
    Shape {
        hidden_size: config.hidden_size,
        heads: config.heads,
        query_pairs: config.query_pairs(),
        heads_per_pair: config.heads_per_pair(),
        side_keys: config.side_keys,
        key_dim: config.key_dim,
        tucker_rank: config.tucker_rank,
        top_m: config.top_m,
        cores: config.cores,
        tucker: config.tucker(),
        query_norm: norm(config.capabilities.normalises_queries),
        keys_norm: norm(config.capabilities.normalises_keys),
        value_dim: config.value_dim,
        pre_dim: config.pre_dim,
        activation: config.capabilities.weigh.map(|weigh| weigh.activation),
        rows: config.rows(),
        table_rows: config.table_rows(),
        offset: config.offset(),
        pooled_blocks: config.pooled_blocks(),
    }
}

/// The weights of a layer, borrowed from whoever holds them.
pub(crate) struct Borrowed<'a> {
    pub(crate) tensors: PerWeight<Option<Numbers<'a>>>,
    /// `u` and `v`; empty for additive scores.
    pub(crate) vectors: [Cow<'a, [f32]>; 2],
    pub(crate) shuffle: Option<Cow<'a, [u32]>>,
}

impl<'a> Borrowed<'a> {
    fn of(weights: &'a Weights<'_>) -> Self {
        let numbers = |tensor: &'a HostTensor<'_>| Numbers::of_bytes(tensor.dtype(), tensor.bytes());
        Self {
            tensors: PerWeight::from_fn(|weight| weights.get(weight).map(numbers)),
            vectors: [Cow::Borrowed(&weights.core_u), Cow::Borrowed(&weights.core_v)],
            shuffle: weights.shuffle_index.as_deref().map(Cow::Borrowed),
        }
    }

    /// The layer of `config`; matrices and vectors that are not f32 are widened.
    ///
    /// # Errors
    /// Weights that do not fit `config`.
    pub(crate) fn layer(mut self, config: &MemoryConfig) -> Result<Layer<'a>> {
        let [core_u, core_v] = std::mem::take(&mut self.vectors);
        let shuffle = self.shuffle.take();
        let mut own = |weight: Weight| self.tensors[weight].take().filter(|_| weight.learns(config));
        let none = || Numbers::F32(Cow::Borrowed(&[]));
        let (keys, values) = (own(Weight::Keys).unwrap_or_else(none), own(Weight::Values).unwrap_or_else(none));
        let pre_values = own(Weight::PreValues);
        let mut vector = |weight| own(weight).map(widened);
        let (query_norm, keys_norm) = (vector(Weight::QueryNorm), vector(Weight::KeysNorm));
        let cores = vector(Weight::Cores);
        let pre_projection = vector(Weight::PreValuesProj).map(|weight| Linear::new(weight, None));
        let mut map = |weight, bias| vector(weight).map(|weight| Linear::new(weight, vector(bias)));
        let query = map(Weight::QueryProj, Weight::QueryBias);
        let weights = ultramem_cpu::Weights {
            query: query.unwrap_or(Linear::new(Cow::Borrowed(&[]), None)),
            query_norm: query_norm.unwrap_or_default(),
            keys,
            keys_norm: keys_norm.unwrap_or_default(),
            cores: cores.unwrap_or_default(),
            core_u,
            core_v,
            shuffle,
            values,
            pre_values,
            pre_projection,
            gate: map(Weight::GateProj, Weight::GateBias),
            projection: map(Weight::ValuesProj, Weight::ValuesBias),
            output_gate: map(Weight::OutputGate, Weight::OutputGateBias),
        };
        Ok(Layer::new(shape(config), weights)?)
    }
}

/// Borrowed where they are f32.
pub(crate) fn widened(numbers: Numbers<'_>) -> Cow<'_, [f32]> {
    match numbers {
        Numbers::F32(numbers) => numbers,
        numbers => Cow::Owned(numbers.widened()),
    }
}
