//! A memory layer on a device: its weights made ready, and the corridor query → score → combine → weigh → expand.
//!
//! Every method enqueues and returns; nothing waits for the device but [`MemoryLayer::read`].

use cubecl::prelude::*;
use cubecl::server::ServerError;
pub use ultramem_kernels::combine::Chosen;
use ultramem_kernels::combine::{PairScore, combine};
use ultramem_kernels::expand::{Memory, expand};
use ultramem_kernels::linear::ProjectStrategy;
use ultramem_kernels::query::query;
pub use ultramem_kernels::score::Kept;
use ultramem_kernels::score::{KeyFactors, PreparedKeys, Queries, ScoreStrategy, prepare_keys, score};
pub use ultramem_kernels::weigh::Weighed;
use ultramem_kernels::weigh::{PreValues, weigh};
use ultramem_kernels::{ElementType, RowSource, Tensor, check, retrieve, supports, transpose};

use crate::table::{ValueTable, upload};
use crate::{Blocks, Error, HostTensor, LayerWeights, MemoryConfig, PerWeight, Result, Strategies, Weight, Weights};

/// A memory layer on the device behind a client. Weights and activations are stored in one element type, sums and scores in f32.
pub struct MemoryLayer<R: Runtime> {
    pub(crate) client: ComputeClient<R>,
    pub(crate) config: MemoryConfig,
    dtype: ElementType,
    /// Whether a token's output has the same bits however many tokens there are.
    pub(super) invariant: bool,
    pub(crate) weights: LayerWeights<R>,
    /// The weights as the forward pass reads them: keys normalised and projected, matrices with their outputs innermost.
    pub(crate) keys: PreparedKeys<R>,
    transposed: PerWeight<Option<Tensor<R>>>,
}

/// What a layer makes of its input besides the queries.
pub(crate) struct Maps<R: Runtime> {
    /// `W_g x + b_g`, f32 `[tokens, value_dim]`.
    pub gate: Option<Tensor<R>>,
    /// `w · x + b`, f32 `[tokens]`.
    pub output_gate: Option<Tensor<R>>,
}

/// What a forward pass gives.
pub struct Forward<R: Runtime> {
    /// `[tokens, hidden_size]`, in the layer's element type.
    pub output: Tensor<R>,
    /// The slots that were read and their scores, before they are weighed.
    pub chosen: Chosen<R>,
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
        let keys_norm = weights.get(Weight::KeysNorm).filter(|_| config.capabilities.normalises_keys);
        let factors = KeyFactors {
            norm: keys_norm.map(|weight| (config.norm, config.norm_eps, weight)),
            vectors: weights.vectors.as_ref().map(|(u, v)| (u, v)),
        };
        let keys = weights.get(Weight::Keys).ok_or_else(|| missing(Weight::Keys))?;
        let mut transposed = PerWeight::default();
        for weight in MAPS {
            transposed[weight] = weights.get(weight).map(|map| transpose(client, map)).transpose()?;
        }
        let keys = prepare_keys(client, keys, &factors)?;
        Ok(Self { client: client.clone(), config, dtype, invariant: false, keys, transposed, weights })
    }

    /// The same layer, which gives a token the same bits in a call of any number of tokens if `invariant` ([`Strategies::invariant`]).
    #[must_use]
    pub fn with_invariance(self, invariant: bool) -> Self {
        Self { invariant, ..self }
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

    /// The pre-value table, where the layer weighs.
    pub fn pre_table(&self) -> Option<&ValueTable<R>> {
        self.weights.pre_values.as_ref()
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
        let (chosen, weighed) = self.in_workspace(input, strategies, || {
            let query = self.query(input, strategies.query)?;
            let (_, chosen) = self.retrieve(&query, strategies.score)?;
            let weighed = self.weigh(input, &chosen, strategies.query)?;
            Ok::<_, Error>((chosen, weighed.map(|(_, weighed)| weighed)))
        })?;
        let output = self.expand(input, weighed.as_ref().map_or(&chosen, |weighed| &weighed.chosen), strategies)?;
        Ok(Forward { output, chosen })
    }

    /// Stage 1: queries before their norm, f32 `[tokens, query_pairs · 2 · key_dim]`.
    ///
    /// # Errors
    /// An input of another shape or type.
    pub fn query(&self, input: &Tensor<R>, strategy: ProjectStrategy) -> Result<Tensor<R>> {
        self.check_input(input)?;
        self.map(input, Weight::QueryProj, Weight::QueryBias, strategy)?.ok_or_else(|| missing(Weight::QueryProj))
    }

    /// A linear map of the input, f32 `[tokens, width]`, if the layer has it.
    fn map(
        &self,
        input: &Tensor<R>,
        weight: Weight,
        bias: Weight,
        strategy: ProjectStrategy,
    ) -> Result<Option<Tensor<R>>> {
        let bias = self.weights.get(bias);
        let map = |weight| query(&self.client, input, weight, bias, strategy);
        Ok(self.transposed[weight].as_ref().map(map).transpose()?)
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
        Ok(score(&self.client, &self.queries(query), &self.keys, self.config.top_m, strategy)?)
    }

    /// Queries as scoring takes them.
    pub(crate) fn queries<'a>(&'a self, numbers: &'a Tensor<R>) -> Queries<'a, R> {
        let (norm, eps) = (self.config.norm, self.config.norm_eps);
        let norm = self.weights.get(Weight::QueryNorm).map(|weight| (norm, eps, weight));
        Queries { numbers, norm, heads_per_pair: self.config.heads_per_pair() }
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
        let (queries, top_m) = (self.queries(query), self.config.top_m);
        Ok(retrieve(&self.client, &queries, &self.keys, top_m, strategy, &self.pair_score())?)
    }

    pub(crate) fn pair_score(&self) -> PairScore<'_, R> {
        self.weights.get(Weight::Cores).map_or(PairScore::Additive, PairScore::Tucker)
    }

    /// Stage 4: what the pre-values make of the input's scores, and `z` `[tokens, pre_dim]`; None where the layer does not weigh.
    ///
    /// # Errors
    /// Slots or an input of another shape.
    pub fn weigh(
        &self,
        input: &Tensor<R>,
        chosen: &Chosen<R>,
        strategy: ProjectStrategy,
    ) -> Result<Option<(Tensor<R>, Weighed<R>)>> {
        let Some(pre_values) = self.pre_values() else { return Ok(None) };
        self.check_input(input)?;
        let z = match &self.transposed[Weight::PreValuesProj] {
            Some(weight) => query(&self.client, input, weight, None, strategy)?,
            None => input.clone(),
        };
        let weighed = weigh(&self.client, chosen, &z, &pre_values)?;
        Ok(Some((z, weighed)))
    }

    /// The pre-values as weighing takes them, if the layer weighs.
    pub(crate) fn pre_values(&self) -> Option<PreValues<'_, R>> {
        let (table, weigh) = self.weights.pre_values.as_ref().zip(self.config.capabilities.weigh)?;
        Some(PreValues { values: table.pages(), rows: self.rows(), activation: weigh.activation })
    }

    /// Stage 5: the chosen values, pooled and projected; `input` is read where the layer has gates, and scores are weighed ones where it weighs.
    ///
    /// # Errors
    /// Slots or an input of another shape.
    pub fn expand(&self, input: &Tensor<R>, chosen: &Chosen<R>, strategies: Strategies) -> Result<Tensor<R>> {
        let maps = self.maps(input, strategies.query)?;
        Ok(expand(&self.client, chosen, &self.memory(&maps), strategies.expand)?)
    }

    /// What the gates are made of, where the layer has them.
    pub(crate) fn maps(&self, input: &Tensor<R>, strategy: ProjectStrategy) -> Result<Maps<R>> {
        let gate = self.map(input, Weight::GateProj, Weight::GateBias, strategy)?;
        let output_gate = self.map(input, Weight::OutputGate, Weight::OutputGateBias, strategy)?;
        let flat = |gate: Tensor<R>| gate.reshaped(vec![gate.shape()[0]]);
        Ok(Maps { gate, output_gate: output_gate.map(flat) })
    }

    pub(crate) fn memory<'a>(&'a self, maps: &'a Maps<R>) -> Memory<'a, R> {
        Memory {
            values: self.weights.values.pages(),
            rows: self.rows(),
            weight: self.transposed[Weight::ValuesProj].as_ref(),
            bias: self.weights.get(Weight::ValuesBias),
            gate: maps.gate.as_ref(),
            output_gate: maps.output_gate.as_ref(),
        }
    }

    /// Where the layer's slots find their rows.
    pub(crate) fn rows(&self) -> RowSource<'_, R> {
        RowSource {
            shuffle: &self.weights.shuffle,
            blocks: self.config.expansion,
            rows: self.config.rows(),
            table_rows: self.config.table_rows(),
            offset: self.config.offset(),
            summed: self.config.capabilities.blocks == Blocks::Summed,
        }
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

    /// Submits what this thread has enqueued if another thread made a table. That thread may update its table in place once nobody else holds it,
    /// and CubeCL does not put this after launches of ours that are only enqueued.
    #[cfg(feature = "burn")]
    pub(crate) fn submit_reads_of_others(&self, output: &Tensor<R>) -> Result<()> {
        let tables = std::iter::once(&self.weights.values).chain(&self.weights.pre_values);
        if tables.flat_map(ValueTable::pages).any(|page| page.handle.stream != output.handle.stream) {
            self.client.flush().map_err(device_error)?;
        }
        Ok(())
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

/// The weights that the forward pass reads transposed.
const MAPS: [Weight; 5] =
    [Weight::QueryProj, Weight::PreValuesProj, Weight::ValuesProj, Weight::GateProj, Weight::OutputGate];

impl<R: Runtime> Clone for Maps<R> {
    fn clone(&self) -> Self {
        Self { gate: self.gate.clone(), output_gate: self.output_gate.clone() }
    }
}

pub(crate) fn missing(weight: Weight) -> Error {
    Error::Tensor { name: weight.olmo().into(), problem: "is missing".into() }
}

/// What a device says, in one line and without its backtrace.
fn device_error(error: ServerError) -> Error {
    let text = format!("{error:?}");
    let message = text.split("Backtrace").next().unwrap_or(&text);
    Error::Device(message.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(300).collect())
}
