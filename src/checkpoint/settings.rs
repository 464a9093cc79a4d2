//! What a model was trained with, as far as its memory layers go: the files that trainers leave beside its tensors.

use std::path::Path;

use serde::{
    Deserialize,
    de::{DeserializeOwned, IgnoredAny},
};

use super::{
    files::{self, problem},
    header::one_line,
};
use crate::Result;

/// The settings of the memory layers of a model, under the names of its trainer. All others are passed over.
#[derive(Debug, Clone, PartialEq)]
pub enum Settings {
    /// Of the authors' UltraMem release, which is built on OLMo.
    Olmo(OlmoSettings),
    /// Of facebookresearch/memory, which is built on lingua.
    Lingua(LinguaSettings),
}

/// The entry `model` of OLMo's `config.yaml`. A model without memory layers, or one older than a setting, has none of it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct OlmoSettings {
    /// Width of the model.
    pub d_model: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Kind of all norms: `rms`, `default`, …
    pub layer_norm_type: Option<String>,
    /// Epsilon of all norms.
    pub layer_norm_eps: Option<f64>,
    /// Kind of the memory layers: `ultramem_v1`, `ultramem_v2`, `memory_plus`, …
    pub mem_type: Option<String>,
    /// Between which blocks the memory layers are: `1:2/2:3`, `full`, …
    pub mem_insert_way: Option<String>,
    /// Square root of the rows of a layer's table.
    pub mem_knum: Option<usize>,
    /// Width of a key of one side.
    pub mem_kdim: Option<usize>,
    /// Width of a value.
    pub mem_vdim: Option<usize>,
    /// Width of a pre-value, in UltraMemV2.
    pub mem_pre_vdim: Option<usize>,
    /// Slots that a head selects for a token.
    pub mem_knn: Option<usize>,
    /// Number of heads.
    pub mem_head: Option<usize>,
    /// Weight of the loss that holds the Tucker cores near rank 1.
    pub mem_tucker_rank_penalty: Option<f64>,
    /// Whether each Tucker rank has its own queries.
    pub mem_q_for_each_tucker_rank: Option<bool>,
    /// Share of the model's rows that one layer sees.
    pub mem_share_ratio: Option<f64>,
    /// How many virtual blocks the table has.
    pub mem_value_expand_time: Option<usize>,
    /// How many times the keys are more than the table's side.
    pub mem_key_expand_time: Option<usize>,
    /// A factor of the last selection; 1 in every model known.
    pub mem_final_top_expand_time: Option<usize>,
    /// Whether there is a GELU, in UltraMemV2.
    pub mem_use_glu_act: Option<bool>,
}

/// The model's part of lingua's `params.json`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct LinguaSettings {
    /// Width of the model.
    pub dim: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// The memory layers, if the model knows of any.
    pub productkey_args: Option<ProductKeySettings>,
}

/// The entry `productkey_args` of lingua's settings. What is missing has the trainer's default.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ProductKeySettings {
    /// Whether the model has memory layers.
    pub is_enabled: Option<bool>,
    /// The blocks whose feed-forward part is a memory layer: `1,3`.
    pub layers: Option<String>,
    /// Keys of a side.
    pub mem_n_keys: Option<usize>,
    /// Number of heads.
    pub mem_heads: Option<usize>,
    /// Slots that a head selects for a token.
    pub mem_knn: Option<usize>,
    /// Whether all layers look up in one table.
    pub mem_share_values: Option<bool>,
    /// Width of a key of both sides together.
    pub mem_k_dim: Option<usize>,
    /// Width of a value; that of the model if it is not positive.
    pub mem_v_dim: Option<i64>,
    /// Whether the pooled value is gated by a projection of the input.
    pub swilu_projection: Option<bool>,
    /// Whether the output is multiplied by a gate of one number a token.
    pub mem_gated: Option<bool>,
    /// Whether a row is a PEER expert.
    pub peer_variant: Option<bool>,
}

/// The files that trainers leave beside a model.
const NAMES: [&str; 2] = ["config.yaml", "params.json"];
/// The longest file of settings that is read.
const LONGEST: u64 = 16_000_000;

impl Settings {
    /// The settings in the folder `path`, or beside the file `path`: in `config.yaml` or `params.json`. None if neither is there.
    ///
    /// # Errors
    /// [`Error::Model`](crate::Error::Model) if both are there, else as [`Settings::read`].
    pub fn find(path: impl AsRef<Path>) -> Result<Option<Self>> {
        let path = path.as_ref();
        let folder = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
        let [yaml, json] = NAMES.map(|name| folder.join(name));
        match (yaml.is_file(), json.is_file()) {
            (true, true) => Err(problem(folder, format!("holds {} and {}: name one", NAMES[0], NAMES[1]))),
            (true, false) => Self::read(yaml).map(Some),
            (false, true) => Self::read(json).map(Some),
            (false, false) => Ok(None),
        }
    }

    /// The settings in `file`: JSON if it is called `.json`, else YAML. What it holds says whose settings they are; they may be all that a run
    /// was started with, the model's under `model`, or the model's alone.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) if the file can't be read, [`Error::Model`](crate::Error::Model) if it is broken, or holds neither
    /// OLMo's settings nor lingua's.
    pub fn read(file: impl AsRef<Path>) -> Result<Self> {
        let file = file.as_ref();
        let text = files::text(file, LONGEST)?;
        let form = if file.extension().is_some_and(|extension| extension == "json") { Form::Json } else { Form::Yaml };
        form.settings(&text).map_err(|text| problem(file, text))
    }
}

/// How settings are written.
#[derive(Clone, Copy)]
enum Form {
    Json,
    Yaml,
}

/// Settings under `model`.
#[derive(Deserialize)]
struct Run<T> {
    model: T,
}

/// Which settings there are: the width of the model has another name in each.
#[derive(Deserialize)]
struct Probe {
    d_model: Option<IgnoredAny>,
    dim: Option<IgnoredAny>,
}

impl Form {
    fn settings(self, text: &str) -> std::result::Result<Settings, String> {
        let whole = self.parse::<Probe>(text)?;
        if whole.d_model.is_some() {
            return self.parse(text).map(Settings::Olmo);
        }
        if whole.dim.is_some() {
            return self.parse(text).map(Settings::Lingua);
        }
        let unknown = |problem| format!("holds no settings of a model of OLMo (d_model) or lingua (dim): {problem}");
        let model = self.parse::<Run<Probe>>(text).map_err(unknown)?.model;
        if model.d_model.is_some() {
            return self.parse(text).map(|Run { model }| Settings::Olmo(model));
        }
        if model.dim.is_some() {
            return self.parse(text).map(|Run { model }| Settings::Lingua(model));
        }
        Err(unknown("neither is there, nor under model".into()))
    }

    fn parse<T: DeserializeOwned>(self, text: &str) -> std::result::Result<T, String> {
        match self {
            Self::Json => serde_json::from_str(text).map_err(|error| one_line(&error)),
            Self::Yaml => serde_saphyr::from_str(text).map_err(|error| one_line(error.without_snippet())),
        }
    }
}
