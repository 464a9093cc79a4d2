//! A memory layer on a device: its weights made ready, and the corridor query → score → combine → expand.
//!
//! Every method enqueues and returns; nothing waits for the device but [`MemoryLayer::read`].

use cubecl::prelude::*;
use cubecl::server::ServerError;
pub use ultramem_kernels::combine::Chosen;
use ultramem_kernels::combine::{PairScore, combine};
use ultramem_kernels::expand::{ExpandStrategy, Memory, expand};
use ultramem_kernels::linear::ProjectStrategy;
use ultramem_kernels::query::query;
pub use ultramem_kernels::score::Kept;
use ultramem_kernels::score::{KeyFactors, PreparedKeys, ScoreStrategy, prepare_keys, score};
use ultramem_kernels::{ElementType, Tensor, check, retrieve, retrieves_at_once, supports, transpose};

use crate::table::{ValueTable, upload};
use crate::{Error, HostTensor, LayerWeights, MemoryConfig, Result, Weights};

/// A memory layer on the device behind a client. Weights and activations are stored in one element type, sums and scores in f32.
pub struct MemoryLayer<R: Runtime> {
    pub(crate) client: ComputeClient<R>,
    pub(crate) config: MemoryConfig,
    dtype: ElementType,
    pub(crate) weights: LayerWeights<R>,
    /// The weights as the forward pass reads them: keys normalised and projected, matrices with their outputs innermost.
    pub(crate) keys: PreparedKeys<R>,
    query_weight: Tensor<R>,
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
    /// Uploads `weights`, rounded to `dtype`, and prepares them.
    ///
    /// # Errors
    /// Weights that do not fit `config`, an element type that the device lacks, or a tensor other than the values, or a row of
    /// them, that is larger than one buffer binding of the device.
    pub fn new(
        client: &ComputeClient<R>,
        config: MemoryConfig,
        weights: &Weights<'_>,
        dtype: ElementType,
    ) -> Result<Self> {
        let weights = LayerWeights::upload(client, &config, weights, dtype)?;
        Self::from_device(client, config, weights)
    }

    /// A layer of weights that are on the device already, in the element type of its values. Prepares what the forward pass reads
    /// differently: once per change of the weights, and never the table.
    ///
    /// # Errors
    /// Shapes or types that do not fit `config`.
    pub fn from_device(client: &ComputeClient<R>, config: MemoryConfig, weights: LayerWeights<R>) -> Result<Self> {
        let dtype = weights.values.dtype();
        supports(client, dtype)?;
        weights.check(client, &config)?;
        let factors = KeyFactors {
            norm: config.capabilities.normalises_keys.then_some((config.norm, config.norm_eps, &weights.keys_norm)),
            vectors: weights.core.as_ref().map(|core| (&core.u, &core.v)),
        };
        Ok(Self {
            keys: prepare_keys(client, &weights.keys, &factors)?,
            query_weight: transpose(client, &weights.query_proj)?,
            output_weight: transpose(client, &weights.values_proj)?,
            gate_weight: weights.gate_proj.as_ref().map(|gate| transpose(client, gate)).transpose()?,
            client: client.clone(),
            config,
            dtype,
            weights,
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
        &self.weights.values
    }

    /// The strategies that [`forward`](Self::forward) picks for this device and number of tokens.
    pub fn strategies(&self, tokens: usize) -> Strategies {
        let config = &self.config;
        let (side_keys, key_dim, top_m) = (config.side_keys, config.key_dim, config.top_m);
        Strategies {
            query: ProjectStrategy::choose(&self.client, tokens, self.dtype.storage()),
            score: ScoreStrategy::choose(&self.client, tokens, config.heads, side_keys, key_dim, top_m),
            expand: ExpandStrategy::choose(&self.client, tokens, config.heads * top_m, &self.memory(None)),
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
        let (_, chosen) = self.retrieve(&query, strategies.score)?;
        let output = self.expand(input, &chosen, strategies)?;
        Ok(Forward { output, chosen })
    }

    /// Stage 1: queries before their norm, f32 `[tokens, query_heads · 2 · key_dim]`.
    ///
    /// # Errors
    /// An input of another shape or type.
    pub fn query(&self, input: &Tensor<R>, strategy: ProjectStrategy) -> Result<Tensor<R>> {
        self.check_input(input)?;
        Ok(query(&self.client, input, &self.query_weight, strategy)?)
    }

    pub(crate) fn check_input(&self, input: &Tensor<R>) -> Result<()> {
        let tokens = input.shape().first().copied().unwrap_or(0);
        Ok(check(&self.client, input, "input", &[tokens, self.config.hidden_size], self.dtype.storage())?)
    }

    /// Stage 2: the keys that each token keeps, and their scores.
    ///
    /// # Errors
    /// A query of another shape.
    pub fn score(&self, query: &Tensor<R>, strategy: ScoreStrategy) -> Result<Kept<R>> {
        let (norm, eps) = (self.config.norm, self.config.norm_eps);
        Ok(score(&self.client, query, &self.weights.query_norm, norm, eps, &self.keys, self.config.top_m, strategy)?)
    }

    /// Stage 3: the slots that each token reads, and their scores.
    ///
    /// # Errors
    /// Kept keys of another shape.
    pub fn combine(&self, kept: &Kept<R>) -> Result<Chosen<R>> {
        Ok(combine(&self.client, kept, self.config.side_keys, &self.pair_score())?)
    }

    /// Stages 2 and 3 together, in fewer launches where the keys are split over cubes: the same numbers.
    ///
    /// # Errors
    /// A query of another shape.
    pub fn retrieve(&self, query: &Tensor<R>, strategy: ScoreStrategy) -> Result<(Kept<R>, Chosen<R>)> {
        let (norm, eps, top_m) = (self.config.norm, self.config.norm_eps, self.config.top_m);
        let query_norm = &self.weights.query_norm;
        let pair_score = self.pair_score();
        Ok(retrieve(&self.client, query, query_norm, norm, eps, &self.keys, top_m, strategy, &pair_score)?)
    }

    /// Whether [`retrieve`](Self::retrieve) is one kernel after the split keys are scored, in place of the two stages' own.
    ///
    /// # Errors
    /// As [`retrieve`](Self::retrieve).
    pub fn retrieves_at_once(&self, query: &Tensor<R>, strategy: ScoreStrategy) -> Result<bool> {
        let (norm, eps, top_m) = (self.config.norm, self.config.norm_eps, self.config.top_m);
        let query_norm = &self.weights.query_norm;
        let pair_score = self.pair_score();
        Ok(retrieves_at_once(&self.client, query, query_norm, norm, eps, &self.keys, top_m, strategy, &pair_score)?)
    }

    pub(crate) fn pair_score(&self) -> PairScore<'_, R> {
        self.weights.core.as_ref().map_or(PairScore::Additive, |core| PairScore::Tucker(&core.cores))
    }

    /// Stage 4: the chosen values, pooled and projected; `input` is read where the layer has a gate.
    ///
    /// # Errors
    /// Slots or an input of another shape.
    pub fn expand(&self, input: &Tensor<R>, chosen: &Chosen<R>, strategies: Strategies) -> Result<Tensor<R>> {
        let gate = self.gate(input, strategies.query)?;
        self.expand_gated(chosen, gate.as_ref(), strategies.expand)
    }

    pub(crate) fn expand_gated(
        &self,
        chosen: &Chosen<R>,
        gate: Option<&Tensor<R>>,
        strategy: ExpandStrategy,
    ) -> Result<Tensor<R>> {
        Ok(expand(&self.client, chosen, &self.memory(gate), strategy)?)
    }

    /// `W_g x` f32 `[tokens, value_dim]`, where the layer has a gate.
    pub(crate) fn gate(&self, input: &Tensor<R>, strategy: ProjectStrategy) -> Result<Option<Tensor<R>>> {
        let product = |weight| query(&self.client, input, weight, strategy);
        Ok(self.gate_weight.as_ref().map(product).transpose()?)
    }

    pub(crate) fn memory<'a>(&'a self, gate: Option<&'a Tensor<R>>) -> Memory<'a, R> {
        let values = self.weights.values.pages();
        Memory { values, weight: &self.output_weight, shuffle: self.weights.shuffle.as_ref(), gate }
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
        Ok(self.read_tensor(tensor)?.to_f32())
    }

    /// Downloads a tensor in its own type.
    pub(crate) fn read_tensor(&self, tensor: &Tensor<R>) -> Result<HostTensor<'static>> {
        let dtype = ElementType::from_storage(tensor.dtype)
            .ok_or_else(|| Error::Device(format!("can't read a tensor of {}", tensor.dtype)))?;
        HostTensor::new(tensor.shape().to_vec(), dtype, self.bytes(tensor)?)
    }

    /// Downloads slots. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Device`] if the device failed in what was enqueued before.
    pub fn read_slots(&self, chosen: &Chosen<R>) -> Result<Vec<u32>> {
        self.read_integers(&chosen.slots)
    }

    pub(crate) fn read_integers(&self, tensor: &Tensor<R>) -> Result<Vec<u32>> {
        Ok(bytemuck::pod_collect_to_vec(&self.bytes(tensor)?))
    }

    /// The bytes of a tensor, whose buffer may be larger: CUDA's allocator pads the end of what Burn makes. A read alone gives the buffer of a
    /// failed launch as it is; the flush tells.
    fn bytes(&self, tensor: &Tensor<R>) -> Result<Vec<u8>> {
        if tensor.shape().contains(&0) {
            return Ok(Vec::new());
        }
        tensor.check_client("tensor", &self.client)?;
        let bytes = self.client.read_one(tensor.handle.clone()).map_err(device_error)?;
        self.client.flush().map_err(device_error)?;
        let used = tensor.shape().iter().product::<usize>() * tensor.dtype.size();
        Ok(bytes[..used.min(bytes.len())].to_vec())
    }
}

/// What a device says, in one line and without its backtrace.
fn device_error(error: ServerError) -> Error {
    let text = format!("{error:?}");
    let message = text.split("Backtrace").next().unwrap_or(&text);
    Error::Device(message.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(300).collect())
}
