//! A layer's tensors, held against its settings.

use std::collections::BTreeSet;

use super::super::{Tensors, files::shown};
use super::names::Found;
use crate::weights::names::{CORE_U, CORE_V, SHARED, SHUFFLE, core_name};
use crate::{MemoryConfig, Weight};

/// The tensors of one layer.
#[derive(Clone, Copy)]
pub(super) struct Part<'a> {
    pub(super) tensors: &'a Tensors,
    pub(super) found: &'a Found,
}

impl Part<'_> {
    /// What messages call it.
    pub(super) fn layer(&self) -> String {
        format!("layer {}", self.found.number)
    }

    /// Whether the layer has a tensor that a file of one layer calls `name`.
    pub(super) fn has(&self, name: &str) -> bool {
        self.found.tensors.contains_key(name)
    }

    /// The sizes of the tensor `name`.
    pub(super) fn sizes<const N: usize>(&self, name: &str) -> Result<[usize; N], String> {
        let Some(real) = self.found.tensors.get(name) else {
            return Err(format!("{} has no {name}", self.layer()));
        };
        let shape = self.tensors.get(real).map_err(|error| error.to_string())?.shape;
        let problem = |shape: Vec<usize>| format!("tensor {} has shape {shape:?}, expected {N} sizes", shown(real));
        shape.try_into().map_err(problem)
    }

    /// The sizes of a table, which may be the layer's own or one that layers share.
    pub(super) fn table(&self, table: Weight) -> Result<[usize; 2], String> {
        let own = table.olmo();
        let shared = format!("{SHARED}{own}");
        self.sizes(if self.has(own) { own } else { &shared })
    }

    /// How many cores there are.
    pub(super) fn cores(&self) -> usize {
        (0..).take_while(|&core| self.has(&core_name(core))).count()
    }

    /// Checks that every tensor under the layer's name is one that a layer of `config` has: with others, it would compute something else.
    pub(super) fn check_names(&self, config: &MemoryConfig) -> Result<(), String> {
        // A file of one layer may hold anything else.
        if self.found.name.is_empty() {
            return Ok(());
        }
        let weights = Weight::ALL.into_iter().filter(|weight| weight.is_in(config) && *weight != Weight::Cores);
        let mut known: BTreeSet<String> = weights.map(|weight| weight.name(config)).collect();
        known.extend([Weight::Values, Weight::PreValues].map(|table| table.olmo().to_string()));
        known.extend([Weight::Values, Weight::PreValues].map(|table| format!("{SHARED}{}", table.olmo())));
        if config.tucker() {
            known.extend([CORE_U, CORE_V, SHUFFLE].map(String::from));
            known.extend((0..config.cores).map(core_name));
        }
        match self.found.tensors.iter().find(|(name, _)| !known.contains(*name)) {
            Some((_, real)) => Err(format!("tensor {} belongs to no memory layer of this kind", shown(real))),
            None => Ok(()),
        }
    }
}

/// The number `found` in the tensors, as `words` say it, which the setting must not contradict.
pub(super) fn agree<T: PartialEq + std::fmt::Display + Copy>(
    setting: &str,
    said: Option<T>,
    found: T,
    words: impl FnOnce() -> String,
) -> Result<T, String> {
    match said {
        Some(said) if said != found => Err(format!("{setting} is {said}, but {}", words())),
        _ => Ok(found),
    }
}

/// What a setting says, without which no tensor tells it.
pub(super) fn needed<T>(setting: &str, said: Option<T>) -> Result<T, String> {
    said.ok_or_else(|| format!("the settings lack {setting}, which no tensor tells"))
}
