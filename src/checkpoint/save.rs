//! Writing safetensors files: any tensors and metadata, or a whole layer.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    fs::{self, OpenOptions},
    io,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU64, Ordering},
};

use safetensors::{Dtype, SafeTensorError, View, tensor::serialize_to_file};

use super::{Integers, header::METADATA, metadata, wrong};
use crate::weights::{count, names};
use crate::{ElementType, Error, HostTensor, MemoryConfig, Result, Weight, Weights};

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq)]
pub enum FileTensor<'a> {
    /// f32, f16 or bf16 numbers, written in their type.
    Floats(HostTensor<'a>),
    /// Whole numbers, written as i64.
    Integers(Integers),
}

/// Writes `tensors` and `metadata` to a safetensors file at `path`.
///
/// The file is written under another name beside `path` and renamed when it is whole, so that a failed write leaves what
/// was there before.
///
/// # Errors
/// [`Error::Length`] if integers do not fill their shape, [`Error::Tensor`] if two tensors have the same name or one has
/// a name that the format reserves, [`Error::Io`] if the file can't be written.
pub fn save(
    path: impl AsRef<Path>,
    tensors: &[(&str, FileTensor<'_>)],
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let entries =
        tensors.iter().map(|&(name, ref tensor)| Ok((name, Entry::new(name, tensor)?))).collect::<Result<_>>()?;
    write(path.as_ref(), entries, metadata)
}

/// What [`Checkpoint::write`](super::Checkpoint::write) does.
pub(super) fn layer(
    path: &Path,
    config: &MemoryConfig,
    weights: &Weights<'_>,
    extra_tensors: &[(&str, FileTensor<'_>)],
    extra_metadata: &BTreeMap<String, String>,
) -> Result<()> {
    weights.check(config)?;
    let mut metadata = extra_metadata.clone();
    metadata.extend(metadata::entries(config)?);
    let mut entries: Vec<(String, Entry<'_>)> = Vec::new();
    for weight in Weight::ALL {
        match weights.get(weight) {
            Some(cores) if weight == Weight::Cores => entries.extend(core_entries(config, weights, cores)),
            Some(tensor) => entries.push((weight.name(config), Entry::floats(tensor))),
            None => {}
        }
    }
    if let Some(shuffle) = &weights.shuffle_index {
        let bytes: Vec<u8> = shuffle.iter().flat_map(|&address| i64::from(address).to_le_bytes()).collect();
        entries.push((names::SHUFFLE.into(), Entry::from_bytes(Dtype::I64, vec![shuffle.len()], bytes)));
    }
    for (name, tensor) in extra_tensors {
        entries.push((name.to_string(), Entry::new(name, tensor)?));
    }
    write(path, entries, &metadata)
}

/// The cores, one tensor each, and the vectors `u` and `v`, with their names.
fn core_entries(config: &MemoryConfig, weights: &Weights<'_>, cores: &HostTensor<'_>) -> Vec<(String, Entry<'static>)> {
    let (heads, rank) = (config.heads, config.tucker_rank);
    let f32s = |name: String, shape: Vec<usize>, numbers: &[f32]| {
        (name, Entry::from_bytes(Dtype::F32, shape, bytemuck::cast_slice(numbers).to_vec()))
    };
    let numbers = cores.to_f32();
    let of_core = |(core, numbers)| f32s(names::core_name(core), vec![heads, rank, rank], numbers);
    let mut entries: Vec<_> = numbers.chunks_exact(heads * rank * rank).enumerate().map(of_core).collect();
    entries.push(f32s(names::CORE_U.into(), vec![1, heads, 1, rank], &weights.core_u));
    entries.push(f32s(names::CORE_V.into(), vec![1, heads, 1, rank], &weights.core_v));
    entries
}

/// A tensor as the file holds it.
pub(super) struct Entry<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Cow<'a, [u8]>,
}

impl<'a> Entry<'a> {
    /// What is written of `tensor`, which is called `name`.
    pub(super) fn new(name: &str, tensor: &'a FileTensor<'_>) -> Result<Self> {
        let integers = match tensor {
            FileTensor::Floats(tensor) => return Ok(Self::floats(tensor)),
            FileTensor::Integers(integers) => integers,
        };
        let (found, expected) = (integers.numbers.len(), count(&integers.shape));
        if found != expected {
            return Err(Error::Length { tensor: name.into(), found, expected });
        }
        let bytes = bytemuck::cast_slice(&integers.numbers);
        Ok(Self { dtype: Dtype::I64, shape: integers.shape.clone(), bytes: Cow::Borrowed(bytes) })
    }

    fn floats(tensor: &'a HostTensor<'_>) -> Self {
        let dtype = match tensor.dtype() {
            ElementType::F32 => Dtype::F32,
            ElementType::F16 => Dtype::F16,
            ElementType::BF16 => Dtype::BF16,
        };
        Self { dtype, shape: tensor.shape().into(), bytes: Cow::Borrowed(tensor.bytes()) }
    }

    /// A tensor of `bytes`.
    pub(super) fn from_bytes(dtype: Dtype, shape: Vec<usize>, bytes: impl Into<Cow<'a, [u8]>>) -> Self {
        Self { dtype, shape, bytes: bytes.into() }
    }
}

impl View for Entry<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// Writes named tensors and `metadata` to a safetensors file, one tensor after the other.
pub(super) fn write<N: AsRef<str> + Ord + fmt::Display>(
    path: &Path,
    entries: Vec<(N, impl View)>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    check_names(entries.iter().map(|(name, _)| name.as_ref()))?;
    let metadata: HashMap<String, String> = metadata.clone().into_iter().collect();
    let partial = partial_path(path)?;
    let written = serialize_to_file(entries, Some(metadata), &partial)
        .map_err(|error| match error {
            SafeTensorError::IoError(source) => source,
            other => io::Error::other(other.to_string()),
        })
        .and_then(|()| OpenOptions::new().write(true).open(&partial)?.sync_all())
        .and_then(|()| fs::rename(&partial, path));
    written.map_err(|source| {
        // The write has failed already, and its reason is the one to report.
        let _ = fs::remove_file(&partial);
        Error::Io { path: path.into(), source }
    })
}

fn check_names<'a>(mut names: impl Iterator<Item = &'a str>) -> Result<()> {
    let mut seen = BTreeSet::from([METADATA]);
    match names.find(|&name| !seen.insert(name)) {
        Some(METADATA) => Err(wrong(METADATA, "has a name that the format reserves".into())),
        Some(name) => Err(wrong(name, "is there twice".into())),
        None => Ok(()),
    }
}

/// A name beside `path` that no other write uses.
fn partial_path(path: &Path) -> Result<PathBuf> {
    static WRITES: AtomicU64 = AtomicU64::new(0);
    let Some(name) = path.file_name() else {
        let source = io::Error::new(io::ErrorKind::InvalidInput, "the path has no file name");
        return Err(Error::Io { path: path.into(), source });
    };
    let mut partial = name.to_os_string();
    partial.push(format!(".{}.{}.partial", process::id(), WRITES.fetch_add(1, Ordering::Relaxed)));
    Ok(path.with_file_name(partial))
}
