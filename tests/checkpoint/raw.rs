//! A safetensors file as its header and its bytes, which tests put together wrongly.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use ultramem::{Checkpoint, Kind, Weights};

use crate::common::small;

/// The file of a small random layer of `kind`.
pub fn small_file(kind: Kind) -> RawFile {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("small.safetensors");
    let config = small(kind);
    Checkpoint::write(&path, &config, &Weights::random(&config, 9), &[], &BTreeMap::new()).unwrap();
    RawFile::parse(&std::fs::read(path).unwrap()).unwrap()
}

/// A safetensors file taken apart, to be put together wrongly.
#[derive(Clone)]
pub struct RawFile {
    pub header: Value,
    pub data: Vec<u8>,
}

impl RawFile {
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let (length, rest) = bytes.split_first_chunk::<8>()?;
        let (header, data) = rest.split_at_checked(u64::from_le_bytes(*length).try_into().ok()?)?;
        let header: Value = serde_json::from_slice(header).ok()?;
        header.is_object().then(|| Self { header, data: data.to_vec() })
    }

    pub fn bytes(&self) -> Vec<u8> {
        let header = self.header.to_string();
        let length = (header.len() as u64).to_le_bytes();
        [&length, header.as_bytes(), &self.data].concat()
    }

    pub fn tensors(&self) -> Vec<String> {
        let names = self.header.as_object().unwrap().keys();
        names.filter(|name| *name != "__metadata__").cloned().collect()
    }

    /// The same file with one metadata entry replaced.
    pub fn with_metadata(&self, key: &str, text: &str) -> Self {
        let mut file = self.clone();
        file.header["__metadata__"][key] = text.into();
        file
    }

    pub fn without_metadata(&self, key: &str) -> Self {
        let mut file = self.clone();
        file.header["__metadata__"].as_object_mut().unwrap().remove(key);
        file
    }

    /// The same file with one field of a tensor's entry replaced.
    pub fn with_field(&self, tensor: &str, field: &str, value: Value) -> Self {
        let mut file = self.clone();
        file.header[tensor][field] = value;
        file
    }

    /// The same file without one tensor, the others moved together.
    pub fn without_tensor(&self, tensor: &str) -> Self {
        self.try_without_tensor(tensor).unwrap()
    }

    /// None if the file is too damaged for that.
    pub fn try_without_tensor(&self, tensor: &str) -> Option<Self> {
        let mut file = self.clone();
        let entries = file.header.as_object_mut()?;
        let removed = entries.remove(tensor)?;
        let offset = |entry: &Value, end: usize| entry.get("data_offsets")?.get(end)?.as_u64();
        let (begin, end) = (offset(&removed, 0)?, offset(&removed, 1)?);
        file.data.get(begin as usize..end as usize)?;
        for (name, entry) in entries {
            if name != "__metadata__" && offset(entry, 0)? >= end {
                let moved = [offset(entry, 0)?, offset(entry, 1)?].map(|at| at.wrapping_sub(end - begin));
                entry["data_offsets"] = json!(moved);
            }
        }
        file.data.drain(begin as usize..end as usize);
        Some(file)
    }

    /// The same file with a tensor's bytes replaced by as many of another content.
    pub fn with_data(&self, tensor: &str, bytes: &[u8]) -> Self {
        let mut file = self.clone();
        let begin = self.header[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
        file.data[begin..begin + bytes.len()].copy_from_slice(bytes);
        file
    }
}
