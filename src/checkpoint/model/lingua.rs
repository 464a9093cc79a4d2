//! Layers of facebookresearch/memory, which is built on lingua, from settings and tensors.

use super::super::{LinguaSettings, ProductKeySettings, Settings, metadata::Lingua};
use super::agree::{Part, agree, needed};
use crate::Dimensions;
use crate::weights::names::Form;

type Result<T> = std::result::Result<T, String>;

/// Tensors that a layer may have or not, as a file of one layer calls them.
const VALUE_PROJ: &str = "layer.value_proj.weight";
const SWILU: &str = "layer.swilu_projection.weight";
const GATING: &str = "layer.gating.weight";
const PEER_VALUES: &str = "layer.values_u.weight";

/// Whether the layers of a model with these settings look up in one table.
pub(super) fn shares_tables(settings: &Settings) -> bool {
    match settings {
        Settings::Lingua(LinguaSettings { productkey_args: Some(memory), .. }) => shares_values(memory),
        Settings::Lingua(_) | Settings::Olmo(_) => false,
    }
}

/// As the trainer does if nothing is said.
fn shares_values(settings: &ProductKeySettings) -> bool {
    settings.mem_share_values.unwrap_or(true)
}

/// The dimensions of a layer.
pub(super) fn dimensions(settings: &LinguaSettings, part: &Part<'_>) -> Result<Dimensions> {
    let layer = part.layer();
    if part.found.form != Form::Lingua {
        return Err(format!("the settings are lingua's, but the names of {layer} are OLMo's"));
    }
    let memory = needed("productkey_args", settings.productkey_args.as_ref())?;
    let [_, hidden_size] = part.sizes("layer.query_proj.query_mlps.0.weight")?;
    agree("dim", Some(settings.dim), hidden_size, || format!("query_proj of {layer} is {hidden_size} wide"))?;
    let peer = flag("peer_variant", memory.peer_variant, part, PEER_VALUES)?;
    let swilu_projection = match peer {
        true => memory.swilu_projection.unwrap_or(false),
        false => flag("swilu_projection", memory.swilu_projection, part, SWILU)?,
    };
    let gated = flag("mem_gated", memory.mem_gated, part, GATING)?;
    let (heads, n_keys, k_dim) = keys(memory, peer, part)?;
    let v_dim = value_dim(memory, hidden_size, peer, swilu_projection, part)?;
    let lingua = Lingua {
        hidden_size,
        n_keys,
        heads,
        knn: needed("mem_knn", memory.mem_knn)?,
        k_dim,
        v_dim,
        swilu_projection,
        gated,
        peer,
        shares_values: shares_values(memory),
    };
    lingua.dimensions().map_err(|error| format!("{layer}: {error}"))
}

/// What a setting says, or the tensor that it makes, which are both there or neither.
fn flag(setting: &str, said: Option<bool>, part: &Part<'_>, tensor: &str) -> Result<bool> {
    let found = part.has(tensor);
    let has = if found { "a" } else { "no" };
    agree(setting, said, found, || format!("{} has {has} tensor {}", part.layer(), tensor.trim_start_matches("layer.")))
}

/// Heads, keys of a side, and width of a key of both sides.
fn keys(settings: &ProductKeySettings, peer: bool, part: &Part<'_>) -> Result<(usize, usize, usize)> {
    let layer = part.layer();
    let [keys, key_dim] = part.sizes("layer.keys")?;
    let [rows, _] = part.sizes(table(peer))?;
    let n_keys = rows.isqrt();
    if n_keys == 0 || n_keys.saturating_mul(n_keys) != rows {
        return Err(format!("values of {layer} have {rows} rows, expected a square number"));
    }
    let k_dim = key_dim.saturating_mul(2);
    agree("mem_k_dim", settings.mem_k_dim, k_dim, || {
        format!("keys of {layer} are {key_dim} wide, {k_dim} with both sides")
    })?;
    agree("mem_n_keys", settings.mem_n_keys, n_keys, || {
        format!("values of {layer} have {rows} rows, {n_keys} keys a side")
    })?;
    let heads = keys / n_keys.saturating_mul(2);
    if heads.saturating_mul(n_keys).saturating_mul(2) != keys {
        return Err(format!("keys of {layer} have {keys} rows, expected a multiple of two sides of {n_keys}"));
    }
    agree("mem_heads", settings.mem_heads, heads, || {
        format!("keys of {layer} have {keys} rows, {heads} heads of two sides of {n_keys}")
    })?;
    Ok((heads, n_keys, k_dim))
}

fn table(peer: bool) -> &'static str {
    if peer { "layer.values_v.weight" } else { "layer.values.weight" }
}

/// The width of a value if the settings give it one of its own.
fn value_dim(
    settings: &ProductKeySettings,
    hidden_size: usize,
    peer: bool,
    swilu_projection: bool,
    part: &Part<'_>,
) -> Result<Option<usize>> {
    let layer = part.layer();
    let [_, found] = part.sizes(table(peer))?;
    let projects = part.has(VALUE_PROJ);
    let own = found != hidden_size || projects && !swilu_projection;
    let Some(said) = settings.mem_v_dim else { return Ok(own.then_some(found)) };
    let said_width = usize::try_from(said).ok().filter(|&width| width > 0);
    if said_width.unwrap_or(hidden_size) != found {
        let meant = if said_width.is_none() { format!(", dim, {hidden_size}") } else { String::new() };
        return Err(format!("mem_v_dim is {said}{meant}, but values of {layer} are {found} wide"));
    }
    let expected = !peer && (swilu_projection || said_width.is_some());
    if projects != expected {
        let has = if projects { "a" } else { "no" };
        return Err(format!("mem_v_dim is {said}, but {layer} has {has} tensor value_proj.weight"));
    }
    Ok(said_width)
}
