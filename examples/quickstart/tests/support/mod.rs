//! What the tests of the Burn modules share: backends, a model that is one layer, and a step of it. Each test runs on the plain backend, on
//! the one with fusion, and on the processor's.
#![allow(dead_code, unused_imports, unused_macros, reason = "each test uses a part")]

pub mod checks;
#[path = "../../../../tests/common/mod.rs"]
pub mod common;
#[path = "../../../../tests/common/modules.rs"]
pub mod modules;

use burn::{
    backend::Autodiff,
    module::Module,
    tensor::{Tensor, TensorData, backend::AutodiffBackend},
};
use burn_wgpu::{CubeBackend, WgpuRuntime};
use ultramem::{
    Kind, MemoryConfig, Weights,
    burn::{Memory, MemoryBackend, MemoryModel, Trainer},
};

use common::random_input;
pub use modules::numbers;

pub type Plain = CubeBackend<WgpuRuntime, f32, i32, u32>;
pub type Fused = burn_wgpu::Wgpu;
pub type Processor = burn::backend::Flex;

/// Runs a generic test on each backend.
macro_rules! on_each_backend {
    ($($name:ident)*) => {
        mod plain {
            $(#[test] fn $name() { super::$name::<$crate::support::Plain>(); })*
        }
        mod fused {
            $(#[test] fn $name() { super::$name::<$crate::support::Fused>(); })*
        }
        mod processor {
            $(#[test] fn $name() { super::$name::<$crate::support::Processor>(); })*
        }
    };
}
pub(crate) use on_each_backend;

pub const KINDS: [Kind; 6] = Kind::ALL;

pub fn tensor<B: MemoryBackend>(numbers: &[f32], width: usize) -> Tensor<B, 2> {
    let shape = [numbers.len() / width, width];
    Tensor::from_data(TensorData::new(numbers.to_vec(), shape), &Default::default())
}

pub fn memory<B: MemoryBackend>(config: &MemoryConfig, seed: u64, sparse: bool) -> (Memory<B>, Weights<'static>) {
    let weights = Weights::random(config, seed);
    (Memory::from_weights(config.clone(), &weights, sparse, &Default::default()).unwrap(), weights)
}

/// A step on the square of the output, so that the gradient hangs on the weights.
pub fn step<B: MemoryBackend>(
    trainer: &mut Trainer<Autodiff<B>, One<Autodiff<B>>>,
    model: One<Autodiff<B>>,
    seed: u64,
) -> One<Autodiff<B>>
where
    Autodiff<B>: MemoryBackend<Engine = B::Engine>,
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
pub struct One<B: burn::tensor::backend::Backend> {
    pub memory: Memory<B>,
}

impl<B: MemoryBackend + AutodiffBackend> MemoryModel<B> for One<B> {
    fn memories(&mut self) -> Vec<&mut Memory<B>> {
        vec![&mut self.memory]
    }
}

pub fn weights_of<B: MemoryBackend>(memory: &Memory<B>) -> Weights<'static> {
    memory.weights().unwrap()
}
