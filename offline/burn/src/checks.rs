//! Each check on any backend.

use std::collections::BTreeSet;

use burn::{
    backend::Autodiff,
    module::{Module, ModuleMapper, ModuleVisitor, Param},
    record::{BinBytesRecorder, FullPrecisionSettings, Recorder},
    tensor::{
        FloatDType, Tensor, TensorData,
        backend::{AutodiffBackend, Backend, set_default_float_dtype},
    },
};
use ultramem::{
    Dimensions, ElementType, HostTensor, Kind, MemoryConfig, Weight, Weights,
    burn::{Kernels, Memories, Memory, MemoryBackend, MemoryModel, StepError, Trainer, TrainerConfig},
    kernels::optimiser::Rule,
    reference,
};
use ultramem_offline::{Fault, Finding, Gpu, LaunchReport, OfflineDevice, Options, Space};

use crate::{BurnRuntime, Card};
use common::{random_input, relative_l2};
use modules::{gradients_by_field, numbers, rounded};

#[path = "../../../tests/common/mod.rs"]
mod common;
#[path = "../../../tests/common/modules.rs"]
mod modules;

/// A new device whose floats are of `dtype`.
fn card<B: MemoryBackend<Device = Card, Engine = Kernels<BurnRuntime>>>(dtype: ElementType) -> Card {
    let card = Card(OfflineDevice::new(Options { gpu: Gpu::H100, unwritten_loads: true, ..Options::default() }));
    let float = match dtype {
        ElementType::F32 => FloatDType::F32,
        ElementType::F16 => FloatDType::F16,
        ElementType::BF16 => FloatDType::BF16,
    };
    set_default_float_dtype::<B>(&card, float).unwrap();
    card
}

/// A layer of two heads; `tucker_rank` 1 is a product-key memory's.
fn layer(tucker_rank: usize, key_dim: usize, value_dim: usize) -> MemoryConfig {
    let (kind, cores, expansion) = if tucker_rank > 1 { (Kind::UltraMem, 2, 4) } else { (Kind::ProductKey, 1, 1) };
    let (hidden_size, heads, side_keys, top_m) = (16, 2, 8, 4);
    let dims = Dimensions {
        capabilities: kind.capabilities(),
        hidden_size,
        heads,
        side_keys,
        key_dim,
        tucker_rank,
        top_m,
        value_dim,
        cores,
        expansion,
        ..Default::default()
    };
    MemoryConfig::new(dims).unwrap()
}

const TOKENS: usize = 5;

/// A model that is one layer.
#[derive(Module, Debug)]
struct Model<B: Backend> {
    memory: Memory<B>,
}

impl<B: MemoryBackend + AutodiffBackend> MemoryModel<B> for Model<B> {
    fn memories(&mut self) -> Vec<&mut Memory<B>> {
        vec![&mut self.memory]
    }
}

fn model<B>(config: &MemoryConfig, weights: &Weights<'_>, sparse: bool, card: &Card) -> Model<B>
where
    B: MemoryBackend<Device = Card, Engine = Kernels<BurnRuntime>>,
{
    Model { memory: Memory::from_weights(config.clone(), weights, sparse, card).unwrap() }
}

/// On numbers that `dtype` holds.
pub fn is_the_oracle<B: MemoryBackend<Device = Card, Engine = Kernels<BurnRuntime>>>(
    dtype: ElementType,
    (rank, key_dim, value_dim): (usize, usize, usize),
) where
    Autodiff<B>: MemoryBackend<Engine = B::Engine> + AutodiffBackend<InnerBackend = B, Device = Card>,
{
    let (config, card) = (&layer(rank, key_dim, value_dim), &card::<B>(dtype));
    let name = format!("{:?}, {dtype:?}, key_dim {}, value_dim {}", config.kind(), config.key_dim, config.value_dim);
    // Fixed seeds: where two scores are nearly equal, half precision may choose another slot than the oracle.
    let weights = rounded(&Weights::random(config, 1), |numbers| round(numbers, dtype)).rounded(dtype);
    let [input, grad_output] = [2, 3].map(|seed| round(&random_input(config, TOKENS, seed), dtype));
    let model = model::<Autodiff<B>>(config, &weights, true, card);
    let (output_off, gradient_off) = if dtype == ElementType::F32 { (1e-5, 1e-4) } else { (1e-2, 2e-2) };

    let tensor = |numbers: &[f32]| {
        let data = TensorData::new(numbers.to_vec(), [TOKENS, config.hidden_size]);
        Tensor::<Autodiff<B>, 2>::from_data(data, card)
    };
    let x = tensor(&input).require_grad();
    assert_eq!(numbers(x.clone()), input);
    reports(&name, card);
    let output = model.memory.forward(x.clone());
    let forward = reference::forward(config, &weights, &input).unwrap();
    let off = relative_l2(&numbers(output.clone()), &forward.output);
    assert!(off < output_off, "{name}: output {off}");
    // A copy reads a whole table; Burn's kernels read the norms and cores alone, which they cast.
    let bytes = weights[Weight::Values].to_f32().len().min(weights[Weight::Keys].to_f32().len()) * dtype.size();
    for launch in reports(&name, card).iter().filter(|launch| !is_ours(launch)) {
        let read = launch.traffic.iter().map(|traffic| traffic.read.distinct_bytes).max();
        assert!(read < Some(bytes as u64), "{name}: {} reads {read:?} of {bytes} bytes", launch.kernel.name);
    }

    let gradients = (output * tensor(&grad_output)).sum().backward();
    let expected = reference::backward(config, &weights, &input, &forward.slots, &grad_output).unwrap();
    let mut found = gradients_by_field(&model, &gradients);
    found.insert("input".into(), numbers(x.grad(&gradients).unwrap()));
    let mut all = vec![
        ("input", &expected.input),
        ("query_proj", &expected.tensors[Weight::QueryProj]),
        ("query_norm", &expected.tensors[Weight::QueryNorm]),
        ("keys", &expected.tensors[Weight::Keys]),
        ("keys_norm", &expected.tensors[Weight::KeysNorm]),
        ("values_proj", &expected.tensors[Weight::ValuesProj]),
    ];
    if config.tucker() {
        all.push(("cores", &expected.tensors[Weight::Cores]));
    }
    assert_eq!(found.len(), all.len(), "{name}: {:?}", found.keys());
    for (weight, expected) in all {
        let off = relative_l2(&found[weight], expected);
        assert!(off < gradient_off, "{name}: gradient of {weight} {off}");
    }

    // Gradient descent, whose step is the gradient; the greatest moves a value by a tenth.
    let greatest = expected.values.values().flatten().fold(0.0f64, |greatest, g| greatest.max(g.abs()));
    let rate = 0.1 / greatest;
    let mut values: Vec<f64> = weights.numbers(Weight::Values).into_iter().map(f64::from).collect();
    let start = values.clone();
    for (row, gradient) in &expected.values {
        let row = &mut values[row * config.value_dim..][..config.value_dim];
        row.iter_mut().zip(gradient).for_each(|(value, g)| *value -= rate * g);
    }
    let no_clip = TrainerConfig::new(10).with_clip(1e30).with_value_rate(4.0);
    let mut trainer = Trainer::new(no_clip).with_rule(Rule::Sgd { momentum: 0.0 });
    let (model, report) = trainer.step(rate / 4.0, model, gradients).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert!(report.done, "{name}: {report:?}");
    let weights = model.memory.weights().unwrap();
    let off = relative_l2(&weights.numbers(Weight::Values), &values);
    let moved = relative_l2(&start, &values);
    assert!(off < gradient_off && moved > 10.0 * gradient_off, "{name}: values {off}, moved {moved}");

    // The layer goes on with what the optimiser left.
    let expected = reference::forward(config, &weights, &input).unwrap().output;
    let off = relative_l2(&numbers(model.memory.forward(tensor(&input))), &expected);
    assert!(off < output_off, "{name}: output after the step {off}");
    assert!(values_are_contiguous(&model), "{name}");
    reports(&name, card);
}

/// What was launched since this was last called, all of it sound.
fn reports(name: &str, card: &Card) -> Vec<LaunchReport> {
    let reports = card.0.take_reports();
    for launch in &reports {
        let faults = &launch.faults;
        // Burn's and CubeCL's own kernels load padding, in units whose numbers go nowhere.
        let padding = |fault: &Fault| matches!(fault.finding, Finding::Unwritten { space: Space::Buffer { .. } });
        let sound = faults.iter().all(|fault| !is_ours(launch) && padding(fault));
        assert!(launch.executed && sound, "{name}: {}: {faults:?}", launch.kernel.name);
    }
    reports
}

fn is_ours(launch: &LaunchReport) -> bool {
    launch.kernel.name.starts_with("ultramem")
}

pub fn tables_are_contiguous<B: MemoryBackend<Device = Card, Engine = Kernels<BurnRuntime>>>() {
    let (card, config) = (card::<B>(ElementType::F32), layer(1, 6, 6));
    for sparse in [true, false] {
        let [first, second] = [1, 2].map(|seed| model::<B>(&config, &Weights::random(&config, seed), sparse, &card));
        assert!(values_are_contiguous(&first), "new, sparse {sparse}");
        let recorder = BinBytesRecorder::<FullPrecisionSettings>::default();
        let bytes = Recorder::<B>::record(&recorder, first.clone().into_record(), ()).unwrap();
        let second = second.load_record(Recorder::<B>::load(&recorder, bytes, &card).unwrap());
        assert!(values_are_contiguous(&second), "loaded, sparse {sparse}");
        let [first, second] = [first, second].map(|it| it.memory.weights().unwrap());
        assert!(first[Weight::Values] == second[Weight::Values], "loaded, sparse {sparse}");
    }
}

/// Whoever gives a layer another table has to give it one that can be updated in place; the model is there again after the error.
pub fn a_padded_table_is_refused<B: MemoryBackend<Device = Card, Engine = Kernels<BurnRuntime>>>()
where
    Autodiff<B>: MemoryBackend<Engine = B::Engine> + AutodiffBackend<InnerBackend = B, Device = Card>,
{
    let (card, config) = (card::<B>(ElementType::F32), layer(1, 6, 6));
    let weights = Weights::random(&config, 3);
    let model = model::<Autodiff<B>>(&config, &weights, true, &card).map(&mut Doubled);
    assert!(!values_are_contiguous(&model));
    let input = random_input(&config, TOKENS, 4);
    let data = TensorData::new(input.clone(), [TOKENS, config.hidden_size]);
    let output = model.memory.forward(Tensor::<Autodiff<B>, 2>::from_data(data, &card));
    let twice: Vec<f32> = weights.numbers(Weight::Values).iter().map(|value| 2.0 * value).collect();
    let twice = HostTensor::from_f32(weights[Weight::Values].shape(), &twice).unwrap();
    let weights = weights.with(Weight::Values, twice);
    let expected = reference::forward(&config, &weights, &input).unwrap().output;
    assert!(relative_l2(&numbers(output.clone()), &expected) < 1e-5);
    let mut trainer = Trainer::new(TrainerConfig::new(10));
    let StepError { model, error } = trainer.step(0.1, model, output.square().sum().backward()).unwrap_err();
    let error = error.to_string();
    assert!(error.contains("of shape [64, 6] has strides [8, 1], expected a contiguous tensor"), "{error}");
    assert_eq!(trainer.steps(), 0);
    assert!(model.memory.weights().unwrap() == weights);
    let record = model.clone().into_record();
    assert!(values_are_contiguous(&model.load_record(record)));
}

/// Puts a table of twice the numbers in the table's place, as Burn allocates it.
struct Doubled;

impl<B: MemoryBackend> ModuleMapper<B> for Doubled {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        // The table alone is a matrix of 64 rows and 6 columns.
        if param.val().dims()[..] != [64, 6] {
            return param;
        }
        param.map(|tensor| {
            let twice = numbers(tensor.clone()).into_iter().map(|value| 2.0 * value).collect::<Vec<f32>>();
            Tensor::from_data(TensorData::new(twice, tensor.dims()), &tensor.device())
        })
    }
}

fn values_are_contiguous<B: MemoryBackend<Engine = Kernels<BurnRuntime>>>(model: &Model<B>) -> bool {
    let mut table = Table { path: vec![], contiguous: None };
    model.visit(&mut table);
    table.contiguous.unwrap()
}

/// How the table lies in memory.
struct Table {
    path: Vec<String>,
    contiguous: Option<bool>,
}

impl<B: MemoryBackend<Engine = Kernels<BurnRuntime>>> ModuleVisitor<B> for Table {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if self.path.last().is_some_and(|name| name == "values") {
            self.contiguous = Some(B::float_buffer(param.val().into_primitive().tensor()).is_contiguous());
        }
    }
}

/// What the numbers are in `dtype`.
fn round(numbers: &[f32], dtype: ElementType) -> Vec<f32> {
    HostTensor::from_f32([numbers.len()], numbers).unwrap().cast(dtype).to_f32()
}

/// What three passes through a model gave: outputs, the gradients of the input and of the first layer's values, and the launches.
type Passes = (Vec<f32>, Vec<LaunchReport>);

/// A model of five blocks whose layers read in blocks 0 and 1 and add after 2 and 3, and one that is added where it reads.
fn three_passes<B: MemoryBackend<Device = Card, Engine = Kernels<BurnRuntime>>>(shuffled: bool, seed: u64) -> Passes {
    let options = Options { seed: Some(seed), shuffled, unwritten_loads: true, ..Options::default() };
    let card = Card(OfflineDevice::new(options));
    let config = layer(2, 6, 16);
    let weights = Weights::random(&config, 5);
    let make = || Memory::from_weights(config.clone(), &weights, false, &card);
    let memories = Memories::<Autodiff<B>>::new("0:2/1:3/4:4".parse().unwrap(), 5, make).unwrap();
    let (tokens, width) = (9, config.hidden_size);
    let mut found = Vec::new();
    for pass in 0..3 {
        let data = TensorData::new(random_input(&config, tokens, pass), [tokens, width]);
        let input = Tensor::<Autodiff<B>, 2>::from_data(data, &card).require_grad();
        let mut hidden = input.clone();
        let mut carried = memories.carry();
        for block in 0..5 {
            let read = hidden.clone() * 0.5;
            carried.read(block, &read);
            hidden = carried.add(block, hidden + read.tanh());
        }
        // A pass that is given up: an output that nobody adds.
        let mut given_up = memories.carry();
        given_up.read(0, &(hidden.clone() * 0.25));
        drop(given_up);
        let gradients = hidden.clone().powi_scalar(2).sum().backward();
        found.extend(numbers(hidden.inner()));
        found.extend(numbers(input.grad(&gradients).unwrap()));
        found.extend(gradients_by_field(&memories.layers()[0], &gradients).into_values().flatten());
    }
    (found, card.0.take_reports())
}

pub fn layers_run_beside_blocks<B: MemoryBackend<Device = Card, Engine = Kernels<BurnRuntime>>>() {
    let (expected, _) = three_passes::<B>(false, 1);
    for seed in 0..6 {
        let (found, reports) = three_passes::<B>(true, seed);
        let faults: Vec<_> = reports.iter().flat_map(|report| &report.faults).collect();
        assert!(faults.is_empty(), "{faults:?}");
        // The last layer is where the blocks are; the others have a stream each.
        let chooses = |report: &&LaunchReport| {
            ["combine_kernel", "retrieve_kernel"].iter().any(|it| report.kernel.name.contains(it))
        };
        let streams: BTreeSet<u64> = reports.iter().filter(chooses).map(|report| report.stream).collect();
        assert_eq!(streams.len(), 3, "{streams:?}");
        assert_eq!(found, expected, "order {seed}");
    }
}
