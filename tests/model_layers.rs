//! The memory layers of whole models: found, configured, run, replaced; and what is wrong with a model is said in one line.

#![cfg(feature = "files")]

mod common;

use std::{collections::BTreeMap, fs, path::PathBuf};

use common::relative_l2;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Map, Value, json};
use tempfile::{TempDir, tempdir};
use ultramem::{
    Blocks, Checkpoint, Dimensions, ElementType, HostTensor, Kind, MemoryConfig, SharedTable, Weight,
    checkpoint::{Layer, Model, Settings, Tensors},
    reference::forward,
};

const MODELS: [&str; 5] =
    ["olmo_ultramem_v1", "olmo_ultramem_v2_sharded", "olmo_memory_plus", "lingua_memory_plus", "lingua_peer"];

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(name)
}

fn model(name: &str) -> Model {
    Model::open(fixture(name)).unwrap()
}

/// The tensor `name` of `file`, widened.
fn numbers(file: &Tensors, name: &str) -> Vec<f32> {
    bytemuck::pod_collect_to_vec(&file.get(name).unwrap().bytes)
}

/// A change of a fixture's tensors.
type Change<'a> = &'a dyn Fn(&mut BTreeMap<String, (Value, Vec<usize>, Vec<u8>)>);

/// A copy of the fixture `name` as one safetensors file with other tensors and settings.
fn changed(name: &str, change: Change<'_>, settings: impl Fn(String) -> String) -> (TempDir, PathBuf) {
    let tensors = Tensors::open(fixture(name)).unwrap();
    let mut all = BTreeMap::new();
    for name in tensors.names() {
        let stored = tensors.get(name).unwrap();
        let dtype = serde_json::to_value(stored.dtype).unwrap();
        all.insert(name.to_string(), (dtype, stored.shape, stored.bytes.into_owned()));
    }
    change(&mut all);
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, (dtype, shape, bytes)) in all {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert(name, json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets }));
        data.extend(bytes);
    }
    let header = Value::Object(header).to_string();
    let folder = tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    fs::write(&path, [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()).unwrap();
    let file = if fixture(name).join("config.yaml").is_file() { "config.yaml" } else { "params.json" };
    let text = fs::read_to_string(fixture(name).join(file)).unwrap();
    fs::write(folder.path().join(file), settings(text)).unwrap();
    (folder, path)
}

fn as_it_is(text: String) -> String {
    text
}

/// Holds every layer of `model` against what PyTorch gave for the fixture `name`.
fn hold(model: &Model, name: &str) {
    let expected = Tensors::open(fixture(name).join("expected.safetensors")).unwrap();
    assert_eq!(expected.names().count(), 2 * model.layers().len());
    for layer in model.layers() {
        let [input, output] = ["input", "output"].map(|it| numbers(&expected, &format!("{}.{it}", layer.number())));
        // PyTorch computed in f32, whatever type the weights are stored in.
        let weights = model.weights(layer).unwrap().rounded(ElementType::F32);
        let found = forward(layer.config(), &weights, &input).unwrap().output;
        let distance = relative_l2(&found, &output);
        println!("{name} layer {}: {distance:.2e}", layer.number());
        assert!(distance < 1e-5, "{name} layer {}: {distance}", layer.number());
    }
}

#[test]
fn every_model_gives_pytorchs_numbers() {
    for name in MODELS {
        hold(&model(name), name);
    }
}

#[test]
fn names_may_have_any_prefix_and_wrappers() {
    for (name, file) in [("olmo_ultramem_v1", "model.pt"), ("lingua_memory_plus", "consolidated.pth")] {
        assert_eq!(model(name).tensors().path(), fixture(name).join(file));
    }
    let wrap = |name: &str| {
        let wrapped = name.replace("transformer.", "module.net._orig_mod.transformer._fsdp_wrapped_module.");
        wrapped.replace("layers.", "a.model.layers.").replace("mem_blocks.", "mem_blocks._checkpoint_wrapped_module.")
    };
    for name in MODELS {
        let renamed: Change<'_> = &|tensors| *tensors = tensors.iter().map(|(k, v)| (wrap(k), v.clone())).collect();
        let (_folder, path) = changed(name, renamed, as_it_is);
        let model = Model::open(&path).unwrap();
        hold(&model, name);
        let layer = &model.layers()[0];
        let begin = if name.starts_with("olmo") { "net.transformer.mem_blocks." } else { "a.layers." };
        assert!(layer.name().starts_with(begin), "{}", layer.name());
        assert!(layer.tensors().all(|(_, real)| model.tensors().has(real)));
        let wrapped = format!("module.{}", layer.name().replace("0", "_orig_mod.0"));
        assert_eq!(model.layer(wrapped).unwrap().name(), layer.name());
    }
}

#[test]
fn layers_are_what_settings_and_tensors_say() {
    let v1 = model("olmo_ultramem_v1");
    let layer = v1.layer(1).unwrap();
    assert_eq!((layer.name(), layer.number(), layer.place()), ("transformer.mem_blocks.1", 1, Some((2, 3))));
    let config = layer.config();
    assert_eq!((config.kind(), config.expansion, config.side_keys), (Some(Kind::UltraMem), 4, 32));
    assert_eq!((config.cores, config.tucker_rank, config.top_m, config.norm_eps), (2, 2, 8, 1e-5));
    let v2 = model("olmo_ultramem_v2_sharded");
    assert_eq!(v2.layers().len(), 4);
    let config = v2.layer("transformer.mem_blocks.3").unwrap().config();
    assert_eq!((config.kind(), config.side_keys, config.pre_dim), (Some(Kind::UltraMemV2), 22, 16));
    assert_eq!((config.shared, config.expansion), (Some(SharedTable { rows: 256, offset: 192 }), 4));
    assert_eq!((config.capabilities.blocks, v2.layers()[3].place()), (Blocks::Summed, Some((3, 3))));
    assert_eq!(v2.weights(&v2.layers()[0]).unwrap()[Weight::Values].dtype(), ElementType::BF16);
    let lingua = model("lingua_memory_plus");
    let numbers: Vec<usize> = lingua.layers().iter().map(Layer::number).collect();
    assert_eq!((numbers, lingua.layers()[1].place()), (vec![1, 3], Some((3, 3))));
    assert_eq!(model("lingua_peer").layers()[0].config().kind(), Some(Kind::Peer));
    let problem = lingua.layer(2).unwrap_err().to_string();
    assert!(problem.ends_with("has no memory layer \"2\": it has 1, 3"), "{problem}");
}

/// Lingua's file repeats the values under each layer, and OLMo's holds them once.
#[test]
fn a_table_that_layers_share_is_one() {
    for (name, shared) in [
        ("olmo_ultramem_v1", [None, None].as_slice()),
        ("olmo_ultramem_v2_sharded", &[None, Some(0), Some(0), Some(0)]),
        ("olmo_memory_plus", &[None, Some(0)]),
        ("lingua_memory_plus", &[None, Some(0)]),
        ("lingua_peer", &[None]),
    ] {
        let model = model(name);
        let found: Vec<_> = model.layers().iter().map(|layer| model.table_of(layer)).collect();
        assert_eq!(found, shared, "{name}");
        for (layer, owner) in model.layers().iter().zip(shared) {
            let Some(owner) = owner.map(|owner| &model.layers()[owner]) else { continue };
            let [own, lent] = [layer, owner].map(|it| model.weights(it).unwrap()[Weight::Values].bytes().as_ptr());
            // One borrowed table, for files that need no copy.
            assert_eq!(own, lent, "{name}");
        }
    }
    let differ: Change<'_> = &|tensors| tensors.get_mut("layers.3.feed_forward.values.weight").unwrap().2[5] ^= 1;
    let (_folder, path) = changed("lingua_memory_plus", differ, as_it_is);
    let model = Model::open(path).unwrap();
    assert_eq!(model.table_of(&model.layers()[1]), None);
    let dropped: Change<'_> = &|tensors| drop(tensors.remove("layers.1.feed_forward.values.weight"));
    let (_folder, path) = changed("lingua_memory_plus", dropped, as_it_is);
    hold(&Model::open(path).unwrap(), "lingua_memory_plus");
}

#[test]
fn a_file_of_one_layer_is_a_model() {
    let path = common::fixture("lingua_memory_plus");
    let (model, file) = (Model::open(&path).unwrap(), Checkpoint::open(&path).unwrap());
    let [layer] = model.layers() else { panic!("one layer") };
    assert_eq!((layer.name(), layer.number(), layer.config()), ("0", 0, file.config()));
    assert_eq!(model.weights(layer).unwrap(), file.weights().unwrap());
}

#[test]
fn settings_may_lie_elsewhere() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("model.pt");
    fs::copy(fixture("olmo_ultramem_v1/model.pt"), &path).unwrap();
    let problem = Model::open(&path).unwrap_err().to_string();
    assert!(problem.ends_with("beside it: name the settings"), "{problem}");
    let settings = Settings::read(fixture("olmo_ultramem_v1/config.yaml")).unwrap();
    hold(&Model::open_with(&path, &settings).unwrap(), "olmo_ultramem_v1");
    let other = Settings::read(fixture("lingua_peer/params.json")).unwrap();
    let problem = Model::open_with(&path, &other).unwrap_err().to_string();
    assert!(problem.contains("layers is \"2\", but the tensors are of 2: 0, 1"), "{problem}");
}

/// The error for a fixture with one setting replaced.
fn refused(name: &str, from: &str, to: &str) -> String {
    let settings = |text: String| {
        assert!(text.contains(from), "{from:?}");
        text.replacen(from, to, 1)
    };
    let (_folder, path) = changed(name, &|_| (), settings);
    let problem = Model::open(&path).unwrap_err().to_string();
    assert!(!problem.contains('\n'), "{problem}");
    problem.trim_start_matches(&*path.display().to_string()).trim_start_matches(": ").to_string()
}

#[test]
fn settings_and_tensors_must_agree() {
    let v1 = [
        ("mem_kdim: 16", "mem_kdim: 17", "mem_kdim is 17, but keys of layer 0 are 16 wide"),
        ("d_model: 64", "d_model: 32", "d_model is 32, but query_proj of layer 0 is 64 wide"),
        ("mem_head: 2", "mem_head: 3", "mem_head is 3, but keys of layer 0 are of 2 heads"),
        ("mem_vdim: 24", "mem_vdim: 25", "mem_vdim is 25, but values of layer 0 are 24 wide"),
        ("mem_knum: 16", "mem_knum: 15", "mem_knum is 15, which makes 225 rows, but values of layer 0 have 256"),
        ("mem_knn: 8", "mem_knn: 80", "layer 0: top_m 80 exceeds side_keys 32"),
        ("mem_knn: 8", "other: 8", "the settings lack mem_knn, which no tensor tells"),
        (
            "mem_type: ultramem_v1",
            "mem_type: pkm",
            "mem_type is \"pkm\", expected ultramem_v1, ultramem_v2 or memory_plus",
        ),
        ("layer_norm_type: rms", "layer_norm_type: low", "layer_norm_type is \"low\", expected rms or default"),
        ("1:2/2:3", "1:2", "mem_insert_way is \"1:2\", 1 layers, but the tensors are of 2: 0, 1"),
        ("1:2/2:3", "a", "mem_insert_way is \"a\", expected full, or blocks like 1:2/2:3"),
        ("expand_time: 1\n  mem_output", "expand_time: 2\n  mem_output", "mem_final_top_expand_time is 2, expected 1"),
    ];
    let v2 = [
        ("mem_knum: 8", "mem_knum: 9", "mem_knum 9 and 4 layers make 324 rows, but values of layer 0 have 256"),
        (
            "mem_share_ratio: 0.5",
            "mem_share_ratio: 0.75",
            "mem_knum 8, mem_share_ratio 0.75 and mem_key_expand_time 2 make 26 keys a side, but keys of layer 0 are 22",
        ),
        ("mem_share_ratio: 0.5", "mem_share_ratio: 1.5", "layer 0: share_ratio is 1.5, expected above 0 and at most 1"),
        ("mem_pre_vdim: 16", "mem_pre_vdim: 8", "mem_pre_vdim is 8, but pre-values of layer 0 are 16 wide"),
        (
            "mem_value_expand_time: 1",
            "mem_value_expand_time: 3",
            "mem_value_expand_time is 3, expected 1 or the square of mem_key_expand_time, 2",
        ),
        (
            "tucker_rank: true",
            "tucker_rank: false",
            "mem_q_for_each_tucker_rank is false, expected true for ultramem_v2",
        ),
        ("n_layers: 4", "n_layers: 5", "mem_insert_way is \"full\", 5 layers, but the tensors are of 4: 0, 1, 2, 3"),
    ];
    let lingua = [
        ("\"dim\": 48", "\"dim\": 47", "dim is 47, but query_proj of layer 1 is 48 wide"),
        (": 24", ": 26", "mem_k_dim is 26, but keys of layer 1 are 12 wide, 24 with both sides"),
        ("keys\": 18", "keys\": 20", "mem_n_keys is 20, but values of layer 1 have 324 rows, 18 keys a side"),
        (
            "mem_heads\": 2",
            "mem_heads\": 3",
            "mem_heads is 3, but keys of layer 1 have 72 rows, 2 heads of two sides of 18",
        ),
        ("-1", "40", "mem_v_dim is 40, but values of layer 1 are 48 wide"),
        (
            "projection\": true",
            "projection\": false",
            "swilu_projection is false, but layer 1 has a tensor swilu_projection.weight",
        ),
        ("gated\": false", "gated\": true", "mem_gated is true, but layer 1 has no tensor gating.weight"),
        ("variant\": false", "variant\": true", "peer_variant is true, but layer 1 has no tensor values_u.weight"),
        ("1,3", "1,2", "layers is \"1,2\", but the tensors are of 2: 1, 3"),
        ("mem_knn", "other", "the settings lack mem_knn, which no tensor tells"),
        ("enabled\": true", "enabled\": false", "is_enabled is false, but the tensors have memory layers"),
    ];
    for (name, cases) in [
        ("olmo_ultramem_v1", v1.as_slice()),
        ("olmo_ultramem_v2_sharded", &v2),
        ("lingua_memory_plus", &lingua),
        ("olmo_memory_plus", &[("mem_kdim: 12", "mem_kdim: 16", "mem_kdim is 16, but keys of layer 0 are 12 wide")]),
        (
            "lingua_peer",
            &[(
                "variant\": true",
                "variant\": false",
                "peer_variant is false, but layer 2 has a tensor values_u.weight",
            )],
        ),
    ] {
        for &(from, to, problem) in cases {
            assert_eq!(refused(name, from, to), problem, "{name}: {to}");
        }
    }
}

/// The error for a fixture with other tensors, from its weights if it opens.
fn broken(name: &str, change: Change<'_>) -> String {
    let (_folder, path) = changed(name, change, as_it_is);
    let open = || -> ultramem::Result<()> {
        let model = Model::open(&path)?;
        model.layers().iter().try_for_each(|layer| model.weights(layer).map(drop))
    };
    let problem = open().unwrap_err().to_string();
    assert!(!problem.contains('\n'), "{problem}");
    problem.trim_start_matches(&*path.display().to_string()).trim_start_matches(": ").to_string()
}

#[test]
fn tensors_must_make_a_layer() {
    let keys = "transformer.mem_blocks.0.keys";
    let problem = broken("olmo_ultramem_v1", &|tensors| {
        let copy = tensors[keys].clone();
        tensors.insert("module.transformer.mem_blocks.model.0.keys".into(), copy);
    });
    assert_eq!(
        problem,
        "tensors \"module.transformer.mem_blocks.model.0.keys\" and \"transformer.mem_blocks.0.keys\" have the same name but for wrappers"
    );
    let more: Change<'_> = &|tensors| {
        let copy = tensors["transformer.mem_blocks.0.query_norm.weight"].clone();
        tensors.insert("transformer.mem_blocks.0.query_norm.bias".into(), copy);
    };
    let problem = broken("olmo_ultramem_v1", more);
    assert_eq!(problem, "tensor \"transformer.mem_blocks.0.query_norm.bias\" belongs to no memory layer of this kind");
    let less: Change<'_> = &|tensors| drop(tensors.remove("transformer.mem_blocks.0.keys_norm.weight"));
    assert_eq!(broken("olmo_ultramem_v1", less), "layer 0: tensor \"keys_norm.weight\" is missing");
    let none: Change<'_> = &|tensors| tensors.retain(|name, _| !name.ends_with("keys"));
    assert_eq!(broken("olmo_ultramem_v1", none), "holds no memory layer: no tensor is called keys beside a query_proj");
    let flat: Change<'_> = &|tensors| tensors.get_mut(keys).unwrap().1 = vec![2, 2, 32, 32];
    assert_eq!(
        broken("olmo_ultramem_v1", flat),
        "tensor \"transformer.mem_blocks.0.keys\" has shape [2, 2, 32, 32], expected 5 sizes"
    );
}

/// Whatever stands in the settings, opening ends, and a problem is one line.
#[test]
fn hostile_settings_end_well() {
    let rng = &mut StdRng::seed_from_u64(7);
    let pieces = [
        "0",
        "-1",
        "9",
        "99999999999999999999",
        "1e308",
        ".nan",
        "true",
        "null",
        "\"",
        "[",
        "{",
        ": ",
        "full",
        "1:2/",
        "a",
    ];
    let mut opened = 0;
    for name in MODELS {
        let file = ["config.yaml", "params.json"].into_iter().find(|file| fixture(name).join(file).is_file()).unwrap();
        let text = fs::read(fixture(name).join(file)).unwrap();
        let path = tempdir().unwrap();
        let path = path.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        // Where the memory layers' settings are.
        let from = text.windows(4).position(|window| window == b"mem_").unwrap() - 40;
        for _ in 0..400 {
            let mut text = text.clone();
            for _ in 0..rng.random_range(1..4) {
                let at =
                    if rng.random() { rng.random_range(from..text.len()) } else { rng.random_range(0..text.len()) };
                let piece = pieces[rng.random_range(0..pieces.len())].bytes();
                match rng.random_range(0..3) {
                    0 => text[at] = rng.random_range(32..127),
                    1 => drop(text.splice(at..at, piece)),
                    _ => drop(text.splice(at..(at + rng.random_range(1..6)).min(text.len()), piece)),
                }
            }
            fs::write(&path, &text).unwrap();
            let open = Settings::read(&path).and_then(|settings| Model::open_with(fixture(name), &settings));
            match open {
                Ok(model) => {
                    opened += 1;
                    model.layers().iter().for_each(|layer| drop(model.weights(layer)));
                }
                Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
            }
        }
    }
    assert!(opened > 100, "{opened}");
}

/// Every tensor of two models is the same bit for bit, but for those that `differ` names.
fn same_but(one: &Tensors, other: &Tensors, differ: &[&str]) {
    assert!(one.names().eq(other.names()));
    let changed: Vec<&str> = one.names().filter(|name| one.get(name).unwrap() != other.get(name).unwrap()).collect();
    assert_eq!(changed, differ);
}

/// Each layer written to a file of its own and brought back gives the model again.
#[test]
fn layers_go_out_and_come_back_bit_for_bit() {
    let folder = tempdir().unwrap();
    for name in MODELS {
        let model = model(name);
        let mut files = Vec::new();
        for layer in model.layers() {
            let path = folder.path().join(format!("{name}.{}.safetensors", layer.number()));
            let number = BTreeMap::from([("layer".to_string(), layer.number().to_string())]);
            Checkpoint::write(&path, layer.config(), &model.weights(layer).unwrap(), &[], &number).unwrap();
            assert_eq!(Model::open(&path).unwrap().layers()[0].number(), layer.number());
            files.push(Checkpoint::open(path).unwrap());
        }
        let weights: Vec<_> = files.iter().map(|file| file.weights().unwrap()).collect();
        let new: Vec<_> = model.layers().iter().zip(&files).zip(&weights).collect();
        let new: Vec<_> = new.into_iter().map(|((layer, file), weights)| (layer, file.config(), weights)).collect();
        let out = folder.path().join("out.safetensors");
        model.replace(&new, &out).unwrap();
        same_but(model.tensors(), &Tensors::open(&out).unwrap(), &[]);
    }
}

#[test]
fn a_replaced_table_is_replaced_for_all_that_share_it() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("out.safetensors");
    let model = model("lingua_memory_plus");
    let [one, three] = model.layers() else { panic!("two layers") };
    let change = |layer: &Layer, number: f32| {
        let mut weights = model.weights(layer).unwrap().rounded(ElementType::F32);
        let mut numbers = weights.numbers(Weight::Values);
        numbers[7] = number;
        let shape = Weight::Values.shape(layer.config());
        weights.tensors[Weight::Values] = Some(HostTensor::from_f32(shape, &numbers).unwrap());
        weights
    };
    let (new, other) = (change(three, 3.0), change(one, 4.0));
    model.replace(&[(three, three.config(), &new)], &out).unwrap();
    let tables = ["layers.1.feed_forward.values.weight", "layers.3.feed_forward.values.weight"];
    same_but(model.tensors(), &Tensors::open(&out).unwrap(), &tables);
    let settings = Settings::find(fixture("lingua_memory_plus")).unwrap().unwrap();
    let again = Model::open_with(&out, &settings).unwrap();
    assert_eq!(again.table_of(&again.layers()[1]), Some(0));
    let before = fs::read(&out).unwrap();
    let refused = |new: &[_], words: &str| {
        let problem = model.replace(new, &out).unwrap_err().to_string();
        assert!(problem.contains(words), "{problem}");
    };
    refused(
        &[(one, one.config(), &other), (three, three.config(), &new)],
        "layers 1 and 3 bring different tables for layers.1.feed_forward.values.weight, which they share",
    );
    refused(&[(one, one.config(), &new), (one, one.config(), &new)], "layer 1 is replaced twice");
    let peer = Model::open(fixture("lingua_peer")).unwrap();
    refused(&[(&peer.layers()[0], one.config(), &new)], "has no layer layers.2.feed_forward");
    let fewer = MemoryConfig::new(Dimensions { top_m: 5, ..(**one.config()).clone() }).unwrap();
    refused(&[(one, &fewer, &new)], "layer 1 has top_m 6, but what replaces it has 5");
    assert!(fs::read(&out).unwrap() == before);
}

/// Layers of f32 go into a model of bf16, rounded.
#[test]
fn what_replaces_a_layer_takes_the_models_type() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("out.safetensors");
    let model = model("olmo_ultramem_v2_sharded");
    let layer = model.layer(2).unwrap();
    let wide = model.weights(layer).unwrap().rounded(ElementType::F32);
    model.replace(&[(layer, layer.config(), &wide)], &out).unwrap();
    same_but(model.tensors(), &Tensors::open(&out).unwrap(), &[]);
    let keys: &str = "model.transformer.mem_blocks.2.keys";
    let doubled: Vec<f32> = wide.numbers(Weight::Keys).iter().map(|x| 2.0 * x).collect();
    let shape = Weight::Keys.shape(layer.config());
    let new = wide.with(Weight::Keys, HostTensor::from_f32(shape, &doubled).unwrap());
    model.replace(&[(layer, layer.config(), &new)], &out).unwrap();
    same_but(model.tensors(), &Tensors::open(&out).unwrap(), &[keys]);
}

/// The code of the README's section on PyTorch checkpoints.
fn of_the_readme(path: &str, hidden_states: &[f32]) -> ultramem::Result<Vec<f64>> {
    // README
    let model = Model::open(path)?; // a folder or a file, the settings beside it
    let layer = model.layer(0)?; // or by name: "transformer.mem_blocks.0"
    let weights = model.weights(layer)?; // borrowed from the mapped files
    let output = forward(layer.config(), &weights, hidden_states)?.output;
    model.replace(&[(layer, layer.config(), &weights)], "trained.safetensors")?;
    // END
    Ok(output)
}

#[test]
fn the_readmes_code_runs() {
    let code = include_str!("model_layers.rs").split("    // README\n").nth(1).unwrap();
    let code = code.split("    // END").next().unwrap().replace("\n    ", "\n");
    let readme = include_str!("../README.md");
    assert!(readme.contains(code.trim()), "{code}");
    let folder = tempdir().unwrap();
    std::env::set_current_dir(folder.path()).unwrap();
    let path = fixture("olmo_ultramem_v1");
    let expected = Tensors::open(path.join("expected.safetensors")).unwrap();
    let output = of_the_readme(path.to_str().unwrap(), &numbers(&expected, "0.input")).unwrap();
    assert!(relative_l2(&output, &numbers(&expected, "0.output")) < 1e-5);
    let written = Tensors::open("trained.safetensors").unwrap();
    same_but(model("olmo_ultramem_v1").tensors(), &written, &[]);
}
