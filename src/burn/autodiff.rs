//! The layer as one node of the autodiff graph: forward saves slots and scores, backward gives every parent its gradient.

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
    DType,
    backend::AutodiffBackend,
    ops::{FloatTensor, IntTensor},
};
use burn_cubecl::{CubeRuntime, kernel::cast, tensor::CubeTensor};
use ultramem_kernels::{RowGradients, Tensor};

use super::backend::{Call, MemoryBackend, Trace, like};
use crate::Result;

/// Input, W_q, its norm, keys, their norm, cores, values, W_o.
const PARENTS: usize = 8;

#[derive(Debug)]
struct MemoryNode;

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
        // Product keys have no cores; a tensor that nobody tracks stands in their place.
        let untracked = Self::from_inner(call.input.primitive.clone());
        let cores = call.core.as_ref().map_or(&untracked, |core| &core[0]);
        let parents: [&FloatTensor<Self>; PARENTS] = [
            &call.input,
            &call.query_proj,
            &call.query_norm,
            &call.keys,
            &call.keys_norm,
            cores,
            &call.values,
            &call.values_proj,
        ];
        let nodes = parents.map(|tensor| tensor.node.clone());
        let inner = inner(call);
        match Backward::<B, PARENTS>::prepare::<C>(MemoryNode, nodes).compute_bound().stateful() {
            OpsKind::Tracked(node) => {
                let (output, trace) = saving(inner)?;
                Ok(node.finish(Arc::new(trace), output))
            }
            OpsKind::UnTracked(node) => Ok(node.finish(B::memory(inner)?)),
        }
    }
}

impl<B: MemoryBackend> Backward<B, PARENTS> for MemoryNode {
    type State = Arc<Trace<B::Runtime>>;

    /// # Panics
    /// If the device refuses a launch: Burn's backward pass has no error to give.
    fn backward(self, ops: Ops<Self::State, PARENTS>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad_output = B::float_cube(grads.consume::<B>(&ops.node));
        let found = backward(&ops.state, grad_output).unwrap_or_else(|error| panic!("memory layer, backward: {error}"));
        for (parent, gradient) in ops.parents.into_iter().zip(found) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                grads.register::<B>(parent.id, B::float_from_cube(gradient));
            }
        }
    }
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
        input: call.input.primitive,
        pending: call.pending,
    }
}

/// The output and what the backward pass needs.
fn saving<B: MemoryBackend>(call: Call<B>) -> Result<(FloatTensor<B>, Trace<B::Runtime>)> {
    let pending = call.pending.clone();
    let (layer, input) = call.layer()?;
    let (forward, saved) = layer.forward_saving(&Tensor::from(input.clone()))?;
    let output = like(&input, forward.output, input.dtype);
    Ok((B::float_from_cube(output), Trace { layer, input, saved, pending }))
}

/// A gradient for each parent, in the type of the layer; None where it went elsewhere or there is no such parent.
fn backward<R: CubeRuntime>(trace: &Trace<R>, grad_output: CubeTensor<R>) -> Result<[Option<CubeTensor<R>>; PARENTS]> {
    let Trace { layer, input, saved, pending } = trace;
    let (client, config) = (layer.client(), layer.config());
    let grad_output = Tensor::from(burn_cubecl::kernel::into_contiguous(grad_output));
    let found = layer.backward(&Tensor::from(input.clone()), saved, &grad_output)?;
    let own = |tensor| cast(like(input, tensor, DType::F32), input.dtype);
    let dense = |rows: &RowGradients<R>, count| -> Result<CubeTensor<R>> { Ok(own(rows.dense(client, count)?)) };
    let mut keys = dense(&found.keys, config.heads * 2 * config.side_keys)?;
    let key_shape = [config.heads, 2, config.side_keys, config.key_dim, config.tucker_rank];
    keys = CubeTensor::new_contiguous(keys.client, keys.device, key_shape.into(), keys.handle, keys.dtype);
    let values = match pending {
        Some(pending) => {
            pending.put(found.values);
            None
        }
        None => Some(dense(&found.values, config.rows())?),
    };
    Ok([
        Some(like(input, found.input, input.dtype)),
        Some(own(found.query_proj)),
        Some(own(found.query_norm)),
        Some(keys),
        found.keys_norm.map(own),
        found.cores.map(own),
        values,
        Some(own(found.values_proj)),
    ])
}
