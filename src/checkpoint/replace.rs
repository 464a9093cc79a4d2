//! A model written again with some of its tensors replaced.

use std::{borrow::Cow, collections::BTreeMap, path::Path};

use safetensors::{Dtype, View};

use super::{
    layout::Layout,
    save::{Entry, FileTensor, write},
    tensors::Tensors,
    wrong,
};
use crate::Result;

/// Writes the model `tensors` to a safetensors file at `out`, with the tensors in `new` in place of those of the same names. Every other
/// tensor is written bit for bit as it was, one after the other, so that no more than one is in memory; one that the model holds once under
/// several names is written under each.
///
/// The metadata stays as it was, and says `format: pt` if it did not say a format, which PyTorch's loaders ask for. The file is written
/// under another name beside `out` and renamed when it is whole, so that `out` may be the model itself.
///
/// # Errors
/// [`Error::Tensor`](crate::Error::Tensor) if the model lacks a tensor of `new`, or holds it in another shape or type, or `new` holds one
/// twice; [`Error::Length`](crate::Error::Length) if integers do not fill their shape; [`Error::Io`](crate::Error::Io) if the file can't be
/// written.
pub fn replace(tensors: &Tensors, new: &[(&str, FileTensor<'_>)], out: impl AsRef<Path>) -> Result<()> {
    let mut replaced = BTreeMap::new();
    for &(name, ref tensor) in new {
        if replaced.insert(name, Entry::new(name, tensor)?).is_some() {
            return Err(wrong(name, "is replaced twice".into()));
        }
    }
    with(tensors, replaced, out.as_ref())
}

/// The same with tensors as a file holds them.
pub(super) fn with(tensors: &Tensors, mut replaced: BTreeMap<&str, Entry<'_>>, out: &Path) -> Result<()> {
    for (name, entry) in &replaced {
        check(tensors, name, entry)?;
    }
    let written = |name| match replaced.remove(name) {
        Some(entry) => Ok((name, Written::New(entry))),
        None => tensors.find(name).map(|(layout, file)| (name, Written::Kept(layout, file))),
    };
    let entries = tensors.names().map(written).collect::<Result<Vec<_>>>()?;
    let mut metadata = tensors.metadata().clone();
    metadata.entry("format".into()).or_insert_with(|| "pt".into());
    write(out, entries, &metadata)
}

/// Checks that `new` may stand for the model's tensor `name`.
fn check(tensors: &Tensors, name: &str, new: &Entry<'_>) -> Result<()> {
    let (layout, _) = tensors.find(name)?;
    let (dtype, shape) = (layout.place.dtype, layout.place.shape.as_slice());
    if (new.dtype(), new.shape()) != (dtype, shape) {
        let problem = format!("is {} {:?}, expected {dtype} {shape:?} as in the model", new.dtype(), new.shape());
        return Err(wrong(name, problem));
    }
    Ok(())
}

/// A tensor of the new file.
enum Written<'a> {
    New(Entry<'a>),
    /// One of the model's, and the bytes of the file that it is in.
    Kept(&'a Layout, &'a [u8]),
}

impl View for Written<'_> {
    fn dtype(&self) -> Dtype {
        match self {
            Self::New(entry) => entry.dtype(),
            Self::Kept(layout, _) => layout.place.dtype,
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Self::New(entry) => entry.shape(),
            Self::Kept(layout, _) => &layout.place.shape,
        }
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self {
            Self::New(entry) => entry.data(),
            Self::Kept(layout, file) => layout.bytes(file),
        }
    }

    fn data_len(&self) -> usize {
        match self {
            Self::New(entry) => entry.data_len(),
            Self::Kept(layout, _) => layout.length(),
        }
    }
}
