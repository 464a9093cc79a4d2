//! A model written again with some of its layers replaced.

use std::{borrow::Cow, collections::BTreeMap, path::Path};

use safetensors::{Dtype, View};

use super::super::{element_type, replace, save::Entry, wrong};
use super::{Layer, Model};
use crate::weights::names::{CORE_U, CORE_V, SHUFFLE, core_name};
use crate::{Capabilities, HostTensor, MemoryConfig, Result, Weight, Weights};

impl Model {
    /// Writes the model to a safetensors file at `out`, with the tensors of some of its layers replaced, each brought to the type that the
    /// model holds it in. A table that layers share is replaced for all of them. Every other tensor is written bit for bit as it was.
    ///
    /// The file is written under another name beside `out` and renamed when it is whole.
    ///
    /// # Errors
    /// [`Error::Model`](crate::Error::Model) if a configuration is not the layer's, a layer is replaced twice, or two layers bring different
    /// tables for one; [`Error::Tensor`](crate::Error::Tensor) or [`Error::Length`](crate::Error::Length) if weights do not fit their
    /// configuration; [`Error::Io`](crate::Error::Io) if the file can't be written.
    pub fn replace(&self, new: &[(&Layer, &MemoryConfig, &Weights<'_>)], out: impl AsRef<Path>) -> Result<()> {
        let mut replaced: BTreeMap<&str, (usize, Entry<'_>)> = BTreeMap::new();
        for &(layer, config, weights) in new {
            let own = self.own(layer)?;
            if new.iter().filter(|(other, ..)| other.name == own.name).count() > 1 {
                return Err(self.problem(format!("layer {} is replaced twice", own.number)));
            }
            differs(own, config).map_or(Ok(()), |text| Err(self.problem(text)))?;
            weights.check(config)?;
            for (name, tensor) in self.tensors_of(own, weights)? {
                let entry = self.entry(name, tensor)?;
                match replaced.get(name) {
                    Some((other, earlier)) if earlier.data() != entry.data() => {
                        let number = own.number;
                        let text =
                            format!("layers {other} and {number} bring different tables for {name}, which they share");
                        return Err(self.problem(text));
                    }
                    Some(_) => {}
                    None => drop(replaced.insert(name, (own.number, entry))),
                }
            }
        }
        let entries = replaced.into_iter().map(|(name, (_, entry))| (name, entry)).collect();
        replace::with(&self.tensors, entries, out.as_ref())
    }

    /// The new tensors, by the model's names.
    fn tensors_of<'a>(&'a self, layer: &'a Layer, weights: &'a Weights<'_>) -> Result<Vec<(&'a str, New<'a>)>> {
        let mut tensors = Vec::new();
        for weight in Weight::ALL {
            let Some(tensor) = weights.get(weight) else { continue };
            if weight.is_table() {
                tensors.extend(self.names_of_table(layer, weight).into_iter().map(|name| (name, New::Floats(tensor))));
            } else if weight != Weight::Cores {
                tensors.push((layer.real(&weight.name(&layer.config))?, New::Floats(tensor)));
            }
        }
        if layer.config.tucker() {
            let numbers = weights.numbers(Weight::Cores);
            let core = numbers.len() / layer.config.cores;
            for (at, numbers) in numbers.chunks_exact(core).enumerate() {
                tensors.push((layer.real(&core_name(at))?, New::Numbers(numbers.to_vec())));
            }
            tensors.push((layer.real(CORE_U)?, New::Numbers(weights.core_u.clone())));
            tensors.push((layer.real(CORE_V)?, New::Numbers(weights.core_v.clone())));
        }
        if let Some(shuffle) = &weights.shuffle_index {
            tensors.push((layer.real(SHUFFLE)?, New::Integers(shuffle)));
        }
        Ok(tensors)
    }

    /// Every name under which the model holds a table of `layer`.
    fn names_of_table<'a>(&'a self, layer: &'a Layer, weight: Weight) -> Vec<&'a str> {
        let owner = |layer: &'a Layer| self.table_of(layer).map_or(layer, |owner| &self.layers[owner]).name();
        let sharing = self.layers.iter().filter(|other| owner(other) == owner(layer));
        let own: Vec<&str> = sharing.filter_map(|layer| layer.table(weight)).collect();
        self.tensors.names().filter(|name| own.iter().any(|own| self.tensors.same(own, name))).collect()
    }

    /// A tensor as the model holds it.
    fn entry<'a>(&self, name: &str, tensor: New<'a>) -> Result<Entry<'a>> {
        let stored = self.tensors.get(name)?;
        let bytes = match tensor {
            New::Floats(tensor) => tensor.cast(element_type(name, stored.dtype)?).into_bytes(),
            New::Numbers(numbers) => {
                let tensor = HostTensor::from_f32([numbers.len()], &numbers)?;
                Cow::Owned(tensor.cast(element_type(name, stored.dtype)?).into_bytes().into_owned())
            }
            New::Integers(numbers) => Cow::Owned(integer_bytes(name, stored.dtype, numbers)?),
        };
        Ok(Entry::from_bytes(stored.dtype, stored.shape, bytes))
    }
}

impl Layer {
    /// What the tensor `name` is called in the model.
    fn real(&self, name: &str) -> Result<&str> {
        self.tensors.get(name).map(String::as_str).ok_or_else(|| wrong(name, "is missing".into()))
    }
}

/// A tensor of a layer that replaces one of the model's.
enum New<'a> {
    Floats(&'a HostTensor<'a>),
    Numbers(Vec<f32>),
    Integers(&'a [u32]),
}

fn integer_bytes(name: &str, dtype: Dtype, numbers: &[u32]) -> Result<Vec<u8>> {
    match dtype {
        Dtype::I64 => Ok(numbers.iter().flat_map(|&number| i64::from(number).to_le_bytes()).collect()),
        // Addresses are below 2³¹ where the model could hold them so.
        Dtype::I32 | Dtype::U32 => Ok(numbers.iter().flat_map(|number| number.to_le_bytes()).collect()),
        other => Err(wrong(name, format!("holds {other}, expected I64, I32 or U32"))),
    }
}

/// What is not as the model's settings have it.
fn differs(layer: &Layer, config: &MemoryConfig) -> Option<String> {
    let own = &layer.config;
    let sizes = |config: &MemoryConfig| {
        let of_tables =
            [("pre_dim", config.pre_dim), ("rows of the table", config.table_rows()), ("offset", config.offset())];
        config.sizes().into_iter().chain(of_tables)
    };
    let number = layer.number;
    let size = sizes(config).zip(sizes(own)).find(|(new, old)| new != old);
    if let Some(((what, new), (_, old))) = size {
        return Some(format!("layer {number} has {what} {old}, but what replaces it has {new}"));
    }
    let (old, new) = (own.capabilities, config.capabilities);
    // Where files keep a table changes nothing that is computed.
    let capabilities = Capabilities { shares_table: old.shares_table, ..new };
    let norm = (own.norm, own.norm_eps) == (config.norm, config.norm_eps);
    match (capabilities == old, norm || !old.normalises_queries) {
        (false, _) => Some(format!("layer {number} has {old:?}, but what replaces it has {new:?}")),
        (_, false) => {
            let text = |config: &MemoryConfig| format!("norm {:?}, eps {:e}", config.norm, config.norm_eps);
            Some(format!("layer {number} has {}, but what replaces it has {}", text(own), text(config)))
        }
        _ => None,
    }
}
