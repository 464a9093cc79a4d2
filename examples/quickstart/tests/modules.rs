//! The Burn modules on a device: gradients are the oracle's, records bring a layer back, a trainer that was saved goes on with the
//! same bits. Each test runs on the plain backend and on the one with fusion.

#[path = "../../../tests/common/mod.rs"]
mod common;
#[path = "../src/main.rs"]
mod quickstart;

use std::collections::BTreeMap;

use burn::{
    backend::Autodiff,
    module::{Module, ModuleVisitor, Param},
    record::{BinBytesRecorder, FullPrecisionSettings, Recorder},
    tensor::{Tensor, TensorData, backend::AutodiffBackend, f16},
};
use burn_wgpu::{CubeBackend, WgpuRuntime};
use ultramem::{
    HostTensor, Kind, MemoryConfig, Weights,
    burn::{Memories, Memory, MemoryBackend, MemoryModel, Trainer, TrainerConfig, UltraMemConfig},
    reference,
};

use common::{random_input, relative_l2, small};

type Plain = CubeBackend<WgpuRuntime, f32, i32, u32>;
type Fused = burn_wgpu::Wgpu;
type Half = CubeBackend<WgpuRuntime, f16, i32, u32>;

/// Runs a generic test on each backend.
macro_rules! on_each_backend {
    ($($name:ident)*) => {
        mod plain {
            $(#[test] fn $name() { super::$name::<super::Plain>(); })*
        }
        mod fused {
            $(#[test] fn $name() { super::$name::<super::Fused>(); })*
        }
    };
}

on_each_backend! {
    forward_is_the_oracle
    gradients_are_the_oracle
    sparse_step_is_the_dense_one
    several_passes_are_added_up
    frozen_layer_stays
    record_brings_the_layer_back
    trainer_goes_on_with_the_same_bits
    core_follows_and_auxiliary_loss_is_pytorch
    misuse_is_an_error
}

const KINDS: [Kind; 2] = [Kind::UltraMem, Kind::ProductKey];

fn tensor<B: MemoryBackend>(numbers: &[f32], width: usize) -> Tensor<B, 2> {
    let shape = [numbers.len() / width, width];
    Tensor::from_data(TensorData::new(numbers.to_vec(), shape), &Default::default())
}

fn numbers<B: MemoryBackend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().to_vec().unwrap()
}

fn memory<B: MemoryBackend>(config: &MemoryConfig, seed: u64, sparse: bool) -> (Memory<B>, Weights<'static>) {
    let weights = Weights::random(config, seed);
    (Memory::from_weights(config.clone(), &weights, sparse, &Default::default()).unwrap(), weights)
}

fn forward_is_the_oracle<B: MemoryBackend>() {
    for config in KINDS.map(small) {
        let (memory, weights) = memory::<B>(&config, 1, true);
        let input = random_input(&config, 6, 2);
        let batched = tensor::<B>(&input, config.hidden_size).reshape([2, 3, config.hidden_size]);
        let expected = reference::forward(&config, &weights, &input).unwrap().output;
        assert!(relative_l2(&numbers(memory.forward(batched)), &expected) < 1e-5, "{:?}", config.kind);
    }
}

/// The gradients of a module's parameters by the fields' names.
struct Named<'a, B: AutodiffBackend> {
    gradients: &'a B::Gradients,
    path: Vec<String>,
    found: BTreeMap<String, Vec<f32>>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Named<'_, B> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if let Some(gradient) = param.val().grad(self.gradients) {
            let numbers = gradient.into_data().convert::<f32>().to_vec().unwrap();
            self.found.insert(self.path.last().unwrap().clone(), numbers);
        }
    }
}

fn gradients_are_the_oracle<B: MemoryBackend>() {
    hold_gradients::<B>(<[f32]>::to_vec, 1e-4);
}

/// The module in half precision, against the oracle with the numbers that parameters and inputs round to.
#[test]
fn half_precision_is_near_the_oracle() {
    hold_gradients::<Half>(|numbers| numbers.iter().map(|&x| f16::from_f32(x).to_f32()).collect(), 1e-2);
}

fn rounded(weights: &Weights<'_>, round: fn(&[f32]) -> Vec<f32>) -> Weights<'static> {
    let tensor = |tensor: &HostTensor<'_>| HostTensor::from_f32(tensor.shape(), &round(&tensor.to_f32())).unwrap();
    Weights {
        query_proj: tensor(&weights.query_proj),
        query_norm: tensor(&weights.query_norm),
        keys: tensor(&weights.keys),
        keys_norm: tensor(&weights.keys_norm),
        cores: round(&weights.cores),
        core_u: round(&weights.core_u),
        core_v: round(&weights.core_v),
        shuffle_index: weights.shuffle_index.clone(),
        values: tensor(&weights.values),
        values_proj: tensor(&weights.values_proj),
        gate_proj: weights.gate_proj.as_ref().map(tensor),
    }
}

/// Output and gradients of weights and inputs that are rounded by `round` first.
fn hold_gradients<B: MemoryBackend>(round: fn(&[f32]) -> Vec<f32>, tolerance: f64) {
    for config in KINDS.map(small) {
        let weights = rounded(&Weights::random(&config, 3), round);
        let memory = Memory::<Autodiff<B>>::from_weights(config.clone(), &weights, false, &Default::default()).unwrap();
        let (input, grad_output) = (round(&random_input(&config, 7, 4)), round(&random_input(&config, 7, 5)));
        let x = tensor::<Autodiff<B>>(&input, config.hidden_size).require_grad();
        let output = memory.forward(x.clone());
        let forward = reference::forward(&config, &weights, &input).unwrap();
        assert!(relative_l2(&numbers(output.clone()), &forward.output) < tolerance, "{:?}", config.kind);
        let gradients = (output * tensor(&grad_output, config.hidden_size)).sum().backward();
        let expected = reference::backward(&config, &weights, &input, &forward.slots, &grad_output).unwrap();
        let mut values = vec![0.0; config.rows() * config.value_dim];
        for (row, gradient) in &expected.values {
            values[row * config.value_dim..][..config.value_dim].copy_from_slice(gradient);
        }
        let mut visitor = Named::<Autodiff<B>> { gradients: &gradients, path: vec![], found: BTreeMap::new() };
        memory.visit(&mut visitor);
        let mut found = visitor.found;
        found.insert("input".into(), numbers(x.grad(&gradients).unwrap()));
        let mut all = vec![
            ("input", expected.input),
            ("query_proj", expected.query_proj),
            ("query_norm", expected.query_norm),
            ("keys", expected.keys),
            ("keys_norm", expected.keys_norm),
            ("values", values),
            ("values_proj", expected.values_proj),
        ];
        if config.kind == Kind::UltraMem {
            all.push(("cores", expected.cores));
        }
        assert_eq!(found.len(), all.len(), "{:?}", found.keys());
        for (name, expected) in all {
            let off = relative_l2(&found[name], &expected);
            assert!(off < tolerance, "{:?} {name}: {off}", config.kind);
        }
    }
}

/// A step on the square of the output, so that the gradient hangs on the weights.
fn step<B: MemoryBackend>(
    trainer: &mut Trainer<Autodiff<B>, One<Autodiff<B>>>,
    model: One<Autodiff<B>>,
    seed: u64,
) -> One<Autodiff<B>>
where
    Autodiff<B>: MemoryBackend<Runtime = B::Runtime>,
{
    let input = random_input(model.memory.config(), 9, seed);
    let output = model.memory.forward(tensor::<Autodiff<B>>(&input, model.memory.config().hidden_size));
    let gradients = output.square().sum().backward();
    let (model, report) = trainer.step(0.01, model, gradients).unwrap();
    assert!(report.done && report.gradient_norm > 0.0);
    model
}

/// A model that is one layer.
#[derive(Module, Debug)]
struct One<B: burn::tensor::backend::Backend> {
    memory: Memory<B>,
}

impl<B: MemoryBackend + AutodiffBackend> MemoryModel<B> for One<B> {
    fn memories(&mut self) -> Vec<&mut Memory<B>> {
        vec![&mut self.memory]
    }
}

fn weights_of<B: MemoryBackend>(memory: &Memory<B>) -> Weights<'static> {
    memory.layer(&Default::default()).unwrap().read_weights().unwrap()
}

/// Lazy Adam and Adam differ in rows that were not read, and there from the second step on alone.
fn sparse_step_is_the_dense_one<B: MemoryBackend>() {
    for config in KINDS.map(small) {
        let [sparse, dense] = [true, false].map(|sparse| {
            let mut trainer = Trainer::new(TrainerConfig::new(10));
            weights_of(&step::<B>(&mut trainer, One { memory: memory(&config, 6, sparse).0 }, 7).memory)
        });
        let start = Weights::random(&config, 6);
        for (name, sparse, dense, start) in [
            ("values", &sparse.values, &dense.values, &start.values),
            ("keys", &sparse.keys, &dense.keys, &start.keys),
            ("query_proj", &sparse.query_proj, &dense.query_proj, &start.query_proj),
        ] {
            let off = relative_l2(&sparse.to_f32(), &dense.to_f32());
            let moved = relative_l2(&sparse.to_f32(), &start.to_f32());
            assert!(off < 1e-5 && moved > 1e-3, "{:?} {name}: {off}, moved {moved}", config.kind);
        }
    }
}

/// Two calls in one graph, and two passes in one step: a sparse table learns what a dense one does. A pass that nobody takes changes nothing.
fn several_passes_are_added_up<B: MemoryBackend>() {
    for config in KINDS.map(small) {
        let loss = |memory: &Memory<Autodiff<B>>, seed| {
            let input = random_input(&config, 9, seed);
            memory.forward(tensor::<Autodiff<B>>(&input, config.hidden_size)).square().sum()
        };
        let in_one_graph = |sparse| {
            let memory = memory::<Autodiff<B>>(&config, 6, sparse).0;
            let gradients = (loss(&memory, 1) + loss(&memory, 2)).backward();
            let (model, _) = Trainer::new(TrainerConfig::new(10)).step(0.01, One { memory }, gradients).unwrap();
            weights_of(&model.memory)
        };
        let in_two_passes = |sparse, another: bool| {
            let mut model = One { memory: memory::<Autodiff<B>>(&config, 6, sparse).0 };
            let mut trainer = Trainer::new(TrainerConfig::new(10));
            let gradients = loss(&model.memory, 1).backward();
            trainer.accumulate(&mut model, gradients).unwrap();
            if another {
                let _ = loss(&model.memory, 3).backward();
            }
            let gradients = loss(&model.memory, 2).backward();
            let (model, report) = trainer.step(0.01, model, gradients).unwrap();
            assert!(report.done && trainer.steps() == 1);
            weights_of(&model.memory)
        };
        let (start, expected) = (Weights::random(&config, 6), in_one_graph(false));
        let found =
            [in_one_graph(true), in_two_passes(false, false), in_two_passes(true, false), in_two_passes(true, true)];
        for (at, found) in found.iter().enumerate() {
            for (name, found, expected, start) in [
                ("values", &found.values, &expected.values, &start.values),
                ("keys", &found.keys, &expected.keys, &start.keys),
            ] {
                let off = relative_l2(&found.to_f32(), &expected.to_f32());
                let moved = relative_l2(&found.to_f32(), &start.to_f32());
                assert!(off < 1e-5 && moved > 1e-3, "{:?}, {at}: {name}: {off}, moved {moved}", config.kind);
            }
        }
        assert!(found[2] == found[3], "a pass that nobody took");
    }
}

/// Gradients go through a layer that does not learn, and leave nothing in it.
fn frozen_layer_stays<B: MemoryBackend>() {
    let config = small(Kind::UltraMem);
    let model = One { memory: memory::<Autodiff<B>>(&config, 6, true).0 }.no_grad();
    let input = tensor::<Autodiff<B>>(&random_input(&config, 9, 1), config.hidden_size).require_grad();
    let gradients = model.memory.forward(input.clone()).square().sum().backward();
    assert!(numbers(input.grad(&gradients).unwrap()).iter().any(|&g| g != 0.0));
    let (model, _) = Trainer::new(TrainerConfig::new(10)).step(0.01, model, gradients).unwrap();
    let (found, start) = (weights_of(&model.memory), Weights::random(&config, 6));
    assert!(found.values == start.values && found.keys == start.keys);
    assert!(format!("{:?}", model.memory).contains("Pending(0)"));
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
        assert_eq!(numbers(second.forward(input)), expected, "{:?}", config.kind);
    }
}

fn trainer_goes_on_with_the_same_bits<B: MemoryBackend>() {
    for (config, sparse) in
        [(small(Kind::UltraMem), true), (small(Kind::UltraMem), false), (small(Kind::ProductKey), true)]
    {
        let new = || Trainer::<Autodiff<B>, One<Autodiff<B>>>::new(TrainerConfig::new(10));
        let mut trainer = new();
        let mut model = One { memory: memory(&config, 11, sparse).0 };
        for seed in 0..2 {
            model = step::<B>(&mut trainer, model, seed);
        }
        let recorder = BinBytesRecorder::<FullPrecisionSettings>::default();
        let state = Recorder::<Autodiff<B>>::record(&recorder, trainer.to_record(), ()).unwrap();
        let weights = Recorder::<Autodiff<B>>::record(&recorder, model.clone().into_record(), ()).unwrap();
        for seed in 2..4 {
            model = step::<B>(&mut trainer, model, seed);
        }
        let device = Default::default();
        let mut again = One { memory: memory(&config, 12, sparse).0 }
            .load_record(Recorder::<Autodiff<B>>::load(&recorder, weights, &device).unwrap());
        let state = Recorder::<Autodiff<B>>::load(&recorder, state, &device).unwrap();
        let mut trainer = new().load_record(state).unwrap();
        assert_eq!(trainer.steps(), 2);
        for seed in 2..4 {
            again = step::<B>(&mut trainer, again, seed);
        }
        let same = weights_of(&again.memory) == weights_of(&model.memory);
        assert!(same, "{:?}, sparse {sparse}", config.kind);
    }
}

fn core_follows_and_auxiliary_loss_is_pytorch<B: MemoryBackend>() {
    for (name, file) in common::golden_files() {
        if file.config().kind != Kind::UltraMem || !file.has("expected.core_singular_values_tail_loss") {
            continue;
        }
        let weights = file.weights().unwrap();
        let memory = Memory::from_weights(file.config().clone(), &weights, true, &Default::default()).unwrap();
        let mut trainer = Trainer::<Autodiff<B>, One<Autodiff<B>>>::new(TrainerConfig::new(1));
        let input = tensor::<Autodiff<B>>(&random_input(file.config(), 3, 13), file.config().hidden_size);
        let gradients = memory.forward(input).sum().backward();
        let (model, report) = trainer.step(0.0, One { memory }, gradients).unwrap();
        let expected = file.tensor("expected.core_singular_values_tail_loss").unwrap().to_f32()[0];
        assert!(
            (report.auxiliary_loss - expected).abs() <= 1e-5 * expected.max(1e-3),
            "{name}: {report:?}, {expected}"
        );
        // At a learning rate of 0 the cores stay, and so must their vectors.
        let found = weights_of(&model.memory);
        assert!(relative_l2(&found.core_u, &weights.core_u) < 1e-4, "{name}: {:?} {:?}", found.core_u, weights.core_u);
        assert!(relative_l2(&found.core_v, &weights.core_v) < 1e-4, "{name}: {:?} {:?}", found.core_v, weights.core_v);
    }
}

/// A model that forgets its layer.
#[derive(Module, Debug)]
struct Forgetful<B: burn::tensor::backend::Backend> {
    memory: Memory<B>,
}

impl<B: MemoryBackend + AutodiffBackend> MemoryModel<B> for Forgetful<B> {
    fn memories(&mut self) -> Vec<&mut Memory<B>> {
        vec![]
    }
}

fn misuse_is_an_error<B: MemoryBackend>() {
    let config = small(Kind::UltraMem);
    let (layer, _) = memory::<Autodiff<B>>(&config, 14, true);
    let narrow = layer.try_forward(Tensor::<Autodiff<B>, 3>::zeros([2, 3, 10], &Default::default()));
    assert_eq!(narrow.unwrap_err().to_string(), "input has shape [2, 3, 10], expected [6, 11]");
    let backward = |layer: &Memory<Autodiff<B>>| {
        layer.forward(Tensor::<Autodiff<B>, 2>::ones([3, config.hidden_size], &Default::default())).sum().backward()
    };
    let gradients = backward(&layer);
    let forgetful = Trainer::new(TrainerConfig::new(1)).step(0.1, Forgetful { memory: layer.clone() }, gradients);
    let error = forgetful.unwrap_err().to_string();
    assert_eq!(
        error,
        "number of memory layers that MemoryModel::memories lists is 0, expected all of the model's, each once"
    );
    // The sparse part of the first pass is gone when the second has been taken.
    let (first, second) = (backward(&layer), backward(&layer));
    let (mut trainer, mut model) = (Trainer::new(TrainerConfig::new(1)), One { memory: layer });
    trainer.accumulate(&mut model, second).unwrap();
    let error = trainer.step(0.1, model, first).unwrap_err().to_string();
    assert!(error.starts_with("the sparse part of these gradients is gone"), "{error}");
}

#[test]
fn a_model_carries_its_skips() {
    let device = Default::default();
    let make = || Ok(UltraMemConfig::new(16, 8, 4, 8, 4).init::<Plain>(&device)?.into());
    let memories = Memories::<Plain>::new("1:2/2:2".parse().unwrap(), 3, make).unwrap();
    let input = Tensor::<Plain, 2>::random([3, 16], burn::tensor::Distribution::Default, &device);
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
    assert!(Memories::<Plain>::new("1:3".parse().unwrap(), 3, make).is_err());
}

#[test]
fn quick_start_of_the_readme() {
    let readme = include_str!("../../../README.md");
    let source = include_str!("../src/main.rs");
    let code = source.split_once("\n\n").unwrap().1;
    assert!(readme.contains(code), "the README's quick start is not examples/quickstart.rs");
    quickstart::main().unwrap();
}
