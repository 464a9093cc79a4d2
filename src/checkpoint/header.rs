//! The header of a safetensors file: where each tensor lies, and the metadata.
//!
//! 8 bytes give the header's length, little-endian; the header is JSON; the tensors' bytes follow without gaps up to the
//! end of the file. Nothing is believed before it is checked, and what is checked can't overflow.

use std::{collections::BTreeMap, fmt, ops::Range};

use safetensors::{Dtype, tensor::TensorInfo};
use serde::{
    Deserialize, Deserializer,
    de::{Error as _, MapAccess, Visitor},
};

use super::wrong;
use crate::{Error, Result};

/// A checked header.
pub(super) struct Header {
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) tensors: BTreeMap<String, Place>,
}

/// A tensor's type and shape, and where in the file its bytes are.
pub(super) struct Place {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: Range<usize>,
}

/// Bytes of the header's length.
const LENGTH_BYTES: usize = 8;
/// The longest header that the format allows.
const MAX_HEADER: u64 = 100_000_000;
/// The format's name for the metadata, among the tensors' names.
pub(super) const METADATA: &str = "__metadata__";

impl Header {
    /// The header of the whole file `bytes`.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        let start = start_of_data(bytes)?;
        let json = std::str::from_utf8(&bytes[LENGTH_BYTES..start])
            .map_err(|error| Error::Format(format!("the header is not UTF-8: {error}")))?;
        let Entries { metadata, infos } =
            serde_json::from_str(json).map_err(|error| Error::Format(one_line(&error)))?;
        check_cover(&infos, bytes.len() - start)?;
        let mut tensors = BTreeMap::new();
        for (name, info) in infos {
            check_size(&name, &info)?;
            let (begin, end) = info.data_offsets;
            tensors.insert(name, Place { dtype: info.dtype, shape: info.shape, bytes: start + begin..start + end });
        }
        Ok(Self { metadata, tensors })
    }
}

/// Where the header ends and the tensors' bytes begin.
fn start_of_data(bytes: &[u8]) -> Result<usize> {
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(Error::Format(format!("{} bytes, too short for the header's length", bytes.len())));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(Error::Format(format!("the header is {length} bytes, more than the {MAX_HEADER} allowed")));
    }
    if length > rest.len() as u64 {
        return Err(Error::Format(format!("the header is {length} bytes, but the file ends after {}", rest.len())));
    }
    Ok(LENGTH_BYTES + length as usize)
}

/// Checks that the tensors lie one after the other and fill the `available` bytes.
fn check_cover(infos: &BTreeMap<String, TensorInfo>, available: usize) -> Result<()> {
    let mut in_order: Vec<_> = infos.iter().map(|(name, info)| (info.data_offsets, name)).collect();
    in_order.sort_unstable();
    let mut reached = 0;
    for ((begin, end), name) in in_order {
        if begin != reached || end < begin || end > available {
            let problem = format!(
                "lies at bytes {begin} to {end}, expected to begin at {reached} and end within the {available} bytes of data"
            );
            return Err(wrong(name, problem));
        }
        reached = end;
    }
    if reached != available {
        return Err(Error::Format(format!("the tensors end at byte {reached} of {available} bytes of data")));
    }
    Ok(())
}

/// Checks that a tensor has as many bytes as its shape and type call for.
fn check_size(name: &str, info: &TensorInfo) -> Result<()> {
    let found = info.data_offsets.1 - info.data_offsets.0;
    let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |bits, &size| bits.checked_mul(size));
    let fits = bits.is_some_and(|bits| bits.is_multiple_of(8) && bits / 8 == found);
    if !fits {
        return Err(wrong(
            name,
            format!("has {found} bytes, which shape {:?} of {} does not need", info.shape, info.dtype),
        ));
    }
    Ok(())
}

/// The JSON as it stands.
struct Entries {
    metadata: BTreeMap<String, String>,
    infos: BTreeMap<String, TensorInfo>,
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(EntriesVisitor)
    }
}

/// Reads the entries one by one, so that an error can name the one it is in and no name is taken twice.
struct EntriesVisitor;

impl<'de> Visitor<'de> for EntriesVisitor {
    type Value = Entries;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Entries, A::Error> {
        let mut entries = Entries { metadata: BTreeMap::new(), infos: BTreeMap::new() };
        while let Some(name) = map.next_key::<String>()? {
            let inside = |error: A::Error| A::Error::custom(format!("{name:?}: {error}"));
            if name == METADATA {
                entries.metadata = map.next_value().map_err(inside)?;
                continue;
            }
            let info = map.next_value().map_err(inside)?;
            if entries.infos.contains_key(&name) {
                return Err(A::Error::custom(format!("two tensors are called {name:?}")));
            }
            entries.infos.insert(name, info);
        }
        Ok(entries)
    }
}

/// An error of a parser, which may quote any part of the file, as one line of bearable length.
pub(super) fn one_line(error: &impl fmt::Display) -> String {
    const LONGEST: usize = 300;
    let text: String = error.to_string().chars().take(LONGEST).collect();
    text.replace(char::is_control, " ")
}
