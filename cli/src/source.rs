//! Where a layer comes from: a file of one, or a whole model as training left it.

use std::path::{Path, PathBuf};

use clap::Args;
use ultramem::checkpoint::{Layer, Model, Settings, Tensors};
use ultramem::{MemoryConfig, Weights};

use crate::failure::{Failure, Result};
use crate::load;

/// Where a whole model's settings are.
#[derive(Debug, Default, Args)]
pub struct SettingsArgs {
    /// The settings of a whole model, where they are not beside it: a config.yaml or params.json
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl SettingsArgs {
    /// The model at `path`. A file of one layer is a model of one layer.
    pub fn open(&self, path: &Path) -> Result<Model> {
        let model = match &self.config {
            Some(file) => Settings::read(file).and_then(|settings| Model::open_with(path, &settings)),
            None => Model::open(path),
        };
        Ok(model?)
    }
}

/// Which layer of a model.
#[derive(Debug, Default, Args)]
pub struct ModelLayer {
    /// The layer of a whole model: its number or its name
    #[arg(long, value_name = "N", requires = "file")]
    layer: Option<String>,
    #[command(flatten)]
    settings: SettingsArgs,
}

impl ModelLayer {
    /// The layer of the model at `path`; the only one if none is named.
    pub fn open(&self, path: &Path) -> Result<Source> {
        let model = self.settings.open(path)?;
        let layers = model.layers();
        let layer = match &self.layer {
            Some(name) => {
                let name = model.layer(name)?.name();
                layers.iter().position(|layer| layer.name() == name).unwrap_or(0)
            }
            None if layers.len() == 1 => 0,
            None => {
                let (path, count) = (path.display(), layers.len());
                return Err(Failure::new(format!("{path}: a model of {count} memory layers; name one with --layer")));
            }
        };
        if is_one_layer(&model) {
            load::read_through(path)?;
        }
        Ok(Source { path: path.into(), model, layer })
    }

    /// The same, or the whole model if no layer is named and it is more than a file of one.
    pub fn open_any(&self, path: &Path) -> Result<std::result::Result<Source, Model>> {
        if self.layer.is_none() {
            let model = self.settings.open(path)?;
            if !is_one_layer(&model) {
                return Ok(Err(model));
            }
        }
        self.open(path).map(Ok)
    }
}

/// Whether a model is a file of one layer, whose metadata describes it.
pub fn is_one_layer(model: &Model) -> bool {
    model.tensors().metadata().contains_key("kind")
}

/// A layer, and the model that it is in.
pub struct Source {
    path: PathBuf,
    model: Model,
    layer: usize,
}

impl Source {
    /// The layer.
    pub fn layer(&self) -> &Layer {
        &self.model.layers()[self.layer]
    }

    /// Its configuration.
    pub fn config(&self) -> &MemoryConfig {
        self.layer().config()
    }

    /// Its weights.
    pub fn weights(&self) -> Result<Weights<'_>> {
        Ok(self.model.weights(self.layer())?)
    }

    /// The file of the model, which results must not replace.
    pub fn differs(&self, output: &Path) -> Result<()> {
        load::differs(&self.path, output)?;
        load::differs(self.model.tensors().path(), output)
    }
}

/// Where hidden states come from that are not in the layer's file.
#[derive(Debug, Args)]
pub struct InputArgs {
    /// A file with the input, and the tensor's name where it is not `input`
    #[arg(long, value_name = "FILE[:NAME]", conflicts_with = "expected")]
    input: Option<String>,
    /// A file with inputs for several layers: N.input is layer N's
    #[arg(long, value_name = "FILE")]
    expected: Option<PathBuf>,
}

impl InputArgs {
    /// `[tokens, hidden_size]`; there may be no tokens.
    pub fn input(&self, source: &Source) -> Result<Vec<f32>> {
        let (path, name) = match &self.input {
            Some(text) => place(text, "input"),
            None => self.place(source, "input"),
        };
        hidden_states(&path, &name, source.config(), None)
    }

    /// The gradient of the output of `tokens` tokens: from `given`, or from where the input comes from.
    pub fn grad_output(&self, given: Option<&str>, source: &Source, tokens: usize) -> Result<Vec<f32>> {
        const NAME: &str = "grad_output";
        let (path, name) = match (given, &self.input) {
            (Some(text), _) => place(text, NAME),
            (None, Some(text)) => (place(text, NAME).0, NAME.into()),
            (None, None) => self.place(source, NAME),
        };
        hidden_states(&path, &name, source.config(), Some(tokens))
    }

    /// What `--input` does not name.
    fn place(&self, source: &Source, name: &str) -> (PathBuf, String) {
        match &self.expected {
            Some(path) => (path.clone(), format!("{}.{name}", source.layer().number())),
            None => (source.path.clone(), name.into()),
        }
    }
}

/// A file and the name of a tensor in it, which follows a colon.
fn place(text: &str, name: &str) -> (PathBuf, String) {
    match text.rsplit_once(':') {
        Some((path, name)) if !name.is_empty() && !Path::new(text).exists() => (path.into(), name.into()),
        _ => (text.into(), name.into()),
    }
}

fn hidden_states(path: &Path, name: &str, config: &MemoryConfig, tokens: Option<usize>) -> Result<Vec<f32>> {
    let tensors = Tensors::open(path)?;
    let states = || load::shaped(&tensors.floats(name)?, name, config.hidden_size, tokens);
    states().map_err(|failure: Failure| failure.of_file(path))
}
