//! One file of a model: its bytes say which form it has.

use std::{collections::BTreeMap, path::Path};

use memmap2::Mmap;

use super::{
    files::{self, problem},
    header::Header,
    layout::Layout,
    torch,
};
use crate::Result;

/// One file's tensors.
pub(super) struct Part {
    pub(super) map: Mmap,
    pub(super) tensors: BTreeMap<String, Layout>,
    pub(super) metadata: BTreeMap<String, String>,
}

impl Part {
    /// The file at `path`, whose bytes say which form it has.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let map = files::map(path)?;
        if torch::is_archive(&map) {
            let tensors = torch::tensors(&map).map_err(|text| problem(path, text))?;
            return Ok(Self { map, tensors, metadata: BTreeMap::new() });
        }
        if torch::is_old(&map) {
            let text = "is in the form that torch.save wrote before PyTorch 1.6; save it again with a newer one";
            return Err(problem(path, text));
        }
        let Header { metadata, tensors } = Header::parse(&map).map_err(|error| problem(path, error.to_string()))?;
        let tensors = tensors.into_iter().map(|(name, place)| (name, Layout { place, strides: None })).collect();
        Ok(Self { map, tensors, metadata })
    }
}
