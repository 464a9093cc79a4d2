//! A memory layer on a device: its weights made ready, and the corridor query → score → combine → expand.
//!
//! Every method enqueues and returns; nothing waits for the device but [`MemoryLayer::read`].

use cubecl::prelude::*;
use cubecl::server::ServerError;
pub use ultramem_kernels::combine::Chosen;
use ultramem_kernels::combine::{PairScore, combine};
use ultramem_kernels::expand::{ExpandStrategy, Memory, expand};
use ultramem_kernels::query::{ProjectStrategy, query};
pub use ultramem_kernels::score::Kept;
use ultramem_kernels::score::{KeyFactors, PreparedKeys, ScoreStrategy, prepare_keys, score};
use ultramem_kernels::{ElementType, Tensor, from_f32, from_u32, supports};

use crate::table::{ValueTable, upload, upload_transposed};
use crate::{Error, HostTensor, Kind, MemoryConfig, Result, Weights};

/// A memory layer on the device behind a client. Weights and activations are stored in one element type, sums and scores in f32.
pub struct MemoryLayer<R: Runtime> {
    client: ComputeClient<R>,
    config: MemoryConfig,
    dtype: ElementType,
    query_weight: Tensor<R>,
    query_norm: Tensor<R>,
    keys: PreparedKeys<R>,
    core: Option<Tensor<R>>,
    shuffle: Option<Tensor<R>>,
    table: ValueTable<R>,
    output_weight: Tensor<R>,
    gate_weight: Option<Tensor<R>>,
}

/// What a forward pass gives.
pub struct Forward<R: Runtime> {
    /// `[tokens, hidden_size]`, in the layer's element type.
    pub output: Tensor<R>,
    /// The slots that were read and their scores.
    pub chosen: Chosen<R>,
}

/// How each stage is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Strategies {
    /// The query projection, and the gate's.
    pub query: ProjectStrategy,
    /// Scoring the keys.
    pub score: ScoreStrategy,
    /// Reading and projecting the values.
    pub expand: ExpandStrategy,
}

impl<R: Runtime> MemoryLayer<R> {
    /// Uploads `weights`, rounded to `dtype`, and prepares the keys.
    ///
    /// # Errors
    /// Weights that do not fit `config`, an element type that the device lacks, or a tensor that is larger than one buffer
    /// binding of the device.
    pub fn new(
        client: &ComputeClient<R>,
        config: MemoryConfig,
        weights: &Weights<'_>,
        dtype: ElementType,
    ) -> Result<Self> {
        supports(client, dtype)?;
        weights.check(&config)?;
        let table = ValueTable::upload(client, &weights.values, dtype)?;
        let full = |name, tensor: &HostTensor<'_>| upload(client, name, tensor, ElementType::F32);
        let matrix = |name, tensor: &HostTensor<'_>| upload_transposed(client, name, tensor, dtype);
        let (heads, rank) = (config.heads, config.tucker_rank);
        let product_keys = config.kind != Kind::UltraMem;
        let vectors = match product_keys {
            true => None,
            false => Some((
                from_f32(client, &[heads, rank], &weights.core_u)?,
                from_f32(client, &[heads, rank], &weights.core_v)?,
            )),
        };
        let keys_norm = full("keys_norm", &weights.keys_norm)?;
        let factors = KeyFactors {
            norm: config.normalises_keys().then_some((config.norm, config.norm_eps, &keys_norm)),
            vectors: vectors.as_ref().map(|(u, v)| (u, v)),
        };
        let key_shape = vec![heads, 2, config.side_keys, config.key_dim, rank];
        let keys = upload(client, "keys", &weights.keys, dtype)?;
        let keys = Tensor::new_contiguous(key_shape, keys.handle, keys.dtype);
        Ok(Self {
            query_weight: matrix("query_proj", &weights.query_proj)?,
            query_norm: full("query_norm", &weights.query_norm)?,
            keys: prepare_keys(client, &keys, &factors)?,
            core: match product_keys {
                true => None,
                false => Some(from_f32(client, &[config.cores, heads, rank, rank], &weights.cores)?),
            },
            shuffle: match &weights.shuffle_index {
                Some(index) => Some(from_u32(client, &[config.slots()], index)?),
                None => None,
            },
            table,
            output_weight: matrix("values_proj", &weights.values_proj)?,
            gate_weight: match &weights.gate_proj {
                Some(gate) => Some(matrix("gate_proj", gate)?),
                None => None,
            },
            client: client.clone(),
            config,
            dtype,
        })
    }

    /// The checked dimensions.
    pub fn config(&self) -> &MemoryConfig {
        &self.config
    }

    /// Element type of weights and activations.
    pub fn dtype(&self) -> ElementType {
        self.dtype
    }

    /// The client whose device holds the layer.
    pub fn client(&self) -> &ComputeClient<R> {
        &self.client
    }

    /// The value table.
    pub fn table(&self) -> &ValueTable<R> {
        &self.table
    }

    /// The strategies that [`forward`](Self::forward) picks for this device and number of tokens.
    pub fn strategies(&self, tokens: usize) -> Strategies {
        let config = &self.config;
        let (side_keys, key_dim, top_m) = (config.side_keys, config.key_dim, config.top_m);
        Strategies {
            query: ProjectStrategy::choose(&self.client, tokens, self.dtype.storage()),
            score: ScoreStrategy::choose(&self.client, tokens, config.heads, side_keys, key_dim, top_m),
            expand: ExpandStrategy::choose(&self.client, tokens, &self.memory(None)),
        }
    }

    /// The layer's output for `input` `[tokens, hidden_size]`, in the layer's element type.
    ///
    /// # Errors
    /// An input of another shape or type.
    pub fn forward(&self, input: &Tensor<R>) -> Result<Forward<R>> {
        self.forward_with(input, self.strategies(input.shape().first().copied().unwrap_or(0)))
    }

    /// [`forward`](Self::forward) by given strategies.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and strategies that the device can't run.
    pub fn forward_with(&self, input: &Tensor<R>, strategies: Strategies) -> Result<Forward<R>> {
        let query = self.query(input, strategies.query)?;
        let kept = self.score(&query, strategies.score)?;
        let chosen = self.combine(&kept)?;
        let output = self.expand(input, &chosen, strategies)?;
        Ok(Forward { output, chosen })
    }

    /// Stage 1: queries before their norm, f32 `[tokens, query_heads · 2 · key_dim]`.
    ///
    /// # Errors
    /// An input of another shape or type.
    pub fn query(&self, input: &Tensor<R>, strategy: ProjectStrategy) -> Result<Tensor<R>> {
        let found = input.dtype;
        if found != self.dtype.storage() {
            let (found, expected) = (found.to_string(), self.dtype.to_string());
            return Err(ultramem_kernels::Error::Type { tensor: "input", found, expected }.into());
        }
        Ok(query(&self.client, input, &self.query_weight, strategy)?)
    }

    /// Stage 2: the keys that each token keeps, and their scores.
    ///
    /// # Errors
    /// A query of another shape.
    pub fn score(&self, query: &Tensor<R>, strategy: ScoreStrategy) -> Result<Kept<R>> {
        let (norm, eps) = (self.config.norm, self.config.norm_eps);
        Ok(score(&self.client, query, &self.query_norm, norm, eps, &self.keys, self.config.top_m, strategy)?)
    }

    /// Stage 3: the slots that each token reads, and their scores.
    ///
    /// # Errors
    /// Kept keys of another shape.
    pub fn combine(&self, kept: &Kept<R>) -> Result<Chosen<R>> {
        let pair_score = self.core.as_ref().map_or(PairScore::Additive, PairScore::Tucker);
        Ok(combine(&self.client, kept, self.config.side_keys, &pair_score)?)
    }

    /// Stage 4: the chosen values, pooled and projected; `input` is read where the layer has a gate.
    ///
    /// # Errors
    /// Slots or an input of another shape.
    pub fn expand(&self, input: &Tensor<R>, chosen: &Chosen<R>, strategies: Strategies) -> Result<Tensor<R>> {
        let gate = match &self.gate_weight {
            Some(weight) => Some(query(&self.client, input, weight, strategies.query)?),
            None => None,
        };
        Ok(expand(&self.client, chosen, &self.memory(gate.as_ref()), strategies.expand)?)
    }

    fn memory<'a>(&'a self, gate: Option<&'a Tensor<R>>) -> Memory<'a, R> {
        Memory { values: &self.table.pages()[0], weight: &self.output_weight, shuffle: self.shuffle.as_ref(), gate }
    }

    /// Uploads hidden states `[tokens, hidden_size]`, rounded to the layer's element type.
    ///
    /// # Errors
    /// A length that is no multiple of `hidden_size`, or more numbers than one binding holds.
    pub fn upload(&self, input: &[f32]) -> Result<Tensor<R>> {
        let hidden_size = self.config.hidden_size;
        let input = HostTensor::from_f32([input.len() / hidden_size, hidden_size], input)?;
        upload(&self.client, "input", &input, self.dtype)
    }

    /// Downloads a tensor of any of our element types. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Device`] if the device failed in what was enqueued before.
    pub fn read(&self, tensor: &Tensor<R>) -> Result<Vec<f32>> {
        let dtype = ElementType::from_storage(tensor.dtype)
            .ok_or_else(|| Error::Device(format!("can't read a tensor of {}", tensor.dtype)))?;
        Ok(HostTensor::new(tensor.shape().to_vec(), dtype, self.bytes(tensor)?)?.to_f32())
    }

    /// Downloads slots. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Device`] if the device failed in what was enqueued before.
    pub fn read_slots(&self, chosen: &Chosen<R>) -> Result<Vec<u32>> {
        Ok(bytemuck::pod_collect_to_vec(&self.bytes(&chosen.slots)?))
    }

    /// The bytes of a tensor. A read alone gives the buffer of a failed launch as it is; the flush tells.
    fn bytes(&self, tensor: &Tensor<R>) -> Result<Vec<u8>> {
        let bytes = self.client.read_one(tensor.handle.clone()).map_err(device_error)?;
        self.client.flush().map_err(device_error)?;
        Ok(bytes.to_vec())
    }
}

/// What a device says, in one line and without its backtrace.
fn device_error(error: ServerError) -> Error {
    let text = format!("{error:?}");
    let message = text.split("Backtrace").next().unwrap_or(&text);
    Error::Device(message.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(300).collect())
}
