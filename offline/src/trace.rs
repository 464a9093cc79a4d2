//! What a layer launches on a GPU: the kernels of each stage, in order, taken down without running any. The weights are memory
//! that nobody has written, so that a layer of any size can be traced. So can a whole decoding step.

use cubecl::Runtime;
use cubecl::client::ComputeClient;
use cubecl::future::block_on;
use cubecl::ir::StorageType;
use ultramem::kernels::optimiser::{Rule, Step};
use ultramem::kernels::{empty, u32_storage};
use ultramem::{
    ElementType, Error, LayerWeights, MemoryConfig, MemoryLayer, Result, RowGradients, Strategies, Tensor, TuckerCore,
    ValueTable,
};
use ultramem_versus::{Cache, Decoder, Plan};

use crate::{Execution, Gpu, LaunchReport, OfflineDevice, OfflineRuntime, Options, Target};

/// A launch, and the stage that makes it.
#[derive(Debug, Clone)]
pub struct Traced {
    /// `prepare`, `query`, `score`, `combine`, `expand`, the same four with `-backward`, `state`, `update`, `sum`,
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
        self.layer.expand(&input, &chosen, strategies)?;
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
        let combine = self.layer.combine_backward(&saved, &expand.scores)?;
        traced.extend(self.taken("combine-backward")?);
        let score = self.layer.score_backward(&saved, &combine.sides)?;
        traced.extend(self.taken("score-backward")?);
        self.layer.query_backward(&input, &score.query, expand.gate.as_ref())?;
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
        let part = RowGradients::new(&self.client, &rows, &count, &gradients, config.rows())?;
        self.taken("a part")?;
        RowGradients::sum(&self.client, &[part.clone(), part], config.rows())?;
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
    let tensor = |name, shape: &[usize], storage: StorageType| empty(client, name, shape, storage);
    let full = |name, shape: &[usize]| tensor(name, shape, ElementType::F32.storage());
    let stored = |name, shape: &[usize]| tensor(name, shape, dtype.storage());
    let (heads, rank, key_dim) = (config.heads, config.tucker_rank, config.key_dim);
    let core = || -> Result<_> {
        Ok(TuckerCore {
            cores: full("core", &[config.cores, heads, rank, rank])?,
            u: full("core_u", &[heads, rank])?,
            v: full("core_v", &[heads, rank])?,
        })
    };
    let shuffle = || tensor("shuffle", &[config.slots()], u32_storage());
    let gate = || stored("gate_proj", &[config.value_dim, config.hidden_size]);
    Ok(LayerWeights {
        query_proj: stored("query_proj", &[config.query_heads() * 2 * key_dim, config.hidden_size])?,
        query_norm: full("query_norm", &[key_dim])?,
        keys: stored("keys", &[heads, 2, config.side_keys, key_dim, rank])?,
        keys_norm: full("keys_norm", &[key_dim])?,
        core: config.tucker().then(core).transpose()?,
        shuffle: config.capabilities.shuffled.then(shuffle).transpose()?,
        values: ValueTable::from_device(stored("values", &[config.rows(), config.value_dim])?)?,
        values_proj: stored("values_proj", &[config.hidden_size, config.pooled_dim()])?,
        gate_proj: config.capabilities.gated.then(gate).transpose()?,
    })
}
