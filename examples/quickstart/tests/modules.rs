//! The Burn modules on a device: outputs and gradients are the oracle's, records bring a layer back.

#[path = "../src/main.rs"]
mod quickstart;
mod support;

use burn::{
    module::Module,
    record::{BinBytesRecorder, FullPrecisionSettings, Recorder},
    tensor::Tensor,
};
use ultramem::{
    Kind,
    burn::{
        LinguaMemoryPlus, Memories, MemoryBackend, MemoryPlus, Peer, ProductKeyMemory, UltraMem, UltraMemConfig,
        UltraMemV2,
    },
    checkpoint::{Model, Tensors},
    reference,
};

use support::checks::hold_gradients;
use support::common::{random_input, relative_l2, small};
use support::{KINDS, memory, numbers, on_each_backend, tensor};

on_each_backend! {
    forward_is_the_oracle
    gradients_are_the_oracle
    record_brings_the_layer_back
    a_checkpoint_is_a_module
    a_model_carries_its_skips
    a_model_s_layers_are_modules
}

fn forward_is_the_oracle<B: MemoryBackend>() {
    for config in KINDS.map(small) {
        let (memory, weights) = memory::<B>(&config, 1, true);
        let input = random_input(&config, 6, 2);
        let batched = tensor::<B>(&input, config.hidden_size).reshape([2, 3, config.hidden_size]);
        let expected = reference::forward(&config, &weights, &input).unwrap().output;
        assert!(relative_l2(&numbers(memory.forward(batched)), &expected) < 1e-5, "{:?}", config.kind());
    }
}

fn gradients_are_the_oracle<B: MemoryBackend>() {
    hold_gradients::<B>(<[f32]>::to_vec, 1e-4);
}

/// A golden file as a module of its kind gives PyTorch's output; of another kind it is refused.
fn a_checkpoint_is_a_module<B: MemoryBackend>() {
    let device = Default::default();
    let mut kinds = Vec::new();
    for (name, file) in support::common::golden_files() {
        let input = file.tensor("input").unwrap().to_f32();
        let input = tensor::<B>(&input, file.config().hidden_size);
        let output = match file.config().kind().unwrap() {
            Kind::UltraMem => UltraMem::<B>::from_checkpoint(&file, true, &device).unwrap().forward(input),
            Kind::ProductKey => ProductKeyMemory::<B>::from_checkpoint(&file, true, &device).unwrap().forward(input),
            Kind::MemoryPlus => MemoryPlus::<B>::from_checkpoint(&file, true, &device).unwrap().forward(input),
            Kind::UltraMemV2 => {
                UltraMemV2::<B>::from_checkpoint(&file, true, &device).unwrap().try_forward(0, input).unwrap()
            }
            Kind::LinguaMemoryPlus => {
                LinguaMemoryPlus::<B>::from_checkpoint(&file, true, &device).unwrap().forward(input)
            }
            Kind::Peer => Peer::<B>::from_checkpoint(&file, true, &device).unwrap().forward(input),
        };
        let expected = file.tensor("expected.output").unwrap().to_f32();
        assert!(relative_l2(&numbers(output), &expected) < 1e-5, "{name}");
        if !file.config().tucker() {
            let error = UltraMem::<B>::from_checkpoint(&file, true, &device).unwrap_err().to_string();
            assert!(error.contains("expected UltraMem"), "{error}");
        }
        kinds.extend(file.config().kind());
    }
    assert!(
        [Kind::UltraMem, Kind::UltraMemV2, Kind::MemoryPlus, Kind::LinguaMemoryPlus, Kind::Peer]
            .iter()
            .all(|kind| kinds.contains(kind))
    );
}

fn record_brings_the_layer_back<B: MemoryBackend>() {
    for config in KINDS.map(small) {
        let (first, _) = memory::<B>(&config, 8, true);
        let (second, _) = memory::<B>(&config, 9, true);
        let input = tensor::<B>(&random_input(&config, 5, 10), config.hidden_size);
        let recorder = BinBytesRecorder::<FullPrecisionSettings>::default();
        let bytes = Recorder::<B>::record(&recorder, first.clone().into_record(), ()).unwrap();
        let expected = numbers(first.forward(input.clone()));
        assert_ne!(numbers(second.clone().forward(input.clone())), expected);
        let second = second.load_record(recorder.load(bytes, &Default::default()).unwrap());
        assert_eq!(numbers(second.forward(input)), expected, "{:?}", config.kind());
    }
}

fn a_model_carries_its_skips<B: MemoryBackend>() {
    let device = Default::default();
    let make = || Ok(UltraMemConfig::new(16, 8, 4, 8, 4).init::<B>(&device)?.into());
    let memories = Memories::<B>::new("1:2/2:2".parse().unwrap(), 3, make).unwrap();
    let input = Tensor::<B, 2>::random([3, 16], burn::tensor::Distribution::Default, &device);
    let mut carried = memories.carry();
    let mut hidden = Tensor::zeros([3, 16], &device);
    for block in 0..3 {
        carried.read(block, &(input.clone() + block as f32));
        hidden = carried.add(block, hidden);
        assert_eq!(numbers(hidden.clone()).iter().all(|x| *x == 0.0), block < 2, "block {block}");
    }
    let [first, second] = memories.layers() else { panic!("two places") };
    let expected = first.forward(input.clone() + 1.0) + second.forward(input + 2.0);
    assert_eq!(numbers(hidden), numbers(expected));
    assert!(Memories::<B>::new("1:3".parse().unwrap(), 3, make).is_err());
}

/// A model's layers in one call, whose output is PyTorch's.
fn a_model_s_layers_are_modules<B: MemoryBackend>() {
    let device = Default::default();
    for name in
        ["olmo_ultramem_v1", "olmo_ultramem_v2_sharded", "olmo_memory_plus", "lingua_memory_plus", "lingua_peer"]
    {
        let folder = support::common::model(name);
        let model = Model::open(&folder).unwrap();
        let memories = Memories::<B>::from_model(&model, true, &device).unwrap();
        let expected = Tensors::open(folder.join("expected.safetensors")).unwrap();
        for (at, layer) in model.layers().iter().enumerate() {
            let numbers_of = |what| expected.floats(&format!("{}.{what}", layer.number())).unwrap().to_f32();
            let input = tensor::<B>(&numbers_of("input"), layer.config().hidden_size);
            let output = numbers(memories.try_forward(at, input).unwrap());
            let off = relative_l2(&output, &numbers_of("output"));
            assert!(off < 1e-5, "{name}, layer {at}: {off}");
        }
    }
}

#[test]
fn quick_start_of_the_readme() {
    let readme = include_str!("../../../README.md");
    let source = include_str!("../src/main.rs");
    let code = source.split_once("\n\n").unwrap().1;
    assert!(readme.contains(code), "the README's quick start is not examples/quickstart.rs");
    quickstart::main().unwrap();
}
