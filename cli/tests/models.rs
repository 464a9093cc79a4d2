//! Whole models as training leaves them: shown, checked, taken apart and put together again by the command.

mod support;

use std::{fs, path::Path};

use serde_json::json;
use support::{Parts, directory, relative_l2, ultramem};

const MODELS: [(&str, &[usize]); 5] = [
    ("olmo_ultramem_v1", &[0, 1]),
    ("olmo_ultramem_v2_sharded", &[0, 1, 2, 3]),
    ("olmo_memory_plus", &[0, 1]),
    ("lingua_memory_plus", &[1, 3]),
    ("lingua_peer", &[2]),
];

/// A file or folder among the models of the fixtures.
fn model(name: &str) -> String {
    format!("{}/../tests/fixtures/models/{name}", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn info_shows_the_layers_of_a_model() {
    let text = ultramem(&format!("info {}", model("olmo_ultramem_v2_sharded"))).well();
    for words in ["4 memory layers in 73 tensors", "UltraMemV2", "shared: 256 rows, from 192", "0 to 3"] {
        assert!(text.contains(words), "{words:?} is not in {text}");
    }
    let text = ultramem(&format!("info {}", model("lingua_memory_plus"))).well();
    assert!(text.contains("own") && text.contains("layer 1's"), "{text}");
    assert!(text.lines().skip(1).all(|line| line.chars().count() <= 100), "{text}");
    for (name, layers) in MODELS {
        let report = ultramem(&format!("info {} --json", model(name))).json();
        let numbers = report["layers"].as_array().unwrap().iter().map(|layer| layer["layer"].clone());
        assert!(numbers.eq(layers.iter().map(|&layer| json!(layer))), "{report}");
    }
    let report = ultramem(&format!("info {} --json", model("olmo_memory_plus"))).json();
    assert_eq!((&report["layers"][1]["table_of"], &report["layers"][1]["place"]), (&json!(0), &json!([3, 3])));
    let text = ultramem(&format!("info {} --layer 1", model("olmo_ultramem_v1"))).well();
    assert!(text.starts_with("UltraMem layer\n"), "{text}");
}

#[test]
fn check_holds_every_layer_of_every_model() {
    for (name, layers) in MODELS {
        let (path, expected) = (model(name), model(&format!("{name}/expected.safetensors")));
        for (backend, dtype) in [
            ("reference", "f32"),
            ("wgpu", "f32"),
            ("wgpu", "f16"),
            ("reference", "bf16"),
            ("cpu", "f32"),
            ("cpu", "bf16"),
        ] {
            let args = format!("check {path} --expected {expected} --backend {backend} --dtype {dtype} --json");
            let report = ultramem(&args).json();
            let counts = ["passed", "missed", "not_checked"].map(|key| report[key].as_u64().unwrap_or(99));
            assert_eq!(counts, [layers.len() as u64, 0, 0], "{name} on {backend} in {dtype}: {report}");
        }
    }
}

#[test]
fn check_says_what_it_misses_and_what_it_lacks() {
    let directory = directory();
    let path = model("olmo_ultramem_v1");
    let mut expected = Parts::read(model("olmo_ultramem_v1/expected.safetensors"));
    expected.bytes("1.output")[3] ^= 1;
    let file = expected.write(&directory.path().join("expected.safetensors"));
    let ran = ultramem(&format!("check {path} --expected {file} --backend reference"));
    assert_eq!((ran.status, ran.stderr.as_str()), (Some(1), ""));
    assert!(ran.stdout.contains("layer 1  relative L2") && ran.stdout.contains("MISSED"), "{}", ran.stdout);
    for name in ["1.input", "1.output"] {
        let tensor = expected.header[name].take();
        expected.header[name.replace('1', "7")] = tensor;
        expected.header.as_object_mut().unwrap().remove(name);
    }
    let file = expected.write(&directory.path().join("expected.safetensors"));
    let text = ultramem(&format!("check {path} --expected {file} --backend reference")).well();
    for words in ["layer 1: not checked, ", "has no 1.input", "7.input: not checked, the model has no such layer"] {
        assert!(text.contains(words), "{words:?} is not in {text}");
    }
    ultramem(&format!("check {path}")).refused(&["a whole model", "--expected"]);
    let other = model("lingua_peer/expected.safetensors");
    ultramem(&format!("check {path} --expected {other}")).refused(&["holds an input for no layer", "0.input"]);
}

#[test]
fn an_exported_layer_is_a_file_as_any_other() {
    let directory = directory();
    for (name, layers) in MODELS {
        let (path, expected) = (model(name), model(&format!("{name}/expected.safetensors")));
        for layer in layers {
            let place = |file: &str| directory.path().join(file).display().to_string();
            let (file, out, direct) =
                (place("layer.safetensors"), place("out.safetensors"), place("direct.safetensors"));
            ultramem(&format!("export {path} --layer {layer} -o {file} --expected {expected}")).well();
            let report = ultramem(&format!("check {file} --backend reference --json")).json();
            assert_eq!((&report["passed"], &report["missed"]), (&json!(1), &json!(0)), "{name}: {report}");
            ultramem(&format!("info {file}")).well();
            ultramem(&format!("forward {file} -o {out} --backend reference")).well();
            let from_model = format!("forward {path} --layer {layer} -o {direct} --backend reference");
            ultramem(&format!("{from_model} --expected {expected}")).well();
            assert_eq!(fs::read(&out).unwrap(), fs::read(&direct).unwrap(), "{name}");
            ultramem(&format!("{from_model} --input {expected}:{layer}.input")).well();
            assert_eq!(fs::read(&out).unwrap(), fs::read(&direct).unwrap(), "{name}");
            let (mut given, mut right) = (Parts::read(&out), Parts::read(&expected));
            assert!(relative_l2(&given.f32s("output"), &right.f32s(&format!("{layer}.output"))) < 1e-5, "{name}");
        }
    }
}

#[test]
fn a_models_layer_trains_and_is_measured() {
    let directory = directory();
    let path = model("olmo_ultramem_v1");
    let expected = model("olmo_ultramem_v1/expected.safetensors");
    let out = directory.path().join("out.safetensors").display().to_string();
    let args = format!("backward {path} --layer 0 --expected {expected} --grad-output {expected}:0.output");
    ultramem(&format!("{args} -o {out} --backend reference")).well();
    assert_eq!(Parts::read(&out).shape("grad.keys"), [2, 2, 32, 16, 2]);
    let args = format!("backward {path} --layer 0 --expected {expected} -o {out} --backend reference");
    ultramem(&args).refused(&[&expected, "0.grad_output", "is missing"]);
    let args = format!("bench layer {path} --layer 1 --tokens 4 --samples 2 --backend reference --json");
    assert_eq!(ultramem(&args).json()["dimensions"]["side_keys"], 32);
    ultramem(&format!("bench layer {path} --layer 1 --heads 3")).refused(&["cannot be used with"]);
    ultramem(&format!("forward {path} -o {out}")).refused(&["2 memory layers", "--layer"]);
    ultramem(&format!("forward {path} --layer 9 -o {out}")).refused(&["no memory layer \"9\"", "0, 1"]);
}

/// Every tensor of `one` is in `other`, bit for bit.
fn same(one: &Path, other: &Path) {
    let (mut one, mut other) = (Parts::read(one), Parts::read(other));
    let names: Vec<String> =
        one.header.as_object().unwrap().keys().filter(|name| *name != "__metadata__").cloned().collect();
    for name in names {
        assert_eq!(
            (one.shape(&name), &one.header[&name]["dtype"]),
            (other.shape(&name), &other.header[&name]["dtype"])
        );
        assert!(one.bytes(&name) == other.bytes(&name), "{name}");
    }
}

#[test]
fn import_brings_layers_back() {
    let directory = directory();
    let path = model("olmo_ultramem_v2_sharded");
    let place = |file: &str| directory.path().join(file);
    let (a, b, out) = (place("a.safetensors"), place("b.safetensors"), place("out.safetensors"));
    for (layer, file) in [(2, &a), (0, &b)] {
        ultramem(&format!("export {path} --layer {layer} -o {}", file.display())).well();
    }
    let import = format!("import {} {} --into {path} -o {}", a.display(), b.display(), out.display());
    let text = ultramem(&import).well();
    assert!(text.contains("layers replaced: 2, 0"), "{text}");
    for shard in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
        same(Path::new(&format!("{path}/{shard}")), &out);
    }
    let (out, expected) = (out.display(), format!("{path}/expected.safetensors"));
    ultramem(&format!("info {out}")).refused(&["neither config.yaml nor params.json"]);
    let args = format!("check {out} --config {path}/config.yaml --expected {expected} --backend reference --json");
    assert_eq!(ultramem(&args).json()["passed"], 4);
    ultramem(&format!("{import} --layer 2")).refused(&["1 times", "2 files"]);
    ultramem(&format!("{import} --layer 2 --layer 3")).refused(&["layer 3 has offset 192, but what replaces it has 0"]);
    let plain = support::fixture("ultramem_v1_tiny");
    ultramem(&format!("import {plain} --into {path} -o {out}")).refused(&["which layer", "--layer"]);
    let into = format!("{path}/model-00001-of-00002.safetensors");
    let before = fs::read(&into).unwrap();
    ultramem(&format!("import {} --into {path} -o {into}", a.display())).refused(&["would replace"]);
    assert!(fs::read(&into).unwrap() == before);
}

#[test]
fn a_bad_model_is_one_line() {
    let directory = directory();
    let folder = directory.path().display().to_string();
    ultramem(&format!("info {folder}")).refused(&["holds no model"]);
    let fixture = |name: &str| model(&format!("olmo_memory_plus/{name}"));
    let bytes = fs::read(fixture("model.pt")).unwrap();
    let (file, settings) = (directory.path().join("model.pt"), directory.path().join("config.yaml"));
    let text = fs::read_to_string(fixture("config.yaml")).unwrap();
    let verbs = |words: &[&str]| {
        for verb in ["info", "check", "export --layer 0 -o x", "forward --layer 0 -o x", "bench layer --layer 0"] {
            let expected =
                if verb == "check" { format!("--expected {}", fixture("expected.safetensors")) } else { String::new() };
            let (verb, rest) =
                verb.split_once(" --").map_or((verb, String::new()), |(verb, rest)| (verb, format!("--{rest}")));
            ultramem(&format!("{verb} {folder} {rest} {expected}")).refused(words);
        }
    };
    fs::write(&file, &bytes).unwrap();
    fs::write(&settings, text.replace("mem_kdim: 12", "mem_kdim: 16")).unwrap();
    verbs(&["model.pt", "mem_kdim is 16, but keys of layer 0 are 12 wide"]);
    fs::write(&settings, text.replace("mem_kdim: 12", "mem_kdim: [")).unwrap();
    verbs(&["config.yaml"]);
    fs::write(&settings, &text).unwrap();
    for length in [0, 9, 1000, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&file, &bytes[..length]).unwrap();
        verbs(&["model.pt"]);
    }
    fs::write(&file, &bytes).unwrap();
    fs::remove_file(&settings).unwrap();
    verbs(&["model.pt", "name the settings"]);
    ultramem(&format!("info {folder} --config {}", fixture("config.yaml"))).well();
    ultramem(&format!("info {folder} --config {folder}/nowhere.yaml")).refused(&["nowhere.yaml"]);
}

/// The commands of the README's section, on a fixture in the place of its model.
#[test]
fn the_readmes_commands_run() {
    let readme = include_str!("../../README.md");
    let section = readme.split("## From a PyTorch checkpoint\n").nth(1).expect("the section");
    let commands = section.split("```sh\n").nth(1).and_then(|rest| rest.split("```").next()).expect("commands");
    let directory = directory();
    for line in commands.lines() {
        let line = line.split('#').next().unwrap_or(line).trim().strip_prefix("ultramem ").expect("a command");
        let there = |word: &str| match word {
            "runs/my-model" => model("olmo_ultramem_v1"),
            "expected.safetensors" | "runs/my-model/config.yaml" => {
                model(&format!("olmo_ultramem_v1/{}", word.trim_start_matches("runs/my-model/")))
            }
            file if file.ends_with(".safetensors") => directory.path().join(file).display().to_string(),
            other => other.to_string(),
        };
        let words: Vec<String> = line.split_whitespace().map(there).collect();
        ultramem(&words.join(" ")).well();
    }
    assert!(commands.lines().count() >= 4);
}
