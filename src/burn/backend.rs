//! Burn's backends that memory layers run on: their tensors as an engine's and back, and the layer's call.

use burn::tensor::{
    TensorMetadata,
    backend::Backend,
    ops::{FloatTensor, IntTensor},
};

use super::engine::{Buffers, Engine};
use super::pending::Pendings;
use crate::{MemoryConfig, PerWeight, Result, Stream};

/// A backend that memory layers run on, with and without autodiff: every CubeCL backend of Burn, with and without fusion, and with the feature
/// `burn-flex` Burn's backend of the processor.
pub trait MemoryBackend: Backend {
    /// What runs the layers.
    type Engine: Engine;

    /// The tensor as the engine has it, everything it waits for enqueued. Autodiff lets go of it.
    fn float_buffer(tensor: FloatTensor<Self>) -> Buffer<Self>;

    /// As [`float_buffer`](Self::float_buffer), for integers.
    fn int_buffer(tensor: IntTensor<Self>) -> Buffer<Self>;

    /// An engine's tensor of floats as the backend's.
    fn float_from_buffer(tensor: Buffer<Self>) -> FloatTensor<Self>;

    /// The layer's output `[tokens, hidden_size]`.
    ///
    /// # Errors
    /// Shapes or types that do not fit the configuration.
    fn memory(call: Call<Self>) -> Result<FloatTensor<Self>> {
        if call.is_empty() {
            return Ok(call.input);
        }
        Ok(Self::float_from_buffer(Self::Engine::forward(call.buffers())?))
    }
}

/// A tensor of a backend's engine.
pub type Buffer<B> = <<B as MemoryBackend>::Engine as Engine>::Tensor;

/// One call of a layer: its configuration, its weights and the input `[tokens, hidden_size]`.
pub struct Call<B: Backend> {
    pub(super) config: MemoryConfig,
    /// Tables among them, be they this layer's or another's that it shares.
    pub(super) tensors: PerWeight<Option<FloatTensor<B>>>,
    /// `u` and `v`.
    pub(super) vectors: Option<[FloatTensor<B>; 2]>,
    pub(super) shuffle: Option<IntTensor<B>>,
    pub(super) input: FloatTensor<B>,
    /// Take the tables' gradients where these are sparse.
    pub(super) pending: Option<Pendings>,
    /// Where the layer runs, if not where its caller's tensors are made.
    pub(super) stream: Option<Stream>,
}

impl<B: MemoryBackend> Call<B> {
    /// Whether there is no token. The output is as empty as the input then, and of its shape.
    pub(super) fn is_empty(&self) -> bool {
        self.input.shape().num_elements() == 0
    }

    /// The call as the engine takes it.
    pub(super) fn buffers(self) -> Buffers<B::Engine> {
        Buffers {
            config: self.config,
            tensors: self.tensors.map(|tensor| tensor.map(B::float_buffer)),
            vectors: self.vectors.map(|vectors| vectors.map(B::float_buffer)),
            shuffle: self.shuffle.map(B::int_buffer),
            input: B::float_buffer(self.input),
            stream: self.stream,
        }
    }
}
