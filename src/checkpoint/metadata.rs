//! The configuration in a checkpoint's metadata: text entries under the names of the PyTorch releases.

use std::collections::BTreeMap;

use crate::{Dimensions, Error, Kind, MemoryConfig, Norm, Result, Scores};

/// What [`config`] reads and [`entries`] writes.
type Metadata = BTreeMap<String, String>;

/// The configuration that `metadata` describes.
pub(super) fn config(metadata: &Metadata) -> Result<MemoryConfig> {
    let kind = kind(metadata)?;
    let optional = |key| match metadata.get(key) {
        None if kind.capabilities().scores == Scores::Additive => Ok(1),
        _ => size(metadata, key),
    };
    let expansion = optional("value_expand_time")?;
    MemoryConfig::new(Dimensions {
        capabilities: kind.capabilities(),
        hidden_size: size(metadata, "hidden_size")?,
        heads: size(metadata, "head")?,
        side_keys: size(metadata, "knum")? * root(metadata, expansion)?,
        key_dim: size(metadata, "kdim")?,
        tucker_rank: optional("tucker_rank")?,
        top_m: size(metadata, "knn")?,
        cores: optional("tucker_multihead")?,
        expansion,
        value_dim: size(metadata, "vdim")?,
        norm: norm(metadata)?,
        norm_eps: epsilon(metadata)?,
    })
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
    let root = config.expansion.isqrt();
    if root * root != config.expansion {
        let value = config.expansion.to_string();
        return Err(Error::Config { what: "expansion", value, expected: "a square, to be written to a checkpoint" });
    }
    let mut entries = vec![
        ("kind", kind_name(kind).to_string()),
        ("hidden_size", config.hidden_size.to_string()),
        ("head", config.heads.to_string()),
        // root² divides side_keys², so root divides side_keys.
        ("knum", (config.side_keys / root).to_string()),
        ("kdim", config.key_dim.to_string()),
        ("knn", config.top_m.to_string()),
        ("vdim", config.value_dim.to_string()),
        ("norm", norm_name(config.norm).to_string()),
        ("norm_eps", config.norm_eps.to_string()),
    ];
    // A file without them has 1.
    if kind == Kind::UltraMem || config.expansion > 1 {
        entries.push(("tucker_rank", config.tucker_rank.to_string()));
        entries.push(("tucker_multihead", config.cores.to_string()));
        entries.push(("value_expand_time", config.expansion.to_string()));
    }
    Ok(entries.into_iter().map(|(key, text)| (key.to_string(), text)).collect())
}

/// The largest size that an entry may hold: no limit of [`MemoryConfig::new`] is higher, and the product of two still
/// fits a usize.
const MAX_SIZE: u64 = 1 << 31;

fn size(metadata: &Metadata, key: &str) -> Result<usize> {
    let text = get(metadata, key)?;
    match text.parse::<u64>() {
        Ok(number) if (1..=MAX_SIZE).contains(&number) => Ok(number as usize),
        _ => Err(unexpected(key, text, &format!("a whole number from 1 to {MAX_SIZE}"))),
    }
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

fn kind(metadata: &Metadata) -> Result<Kind> {
    let text = get(metadata, "kind")?;
    if let Some(kind) = Kind::ALL.into_iter().find(|&kind| kind_name(kind) == text) {
        return Ok(kind);
    }
    let expected = "ultramem_v1, memory_plus or pkm";
    Err(if text == "ultramem_v2" {
        let problem = format!("is {text:?}, a layer that is not supported yet; expected {expected}");
        Error::Metadata { key: "kind".into(), problem }
    } else {
        unexpected("kind", text, expected)
    })
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::UltraMem => "ultramem_v1",
        Kind::MemoryPlus => "memory_plus",
        Kind::ProductKey => "pkm",
    }
}

fn norm(metadata: &Metadata) -> Result<Norm> {
    let text = get(metadata, "norm")?;
    let norms = [Norm::Rms, Norm::Layer];
    let found = norms.into_iter().find(|&norm| norm_name(norm) == text);
    found.ok_or_else(|| unexpected("norm", text, "rms or default"))
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
