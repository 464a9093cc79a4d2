//! Burn's CubeCL backends: the kernels on their buffers.

use std::{fmt, marker::PhantomData};

use burn::tensor::{
    DType, Shape,
    ops::{FloatTensor, IntTensor},
};
use burn_cubecl::{
    BoolElement, CubeBackend, CubeRuntime, FloatElement, IntElement,
    kernel::{cast, into_contiguous},
    tensor::CubeTensor,
};
use cubecl::prelude::ComputeClient;
use ultramem_kernels::optimiser::{self, Rounding, Rule};
use ultramem_kernels::{RowGradients, Tensor, u32_storage};

use super::MemoryBackend;
use super::engine::{Buffers, Engine, Gradients, Step, TableOptimiser};
use crate::{Error, LayerWeights, MemoryLayer, PerWeight, Result, Saved, Stream, ValueTable, Weight};

/// The kernels on a CubeCL runtime.
#[derive(Debug)]
pub struct Kernels<R>(PhantomData<fn() -> R>);

impl<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement> MemoryBackend for CubeBackend<R, F, I, BT> {
    type Engine = Kernels<R>;

    fn float_buffer(tensor: FloatTensor<Self>) -> CubeTensor<R> {
        tensor
    }

    fn int_buffer(tensor: IntTensor<Self>) -> CubeTensor<R> {
        tensor
    }

    fn float_from_buffer(tensor: CubeTensor<R>) -> FloatTensor<Self> {
        tensor
    }
}

impl<R: CubeRuntime> Engine for Kernels<R> {
    type Tensor = CubeTensor<R>;
    type Rows = RowGradients<R>;
    type Trace = Trace<R>;
    type Optimiser = Optimiser<R>;

    fn packed(tensor: CubeTensor<R>) -> CubeTensor<R> {
        let dtype = tensor.dtype;
        contiguous(tensor, dtype)
    }

    fn shaped(tensor: CubeTensor<R>, shape: Shape) -> CubeTensor<R> {
        CubeTensor::new_contiguous(tensor.client, tensor.device, shape, tensor.handle, tensor.dtype)
    }

    fn check_table(table: &CubeTensor<R>, shape: [usize; 2]) -> Result<()> {
        let table = device_tensor(table.clone());
        Ok(ultramem_kernels::check(table.client(), &table, "values", &shape, table.dtype)?)
    }

    fn join(stream: &Stream, tensor: &CubeTensor<R>) {
        stream.join(&tensor.client);
    }

    fn forward(call: Buffers<Self>) -> Result<CubeTensor<R>> {
        call.run(|layer, input| {
            let output = layer.forward(&device_tensor(input.clone()))?.output;
            layer.submit_reads_of_others(&output)?;
            Ok(like(&input, output, input.dtype))
        })
    }

    fn forward_saving(call: Buffers<Self>) -> Result<(CubeTensor<R>, Trace<R>)> {
        call.run(|layer, input| {
            let (forward, saved) = layer.forward_saving(&device_tensor(input.clone()))?;
            layer.submit_reads_of_others(&forward.output)?;
            let output = like(&input, forward.output, input.dtype);
            Ok((output, Trace { layer, input, saved }))
        })
    }

    fn backward(trace: &Trace<R>, grad_output: CubeTensor<R>) -> Result<Gradients<Self>> {
        let Trace { layer, input, saved } = trace;
        let config = layer.config();
        let grad_output = device_tensor(contiguous(grad_output, input.dtype));
        let found = layer.backward(&device_tensor(input.clone()), saved, &grad_output)?;
        let mut tensors = found.tensors.map(|tensor| tensor.map(|tensor| trace.in_type_of_input(tensor)));
        let keys = [config.heads, 2, config.side_keys, config.key_dim, config.tucker_rank];
        tensors[Weight::Keys] = Some(Self::shaped(Self::dense(trace, &found.keys)?, keys.into()));
        let input = like(input, found.input, input.dtype);
        Ok(Gradients { input, tensors, values: found.values, pre_values: found.pre_values })
    }

    fn dense(trace: &Trace<R>, rows: &RowGradients<R>) -> Result<CubeTensor<R>> {
        Ok(trace.in_type_of_input(rows.dense(trace.layer.client(), rows.table_rows())?))
    }

    fn sum(parts: &[RowGradients<R>], rows: usize) -> Result<RowGradients<R>> {
        let Some(first) = parts.first() else {
            return Err(ultramem_kernels::Error::Zero { what: "gradients to add up" }.into());
        };
        Ok(RowGradients::sum(first.gradients().client(), parts, rows)?)
    }

    fn listed(rows: &RowGradients<R>, other: &CubeTensor<R>) -> Result<(CubeTensor<R>, usize)> {
        let gradients = like(other, rows.gradients().clone(), DType::F32);
        let count = other.client.read_one(rows.count().handle.clone());
        let count = count.map_err(|error| Error::Device(format!("{error:?}").chars().take(300).collect()))?;
        let count = count.get(..4).map(bytemuck::pod_read_unaligned::<u32>);
        let count = count.ok_or_else(|| Error::Device("the number of used rows has no bytes".into()))?;
        Ok((gradients, count as usize))
    }
}

/// A table's optimiser, and where its state lives.
pub struct Optimiser<R: CubeRuntime> {
    optimiser: optimiser::Optimiser<R>,
    client: ComputeClient<R>,
    device: R::CubeDevice,
}

impl<R: CubeRuntime> Clone for Optimiser<R> {
    fn clone(&self) -> Self {
        Self { optimiser: self.optimiser.clone(), client: self.client.clone(), device: self.device.clone() }
    }
}

impl<R: CubeRuntime> Optimiser<R> {
    /// The state's tensors. Burn's is one buffer, so its table has one page.
    fn tensors(&self) -> Vec<&Tensor<R>> {
        self.optimiser.state().into_iter().flat_map(|(_, pages)| pages).collect()
    }
}

impl<R: CubeRuntime> TableOptimiser<Kernels<R>> for Optimiser<R> {
    fn new(table: &CubeTensor<R>, [rows, width]: [usize; 2], rule: Rule, rounding: Rounding) -> Result<Self> {
        let optimiser = optimiser::Optimiser::new(&table.client, rule, &[rows], width)?.with_rounding(rounding);
        Ok(Self { optimiser, client: table.client.clone(), device: table.device.clone() })
    }

    fn steps(&self) -> u64 {
        self.optimiser.steps()
    }

    fn tensors(&self) -> usize {
        self.tensors().len()
    }

    fn state(&self) -> Vec<CubeTensor<R>> {
        let flat = |tensor: &Tensor<R>| {
            let flat = tensor.reshaped(vec![tensor.shape().iter().product()]);
            on_device(&self.client, &self.device, flat, DType::F32)
        };
        self.tensors().into_iter().map(flat).collect()
    }

    fn restore(&mut self, steps: u64, state: Vec<CubeTensor<R>>) -> Result<()> {
        let own = self.tensors().into_iter().map(|tensor| tensor.shape().to_vec());
        let shaped = |(tensor, shape)| vec![device_tensor(tensor).reshaped(shape)];
        let state: Vec<_> = state.into_iter().zip(own).map(shaped).collect();
        Ok(self.optimiser.restore(steps, &state)?)
    }

    fn check(&self, table: &CubeTensor<R>, rows: &RowGradients<R>, step: Step) -> Result<()> {
        Ok(self.optimiser.check(&self.client, &[device_tensor(table.clone())], rows, &of_kernels(step))?)
    }

    fn step(&mut self, table: CubeTensor<R>, rows: &RowGradients<R>, step: Step) -> (CubeTensor<R>, Result<()>) {
        let (device, dtype) = (table.device.clone(), table.dtype);
        let mut pages = [device_tensor(table)];
        let done = self.optimiser.step(&self.client, &mut pages, rows, &of_kernels(step));
        let [table] = pages;
        (on_device(&self.client, &device, table, dtype), done.map_err(Error::from))
    }
}

fn of_kernels<R: CubeRuntime>(step: Step) -> optimiser::Step<'static, R> {
    optimiser::Step { scale: step.scale, ..optimiser::Step::new(step.learning_rate) }
}

impl<R: CubeRuntime> Buffers<Kernels<R>> {
    /// What `run` makes of the layer and the input, in the call's stream. The caller keeps the tensors until it is waited for.
    fn run<T>(mut self, run: impl FnOnce(MemoryLayer<R>, CubeTensor<R>) -> Result<T>) -> Result<T> {
        let (stream, client) = (self.stream.take(), self.input.client.clone());
        let enqueue = || self.layer().and_then(|(layer, input)| run(layer, input));
        match stream {
            Some(stream) => stream.fork(&client, enqueue),
            None => enqueue(),
        }
    }

    /// The layer on the device, and the input.
    pub(super) fn layer(self) -> Result<(MemoryLayer<R>, CubeTensor<R>)> {
        let input = Kernels::packed(self.input);
        let client = input.client.clone();
        let stored = |tensor| device_tensor(Kernels::packed(tensor));
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

/// What the backward pass of a call needs.
pub struct Trace<R: CubeRuntime> {
    layer: MemoryLayer<R>,
    input: CubeTensor<R>,
    saved: Saved<R>,
}

impl<R: CubeRuntime> fmt::Debug for Trace<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trace").field("config", self.layer.config()).finish_non_exhaustive()
    }
}

impl<R: CubeRuntime> Trace<R> {
    /// A gradient in f32 in the type of the layer.
    fn in_type_of_input(&self, gradient: Tensor<R>) -> CubeTensor<R> {
        contiguous(like(&self.input, gradient, DType::F32), self.input.dtype)
    }
}

/// The tensor in `dtype`, contiguous, as kernels take it. An allocator may pad the rows of whatever Burn makes, of what `cast` makes, too.
fn contiguous<R: CubeRuntime>(tensor: CubeTensor<R>, dtype: DType) -> CubeTensor<R> {
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

/// Burn's tensor as the kernels take it.
fn device_tensor<R: CubeRuntime>(tensor: CubeTensor<R>) -> Tensor<R> {
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
fn like<R: CubeRuntime>(other: &CubeTensor<R>, tensor: Tensor<R>, dtype: DType) -> CubeTensor<R> {
    on_device(&other.client, &other.device, tensor, dtype)
}

/// What a kernel gave, contiguous, as Burn's tensor on `device`, whose client is `client`.
fn on_device<R: CubeRuntime>(
    client: &ComputeClient<R>,
    device: &R::CubeDevice,
    tensor: Tensor<R>,
    dtype: DType,
) -> CubeTensor<R> {
    let shape = tensor.shape().to_vec().into();
    CubeTensor::new_contiguous(client.clone(), device.clone(), shape, tensor.handle.clone(), dtype)
}
