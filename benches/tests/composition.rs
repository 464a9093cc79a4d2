//! The composition against golden files, on a device: the bar must compute the right thing.

use std::collections::HashMap;

use burn::backend::Wgpu;
use burn::backend::wgpu::WgpuDevice;
use burn::tensor::{Tensor, TensorData};
use safetensors::{Dtype, SafeTensors};
use ultramem::{Dimensions, ElementType, HostTensor, Kind, MemoryConfig, Norm, Weight, Weights};
use ultramem_benches::Composition;

#[test]
fn ultramem_v1_mid_matches_pytorch() {
    matches_pytorch("ultramem_v1_mid");
}

#[test]
fn layer_norm_and_a_single_core_match_pytorch() {
    matches_pytorch("ultramem_v1_layernorm_single_core");
}

fn matches_pytorch(name: &str) {
    let bytes = std::fs::read(format!("../tests/fixtures/{name}.safetensors")).expect("the golden file is there");
    let file = SafeTensors::deserialize(&bytes).expect("the golden file is a safetensors file");
    let (_, header) = SafeTensors::read_metadata(&bytes).expect("the golden file has a header");
    let config = config(header.metadata().as_ref().expect("the golden file has metadata"));
    let device = WgpuDevice::default();
    let layer = Composition::<Wgpu>::new(config.clone(), &weights(&file, &config), &device);
    let input = tensor(&file, "input");
    let input = Tensor::from_data(TensorData::new(input.to_f32(), input.shape().to_vec()), &device);
    let output = layer.forward(input).into_data().into_vec::<f32>().expect("the output is f32");
    let miss = relative_l2(&output, &tensor(&file, "expected.output").to_f32());
    assert!(miss <= 1e-4, "the output misses PyTorch's by {miss} (relative L2)");
}

fn config(metadata: &HashMap<String, String>) -> MemoryConfig {
    let number = |key: &str| metadata[key].parse::<usize>().expect("the entry is a whole number");
    let expansion = number("value_expand_time");
    MemoryConfig::new(Dimensions {
        capabilities: Kind::UltraMem.capabilities(),
        hidden_size: number("hidden_size"),
        heads: number("head"),
        side_keys: number("knum") * expansion.isqrt(),
        key_dim: number("kdim"),
        tucker_rank: number("tucker_rank"),
        top_m: number("knn"),
        cores: number("tucker_multihead"),
        expansion,
        value_dim: number("vdim"),
        norm: if metadata["norm"] == "rms" { Norm::Rms } else { Norm::Layer },
        norm_eps: metadata["norm_eps"].parse().expect("the entry is a number"),
        ..Dimensions::default()
    })
    .expect("the golden configuration is valid")
}

fn weights<'a>(file: &SafeTensors<'a>, config: &MemoryConfig) -> Weights<'a> {
    let shuffle = file.tensor("shuffle_index").expect("shuffle_index is in the file");
    let numbers = |name: &str| tensor(file, name).to_f32();
    let cores: Vec<f32> = (0..config.cores).flat_map(|core| numbers(&format!("tucker_core.{core}"))).collect();
    let shape = [config.cores, config.heads, config.tucker_rank, config.tucker_rank];
    let weights = Weights {
        core_u: numbers("tucker_core_u"),
        core_v: numbers("tucker_core_v"),
        shuffle_index: Some(shuffle.data().chunks_exact(8).map(low_word).collect()),
        ..Weights::default()
    };
    let cores = HostTensor::from_f32(shape, &cores).expect("the cores have the configuration's shape");
    [
        (Weight::QueryProj, "query_proj.weight"),
        (Weight::QueryNorm, "query_norm.weight"),
        (Weight::Keys, "keys"),
        (Weight::KeysNorm, "keys_norm.weight"),
        (Weight::Values, "values_for_look_up"),
        (Weight::ValuesProj, "values_proj.weight"),
    ]
    .into_iter()
    .fold(weights.with(Weight::Cores, cores), |weights, (weight, name)| weights.with(weight, tensor(file, name)))
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
