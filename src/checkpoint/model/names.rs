//! Which tensors of a model are a memory layer's.

use std::collections::BTreeMap;

use super::super::{Tensors, files::shown};
use crate::Weight;
use crate::weights::names::{Form, LINGUA_LAYER, SHARED};

/// What wrappers of modules put into the names of tensors.
const WRAPPERS: [&str; 5] = ["model", "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];
const KEYS: &str = "keys";
/// What the names of a layer's query begin with in a release.
const QUERIES: [(Form, &str); 2] = [(Form::Olmo, "query_proj.weight"), (Form::Lingua, "query_proj.query_mlps.")];
/// Lingua's tables: of Memory+, and of PEER.
const LINGUA_TABLES: [&str; 3] = ["values.weight", "values_u.weight", "values_v.weight"];

/// `name` without what wrappers put into it.
pub(super) fn stripped(name: &str) -> String {
    name.split('.').filter(|part| !WRAPPERS.contains(part)).collect::<Vec<_>>().join(".")
}

/// The names of a model's tensors, each by what it is without wrappers.
pub(super) struct Names<'a>(BTreeMap<String, &'a str>);

/// A layer as its tensors tell.
pub(super) struct Found {
    /// What all names begin with, without wrappers.
    pub(super) name: String,
    pub(super) number: usize,
    /// Whose names it has.
    pub(super) form: Form,
    /// What each tensor is called in the model, by its name in a file of one layer.
    pub(super) tensors: BTreeMap<String, String>,
}

impl<'a> Names<'a> {
    pub(super) fn of(tensors: &'a Tensors) -> Result<Self, String> {
        let mut names = BTreeMap::new();
        for name in tensors.names() {
            if let Some(other) = names.insert(stripped(name), name) {
                let (one, two) = (shown(other), shown(name));
                return Err(format!("tensors {one} and {two} have the same name but for wrappers"));
            }
        }
        Ok(Self(names))
    }

    /// The layers, in the order of their numbers.
    pub(super) fn layers(&self) -> Result<Vec<Found>, String> {
        let prefixes: Vec<&str> = self.0.keys().filter_map(|name| layer_with_keys(name)).collect();
        let forms = prefixes.into_iter().filter_map(|prefix| Some((prefix, self.form(prefix)?)));
        let forms: Vec<_> = forms.collect();
        let alone = forms.len() == 1;
        let mut layers = Vec::new();
        for (prefix, form) in forms {
            let name = prefix.trim_end_matches('.').to_string();
            let Some(number) = number(prefix).or(alone.then_some(0)) else {
                return Err(format!("memory layer {} has no number in its name", shown(&name)));
            };
            layers.push(Found { name, number, form, tensors: self.tensors(prefix, form) });
        }
        layers.sort_by_key(|layer| layer.number);
        Ok(layers)
    }

    /// Whose layer it is whose names begin with `prefix`; None if it is no memory layer.
    fn form(&self, prefix: &str) -> Option<Form> {
        let has = |query: &str| self.under(&format!("{prefix}{query}")).next().is_some();
        QUERIES.into_iter().find(|(_, query)| has(query)).map(|(form, _)| form)
    }

    /// All names that begin with `prefix`, which is cut off.
    fn under(&self, prefix: &str) -> impl Iterator<Item = (&str, &'a str)> {
        let names = self.0.range(prefix.to_string()..);
        let prefix = prefix.to_string();
        names.map_while(move |(name, real)| Some((name.strip_prefix(prefix.as_str())?, *real)))
    }

    /// The tensors of the layer whose names begin with `prefix`.
    fn tensors(&self, prefix: &str, form: Form) -> BTreeMap<String, String> {
        let single = |name: &str| match form {
            Form::Olmo => name.to_string(),
            Form::Lingua => format!("{LINGUA_LAYER}{name}"),
        };
        let mut tensors: BTreeMap<_, _> =
            self.under(prefix).map(|(name, real)| (single(name), real.to_string())).collect();
        for table in [Weight::Values, Weight::PreValues].map(Weight::olmo) {
            let shared = format!("{SHARED}{table}");
            if form == Form::Olmo && !tensors.contains_key(table) && !tensors.contains_key(&shared) {
                tensors.extend(self.shared_table(prefix, &shared).map(|real| (shared, real.to_string())));
            }
        }
        tensors
    }

    /// The table `name` in a module that stands above the layer, the nearest one.
    fn shared_table(&self, prefix: &str, name: &str) -> Option<&'a str> {
        let above = prefix.char_indices().rev().filter(|&(_, letter)| letter == '.').map(|(at, _)| &prefix[..=at]);
        let mut above = above.chain([""]);
        above.find_map(|above| self.0.get(&format!("{above}{name}")).copied())
    }
}

/// What the names of a layer begin with, `name` being its keys; None if it is another tensor.
fn layer_with_keys(name: &str) -> Option<&str> {
    let prefix = name.strip_suffix(KEYS)?;
    (prefix.is_empty() || prefix.ends_with('.')).then_some(prefix)
}

/// The last number in a name.
fn number(prefix: &str) -> Option<usize> {
    prefix.rsplit('.').find_map(|part| part.parse().ok())
}

/// Gives lingua's layers without a table the first one's, which is all that some savers leave of a table that layers share.
pub(super) fn lend_tables(layers: &mut [Found]) {
    let names = LINGUA_TABLES.map(|table| format!("{LINGUA_LAYER}{table}"));
    let tables = |layer: &Found| -> BTreeMap<String, String> {
        let tables = layer.tensors.iter().filter(|(name, _)| layer.form == Form::Lingua && names.contains(name));
        tables.map(|(name, real)| (name.clone(), real.clone())).collect()
    };
    let Some(lent) = layers.iter().map(tables).find(|tables| !tables.is_empty()) else { return };
    for layer in layers.iter_mut().filter(|layer| layer.form == Form::Lingua) {
        if tables(layer).is_empty() {
            layer.tensors.extend(lent.clone());
        }
    }
}
