//! Files of `torch.save`. What is in `fixtures/models/torch` was written by `make.py` there, with PyTorch 2.15.

use std::{borrow::Cow, fs};

use safetensors::Dtype;
use ultramem::checkpoint::{Stored, Tensors};

use super::{file, fixture, refused, sum, zipped};

#[test]
fn the_goldens_are_read() {
    for (name, count, hash) in [
        ("olmo_ultramem_v1", 49, 0x230c375f66d5eae5),
        ("olmo_memory_plus", 40, 0xecfa86059d3cfb34),
        ("lingua_memory_plus", 33, 0x2141e866d596f7cc),
        ("lingua_peer", 25, 0x52d48a78b910bf48),
    ] {
        let tensors = Tensors::open(fixture(name)).unwrap();
        assert_eq!(sum(&tensors), (count, hash), "{name}");
        assert!(tensors.names().all(|name| matches!(tensors.get(name).unwrap().bytes, Cow::Borrowed(_))), "{name}");
        assert!(tensors.metadata().is_empty());
    }
    let tensors = Tensors::open(fixture("olmo_ultramem_v1")).unwrap();
    assert_eq!(tensors.path(), fixture("olmo_ultramem_v1/model.pt"));
    let shuffle = tensors.get("transformer.mem_blocks.0.shuffle_index").unwrap();
    assert_eq!((shuffle.dtype, shuffle.shape.as_slice()), (Dtype::I64, [1024].as_slice()));
    assert_eq!(bytemuck::pod_collect_to_vec::<u8, i64>(&shuffle.bytes)[..3], [929, 237, 13]);
    let core = tensors.get("transformer.mem_blocks.0.tucker_core.1").unwrap();
    assert_eq!(floats(&core)[..2], [0.74938375, 0.2340975]);
}

fn floats(tensor: &Stored<'_>) -> Vec<f32> {
    assert_eq!(tensor.dtype, Dtype::F32);
    bytemuck::pod_collect_to_vec(&tensor.bytes)
}

#[test]
fn views_of_every_kind_are_read() {
    for name in ["views.pt", "views_protocol3.pt", "views_protocol4.pt", "views_protocol5.pt", "zip64.pt"] {
        let tensors = Tensors::open(fixture("torch").join(name)).unwrap();
        assert_eq!(sum(&tensors), (20, 0x4ea48658304bc3ee), "{name}");
    }
    let tensors = Tensors::open(fixture("torch/views.pt")).unwrap();
    let get = |name| tensors.get(name).unwrap();
    assert_eq!(floats(&get("every_other")), [-3.0, -2.625, -2.25, -1.0, -0.625, -0.25, 1.0, 1.375, 1.75]);
    assert_eq!(floats(&get("columns"))[..5], [-1.75, -1.625, -1.5, -1.375, -0.75]);
    assert_eq!(get("transposed").shape, [8, 6]);
    assert_eq!(floats(&get("transposed"))[..3], [-3.0, -2.0, -1.0]);
    assert_eq!(floats(&get("scalar")), [2.5]);
    assert_eq!((get("scalar").shape.len(), get("empty").shape), (0, vec![0, 4]));
    assert!(matches!(get("row").bytes, Cow::Borrowed(_)) && matches!(get("columns").bytes, Cow::Owned(_)));
    assert!(!tensors.has("_extra"));
    assert_eq!(tensors.get("_extra").unwrap_err().to_string(), "tensor \"_extra\" is missing");
}

#[test]
fn names_of_the_same_numbers_are_known() {
    let tensors = Tensors::open(fixture("torch/views.pt")).unwrap();
    assert!(tensors.same("row", "same_as_row") && tensors.same("columns", "columns"));
    for other in ["columns", "transposed", "plain", "none"] {
        assert!(!tensors.same("row", other), "{other}");
    }
    assert!(!tensors.same("none", "none"));
}

#[test]
fn the_state_dict_is_found_among_other_things() {
    for name in ["trainer.pt", "nested.pth"] {
        let tensors = Tensors::open(fixture("torch").join(name)).unwrap();
        assert_eq!(sum(&tensors), (4, 0xe7cb52711471db7f), "{name}");
    }
}

#[test]
fn what_can_not_be_read_says_why() {
    for (name, message) in [
        ("whole_module.pt", "holds an object of a Python class, expected a state dict: save that of the model"),
        ("old_form.pt", "is in the form that torch.save wrote before PyTorch 1.6; save it again with a newer one"),
        ("big_endian.pt", "was written with the byte order \"big\", expected \"little\""),
        ("compressed.pt", "entry \"views/byteorder\" is compressed, where torch.save stores bytes as they are"),
        (
            "expanded.pt",
            "tensor \"expanded\" has shape [4, 3] and strides [0, 1] from number 0 on, more than its 12 bytes of F32 hold",
        ),
        (
            "quantized.pt",
            "tensor \"quantized\" is made by \"torch._utils._rebuild_qtensor\" of 7 arguments, which is not read here",
        ),
    ] {
        assert_eq!(refused(fixture("torch").join(name)), message);
    }
}

/// A file of `torch.save` with `pickle` and one storage, `0`, of 8 bytes.
fn saved(pickle: &[u8]) -> (tempfile::TempDir, std::path::PathBuf) {
    let entries = [("m/data.pkl", pickle), ("m/data/0", &[0; 8])];
    file("m.pt", zipped(&entries.map(|(name, bytes)| (name.into(), bytes.into()))))
}

/// A pickled tensor of two f32, with what is said of it.
fn tensor(offset: u8, shape: &[u8], strides: &[u8], key: &str, count: u8) -> Vec<u8> {
    let mut pickle = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX".to_vec();
    pickle.extend((key.len() as u32).to_le_bytes());
    pickle.extend(key.as_bytes());
    pickle.extend([b'N', b'K', count, b't', b'Q', b'K', offset]);
    for sizes in [shape, strides] {
        pickle.push(b'(');
        sizes.iter().for_each(|&size| pickle.extend([b'K', size]));
        pickle.push(b't');
    }
    pickle.extend(b"\x89Nt");
    pickle.push(b'R');
    pickle
}

/// A pickled dict of tensors `a`, `b`, …
fn dict(tensors: &[Vec<u8>]) -> Vec<u8> {
    let mut pickle = b"\x80\x02}(".to_vec();
    for (tensor, name) in tensors.iter().zip(b'a'..) {
        pickle.extend([b'X', 1, 0, 0, 0, name]);
        pickle.extend(tensor);
    }
    pickle.extend(b"u.");
    pickle
}

#[test]
fn a_view_stays_inside_of_its_storage() {
    let opened =
        |tensor: Vec<u8>| Tensors::open(saved(&dict(&[tensor])).1).map(drop).map_err(|error| error.to_string());
    opened(tensor(0, &[2], &[1], "0", 2)).unwrap();
    opened(tensor(1, &[1, 1], &[9, 9], "0", 2)).unwrap();
    opened(tensor(2, &[0], &[1], "0", 2)).unwrap();
    for (bad, message) in [
        (
            tensor(1, &[2], &[1], "0", 2),
            "shape [2] and strides [1] from number 1 on, more than its 8 bytes of F32 hold",
        ),
        (
            tensor(3, &[0], &[1], "0", 2),
            "shape [0] and strides [1] from number 3 on, more than its 8 bytes of F32 hold",
        ),
        (tensor(0, &[2], &[2], "0", 2), "more than its 8 bytes"),
        (tensor(0, &[2], &[1, 1], "0", 2), "has shape [2] and strides [1, 1], expected as many"),
        (tensor(0, &[255; 16], &[255; 16], "0", 2), "more than its 8 bytes"),
        (tensor(0, &[vec![255; 15], vec![0]].concat(), &[0; 16], "0", 2), "more than its 8 bytes"),
        (tensor(0, &[1; 17], &[1; 17], "0", 2), "has 17 dimensions, expected at most 16"),
        (tensor(0, &[2], &[1], "0", 3), "storage \"0\" is 8 bytes, expected 3 numbers of 4"),
        (tensor(0, &[2], &[1], "../0", 2), "the archive has no entry \"data/../0\""),
    ] {
        let found = opened(bad).unwrap_err();
        assert!(found.contains("tensor \"a\"") && found.contains(message), "{found}");
    }
}

#[test]
fn a_pickle_can_not_ask_for_more_than_it_brings() {
    let twice = [b"\x80\x02}(X\x01\0\0\0a".as_slice(), &tensor(0, &[2], &[1], "0", 2), b"X\x01\0\0\0a"].concat();
    let twice = [twice, tensor(0, &[2], &[1], "0", 2), b"u.".to_vec()].concat();
    // Each tuple holds the one before it twice, each tuple or dict is inside of the next, a dict is inside of itself.
    let doubled = [b"\x80\x02)".as_slice(), &b"q\0h\0\x86".repeat(1000), b"."].concat();
    let tuples = [b"\x80\x02}X\x05\0\0\0model)".as_slice(), &b"\x85".repeat(1_000_000), b"s."].concat();
    let level = b"}X\x05\0\0\0model";
    let dicts = [level.repeat(100_000).as_slice(), b"N", &b"s".repeat(100_000), b"."].concat();
    let cyclic = b"\x80\x02}q\0X\x05\0\0\0modelh\0s.".to_vec();
    for (pickle, message) in [
        (twice, "two tensors are called \"a\""),
        (doubled, "holds a tuple, expected a state dict"),
        (tuples, "holds a dict without tensors, and none under model, state_dict, module, model_state_dict"),
        (dicts, "holds a dict without tensors"),
        (cyclic, "holds a dict without tensors"),
        (
            b"\x80\x05\x8d\xff\xff\xff\xff\xff\xff\xff\x7f".to_vec(),
            "byte 2: 9223372036854775807 bytes are called for, but 0 are left",
        ),
        (b"\x80\x02r\xff\xff\xff\xff.".to_vec(), "byte 2: nothing is on the stack"),
        (b"\x80\x06.".to_vec(), "byte 0: protocol 6, expected at most 5"),
        (b"cos\nsystem\nX\x04\0\0\0true\x85R.".to_vec(), "holds an object of a Python class, expected a state dict"),
        (b"\x80\x02}".to_vec(), "byte 3: the pickle ends too early"),
        (b"N0".repeat(1 << 23), "data.pkl: has more than 16777216 instructions"),
        (b"\x82\x01.".to_vec(), "byte 0: instruction 0x82, which no file of torch.save needs"),
    ] {
        let (_folder, path) = saved(&pickle);
        let found = refused(&path);
        assert!(found.contains(message), "{found}");
    }
}

#[test]
fn the_bytes_decide_and_not_the_name() {
    let (_folder, path) = file("renamed.safetensors", fs::read(fixture("torch/views.pt")).unwrap());
    assert_eq!(Tensors::open(path).unwrap().names().count(), 20);
    let (_folder, path) = file("text.pt", "this is neither");
    assert!(refused(path).starts_with("not a safetensors file: the header is "));
    let (_folder, path) = file("other.pt", zipped(&[("a.txt".into(), b"text".to_vec())]));
    assert_eq!(refused(path), "is a zip archive without data.pkl, so not a file of torch.save");
    let (_folder, path) =
        file("twice.pt", zipped(&["a/data.pkl", "b/data.pkl"].map(|name| (name.into(), b".".to_vec()))));
    assert_eq!(refused(path), "holds data.pkl twice, under \"a/\" and \"b/\"");
}

#[test]
fn an_encrypted_entry_is_refused() {
    let mut bytes = fs::read(fixture("torch/zip64.pt")).unwrap();
    let entry = bytes.windows(4).position(|bytes| bytes == b"PK\x01\x02").unwrap();
    bytes[entry + 8] |= 1;
    let (_folder, path) = file("secret.pt", bytes);
    assert_eq!(refused(path), "entry \"views/data.pkl\" is encrypted");
}
