//! The Burn modules on the offline H100, whose allocator pads rows as CUDA's does: output, gradients and a training step against the oracle,
//! with and without fusion, in every element type, at widths whose rows are padded and at some whose rows are not.

#[path = "../../tests/common/mod.rs"]
mod common;

use std::{collections::BTreeMap, ops::DerefMut, sync::OnceLock};

use burn::{
    backend::Autodiff,
    module::{Module, ModuleMapper, ModuleVisitor, Param},
    record::{BinBytesRecorder, FullPrecisionSettings, Recorder},
    tensor::{
        FloatDType, Tensor, TensorData,
        backend::{AutodiffBackend, DeviceOps, set_default_float_dtype},
    },
};
use burn_cubecl::CubeBackend;
use burn_fusion::Fusion;
use cubecl::{
    Runtime,
    client::ComputeClient,
    device::{Device, DeviceId},
    ir::TargetProperties,
    zspace::{Shape, Strides},
};
use ultramem::{
    Dimensions, ElementType, HostTensor, Kind, MemoryConfig, Weights,
    burn::{Memory, MemoryBackend, MemoryModel, ProductKeyMemoryConfig, Trainer, TrainerConfig, UltraMemConfig},
    kernels::optimiser::Rule,
    reference,
};
use ultramem_offline::{Finding, Gpu, OfflineDevice, OfflineRuntime, OfflineServer, Options, Space, TargetCompiler};

use common::{random_input, relative_l2};

/// Burn's device: an offline one that can be compared, and of which one is the default.
#[derive(Clone, Debug)]
struct Card(OfflineDevice);

impl Default for Card {
    fn default() -> Self {
        static FIRST: OnceLock<Card> = OnceLock::new();
        FIRST.get_or_init(|| Card(OfflineDevice::default())).clone()
    }
}

impl PartialEq for Card {
    fn eq(&self, other: &Self) -> bool {
        self.to_id() == other.to_id()
    }
}

impl Device for Card {
    fn from_id(id: DeviceId) -> Self {
        Card(OfflineDevice::from_id(id))
    }

    fn to_id(&self) -> DeviceId {
        self.0.to_id()
    }
}

impl DeviceOps for Card {}

/// The offline runtime on Burn's device, which makes it one that Burn's backends run on.
#[derive(Clone, Debug)]
struct BurnRuntime;

impl Runtime for BurnRuntime {
    type Compiler = TargetCompiler;
    type Server = OfflineServer;
    type Device = Card;

    fn client(device: &Card) -> ComputeClient<Self> {
        ComputeClient::load(device)
    }

    fn name(_: &ComputeClient<Self>) -> &'static str {
        "cuda"
    }

    fn require_array_lengths() -> bool {
        OfflineRuntime::require_array_lengths()
    }

    fn max_cube_count() -> (u32, u32, u32) {
        OfflineRuntime::max_cube_count()
    }

    fn can_read_tensor(shape: &Shape, strides: &Strides) -> bool {
        OfflineRuntime::can_read_tensor(shape, strides)
    }

    fn target_properties() -> TargetProperties {
        OfflineRuntime::target_properties()
    }

    fn enumerate_devices(kind: u16, info: &()) -> Vec<DeviceId> {
        OfflineRuntime::enumerate_devices(kind, info)
    }
}

/// Burn's CUDA backend, with the offline device in CUDA's place. The element type is the device's default.
type Plain = CubeBackend<BurnRuntime, f32, i32, u8>;
type Fused = Fusion<Plain>;

/// A new device whose floats are of `dtype`.
fn card<B: MemoryBackend<Device = Card>>(dtype: ElementType) -> Card {
    let card = Card(OfflineDevice::new(Options { gpu: Gpu::H100, unwritten_loads: true, ..Options::default() }));
    let float = match dtype {
        ElementType::F32 => FloatDType::F32,
        ElementType::F16 => FloatDType::F16,
        ElementType::BF16 => FloatDType::BF16,
    };
    set_default_float_dtype::<B>(&card, float).unwrap();
    card
}

/// A layer of two heads.
fn layer(kind: Kind, tucker_rank: usize, key_dim: usize, value_dim: usize) -> MemoryConfig {
    let (cores, expansion) = if kind == Kind::UltraMem { (2, 4) } else { (1, 1) };
    let (hidden_size, heads, side_keys, top_m) = (16, 2, 8, 4);
    let dims = Dimensions {
        kind,
        hidden_size,
        heads,
        side_keys,
        key_dim,
        tucker_rank,
        top_m,
        value_dim,
        ..Default::default()
    };
    MemoryConfig::new(Dimensions { cores, expansion, ..dims }).unwrap()
}

/// The widths of [`layer`]s: padded in every tensor, in some, in none.
const ULTRAMEM: [(usize, usize, usize); 3] = [(2, 6, 96), (4, 96, 320), (4, 16, 64)];
const PRODUCT_KEY: [(usize, usize); 3] = [(192, 6), (320, 192), (128, 128)];

const TOKENS: usize = 5;

macro_rules! on_each_backend {
    ($($name:ident: $test:ident($dtype:ident),)*) => {
        mod plain {
            $(#[test] fn $name() { super::$test::<super::Plain>(super::ElementType::$dtype); })*
        }
        mod fused {
            $(#[test] fn $name() { super::$test::<super::Fused>(super::ElementType::$dtype); })*
        }
    };
}

on_each_backend! {
    f32_ultramem_is_the_oracle: ultramem_is_the_oracle(F32),
    f16_ultramem_is_the_oracle: ultramem_is_the_oracle(F16),
    bf16_ultramem_is_the_oracle: ultramem_is_the_oracle(BF16),
    f32_product_key_is_the_oracle: product_key_is_the_oracle(F32),
    f16_product_key_is_the_oracle: product_key_is_the_oracle(F16),
    bf16_product_key_is_the_oracle: product_key_is_the_oracle(BF16),
    tables_are_contiguous: tables_are_contiguous(F32),
    a_padded_table_is_refused: a_padded_table_is_refused(F32),
}

/// A module that holds one layer.
trait OneLayer<B: MemoryBackend + AutodiffBackend>: MemoryModel<B> + DerefMut<Target = Memory<B>> {}
impl<B: MemoryBackend + AutodiffBackend, M: MemoryModel<B> + DerefMut<Target = Memory<B>>> OneLayer<B> for M {}

fn ultramem_is_the_oracle<B: MemoryBackend<Device = Card>>(dtype: ElementType)
where
    Autodiff<B>: MemoryBackend<Runtime = B::Runtime> + AutodiffBackend<InnerBackend = B, Device = Card>,
{
    let card = card::<B>(dtype);
    for (seed, (rank, key_dim, value_dim)) in ULTRAMEM.into_iter().enumerate() {
        let module = UltraMemConfig::new(16, 8, key_dim, value_dim, 4).with_tucker_rank(rank);
        let module = module.init::<Autodiff<B>>(&card).unwrap();
        holds(module, layer(Kind::UltraMem, rank, key_dim, value_dim), dtype, seed as u64, &card);
    }
}

fn product_key_is_the_oracle<B: MemoryBackend<Device = Card>>(dtype: ElementType)
where
    Autodiff<B>: MemoryBackend<Runtime = B::Runtime> + AutodiffBackend<InnerBackend = B, Device = Card>,
{
    let card = card::<B>(dtype);
    for (seed, (key_dim, value_dim)) in PRODUCT_KEY.into_iter().enumerate() {
        let module = ProductKeyMemoryConfig::new(16, 8, key_dim, value_dim, 4).init::<Autodiff<B>>(&card).unwrap();
        holds(module, layer(Kind::ProductKey, 1, key_dim, value_dim), dtype, seed as u64, &card);
    }
}

/// Forward, backward and a step of `module` with other weights, on numbers that `dtype` holds.
fn holds<B: MemoryBackend<Device = Card>, M: OneLayer<Autodiff<B>>>(
    mut module: M,
    config: MemoryConfig,
    dtype: ElementType,
    seed: u64,
    card: &Card,
) where
    Autodiff<B>: MemoryBackend<Runtime = B::Runtime> + AutodiffBackend<InnerBackend = B, Device = Card>,
{
    assert_eq!(*module.config(), config);
    let name = format!("{:?}, {dtype:?}, key_dim {}, value_dim {}", config.kind, config.key_dim, config.value_dim);
    // Fixed seeds: where two scores are nearly equal, half precision may choose another slot than the oracle.
    let weights = rounded(&Weights::random(&config, seed), dtype);
    let [input, grad_output] = [1, 2].map(|more| round(&random_input(&config, TOKENS, 10 * seed + more), dtype));
    *module = Memory::from_weights(config.clone(), &weights, true, card).unwrap();
    let (output_off, gradient_off) = if dtype == ElementType::F32 { (1e-5, 1e-4) } else { (1e-2, 2e-2) };

    let tensor = |numbers: &[f32]| {
        let data = TensorData::new(numbers.to_vec(), [TOKENS, config.hidden_size]);
        Tensor::<Autodiff<B>, 2>::from_data(data, card)
    };
    let x = tensor(&input).require_grad();
    let output = module.forward(x.clone());
    let forward = reference::forward(&config, &weights, &input).unwrap();
    let off = relative_l2(&numbers(output.clone()), &forward.output);
    assert!(off < output_off, "{name}: output {off}");

    let gradients = (output * tensor(&grad_output)).sum().backward();
    let expected = reference::backward(&config, &weights, &input, &forward.slots, &grad_output).unwrap();
    let mut found = Named::<Autodiff<B>> { gradients: &gradients, path: vec![], found: BTreeMap::new() };
    module.visit(&mut found);
    let mut found = found.found;
    found.insert("input".into(), numbers(x.grad(&gradients).unwrap()));
    let mut all = vec![
        ("input", &expected.input),
        ("query_proj", &expected.query_proj),
        ("query_norm", &expected.query_norm),
        ("keys", &expected.keys),
        ("keys_norm", &expected.keys_norm),
        ("values_proj", &expected.values_proj),
    ];
    if config.kind == Kind::UltraMem {
        all.push(("cores", &expected.cores));
    }
    assert_eq!(found.len(), all.len(), "{name}: {:?}", found.keys());
    for (weight, expected) in all {
        let off = relative_l2(&found[weight], expected);
        assert!(off < gradient_off, "{name}: gradient of {weight} {off}");
    }

    // Gradient descent, whose step is the gradient; the greatest moves a value by a tenth.
    let greatest = expected.values.values().flatten().fold(0.0f64, |greatest, g| greatest.max(g.abs()));
    let rate = 0.1 / greatest;
    let mut values: Vec<f64> = weights.values.to_f32().into_iter().map(f64::from).collect();
    let start = values.clone();
    for (row, gradient) in &expected.values {
        let row = &mut values[row * config.value_dim..][..config.value_dim];
        row.iter_mut().zip(gradient).for_each(|(value, g)| *value -= rate * g);
    }
    let no_clip = TrainerConfig::new(10).with_clip(1e30).with_value_rate(4.0);
    let mut trainer = Trainer::<Autodiff<B>, M>::new(no_clip).with_rule(Rule::Sgd { momentum: 0.0 });
    let (module, report) =
        trainer.step(rate / 4.0, module, gradients).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert!(report.done, "{name}: {report:?}");
    let weights = module.layer(card).unwrap().read_weights().unwrap();
    let off = relative_l2(&weights.values.to_f32(), &values);
    let moved = relative_l2(&start, &values);
    assert!(off < gradient_off && moved > 10.0 * gradient_off, "{name}: values {off}, moved {moved}");

    // The layer goes on with what the optimiser left.
    let expected = reference::forward(&config, &weights, &input).unwrap().output;
    let off = relative_l2(&numbers(module.forward(tensor(&input))), &expected);
    assert!(off < output_off, "{name}: output after the step {off}");
    assert!(values_are_contiguous(&*module), "{name}");
    for launch in card.0.take_reports() {
        let (kernel, faults) = (&launch.kernel.name, &launch.faults);
        // Burn's and CubeCL's own kernels load padding, in units whose numbers go nowhere.
        let theirs = !kernel.starts_with("ultramem");
        let sound = faults
            .iter()
            .all(|fault| theirs && matches!(fault.finding, Finding::Unwritten { space: Space::Buffer { .. } }));
        assert!(launch.executed && sound, "{name}: {kernel}: {faults:?}");
    }
}

fn tables_are_contiguous<B: MemoryBackend<Device = Card>>(dtype: ElementType)
where
    Autodiff<B>: MemoryBackend<Runtime = B::Runtime> + AutodiffBackend<InnerBackend = B, Device = Card>,
{
    let (card, config) = (card::<B>(dtype), layer(Kind::ProductKey, 1, 6, 6));
    let new = |seed, sparse| {
        Memory::<Autodiff<B>>::from_weights(config.clone(), &Weights::random(&config, seed), sparse, &card).unwrap()
    };
    for sparse in [true, false] {
        let (first, second) = (new(1, sparse), new(2, sparse));
        assert!(values_are_contiguous(&first), "new, sparse {sparse}");
        let recorder = BinBytesRecorder::<FullPrecisionSettings>::default();
        let bytes = Recorder::<Autodiff<B>>::record(&recorder, first.clone().into_record(), ()).unwrap();
        let second = second.load_record(Recorder::<Autodiff<B>>::load(&recorder, bytes, &card).unwrap());
        assert!(values_are_contiguous(&second), "loaded, sparse {sparse}");
        let [first, second] = [first, second].map(|it| it.layer(&card).unwrap().read_weights().unwrap());
        assert_eq!(first.values, second.values);
    }
}

/// Whoever gives a layer another table has to give it one that can be updated in place.
fn a_padded_table_is_refused<B: MemoryBackend<Device = Card>>(dtype: ElementType)
where
    Autodiff<B>: MemoryBackend<Runtime = B::Runtime> + AutodiffBackend<InnerBackend = B, Device = Card>,
{
    let (card, config) = (card::<B>(dtype), layer(Kind::ProductKey, 1, 6, 6));
    let weights = Weights::random(&config, 3);
    let mut module = ProductKeyMemoryConfig::new(16, 8, 6, 6, 4).init::<Autodiff<B>>(&card).unwrap();
    *module = Memory::from_weights(config.clone(), &weights, true, &card).unwrap();
    let module = module.map(&mut Doubled);
    assert!(!values_are_contiguous(&*module));
    let input = random_input(&config, TOKENS, 4);
    let data = TensorData::new(input.clone(), [TOKENS, config.hidden_size]);
    let output = module.forward(Tensor::<Autodiff<B>, 2>::from_data(data, &card));
    let twice: Vec<f32> = weights.values.to_f32().iter().map(|value| 2.0 * value).collect();
    let weights = Weights { values: HostTensor::from_f32(weights.values.shape(), &twice).unwrap(), ..weights };
    let expected = reference::forward(&config, &weights, &input).unwrap().output;
    assert!(relative_l2(&numbers(output.clone()), &expected) < 1e-5);
    let (before, gradients) = (module.clone(), output.square().sum().backward());
    let mut trainer = Trainer::new(TrainerConfig::new(10));
    let error = trainer.step(0.1, module, gradients).unwrap_err().to_string();
    assert!(error.contains("of shape [64, 6] has strides [8, 1], expected a contiguous tensor"), "{error}");
    assert_eq!(trainer.steps(), 0);
    assert_eq!(before.layer(&card).unwrap().read_weights().unwrap(), weights);
    let record = before.clone().into_record();
    assert!(values_are_contiguous(&*before.load_record(record)));
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

fn values_are_contiguous<B: MemoryBackend>(memory: &Memory<B>) -> bool {
    let mut table = Table { path: vec![], contiguous: None };
    memory.visit(&mut table);
    table.contiguous.unwrap()
}

/// How the table lies in memory.
struct Table {
    path: Vec<String>,
    contiguous: Option<bool>,
}

impl<B: MemoryBackend> ModuleVisitor<B> for Table {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if self.path.last().is_some_and(|name| name == "values") {
            self.contiguous = Some(B::float_cube(param.val().into_primitive().tensor()).is_contiguous());
        }
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

fn numbers<B: MemoryBackend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().to_vec().unwrap()
}

/// What the numbers are in `dtype`.
fn round(numbers: &[f32], dtype: ElementType) -> Vec<f32> {
    HostTensor::from_f32([numbers.len()], numbers).unwrap().cast(dtype).to_f32()
}

fn rounded(weights: &Weights<'_>, dtype: ElementType) -> Weights<'static> {
    let tensor =
        |tensor: &HostTensor<'_>| HostTensor::from_f32(tensor.shape(), &round(&tensor.to_f32(), dtype)).unwrap();
    Weights {
        query_proj: tensor(&weights.query_proj),
        query_norm: tensor(&weights.query_norm),
        keys: tensor(&weights.keys),
        keys_norm: tensor(&weights.keys_norm),
        cores: round(&weights.cores, dtype),
        core_u: round(&weights.core_u, dtype),
        core_v: round(&weights.core_v, dtype),
        shuffle_index: weights.shuffle_index.clone(),
        values: tensor(&weights.values),
        values_proj: tensor(&weights.values_proj),
        gate_proj: weights.gate_proj.as_ref().map(tensor),
    }
}
