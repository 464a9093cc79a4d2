//! A layer's weights on the host: what a checkpoint holds, what the oracle reads and what [`MemoryLayer`] uploads.
//!
//! [`MemoryLayer`]: crate::MemoryLayer

use std::borrow::Cow;

use half::{bf16, f16};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use rand_distr::{Distribution, StandardNormal};

use crate::{ElementType, Error, MemoryConfig, Result, Spectrum};

/// A row-major tensor on the host, its bytes owned or borrowed (from a memory-mapped file).
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor<'a> {
    shape: Vec<usize>,
    dtype: ElementType,
    bytes: Cow<'a, [u8]>,
}

impl<'a> HostTensor<'a> {
    /// A tensor over the little-endian `bytes` of `dtype` numbers.
    ///
    /// # Errors
    /// [`Error::Length`] if `bytes` is not as long as `shape` and `dtype` say.
    pub fn new(shape: impl Into<Vec<usize>>, dtype: ElementType, bytes: impl Into<Cow<'a, [u8]>>) -> Result<Self> {
        let (shape, bytes) = (shape.into(), bytes.into());
        let expected = count(&shape);
        if bytes.len() != expected.saturating_mul(dtype.size()) {
            let found = bytes.len() / dtype.size();
            return Err(Error::Length { tensor: format!("{shape:?}"), found, expected });
        }
        Ok(Self { shape, dtype, bytes })
    }

    /// A tensor that owns `numbers`.
    ///
    /// # Errors
    /// [`Error::Length`] if there are more or fewer numbers than `shape` calls for.
    pub fn from_f32(shape: impl Into<Vec<usize>>, numbers: &[f32]) -> Result<HostTensor<'static>> {
        HostTensor::new(shape, ElementType::F32, bytemuck::cast_slice(numbers).to_vec())
    }

    /// Sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Element type.
    pub fn dtype(&self) -> ElementType {
        self.dtype
    }

    /// The little-endian bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The numbers, widened.
    pub fn to_f32(&self) -> Vec<f32> {
        widen(&self.bytes, self.dtype)
    }

    /// Row `index` of the tensor seen as a matrix with its outermost size as the number of rows, widened; None if there
    /// is no such row.
    pub fn row(&self, index: usize) -> Option<Vec<f32>> {
        let rows = *self.shape.first()?;
        if index >= rows {
            return None;
        }
        let width = self.bytes.len() / rows;
        Some(widen(&self.bytes[index * width..][..width], self.dtype))
    }

    /// The same tensor in another element type, rounded to nearest even.
    pub fn cast(&self, dtype: ElementType) -> HostTensor<'_> {
        let bytes: Cow<'_, [u8]> = if dtype == self.dtype {
            Cow::Borrowed(&self.bytes)
        } else {
            let wide = self.to_f32();
            Cow::Owned(match dtype {
                ElementType::F32 => bytemuck::cast_slice(&wide).to_vec(),
                ElementType::F16 => wide.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
                ElementType::BF16 => wide.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
            })
        };
        HostTensor { shape: self.shape.clone(), dtype, bytes }
    }
}

/// How many numbers a tensor of `shape` holds. Saturates where that overflows: no buffer is as long as usize::MAX.
pub(crate) fn count(shape: &[usize]) -> usize {
    shape.iter().fold(1, |product: usize, &size| product.saturating_mul(size))
}

fn widen(bytes: &[u8], dtype: ElementType) -> Vec<f32> {
    match dtype {
        ElementType::F32 => bytemuck::pod_collect_to_vec(bytes),
        ElementType::F16 => bytemuck::pod_collect_to_vec::<u8, f16>(bytes).iter().map(|x| x.to_f32()).collect(),
        ElementType::BF16 => bytemuck::pod_collect_to_vec::<u8, bf16>(bytes).iter().map(|x| x.to_f32()).collect(),
    }
}

/// Every weight of one layer, by its name in this project; the checkpoint's names are on the page of
/// [`checkpoint`](crate::checkpoint).
#[derive(Debug, Clone, PartialEq)]
pub struct Weights<'a> {
    /// `W_q` `[query_heads · 2 · key_dim, hidden_size]`.
    pub query_proj: HostTensor<'a>,
    /// `[key_dim]`.
    pub query_norm: HostTensor<'a>,
    /// `[heads, 2, side_keys, key_dim, tucker_rank]`; product keys leave the last dimension out.
    pub keys: HostTensor<'a>,
    /// `[key_dim]`.
    pub keys_norm: HostTensor<'a>,
    /// `[cores, heads, tucker_rank, tucker_rank]`; empty for product keys.
    pub cores: Vec<f32>,
    /// `u`: `[heads, tucker_rank]`; empty for product keys.
    pub core_u: Vec<f32>,
    /// `v`: `[heads, tucker_rank]`; empty for product keys.
    pub core_v: Vec<f32>,
    /// Slot → virtual address, `[side_keys²]`. Product keys have none: a slot is its own address.
    pub shuffle_index: Option<Vec<u32>>,
    /// `[rows, value_dim]`.
    pub values: HostTensor<'a>,
    /// `W_o` `[hidden_size, expansion · value_dim]`.
    pub values_proj: HostTensor<'a>,
    /// `W_g` `[value_dim, hidden_size]`, for Memory+ only.
    pub gate_proj: Option<HostTensor<'a>>,
}

impl<'a> Weights<'a> {
    /// Checks every shape against `config`, and that `shuffle_index` stays inside the virtual table.
    ///
    /// # Errors
    /// [`Error::Tensor`] or [`Error::Length`] with the checkpoint's name of the tensor.
    pub fn check(&self, config: &MemoryConfig) -> Result<()> {
        for (name, tensor, expected) in self.tensors(config) {
            if tensor.shape() != expected {
                let problem = format!("has shape {:?}, expected {expected:?}", tensor.shape());
                return Err(Error::Tensor { name: name.into(), problem });
            }
        }
        if self.gate_proj.is_some() != config.capabilities.gated {
            let problem = if config.capabilities.gated {
                "is missing"
            } else {
                "does not belong to this layer, which has no gate"
            };
            return Err(Error::Tensor { name: GATE_PROJ.into(), problem: problem.into() });
        }
        self.check_cores(config)?;
        self.check_shuffle(config)
    }

    /// The tensors of the layer with the names that a checkpoint gives them and the shapes that `config` calls for.
    pub(crate) fn tensors(&self, config: &MemoryConfig) -> Vec<(&'static str, &HostTensor<'a>, Vec<usize>)> {
        let own = [&self.query_proj, &self.query_norm, &self.keys, &self.keys_norm, &self.values, &self.values_proj];
        let own = own.into_iter().chain(&self.gate_proj);
        own.zip(layout(config)).map(|(tensor, (name, shape))| (name, tensor, shape)).collect()
    }

    fn check_cores(&self, config: &MemoryConfig) -> Result<()> {
        let heads = if config.tucker() { config.heads } else { 0 };
        let rank = config.tucker_rank;
        for (name, found, expected) in [
            (CORES, self.cores.len(), config.cores * heads * rank * rank),
            (CORE_U, self.core_u.len(), heads * rank),
            (CORE_V, self.core_v.len(), heads * rank),
        ] {
            if found != expected {
                return Err(Error::Length { tensor: name.into(), found, expected });
            }
        }
        Ok(())
    }

    fn check_shuffle(&self, config: &MemoryConfig) -> Result<()> {
        let wrong = |problem: String| Err(Error::Tensor { name: SHUFFLE.into(), problem });
        let shuffle = match &self.shuffle_index {
            Some(shuffle) if config.capabilities.shuffled => shuffle,
            None if !config.capabilities.shuffled => return Ok(()),
            None => return wrong("is missing".into()),
            Some(_) => return wrong("does not belong to this layer, whose slots are their own addresses".into()),
        };
        let slots = config.slots();
        if shuffle.len() != slots {
            return wrong(format!("has {} entries, expected side_keys² = {slots}", shuffle.len()));
        }
        match shuffle.iter().position(|&address| address as usize >= slots) {
            Some(at) => wrong(format!("entry {at} is {}, expected less than side_keys² = {slots}", shuffle[at])),
            None => Ok(()),
        }
    }

    /// Weights to start training from, in f32; the same `seed` gives the same weights.
    ///
    /// Values are N(0, 0.02), keys and `W_q` N(0, key_dim^-½), `W_o` N(0, (expansion · value_dim)^-½), `W_g` N(0,
    /// hidden_size^-½), norms the constant key_dim^-0.33, cores U(0, 1), `shuffle_index` a random permutation, `u` and
    /// `v` the leading singular vectors of the summed core, signed so that `u` sums to a positive number.
    pub fn random(config: &MemoryConfig, seed: u64) -> Weights<'static> {
        let rng = &mut StdRng::seed_from_u64(seed);
        let key_deviation = (config.key_dim as f32).powf(-0.5);
        let norm = (config.key_dim as f32).powf(-0.33);
        let queries = config.query_heads() * 2 * config.key_dim;
        let (cores, core_u, core_v) = random_cores(config, rng);
        Weights {
            query_proj: normal(&[queries, config.hidden_size], key_deviation, rng),
            query_norm: constant(config.key_dim, norm),
            keys: normal(&keys_shape(config), key_deviation, rng),
            keys_norm: constant(config.key_dim, norm),
            cores,
            core_u,
            core_v,
            shuffle_index: config.capabilities.shuffled.then(|| permutation(config.slots(), rng)),
            values: normal(&[config.rows(), config.value_dim], 0.02, rng),
            values_proj: normal(
                &[config.hidden_size, config.pooled_dim()],
                (config.pooled_dim() as f32).powf(-0.5),
                rng,
            ),
            gate_proj: config
                .capabilities
                .gated
                .then(|| normal(&[config.value_dim, config.hidden_size], (config.hidden_size as f32).powf(-0.5), rng)),
        }
    }
}

// The names that checkpoints give to the weights.
/// The names that a checkpoint gives to a layer's tensors but for the cores, and their shapes: query projection and norm, keys and
/// their norm, values, output projection, gate.
pub(crate) fn layout(config: &MemoryConfig) -> [(&'static str, Vec<usize>); 7] {
    let queries = config.query_heads() * 2 * config.key_dim;
    [
        (QUERY_PROJ, vec![queries, config.hidden_size]),
        (QUERY_NORM, vec![config.key_dim]),
        (KEYS, keys_shape(config)),
        (KEYS_NORM, vec![config.key_dim]),
        (values_name(config), vec![config.rows(), config.value_dim]),
        (VALUES_PROJ, vec![config.hidden_size, config.pooled_dim()]),
        (GATE_PROJ, vec![config.value_dim, config.hidden_size]),
    ]
}

pub(crate) const QUERY_PROJ: &str = "query_proj.weight";
pub(crate) const QUERY_NORM: &str = "query_norm.weight";
pub(crate) const KEYS: &str = "keys";
pub(crate) const KEYS_NORM: &str = "keys_norm.weight";
/// Stands for all of `tucker_core.0`, `tucker_core.1`, …
pub(crate) const CORES: &str = "tucker_core";
pub(crate) const CORE_U: &str = "tucker_core_u";
pub(crate) const CORE_V: &str = "tucker_core_v";
pub(crate) const SHUFFLE: &str = "shuffle_index";
pub(crate) const VALUES: &str = "values_for_look_up";
pub(crate) const SHARED_VALUES: &str = "full_memory_layer.values_for_look_up";
pub(crate) const VALUES_PROJ: &str = "values_proj.weight";
pub(crate) const GATE_PROJ: &str = "swilu_projection.weight";

/// The checkpoint's name of the value table.
fn values_name(config: &MemoryConfig) -> &'static str {
    if config.capabilities.shares_table { SHARED_VALUES } else { VALUES }
}

/// `[heads, 2, side_keys, key_dim, tucker_rank]`; product keys leave the last dimension out.
fn keys_shape(config: &MemoryConfig) -> Vec<usize> {
    let mut shape = vec![config.heads, 2, config.side_keys, config.key_dim];
    if config.tucker() {
        shape.push(config.tucker_rank);
    }
    shape
}

/// A tensor of normal numbers around 0.
fn normal(shape: &[usize], deviation: f32, rng: &mut StdRng) -> HostTensor<'static> {
    let mut bytes = vec![0; count(shape) * size_of::<f32>()];
    for number in bytes.chunks_exact_mut(size_of::<f32>()) {
        let standard: f32 = StandardNormal.sample(rng);
        number.copy_from_slice(&(standard * deviation).to_le_bytes());
    }
    HostTensor { shape: shape.into(), dtype: ElementType::F32, bytes: Cow::Owned(bytes) }
}

fn constant(count: usize, number: f32) -> HostTensor<'static> {
    HostTensor { shape: vec![count], dtype: ElementType::F32, bytes: Cow::Owned(number.to_le_bytes().repeat(count)) }
}

fn permutation(count: usize, rng: &mut StdRng) -> Vec<u32> {
    let mut places: Vec<u32> = (0..count).map(|place| place as u32).collect();
    places.shuffle(rng);
    places
}

/// Cores `[cores, heads, r, r]` and the singular vectors `u`, `v` `[heads, r]` of their sum; empty for product keys.
fn random_cores(config: &MemoryConfig, rng: &mut StdRng) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    if !config.tucker() {
        return (Vec::new(), Vec::new(), Vec::new());
    }
    let (heads, rank) = (config.heads, config.tucker_rank);
    let area = rank * rank;
    let cores: Vec<f32> = (0..config.cores * heads * area).map(|_| rng.random()).collect();
    // Numbers between 0 and 1 have leading vectors without a negative component.
    let positive = vec![1.0; heads * rank];
    let (core_u, core_v) = Spectrum::of(config, &cores).leading((&positive, &positive));
    (cores, core_u, core_v)
}
