//! What runs the layers of a backend, below Burn's tensors: a call, its backward pass, and the steps of sparse tables.

use std::fmt;

use burn::tensor::Shape;
use ultramem_kernels::optimiser::{Rounding, Rule};

use super::MemoryBackend;
use crate::{MemoryConfig, PerWeight, Result, Stream};

/// What runs the layers of a backend: [`Kernels`](super::Kernels) of a CubeCL runtime, or the processor.
pub trait Engine: fmt::Debug + Sized + 'static {
    /// A tensor, floats or integers, everything that it waits for enqueued. Its clones share a buffer.
    type Tensor: fmt::Debug + Clone + Send + Sync + 'static;
    /// The sparse gradient of a table. Its clones share buffers.
    type Rows: Clone + Send + 'static;
    /// What a call leaves for its backward pass.
    type Trace: fmt::Debug + Send + Sync;
    /// The optimiser of a sparse table, with its state.
    type Optimiser: TableOptimiser<Self>;

    /// The same numbers, contiguous, so that no call has to copy them.
    fn packed(tensor: Self::Tensor) -> Self::Tensor;

    /// A contiguous tensor in another shape of as many numbers, contiguous.
    fn shaped(tensor: Self::Tensor, shape: Shape) -> Self::Tensor;

    /// Checks that a table `[rows, width]` can be updated in place.
    ///
    /// # Errors
    /// Another shape, or a tensor that is not contiguous.
    fn check_table(table: &Self::Tensor, shape: [usize; 2]) -> Result<()>;

    /// Whatever this thread enqueues from now on comes behind all that the stream was given, of which `tensor` is a part.
    fn join(stream: &Stream, tensor: &Self::Tensor);

    /// The output `[tokens, hidden_size]`, in the input's type.
    ///
    /// # Errors
    /// Shapes or types that do not fit the configuration.
    fn forward(call: Buffers<Self>) -> Result<Self::Tensor>;

    /// [`forward`](Self::forward), and what [`backward`](Self::backward) needs of it.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    fn forward_saving(call: Buffers<Self>) -> Result<(Self::Tensor, Self::Trace)>;

    /// The gradients of a call, given its output's.
    ///
    /// # Errors
    /// A gradient of another shape.
    fn backward(trace: &Self::Trace, grad_output: Self::Tensor) -> Result<Gradients<Self>>;

    /// The gradient of a whole table `[rows, width]`, in the input's type.
    ///
    /// # Errors
    /// A table that the device can't hold.
    fn dense(trace: &Self::Trace, rows: &Self::Rows) -> Result<Self::Tensor>;

    /// The sum of the gradients of a table of so many rows.
    ///
    /// # Errors
    /// No gradients, or gradients of another table.
    fn sum(parts: &[Self::Rows], rows: usize) -> Result<Self::Rows>;

    /// The gradients of the listed rows, f32 `[capacity, width]`, on the device of `other`, and how many are listed: the others may be anything.
    /// Waits for the device.
    ///
    /// # Errors
    /// A device that failed.
    fn listed(rows: &Self::Rows, other: &Self::Tensor) -> Result<(Self::Tensor, usize)>;
}

/// The optimiser of a sparse table. A clone shares the state until one of the two makes a step.
pub trait TableOptimiser<E: Engine>: Clone + Send {
    /// An optimiser of a table `[rows, width]`, its state zeros.
    ///
    /// # Errors
    /// A number of the rule that makes no sense, or a state that the device can't hold.
    fn new(table: &E::Tensor, shape: [usize; 2], rule: Rule, rounding: Rounding) -> Result<Self>;

    /// Steps made.
    fn steps(&self) -> u64;

    /// How many tensors the state has.
    fn tensors(&self) -> usize;

    /// The state, each tensor flat and f32.
    fn state(&self) -> Vec<E::Tensor>;

    /// Takes up a [`state`](Self::state) that was saved after so many steps.
    ///
    /// # Errors
    /// Tensors that are not this rule's for this table.
    fn restore(&mut self, steps: u64, state: Vec<E::Tensor>) -> Result<()>;

    /// Checks all that [`step`](Self::step) can refuse.
    ///
    /// # Errors
    /// Those of [`step`](Self::step).
    fn check(&self, table: &E::Tensor, rows: &E::Rows, step: Step) -> Result<()>;

    /// Updates the listed rows, in place where nobody else holds the table, and gives the table back.
    ///
    /// # Errors
    /// Beside the table as it was: shapes, types or sizes that do not fit, or a number that is not finite.
    fn step(&mut self, table: E::Tensor, rows: &E::Rows, step: Step) -> (E::Tensor, Result<()>);
}

/// One step of a table: how far it goes, and what gradients are multiplied with first.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// How far it goes.
    pub learning_rate: f32,
    /// What gradients are multiplied with first.
    pub scale: f32,
}

/// A call of a layer below Burn's tensors.
pub struct Buffers<E: Engine> {
    pub(super) config: MemoryConfig,
    pub(super) tensors: PerWeight<Option<E::Tensor>>,
    /// `u` and `v`.
    pub(super) vectors: Option<[E::Tensor; 2]>,
    pub(super) shuffle: Option<E::Tensor>,
    /// `[tokens, hidden_size]`.
    pub(super) input: E::Tensor,
    /// Where the layer runs, if not where its caller's tensors are made.
    pub(super) stream: Option<Stream>,
}

/// The gradients of a call, all but the rows' in the input's type.
pub struct Gradients<E: Engine> {
    /// `[tokens, hidden_size]`.
    pub(super) input: E::Tensor,
    /// Of every weight but the tables; None where the layer does not have it.
    pub(super) tensors: PerWeight<Option<E::Tensor>>,
    pub(super) values: E::Rows,
    /// Where the layer weighs.
    pub(super) pre_values: Option<E::Rows>,
}

/// The sparse gradient of a backend's table.
pub(super) type Rows<B> = <<B as MemoryBackend>::Engine as Engine>::Rows;
/// The optimiser of a backend's sparse table.
pub(super) type Optimiser<B> = <<B as MemoryBackend>::Engine as Engine>::Optimiser;
