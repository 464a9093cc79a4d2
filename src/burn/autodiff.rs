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
use super::pending::Pending;
use crate::Result;

/// Input, W_q, its norm, keys, their norm, cores, values, W_o, W_g.
const PARENTS: usize = 9;

#[derive(Debug)]
struct MemoryNode;

/// What a call keeps for its backward pass.
#[derive(Debug)]
struct Kept<B: MemoryBackend> {
    trace: Trace<B::Runtime>,
    is_sparse: bool,
    /// Where a sparse table's gradient goes where the layer learns, and the leaf that stands for the table in this call.
    sparse: Option<(Pending, FloatTensor<Autodiff<B>>)>,
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
        // Product keys have no cores, and only Memory+ has a gate; a tensor that nobody tracks stands in their place.
        let untracked = Self::from_inner(call.input.primitive.clone());
        let cores = call.core.as_ref().map_or(&untracked, |core| &core[0]);
        let gate = call.gate_proj.as_ref().unwrap_or(&untracked);
        let mut parents: [&FloatTensor<Self>; PARENTS] = [
            &call.input,
            &call.query_proj,
            &call.query_norm,
            &call.keys,
            &call.keys_norm,
            cores,
            &call.values,
            &call.values_proj,
            gate,
        ];
        // A sparse table is no parameter of Burn's optimisers. Where the layer learns, a leaf stands for the table in this call alone.
        let learns = parents[1..].iter().any(|tensor| tensor.is_tracked());
        let leaf = Self::from_inner(call.query_norm.primitive.clone());
        let leaf = call.pending.clone().filter(|_| learns).map(|pending| (pending, leaf.require_grad()));
        if let Some((_, leaf)) = &leaf {
            parents[6] = leaf;
        }
        let nodes = parents.map(|tensor| tensor.node.clone());
        let sparse = leaf.as_ref().map(|(pending, leaf)| (pending.clone(), known_by(leaf)));
        let is_sparse = call.pending.is_some();
        let empty = call.is_empty();
        let inner = inner(call);
        if empty {
            let output = inner.input.clone();
            return Ok(match Backward::<B, PARENTS>::prepare::<C>(EmptyNode, nodes).compute_bound().stateful() {
                OpsKind::Tracked(node) => node.finish(Arc::new(inner.kept_empty(sparse)), output),
                OpsKind::UnTracked(node) => node.finish(output),
            });
        }
        match Backward::<B, PARENTS>::prepare::<C>(MemoryNode, nodes).compute_bound().stateful() {
            OpsKind::Tracked(node) => {
                let (output, trace) = saving(inner)?;
                Ok(node.finish(Arc::new(Kept::<B> { trace, is_sparse, sparse }), output))
            }
            OpsKind::UnTracked(node) => Ok(node.finish(B::memory(inner)?)),
        }
    }
}

impl<B: MemoryBackend> Backward<B, PARENTS> for MemoryNode {
    type State = Arc<Kept<B>>;

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

/// What it keeps: of each parent, its shape, type and device; and what [`Kept`] keeps of a sparse table.
#[derive(Debug)]
struct KeptEmpty<B: MemoryBackend> {
    parents: [(Shape, DType, Device<B>); PARENTS],
    sparse: Option<(Pending, FloatTensor<Autodiff<B>>)>,
}

impl<B: MemoryBackend> Backward<B, PARENTS> for EmptyNode {
    type State = Arc<KeptEmpty<B>>;

    fn backward(self, ops: Ops<Self::State, PARENTS>, grads: &mut Gradients, _: &mut Checkpointer) {
        if let Some((pending, leaf)) = &ops.state.sparse {
            let client = B::float_cube(leaf.primitive.clone()).client;
            let put = pending.put::<B>(&client, grads, leaf.clone(), None, 0);
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
    fn kept_empty(&self, sparse: Option<(Pending, FloatTensor<Autodiff<B>>)>) -> KeptEmpty<B> {
        // The leaf that stands for a sparse table is as small as the norm.
        let values = if sparse.is_some() { &self.query_norm } else { &self.values };
        let cores = self.core.as_ref().map_or(&self.input, |core| &core[0]);
        let parents = [
            &self.input,
            &self.query_proj,
            &self.query_norm,
            &self.keys,
            &self.keys_norm,
            cores,
            values,
            &self.values_proj,
            self.gate_proj.as_ref().unwrap_or(&self.input),
        ];
        let parents = parents.map(|tensor| (tensor.shape(), tensor.dtype(), B::float_device(tensor)));
        KeptEmpty { parents, sparse }
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
        query_proj: call.query_proj.primitive,
        query_norm: call.query_norm.primitive,
        keys: call.keys.primitive,
        keys_norm: call.keys_norm.primitive,
        core: call.core.map(|core| core.map(|tensor| tensor.primitive)),
        shuffle: call.shuffle,
        values: call.values.primitive,
        values_proj: call.values_proj.primitive,
        gate_proj: call.gate_proj.map(|gate| gate.primitive),
        input: call.input.primitive,
        pending: None,
    }
}

/// The output and what the backward pass needs.
fn saving<B: MemoryBackend>(call: Call<B>) -> Result<(FloatTensor<B>, Trace<B::Runtime>)> {
    let (layer, input) = call.layer()?;
    let (forward, saved) = layer.forward_saving(&device_tensor(input.clone()))?;
    let output = like(&input, forward.output, input.dtype);
    Ok((B::float_from_cube(output), Trace { layer, input, saved }))
}

/// The gradients of a call, one for each parent.
type Found<R> = [Option<CubeTensor<R>>; PARENTS];

/// A gradient for each parent, in the type of the layer; None where there is no such parent.
///
/// `pass`: what the backward pass has found so far.
fn backward<B: MemoryBackend>(
    kept: &Kept<B>,
    grad_output: CubeTensor<B::Runtime>,
    pass: &Gradients,
) -> Result<Found<B::Runtime>> {
    let Trace { layer, input, saved } = &kept.trace;
    let (client, config) = (layer.client(), layer.config());
    let grad_output = device_tensor(contiguous(grad_output, input.dtype));
    let found = layer.backward(&device_tensor(input.clone()), saved, &grad_output)?;
    let own = |tensor| contiguous(like(input, tensor, DType::F32), input.dtype);
    let dense = |rows: &RowGradients<B::Runtime>, count| -> Result<CubeTensor<B::Runtime>> {
        Ok(own(rows.dense(client, count)?))
    };
    let mut keys = dense(&found.keys, config.heads * 2 * config.side_keys)?;
    let key_shape = [config.heads, 2, config.side_keys, config.key_dim, config.tucker_rank];
    keys = CubeTensor::new_contiguous(keys.client, keys.device, key_shape.into(), keys.handle, keys.dtype);
    let query_norm = own(found.query_norm);
    let values = match &kept.sparse {
        Some((pending, leaf)) => {
            pending.put::<B>(client, pass, leaf.clone(), Some(found.values), config.rows())?;
            // Any gradient: the leaf only tells through which backward pass the call has gone.
            Some(query_norm.clone())
        }
        None if kept.is_sparse => None,
        None => Some(dense(&found.values, config.rows())?),
    };
    Ok([
        Some(like(input, found.input, input.dtype)),
        Some(own(found.query_proj)),
        Some(query_norm),
        Some(keys),
        found.keys_norm.map(own),
        found.cores.map(own),
        values,
        Some(own(found.values_proj)),
        found.gate_proj.map(own),
    ])
}
