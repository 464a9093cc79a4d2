//! The contract of the command: what each verb gives, exit statuses, and one line for every error. The tests that name wgpu
//! need an adapter and fail where there is none.

mod support;

use std::path::Path;

use serde_json::Value;
use support::{LAYERS, Parts, Ran, changed, directory, fixture, relative_l2, ultramem, ultramem_with, without_adapter};

#[test]
fn demo_agrees_and_shows_slots() {
    let text = ultramem("--backend wgpu").well();
    for words in ["with PyTorch's stored output", "32,768 of 32,768", "of a copy", "slot ", "end in \""] {
        assert!(text.contains(words), "{words:?} is not in {text}");
    }
    assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
}

#[test]
fn demo_reports_as_json() {
    let report = ultramem("demo --backend wgpu --json").json();
    assert_eq!(report["backend"], "wgpu");
    assert_eq!(report["agreement"]["passed"], true);
    assert_eq!(report["agreement"]["equal_slots"], 32_768);
    assert_eq!(report["usage"]["slots"], 65_536);
    assert_eq!(report["slots"].as_array().map(Vec::len), Some(6));
    assert!(report["stages"]["expand"]["share_of_copy"].as_f64() > Some(0.0));
}

#[test]
fn demo_takes_a_file() {
    let bundled = concat!(env!("CARGO_MANIFEST_DIR"), "/data/kjv_layer.safetensors");
    let text = ultramem(&format!("demo {bundled} --backend wgpu")).well();
    for words in [bundled, "with the file's stored output", "32,768 of 32,768", "end in \""] {
        assert!(text.contains(words), "{words:?} is not in {text}");
    }
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/ultramem_v1_tiny.safetensors");
    ultramem(&format!("demo {golden}")).refused(&[golden, "\"text\""]);
    ultramem("demo nowhere.safetensors").refused(&["nowhere.safetensors"]);
}

#[test]
fn demo_runs_in_half_precision() {
    let report = ultramem("demo --backend wgpu --dtype f16 --json").json();
    assert_eq!((&report["dtype"], &report["agreement"]["oracle_bound"]), (&"f16".into(), &0.01.into()));
}

#[test]
fn demo_runs_on_the_processor_where_there_is_no_gpu() {
    // With a driver, too, that is software.
    for Ran { status, stdout, stderr } in [without_adapter("demo --json"), ultramem("demo --json")] {
        assert_eq!((status, stderr.as_str()), (Some(0), ""));
        let report: Value = serde_json::from_str(&stdout).expect("--json prints JSON");
        assert_eq!((&report["backend"], &report["agreement"]["passed"]), (&"cpu".into(), &true.into()));
        assert!(report["driver"].as_str().is_some_and(|driver| driver.contains("thread")), "{report}");
        assert!(report["stages"]["expand"]["share_of_copy"].as_f64() > Some(0.0));
    }
}

#[test]
fn the_processor_is_measured_as_a_device() {
    let report = ultramem(&format!("{SMALL} --backend cpu --json")).json();
    assert!(
        report["matrix_tflop_s"].as_f64() > Some(0.0) && report["stages"]["score"]["floor_ms"].as_f64() > Some(0.0)
    );
    let text = ultramem("bench training --tokens 8 --side-keys 16 --top-m 4 --samples 3 --backend cpu").well();
    assert!(text.contains("update") && text.contains("over floor"), "{text}");
    let stages = ultramem("bench stages --tokens 1,5 --side-keys 16 --top-m 4 --samples 3 --backend cpu --json").json();
    assert_eq!(stages["tokens"].as_array().map(Vec::len), Some(2), "{stages}");
    for verb in ["versus", "growth", "decode"] {
        ultramem(&format!("bench {verb} --backend cpu")).refused(&[verb, "GPU", "native"]);
    }
    let devices = ultramem("devices --backend cpu --json").json();
    assert_eq!(devices["devices"][0]["types"], serde_json::json!(["f32", "f16", "bf16"]), "{devices}");
    ultramem("demo --backend cpu --limits webgpu").refused(&["--limits webgpu"]);
}

#[test]
fn kernels_run_where_there_is_no_gpu() {
    let folder = directory();
    for (name, device) in [("ultramem_v1_tiny", "h100"), ("ultramem_v2_tiny", "a100"), ("lingua_peer", "b200")] {
        let report = ultramem(&format!("check {} --backend offline --device {device} --json", fixture(name))).json();
        assert_eq!((&report["backend"], &report["missed"]), (&"offline".into(), &0.into()), "{name}: {report}");
    }
    let (tiny, out) = (fixture("ultramem_v1_tiny"), folder.path().join("out.safetensors"));
    for verb in ["forward", "backward"] {
        let args = format!("{verb} {tiny} -o {} --backend offline --dtype bf16 --json", out.display());
        assert_eq!(ultramem(&args).json()["device"], "h100 without a GPU", "{verb}");
    }
    for verb in ["demo", "bench layer", "bench versus"] {
        ultramem(&format!("{verb} --backend offline")).refused(&["measures time", "forward, backward and check"]);
    }
    ultramem(&format!("check {tiny} --backend offline --device h300")).refused(&["h300", "rtx4090"]);
    let devices = ultramem("devices --backend offline --json").json();
    assert_eq!(devices["devices"].as_array().map(Vec::len), Some(5), "{devices}");
}

#[test]
fn a_forward_pass_is_profiled_without_a_gpu() {
    let sizes = "--hidden-size 64 --side-keys 64 --key-dim 16 --value-dim 64 --top-m 8";
    let report = ultramem(&format!("profile {sizes} --tokens 128 --dtype bf16 --json")).json();
    let launches = report["launches"].as_array().expect("launches are listed");
    let of_stage = |name: &str| launches.iter().filter(|launch| launch["stage"] == name).count();
    assert!(["query", "combine", "expand"].iter().all(|stage| of_stage(stage) > 0), "{report}");
    assert!(launches.iter().all(|launch| launch["registers"].as_u64() > Some(0)), "{report}");
    let (pass, rates) = (&report["passes"][0], &report["rates"]);
    assert!(pass["host_tasks"].as_u64() > Some(launches.len() as u64), "a launch has room for what it writes: {pass}");
    assert_eq!(
        pass["host_us"].as_f64(),
        Some(pass["host_tasks"].as_f64().unwrap() * rates["host_task"].as_f64().unwrap())
    );
    let text = ultramem(&format!("profile {sizes} --tokens 128 --device a100")).well();
    assert!(text.starts_with("a100 for 128 tokens, f32") && text.contains("the gather's"), "{text}");
    let folder = directory();
    let constants = |text: &str| {
        let file = folder.path().join("constants.json");
        std::fs::write(&file, text).expect("the folder is there");
        ultramem(&format!("profile {sizes} --tokens 128 --dtype bf16 --constants {} --json", file.display()))
    };
    let (rates, slower) = (&report["rates"], constants(r#"{ "clock": 0.85 }"#).json());
    assert_eq!((rates["clock"].as_f64(), slower["rates"]["clock"].as_f64()), (Some(1.7), Some(0.85)));
    assert!(slower["predicted_us"].as_f64() > report["predicted_us"].as_f64(), "{slower}");
    constants(r#"{ "clocks": 0.85 }"#).refused(&["constants.json", "clocks"]);
    constants("[]").refused(&["constants.json", "object"]);
    for rate in [r#""fast""#, "0", "-1.5", "null"] {
        constants(&format!(r#"{{ "clock": {rate} }}"#)).refused(&["constants.json", "clock", rate, "above 0"]);
    }
}

/// What `constants` writes is what `profile` reads: on the offline device the constants that it assumes.
#[test]
fn constants_that_are_counted_are_those_that_a_profile_assumes() {
    let folder = directory();
    let file = folder.path().join("constants.json");
    let report = ultramem(&format!("constants --backend offline -o {} --json", file.display())).json();
    let sizes = "--hidden-size 64 --side-keys 64 --key-dim 16 --value-dim 64 --top-m 8 --tokens 128 --dtype bf16";
    let assumed = ultramem(&format!("profile {sizes} --json")).json();
    let given = ultramem(&format!("profile {sizes} --constants {} --json", file.display())).json();
    let constants = report["constants"].as_object().expect("constants are listed");
    assert!(constants.len() > 15, "{report}");
    for (name, value) in constants {
        let (value, assumed) = (value.as_f64().unwrap_or(0.0), assumed["rates"][name].as_f64().unwrap_or(f64::NAN));
        assert!((value / assumed - 1.0).abs() < 0.1, "{name}: {value}, assumed {assumed}");
        assert_eq!(given["rates"][name].as_f64(), Some(value), "{name}");
    }
    ultramem("constants --backend reference").refused(&["cuda", "offline"]);
}

#[test]
fn a_backend_that_is_not_there_is_an_error_with_the_cure() {
    without_adapter("demo --backend wgpu").refused(&["apt-get install mesa-vulkan-drivers"]);
    without_adapter("demo --backend cuda").refused(&["CUDA"]);
}

#[test]
fn layers_run_within_webgpus_limits() {
    let directory = directory();
    let out = directory.path().join("out.safetensors").display().to_string();
    for name in LAYERS {
        let report = ultramem(&format!("check {} --limits webgpu --json", fixture(name))).json();
        assert_eq!((&report["backend"], &report["missed"]), (&"wgpu".into(), &0.into()), "{name}: {report}");
    }
    let file = fixture("ultramem_v1_tiny");
    for args in [format!("forward {file} -o {out}"), format!("backward {file} -o {out}"), "demo".into()] {
        let text = ultramem(&format!("{args} --backend wgpu --limits webgpu")).well();
        assert!(text.contains("within WebGPU's limits"), "{text}");
    }
    ultramem(&format!("{SMALL} --limits webgpu --json")).json();
}

#[test]
fn limits_are_for_what_has_them() {
    for args in ["demo --backend cuda", "demo --backend reference", "devices", "info nowhere.safetensors"] {
        ultramem(&format!("{args} --limits webgpu")).refused(&["--limits webgpu"]);
    }
}

#[test]
fn a_panicking_driver_is_one_line() {
    ultramem_with("demo --backend wgpu", &[("CUBECL_WGPU_MAX_TASKS", "many"), ("RUST_BACKTRACE", "1")])
        .refused(&["CUBECL_WGPU_MAX_TASKS"]);
}

#[test]
fn check_agrees_with_every_golden_file() {
    for name in LAYERS {
        for backend in ["wgpu", "cpu", "reference"] {
            let report = ultramem(&format!("check {} --backend {backend} --json", fixture(name))).json();
            // Output, slots, scores and a gradient for the input and for each weight; UltraMem's auxiliary loss.
            let others = if name.starts_with("ultramem") { gradients(name) + 1 } else { 7 };
            let counts = ["passed", "missed", "not_checked"].map(|key| report[key].as_u64().unwrap_or(99));
            assert_eq!(counts, [3 + others, 0, 0], "{name} on {backend}: {report}");
        }
        let report = ultramem(&format!("check {} --backend wgpu --dtype f16 --json", fixture(name))).json();
        assert_eq!(report["missed"], 0, "{name} in f16: {report}");
        assert!(report["passed"].as_u64() >= Some(8), "{name} in f16: {report}");
    }
}

/// Expected gradients of an UltraMem golden file: of the input, of six weights and of each core.
fn gradients(name: &str) -> u64 {
    if name.ends_with("single_core") { 8 } else { 9 }
}

#[test]
fn check_names_what_it_did_not_check() {
    let check = |dtype: &str| {
        let file = fixture("ultramem_v1_tiny");
        ultramem(&format!("check {file} --backend reference --dtype {dtype}")).well()
    };
    let (exact, rounded) = (check("f32"), check("f16"));
    assert!(exact.contains("expected.core_singular_values_tail_loss"), "{exact}");
    assert!(exact.ends_with("13 passed, 0 missed, 0 not checked\n"), "{exact}");
    assert!(rounded.contains("expected.indices: not checked, "), "{rounded}");
    assert!(rounded.ends_with("11 passed, 0 missed, 2 not checked\n"), "{rounded}");
}

#[test]
fn check_misses_what_was_tampered_with() {
    let places = [
        ("expected.output", 3),
        ("expected.scores", 3),
        ("expected.indices", 0),
        ("expected.grad_input", 3),
        ("expected.core_singular_values_tail_loss", 3),
    ];
    for (name, place) in places {
        let directory = directory();
        let file = changed(&directory, "ultramem_v1_tiny", |parts| parts.bytes(name)[place] ^= 1);
        let ran = ultramem(&format!("check {file} --backend reference"));
        assert_eq!((ran.status, ran.stderr.as_str()), (Some(1), ""), "{}", ran.stdout);
        let missed: Vec<&str> = ran.stdout.lines().filter(|line| line.ends_with("MISSED")).collect();
        assert!(missed.len() == 1 && missed[0].contains(name), "{}", ran.stdout);
    }
}

#[test]
fn check_refuses_files_that_it_can_not_judge() {
    let directory = directory();
    let tiny = "ultramem_v1_tiny";
    let file = changed(&directory, tiny, |parts| parts.header["expected.output"]["shape"] = [32, 16].into());
    ultramem(&format!("check {file}")).refused(&["expected.output", "[32, 16]", "[16, 32]"]);
    let file = changed(&directory, tiny, |parts| parts.header["expected.scores"]["shape"] = [16, 8].into());
    ultramem(&format!("check {file}")).refused(&["expected.scores", "[16, 8]", "[16, 4, 2]"]);
    let file = changed(&directory, tiny, |parts| parts.header["expected.indices"]["dtype"] = "F64".into());
    ultramem(&format!("check {file}")).refused(&["expected.indices", "F64"]);
    let file = changed(&directory, tiny, |parts| parts.header["input"]["shape"] = [32, 16].into());
    ultramem(&format!("check {file}")).refused(&["input", "[32, 16]"]);
    let file = changed(&directory, tiny, |parts| {
        let names: Vec<String> = parts.header.as_object().into_iter().flat_map(|it| it.keys().cloned()).collect();
        for name in names.iter().filter(|name| name.starts_with("expected.")) {
            parts.header[name.replace("expected", "kept")] = parts.header[name].take();
        }
        parts.remove("expected.");
    });
    ultramem(&format!("check {file}")).refused(&["expected.output", "expected.grad"]);
    let file = changed(&directory, tiny, |parts| parts.header["grad_output"]["shape"] = [32, 16].into());
    ultramem(&format!("check {file}")).refused(&["grad_output", "[32, 16]", "[16, 32]"]);
    let file = changed(&directory, tiny, |parts| parts.header["expected.grad.keys"]["shape"] = [2048].into());
    ultramem(&format!("check {file}")).refused(&["expected.grad.keys", "[2048]"]);
}

#[test]
fn broken_files_are_refused() {
    let directory = directory();
    let path = |name: &str| directory.path().join(name).display().to_string();
    ultramem("info /nonexistent/layer.safetensors").refused(&["/nonexistent/layer.safetensors"]);
    std::fs::write(path("text"), "not a safetensors file at all").expect("the directory is there");
    let whole = std::fs::read(fixture("ultramem_v1_tiny")).expect("the fixture is there");
    std::fs::write(path("cut"), &whole[..whole.len() / 2]).expect("the directory is there");
    let missing = changed(&directory, "ultramem_v1_tiny", |parts| {
        parts.header["other"] = parts.header["keys"].take();
        parts.header.as_object_mut().expect("the header is an object").remove("keys");
    });
    let mut parts = Parts::read(fixture("ultramem_v1_tiny"));
    parts.header["__metadata__"]["kind"] = "ultramem_v9".into();
    let unknown = parts.write(Path::new(&path("unknown")));
    for verb in ["info", "check", "forward -o /nonexistent/out", "backward -o /nonexistent/out"] {
        ultramem(&format!("{verb} {}", path("text"))).refused(&["text"]);
        ultramem(&format!("{verb} {}", path("cut"))).refused(&["cut"]);
        ultramem(&format!("{verb} {missing}")).refused(&["keys"]);
        ultramem(&format!("{verb} {unknown}")).refused(&["kind", "ultramem_v9"]);
    }
}

#[test]
fn forward_writes_output_slots_and_scores() {
    for name in LAYERS {
        let (directory, mut expected) = (directory(), Parts::read(fixture(name)));
        let out = directory.path().join("out.safetensors");
        ultramem(&format!("forward {} -o {} --backend wgpu", fixture(name), out.display())).well();
        let mut found = Parts::read(&out);
        assert_eq!(found.shape("output"), expected.shape("expected.output"));
        assert_eq!(found.shape("indices"), expected.shape("expected.indices"));
        assert_eq!((found.shape("scores").len(), &found.header["indices"]["dtype"]), (3, &"I64".into()));
        assert!(found.bytes("indices") == expected.bytes("expected.indices"), "{name}");
        for tensor in ["output", "scores"] {
            let distance = relative_l2(&found.f32s(tensor), &expected.f32s(&format!("expected.{tensor}")));
            assert!(distance <= 1e-5, "{name}: {tensor} is off by {distance}");
        }
        assert_eq!(files(directory.path()), 1);
    }
}

#[test]
fn backward_writes_a_gradient_for_every_weight() {
    for (name, backend) in
        LAYERS.into_iter().flat_map(|name| ["wgpu", "cpu", "reference"].map(|backend| (name, backend)))
    {
        let (directory, mut expected) = (directory(), Parts::read(fixture(name)));
        let out = directory.path().join("out.safetensors");
        let text = ultramem(&format!("backward {} -o {} --backend {backend}", fixture(name), out.display())).well();
        assert!(text.contains("value rows used"), "{text}");
        let mut found = Parts::read(&out);
        let names: Vec<String> = expected.header.as_object().into_iter().flat_map(|it| it.keys().cloned()).collect();
        for expected_name in names.iter().filter(|name| name.starts_with("expected.grad")) {
            let name = expected_name.trim_start_matches("expected.");
            assert_eq!(found.shape(name), expected.shape(expected_name), "{name}");
            let distance = relative_l2(&found.f32s(name), &expected.f32s(expected_name));
            assert!(distance <= 1e-4, "{name}: {distance}");
        }
    }
}

#[test]
fn backward_needs_the_gradient_of_the_output() {
    let directory = directory();
    let file = changed(&directory, "ultramem_v1_tiny", |parts| {
        parts.header["other"] = parts.header["grad_output"].take();
        parts.remove("grad_output");
    });
    ultramem(&format!("backward {file} -o {}", directory.path().join("out").display())).refused(&["grad_output"]);
}

fn files(directory: &Path) -> usize {
    std::fs::read_dir(directory).map_or(0, Iterator::count)
}

#[test]
fn forward_says_where_it_can_not_write() {
    let file = fixture("ultramem_v1_tiny");
    ultramem(&format!("forward {file} -o /nonexistent/out --backend reference")).refused(&["/nonexistent/out"]);
    ultramem(&format!("forward {file}")).refused(&["--output"]);
}

#[test]
fn info_counts_parameters_and_bytes() {
    let report = ultramem(&format!("info {} --json", fixture("ultramem_v1_tiny"))).json();
    assert_eq!((&report["rows"], &report["slots"]), (&64.into(), &256.into()));
    assert_eq!(report["total_parameters"], 16 * 32 + 2 * 16 * 8 * 2 + 2 * 8 + 2 * 4 + 64 * 16 + 32 * 64);
    let preset = ultramem("info --preset ultramem_v1_1b --json").json();
    assert_eq!((&preset["rows"], &preset["slots_read_per_token"]), (&652_864.into(), &160.into()));
    assert_eq!(preset["bytes_read_per_token"]["bf16"], 160 * (768 + 4));
    let small = ultramem("info --preset ultramem_151m --json").json();
    assert_eq!((&small["rows"], &small["slots_read_per_token"]), (&(1100 * 1100).into(), &84.into()));
    let text = ultramem("info --preset ultramem_v1_1b").well();
    assert!(text.contains("254,656,912"), "{text}");
    ultramem("info").refused(&["FILE"]);
}

#[test]
fn devices_lists_adapters() {
    let report = ultramem("devices --json --backend wgpu").json();
    let device = &report["devices"][0];
    assert_eq!(device["backend"], "wgpu", "{report}");
    assert!(device["max_binding_bytes"].as_u64() > Some(0), "{report}");
    assert_eq!(device["types"][0], "f32", "{report}");
    let text = without_adapter("devices").well();
    assert!(text.contains("apt-get install mesa-vulkan-drivers"), "{text}");
}

const SMALL: &str = "bench layer --tokens 5 --hidden-size 24 --side-keys 18 --key-dim 7 --value-dim 10 --top-m 3 --heads 3 \
                     --cores 2 --expansion 9 --tucker-rank 3 --samples 3";

#[test]
fn bench_measures_every_stage() {
    let report = ultramem(&format!("{SMALL} --backend wgpu --json")).json();
    for (of, name) in [("dimensions", "expansion"), ("dimensions", "tucker_rank")] {
        assert!(report[of][name].as_u64() > Some(0), "{report}");
    }
    assert!(report["copy_gb_s"].as_f64() > Some(0.0), "{report}");
    assert!(report["first_call_ms"].as_f64() > Some(0.0), "{report}");
    let forward = &report["forward_ms"];
    assert!(forward["min"].as_f64() <= forward["median"].as_f64(), "{report}");
    assert!(forward["median"].as_f64() <= forward["max"].as_f64(), "{report}");
    for stage in ["query", "score", "combine", "expand"] {
        let stage = &report["stages"][stage];
        assert!(stage["ms"]["median"].as_f64() > Some(0.0) && stage["flops"].as_u64() > Some(0), "{report}");
        let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
        let bandwidth = number(&stage["bytes"]) / number(&stage["ms"]["median"]) / 1e6;
        assert!((number(&stage["bandwidth_gb_s"]) / bandwidth - 1.0).abs() < 1e-9, "{report}");
    }
}

#[test]
fn bench_measures_the_same_bits_in_any_batch() {
    let strategies =
        |flags: &str| ultramem(&format!("{SMALL} --backend wgpu --json{flags}")).json()["strategies"].to_string();
    assert!(strategies(" --invariant").contains("InvariantTile") && !strategies("").contains("Invariant"));
}

#[test]
fn bench_measures_training() {
    let training = SMALL.replace("layer", "training");
    let report = ultramem(&format!("{training} --backend wgpu --json")).json();
    for stage in ["query", "score", "combine", "expand", "backward", "update"] {
        let stage = &report["stages"][stage];
        assert!(stage["ms"]["median"].as_f64() > Some(0.0) && stage["bytes"].as_u64() > Some(0), "{report}");
    }
    let rows = report["rows"].as_u64().unwrap_or(0);
    assert!((1..=36).contains(&rows), "{rows} of 18² / 9 rows were read");
    assert!(report["over_forward"].as_f64() > Some(0.0), "{report}");
    let text = ultramem(&format!("{training} --backend wgpu")).well();
    assert!(text.contains("times the forward pass") && text.contains("of 36 rows"), "{text}");
    ultramem(&format!("{training} --backend reference")).refused(&["bench training"]);
}

#[test]
fn bench_times_the_reference_as_a_whole() {
    let report = ultramem(&format!("{SMALL} --backend reference --dtype bf16 --json")).json();
    assert!(report["forward_ms"]["median"].as_f64() > Some(0.0), "{report}");
    assert_eq!((report.get("stages"), report.get("copy_gb_s")), (None, None));
}

#[test]
fn bench_refuses_what_can_not_run() {
    ultramem("bench layer --top-m 80 --side-keys 64").refused(&["top_m 80", "side_keys 64"]);
    ultramem("bench layer --tokens 0").refused(&["0", "--tokens"]);
    ultramem("bench layer --heads -3").refused(&["-3"]);
    ultramem("bench layer --value-dim 63 --cores 2").refused(&["63", "2"]);
    ultramem("bench layer --tokens 1000000000000000").refused(&["host memory"]);
    ultramem("bench layer --tokens 99999999999999999999").refused(&["99999999999999999999"]);
    ultramem("bench layer --side-keys 65534 --value-dim 1048576").refused(&["host memory"]);
}

const DESIGNS: [&str; 5] = ["dense", "MoE", "PKM", "Memory+", "UltraMem"];
/// What each is drawn in, as in `bench/chart.rs`.
const COLOURS: [[u8; 3]; 5] = [[0; 3], [0xd5, 0x5e, 0], [0xe6, 0x9f, 0], [0, 0x9e, 0x73], [0, 0x72, 0xb2]];

/// The texts of an SVG file.
fn texts(path: &Path) -> Vec<String> {
    let svg = std::fs::read_to_string(path).expect("the picture was written");
    let document = resvg::usvg::roxmltree::Document::parse(&svg).expect("the picture is XML");
    let texts = document.descendants().filter(|node| node.has_tag_name("text"));
    texts.filter_map(|node| node.text()).map(|text| text.trim().to_string()).collect()
}

/// The pixels of a PNG file that are exactly of a colour.
fn pixels(path: &Path, [red, green, blue]: [u8; 3]) -> usize {
    let picture = resvg::tiny_skia::Pixmap::load_png(path).expect("the picture is a PNG");
    let same = |it: &&resvg::tiny_skia::PremultipliedColorU8| (it.red(), it.green(), it.blue()) == (red, green, blue);
    picture.pixels().iter().filter(same).count()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

/// The numbers of every design at one place.
fn has_every_design(designs: &Value) {
    for name in DESIGNS {
        let design = &designs[name];
        assert!(number(&design["ms"]["median"]) > 0.0 && number(&design["bytes"]) > 0.0, "{name}: {designs}");
        let over_floor = number(&design["ms"]["median"]) / number(&design["floor_ms"]);
        assert!((number(&design["over_floor"]) / over_floor - 1.0).abs() < 1e-9, "{name}: {designs}");
    }
}

#[test]
fn bench_versus_compares_designs_and_draws_them() {
    let directory = directory();
    let (svg, png) = (directory.path().join("out.svg"), directory.path().join("out.png"));
    let verb = "bench versus --backend wgpu --batch 8,1,8 --samples 3";
    let report = ultramem(&format!("{verb} --json --plot {}", svg.display())).json();
    assert_eq!(report["batches"].as_array().map(Vec::len), Some(2), "{report}");
    for row in report["batches"].as_array().expect("batches are a list") {
        has_every_design(&row["designs"]);
    }
    let sparse = |at: usize| number(&report["budgets"][at]["sparse"]);
    assert!(sparse(0) == 0.0 && (1..5).all(|at| (sparse(at) / sparse(1) - 1.0).abs() < 0.04), "{report}");
    assert!(number(&report["copy_gb_s"]) > 0.0 && report["driver"].is_string(), "{report}");
    let texts = texts(&svg);
    for words in DESIGNS.iter().chain(&["latency of a step (ms)", "bytes moved per step (MB)", "batch (sequences)"]) {
        assert!(texts.iter().any(|text| text == words), "{words} is not in {texts:?}");
    }
    let text = ultramem(&format!("{verb} --plot {}", png.display())).well();
    for words in DESIGNS.iter().chain(&["Equal budgets", "In short", "over the design's own floor", "out.png"]) {
        assert!(text.contains(words), "{words:?} is not in {text}");
    }
    assert!(text.lines().all(|line| line.chars().count() <= 100 || line.starts_with("Picture")), "{text}");
    for (name, colour) in DESIGNS.iter().zip(COLOURS) {
        assert!(pixels(&png, colour) > 100, "{name} is not drawn");
    }
}

#[test]
fn bench_growth_holds_sizes_against_the_first() {
    let directory = directory();
    let svg = directory.path().join("out.svg");
    let verb = "bench growth --backend wgpu --factors 1,4 --cached 64 --samples 3";
    let report = ultramem(&format!("{verb} --json --plot {}", svg.display())).json();
    let sizes = report["sizes"].as_array().expect("sizes are a list");
    assert_eq!(sizes.iter().map(|size| number(&size["factor"])).collect::<Vec<_>>(), [1.0, 4.0]);
    for size in sizes {
        has_every_design(&size["designs"]);
        assert!(number(&size["ultramem_score_ms"]["median"]) > 0.0, "{report}");
        let interval = &size["designs"]["UltraMem"]["over_first"]["interval"];
        assert!(number(&interval[0]) <= number(&interval[1]), "{report}");
    }
    let grown = |name: &str| number(&sizes[1]["designs"][name]["bytes"]) / number(&sizes[0]["designs"][name]["bytes"]);
    assert!(grown("MoE") > 1.2 && grown("UltraMem") < 1.1, "{report}");
    let texts = texts(&svg);
    for words in DESIGNS.iter().chain(&["UltraMem's score stage", "×4", "sparse parameters"]) {
        assert!(texts.iter().any(|text| text == words), "{words} is not in {texts:?}");
    }
}

#[test]
fn bench_decode_scales_down_and_says_so() {
    let text = ultramem("bench decode --backend wgpu --model small --batch 2,4096 --cached 512 --samples 3").well();
    for words in ["attention included", "Left out: batch 4,096", "UltraMem: FFN of "] {
        assert!(text.contains(words), "{words:?} is not in {text}");
    }
}

#[test]
fn bench_stages_measures_each_over_tokens() {
    let directory = directory();
    let svg = directory.path().join("out.svg");
    let report =
        ultramem(&format!("bench stages --backend wgpu --tokens 1,5 --samples 3 --json --plot {}", svg.display()));
    let report = report.json();
    for (at, tokens) in [1.0, 5.0].into_iter().enumerate() {
        let found = &report["tokens"][at];
        assert_eq!(number(&found["tokens"]), tokens, "{report}");
        for stage in ["query", "score", "combine", "expand"] {
            assert!(number(&found["stages"][stage]["floor_ms"]) > 0.0, "{report}");
        }
    }
    let texts = texts(&svg);
    assert!(["forward", "combine", "tokens"].iter().all(|words| texts.iter().any(|text| text == words)), "{texts:?}");
}

#[test]
fn bench_refuses_what_can_not_be_compared_or_drawn() {
    ultramem("bench stages --backend reference").refused(&["bench stages", "needs a device"]);
    for verb in ["stages", "versus", "growth", "decode"] {
        let verb = format!("bench {verb}");
        ultramem(&format!("{verb} --plot out.jpg")).refused(&["out.jpg", ".svg or .png"]);
        ultramem(&format!("{verb} --plot /nonexistent/out.png")).refused(&["/nonexistent/out.png"]);
        ultramem(&format!("{verb} --samples 2")).refused(&["--samples"]);
    }
    for verb in ["bench versus", "bench growth", "bench decode"] {
        ultramem(&format!("{verb} --backend reference")).refused(&[verb, "GPU"]);
        without_adapter(verb).refused(&["GPU", "apt-get install mesa-vulkan-drivers"]);
    }
    for verb in
        ["versus --batch 0", "growth --batch 0", "decode --batch 1,0", "stages --tokens 0", "growth --factors 0"]
    {
        ultramem(&format!("bench {verb}")).refused(&["0", "expected a whole number"]);
    }
}

#[cfg(not(feature = "vulkan"))]
#[test]
fn bf16_needs_a_device_that_has_it() {
    for verb in ["demo", "bench layer --tokens 4"] {
        ultramem(&format!("{verb} --backend wgpu --dtype bf16")).refused(&["bf16"]);
    }
}

#[test]
fn bad_usage_is_one_line() {
    ultramem("demo --bogus").refused(&["--bogus"]);
    ultramem("nonsense").refused(&["nonsense"]);
    ultramem("demo --backend metal").refused(&["metal"]);
    ultramem("demo --dtype f64").refused(&["f64"]);
    ultramem("bench").refused(&["bench"]);
    let help = ultramem("--help").well();
    assert!(help.contains("Usage: ultramem"), "{help}");
}

#[test]
fn kernels_are_written_with_a_manifest() {
    let directory = directory();
    let folder = directory.path().join("kernels");
    for (target, ending, words) in
        [("cuda", "cu", "__global__"), ("wgsl", "wgsl", "@compute"), ("ptx", "ptx", ".visible .entry")]
    {
        let command = format!("kernels --target {target} --tokens 100 --key-dim 64 --json -o {}", folder.display());
        let report = ultramem(&command).json();
        let manifest: Value = serde_json::from_slice(&std::fs::read(folder.join("manifest.json")).unwrap()).unwrap();
        assert_eq!(manifest, report);
        let launches = manifest["launches"].as_array().unwrap();
        let stages: Vec<&str> = launches.iter().filter_map(|it| it["stage"].as_str()).collect();
        for stage in ["prepare", "query", "score", "combine", "expand"] {
            assert!(stages.contains(&stage), "{target}: no launch of {stage} in {stages:?}");
        }
        for launch in launches {
            let (file, entry) = (launch["file"].as_str().unwrap(), launch["entry_point"].as_str().unwrap());
            let text = std::fs::read_to_string(folder.join(file)).unwrap();
            assert!(file.ends_with(ending) && text.contains(words) && text.contains(entry), "{file}");
            assert!(!launch["buffers"].as_array().unwrap().is_empty() && launch["cube_count"][0].as_u64() > Some(0));
        }
    }
}

#[test]
fn kernels_in_spir_v_are_modules() {
    let directory = directory();
    let report =
        ultramem(&format!("kernels --target spirv --dtype f16 --json -o {}", directory.path().display())).json();
    for launch in report["launches"].as_array().unwrap() {
        let bytes = std::fs::read(directory.path().join(launch["file"].as_str().unwrap())).unwrap();
        assert_eq!(bytes[..4], 0x0723_0203u32.to_le_bytes(), "{launch}");
    }
}

#[test]
fn kernels_that_can_t_be_written_are_one_line() {
    ultramem("kernels").refused(&["--output"]);
    ultramem("kernels --target hlsl -o x").refused(&["hlsl", "cuda", "ptx"]);
    ultramem("kernels --device v100 -o x").refused(&["v100", "h100"]);
    ultramem("kernels --tokens 0 -o x").refused(&["--tokens"]);
    ultramem("kernels --top-m 500 -o x").refused(&["top_m 500 exceeds side_keys 128"]);
    ultramem("kernels --target wgsl --dtype bf16 -o x").refused(&["does not support bf16"]);
    ultramem("kernels -o /proc/nothing/here").refused(&["/proc/nothing/here"]);
    ultramem("kernels --side-keys 200000 -o x").refused(&["side_keys 200000 exceeds the limit 65535"]);
    ultramem("kernels --side-keys 60000 --value-dim 512 -o x").refused(&["values", "bytes"]);
    let nothing = directory();
    ultramem_with("kernels --target ptx -o x", &[("XDG_CACHE_HOME", &nothing.path().display().to_string())])
        .refused(&["python3 -m pip install", "nvidia-cuda-nvrtc-cu12=="]);
}
