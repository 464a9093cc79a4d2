//! Layers in safetensors files, under the names that PyTorch checkpoints give them.
//!
//! The metadata holds the configuration, as text:
//!
//! | entry | meaning |
//! |---|---|
//! | `kind` | `ultramem_v1`, `ultramem_v2`, `memory_plus`, `pkm` or `lingua` |
//! | `hidden_size`, `head`, `kdim`, `vdim`, `knn` | `hidden_size`, `heads`, `key_dim`, `value_dim`, `top_m` |
//! | `knum` | `side_keys / √expansion` |
//! | `tucker_rank`, `tucker_multihead`, `value_expand_time` | `tucker_rank`, `cores`, `expansion`; only Tucker scores need them |
//! | `norm`, `norm_eps` | `rms` or `default` (LayerNorm without bias), and its epsilon |
//! | `knum`, `mem_layer_num`, `layer_id`, `share_ratio`, `key_expand_time`, `pre_vdim`, `use_glu_act` | of `ultramem_v2`: [`SharedSizes`](crate::SharedSizes), `pre_dim`, and whether the activation is the gelu; `value_expand_time` 1 sums the blocks |
//! | `side_keys`, `table_rows`, `offset`, in place of `knum`, `mem_layer_num`, `layer_id` and `share_ratio` | of `ultramem_v2`, as [`Checkpoint::write`] writes it |
//! | `input_dim`, `output_dim`, `mem_n_keys`, `mem_heads`, `mem_knn`, `mem_k_dim`, `mem_v_dim`, `swilu_projection`, `mem_gated`, `peer_variant`, `mem_share_values` | of `lingua`, in place of all others |
//!
//! and the tensors are the weights, in f32, f16 or bf16 unless the table says otherwise:
//!
//! | tensor | shape |
//! |---|---|
//! | `query_proj.weight` | `[query_pairs · 2 · key_dim, hidden_size]` |
//! | `query_norm.weight`, `keys_norm.weight` | `[key_dim]` |
//! | `keys` | `[heads, 2, side_keys, key_dim, tucker_rank]`; `memory_plus` and `pkm` leave `tucker_rank` out |
//! | `tucker_core.0`, `tucker_core.1`, … one a core | `[heads, tucker_rank, tucker_rank]` |
//! | `tucker_core_u`, `tucker_core_v` | `[1, heads, 1, tucker_rank]` |
//! | `shuffle_index` (i64, i32 or u32) | `[side_keys²]` |
//! | `pre_values_proj.weight`, for `ultramem_v2` | `[pre_dim, hidden_size]` |
//! | `values_for_look_up` or `full_memory_layer.values_for_look_up`, and for `ultramem_v2` the same of `pre_values_for_look_up` | `[table_rows, value_dim]`, `[table_rows, pre_dim]` |
//! | `values_proj.weight` | `[hidden_size, pooled_blocks · value_dim]` |
//! | `swilu_projection.weight`, for `memory_plus` | `[value_dim, hidden_size]` |
//!
//! Those of `lingua`: `layer.query_proj.query_mlps.0`, `layer.value_proj`, `layer.swilu_projection` and `layer.gating`, each with a `weight` and a `bias`,
//! `layer.keys` `[heads · 2 · side_keys, key_dim]`, and `layer.values.weight`, or `layer.values_u.weight` and `layer.values_v.weight` for PEER.
//!
//! A file may hold more than that, for instance inputs and expected outputs. Without the feature `files`, for a browser, a checkpoint is
//! read from bytes alone.
//!
//! `Model` finds the memory layers of a whole model, as a training run leaves it, and writes it again with some of them replaced. Below it,
//! `Tensors` reads all of its tensors, in whichever form it has, `Settings` what it was trained with, and `replace` writes it with other tensors.

#[cfg(feature = "files")]
mod archive;
#[cfg(feature = "files")]
mod files;
mod header;
#[cfg(feature = "files")]
mod layout;
mod metadata;
#[cfg(feature = "files")]
mod model;
#[cfg(feature = "files")]
mod part;
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
mod weights;

#[cfg(feature = "files")]
use std::path::Path;
use std::{borrow::Cow, collections::BTreeMap, fmt};

#[cfg(feature = "files")]
use memmap2::Mmap;
use safetensors::Dtype;

use crate::{ElementType, Error, HostTensor, MemoryConfig, Result, Weights};
use header::{Header, Place};
use weights::Lookup;
#[cfg(feature = "files")]
pub use {
    model::{Layer, Model},
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
        floats(name, place.dtype, &place.shape, Cow::Borrowed(bytes))
    }

    /// The tensor `name` of i64, i32 or u32 numbers.
    ///
    /// # Errors
    /// [`Error::Tensor`] if there is none or it holds another type.
    pub fn integers(&self, name: &str) -> Result<Integers> {
        let (place, bytes) = self.find(name)?;
        integers(name, place.dtype, &place.shape, bytes)
    }

    /// The layer's weights. The large ones borrow the file's bytes; cores, `u`, `v` and the shuffle are copied.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a weight is missing or has the wrong shape, type or values.
    pub fn weights(&self) -> Result<Weights<'_>> {
        weights::read(&self.config, &self)
    }

    fn find(&self, name: &str) -> Result<(&Place, &[u8])> {
        let place = self.header.tensors.get(name).ok_or_else(|| wrong(name, "is missing".into()))?;
        Ok((place, &self.bytes.as_slice()[place.bytes.clone()]))
    }
}

impl<'a> Lookup<'a> for &'a Checkpoint {
    fn has(&self, name: &str) -> bool {
        Checkpoint::has(self, name)
    }

    fn floats(&self, name: &str) -> Result<HostTensor<'a>> {
        Checkpoint::tensor(self, name)
    }

    fn integers(&self, name: &str) -> Result<Integers> {
        Checkpoint::integers(self, name)
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

/// The tensor `name` of f32, f16 or bf16 numbers.
fn floats<'a>(name: &str, dtype: Dtype, shape: &[usize], bytes: Cow<'a, [u8]>) -> Result<HostTensor<'a>> {
    HostTensor::new(shape, element_type(name, dtype)?, bytes)
}

fn element_type(name: &str, dtype: Dtype) -> Result<ElementType> {
    match dtype {
        Dtype::F32 => Ok(ElementType::F32),
        Dtype::F16 => Ok(ElementType::F16),
        Dtype::BF16 => Ok(ElementType::BF16),
        other => Err(wrong(name, format!("holds {other}, expected F32, F16 or BF16"))),
    }
}

/// The tensor `name` of i64, i32 or u32 numbers.
fn integers(name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Result<Integers> {
    let numbers = match dtype {
        Dtype::I64 => bytemuck::pod_collect_to_vec(bytes),
        Dtype::I32 => bytemuck::pod_collect_to_vec::<u8, i32>(bytes).into_iter().map(i64::from).collect(),
        Dtype::U32 => bytemuck::pod_collect_to_vec::<u8, u32>(bytes).into_iter().map(i64::from).collect(),
        other => return Err(wrong(name, format!("holds {other}, expected I64, I32 or U32"))),
    };
    Ok(Integers { shape: shape.to_vec(), numbers })
}

fn wrong(name: &str, problem: String) -> Error {
    Error::Tensor { name: name.into(), problem }
}
