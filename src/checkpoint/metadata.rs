//! The configuration in a checkpoint's metadata: text entries under the names of the PyTorch releases.

use std::collections::BTreeMap;

use crate::{
    Activation, Blocks, Capabilities, Dimensions, Error, Kind, MemoryConfig, Norm, Result, Scores, SharedSizes,
    SharedTable, Weigh,
};

/// What [`config`] reads and [`entries`] writes.
type Metadata = BTreeMap<String, String>;

/// The entry that a file of one layer has, and no other.
pub(super) const KIND: &str = "kind";
/// The entry that says which layer of a model a file holds.
#[cfg(feature = "files")]
const LAYER: &str = "layer";

/// Which layer of a model it was, if `metadata` says so.
#[cfg(feature = "files")]
pub(super) fn layer(metadata: &Metadata) -> Result<Option<usize>> {
    metadata.contains_key(LAYER).then(|| count(metadata, LAYER)).transpose()
}

/// The configuration that `metadata` describes.
pub(super) fn config(metadata: &Metadata) -> Result<MemoryConfig> {
    let dimensions = match get(metadata, KIND)? {
        "lingua" => lingua(metadata)?,
        "ultramem_v2" => ultramem_v2(metadata)?,
        name => own_table(metadata, kind(name)?)?,
    };
    MemoryConfig::new(dimensions)
}

/// A layer whose table has its own rows.
fn own_table(metadata: &Metadata, kind: Kind) -> Result<Dimensions> {
    let capabilities = kind.capabilities();
    let optional = |key| match metadata.get(key) {
        None if capabilities.scores == Scores::Additive => Ok(1),
        _ => size(metadata, key),
    };
    let expansion = optional("value_expand_time")?;
    Ok(Dimensions {
        capabilities,
        side_keys: size(metadata, "knum")? * root(metadata, expansion)?,
        tucker_rank: optional("tucker_rank")?,
        cores: optional("tucker_multihead")?,
        expansion,
        ..common(metadata)?
    })
}

/// What all of OLMo's layers have.
fn common(metadata: &Metadata) -> Result<Dimensions> {
    Ok(Dimensions {
        hidden_size: size(metadata, "hidden_size")?,
        heads: size(metadata, "head")?,
        key_dim: size(metadata, "kdim")?,
        top_m: size(metadata, "knn")?,
        value_dim: size(metadata, "vdim")?,
        norm: norm(metadata)?,
        norm_eps: epsilon(metadata)?,
        ..Dimensions::default()
    })
}

fn ultramem_v2(metadata: &Metadata) -> Result<Dimensions> {
    let key_expand_time = size(metadata, "key_expand_time")?;
    let blocks = match size(metadata, "value_expand_time")? {
        1 => Blocks::Summed,
        blocks if blocks == key_expand_time.saturating_mul(key_expand_time) => Blocks::Apart,
        _ => {
            let text = get(metadata, "value_expand_time")?;
            return Err(unexpected("value_expand_time", text, "1, or the square of key_expand_time"));
        }
    };
    // The release needs a query pair for each rank.
    if !flag(metadata, "q_for_each_tucker_rank")? {
        return Err(unexpected("q_for_each_tucker_rank", "False", "True"));
    }
    let activation = if flag(metadata, "use_glu_act")? { Activation::Gelu } else { Activation::Identity };
    let dimensions = Dimensions {
        capabilities: Capabilities {
            blocks,
            weigh: Some(Weigh { projected: true, activation }),
            ..Kind::UltraMemV2.capabilities()
        },
        tucker_rank: size(metadata, "tucker_rank")?,
        cores: size(metadata, "tucker_multihead")?,
        pre_dim: size(metadata, "pre_vdim")?,
        ..common(metadata)?
    };
    if metadata.contains_key("side_keys") {
        let shared = SharedTable { rows: size(metadata, "table_rows")?, offset: count(metadata, "offset")? };
        let expansion = key_expand_time.saturating_mul(key_expand_time);
        return Ok(Dimensions {
            side_keys: size(metadata, "side_keys")?,
            expansion,
            shared: Some(shared),
            ..dimensions
        });
    }
    let share_ratio = get(metadata, "share_ratio")?;
    dimensions.sharing(&SharedSizes {
        knum: size(metadata, "knum")?,
        layers: size(metadata, "mem_layer_num")?,
        layer: count(metadata, "layer_id")?,
        share_ratio: share_ratio.parse().map_err(|_| unexpected("share_ratio", share_ratio, "a number"))?,
        key_expand_time,
    })
}

fn lingua(metadata: &Metadata) -> Result<Dimensions> {
    let hidden_size = size(metadata, "input_dim")?;
    let output_dim = size(metadata, "output_dim")?;
    if hidden_size != output_dim {
        return Err(unexpected("output_dim", &output_dim.to_string(), &format!("input_dim, {hidden_size}")));
    }
    let k_dim = size(metadata, "mem_k_dim")?;
    if k_dim % 2 != 0 {
        return Err(unexpected("mem_k_dim", &k_dim.to_string(), "an even number, half of it a side's"));
    }
    Lingua {
        hidden_size,
        n_keys: size(metadata, "mem_n_keys")?,
        heads: size(metadata, "mem_heads")?,
        knn: size(metadata, "mem_knn")?,
        k_dim,
        v_dim: if get(metadata, "mem_v_dim")? == "-1" { None } else { Some(size(metadata, "mem_v_dim")?) },
        swilu_projection: flag(metadata, "swilu_projection")?,
        gated: flag(metadata, "mem_gated")?,
        peer: flag(metadata, "peer_variant")?,
        shares_values: flag(metadata, "mem_share_values")?,
    }
    .dimensions()
}

/// What lingua's configuration says of a memory layer.
pub(super) struct Lingua {
    pub hidden_size: usize,
    pub n_keys: usize,
    pub heads: usize,
    pub knn: usize,
    /// Of both sides together.
    pub k_dim: usize,
    /// None: `hidden_size`, and no projection from another width.
    pub v_dim: Option<usize>,
    pub swilu_projection: bool,
    pub gated: bool,
    pub peer: bool,
    pub shares_values: bool,
}

impl Lingua {
    /// The layer.
    pub fn dimensions(&self) -> Result<Dimensions> {
        let kind = if self.peer { Kind::Peer } else { Kind::LinguaMemoryPlus };
        let gated = self.swilu_projection && !self.peer;
        let projects = !self.peer && (gated || self.v_dim.is_some());
        Ok(Dimensions {
            capabilities: Capabilities {
                gated,
                projects,
                output_gated: self.gated,
                shares_table: self.shares_values,
                ..kind.capabilities()
            },
            hidden_size: self.hidden_size,
            heads: self.heads,
            side_keys: self.n_keys,
            key_dim: self.k_dim / 2,
            tucker_rank: 1,
            top_m: self.knn,
            cores: 1,
            expansion: 1,
            value_dim: self.v_dim.unwrap_or(self.hidden_size),
            pre_dim: if self.peer { self.hidden_size } else { 0 },
            ..Dimensions::default()
        })
    }
}

/// The entries that describe `config`.
#[cfg(feature = "files")]
pub(super) fn entries(config: &MemoryConfig) -> Result<Metadata> {
    let Some(kind) = config.kind() else {
        let value = format!("{:?}", config.capabilities);
        return Err(Error::Config {
            what: "capabilities",
            value,
            expected: "those of a kind, to be written to a checkpoint",
        });
    };
    let entries = match kind {
        Kind::LinguaMemoryPlus | Kind::Peer => lingua_entries(config, kind),
        Kind::UltraMem | Kind::UltraMemV2 | Kind::MemoryPlus | Kind::ProductKey => olmo_entries(config, kind)?,
    };
    Ok(entries.into_iter().map(|(key, text)| (key.to_string(), text)).collect())
}

#[cfg(feature = "files")]
fn olmo_entries(config: &MemoryConfig, kind: Kind) -> Result<Vec<(&'static str, String)>> {
    let root = config.expansion.isqrt();
    if root * root != config.expansion {
        let value = config.expansion.to_string();
        return Err(Error::Config { what: "expansion", value, expected: "a square, to be written to a checkpoint" });
    }
    let mut entries = vec![
        (KIND, kind_name(kind).to_string()),
        ("hidden_size", config.hidden_size.to_string()),
        ("head", config.heads.to_string()),
        ("kdim", config.key_dim.to_string()),
        ("knn", config.top_m.to_string()),
        ("vdim", config.value_dim.to_string()),
        ("norm", norm_name(config.norm).to_string()),
        ("norm_eps", config.norm_eps.to_string()),
    ];
    // A file without them has 1.
    if config.tucker() || config.expansion > 1 {
        entries.push(("tucker_rank", config.tucker_rank.to_string()));
        entries.push(("tucker_multihead", config.cores.to_string()));
        entries.push(("value_expand_time", config.pooled_blocks().to_string()));
    }
    let Some(weigh) = config.capabilities.weigh else {
        // root² divides side_keys², so root divides side_keys.
        entries.push(("knum", (config.side_keys / root).to_string()));
        return Ok(entries);
    };
    entries.extend([
        ("side_keys", config.side_keys.to_string()),
        ("key_expand_time", root.to_string()),
        ("table_rows", config.table_rows().to_string()),
        ("offset", config.offset().to_string()),
        ("pre_vdim", config.pre_dim.to_string()),
        ("use_glu_act", flag_name(weigh.activation == Activation::Gelu)),
        ("q_for_each_tucker_rank", flag_name(true)),
    ]);
    Ok(entries)
}

#[cfg(feature = "files")]
fn lingua_entries(config: &MemoryConfig, kind: Kind) -> Vec<(&'static str, String)> {
    let of = &config.capabilities;
    let own_width = of.projects && !(of.gated && config.value_dim == config.hidden_size);
    vec![
        (KIND, "lingua".to_string()),
        ("input_dim", config.hidden_size.to_string()),
        ("output_dim", config.hidden_size.to_string()),
        ("mem_n_keys", config.side_keys.to_string()),
        ("mem_heads", config.heads.to_string()),
        ("mem_knn", config.top_m.to_string()),
        ("mem_k_dim", (2 * config.key_dim).to_string()),
        ("mem_v_dim", if own_width { config.value_dim.to_string() } else { "-1".to_string() }),
        ("swilu_projection", flag_name(of.gated)),
        ("mem_gated", flag_name(of.output_gated)),
        ("peer_variant", flag_name(kind == Kind::Peer)),
        ("mem_share_values", flag_name(of.shares_table)),
    ]
}

/// The largest size that an entry may hold: no limit of [`MemoryConfig::new`] is higher, and the product of two still
/// fits a usize.
const MAX_SIZE: u64 = 1 << 31;

fn size(metadata: &Metadata, key: &str) -> Result<usize> {
    whole(metadata, key, 1)
}

/// A size that may be 0.
fn count(metadata: &Metadata, key: &str) -> Result<usize> {
    whole(metadata, key, 0)
}

fn whole(metadata: &Metadata, key: &str, least: u64) -> Result<usize> {
    let text = get(metadata, key)?;
    match text.parse::<u64>() {
        Ok(number) if (least..=MAX_SIZE).contains(&number) => Ok(number as usize),
        _ => Err(unexpected(key, text, &format!("a whole number from {least} to {MAX_SIZE}"))),
    }
}

/// As Python writes it.
fn flag(metadata: &Metadata, key: &str) -> Result<bool> {
    match get(metadata, key)? {
        "True" | "true" => Ok(true),
        "False" | "false" => Ok(false),
        text => Err(unexpected(key, text, "True or False")),
    }
}

#[cfg(feature = "files")]
fn flag_name(flag: bool) -> String {
    if flag { "True" } else { "False" }.to_string()
}

/// `√expansion`: how many times `knum` goes into `side_keys`.
fn root(metadata: &Metadata, expansion: usize) -> Result<usize> {
    let root = expansion.isqrt();
    if root * root != expansion {
        return Err(unexpected("value_expand_time", get(metadata, "value_expand_time")?, "a square number"));
    }
    Ok(root)
}

fn epsilon(metadata: &Metadata) -> Result<f32> {
    let text = get(metadata, "norm_eps")?;
    text.parse().map_err(|_| unexpected("norm_eps", text, "a number"))
}

fn kind(name: &str) -> Result<Kind> {
    let kinds = [Kind::UltraMem, Kind::MemoryPlus, Kind::ProductKey];
    let found = kinds.into_iter().find(|&kind| kind_name(kind) == name);
    found.ok_or_else(|| unexpected(KIND, name, "ultramem_v1, ultramem_v2, memory_plus, pkm or lingua"))
}

pub(super) fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::UltraMem => "ultramem_v1",
        Kind::UltraMemV2 => "ultramem_v2",
        Kind::MemoryPlus => "memory_plus",
        Kind::ProductKey => "pkm",
        Kind::LinguaMemoryPlus | Kind::Peer => "lingua",
    }
}

fn norm(metadata: &Metadata) -> Result<Norm> {
    let text = get(metadata, "norm")?;
    norm_called(text).ok_or_else(|| unexpected("norm", text, "rms or default"))
}

/// The norm that OLMo calls `name`.
pub(super) fn norm_called(name: &str) -> Option<Norm> {
    [Norm::Rms, Norm::Layer].into_iter().find(|&norm| norm_name(norm) == name)
}

fn norm_name(norm: Norm) -> &'static str {
    match norm {
        Norm::Rms => "rms",
        Norm::Layer => "default",
    }
}

fn get<'a>(metadata: &'a Metadata, key: &str) -> Result<&'a str> {
    let missing = || Error::Metadata { key: key.into(), problem: "is missing".into() };
    metadata.get(key).map(String::as_str).ok_or_else(missing)
}

/// The error for an entry that holds `text`, of which a long one is shown in part.
fn unexpected(key: &str, text: &str, expected: &str) -> Error {
    const SHOWN: usize = 40;
    let shown: String = text.chars().take(SHOWN).collect();
    Error::Metadata { key: key.into(), problem: format!("is {shown:?}, expected {expected}") }
}
