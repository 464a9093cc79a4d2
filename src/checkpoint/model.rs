//! The memory layers of a whole model: which there are, their configurations, and their weights.

mod agree;
mod lingua;
mod names;
mod olmo;
mod place;
mod write;

use std::{collections::BTreeMap, fmt, path::Path, sync::OnceLock};

use super::{Integers, Settings, Tensors, files::problem, integers, metadata, weights, weights::Lookup, wrong};
use crate::{Error, HostTensor, MemoryConfig, Result, Weight, Weights};
use agree::Part;
use names::{Found, Names};

/// A model as training left it, and its memory layers.
///
/// Layers are found by their tensors: wherever a name ends with `keys` beside a `query_proj`, under any prefix. What wrappers put into names
/// (`model`, `module`, `_orig_mod`, `_fsdp_wrapped_module`, `_checkpoint_wrapped_module`) is passed over. What tensors do not tell comes from
/// the model's [`Settings`], and where both tell something, they must agree. A file of one layer, as [`Checkpoint::write`] makes it, is a
/// model of one layer.
///
/// The files are mapped, not read: see [`Tensors`].
///
/// [`Checkpoint::write`]: super::Checkpoint::write
#[derive(Debug)]
pub struct Model {
    tensors: Tensors,
    layers: Vec<Layer>,
}

/// One memory layer of a [`Model`].
pub struct Layer {
    name: String,
    number: usize,
    place: Option<(usize, usize)>,
    config: MemoryConfig,
    /// What each tensor is called in the model, by its name in a file of one layer.
    tensors: BTreeMap<String, String>,
    /// The layer whose table it shares, once somebody asked.
    table_of: OnceLock<Option<usize>>,
}

impl Model {
    /// Opens the model at `path`, a file or a folder as [`Tensors::open`] takes it, with the settings that its trainer left beside it, or with
    /// the metadata of a file of one layer.
    ///
    /// # Errors
    /// As [`Tensors::open`] and [`Settings::find`]; [`Error::Model`] if there is no memory layer, there are no settings, or settings and
    /// tensors do not agree.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let tensors = Tensors::open(path)?;
        if tensors.metadata().contains_key(metadata::KIND) {
            return Self::of_one_layer(tensors);
        }
        let found = found(&tensors)?;
        let Some(settings) = Settings::find(tensors.path())? else {
            let text = "holds memory layers, but neither config.yaml nor params.json is beside it: name the settings";
            return Err(problem(tensors.path(), text));
        };
        Self::new(tensors, found, &settings)
    }

    /// Opens the model at `path` with settings from elsewhere.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(path: impl AsRef<Path>, settings: &Settings) -> Result<Self> {
        let tensors = Tensors::open(path)?;
        let found = found(&tensors)?;
        Self::new(tensors, found, settings)
    }

    fn new(tensors: Tensors, mut found: Vec<Found>, settings: &Settings) -> Result<Self> {
        if lingua::shares_tables(settings) {
            names::lend_tables(&mut found);
        }
        let layers = layers(&tensors, found, settings).map_err(|text| problem(tensors.path(), text))?;
        Ok(Self { tensors, layers })
    }

    /// A file of one layer, whose metadata describes it.
    fn of_one_layer(tensors: Tensors) -> Result<Self> {
        let in_file = |error: Error| problem(tensors.path(), error.to_string());
        let config = metadata::config(tensors.metadata()).map_err(in_file)?;
        let number = metadata::layer(tensors.metadata()).map_err(in_file)?.unwrap_or(0);
        let names = tensors.names().map(|name| (name.to_string(), name.to_string())).collect();
        let layer =
            Layer { name: number.to_string(), number, place: None, config, tensors: names, table_of: OnceLock::new() };
        Ok(Self { tensors, layers: vec![layer] })
    }

    /// The memory layers in the order of their numbers; at least one.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The layer of a number or a name.
    ///
    /// # Errors
    /// [`Error::Model`] if there is none, or several have that number.
    pub fn layer(&self, name_or_number: impl fmt::Display) -> Result<&Layer> {
        let asked = name_or_number.to_string();
        let name = names::stripped(&asked);
        let named = self.layers.iter().find(|layer| layer.name == name);
        let number = asked.parse().ok();
        let numbered: Vec<&Layer> = self.layers.iter().filter(|layer| number == Some(layer.number)).collect();
        match (named, numbered.as_slice()) {
            (Some(layer), _) => Ok(layer),
            (None, &[layer]) => Ok(layer),
            (None, []) => Err(self.problem(format!("has no memory layer {asked:?}: it has {}", self.listed()))),
            (None, [one, two, ..]) => {
                Err(self.problem(format!("has more than one layer {asked}, such as {} and {}", one.name, two.name)))
            }
        }
    }

    /// Every tensor of the model, those of no memory layer included.
    pub fn tensors(&self) -> &Tensors {
        &self.tensors
    }

    /// The layer's weights, checked. The large ones borrow the mapped files; a table that several layers hold is borrowed from the first.
    ///
    /// # Errors
    /// [`Error::Model`] if a weight is missing or has the wrong shape, type or values.
    pub fn weights(&self, layer: &Layer) -> Result<Weights<'_>> {
        let owner = self.table_of(layer).map_or_else(|| self.own(layer), |owner| Ok(&self.layers[owner]))?;
        let lent = Lent { tensors: &self.tensors, layer: self.own(layer)?, owner };
        weights::read(&layer.config, &lent).map_err(|error| self.problem(layer.in_words(error)))
    }

    /// Which of [`layers`](Self::layers) holds the table that `layer` reads; None if that is `layer` itself. Tables are shared if the model
    /// holds them once, or, where its layers share a table but its files repeat it under each, if all their bytes are the same.
    pub fn table_of(&self, layer: &Layer) -> Option<usize> {
        let earlier = || self.layers.iter().position(|other| other.name == layer.name);
        *layer.table_of.get_or_init(|| (0..earlier()?).find(|&other| self.same_table(&self.layers[other], layer)))
    }

    /// Whether two layers read one table.
    fn same_table(&self, one: &Layer, other: &Layer) -> bool {
        let same = |weight: Weight| {
            let (Some(a), Some(b)) = (one.table(weight), other.table(weight)) else { return false };
            let alike = || match (self.tensors.get(a), self.tensors.get(b)) {
                (Ok(a), Ok(b)) => a == b,
                _ => false,
            };
            a == b || self.tensors.same(a, b) || other.config.capabilities.shares_table && alike()
        };
        let mut tables = other.tables();
        one.config.capabilities == other.config.capabilities && tables.all(same)
    }

    /// The layer of this model that has the name of `layer`.
    fn own(&self, layer: &Layer) -> Result<&Layer> {
        let own = self.layers.iter().find(|own| own.name == layer.name && own.config == layer.config);
        own.ok_or_else(|| self.problem(format!("has no layer {}", layer.name)))
    }

    fn listed(&self) -> String {
        const MOST: usize = 8;
        let numbers: Vec<String> = self.layers.iter().take(MOST).map(|layer| layer.number.to_string()).collect();
        numbers.join(", ") + if self.layers.len() > MOST { ", …" } else { "" }
    }

    fn problem(&self, text: String) -> Error {
        problem(self.tensors.path(), text)
    }
}

impl Layer {
    /// What the names of its tensors begin with, without wrappers: `transformer.mem_blocks.0`, `layers.1.feed_forward`. Its number, for a
    /// file of one layer.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The number in its name: of the memory layer for OLMo, of the block for lingua.
    pub fn number(&self) -> usize {
        self.number
    }

    /// The block whose feed-forward input the layer reads, and the block after which its output is added, as the trainer counts blocks; None
    /// if the settings do not say.
    pub fn place(&self) -> Option<(usize, usize)> {
        self.place
    }

    /// Its configuration.
    pub fn config(&self) -> &MemoryConfig {
        &self.config
    }

    /// Its tensors: the name that each has in a file of one layer, and the name in the model.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &str)> {
        self.tensors.iter().map(|(name, real)| (name.as_str(), real.as_str()))
    }

    /// The tables that it has.
    fn tables(&self) -> impl Iterator<Item = Weight> {
        Weight::ALL.into_iter().filter(|weight| weight.is_table() && weight.is_in(&self.config))
    }

    /// What one of its tables is called in the model.
    fn table(&self, weight: Weight) -> Option<&str> {
        let name = weights::stored_name(&self.config, weight, |name| self.tensors.contains_key(name));
        self.tensors.get(&name).map(String::as_str)
    }

    /// An error with the layer that it is about.
    fn in_words(&self, error: impl fmt::Display) -> String {
        format!("layer {}: {error}", self.number)
    }
}

impl fmt::Debug for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Layer").field("name", &self.name).field("config", &self.config).finish_non_exhaustive()
    }
}

/// The layers that `tensors` holds.
fn found(tensors: &Tensors) -> Result<Vec<Found>> {
    let names = Names::of(tensors).map_err(|text| problem(tensors.path(), text))?;
    let found = names.layers().map_err(|text| problem(tensors.path(), text))?;
    if found.is_empty() {
        let text = "holds no memory layer: no tensor is called keys beside a query_proj";
        return Err(problem(tensors.path(), text));
    }
    Ok(found)
}

/// The layers as the settings describe them.
fn layers(tensors: &Tensors, found: Vec<Found>, settings: &Settings) -> std::result::Result<Vec<Layer>, String> {
    let places = place::Places::of(settings)?;
    places.check(found.iter().map(|layer| layer.number).collect())?;
    let layer = |found: Found| {
        let part = Part { tensors, found: &found };
        let dimensions = match settings {
            Settings::Olmo(settings) => olmo::dimensions(settings, places.count(), &part)?,
            Settings::Lingua(settings) => lingua::dimensions(settings, &part)?,
        };
        let config = MemoryConfig::new(dimensions).map_err(|error| format!("layer {}: {error}", found.number))?;
        part.check_names(&config)?;
        let Found { name, number, tensors, .. } = found;
        Ok(Layer { name, number, place: places.get(number), config, tensors, table_of: OnceLock::new() })
    };
    found.into_iter().map(layer).collect()
}

/// A layer's tensors under the names of a file of one layer.
struct Lent<'a> {
    tensors: &'a Tensors,
    layer: &'a Layer,
    /// The layer that holds the table.
    owner: &'a Layer,
}

impl<'a> Lent<'a> {
    /// What the tensor `name` is called in the model.
    fn real(&self, name: &str) -> Result<&'a str> {
        let own = self.layer.tensors.get(name).ok_or_else(|| wrong(name, "is missing".into()))?;
        let table = self.layer.tables().find(|&weight| self.layer.table(weight) == Some(own));
        Ok(table.and_then(|weight| self.owner.table(weight)).unwrap_or(own))
    }
}

impl<'a> Lookup<'a> for Lent<'a> {
    fn has(&self, name: &str) -> bool {
        self.layer.tensors.contains_key(name)
    }

    fn floats(&self, name: &str) -> Result<HostTensor<'a>> {
        self.tensors.floats(self.real(name)?)
    }

    fn integers(&self, name: &str) -> Result<Integers> {
        let stored = self.tensors.get(self.real(name)?)?;
        integers(name, stored.dtype, &stored.shape, &stored.bytes)
    }
}
