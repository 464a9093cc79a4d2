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

use ultramem_cpu::stages::query::MapGradients;
pub use ultramem_cpu::{Forward as CpuForward, Gradients as CpuGradients, Saved as CpuSaved};
use ultramem_cpu::{Layer, Linear, Numbers, RowGradients, Shape};

use crate::{ElementType, HostTensor, MemoryConfig, Result, Weight, Weights, reference};

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
        let layer = Layer::new(shape(&config), borrow(&config, weights))?;
        Ok(Self { config, layer })
    }

    /// The same for many calls: with transposed copies of its matrices, and its tables in large pages where the system has them. Takes some two seconds a
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
        let width = self.config.key_dim * self.config.tucker_rank;
        let mut keys = vec![0.0; self.config.heads * 2 * self.config.side_keys * width];
        for (row, gradient) in gradients.keys.iter() {
            keys[row as usize * width..][..width].copy_from_slice(gradient);
        }
        let mut found = reference::Gradients {
            input: reference::to_f64(&gradients.maps.input),
            values: rows(&gradients.values),
            pre_values: gradients.pre_values.as_ref().map_or_else(BTreeMap::new, rows),
            ..reference::Gradients::default()
        };
        for (map, bias, of_map) in maps(gradients) {
            found.tensors[map] = reference::to_f64(&of_map.weight);
            bias.into_iter().for_each(|bias| found.tensors[bias] = reference::to_f64(&of_map.bias));
        }
        for (weight, gradient) in [
            (Weight::QueryNorm, &gradients.query_norm),
            (Weight::Keys, &keys),
            (Weight::KeysNorm, &gradients.keys_norm),
            (Weight::Cores, &gradients.cores),
        ] {
            found.tensors[weight] = reference::to_f64(gradient);
        }
        found
    }
}

fn rows(gradients: &RowGradients) -> BTreeMap<usize, Vec<f64>> {
    gradients.iter().map(|(row, gradient)| (row as usize, reference::to_f64(gradient))).collect()
}

/// The maps' gradients, by weight and bias.
fn maps(gradients: &CpuGradients) -> [(Weight, Option<Weight>, &MapGradients); 5] {
    [
        (Weight::QueryProj, Some(Weight::QueryBias), &gradients.maps.query),
        (Weight::PreValuesProj, None, &gradients.maps.pre_projection),
        (Weight::GateProj, Some(Weight::GateBias), &gradients.maps.gate),
        (Weight::ValuesProj, Some(Weight::ValuesBias), &gradients.projection),
        (Weight::OutputGate, Some(Weight::OutputGateBias), &gradients.maps.output_gate),
    ]
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

/// The weights of a layer, borrowed; matrices and vectors that are not f32 are widened.
fn borrow<'a>(config: &MemoryConfig, weights: &'a Weights<'_>) -> ultramem_cpu::Weights<'a> {
    let own = |weight| weights.get(weight).filter(|_| Weight::learns(weight, config));
    let table = |weight| own(weight).map(|tensor| Numbers::of_bytes(tensor.dtype(), tensor.bytes()));
    let vector = |weight| own(weight).map(widened);
    let map = |weight, bias| own(weight).map(|tensor| Linear::new(widened(tensor), vector(bias)));
    let none = || Numbers::F32(Cow::Borrowed(&[]));
    ultramem_cpu::Weights {
        query: map(Weight::QueryProj, Weight::QueryBias).unwrap_or(Linear::new(Cow::Borrowed(&[]), None)),
        query_norm: vector(Weight::QueryNorm).unwrap_or_default(),
        keys: table(Weight::Keys).unwrap_or_else(none),
        keys_norm: vector(Weight::KeysNorm).unwrap_or_default(),
        cores: vector(Weight::Cores).unwrap_or_default(),
        core_u: Cow::Borrowed(&weights.core_u),
        core_v: Cow::Borrowed(&weights.core_v),
        shuffle: weights.shuffle_index.as_deref().map(Cow::Borrowed),
        values: table(Weight::Values).unwrap_or_else(none),
        pre_values: table(Weight::PreValues),
        pre_projection: own(Weight::PreValuesProj).map(|tensor| Linear::new(widened(tensor), None)),
        gate: map(Weight::GateProj, Weight::GateBias),
        projection: map(Weight::ValuesProj, Weight::ValuesBias),
        output_gate: map(Weight::OutputGate, Weight::OutputGateBias),
    }
}

fn widened<'a>(tensor: &'a HostTensor<'_>) -> Cow<'a, [f32]> {
    match (tensor.dtype(), Numbers::of_bytes(tensor.dtype(), tensor.bytes())) {
        (ElementType::F32, Numbers::F32(numbers)) => numbers,
        (_, numbers) => Cow::Owned(numbers.widened()),
    }
}
