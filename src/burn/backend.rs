//! Burn's backends that our kernels run on: their tensors as CubeCL's and back, and the layer's call.

use std::fmt;

use burn::tensor::{
    DType, TensorMetadata,
    backend::Backend,
    ops::{FloatTensor, IntTensor},
};
use burn_cubecl::{
    BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement,
    kernel::{cast, into_contiguous},
    tensor::CubeTensor,
};
use cubecl::prelude::ComputeClient;

use ultramem_kernels::{Tensor, u32_storage};

use super::pending::Pendings;
use crate::{Error, LayerWeights, MemoryConfig, MemoryLayer, PerWeight, Result, Saved, Stream, ValueTable, Weight};

/// A backend that memory layers run on: every CubeCL backend of Burn, with and without fusion, with and without autodiff.
pub trait MemoryBackend: Backend {
    /// The CubeCL runtime below.
    type Runtime: CubeRuntime;

    /// The tensor as a buffer of the runtime, everything it waits for enqueued. Autodiff lets go of it.
    fn float_cube(tensor: FloatTensor<Self>) -> CubeTensor<Self::Runtime>;

    /// As [`float_cube`](Self::float_cube), for integers.
    fn int_cube(tensor: IntTensor<Self>) -> CubeTensor<Self::Runtime>;

    /// A buffer of the runtime as a tensor.
    fn float_from_cube(tensor: CubeTensor<Self::Runtime>) -> FloatTensor<Self>;

    /// The layer's output `[tokens, hidden_size]`.
    ///
    /// # Errors
    /// Shapes or types that do not fit the configuration.
    fn memory(call: Call<Self>) -> Result<FloatTensor<Self>> {
        if call.is_empty() {
            return Ok(call.input);
        }
        let output = call.run(|layer, input| {
            let output = layer.forward(&device_tensor(input.clone()))?.output;
            layer.submit_reads_of_others(&output)?;
            Ok(like(&input, output, input.dtype))
        })?;
        Ok(Self::float_from_cube(output))
    }
}

impl<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement> MemoryBackend for CubeBackend<R, F, I, BT> {
    type Runtime = R;

    fn float_cube(tensor: FloatTensor<Self>) -> CubeTensor<R> {
        tensor
    }

    fn int_cube(tensor: IntTensor<Self>) -> CubeTensor<R> {
        tensor
    }

    fn float_from_cube(tensor: CubeTensor<R>) -> FloatTensor<Self> {
        tensor
    }
}

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

/// A call whose tensors are buffers of the runtime, everything that they wait for enqueued.
struct Buffers<R: CubeRuntime> {
    config: MemoryConfig,
    tensors: PerWeight<Option<CubeTensor<R>>>,
    vectors: Option<[CubeTensor<R>; 2]>,
    shuffle: Option<CubeTensor<R>>,
    input: CubeTensor<R>,
}

impl<B: MemoryBackend> Call<B> {
    /// Whether there is no token. The output is as empty as the input then, and of its shape.
    pub(super) fn is_empty(&self) -> bool {
        self.input.shape().num_elements() == 0
    }

    /// What `run` makes of the layer and the input, in the call's stream. The caller keeps the tensors until it is waited for.
    pub(super) fn run<T>(
        self,
        run: impl FnOnce(MemoryLayer<B::Runtime>, CubeTensor<B::Runtime>) -> Result<T>,
    ) -> Result<T> {
        let buffers = Buffers {
            config: self.config,
            tensors: self.tensors.map(|tensor| tensor.map(B::float_cube)),
            vectors: self.vectors.map(|vectors| vectors.map(B::float_cube)),
            shuffle: self.shuffle.map(B::int_cube),
            input: B::float_cube(self.input),
        };
        let client = buffers.input.client.clone();
        let enqueue = || buffers.layer().and_then(|(layer, input)| run(layer, input));
        match self.stream {
            Some(stream) => stream.fork(&client, enqueue),
            None => enqueue(),
        }
    }

    /// The layer on the device.
    pub(super) fn layer(self) -> Result<MemoryLayer<B::Runtime>> {
        self.run(|layer, _| Ok(layer))
    }
}

impl<R: CubeRuntime> Buffers<R> {
    /// The layer on the device, and the input.
    fn layer(self) -> Result<(MemoryLayer<R>, CubeTensor<R>)> {
        let input = stored(self.input);
        let client = input.client.clone();
        let stored = |tensor| device_tensor(stored(tensor));
        let full = |tensor| device_tensor(contiguous(tensor, DType::F32));
        let mut own = self.tensors;
        let mut table =
            |weight: Weight| own[weight].take().map(|rows| ValueTable::from_device(stored(rows))).transpose();
        let (values, pre_values) = (table(Weight::Values)?, table(Weight::PreValues)?);
        let values =
            values.ok_or_else(|| Error::Tensor { name: Weight::Values.olmo().into(), problem: "is missing".into() })?;
        let mut of = |weight: Weight| own[weight].take().map(|it| if weight.is_full() { full(it) } else { stored(it) });
        let weights = LayerWeights {
            tensors: PerWeight::from_fn(&mut of),
            vectors: self.vectors.map(|[u, v]| (full(u), full(v))),
            shuffle: self.shuffle.map(indices).into_iter().collect(),
            values,
            pre_values,
        };
        Ok((MemoryLayer::from_device(&client, self.config, weights)?, input))
    }
}

/// The tensor in `dtype`, contiguous, as kernels take it. An allocator may pad the rows of whatever Burn makes, of what `cast` makes, too.
pub(super) fn contiguous<R: CubeRuntime>(tensor: CubeTensor<R>, dtype: DType) -> CubeTensor<R> {
    let tensor = into_contiguous(tensor);
    let shape = tensor.meta.shape().clone();
    let tensor = if tensor.dtype == dtype {
        tensor
    } else {
        // One dimension has no rows to pad.
        let count = [shape.num_elements()].into();
        cast(CubeTensor::new_contiguous(tensor.client, tensor.device, count, tensor.handle, tensor.dtype), dtype)
    };
    CubeTensor::new_contiguous(tensor.client, tensor.device, shape, tensor.handle, dtype)
}

/// The tensor in its own type, [`contiguous`].
pub(super) fn stored<R: CubeRuntime>(tensor: CubeTensor<R>) -> CubeTensor<R> {
    let dtype = tensor.dtype;
    contiguous(tensor, dtype)
}

/// Burn's tensor as the kernels take it.
pub(super) fn device_tensor<R: CubeRuntime>(tensor: CubeTensor<R>) -> Tensor<R> {
    let client = tensor.client.clone();
    Tensor::new(&client, tensor.into())
}

/// The shuffle as the kernels take it. Its numbers are below 2³¹, so that the bits of an i32 are a u32's.
fn indices<R: CubeRuntime>(tensor: CubeTensor<R>) -> Tensor<R> {
    let dtype = if tensor.dtype == DType::I32 { DType::I32 } else { DType::U32 };
    let tensor = contiguous(tensor, dtype);
    Tensor::new_contiguous(&tensor.client, tensor.meta.shape().to_vec(), tensor.handle, u32_storage())
}

/// What a kernel gave, contiguous, as Burn's tensor on the device of `other`.
pub(super) fn like<R: CubeRuntime>(other: &CubeTensor<R>, tensor: Tensor<R>, dtype: DType) -> CubeTensor<R> {
    on_device(&other.client, &other.device, tensor, dtype)
}

/// What a kernel gave, contiguous, as Burn's tensor on `device`, whose client is `client`.
pub(super) fn on_device<R: CubeRuntime>(
    client: &ComputeClient<R>,
    device: &R::CubeDevice,
    tensor: Tensor<R>,
    dtype: DType,
) -> CubeTensor<R> {
    let shape = tensor.shape().to_vec().into();
    CubeTensor::new_contiguous(client.clone(), device.clone(), shape, tensor.handle.clone(), dtype)
}

/// What the backward pass of a call needs.
pub(super) struct Trace<R: CubeRuntime> {
    pub(super) layer: MemoryLayer<R>,
    pub(super) input: CubeTensor<R>,
    pub(super) saved: Saved<R>,
}

impl<R: CubeRuntime> fmt::Debug for Trace<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trace").field("config", self.layer.config()).finish_non_exhaustive()
    }
}
