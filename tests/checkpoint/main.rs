//! Checkpoints: what is written is read back, and a broken file is an error that says what is broken.

#![cfg(feature = "files")]

#[path = "../common/mod.rs"]
mod common;
mod damage;
mod raw;

use std::collections::BTreeMap;

use common::{KINDS, cast, fixture, random_input, small, trained_layer};
use raw::{RawFile, small_file};
use serde_json::{Value, json};
use ultramem::{
    Capabilities, Checkpoint, Dimensions, ElementType, Error, HostTensor, Kind, MemoryConfig, Norm, Queries, Weight,
    Weights,
    checkpoint::{FileTensor, Integers, save},
};

/// What a file's bytes lead to: its configuration and its weights are both asked for.
fn read(bytes: Vec<u8>) -> Result<MemoryConfig, Error> {
    let file = Checkpoint::from_bytes(bytes)?;
    file.weights()?;
    Ok(file.config().clone())
}

/// Asserts that `bytes` are refused in one line that says each of `words`.
fn assert_refused(bytes: Vec<u8>, words: &[&str]) {
    let message = read(bytes).expect_err(&format!("should be refused: {words:?}")).to_string();
    assert!(message.lines().count() == 1 && message.len() < 500, "{message}");
    for word in words {
        assert!(message.contains(word), "{message:?} does not say {word:?}");
    }
}

#[test]
fn layers_come_back_as_they_were_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("layer.safetensors");
    for kind in KINDS {
        let config = small(kind);
        let wide = Weights::random(&config, 1);
        for dtype in [ElementType::F32, ElementType::F16, ElementType::BF16] {
            let weights = cast(&wide, dtype);
            Checkpoint::write(&path, &config, &weights, &[], &BTreeMap::new()).unwrap();
            let file = Checkpoint::open(&path).unwrap();
            assert_eq!(file.config(), &config, "{kind:?} {dtype}");
            assert_eq!(file.weights().unwrap(), weights, "{kind:?} {dtype}");
            assert_eq!(file.weights().unwrap()[Weight::Values].dtype(), dtype);
        }
    }
}

#[test]
fn golden_files_come_back_as_they_were() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("copy.safetensors");
    for (name, golden) in common::golden_files() {
        let weights = golden.weights().unwrap();
        Checkpoint::write(&path, golden.config(), &weights, &[], golden.metadata()).unwrap();
        let copy = Checkpoint::from_bytes(std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(copy.config(), golden.config(), "{name}");
        assert_eq!(copy.weights().unwrap(), weights, "{name}");
        assert_eq!(copy.metadata().get("text"), golden.metadata().get("text"), "{name}");
        for tensor in copy.names() {
            assert!(golden.has(tensor), "{name}: {tensor} is a name of our own");
        }
    }
}

#[test]
fn metadata_is_read_as_pytorch_wrote_it() {
    let expected = Dimensions {
        capabilities: Kind::UltraMem.capabilities(),
        hidden_size: 48,
        heads: 2,
        side_keys: 24,
        key_dim: 12,
        tucker_rank: 2,
        top_m: 5,
        cores: 1,
        expansion: 4,
        value_dim: 24,
        norm: Norm::Layer,
        ..Dimensions::default()
    };
    let file = Checkpoint::open(fixture("ultramem_v1_layernorm_single_core")).unwrap();
    assert_eq!(file.config(), &MemoryConfig::new(expected).unwrap());
    let file = Checkpoint::open(fixture("memory_plus_tiny")).unwrap();
    assert_eq!(file.config().kind(), Some(Kind::MemoryPlus));
    assert_eq!((file.config().tucker_rank, file.config().cores, file.config().expansion), (1, 1, 1));
    let file = Checkpoint::open(trained_layer()).unwrap();
    assert_eq!(file.metadata()["sequence_length"], "128");
}

#[test]
fn large_weights_borrow_the_file() {
    let file = Checkpoint::from_bytes(small_file(Kind::UltraMem).bytes()).unwrap();
    let (first, second) = (file.weights().unwrap(), file.weights().unwrap());
    assert_eq!(first[Weight::Values].bytes().as_ptr(), second[Weight::Values].bytes().as_ptr());
    assert_eq!(first[Weight::Values].bytes().as_ptr(), file.tensor("values_for_look_up").unwrap().bytes().as_ptr());
}

#[test]
fn other_tensors_travel_along() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("layer.safetensors");
    let config = small(Kind::UltraMem);
    let weights = Weights::random(&config, 1);
    let input = HostTensor::from_f32([2, 11], &random_input(&config, 2, 3)).unwrap();
    let indices = Integers { shape: vec![2, 2], numbers: vec![-1, 0, 1, i64::MAX] };
    let extra = [("input", FileTensor::Floats(input.clone())), ("where", FileTensor::Integers(indices.clone()))];
    let metadata = BTreeMap::from([("text".into(), "two\nlines".into()), ("kind".into(), "pkm".into())]);
    Checkpoint::write(&path, &config, &weights, &extra, &metadata).unwrap();
    let file = Checkpoint::open(&path).unwrap();
    assert_eq!(file.tensor("input").unwrap(), input);
    assert_eq!(file.integers("where").unwrap(), indices);
    assert_eq!(file.metadata()["text"], "two\nlines");
    assert_eq!(file.config().kind(), Some(Kind::UltraMem));
    assert!(file.has("where") && !file.has("elsewhere"));
    assert_eq!(file.names().filter(|name| name.starts_with("tucker_core.")).count(), config.cores);

    for (result, words) in [
        (file.tensor("where").map(drop), ["where", "I64"]),
        (file.integers("input").map(drop), ["input", "F32"]),
        (file.tensor("elsewhere").map(drop), ["elsewhere", "missing"]),
    ] {
        let message = result.unwrap_err().to_string();
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    }
}

#[test]
fn plain_tensors_can_be_saved() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("plain.safetensors");
    let numbers = HostTensor::from_f32([3], &[1.0, 2.0, 3.0]).unwrap();
    let tensors = [("output", FileTensor::Floats(numbers.cast(ElementType::BF16)))];
    save(&path, &tensors, &BTreeMap::from([("made by".into(), "a test".into())])).unwrap();
    let file = RawFile::parse(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(file.header["output"], json!({"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}));
    assert_eq!(file.header["__metadata__"], json!({"made by": "a test"}));
    assert_eq!(file.data, [0x80, 0x3f, 0x00, 0x40, 0x40, 0x40]);
}

#[test]
fn a_failed_write_leaves_what_was_there() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("layer.safetensors");
    std::fs::write(&path, "before").unwrap();
    let config = small(Kind::UltraMem);
    let weights = Weights::random(&config, 1);
    let none = BTreeMap::new();

    let ragged = FileTensor::Integers(Integers { shape: vec![2, usize::MAX], numbers: vec![0] });
    let number = FileTensor::Floats(HostTensor::from_f32([1], &[0.0]).unwrap());
    for (name, tensor) in [("ragged", ragged), ("keys", number.clone()), ("__metadata__", number.clone())] {
        let error = Checkpoint::write(&path, &config, &weights, &[(name, tensor)], &none).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
    let misfit = Weights { core_u: Vec::new(), ..weights.clone() };
    let error = Checkpoint::write(&path, &config, &misfit, &[], &none).unwrap_err();
    assert!(error.to_string().contains("tucker_core_u"), "{error}");
    let oblong = MemoryConfig::new(Dimensions { expansion: 2, ..(*config).clone() }).unwrap();
    let error = Checkpoint::write(&path, &oblong, &Weights::random(&oblong, 1), &[], &none).unwrap_err();
    assert!(error.to_string().contains("expansion is 2"), "{error}");
    let capabilities = Capabilities { queries: Queries::PerHead, ..config.capabilities };
    let nameless = MemoryConfig::new(Dimensions { capabilities, ..(*config).clone() }).unwrap();
    let error = Checkpoint::write(&path, &nameless, &Weights::random(&nameless, 1), &[], &none).unwrap_err();
    assert!(error.to_string().contains("PerHead"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"before");

    let blocks = MemoryConfig::new(Dimensions { expansion: 4, ..(*small(Kind::ProductKey)).clone() }).unwrap();
    Checkpoint::write(&path, &blocks, &Weights::random(&blocks, 1), &[], &none).unwrap();
    assert_eq!(Checkpoint::open(&path).unwrap().config(), &blocks);

    // A directory can't be replaced by a file: the write fails at its last step.
    let taken = directory.path().join("taken");
    std::fs::create_dir(&taken).unwrap();
    for target in [taken.clone(), taken.join("missing/layer.safetensors"), "/".into()] {
        let error = Checkpoint::write(&target, &config, &weights, &[], &none).unwrap_err();
        assert!(matches!(&error, Error::Io { path, .. } if *path == target), "{error}");
    }
    let mut left: Vec<_> = std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["layer.safetensors", "taken"]);
}

#[test]
fn a_file_can_be_replaced_while_it_is_open() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("layer.safetensors");
    let config = small(Kind::UltraMem);
    let (old, new) = (Weights::random(&config, 1), Weights::random(&config, 2));
    Checkpoint::write(&path, &config, &old, &[], &BTreeMap::new()).unwrap();
    let file = Checkpoint::open(&path).unwrap();
    Checkpoint::write(&path, &config, &new, &[], file.metadata()).unwrap();
    assert_eq!(file.weights().unwrap(), old);
    assert_eq!(Checkpoint::open(&path).unwrap().weights().unwrap(), new);
}

#[test]
fn files_that_are_not_there_are_named() {
    let directory = tempfile::tempdir().unwrap();
    for path in [directory.path().join("absent"), directory.path().to_path_buf()] {
        let error = Checkpoint::open(&path).unwrap_err();
        assert!(matches!(&error, Error::Io { path: found, .. } if *found == path), "{error}");
    }
    let empty = directory.path().join("empty");
    std::fs::write(&empty, "").unwrap();
    let error = Checkpoint::open(&empty).unwrap_err().to_string();
    assert!(error.contains("0 bytes"), "{error}");
}

#[test]
fn broken_headers_are_refused() {
    let good = small_file(Kind::UltraMem).bytes();
    let with_length = |length: u64| [&length.to_le_bytes(), &good[8..]].concat();
    let json = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    assert_refused(good[..7].to_vec(), &["safetensors", "7 bytes"]);
    assert_refused(good[..100].to_vec(), &["safetensors", "92"]);
    assert_refused(good[..good.len() - 1].to_vec(), &["tensor", "lies at bytes"]);
    assert_refused([&good[..], b"!"].concat(), &["the tensors end at byte"]);
    assert_refused(with_length(u64::MAX), &["18446744073709551615", "100000000"]);
    assert_refused(with_length(i64::MAX as u64), &["9223372036854775807"]);
    assert_refused(with_length(99_999_999), &["99999999"]);
    assert_refused(with_length(0), &["safetensors"]);
    assert_refused(with_length(3), &["safetensors"]);
    assert_refused(b"{\"not\": \"a header\"}\nbut a text file".to_vec(), &["safetensors"]);
    assert_refused(json("[1, 2]"), &["a map of tensors"]);
    assert_refused(json(&"[".repeat(100_000)), &["safetensors"]);
    assert_refused(json(&"{\"a\":".repeat(100_000)), &["safetensors"]);
    assert_refused(json("{}"), &["kind", "missing"]);
    let mut latin = good.clone();
    latin[20] = 0xe9;
    assert_refused(latin, &["UTF-8"]);
    let info = r#""keys": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}"#;
    assert_refused(json(&format!("{{{info}, {info}}}")), &["two tensors are called \"keys\""]);
}

#[test]
fn lying_tensors_are_refused_by_name() {
    let good = small_file(Kind::UltraMem);
    let offsets = &good.header["keys"]["data_offsets"];
    let (begin, end) = (offsets[0].as_u64().unwrap(), offsets[1].as_u64().unwrap());
    for lie in [[begin + 1, end], [begin, end - 1], [end, begin], [begin, u64::MAX], [u64::MAX, u64::MAX], [0, end]] {
        let file = good.with_field("keys", "data_offsets", json!(lie));
        assert_refused(file.bytes(), &["tensor", "bytes"]);
    }
    // One after the other, so that the offsets' sum is 2⁶⁴ plus what the file holds.
    let mut file = good.clone();
    let big = 1u64 << 61;
    let mut at = file.data.len() as u64;
    for part in 0..8 {
        let next = at.wrapping_add(big);
        file.header[format!("big{part}")] = json!({"dtype": "U8", "shape": [big], "data_offsets": [at, next]});
        at = next;
    }
    assert_refused(file.bytes(), &["big0", "lies at bytes"]);
    // Two tensors over the same bytes, and a gap before the last one.
    let mut file = good.without_tensor("keys_norm.weight");
    file.header["keys_norm.weight"] = file.header["query_norm.weight"].clone();
    assert_refused(file.bytes(), &["_norm.weight", "lies at bytes"]);
    let (mut file, end) = (good.clone(), good.data.len());
    file.header["late"] = json!({"dtype": "F32", "shape": [1], "data_offsets": [end + 4, end + 8]});
    file.data.extend([0; 8]);
    assert_refused(file.bytes(), &["late", "lies at bytes", &format!("begin at {end}")]);
    // 2⁶⁴ bits more than the five numbers that are there.
    let wrapped = json!([5 + (1u64 << 59)]);
    assert_refused(
        good.with_field("keys_norm.weight", "shape", wrapped).bytes(),
        &["keys_norm.weight", "has 20 bytes"],
    );
    for shape in [json!([u64::MAX, 2]), json!([1u64 << 32, 1u64 << 32]), json!([u64::MAX]), json!([3, 2, 8, 5, 3])] {
        let sizes = shape.to_string().replace(',', ", ");
        assert_refused(good.with_field("keys", "shape", shape).bytes(), &["\"keys\"", &sizes]);
    }
    for shape in [json!([-1]), json!("wide"), json!([1.5]), json!([1e30]), Value::Null] {
        assert_refused(good.with_field("keys", "shape", shape).bytes(), &["\"keys\"", "expected"]);
    }
    assert_refused(good.with_field("keys", "dtype", json!("F31\nF33")).bytes(), &["\"keys\"", "F31 F33"]);
    assert_refused(good.with_field("keys", "dtype", json!("x".repeat(10_000))).bytes(), &["\"keys\"", "xxx"]);
    assert_refused(good.with_field("keys", "dtype", json!("F16")).bytes(), &["\"keys\"", "F16"]);
}

#[test]
fn wrong_shapes_and_types_are_refused_by_name() {
    let good = small_file(Kind::UltraMem);
    assert_refused(good.with_field("keys", "shape", json!([3, 2, 8, 2, 5])).bytes(), &["\"keys\"", "[3, 2, 8, 5, 2]"]);
    assert_refused(good.with_field("keys", "shape", json!([480])).bytes(), &["\"keys\"", "[480]"]);
    for (name, shape) in [
        ("tucker_core.1", json!([2, 3, 2])),
        ("tucker_core_u", json!([3, 2])),
        ("tucker_core_v", json!([1, 2, 1, 3])),
        ("query_proj.weight", json!([11, 10])),
        ("query_norm.weight", json!([5, 1])),
        ("keys_norm.weight", json!([1, 5])),
        ("values_for_look_up", json!([6, 16])),
        ("values_proj.weight", json!([24, 11])),
        ("shuffle_index", json!([8, 8])),
    ] {
        let found = shape.to_string().replace(',', ", ");
        assert_refused(good.with_field(name, "shape", shape).bytes(), &[&format!("{name:?}"), &found]);
        assert_refused(good.without_tensor(name).bytes(), &[&format!("{name:?}"), "missing"]);
        let other = if name == "shuffle_index" { "F64" } else { "I32" };
        assert_refused(good.with_field(name, "dtype", json!(other)).bytes(), &[&format!("{name:?}"), other]);
    }
    let plus = small_file(Kind::MemoryPlus);
    for name in ["swilu_projection.weight", "keys"] {
        assert_refused(plus.without_tensor(name).bytes(), &[&format!("{name:?}"), "missing"]);
    }
    assert_refused(good.with_metadata("tucker_multihead", "1").bytes(), &["tucker_core.1", "tucker_multihead 1"]);
    assert_refused(good.with_metadata("tucker_multihead", "3").bytes(), &["tucker_core.2", "missing"]);
}

#[test]
fn f64_weights_are_refused() {
    let mut file = small_file(Kind::UltraMem);
    let end = file.data.len() as u64;
    file = file.without_tensor("keys_norm.weight");
    let begin = end - 5 * 4;
    file.header["keys_norm.weight"] = json!({"dtype": "F64", "shape": [5], "data_offsets": [begin, begin + 40]});
    file.data.extend([0; 40]);
    assert_refused(file.bytes(), &["keys_norm.weight", "F64"]);
}

#[test]
fn a_table_may_have_the_shared_name() {
    for (kind, from, to) in [
        (Kind::UltraMem, "values_for_look_up", "full_memory_layer.values_for_look_up"),
        (Kind::MemoryPlus, "full_memory_layer.values_for_look_up", "values_for_look_up"),
    ] {
        let mut file = small_file(kind);
        let table = file.header.as_object_mut().unwrap().remove(from).unwrap();
        assert!(read(file.clone().bytes()).is_err());
        file.header[to] = table;
        assert_eq!(read(file.bytes()).unwrap(), small(kind));
    }
}

#[test]
fn shuffles_are_checked_entry_by_entry() {
    let good = small_file(Kind::UltraMem);
    for (entry, says) in [(-1i64, "-1"), (64, "64"), (i64::MIN, "-9223372036854775808"), (1 << 32, "4294967296")] {
        let bytes = [0i64.to_le_bytes(), entry.to_le_bytes()].concat();
        assert_refused(good.with_data("shuffle_index", &bytes).bytes(), &["shuffle_index", "entry 1 is", says, "6"]);
    }
}

#[test]
fn shuffles_may_be_narrower() {
    for (dtype, negative) in [("I32", "-2"), ("U32", "4294967294")] {
        let mut file = small_file(Kind::UltraMem).without_tensor("shuffle_index");
        let begin = file.data.len();
        let info = json!({"dtype": dtype, "shape": [64], "data_offsets": [begin, begin + 256]});
        file.header["shuffle_index"] = info;
        file.data.extend((0..64u32).rev().flat_map(u32::to_le_bytes));
        let checkpoint = Checkpoint::from_bytes(file.bytes()).unwrap();
        let expected: Vec<u32> = (0..64).rev().collect();
        assert_eq!(checkpoint.weights().unwrap().shuffle_index, Some(expected));
        let bad = file.with_data("shuffle_index", &(-2i32).to_le_bytes());
        assert_refused(bad.bytes(), &["shuffle_index", "entry 0", negative]);
    }
}

#[test]
fn bad_metadata_is_refused_by_key() {
    let good = small_file(Kind::UltraMem);
    let sizes =
        ["hidden_size", "head", "knum", "kdim", "vdim", "knn", "tucker_rank", "tucker_multihead", "value_expand_time"];
    for key in sizes {
        for text in ["-3", "0", "1e9", "99999999999999999999", "", " 4", "2.0", "nan", "9223372036854775808"] {
            assert_refused(good.with_metadata(key, text).bytes(), &[&format!("{key:?}"), &format!("{text:?}")]);
        }
    }
    for key in sizes.into_iter().chain(["kind", "norm", "norm_eps"]) {
        assert_refused(good.without_metadata(key).bytes(), &[&format!("{key:?}"), "missing"]);
    }
    let largest = [
        ("hidden_size", "hidden_size 2147483648"),
        ("head", "heads 2147483648"),
        ("knum", "side_keys 4294967296"),
        ("kdim", "key_dim 2147483648"),
        ("vdim", "value_dim 2147483648"),
        ("knn", "top_m 2147483648 exceeds side_keys 8"),
        ("tucker_rank", "tucker_rank 2147483648"),
        ("tucker_multihead", "cores 2147483648"),
    ];
    for (key, says) in largest {
        assert_refused(good.with_metadata(key, "2147483648").bytes(), &[says]);
    }
    assert_refused(good.with_metadata("value_expand_time", "2").bytes(), &["value_expand_time", "\"2\"", "square"]);
    assert_refused(good.with_metadata("value_expand_time", "16").bytes(), &["shuffle_index", "[64]", "[256]"]);
    assert_refused(good.with_metadata("knum", "5").bytes(), &["shuffle_index", "[64]", "[100]"]);
    for text in ["NaN", "inf", "-1e-5"] {
        assert_refused(good.with_metadata("norm_eps", text).bytes(), &["norm_eps"]);
    }
    assert_refused(good.with_metadata("norm_eps", "small").bytes(), &["norm_eps", "small"]);
    assert_refused(good.with_metadata("norm", "batch\n").bytes(), &["norm", "batch", "rms or default"]);
    assert_refused(good.with_metadata("kind", &"x".repeat(10_000)).bytes(), &["kind", "ultramem_v1"]);
    let mut number = good.clone();
    number.header["__metadata__"]["knum"] = json!(4);
    assert_refused(number.bytes(), &["__metadata__", "4", "expected a string"]);
    let plus = small_file(Kind::MemoryPlus);
    assert_refused(plus.with_metadata("knum", "5").bytes(), &["\"keys\"", "[3, 2, 8, 5]", "[3, 2, 5, 5]"]);
    assert_refused(plus.with_metadata("tucker_rank", "2").bytes(), &["tucker_rank is 2"]);
}
