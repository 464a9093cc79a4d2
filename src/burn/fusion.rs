//! Backends with fusion: what is fused so far runs, and the layer goes on with its buffers.

use burn::tensor::{
    TensorMetadata,
    ops::{FloatTensor, IntTensor},
};
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement, tensor::CubeTensor};
use burn_fusion::{Fusion, NoOp, get_client, stream::OperationStreams};
use burn_ir::{BackendIr, InitOperationIr, OperationIr};

use super::{Kernels, MemoryBackend};

type Cube<R, F, I, BT> = CubeBackend<R, F, I, BT>;

impl<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement> MemoryBackend for Fusion<Cube<R, F, I, BT>> {
    type Engine = Kernels<R>;

    fn float_buffer(tensor: FloatTensor<Self>) -> CubeTensor<R> {
        tensor.client.clone().resolve_tensor_float::<Cube<R, F, I, BT>>(tensor)
    }

    fn int_buffer(tensor: IntTensor<Self>) -> CubeTensor<R> {
        tensor.client.clone().resolve_tensor_int::<Cube<R, F, I, BT>>(tensor)
    }

    fn float_from_buffer(tensor: CubeTensor<R>) -> FloatTensor<Self> {
        let client = get_client::<Cube<R, F, I, BT>>(&tensor.device);
        let (shape, dtype) = (tensor.shape(), tensor.dtype);
        let handle = Cube::<R, F, I, BT>::float_tensor_handle(tensor);
        let init = InitOperationIr::create(shape, dtype, || client.register_tensor_handle(handle));
        let made =
            client.register(OperationStreams::default(), OperationIr::Init(init), NoOp::<Cube<R, F, I, BT>>::new());
        made.into_iter().next().expect("an init operation has one output")
    }
}
