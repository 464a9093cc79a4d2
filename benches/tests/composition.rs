//! The composition against the golden file, on a device: the bar must compute the right thing.

use burn::backend::Wgpu;
use burn::backend::wgpu::WgpuDevice;
use burn::tensor::{Tensor, TensorData};
use safetensors::{Dtype, SafeTensors};
use ultramem::{Dimensions, ElementType, HostTensor, MemoryConfig, Weights};
use ultramem_benches::Composition;

#[test]
fn ultramem_v1_mid_matches_pytorch() {
    let bytes = std::fs::read("../tests/fixtures/ultramem_v1_mid.safetensors").expect("the golden file is there");
    let file = SafeTensors::deserialize(&bytes).expect("the golden file is a safetensors file");
    let device = WgpuDevice::default();
    let layer = Composition::<Wgpu>::new(mid_config(), &weights(&file), &device);
    let input = tensor(&file, "input");
    let input = Tensor::from_data(TensorData::new(input.to_f32(), input.shape().to_vec()), &device);
    let output = layer.forward(input).into_data().into_vec::<f32>().expect("the output is f32");
    let miss = relative_l2(&output, &tensor(&file, "expected.output").to_f32());
    assert!(miss <= 1e-4, "the output misses PyTorch's by {miss} (relative L2)");
}

/// The dimensions in the golden file's metadata; knum 48 · √4 = 96 keys a side.
fn mid_config() -> MemoryConfig {
    let dims =
        Dimensions { hidden_size: 128, side_keys: 96, key_dim: 32, value_dim: 64, top_m: 16, ..Dimensions::default() };
    MemoryConfig::new(dims).expect("the golden configuration is valid")
}

fn weights<'a>(file: &SafeTensors<'a>) -> Weights<'a> {
    let shuffle = file.tensor("shuffle_index").expect("shuffle_index is in the file");
    let numbers = |name: &str| tensor(file, name).to_f32();
    Weights {
        query_proj: tensor(file, "query_proj.weight"),
        query_norm: tensor(file, "query_norm.weight"),
        keys: tensor(file, "keys"),
        keys_norm: tensor(file, "keys_norm.weight"),
        cores: [numbers("tucker_core.0"), numbers("tucker_core.1")].concat(),
        core_u: numbers("tucker_core_u"),
        core_v: numbers("tucker_core_v"),
        shuffle_index: Some(shuffle.data().chunks_exact(8).map(low_word).collect()),
        values: tensor(file, "values_for_look_up"),
        values_proj: tensor(file, "values_proj.weight"),
        gate_proj: None,
    }
}

/// The value of a little-endian i64 that fits in 32 bits.
fn low_word(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn tensor<'a>(file: &SafeTensors<'a>, name: &str) -> HostTensor<'a> {
    let view = file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(view.dtype(), Dtype::F32, "{name}");
    HostTensor::new(view.shape(), ElementType::F32, view.data()).expect("the view is as long as its shape says")
}

fn relative_l2(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let norm = |numbers: &mut dyn Iterator<Item = f64>| numbers.map(|x| x * x).sum::<f64>().sqrt();
    let miss = norm(&mut got.iter().zip(want).map(|(a, b)| f64::from(a - b)));
    miss / norm(&mut want.iter().map(|&x| f64::from(x)))
}
