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
use burn_cubecl::tensor::CubeTensor;
use ultramem_kernels::RowGradients;

use super::backend::{Call, MemoryBackend, Trace, contiguous, device_tensor, like};
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
    trace: Trace<B::Runtime>,
    is_sparse: bool,
    /// Where the gradients of sparse tables go where the layer learns, and the leaf that stands for the tables in this call.
    sparse: Option<(Pendings, FloatTensor<Autodiff<B>>)>,
}

impl<B: MemoryBackend, C: CheckpointStrategy> MemoryBackend for Autodiff<B, C> {
    type Runtime = B::Runtime;

    fn float_cube(tensor: FloatTensor<Self>) -> CubeTensor<B::Runtime> {
        B::float_cube(tensor.primitive)
    }

    fn int_cube(tensor: IntTensor<Self>) -> CubeTensor<B::Runtime> {
        B::int_cube(tensor)
    }

    fn float_from_cube(tensor: CubeTensor<B::Runtime>) -> FloatTensor<Self> {
        Self::from_inner(B::float_from_cube(tensor))
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
                let (output, trace) = saving(inner)?;
                Ok(node.finish(Arc::new(SavedCall::<B> { trace, is_sparse, sparse }), output))
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
        let grad_output = B::float_cube(grads.consume::<B>(&ops.node));
        let found = backward(&*ops.state, grad_output, grads);
        let found = found.unwrap_or_else(|error| panic!("memory layer, backward: {error}"));
        for (parent, gradient) in ops.parents.into_iter().zip(found) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                grads.register::<B>(parent.id, B::float_from_cube(gradient));
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
            let client = B::float_cube(leaf.primitive.clone()).client;
            let mut put = pending.values.put::<B>(&client, grads, leaf.clone(), None, 0);
            if ops.state.weighs {
                put = put.and_then(|()| pending.pre_values.put::<B>(&client, grads, leaf.clone(), None, 0));
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

/// The output and what the backward pass needs.
fn saving<B: MemoryBackend>(call: Call<B>) -> Result<(FloatTensor<B>, Trace<B::Runtime>)> {
    let (output, trace) = call.run(|layer, input| {
        let (forward, saved) = layer.forward_saving(&device_tensor(input.clone()))?;
        layer.submit_reads_of_others(&forward.output)?;
        let output = like(&input, forward.output, input.dtype);
        Ok((output, Trace { layer, input, saved }))
    })?;
    Ok((B::float_from_cube(output), trace))
}

/// The gradients of a call, one for each parent.
type Found<R> = [Option<CubeTensor<R>>; PARENTS];

/// A gradient for each parent, in the type of the layer; None where there is no such parent.
///
/// `pass`: what the backward pass has found so far.
fn backward<B: MemoryBackend>(
    kept: &SavedCall<B>,
    grad_output: CubeTensor<B::Runtime>,
    pass: &Gradients,
) -> Result<Found<B::Runtime>> {
    let Trace { layer, input, saved } = &kept.trace;
    let (client, config) = (layer.client(), layer.config());
    let grad_output = device_tensor(contiguous(grad_output, input.dtype));
    let mut found = layer.backward(&device_tensor(input.clone()), saved, &grad_output)?;
    let own = |tensor| contiguous(like(input, tensor, DType::F32), input.dtype);
    let dense = |rows: &RowGradients<B::Runtime>, count| -> Result<CubeTensor<B::Runtime>> {
        Ok(own(rows.dense(client, count)?))
    };
    let mut all: Found<B::Runtime> = [const { None }; PARENTS];
    all[0] = Some(like(input, found.input, input.dtype));
    for weight in Weight::ALL {
        all[place(weight)] = found.tensors[weight].take().map(own);
    }
    let keys = dense(&found.keys, config.heads * 2 * config.side_keys)?;
    let key_shape = [config.heads, 2, config.side_keys, config.key_dim, config.tucker_rank];
    let keys = CubeTensor::new_contiguous(keys.client, keys.device, key_shape.into(), keys.handle, keys.dtype);
    all[place(Weight::Keys)] = Some(keys);
    let rows = config.table_rows();
    match &kept.sparse {
        Some((pending, leaf)) => {
            pending.values.put::<B>(client, pass, leaf.clone(), Some(found.values), rows)?;
            if let Some(pre_values) = found.pre_values {
                pending.pre_values.put::<B>(client, pass, leaf.clone(), Some(pre_values), rows)?;
            }
            // Any gradient: the leaf only tells through which backward pass the call has gone.
            all[place(Weight::Values)] = all[place(stand_in(config))].clone();
        }
        None if kept.is_sparse => {}
        None => {
            all[place(Weight::Values)] = Some(dense(&found.values, rows)?);
            all[place(Weight::PreValues)] = found.pre_values.map(|found| dense(&found, rows)).transpose()?;
        }
    }
    Ok(all)
}
