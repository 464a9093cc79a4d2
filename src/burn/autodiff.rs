//! The layer as one node of the autodiff graph: forward saves slots, scores and pooled values, backward gives every parent its gradient.

use std::sync::Arc;

use burn::backend::{
    Autodiff,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
};
use burn::tensor::{
    DType, Device, Shape, TensorMetadata,
    backend::AutodiffBackend,
    ops::{FloatTensor, IntTensor},
};

use super::backend::{Buffer, Call, MemoryBackend};
use super::engine::Engine;
use super::pending::Pendings;
use crate::{MemoryConfig, Result, Weight};

/// The input, and every weight that a layer can have.
const PARENTS: usize = 1 + Weight::ALL.len();

/// Where a weight stands among the parents.
fn place(weight: Weight) -> usize {
    1 + weight as usize
}

/// A small weight: the leaf that stands for sparse tables is as large.
fn stand_in(config: &MemoryConfig) -> Weight {
    let small = [Weight::QueryNorm, Weight::QueryBias];
    small.into_iter().find(|weight| weight.is_in(config)).unwrap_or(Weight::QueryProj)
}

#[derive(Debug)]
struct MemoryNode;

/// What a call keeps for its backward pass.
#[derive(Debug)]
struct SavedCall<B: MemoryBackend> {
    config: MemoryConfig,
    trace: <B::Engine as Engine>::Trace,
    is_sparse: bool,
    /// Where the gradients of sparse tables go where the layer learns, and the leaf that stands for the tables in this call.
    sparse: Option<(Pendings, FloatTensor<Autodiff<B>>)>,
}

impl<B: MemoryBackend, C: CheckpointStrategy> MemoryBackend for Autodiff<B, C> {
    type Engine = B::Engine;

    fn float_buffer(tensor: FloatTensor<Self>) -> Buffer<B> {
        B::float_buffer(tensor.primitive)
    }

    fn int_buffer(tensor: IntTensor<Self>) -> Buffer<B> {
        B::int_buffer(tensor)
    }

    fn float_from_buffer(tensor: Buffer<B>) -> FloatTensor<Self> {
        Self::from_inner(B::float_from_buffer(tensor))
    }

    fn memory(call: Call<Self>) -> Result<FloatTensor<Self>> {
        // A tensor that nobody tracks stands for the weights that the layer does not have.
        let untracked = Self::from_inner(call.input.primitive.clone());
        let of = |weight: Weight| call.tensors[weight].as_ref().unwrap_or(&untracked);
        let mut parents = [&call.input; PARENTS];
        Weight::ALL.into_iter().for_each(|weight| parents[place(weight)] = of(weight));
        // A sparse table is no parameter of Burn's optimisers. Where the layer learns, a leaf stands for its tables in this call alone.
        let learns = parents[1..].iter().any(|tensor| tensor.is_tracked());
        let leaf = Self::from_inner(of(stand_in(&call.config)).primitive.clone());
        let leaf = call.pending.clone().filter(|_| learns).map(|pending| (pending, leaf.require_grad()));
        if let Some((_, leaf)) = &leaf {
            parents[place(Weight::Values)] = leaf;
        }
        let nodes = parents.map(|tensor| tensor.node.clone());
        let sparse = leaf.as_ref().map(|(pending, leaf)| (pending.clone(), known_by(leaf)));
        let is_sparse = call.pending.is_some();
        let empty = call.is_empty();
        let inner = inner(call);
        if empty {
            let output = inner.input.clone();
            return Ok(match Backward::<B, PARENTS>::prepare::<C>(EmptyNode, nodes).compute_bound().stateful() {
                OpsKind::Tracked(node) => node.finish(Arc::new(inner.saved_empty(sparse)), output),
                OpsKind::UnTracked(node) => node.finish(output),
            });
        }
        match Backward::<B, PARENTS>::prepare::<C>(MemoryNode, nodes).compute_bound().stateful() {
            OpsKind::Tracked(node) => {
                let config = inner.config.clone();
                let (output, trace) = B::Engine::forward_saving(inner.buffers())?;
                let saved = SavedCall::<B> { config, trace, is_sparse, sparse };
                Ok(node.finish(Arc::new(saved), B::float_from_buffer(output)))
            }
            OpsKind::UnTracked(node) => Ok(node.finish(B::memory(inner)?)),
        }
    }
}

impl<B: MemoryBackend> Backward<B, PARENTS> for MemoryNode {
    type State = Arc<SavedCall<B>>;

    /// # Panics
    /// If the device refuses a launch: Burn's backward pass has no error to give.
    fn backward(self, ops: Ops<Self::State, PARENTS>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad_output = B::float_buffer(grads.consume::<B>(&ops.node));
        let found = backward(&*ops.state, grad_output, grads);
        let found = found.unwrap_or_else(|error| panic!("memory layer, backward: {error}"));
        for (parent, gradient) in ops.parents.into_iter().zip(found) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                grads.register::<B>(parent.id, B::float_from_buffer(gradient));
            }
        }
    }
}

/// A call without a token: the gradient of every weight is zero, as that of Burn's own modules.
#[derive(Debug)]
struct EmptyNode;

/// What it keeps: of each parent, its shape, type and device; and what [`SavedCall`] keeps of a sparse table.
#[derive(Debug)]
struct SavedEmpty<B: MemoryBackend> {
    parents: [(Shape, DType, Device<B>); PARENTS],
    sparse: Option<(Pendings, FloatTensor<Autodiff<B>>)>,
    /// Whether there are pre-values.
    weighs: bool,
}

impl<B: MemoryBackend> Backward<B, PARENTS> for EmptyNode {
    type State = Arc<SavedEmpty<B>>;

    fn backward(self, ops: Ops<Self::State, PARENTS>, grads: &mut Gradients, _: &mut Checkpointer) {
        if let Some((pending, leaf)) = &ops.state.sparse {
            let mut put = pending.values.put::<B>(grads, leaf.clone(), None, 0);
            if ops.state.weighs {
                put = put.and_then(|()| pending.pre_values.put::<B>(grads, leaf.clone(), None, 0));
            }
            put.unwrap_or_else(|error| panic!("memory layer, backward: {error}"));
        }
        for (parent, (shape, dtype, device)) in ops.parents.into_iter().zip(ops.state.parents.clone()) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, B::float_zeros(shape, &device, dtype.into()));
            }
        }
    }
}

impl<B: MemoryBackend> Call<B> {
    fn saved_empty(&self, sparse: Option<(Pendings, FloatTensor<Autodiff<B>>)>) -> SavedEmpty<B> {
        let of = |weight: Weight| {
            let weight = if weight == Weight::Values && sparse.is_some() { stand_in(&self.config) } else { weight };
            self.tensors[weight].as_ref().unwrap_or(&self.input)
        };
        let mut parents = [&self.input; PARENTS];
        Weight::ALL.into_iter().for_each(|weight| parents[place(weight)] = of(weight));
        let parents = parents.map(|tensor| (tensor.shape(), tensor.dtype(), B::float_device(tensor)));
        SavedEmpty { parents, sparse, weighs: self.config.capabilities.weigh.is_some() }
    }
}

/// A leaf to ask gradients by, which does not keep the leaf's graph alive as the leaf itself would.
fn known_by<B: MemoryBackend>(leaf: &FloatTensor<Autodiff<B>>) -> FloatTensor<Autodiff<B>> {
    let mut known = leaf.clone();
    known.rc = Arc::new(*known.rc);
    known
}

/// The call one level below autodiff.
fn inner<B: MemoryBackend, C: CheckpointStrategy>(call: Call<Autodiff<B, C>>) -> Call<B> {
    Call {
        config: call.config,
        tensors: call.tensors.map(|tensor| tensor.map(|tensor| tensor.primitive)),
        vectors: call.vectors.map(|vectors| vectors.map(|tensor| tensor.primitive)),
        shuffle: call.shuffle,
        input: call.input.primitive,
        pending: None,
        stream: call.stream,
    }
}

/// A gradient for each parent, in the type of the layer; None where there is no such parent.
///
/// `pass`: what the backward pass has found so far.
fn backward<B: MemoryBackend>(
    kept: &SavedCall<B>,
    grad_output: Buffer<B>,
    pass: &Gradients,
) -> Result<[Option<Buffer<B>>; PARENTS]> {
    let SavedCall { config, trace, .. } = kept;
    let mut found = B::Engine::backward(trace, grad_output)?;
    let mut all = [const { None }; PARENTS];
    all[0] = Some(found.input);
    Weight::ALL.into_iter().for_each(|weight| all[place(weight)] = found.tensors[weight].take());
    match &kept.sparse {
        Some((pending, leaf)) => {
            let rows = config.table_rows();
            pending.values.put::<B>(pass, leaf.clone(), Some(found.values), rows)?;
            if let Some(pre_values) = found.pre_values {
                pending.pre_values.put::<B>(pass, leaf.clone(), Some(pre_values), rows)?;
            }
            // Any gradient: the leaf only tells through which backward pass the call has gone.
            all[place(Weight::Values)] = all[place(stand_in(config))].clone();
        }
        None if kept.is_sparse => {}
        None => {
            all[place(Weight::Values)] = Some(B::Engine::dense(trace, &found.values)?);
            let pre_values = found.pre_values.map(|found| B::Engine::dense(trace, &found));
            all[place(Weight::PreValues)] = pre_values.transpose()?;
        }
    }
    Ok(all)
}
