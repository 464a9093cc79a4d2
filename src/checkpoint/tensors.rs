//! Every tensor of a model, whatever form its files have.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use memmap2::Mmap;
use safetensors::Dtype;

use super::{floats, header::Place, layout::Layout, part::Part, shards, wrong};
use crate::{HostTensor, Result};

/// The tensors of a whole model by their names, from the files that training leaves:
///
/// - a safetensors file, or a folder of several with an index (`model.safetensors.index.json`);
/// - a file of `torch.save` (`.pt`, `.pth`, `.bin`) that holds a state dict, or a dict with one under `model`, `state_dict`, `module` or
///   `model_state_dict`. Nothing that is pickled in it is executed; what is no tensor is passed over.
///
/// The files are mapped, not read. While a value of this type lives they must not be cut short or written over in place by anyone; to
/// replace one, rename another file over it.
pub struct Tensors {
    path: PathBuf,
    files: Vec<Mmap>,
    /// Each with the file that it is in.
    tensors: BTreeMap<String, (usize, Layout)>,
    metadata: BTreeMap<String, String>,
}

/// A tensor of a model as its file holds it.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored<'a> {
    /// Type of the numbers.
    pub dtype: Dtype,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// The numbers, row-major and little-endian. Only those that the file holds in another order are copied.
    pub bytes: Cow<'a, [u8]>,
}

impl Tensors {
    /// Opens the model at `path`: one of its files, the index of several, or a folder with either. In a folder that holds other files of
    /// tensors too, it is the index, or the one called `model.safetensors`, `model.pt`, `consolidated.pth` or `pytorch_model.bin`.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) if a file can't be opened, [`Error::Model`](crate::Error::Model) with the file and what is wrong
    /// with it: it is broken or of another form, it is not clear which file is the model, or the index and the files do not agree.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let path = if path.is_dir() { shards::in_folder(path)? } else { path.into() };
        if shards::is_index(&path) {
            let (files, tensors) = shards::open(&path)?;
            return Ok(Self { path, files, tensors, metadata: BTreeMap::new() });
        }
        let Part { map, tensors, metadata } = Part::open(&path)?;
        let tensors = tensors.into_iter().map(|(name, layout)| (name, (0, layout))).collect();
        Ok(Self { path, files: vec![map], tensors, metadata })
    }

    /// The file that was opened: the model's, or the index of its files.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The metadata of a single safetensors file; empty for any other form.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The names of all tensors, in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether the model has a tensor called `name`.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor `name`.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) if there is none.
    pub fn get(&self, name: &str) -> Result<Stored<'_>> {
        let (layout, file) = self.find(name)?;
        let Place { dtype, ref shape, .. } = layout.place;
        Ok(Stored { dtype, shape: shape.clone(), bytes: layout.bytes(file) })
    }

    /// The tensor `name` of f32, f16 or bf16 numbers.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) if there is none or it holds another type.
    pub fn floats(&self, name: &str) -> Result<HostTensor<'_>> {
        let Stored { dtype, shape, bytes } = self.get(name)?;
        floats(name, dtype, &shape, bytes)
    }

    /// Whether `a` and `b` are names of the same numbers: what a file of `torch.save` holds once for all layers that share it.
    /// False if the model lacks one of them.
    pub fn same(&self, a: &str, b: &str) -> bool {
        let place = |name| {
            let (file, Layout { place, strides }) = self.tensors.get(name)?;
            Some((file, place.dtype, &place.shape, &place.bytes, strides))
        };
        place(a).is_some() && place(a) == place(b)
    }

    /// Where the tensor `name` is, and in which file's bytes.
    pub(super) fn find(&self, name: &str) -> Result<(&Layout, &[u8])> {
        let (file, layout) = self.tensors.get(name).ok_or_else(|| wrong(name, "is missing".into()))?;
        Ok((layout, &self.files[*file]))
    }
}

impl fmt::Debug for Tensors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tensors").field("path", &self.path).finish_non_exhaustive()
    }
}
