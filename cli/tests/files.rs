//! Files at the edges: ties, no tokens, no expected results, outputs over inputs.

mod support;

use support::{Parts, changed, directory, fixture, ultramem};

/// Rows 3 and 5 of every head are the same key, so that what one of them gives the other gives too.
#[test]
fn check_judges_swapped_slots_by_their_scores() {
    let directory = directory();
    let side_keys = Parts::read(fixture("ultramem_v1_tiny")).shape("keys")[2] as usize;
    let twins = |parts: &mut Parts| {
        let shape = parts.shape("keys");
        let key = 4 * (shape[3] * shape[4]) as usize;
        for side in (0..(shape[0] * shape[1]) as usize).step_by(2) {
            let first = side * side_keys * key;
            parts.bytes("keys").copy_within(first + 3 * key..first + 4 * key, first + 5 * key);
        }
        parts.remove("expected.grad");
    };
    let file = changed(&directory, "ultramem_v1_tiny", twins);
    let out = directory.path().join("out.safetensors").display().to_string();
    ultramem(&format!("forward {file} -o {out} --backend reference")).well();
    let (mut given, mut parts) = (Parts::read(&out), Parts::read(&file));
    for (name, expected) in [("output", "expected.output"), ("scores", "expected.scores")] {
        let bytes = given.bytes(name).to_vec();
        parts.bytes(expected).copy_from_slice(&bytes);
    }
    let mut slots: Vec<i64> =
        given.bytes("indices").chunks_exact(8).map(|it| i64::from_le_bytes(it.try_into().unwrap())).collect();
    let twin = |slot: i64| (slot / side_keys as i64 == 3).then_some(slot + 2 * side_keys as i64);
    let at = (0..slots.len() - 1).find(|&at| twin(slots[at]) == Some(slots[at + 1])).expect("twins are chosen");
    let check = |parts: &mut Parts, slots: &[i64]| {
        let bytes: Vec<u8> = slots.iter().flat_map(|slot| slot.to_le_bytes()).collect();
        parts.bytes("expected.indices").copy_from_slice(&bytes);
        ultramem(&format!("check {} --backend reference", parts.write(&directory.path().join("judged.safetensors"))))
    };
    slots.swap(at, at + 1);
    let text = check(&mut parts, &slots).well();
    assert!(text.contains("2 swapped by rounding") && text.contains("0 missed"), "{text}");
    let other = (0..slots.len()).find(|&other| slots[other] / side_keys as i64 != 3 && other != at).expect("others");
    slots[other] = slots[at];
    let ran = check(&mut parts, &slots);
    assert_eq!(ran.status, Some(1), "{}", ran.stdout);
    assert!(ran.stdout.contains("MISSED"), "{}", ran.stdout);
}

#[test]
fn files_are_never_written_over_what_they_come_from() {
    let directory = directory();
    let file = changed(&directory, "ultramem_v1_tiny", |_| ());
    let before = std::fs::read(&file).unwrap();
    let link = directory.path().join("link.safetensors").display().to_string();
    std::fs::hard_link(&file, &link).unwrap();
    for verb in ["forward", "backward"] {
        for out in [&file, &link] {
            ultramem(&format!("{verb} {file} -o {out} --backend reference")).refused(&[out, "would replace the input"]);
        }
    }
    assert!(std::fs::read(&file).unwrap() == before);
    let folder = directory.path().display().to_string();
    ultramem(&format!("demo {folder}")).refused(&[&folder, "is a directory"]);
    for verb in ["check", "info"] {
        ultramem(&format!("{verb} {folder}")).refused(&[&folder, "2 files that could be the model", "name one"]);
    }
}

#[test]
fn a_file_of_no_tokens_gives_none() {
    let directory = directory();
    let empty = |parts: &mut Parts| {
        parts.remove("expected.");
        for name in ["input", "grad_output"] {
            let width = parts.shape(name)[1];
            let start = parts.header[name]["data_offsets"][0].clone();
            parts.header[name]["shape"] = [0, width].as_slice().into();
            parts.header[name]["data_offsets"] = vec![start.clone(), start].into();
        }
        parts.pack();
    };
    let file = changed(&directory, "ultramem_v1_tiny", empty);
    for backend in ["wgpu", "cpu", "reference"] {
        let out = directory.path().join("out.safetensors").display().to_string();
        ultramem(&format!("forward {file} -o {out} --backend {backend}")).well();
        let parts = Parts::read(&out);
        assert_eq!((parts.shape("output")[0], parts.shape("indices")[0], parts.shape("scores")[0]), (0, 0, 0));
        ultramem(&format!("backward {file} -o {out} --backend {backend}")).well();
        let mut parts = Parts::read(&out);
        assert_eq!(parts.shape("grad_input")[0], 0);
        assert!(parts.f32s("grad.values_proj.weight").iter().all(|&x| x == 0.0));
    }
}

#[test]
fn demo_shows_a_layer_without_expected_results() {
    let directory = directory();
    let mut parts = Parts::read(concat!(env!("CARGO_MANIFEST_DIR"), "/data/kjv_layer.safetensors"));
    parts.remove("expected.");
    let file = parts.write(&directory.path().join("plain.safetensors"));
    let text = ultramem(&format!("demo {file} --backend wgpu")).well();
    assert!(text.contains("with the oracle") && !text.contains("stored output"), "{text}");
}
