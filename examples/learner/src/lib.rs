//! A model with a sparse memory layer, trained by `burn-train`'s learner, with its metrics and checkpoints.

use std::{path::Path, sync::Arc};

use burn::{
    backend::Autodiff,
    backend::wgpu::{CubeBackend, WgpuRuntime},
    data::{
        dataloader::{DataLoader, DataLoaderBuilder, batcher::Batcher},
        dataset::InMemDataset,
    },
    module::Module,
    nn::{Linear, LinearConfig},
    optim::AdamWConfig,
    record::{BinFileRecorder, FullPrecisionSettings},
    tensor::{
        Tensor, TensorData,
        backend::{AutodiffBackend, Backend},
    },
    train::{InferenceStep, Learner, RegressionOutput, SupervisedTraining, TrainOutput, TrainStep, metric::LossMetric},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use ultramem::burn::{Memory, MemoryBackend, MemoryModel, SparseOptimizer, UltraMemConfig};
use ultramem::kernels::optimiser::Rule;

/// The backend below autodiff.
pub type Inner = CubeBackend<WgpuRuntime, f32, i32, u32>;
/// The backend that trains.
pub type Training = Autodiff<Inner>;

const WIDTH: usize = 16;
const BATCH: usize = 16;
/// Examples to train on.
const COUNT: usize = 128;
/// Epochs of the whole training.
pub const EPOCHS: usize = 4;

/// A memory layer between two linear ones, added to what it reads.
#[derive(Module, Debug)]
pub struct Model<B: Backend> {
    read: Linear<B>,
    memory: Memory<B>,
    write: Linear<B>,
}

impl<B: MemoryBackend> Model<B> {
    /// A model to start training from. The device's seed gives its weights.
    ///
    /// # Errors
    /// Dimensions that make no layer.
    pub fn new(device: &B::Device) -> ultramem::Result<Self> {
        let linear = || LinearConfig::new(WIDTH, WIDTH).init(device);
        let memory = UltraMemConfig::new(WIDTH, 16, 8, 8, 4).init(device)?.into();
        Ok(Self { read: linear(), memory, write: linear() })
    }

    /// The memory layer.
    pub fn memory(&self) -> &Memory<B> {
        &self.memory
    }

    fn output(&self, [input, targets]: [Tensor<B, 2>; 2]) -> RegressionOutput<B> {
        let hidden = self.read.forward(input);
        let output = self.write.forward(self.memory.forward(hidden.clone()) + hidden);
        let loss = (output.clone() - targets.clone()).square().mean();
        RegressionOutput::new(loss, output, targets)
    }
}

impl<B: MemoryBackend + AutodiffBackend> MemoryModel<B> for Model<B> {
    fn memories(&mut self) -> Vec<&mut Memory<B>> {
        vec![&mut self.memory]
    }
}

impl<B: MemoryBackend + AutodiffBackend> TrainStep for Model<B> {
    type Input = [Tensor<B, 2>; 2];
    type Output = RegressionOutput<B>;

    fn step(&self, batch: Self::Input) -> TrainOutput<RegressionOutput<B>> {
        let output = self.output(batch);
        TrainOutput::new(self, output.loss.backward(), output)
    }
}

impl<B: MemoryBackend> InferenceStep for Model<B> {
    type Input = [Tensor<B, 2>; 2];
    type Output = RegressionOutput<B>;

    fn step(&self, batch: Self::Input) -> RegressionOutput<B> {
        self.output(batch)
    }
}

/// Numbers and what is to be made of them.
#[derive(Clone, Debug)]
struct Example([[f32; WIDTH]; 2]);

struct Examples;

impl<B: Backend> Batcher<B, Example, [Tensor<B, 2>; 2]> for Examples {
    fn batch(&self, items: Vec<Example>, device: &B::Device) -> [Tensor<B, 2>; 2] {
        [0, 1].map(|part| {
            let numbers: Vec<f32> = items.iter().flat_map(|item| item.0[part]).collect();
            Tensor::from_data(TensorData::new(numbers, [items.len(), WIDTH]), device)
        })
    }
}

/// The same examples in the same order each time.
fn examples<B: Backend>(count: usize, seed: u64) -> Arc<dyn DataLoader<B, [Tensor<B, 2>; 2]>> {
    let mut rng = StdRng::seed_from_u64(seed);
    let example = |_| {
        let input: [f32; WIDTH] = std::array::from_fn(|_| rng.random_range(-1.0..1.0));
        Example([input, std::array::from_fn(|at| (3.0 * input[at] * input[(at + 1) % WIDTH]).sin())])
    };
    DataLoaderBuilder::new(Examples).batch_size(BATCH).build(InMemDataset::new((0..count).map(example).collect()))
}

/// Trains to the end of epoch `last`, with checkpoints in `folder`; from that of epoch `resume` on, where one is given.
///
/// # Errors
/// Dimensions that make no layer.
pub fn train(
    mut model: Model<Training>,
    folder: &Path,
    last: usize,
    resume: Option<usize>,
) -> ultramem::Result<Model<Inner>> {
    let rule = Rule::Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, decoupled: true };
    let optimiser = SparseOptimizer::new(AdamWConfig::new().init::<Training, Model<Training>>(), rule, &mut model)?;
    let optimiser = optimiser.with_value_rate(4.0, EPOCHS * COUNT / BATCH).with_clip(1.0);
    let training = SupervisedTraining::new(folder, examples::<Training>(COUNT, 1), examples::<Inner>(32, 2))
        .metric_train_numeric(LossMetric::new())
        .metric_valid_numeric(LossMetric::new())
        .with_file_checkpointer(BinFileRecorder::<FullPrecisionSettings>::new())
        .with_application_logger(None)
        .num_epochs(last);
    let training = match resume {
        Some(epoch) => training.checkpoint(epoch),
        None => training,
    };
    Ok(training.launch(Learner::new(model, optimiser, 1e-2)).model)
}
