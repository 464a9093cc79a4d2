//! Burn's AdamW for weights in half precision, too.

use burn::{
    module::AutodiffModule,
    optim::{
        AdamW, AdamWConfig, AdamWState, AdaptiveMomentumState, LearningRate, SimpleOptimizer, adaptor::OptimizerAdaptor,
    },
    record::Record,
    tensor::{
        FloatDType, Tensor,
        backend::{AutodiffBackend, Backend},
    },
};

use super::full::FullTensor;

/// Burn's AdamW, which computes in f32 and keeps its moments so where a weight is in half precision. In f16 the square of a small gradient is
/// zero, and so is a small epsilon: a weight whose gradient is zero would become 0/0.
#[derive(Clone)]
pub struct FullAdamW(AdamW);

impl FullAdamW {
    /// The optimiser of a module.
    pub(super) fn init<B: AutodiffBackend, M: AutodiffModule<B>>(config: &AdamWConfig) -> OptimizerAdaptor<Self, M, B> {
        Self(config.build()).into()
    }
}

/// The moments of a weight, f32 `[..]` of its shape.
#[derive(Record, Clone)]
pub struct FullAdamWState<B: Backend, const D: usize> {
    time: usize,
    moment_1: FullTensor<B, D>,
    moment_2: FullTensor<B, D>,
    /// With AMSGrad.
    max_moment_2: Option<FullTensor<B, D>>,
}

impl<B: Backend, const D: usize> From<AdamWState<B, D>> for FullAdamWState<B, D> {
    fn from(AdamWState { momentum }: AdamWState<B, D>) -> Self {
        Self {
            time: momentum.time,
            moment_1: FullTensor(momentum.moment_1),
            moment_2: FullTensor(momentum.moment_2),
            max_moment_2: momentum.max_moment_2.map(FullTensor),
        }
    }
}

impl<B: Backend, const D: usize> From<FullAdamWState<B, D>> for AdamWState<B, D> {
    fn from(state: FullAdamWState<B, D>) -> Self {
        let mut momentum = AdaptiveMomentumState::new(state.time, state.moment_1.0, state.moment_2.0);
        momentum.max_moment_2 = state.max_moment_2.map(|tensor| tensor.0);
        Self { momentum }
    }
}

impl<B: Backend> SimpleOptimizer<B> for FullAdamW {
    type State<const D: usize> = FullAdamWState<B, D>;

    fn step<const D: usize>(
        &self,
        learning_rate: LearningRate,
        weight: Tensor<B, D>,
        gradient: Tensor<B, D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<B, D>, Option<Self::State<D>>) {
        let dtype = FloatDType::from(weight.dtype());
        let full = match dtype {
            FloatDType::F16 | FloatDType::BF16 => FloatDType::F32,
            other => other,
        };
        let state = state.map(AdamWState::from);
        let (weight, state) = self.0.step(learning_rate, weight.cast(full), gradient.cast(full), state);
        (weight.cast(dtype), state.map(FullAdamWState::from))
    }

    fn to_device<const D: usize>(state: Self::State<D>, device: &B::Device) -> Self::State<D> {
        <AdamW as SimpleOptimizer<B>>::to_device(state.into(), device).into()
    }
}
