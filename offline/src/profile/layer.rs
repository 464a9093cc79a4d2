//! A layer's launches, counted: weights and hidden states are drawn at random, tables are memory that nobody has written, for no kernel of a
//! forward pass does anything else for what they hold.

use cubecl::Runtime;
use cubecl::client::ComputeClient;
use cubecl::future::block_on;
use cubecl::ir::StorageType;
use half::{bf16, f16};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use ultramem::kernels::{empty, from_u32, u32_storage};
use ultramem::{ElementType, Error, LayerWeights, MemoryConfig, MemoryLayer, Result, Tensor};

use super::{Profile, Rates};
use crate::{Execution, Gpu, OfflineDevice, OfflineRuntime, Options};

/// Tokens that are different. The rest repeat them.
const PERIOD: usize = 64;

/// A launch's profile, and the stage that makes it.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Staged {
    /// `prepare`, `query`, `score`, `combine`, `weigh` or `expand`.
    pub stage: &'static str,
    /// The launch.
    #[serde(flatten)]
    pub profile: Profile,
}

/// What a forward pass over `tokens` tokens launches.
///
/// # Errors
/// An element type that the GPU lacks, tensors too large for it, compilers that are not installed.
pub fn forward(
    config: &MemoryConfig,
    tokens: usize,
    dtype: ElementType,
    gpu: Gpu,
    rates: &Rates,
) -> Result<Vec<Staged>> {
    let device = OfflineDevice::new(Options { gpu, execution: Execution::Counted, ..Options::default() });
    let client = OfflineRuntime::client(&device);
    let mut random = StdRng::seed_from_u64(1);
    let weights = LayerWeights::make(config, dtype, |name, shape, storage| match name {
        _ if name.ends_with("values_for_look_up") => Ok(empty(&client, name, shape, storage)?),
        _ => drawn(&client, &mut random, name, shape, storage),
    })?;
    let layer = MemoryLayer::from_device(&client, config.clone(), weights)?;
    let taken = |stage: &'static str| -> Result<Vec<Staged>> {
        block_on(client.sync()).map_err(|error| Error::Device(format!("{error:?}")))?;
        let failed = |error: crate::Error| Error::Device(error.to_string());
        let reports = device.take_reports();
        let profiles = reports.iter().filter_map(|report| Profile::of(report, gpu, rates).map_err(failed).transpose());
        profiles.map(|profile| Ok(Staged { stage, profile: profile? })).collect()
    };
    taken("prepare")?;
    let period = if tokens.is_multiple_of(PERIOD) { PERIOD } else { tokens };
    let numbers: Vec<f32> = (0..period * config.hidden_size).map(|_| random.random_range(-1.7..1.7)).collect();
    let input = layer.upload(&numbers.repeat(tokens / period))?;
    device.repeat((period < tokens).then_some((tokens, period)));
    let strategies = layer.strategies(tokens);
    let query = layer.query(&input, strategies.query)?;
    let mut staged = taken("query")?;
    let (_, chosen) = layer.retrieve(&query, strategies.score)?;
    staged.extend(taken("score")?);
    if let Some(last) = staged.last_mut() {
        last.stage = "combine";
    }
    let weighed = layer.weigh(&input, &chosen, strategies.query)?;
    staged.extend(taken("weigh")?);
    layer.expand(&input, weighed.as_ref().map_or(&chosen, |(_, weighed)| &weighed.chosen), strategies)?;
    staged.extend(taken("expand")?);
    Ok(staged)
}

/// A tensor of random numbers; of indices, each once.
fn drawn(
    client: &ComputeClient<OfflineRuntime>,
    random: &mut StdRng,
    name: &str,
    shape: &[usize],
    storage: StorageType,
) -> Result<Tensor<OfflineRuntime>> {
    let count = shape.iter().product();
    if storage == u32_storage() {
        let mut indices: Vec<u32> = (0..count as u32).collect();
        indices.shuffle(random);
        return Ok(from_u32(client, shape, &indices)?);
    }
    let mut number = || if name.contains("norm") { 0.1 } else { random.random_range(-1.0f32..1.0) };
    let bytes: Vec<u8> = match storage {
        _ if storage == ElementType::F16.storage() => {
            (0..count).flat_map(|_| f16::from_f32(number()).to_le_bytes()).collect()
        }
        _ if storage == ElementType::BF16.storage() => {
            (0..count).flat_map(|_| bf16::from_f32(number()).to_le_bytes()).collect()
        }
        _ => (0..count).flat_map(|_| number().to_le_bytes()).collect(),
    };
    Ok(Tensor::new_contiguous(client, shape.to_vec(), client.create_from_slice(&bytes), storage))
}
