//! Layers of the authors' release, which is built on OLMo, from settings and tensors.

use super::super::{OlmoSettings, metadata};
use super::agree::{Part, agree, needed};
use crate::weights::names::{Form, core_name};
use crate::{Activation, Blocks, Capabilities, Dimensions, Kind, Norm, SharedSizes, Weigh, Weight};

type Result<T> = std::result::Result<T, String>;

/// The kinds that `mem_type` may name.
const KINDS: [Kind; 3] = [Kind::UltraMem, Kind::UltraMemV2, Kind::MemoryPlus];

/// The dimensions of a layer, one of `layers`.
pub(super) fn dimensions(settings: &OlmoSettings, layers: Option<usize>, part: &Part<'_>) -> Result<Dimensions> {
    if part.found.form != Form::Olmo {
        return Err(format!("the settings are OLMo's, but the names of {} are lingua's", part.layer()));
    }
    let name = needed("mem_type", settings.mem_type.as_deref())?;
    let kind = KINDS.into_iter().find(|&kind| metadata::kind_name(kind) == name);
    match settings.mem_final_top_expand_time {
        None | Some(1) => {}
        Some(other) => return Err(format!("mem_final_top_expand_time is {other}, expected 1")),
    }
    match kind {
        Some(Kind::UltraMem) => ultramem(settings, part),
        Some(Kind::UltraMemV2) => ultramem_v2(settings, layers, part),
        Some(Kind::MemoryPlus) => memory_plus(settings, part),
        _ => Err(format!("mem_type is {name:?}, expected ultramem_v1, ultramem_v2 or memory_plus")),
    }
}

/// UltraMem's blocks are as many as `values_proj` takes.
fn ultramem(settings: &OlmoSettings, part: &Part<'_>) -> Result<Dimensions> {
    let tucker = tucker(settings, part)?;
    let [rows, value_dim] = part.table(Weight::Values)?;
    check_rows(settings, rows, part)?;
    let [_, columns] = part.sizes(Weight::ValuesProj.olmo())?;
    let expansion = match columns.checked_div(value_dim) {
        Some(blocks) if blocks > 0 && blocks.saturating_mul(value_dim) == columns => blocks,
        _ => {
            let layer = part.layer();
            return Err(format!(
                "values_proj of {layer} takes {columns} columns, no multiple of its values' {value_dim}"
            ));
        }
    };
    let (slots, addresses) = (tucker.side_keys.saturating_mul(tucker.side_keys), rows.saturating_mul(expansion));
    if slots != addresses {
        let (layer, side_keys) = (part.layer(), tucker.side_keys);
        return Err(format!(
            "{layer} has {side_keys} keys a side, {slots} slots, but {rows} values in {expansion} blocks, {addresses} addresses"
        ));
    }
    Ok(Dimensions { capabilities: Kind::UltraMem.capabilities(), expansion, ..tucker })
}

fn ultramem_v2(settings: &OlmoSettings, layers: Option<usize>, part: &Part<'_>) -> Result<Dimensions> {
    if !settings.mem_q_for_each_tucker_rank.unwrap_or(false) {
        return Err("mem_q_for_each_tucker_rank is false, expected true for ultramem_v2".into());
    }
    let key_expand_time = needed("mem_key_expand_time", settings.mem_key_expand_time)?;
    let blocks = match needed("mem_value_expand_time", settings.mem_value_expand_time)? {
        1 => Blocks::Summed,
        blocks if blocks == key_expand_time.saturating_mul(key_expand_time) => Blocks::Apart,
        other => {
            return Err(format!(
                "mem_value_expand_time is {other}, expected 1 or the square of mem_key_expand_time, {key_expand_time}"
            ));
        }
    };
    let activation = if settings.mem_use_glu_act.unwrap_or(false) { Activation::Gelu } else { Activation::Identity };
    let [pre_rows, pre_dim] = part.table(Weight::PreValues)?;
    let [rows, _] = part.table(Weight::Values)?;
    let layer = part.layer();
    agree("mem_pre_vdim", settings.mem_pre_vdim, pre_dim, || format!("pre-values of {layer} are {pre_dim} wide"))?;
    let sizes = SharedSizes {
        knum: needed("mem_knum", settings.mem_knum)?,
        layers: needed("mem_insert_way", layers)?,
        layer: part.found.number,
        share_ratio: needed("mem_share_ratio", settings.mem_share_ratio)?,
        key_expand_time,
    };
    let weigh = Some(Weigh { projected: true, activation });
    let capabilities = Capabilities { blocks, weigh, ..Kind::UltraMemV2.capabilities() };
    let tucker = tucker(settings, part)?;
    let side_keys = tucker.side_keys;
    let dimensions = Dimensions { capabilities, pre_dim, ..tucker }.sharing(&sizes).map_err(in_words(&layer))?;
    let table = dimensions.shared.map_or(0, |shared| shared.rows);
    for (what, rows) in [("values", rows), ("pre-values", pre_rows)] {
        if rows != table {
            let SharedSizes { knum, layers, .. } = sizes;
            return Err(format!(
                "mem_knum {knum} and {layers} layers make {table} rows, but {what} of {layer} have {rows}"
            ));
        }
    }
    if dimensions.side_keys != side_keys {
        return Err(format!(
            "mem_knum {}, mem_share_ratio {} and mem_key_expand_time {key_expand_time} make {} keys a side, but keys of {layer} are {side_keys}",
            sizes.knum, sizes.share_ratio, dimensions.side_keys
        ));
    }
    Ok(dimensions)
}

fn memory_plus(settings: &OlmoSettings, part: &Part<'_>) -> Result<Dimensions> {
    let [heads, _, side_keys, key_dim] = part.sizes(Weight::Keys.olmo())?;
    let [rows, _] = part.table(Weight::Values)?;
    check_rows(settings, rows, part)?;
    let slots = side_keys.saturating_mul(side_keys);
    if slots != rows {
        return Err(format!("{} has {side_keys} keys a side, {slots} slots, but {rows} values", part.layer()));
    }
    let capabilities = Kind::MemoryPlus.capabilities();
    let sizes = Dimensions { capabilities, tucker_rank: 1, cores: 1, expansion: 1, ..Dimensions::default() };
    common(settings, part, Dimensions { heads, side_keys, key_dim, ..sizes })
}

/// What both UltraMems have, their capabilities and blocks left open.
fn tucker(settings: &OlmoSettings, part: &Part<'_>) -> Result<Dimensions> {
    let [heads, _, side_keys, key_dim, tucker_rank] = part.sizes(Weight::Keys.olmo())?;
    let [_, rank, _] = part.sizes(&core_name(0))?;
    let layer = part.layer();
    if rank != tucker_rank {
        return Err(format!("keys of {layer} have Tucker rank {tucker_rank}, but its cores have {rank}"));
    }
    let dimensions =
        Dimensions { heads, side_keys, key_dim, tucker_rank, cores: part.cores(), ..Dimensions::default() };
    common(settings, part, dimensions)
}

/// `sizes` with what all of OLMo's layers have, and what tensors and settings both tell compared.
fn common(settings: &OlmoSettings, part: &Part<'_>, sizes: Dimensions) -> Result<Dimensions> {
    let layer = part.layer();
    let Dimensions { heads, key_dim, .. } = sizes;
    let [_, hidden_size] = part.sizes(Weight::QueryProj.olmo())?;
    let [_, value_dim] = part.table(Weight::Values)?;
    agree("d_model", Some(settings.d_model), hidden_size, || format!("query_proj of {layer} is {hidden_size} wide"))?;
    agree("mem_kdim", settings.mem_kdim, key_dim, || format!("keys of {layer} are {key_dim} wide"))?;
    agree("mem_head", settings.mem_head, heads, || format!("keys of {layer} are of {heads} heads"))?;
    agree("mem_vdim", settings.mem_vdim, value_dim, || format!("values of {layer} are {value_dim} wide"))?;
    let eps = needed("layer_norm_eps", settings.layer_norm_eps)?;
    let top_m = needed("mem_knn", settings.mem_knn)?;
    Ok(Dimensions { hidden_size, value_dim, top_m, norm: norm(settings)?, norm_eps: eps as f32, ..sizes })
}

/// Checks that a table that no expansion makes smaller has `mem_knum²` rows.
fn check_rows(settings: &OlmoSettings, rows: usize, part: &Part<'_>) -> Result<()> {
    match settings.mem_knum {
        Some(knum) if knum.saturating_mul(knum) != rows => {
            let (layer, square) = (part.layer(), knum.saturating_mul(knum));
            Err(format!("mem_knum is {knum}, which makes {square} rows, but values of {layer} have {rows}"))
        }
        _ => Ok(()),
    }
}

fn norm(settings: &OlmoSettings) -> Result<Norm> {
    let name = needed("layer_norm_type", settings.layer_norm_type.as_deref())?;
    metadata::norm_called(name).ok_or_else(|| format!("layer_norm_type is {name:?}, expected rms or default"))
}

fn in_words(layer: &str) -> impl Fn(crate::Error) -> String {
    move |error| format!("{layer}: {error}")
}
