//! A transformer with random weights, as far as one decoding step reads it: attention over a cache, an FFN or experts in every block,
//! and memory layers at even distances, each reading the normed input of one block's FFN and adding to the stream some
//! blocks later.
//!
//! Its numbers mean nothing; its launches are those of a trained model of the same dimensions.

use cubecl::prelude::*;
use ultramem::{ElementType, LayerWeights, MemoryConfig, MemoryLayer, Result, Tensor, ValueTable};
use ultramem_kernels::linear::{ProjectStrategy, project};
use ultramem_kernels::{empty, from_f32, from_u32, random};

use crate::kernels::{Activation, Experts, attention, dense, moe, residual};
use crate::plan::{Plan, Scale};

/// A plan's model on a device.
pub struct Decoder<R: Runtime> {
    client: ComputeClient<R>,
    dtype: ElementType,
    hidden_size: usize,
    blocks: Vec<Block<R>>,
    memories: Vec<Placed<R>>,
    /// The weight of every norm: f32 `[hidden_size]` of ones.
    norm: Tensor<R>,
}

/// What attention reads of the positions before this one.
pub struct Cache<R: Runtime> {
    /// Keys and values of each block, `[batch, attention_heads, cached, head_dim]`.
    blocks: Vec<(Tensor<R>, Tensor<R>)>,
}

struct Block<R: Runtime> {
    /// `[hidden, 3 · hidden]` and `[hidden, hidden]`.
    attention: (Tensor<R>, Tensor<R>),
    ffn: Ffn<R>,
}

enum Ffn<R: Runtime> {
    /// Up and down.
    Dense(Tensor<R>, Tensor<R>),
    Experts {
        router: Tensor<R>,
        up: Tensor<R>,
        down: Tensor<R>,
        top_k: usize,
    },
}

/// A memory layer, the block whose FFN input it reads and the block after which it adds its output.
struct Placed<R: Runtime> {
    reads: usize,
    adds: usize,
    layer: MemoryLayer<R>,
}

const ACTIVATION: Activation = Activation::Gelu;
const EPS: f32 = 1e-5;

/// Draws weights of one type, each tensor with a seed of its own.
struct Draw<'a, R: Runtime> {
    client: &'a ComputeClient<R>,
    dtype: ElementType,
    seed: u32,
}

impl<R: Runtime> Draw<'_, R> {
    /// Uniform numbers, those of a column of `depth` rows having a sum of squares near one.
    fn weights(&mut self, name: &'static str, shape: &[usize], depth: usize) -> Result<Tensor<R>> {
        self.seed += 1;
        let scale = (3.0 / depth as f32).sqrt();
        Ok(random(self.client, name, shape, self.dtype, scale, self.seed)?)
    }

    fn ones(&self, size: usize) -> Result<Tensor<R>> {
        Ok(from_f32(self.client, &[size], &vec![1.0; size])?)
    }

    fn block(&mut self, plan: &Plan) -> Result<Block<R>> {
        let hidden = plan.scale.hidden_size;
        let attention = (
            self.weights("projection", &[hidden, 3 * hidden], hidden)?,
            self.weights("projection", &[hidden; 2], hidden)?,
        );
        let ffn = match plan.experts {
            0 => Ffn::Dense(
                self.weights("up", &[hidden, plan.inner], hidden)?,
                self.weights("down", &[plan.inner, hidden], plan.inner)?,
            ),
            experts => Ffn::Experts {
                router: self.weights("router", &[hidden, experts], hidden)?,
                up: self.weights("up", &[experts, hidden, plan.expert_inner], hidden)?,
                down: self.weights("down", &[experts, plan.expert_inner, hidden], plan.expert_inner)?,
                top_k: plan.top_k,
            },
        };
        Ok(Block { attention, ffn })
    }

    /// A table in pages, each of which one binding of the device holds.
    fn pages(&mut self, name: &'static str, rows: usize, width: usize) -> Result<ValueTable<R>> {
        let limit = usize::try_from(self.client.properties().memory.max_page_size).unwrap_or(usize::MAX);
        let most = (limit / (width * self.dtype.size())).max(1);
        let lengths = (0..rows).step_by(most).map(|first| most.min(rows - first));
        let pages = lengths.map(|length| self.weights(name, &[length, width], 1)).collect::<Result<_>>()?;
        ValueTable::from_pages(pages)
    }

    /// A layer, with the tables of `shared` where there is one.
    fn memory(&mut self, config: &MemoryConfig, shared: Option<&MemoryLayer<R>>) -> Result<MemoryLayer<R>> {
        let mut weights = LayerWeights::make(config, self.dtype, |name, shape, storage| match name {
            // Tables that layers share take their place.
            "values_for_look_up" | "pre_values_for_look_up" if config.shared.is_some() => {
                Ok(empty(self.client, name, &[1, shape[1]], storage)?)
            }
            "shuffle_index" => Ok(from_u32(self.client, shape, &scattered(config.slots()))?),
            "tucker_core" => self.core(config, shape),
            // Any vectors do where nothing is learnt.
            "tucker_core_u" | "tucker_core_v" => {
                let side = (config.tucker_rank as f32).powf(-0.5);
                Ok(from_f32(self.client, shape, &vec![side; config.heads * config.tucker_rank])?)
            }
            "values_for_look_up" | "pre_values_for_look_up" => self.weights(name, shape, 1),
            "keys" => self.weights(name, shape, config.key_dim),
            _ if storage != self.dtype.storage() || shape.len() < 2 => self.ones(shape[0]),
            _ => self.weights(name, shape, shape[1]),
        })?;
        match shared {
            Some(owner) => (weights.values, weights.pre_values) = (owner.table().clone(), owner.pre_table().cloned()),
            None if config.shared.is_some() => {
                weights.values = self.pages("values", config.table_rows(), config.value_dim)?;
                weights.pre_values = Some(self.pages("pre-values", config.table_rows(), config.pre_dim)?);
            }
            None => {}
        }
        MemoryLayer::from_device(self.client, config.clone(), weights)
    }

    /// Cores whose sum is judged by its first row and column.
    fn core(&self, config: &MemoryConfig, shape: &[usize]) -> Result<Tensor<R>> {
        let count = shape.iter().product();
        let cores: Vec<f32> = (0..count).map(|at: usize| 1.0 / (1 + at % (config.tucker_rank + 1)) as f32).collect();
        Ok(from_f32(self.client, shape, &cores)?)
    }
}

/// A permutation of `0..count` in which neighbours lie far apart: steps of the golden ratio's share of it.
fn scattered(count: usize) -> Vec<u32> {
    let mut step = ((count as f64 * 0.618_033_988_75) as usize).max(1);
    while divisor(step, count) > 1 {
        step += 1;
    }
    (0..count as u64).map(|slot| (slot * step as u64 % count as u64) as u32).collect()
}

/// The greatest common divisor.
fn divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { divisor(b, a % b) }
}

impl<R: Runtime> Decoder<R> {
    /// Makes the weights of `plan` on the device behind `client`, in `dtype`.
    ///
    /// # Errors
    /// An element type that the device lacks, or a tensor that is larger than one of its bindings.
    pub fn new(client: &ComputeClient<R>, plan: &Plan, dtype: ElementType) -> Result<Self> {
        let mut draw = Draw { client, dtype, seed: 0 };
        let Scale { hidden_size, blocks, .. } = plan.scale;
        let (layers, mut memories) = (plan.memory_layers(), Vec::<Placed<R>>::new());
        if let Some(config) = &plan.memory {
            for at in 0..layers {
                let (reads, adds) = (at * blocks / layers, (at + 1) * blocks / layers - 1);
                let shared = memories.first().filter(|_| config.shared.is_some()).map(|first| &first.layer);
                let layer = draw.memory(&plan.memory_at(config, at)?, shared)?;
                memories.push(Placed { reads, adds, layer });
            }
        }
        Ok(Self {
            client: client.clone(),
            dtype,
            hidden_size,
            blocks: (0..blocks).map(|_| draw.block(plan)).collect::<Result<_>>()?,
            memories,
            norm: draw.ones(hidden_size)?,
        })
    }

    /// The first of the memory layers, where there are some.
    pub fn memory(&self) -> Option<&MemoryLayer<R>> {
        self.memories.first().map(|placed| &placed.layer)
    }

    /// Random hidden states `[batch, hidden_size]`, as an embedding would give.
    ///
    /// # Errors
    /// A batch of zero.
    pub fn stream(&self, batch: usize) -> Result<Tensor<R>> {
        let shape = [batch, self.hidden_size];
        Ok(random(&self.client, "stream", &shape, self.dtype, 1.0, STREAM_SEED)?)
    }

    /// One step for a batch of sequences: `[batch, hidden_size]` of the same. Without a cache the blocks have no attention. Only
    /// enqueues.
    ///
    /// # Errors
    /// A stream of another width or type, a cache of another batch.
    pub fn step(&self, stream: &Tensor<R>, cache: Option<&Cache<R>>) -> Result<Tensor<R>> {
        // The embedding counts twice, as a token's and as its position's.
        let (mut stream, mut update) = (stream.clone(), stream.clone());
        let mut read = Vec::new();
        for (at, block) in self.blocks.iter().enumerate() {
            let mut normed;
            (stream, normed) = self.add(&stream, &update)?;
            if let Some(cache) = cache {
                update = self.attend(block, &normed, &cache.blocks[at])?;
                (stream, normed) = self.add(&stream, &update)?;
            }
            for placed in self.memories.iter().filter(|placed| placed.reads == at) {
                read.push((placed.adds, placed.layer.forward(&normed)?.output));
            }
            update = self.ffn(block, &normed)?;
            for (_, memory) in read.extract_if(.., |(adds, _)| *adds == at) {
                (stream, _) = self.add(&stream, &memory)?;
            }
        }
        Ok(self.add(&stream, &update)?.1)
    }

    /// The stream after an update, and its norm.
    fn add(&self, stream: &Tensor<R>, update: &Tensor<R>) -> Result<(Tensor<R>, Tensor<R>)> {
        Ok(residual(&self.client, stream, update, &self.norm, EPS)?)
    }

    fn attend(&self, block: &Block<R>, normed: &Tensor<R>, cache: &(Tensor<R>, Tensor<R>)) -> Result<Tensor<R>> {
        let (into, out) = &block.attention;
        let projected = self.project(normed, into)?;
        let attended = attention(&self.client, &projected, &cache.0, &cache.1)?;
        self.project(&attended, out)
    }

    fn ffn(&self, block: &Block<R>, normed: &Tensor<R>) -> Result<Tensor<R>> {
        match &block.ffn {
            Ffn::Dense(up, down) => Ok(dense(&self.client, normed, up, down, ACTIVATION, self.strategy(normed))?),
            Ffn::Experts { router, up, down, top_k } => {
                let experts = Experts { router, up, down, activation: ACTIVATION, top_k: *top_k };
                Ok(moe(&self.client, normed, &experts)?.output)
            }
        }
    }

    fn project(&self, input: &Tensor<R>, weight: &Tensor<R>) -> Result<Tensor<R>> {
        Ok(project(&self.client, input, weight, self.dtype.storage(), self.strategy(input))?)
    }

    fn strategy(&self, input: &Tensor<R>) -> ProjectStrategy {
        ProjectStrategy::choose(&self.client, input.shape()[0], self.dtype.storage())
    }
}

const STREAM_SEED: u32 = 0x5eed;

impl<R: Runtime> Cache<R> {
    /// Random keys and values of `cached` positions for every block of `scale` and each of `batch` sequences.
    ///
    /// # Errors
    /// Sizes of zero, heads that don't divide the width, or a cache larger than one binding.
    pub fn new(
        client: &ComputeClient<R>,
        scale: &Scale,
        batch: usize,
        cached: usize,
        dtype: ElementType,
    ) -> Result<Self> {
        let mut draw = Draw { client, dtype, seed: CACHE_SEED };
        let heads = scale.attention_heads;
        let shape = [batch, heads, cached, scale.hidden_size / heads.max(1)];
        let mut tensor = |name| draw.weights(name, &shape, 1);
        let blocks = (0..scale.blocks).map(|_| Ok((tensor("cached keys")?, tensor("cached values")?)));
        Ok(Self { blocks: blocks.collect::<Result<_>>()? })
    }
}

const CACHE_SEED: u32 = 0x000c_ac4e;
