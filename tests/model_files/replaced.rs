//! Models written again with some of their tensors replaced.

use std::fs;

use safetensors::Dtype;
use ultramem::{
    ElementType, HostTensor,
    checkpoint::{FileTensor, Integers, Tensors, replace},
};

use super::{fixture, sum};

#[test]
fn a_model_without_changes_stays_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["olmo_ultramem_v1", "olmo_ultramem_v2_sharded", "lingua_peer", "torch/views.pt"] {
        let model = Tensors::open(fixture(name)).unwrap();
        let out = folder.path().join("model.safetensors");
        replace(&model, &[], &out).unwrap();
        let written = Tensors::open(&out).unwrap();
        assert_eq!(sum(&written), sum(&model), "{name}");
        assert_eq!(written.metadata().iter().collect::<Vec<_>>(), [(&"format".to_string(), &"pt".to_string())]);
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn replaced_tensors_have_the_new_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("model.safetensors");
    let model = Tensors::open(fixture("torch/views.pt")).unwrap();
    let floats = FileTensor::Floats(HostTensor::from_f32([4, 4], &[0.5; 16]).unwrap());
    let halves = HostTensor::new([5, 2], ElementType::BF16, vec![0x3f; 20]).unwrap();
    let integers = FileTensor::Integers(Integers { shape: vec![3], numbers: vec![4, 5, 6] });
    replace(&model, &[("columns", floats), ("bf16", FileTensor::Floats(halves)), ("i64", integers)], &out).unwrap();
    // Onto itself, for what is mapped stays as it was.
    let once = Tensors::open(&out).unwrap();
    replace(&once, &[], &out).unwrap();
    let written = Tensors::open(&out).unwrap();
    assert_eq!(sum(&written), sum(&once));
    for name in model.names() {
        let (old, new) = (model.get(name).unwrap(), written.get(name).unwrap());
        assert_eq!((old.dtype, &old.shape), (new.dtype, &new.shape), "{name}");
        assert_eq!(old.bytes != new.bytes, ["columns", "bf16", "i64"].contains(&name), "{name}");
    }
    assert_eq!(written.get("bf16").unwrap().dtype, Dtype::BF16);
    assert_eq!(*written.get("i64").unwrap().bytes, *bytemuck::cast_slice::<i64, u8>(&[4, 5, 6]));
}

#[test]
fn a_tensor_that_does_not_fit_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("model.safetensors");
    let model = Tensors::open(fixture("torch/views.pt")).unwrap();
    let floats = |shape: &[usize]| FileTensor::Floats(HostTensor::from_f32(shape, &[0.5; 6]).unwrap());
    let integers = |numbers| FileTensor::Integers(Integers { shape: vec![3], numbers });
    for (new, message) in [
        (vec![("none", floats(&[6]))], "tensor \"none\" is missing"),
        (
            vec![("parameter", floats(&[3, 2]))],
            "tensor \"parameter\" is F32 [3, 2], expected F32 [2, 3] as in the model",
        ),
        (vec![("i32", integers(vec![1; 3]))], "tensor \"i32\" is I64 [3], expected I32 [3] as in the model"),
        (vec![("i64", integers(vec![1; 2]))], "i64 holds 2 numbers, expected 3"),
        (
            vec![("parameter", floats(&[2, 3])), ("parameter", floats(&[2, 3]))],
            "tensor \"parameter\" is replaced twice",
        ),
    ] {
        assert_eq!(replace(&model, &new, &out).unwrap_err().to_string(), message);
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}
