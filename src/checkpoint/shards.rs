//! A model in several files with an index, and which files of a folder are the model.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    path::{Component, Path, PathBuf},
};

use memmap2::Mmap;
use serde::{
    Deserialize, Deserializer,
    de::{Error as _, MapAccess, Visitor},
};

use super::{
    files::{self, problem, shown},
    header::one_line,
    layout::Layout,
    part::Part,
};
use crate::{Error, Result};

/// What the name of an index ends with.
const INDEX: &str = ".index.json";
/// The longest index that is read.
const LONGEST_INDEX: u64 = 100_000_000;
/// What a folder's model is called when there is no index.
const MODELS: [&str; 4] = ["model.safetensors", "model.pt", "consolidated.pth", "pytorch_model.bin"];
/// What the names of files with tensors end with.
const EXTENSIONS: [&str; 4] = ["safetensors", "pt", "pth", "bin"];

/// The files that an index names, mapped, and the tensors with the file that each is in.
pub(super) type Shards = (Vec<Mmap>, BTreeMap<String, (usize, Layout)>);

/// Whether the file at `path` is called as an index is.
pub(super) fn is_index(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(INDEX))
}

/// The file in `folder` that is the model, or its index.
pub(super) fn in_folder(folder: &Path) -> Result<PathBuf> {
    let names = names(folder)?;
    let indices = names.iter().filter(|name| name.ends_with(INDEX));
    let models = names.iter().filter(|name| MODELS.contains(&name.as_str()));
    let others = names
        .iter()
        .filter(|name| EXTENSIONS.iter().any(|&extension| Path::new(name).extension().is_some_and(|e| e == extension)));
    for found in [indices.collect::<Vec<_>>(), models.collect(), others.collect()] {
        match found.as_slice() {
            [] => {}
            [name] => return Ok(folder.join(name)),
            [one, two, ..] => {
                let (one, two, count) = (shown(one), shown(two), found.len());
                return Err(problem(
                    folder,
                    format!("holds {count} files that could be the model, such as {one} and {two}: name one"),
                ));
            }
        }
    }
    Err(problem(folder, "holds no model: no index, no file called .safetensors, .pt, .pth or .bin"))
}

/// The names in `folder`, in order, but for those that are not text.
fn names(folder: &Path) -> Result<BTreeSet<String>> {
    let io = |source| Error::Io { path: folder.into(), source };
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(folder).map_err(io)? {
        names.extend(entry.map_err(io)?.file_name().into_string().ok());
    }
    Ok(names)
}

/// The files that the index at `path` names, which hold exactly the tensors that it says.
pub(super) fn open(path: &Path) -> Result<Shards> {
    let text = files::text(path, LONGEST_INDEX)?;
    let parse = |error| problem(path, format!("is no index of a model: {}", one_line(&error)));
    let Index { weight_map: Places(places) } = serde_json::from_str(&text).map_err(parse)?;
    let (mut files, mut tensors) = (Vec::new(), BTreeMap::new());
    let shards: BTreeSet<&String> = places.values().collect();
    for shard in shards {
        let file = path.with_file_name(checked(shard).map_err(|text| problem(path, text))?);
        let part = Part::open(&file)?;
        for (name, layout) in part.tensors {
            check_place(&name, shard, places.get(&name)).map_err(|text| problem(path, text))?;
            tensors.insert(name, (files.len(), layout));
        }
        files.push(part.map);
    }
    match places.iter().find(|&(name, _)| !tensors.contains_key(name)) {
        Some((name, shard)) => {
            Err(problem(path, format!("says that tensor {} is in {}, which lacks it", shown(name), shown(shard))))
        }
        None => Ok((files, tensors)),
    }
}

/// The name of a shard, if it is one inside of the index's folder.
fn checked(shard: &str) -> std::result::Result<&str, String> {
    let inside = Path::new(shard).components().all(|part| matches!(part, Component::Normal(_)));
    if shard.is_empty() || !inside || shard.contains('\\') || shard.contains(char::is_control) {
        return Err(format!("names the file {}, expected one inside of its folder", shown(shard)));
    }
    if is_index(Path::new(shard)) {
        return Err(format!("names the file {}, another index", shown(shard)));
    }
    Ok(shard)
}

/// Checks that the index puts the tensor `name` of `shard` there.
fn check_place(name: &str, shard: &str, place: Option<&String>) -> std::result::Result<(), String> {
    match place {
        Some(place) if place == shard => Ok(()),
        Some(place) => {
            Err(format!("says that tensor {} is in {}, but {} holds one too", shown(name), shown(place), shown(shard)))
        }
        None => Err(format!("does not say that {} holds tensor {}", shown(shard), shown(name))),
    }
}

/// The index as it stands. What else it holds, such as the size of all, is not needed.
#[derive(Deserialize)]
struct Index {
    weight_map: Places,
}

/// Each tensor's file, no tensor named twice.
struct Places(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Places {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(PlacesVisitor)
    }
}

struct PlacesVisitor;

impl<'de> Visitor<'de> for PlacesVisitor {
    type Value = Places;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map from tensors to files")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Places, A::Error> {
        let mut places = BTreeMap::new();
        while let Some((name, file)) = map.next_entry::<String, String>()? {
            if places.contains_key(&name) {
                return Err(A::Error::custom(format!("tensor {} is named twice", shown(&name))));
            }
            places.insert(name, file);
        }
        Ok(Places(places))
    }
}
