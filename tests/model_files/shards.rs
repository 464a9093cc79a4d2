//! Models in several files, and which files of a folder are the model.

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::json;
use tempfile::TempDir;
use ultramem::{
    HostTensor,
    checkpoint::{FileTensor, Tensors, save},
};

use super::{fixture, refused, sum};

#[test]
fn the_shards_of_the_golden_are_one_model() {
    let folder = fixture("olmo_ultramem_v2_sharded");
    let index = folder.join("model.safetensors.index.json");
    for path in [&folder, &index] {
        let tensors = Tensors::open(path).unwrap();
        assert_eq!(sum(&tensors), (73, 0x6a1b2a5862bb8c2e));
        assert_eq!(tensors.path(), index);
        assert!(tensors.metadata().is_empty());
    }
    let one = Tensors::open(folder.join("model-00002-of-00002.safetensors")).unwrap();
    assert!(one.names().count() < 73);
}

/// A safetensors file of tensors of one number each.
fn shard(path: &Path, names: &[&str]) {
    let one = HostTensor::from_f32([1], &[1.0]).unwrap();
    let tensors: Vec<_> = names.iter().map(|&name| (name, FileTensor::Floats(one.clone()))).collect();
    save(path, &tensors, &BTreeMap::from([("made".into(), "here".into())])).unwrap();
}

/// A folder with the shards `1` of `a` and `b`, and `2` of `c`, and an index of that text.
fn sharded(index: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    shard(&folder.path().join("1"), &["a", "b"]);
    shard(&folder.path().join("2"), &["c"]);
    fs::write(folder.path().join("x.safetensors.index.json"), index).unwrap();
    folder
}

#[test]
fn an_index_and_its_shards_agree() {
    let index =
        |places: &[(&str, &str)]| json!({ "weight_map": BTreeMap::from_iter(places.iter().copied()) }).to_string();
    let good = [("a", "1"), ("b", "1"), ("c", "2")];
    assert_eq!(Tensors::open(sharded(&index(&good)).path()).unwrap().names().collect::<Vec<_>>(), ["a", "b", "c"]);
    let with = |name, place| index(&[good.as_slice(), &[(name, place)]].concat());
    for (text, message) in [
        (with("d", "2"), "says that tensor \"d\" is in \"2\", which lacks it"),
        (with("b", "2"), "says that tensor \"b\" is in \"2\", but \"1\" holds one too"),
        (index(&good[1..]), "does not say that \"1\" holds tensor \"a\""),
        (with("c", "../2"), "names the file \"../2\", expected one inside of its folder"),
        (with("c", "/2"), "names the file \"/2\", expected one inside of its folder"),
        (with("c", "./2"), "names the file \"./2\", expected one inside of its folder"),
        (with("c", "..\\2"), "names the file \"..\\\\2\", expected one inside of its folder"),
        (with("c", ""), "names the file \"\", expected one inside of its folder"),
        (with("c", "x\n"), "names the file \"x\\n\", expected one inside of its folder"),
        (with("c", "x.safetensors.index.json"), "names the file \"x.safetensors.index.json\", another index"),
        (
            r#"{"weight_map": {"a": "1", "a": "2"}}"#.into(),
            "is no index of a model: tensor \"a\" is named twice at line 1 column 35",
        ),
        (r#"{"weight_map": {"a": 1}}"#.into(), "is no index of a model: invalid type: integer `1`, expected a string"),
        ("[]".into(), "is no index of a model: invalid length 0, expected struct Index with 1 element"),
    ] {
        let folder = sharded(&text);
        let found = Tensors::open(folder.path()).unwrap_err().to_string();
        assert!(found.contains(message) && found.contains("x.safetensors.index.json: "), "{found}");
    }
    let missing = Tensors::open(sharded(&with("d", "3")).path()).unwrap_err().to_string();
    assert!(missing.ends_with("/3: No such file or directory (os error 2)"), "{missing}");
}

#[test]
fn two_shards_with_one_tensor_are_refused() {
    let folder = sharded(r#"{"weight_map": {"a": "1", "b": "1", "c": "2"}}"#);
    shard(&folder.path().join("2"), &["b", "c"]);
    let found = Tensors::open(folder.path()).unwrap_err().to_string();
    assert!(found.ends_with("says that tensor \"b\" is in \"1\", but \"2\" holds one too"), "{found}");
}

#[test]
fn a_folder_has_one_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    assert_eq!(refused(path), "holds no model: no index, no file called .safetensors, .pt, .pth or .bin");
    shard(&path.join("layer.safetensors"), &["a"]);
    assert_eq!(Tensors::open(path).unwrap().metadata()["made"], "here");
    shard(&path.join("optim.pt"), &["b"]);
    let both = "holds 2 files that could be the model, such as \"layer.safetensors\" and \"optim.pt\": name one";
    assert_eq!(refused(path), both);
    shard(&path.join("model.pt"), &["c"]);
    assert!(Tensors::open(path).unwrap().has("c"));
    fs::write(path.join("model.safetensors.index.json"), "{}").unwrap();
    assert!(refused(path).ends_with("is no index of a model: missing field `weight_map` at line 1 column 2"));
}
