//! Burn's AdamW for weights in half precision, too.

use burn::{
    module::AutodiffModule,
    optim::{AdamW, AdamWConfig, LearningRate, SimpleOptimizer, adaptor::OptimizerAdaptor},
    tensor::{
        FloatDType, Tensor,
        backend::{AutodiffBackend, Backend},
    },
};

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

impl<B: Backend> SimpleOptimizer<B> for FullAdamW {
    type State<const D: usize> = <AdamW as SimpleOptimizer<B>>::State<D>;

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
        // The moments of a record come in the backend's own type.
        let state = state.map(|mut state| {
            state.momentum.moment_1 = state.momentum.moment_1.cast(full);
            state.momentum.moment_2 = state.momentum.moment_2.cast(full);
            state
        });
        let (weight, state) = self.0.step(learning_rate, weight.cast(full), gradient.cast(full), state);
        (weight.cast(dtype), state)
    }

    fn to_device<const D: usize>(state: Self::State<D>, device: &B::Device) -> Self::State<D> {
        <AdamW as SimpleOptimizer<B>>::to_device(state, device)
    }
}
