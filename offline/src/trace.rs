//! What a layer launches on a GPU: the kernels of each stage, in order, taken down without running any. The weights are memory
//! that nobody has written, so that a layer of any size can be traced. So can a whole decoding step.

use cubecl::Runtime;
use cubecl::client::ComputeClient;
use cubecl::future::block_on;
use ultramem::kernels::optimiser::{Rule, Step};
use ultramem::kernels::{empty, u32_storage};
use ultramem::{
    ElementType, Error, LayerWeights, MapGradients, MemoryConfig, MemoryLayer, Result, RowGradients, Strategies, Tensor,
};
use ultramem_versus::{Cache, Decoder, Plan};

use crate::{Execution, Gpu, LaunchReport, OfflineDevice, OfflineRuntime, Options, Target};

/// A launch, and the stage that makes it.
#[derive(Debug, Clone)]
pub struct Traced {
    /// `prepare`, `query`, `score`, `combine`, `weigh`, `expand`, the same five with `-backward`, `state`, `update`, `sum`,
    /// `draw` or `step`.
    pub stage: &'static str,
    /// The launch.
    pub launch: LaunchReport,
}

/// A device that takes launches down as `gpu` would get them, in the words of `target`. It has a thread of its own for as long as
/// the process runs, so that one is made for many layers.
pub fn tracing_device(gpu: Gpu, target: Target) -> OfflineDevice {
    OfflineDevice::new(Options { gpu, target, execution: Execution::Skipped, ..Options::default() })
}

/// A layer on a device that takes launches down.
pub struct Tracer {
    device: OfflineDevice,
    client: ComputeClient<OfflineRuntime>,
    layer: MemoryLayer<OfflineRuntime>,
    prepared: Vec<Traced>,
}

impl Tracer {
    /// A layer of `config` on `device`, which runs nothing and nobody else uses meanwhile.
    ///
    /// # Errors
    /// An element type that the GPU lacks, or tensors too large for it.
    pub fn new(device: &OfflineDevice, config: &MemoryConfig, dtype: ElementType) -> Result<Self> {
        let client = OfflineRuntime::client(device);
        device.take_reports();
        let weights = unwritten_weights(&client, config, dtype)?;
        let layer = MemoryLayer::from_device(&client, config.clone(), weights)?;
        let mut tracer = Self { device: device.clone(), client, layer, prepared: Vec::new() };
        tracer.prepared = tracer.taken("prepare")?;
        Ok(tracer)
    }

    /// The layer.
    pub fn layer(&self) -> &MemoryLayer<OfflineRuntime> {
        &self.layer
    }

    /// What a change of the weights launches.
    pub fn prepare(&self) -> &[Traced] {
        &self.prepared
    }

    /// What a forward pass launches, by the layer's own strategies if none are given.
    ///
    /// # Errors
    /// Strategies that the GPU can't run.
    pub fn forward(&self, tokens: usize, strategies: Option<Strategies>) -> Result<Vec<Traced>> {
        let strategies = strategies.unwrap_or_else(|| self.layer.strategies(tokens));
        let input = self.hidden_states("input", tokens)?;
        let query = self.layer.query(&input, strategies.query)?;
        let mut traced = self.taken("query")?;
        let (_, chosen) = self.layer.retrieve(&query, strategies.score)?;
        traced.extend(self.taken("score")?);
        // The last of them combines, whatever it does before.
        if let Some(last) = traced.last_mut() {
            last.stage = "combine";
        }
        let weighed = self.layer.weigh(&input, &chosen, strategies.query)?;
        traced.extend(self.taken("weigh")?);
        let weighed = weighed.as_ref().map_or(&chosen, |(_, weighed)| &weighed.chosen);
        self.layer.expand(&input, weighed, strategies)?;
        traced.extend(self.taken("expand")?);
        Ok(traced)
    }

    /// What a backward pass launches, and by each of `rules` the making of its state and an update of the table.
    ///
    /// # Errors
    /// Tensors too large for the GPU.
    pub fn training(&mut self, tokens: usize, rules: &[Rule]) -> Result<Vec<Traced>> {
        let input = self.hidden_states("input", tokens)?;
        let (_, saved) = self.layer.forward_saving(&input)?;
        self.taken("forward")?;
        let expand = self.layer.expand_backward(&saved, &self.hidden_states("grad_output", tokens)?)?;
        let mut traced = self.taken("expand-backward")?;
        let weigh = self.layer.weigh_backward(&saved, &expand)?;
        traced.extend(self.taken("weigh-backward")?);
        let grad_scores = weigh.as_ref().map_or(&expand.scores, |weigh| &weigh.scores);
        let combine = self.layer.combine_backward(&saved, grad_scores)?;
        traced.extend(self.taken("combine-backward")?);
        let score = self.layer.score_backward(&saved, &combine.sides)?;
        traced.extend(self.taken("score-backward")?);
        let z = weigh.map(|weigh| weigh.z);
        let maps = MapGradients { gate: expand.gate, output_gate: expand.output_gate, z };
        self.layer.query_backward(&input, &score.query, &maps)?;
        traced.extend(self.taken("query-backward")?);
        for &rule in rules {
            let mut optimiser = self.layer.value_optimiser(rule)?;
            traced.extend(self.taken("state")?);
            self.layer.update_values(&mut optimiser, &expand.values, &Step::new(0.1))?;
            traced.extend(self.taken("update")?);
        }
        Ok(traced)
    }

    /// What adding up two gradients of the table launches, of `capacity` rows each.
    ///
    /// # Errors
    /// Tensors too large for the GPU.
    pub fn sum(&self, capacity: usize) -> Result<Vec<Traced>> {
        let config = self.layer.config();
        let of_u32 = |name, count| empty(&self.client, name, &[count], u32_storage());
        let shape = [capacity, config.value_dim];
        let (rows, count) = (of_u32("rows", capacity)?, of_u32("count", 1)?);
        let gradients = empty(&self.client, "row gradients", &shape, ElementType::F32.storage())?;
        let part = RowGradients::new(&self.client, &rows, &count, &gradients, config.table_rows())?;
        self.taken("a part")?;
        RowGradients::sum(&self.client, &[part.clone(), part], config.table_rows())?;
        self.taken("sum")
    }

    fn hidden_states(&self, name: &'static str, tokens: usize) -> Result<Tensor<OfflineRuntime>> {
        let shape = [tokens, self.layer.config().hidden_size];
        Ok(empty(&self.client, name, &shape, self.layer.dtype().storage())?)
    }

    fn taken(&self, stage: &'static str) -> Result<Vec<Traced>> {
        taken(&self.device, &self.client, stage)
    }
}

/// What the model of `plan` launches: the drawing of its weights, and a step for `batch` sequences with `cached` positions before.
///
/// # Errors
/// An element type that the GPU lacks, or tensors too large for it.
pub fn step(
    device: &OfflineDevice,
    plan: &Plan,
    dtype: ElementType,
    batch: usize,
    cached: usize,
) -> Result<Vec<Traced>> {
    let client = OfflineRuntime::client(device);
    device.take_reports();
    let decoder = Decoder::new(&client, plan, dtype)?;
    let cache = Cache::new(&client, &plan.scale, batch, cached, dtype)?;
    let stream = decoder.stream(batch)?;
    let mut traced = taken(device, &client, "draw")?;
    decoder.step(&stream, Some(&cache))?;
    traced.extend(taken(device, &client, "step")?);
    Ok(traced)
}

fn taken(device: &OfflineDevice, client: &ComputeClient<OfflineRuntime>, stage: &'static str) -> Result<Vec<Traced>> {
    block_on(client.sync()).map_err(|error| Error::Device(format!("{error:?}")))?;
    Ok(device.take_reports().into_iter().map(|launch| Traced { stage, launch }).collect())
}

fn unwritten_weights(
    client: &ComputeClient<OfflineRuntime>,
    config: &MemoryConfig,
    dtype: ElementType,
) -> Result<LayerWeights<OfflineRuntime>> {
    LayerWeights::make(config, dtype, |name, shape, storage| Ok(empty(client, name, shape, storage)?))
}
