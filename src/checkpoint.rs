//! Layers in safetensors files, under the names that PyTorch checkpoints give them.
//!
//! The metadata holds the configuration, as text:
//!
//! | entry | meaning |
//! |---|---|
//! | `kind` | `ultramem_v1`, `memory_plus` or `pkm` |
//! | `hidden_size`, `head`, `kdim`, `vdim`, `knn` | `hidden_size`, `heads`, `key_dim`, `value_dim`, `top_m` |
//! | `knum` | `side_keys / √expansion` |
//! | `tucker_rank`, `tucker_multihead`, `value_expand_time` | `tucker_rank`, `cores`, `expansion`; only `ultramem_v1` needs them |
//! | `norm`, `norm_eps` | `rms` or `default` (LayerNorm without bias), and its epsilon |
//!
//! and the tensors are the weights, in f32, f16 or bf16 unless the table says otherwise:
//!
//! | tensor | shape |
//! |---|---|
//! | `query_proj.weight` | `[query_heads · 2 · key_dim, hidden_size]` |
//! | `query_norm.weight`, `keys_norm.weight` | `[key_dim]` |
//! | `keys` | `[heads, 2, side_keys, key_dim, tucker_rank]`; `memory_plus` and `pkm` leave `tucker_rank` out |
//! | `tucker_core.0`, `tucker_core.1`, … one a core | `[heads, tucker_rank, tucker_rank]` |
//! | `tucker_core_u`, `tucker_core_v` | `[1, heads, 1, tucker_rank]` |
//! | `shuffle_index` (i64, i32 or u32) | `[side_keys²]` |
//! | `values_for_look_up` or `full_memory_layer.values_for_look_up` | `[rows, value_dim]` |
//! | `values_proj.weight` | `[hidden_size, expansion · value_dim]` |
//! | `swilu_projection.weight`, for `memory_plus` | `[value_dim, hidden_size]` |
//!
//! A file may hold more than that, for instance inputs and expected outputs. Without the feature `files`, for a browser, a checkpoint is
//! read from bytes alone.
//!
//! A whole model, as a training run leaves it, is read by `Tensors`, in whichever form it has, and what it was trained with by `Settings`;
//! `replace` writes it again with some of its tensors replaced.

#[cfg(feature = "files")]
mod archive;
#[cfg(feature = "files")]
mod files;
mod header;
mod metadata;
#[cfg(feature = "files")]
mod pickle;
#[cfg(feature = "files")]
mod replace;
#[cfg(feature = "files")]
mod save;
#[cfg(feature = "files")]
mod settings;
#[cfg(feature = "files")]
mod shards;
#[cfg(feature = "files")]
mod tensors;
#[cfg(feature = "files")]
mod torch;

#[cfg(feature = "files")]
use std::path::Path;
use std::{collections::BTreeMap, fmt};

#[cfg(feature = "files")]
use memmap2::Mmap;
use safetensors::Dtype;

use crate::{ElementType, Error, HostTensor, MemoryConfig, Result, Weights, weights as names};
use header::{Header, Place};
#[cfg(feature = "files")]
pub use {
    replace::replace,
    save::{FileTensor, save},
    settings::{LinguaSettings, OlmoSettings, ProductKeySettings, Settings},
    tensors::{Stored, Tensors},
};

/// A layer in a safetensors file, its header and metadata checked; the module's page says what such a file holds.
pub struct Checkpoint {
    bytes: Bytes,
    header: Header,
    config: MemoryConfig,
}

/// Where the file's bytes are.
enum Bytes {
    #[cfg(feature = "files")]
    Mapped(Mmap),
    Owned(Vec<u8>),
}

/// A tensor of whole numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Integers {
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// The numbers, row-major.
    pub numbers: Vec<i64>,
}

impl Checkpoint {
    /// Opens the file at `path`. It is mapped, not read: a table larger than memory can be opened, and only what is
    /// used of it is read. While the checkpoint lives the file must not be cut short or written over in place by
    /// anyone; to replace it, rename another file over it, as [`Checkpoint::write`] does. Where that can't be promised,
    /// read the file and use [`Checkpoint::from_bytes`].
    ///
    /// # Errors
    /// [`Error::Io`] if the file can't be opened or mapped, else as [`Checkpoint::from_bytes`].
    #[cfg(feature = "files")]
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::new(Bytes::Mapped(files::map(path.as_ref())?))
    }

    /// The checkpoint in `bytes`, a whole safetensors file.
    ///
    /// # Errors
    /// [`Error::Format`] or [`Error::Tensor`] if the header is broken, [`Error::Metadata`], [`Error::Config`] or
    /// [`Error::Kernel`] if the metadata does not describe a layer that this library can run.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self> {
        Self::new(Bytes::Owned(bytes))
    }

    fn new(bytes: Bytes) -> Result<Self> {
        let header = Header::parse(bytes.as_slice())?;
        let config = metadata::config(&header.metadata)?;
        Ok(Self { bytes, header, config })
    }

    /// Writes a layer to `path` in the form that [`Checkpoint::open`] reads, with `extra_tensors` beside the weights and
    /// `extra_metadata` beside the configuration. Where `extra_metadata` holds one of the configuration's entries,
    /// `config` wins, so that the metadata of another checkpoint may be handed on as it is.
    ///
    /// The file is written under another name beside `path` and renamed when it is whole.
    ///
    /// # Errors
    /// [`Error::Tensor`] or [`Error::Length`] if `weights` do not fit `config` or two tensors have the same name,
    /// [`Error::Config`] if `expansion` is not a square, which the file's form can't express, [`Error::Io`] if the file
    /// can't be written.
    #[cfg(feature = "files")]
    pub fn write(
        path: impl AsRef<Path>,
        config: &MemoryConfig,
        weights: &Weights<'_>,
        extra_tensors: &[(&str, FileTensor<'_>)],
        extra_metadata: &BTreeMap<String, String>,
    ) -> Result<()> {
        save::layer(path.as_ref(), config, weights, extra_tensors, extra_metadata)
    }

    /// The layer's configuration.
    pub fn config(&self) -> &MemoryConfig {
        &self.config
    }

    /// All metadata of the file, the configuration's entries included.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// The names of all tensors in the file, in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.header.tensors.keys().map(String::as_str)
    }

    /// Whether the file holds a tensor called `name`.
    pub fn has(&self, name: &str) -> bool {
        self.header.tensors.contains_key(name)
    }

    /// The tensor `name` of f32, f16 or bf16 numbers, in the type that the file holds and without a copy.
    ///
    /// # Errors
    /// [`Error::Tensor`] if there is none or it holds another type.
    pub fn tensor(&self, name: &str) -> Result<HostTensor<'_>> {
        let (place, bytes) = self.find(name)?;
        let dtype = match place.dtype {
            Dtype::F32 => ElementType::F32,
            Dtype::F16 => ElementType::F16,
            Dtype::BF16 => ElementType::BF16,
            other => return Err(wrong(name, format!("holds {other}, expected F32, F16 or BF16"))),
        };
        HostTensor::new(place.shape.as_slice(), dtype, bytes)
    }

    /// The tensor `name` of i64, i32 or u32 numbers.
    ///
    /// # Errors
    /// [`Error::Tensor`] if there is none or it holds another type.
    pub fn integers(&self, name: &str) -> Result<Integers> {
        let (place, bytes) = self.find(name)?;
        let numbers = match place.dtype {
            Dtype::I64 => bytemuck::pod_collect_to_vec(bytes),
            Dtype::I32 => bytemuck::pod_collect_to_vec::<u8, i32>(bytes).into_iter().map(i64::from).collect(),
            Dtype::U32 => bytemuck::pod_collect_to_vec::<u8, u32>(bytes).into_iter().map(i64::from).collect(),
            other => return Err(wrong(name, format!("holds {other}, expected I64, I32 or U32"))),
        };
        Ok(Integers { shape: place.shape.clone(), numbers })
    }

    /// The layer's weights. The large ones borrow the file's bytes; cores, `u`, `v` and the shuffle are copied.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a weight is missing or has the wrong shape, type or values.
    pub fn weights(&self) -> Result<Weights<'_>> {
        let tucker = self.config.tucker();
        let weights = Weights {
            query_proj: self.tensor(names::QUERY_PROJ)?,
            query_norm: self.tensor(names::QUERY_NORM)?,
            keys: self.tensor(names::KEYS)?,
            keys_norm: self.tensor(names::KEYS_NORM)?,
            cores: if tucker { self.cores()? } else { Vec::new() },
            core_u: if tucker { self.core_vector(names::CORE_U)? } else { Vec::new() },
            core_v: if tucker { self.core_vector(names::CORE_V)? } else { Vec::new() },
            shuffle_index: if self.config.capabilities.shuffled { Some(self.shuffle()?) } else { None },
            values: self.tensor(self.values_name())?,
            values_proj: self.tensor(names::VALUES_PROJ)?,
            gate_proj: if self.config.capabilities.gated { Some(self.tensor(names::GATE_PROJ)?) } else { None },
        };
        weights.check(&self.config)?;
        Ok(weights)
    }

    fn find(&self, name: &str) -> Result<(&Place, &[u8])> {
        let place = self.header.tensors.get(name).ok_or_else(|| wrong(name, "is missing".into()))?;
        Ok((place, &self.bytes.as_slice()[place.bytes.clone()]))
    }

    fn values_name(&self) -> &'static str {
        if self.has(names::SHARED_VALUES) { names::SHARED_VALUES } else { names::VALUES }
    }

    /// `[cores, heads, tucker_rank, tucker_rank]`.
    fn cores(&self) -> Result<Vec<f32>> {
        let (heads, rank, cores) = (self.config.heads, self.config.tucker_rank, self.config.cores);
        let surplus = core_name(cores);
        if self.has(&surplus) {
            return Err(wrong(&surplus, format!("is one more than tucker_multihead {cores} calls for")));
        }
        let mut numbers = Vec::new();
        for core in 0..cores {
            numbers.extend(self.shaped(&core_name(core), &[heads, rank, rank])?);
        }
        Ok(numbers)
    }

    /// `[heads, tucker_rank]`.
    fn core_vector(&self, name: &str) -> Result<Vec<f32>> {
        self.shaped(name, &[1, self.config.heads, 1, self.config.tucker_rank])
    }

    fn shaped(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let tensor = self.tensor(name)?;
        if tensor.shape() != shape {
            return Err(wrong(name, format!("has shape {:?}, expected {shape:?}", tensor.shape())));
        }
        Ok(tensor.to_f32())
    }

    fn shuffle(&self) -> Result<Vec<u32>> {
        let Integers { shape, numbers } = self.integers(names::SHUFFLE)?;
        let slots = self.config.slots();
        if shape != [slots] {
            return Err(wrong(names::SHUFFLE, format!("has shape {shape:?}, expected [{slots}]")));
        }
        let address = |(at, number): (usize, i64)| {
            u32::try_from(number)
                .map_err(|_| wrong(names::SHUFFLE, format!("entry {at} is {number}, expected 0 to {}", slots - 1)))
        };
        numbers.into_iter().enumerate().map(address).collect()
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            #[cfg(feature = "files")]
            Self::Mapped(map) => map,
            Self::Owned(bytes) => bytes,
        }
    }
}

pub(crate) fn core_name(core: usize) -> String {
    format!("{}.{core}", names::CORES)
}

fn wrong(name: &str, problem: String) -> Error {
    Error::Tensor { name: name.into(), problem }
}
