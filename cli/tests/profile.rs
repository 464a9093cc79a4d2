//! `ultramem profile`: passes, a layer of a file, lines and a picture.

mod support;

use support::{directory, fixture, ultramem};

const SIZES: &str = "--hidden-size 64 --side-keys 64 --key-dim 16 --value-dim 64 --top-m 8 --tokens 64";

#[test]
fn every_pass_is_counted() {
    let folder = directory();
    let picture = folder.path().join("passes.svg");
    let args = format!("profile {SIZES} --hidden-size 128 --pass all --cached 16 --plot {}", picture.display());
    let args = args.replacen("--hidden-size 64 ", "", 1);
    let report = ultramem(&format!("{args} --json")).json();
    let passes = report["passes"].as_array().expect("passes are listed");
    let names: Vec<&str> = passes.iter().filter_map(|pass| pass["pass"].as_str()).collect();
    assert_eq!(names, ["forward", "backward", "update", "versus"]);
    let launches = report["launches"].as_array().expect("launches are listed");
    let mut sum = 0.0;
    for pass in passes {
        let own = || launches.iter().filter(|launch| launch["pass"] == pass["pass"]);
        assert_eq!(pass["launches"].as_u64(), Some(own().count() as u64), "{pass}");
        let predicted: f64 = own().filter_map(|launch| launch["predicted"].as_f64()).sum();
        assert!((predicted / pass["predicted_us"].as_f64().unwrap() - 1.0).abs() < 1e-9, "{pass}");
        sum += predicted;
    }
    assert!((sum / report["predicted_us"].as_f64().unwrap() - 1.0).abs() < 1e-9);
    // Two heads of eight slots for each of 64 tokens.
    assert_eq!(passes[1]["choices"]["entries"], 64 * 2 * 8);
    for launch in launches {
        let line = &launch["lines"][0];
        assert!(
            line["text"].as_str().is_some_and(|text| !text.is_empty()) && line["time"].as_f64() > Some(0.0),
            "{line}"
        );
    }
    let svg = std::fs::read_to_string(&picture).expect("the picture is there");
    for word in ["forward", "backward", "update", "dense", "experts", "attention", "floor"] {
        assert!(svg.contains(word), "{word} is not drawn");
    }
}

#[test]
fn lines_of_the_source_are_printed() {
    let text = ultramem(&format!("profile {SIZES} --lines 3 --pass update --optimiser sgd")).well();
    for words in ["Update by SGD", "sgd_kernel", "counts in thousands", "choices of"] {
        assert!(text.contains(words), "{words} is not in {text}");
    }
    let after = text.split("counts in thousands").nth(1).expect("a table of lines");
    assert_eq!(after.lines().filter(|line| !line.trim().is_empty()).count(), 3, "{text}");
}

#[test]
fn a_layer_of_a_file_is_profiled() {
    let report =
        ultramem(&format!("profile {} --tokens 64 --pass backward --json", fixture("ultramem_v1_tiny"))).json();
    let layer = ultramem(&format!("info {} --json", fixture("ultramem_v1_tiny"))).json();
    assert_eq!(report["dimensions"]["side_keys"], layer["config"]["side_keys"], "{layer}");
    let model = format!("{}/../tests/fixtures/models/olmo_ultramem_v1", env!("CARGO_MANIFEST_DIR"));
    ultramem(&format!("profile {model}")).refused(&["memory layers", "--layer"]);
    let text = ultramem(&format!("profile {model} --layer 1 --tokens 32")).well();
    assert!(text.starts_with("h100 for 32 tokens, f32"), "{text}");
    ultramem(&format!("profile {model} --layer 99")).refused(&["99"]);
    ultramem("profile nowhere.safetensors").refused(&["nowhere.safetensors"]);
}

#[test]
fn bad_arguments_are_refused() {
    for (args, words) in [
        ("--pass sideways", &["sideways", "backward"][..]),
        ("--tokens 0", &["0", "1..=1048576"]),
        ("--tokens 1048577", &["1048577", "1..=1048576"]),
        ("--lines 0", &["0", "1..=10000"]),
        ("--cached 0 --pass versus", &["0", "1..=1048576"]),
        ("--optimiser sgd", &["--optimiser", "--pass update"]),
        ("--scale 151m --pass forward,update", &["--scale", "--pass versus"]),
        ("--cached 16", &["--cached", "--pass versus"]),
        ("--plot picture.jpg", &["picture.jpg", ".svg or .png"]),
        ("--layer 1", &["<FILE>"]),
        ("file.safetensors --side-keys 64", &["--side-keys"]),
    ] {
        ultramem(&format!("profile {args}")).refused(words);
    }
}

#[test]
fn a_device_that_is_there_is_measured_beside_what_is_predicted() {
    let args = format!("profile {SIZES} --backend wgpu");
    let report = ultramem(&format!("{args} --json")).json();
    let stages = report["measured"]["stages"].as_array().expect("stages are measured");
    let names: Vec<&str> = stages.iter().filter_map(|it| it["stage"].as_str()).collect();
    assert_eq!(names, ["query", "score", "combine", "expand"]);
    let predicted: f64 = stages.iter().filter_map(|it| it["predicted_us"].as_f64()).sum();
    assert!((predicted / report["predicted_us"].as_f64().unwrap() - 1.0).abs() < 1e-9, "{report}");
    assert!(stages.iter().all(|it| it["measured_us"].as_f64() > Some(0.0)), "{report}");
    assert!(ultramem(&args).well().contains("measured over predicted"));
    assert!(ultramem(&format!("profile {SIZES} --json")).json()["measured"].is_null());
}
