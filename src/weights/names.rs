//! The weights of a layer, and what a configuration calls for: which of them there are, their shapes, and their names in checkpoints.

use std::ops::{Index, IndexMut};

use crate::{Kind, MemoryConfig};

/// A tensor that a layer learns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Weight {
    /// `W_q` `[query_pairs · 2 · key_dim, hidden_size]`.
    QueryProj,
    /// `b_q` `[query_pairs · 2 · key_dim]`.
    QueryBias,
    /// `[key_dim]`.
    QueryNorm,
    /// `[heads, 2, side_keys, key_dim, tucker_rank]`. Files with additive scores leave the last dimension out; lingua's make one of the first three.
    Keys,
    /// `[key_dim]`. OLMo's Memory+ has it, though its keys are taken as they are.
    KeysNorm,
    /// The Tucker core of each score, f32 `[cores, heads, tucker_rank, tucker_rank]`; in files a tensor a core.
    Cores,
    /// `W_p` `[pre_dim, hidden_size]`.
    PreValuesProj,
    /// `P` `[table_rows, pre_dim]`.
    PreValues,
    /// `V` `[table_rows, value_dim]`.
    Values,
    /// `W_o` `[hidden_size, pooled_blocks · value_dim]`.
    ValuesProj,
    /// `b_o` `[hidden_size]`.
    ValuesBias,
    /// `W_g` `[value_dim, hidden_size]`, through silu.
    GateProj,
    /// `b_g` `[value_dim]`.
    GateBias,
    /// `w` `[1, hidden_size]`, through the sigmoid that the output is multiplied by.
    OutputGate,
    /// `b` `[1]`.
    OutputGateBias,
}

/// How many weights there are.
const COUNT: usize = 15;

impl Weight {
    /// Every weight that a layer can have.
    pub const ALL: [Self; COUNT] = [
        Self::QueryProj,
        Self::QueryBias,
        Self::QueryNorm,
        Self::Keys,
        Self::KeysNorm,
        Self::Cores,
        Self::PreValuesProj,
        Self::PreValues,
        Self::Values,
        Self::ValuesProj,
        Self::ValuesBias,
        Self::GateProj,
        Self::GateBias,
        Self::OutputGate,
        Self::OutputGateBias,
    ];

    /// Whether it is a table, of which a token reads some rows: its gradient is sparse.
    pub const fn is_table(self) -> bool {
        matches!(self, Self::Values | Self::PreValues)
    }

    /// Whether a layer in half precision keeps it in f32: norms, biases and the core, which are small.
    pub const fn is_full(self) -> bool {
        matches!(
            self,
            Self::QueryNorm
                | Self::KeysNorm
                | Self::Cores
                | Self::QueryBias
                | Self::ValuesBias
                | Self::GateBias
                | Self::OutputGateBias
        )
    }

    /// Whether it takes part in what a layer of `config` computes: it has a gradient.
    pub fn learns(self, config: &MemoryConfig) -> bool {
        self.is_in(config) && (self != Self::KeysNorm || config.capabilities.normalises_keys)
    }

    /// Whether a layer of `config` has it.
    pub fn is_in(self, config: &MemoryConfig) -> bool {
        let of = &config.capabilities;
        match self {
            Self::QueryProj | Self::Keys | Self::Values => true,
            Self::QueryBias => of.biased,
            Self::QueryNorm => of.normalises_queries,
            // A release whose queries are normalised makes the keys' norm, too, be it used or not.
            Self::KeysNorm => of.normalises_keys || of.normalises_queries,
            Self::Cores => config.tucker(),
            Self::PreValuesProj => of.weigh.is_some_and(|weigh| weigh.projected),
            Self::PreValues => of.weigh.is_some(),
            Self::ValuesProj => of.projects,
            Self::ValuesBias => of.projects && of.biased,
            Self::GateProj => of.gated,
            Self::GateBias => of.gated && of.biased,
            Self::OutputGate | Self::OutputGateBias => of.output_gated,
        }
    }

    /// Its shape in a layer of `config`, as a file has it; `[cores, heads, tucker_rank, tucker_rank]` of the cores.
    pub fn shape(self, config: &MemoryConfig) -> Vec<usize> {
        let (hidden_size, queries) = (config.hidden_size, config.query_pairs() * 2 * config.key_dim);
        match self {
            Self::QueryProj => vec![queries, hidden_size],
            Self::QueryBias => vec![queries],
            Self::QueryNorm | Self::KeysNorm => vec![config.key_dim],
            Self::Keys => keys_shape(config),
            Self::Cores => vec![config.cores, config.heads, config.tucker_rank, config.tucker_rank],
            Self::PreValuesProj => vec![config.pre_dim, hidden_size],
            Self::PreValues => vec![config.table_rows(), config.pre_dim],
            Self::Values => vec![config.table_rows(), config.value_dim],
            Self::ValuesProj => vec![hidden_size, config.pooled_dim()],
            Self::ValuesBias => vec![hidden_size],
            Self::GateProj => vec![config.value_dim, hidden_size],
            Self::GateBias => vec![config.value_dim],
            Self::OutputGate => vec![1, hidden_size],
            Self::OutputGateBias => vec![1],
        }
    }

    /// Its name in a file of one layer of `config`; the cores' is what those of each core begin with.
    pub fn name(self, config: &MemoryConfig) -> String {
        match Form::of(config) {
            Form::Olmo if self.is_table() && config.capabilities.shares_table => format!("{SHARED}{}", self.olmo()),
            Form::Olmo => self.olmo().to_string(),
            Form::Lingua => format!("{LINGUA_LAYER}{}", self.lingua(config)),
        }
    }

    /// Its name within a layer of OLMo's.
    pub(crate) const fn olmo(self) -> &'static str {
        match self {
            Self::QueryProj => "query_proj.weight",
            Self::QueryBias => "query_proj.bias",
            Self::QueryNorm => "query_norm.weight",
            Self::Keys => "keys",
            Self::KeysNorm => "keys_norm.weight",
            Self::Cores => "tucker_core",
            Self::PreValuesProj => "pre_values_proj.weight",
            Self::PreValues => "pre_values_for_look_up",
            Self::Values => "values_for_look_up",
            Self::ValuesProj => "values_proj.weight",
            Self::ValuesBias => "values_proj.bias",
            Self::GateProj => "swilu_projection.weight",
            Self::GateBias => "swilu_projection.bias",
            Self::OutputGate => "gating.weight",
            Self::OutputGateBias => "gating.bias",
        }
    }

    /// Its name within a layer of lingua's.
    pub(crate) fn lingua(self, config: &MemoryConfig) -> &'static str {
        match self {
            Self::QueryProj => "query_proj.query_mlps.0.weight",
            Self::QueryBias => "query_proj.query_mlps.0.bias",
            Self::PreValues => "values_u.weight",
            Self::Values if config.capabilities.weigh.is_some() => "values_v.weight",
            Self::Values => "values.weight",
            Self::ValuesProj => "value_proj.weight",
            Self::ValuesBias => "value_proj.bias",
            other => other.olmo(),
        }
    }
}

/// One `T` for each weight that a layer can have.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PerWeight<T>([T; COUNT]);

impl<T> PerWeight<T> {
    /// What `make` makes of each weight.
    pub fn from_fn(make: impl FnMut(Weight) -> T) -> Self {
        Self(Weight::ALL.map(make))
    }

    /// What `change` makes of each.
    pub fn map<U>(self, change: impl FnMut(T) -> U) -> PerWeight<U> {
        PerWeight(self.0.map(change))
    }
}

impl<T> Index<Weight> for PerWeight<T> {
    type Output = T;

    fn index(&self, weight: Weight) -> &T {
        &self.0[weight as usize]
    }
}

impl<T> IndexMut<Weight> for PerWeight<T> {
    fn index_mut(&mut self, weight: Weight) -> &mut T {
        &mut self.0[weight as usize]
    }
}

/// Whose names and shapes a file has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// The authors' release of UltraMem, built into OLMo.
    Olmo,
    /// facebookresearch/memory, built into lingua.
    Lingua,
}

impl Form {
    pub(crate) fn of(config: &MemoryConfig) -> Self {
        match config.kind() {
            Some(Kind::LinguaMemoryPlus | Kind::Peer) => Self::Lingua,
            _ => Self::Olmo,
        }
    }
}

/// What the names of one lingua layer's tensors begin with.
pub(crate) const LINGUA_LAYER: &str = "layer.";
/// What the names of OLMo's shared tables begin with.
pub(crate) const SHARED: &str = "full_memory_layer.";
pub(crate) const CORE_U: &str = "tucker_core_u";
pub(crate) const CORE_V: &str = "tucker_core_v";
pub(crate) const SHUFFLE: &str = "shuffle_index";

/// The name of one core's tensor.
pub(crate) fn core_name(core: usize) -> String {
    format!("{}.{core}", Weight::Cores.olmo())
}

fn keys_shape(config: &MemoryConfig) -> Vec<usize> {
    let (heads, side_keys, key_dim) = (config.heads, config.side_keys, config.key_dim);
    match Form::of(config) {
        Form::Lingua => vec![heads * 2 * side_keys, key_dim],
        Form::Olmo if config.tucker() => vec![heads, 2, side_keys, key_dim, config.tucker_rank],
        Form::Olmo => vec![heads, 2, side_keys, key_dim],
    }
}
