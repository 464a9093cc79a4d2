//! Burn's backend of the processor: the layer's native kernels on its tensors, where they lie.
//!
//! Weights and inputs are borrowed where they are contiguous, in f32 (tables and keys in f16 and bf16, too); what is not is copied in each call. A
//! table is updated in its own buffer where nobody else holds that, else in a copy.

use std::{borrow::Cow, fmt, sync::Arc};

use burn::tensor::{
    DType, Shape, TensorData, TensorMetadata,
    ops::{FloatTensor, IntTensor},
};
use burn_flex::{Flex, FlexTensor};
use ultramem_cpu::table::optimiser;
use ultramem_cpu::{Layer, Numbers, NumbersMut, RowGradients, Saved};
use ultramem_kernels::optimiser::{Rounding, Rule};

use super::MemoryBackend;
use super::engine::{Buffers, Engine, Gradients, Step, TableOptimiser};
use super::module::element_type;
use crate::cpu::{Borrowed, by_weight, dense, widened};
use crate::{PerWeight, Result, Stream, Weight};

/// The processor: each call is done when it returns.
#[derive(Debug)]
pub struct Processor;

impl MemoryBackend for Flex {
    type Engine = Processor;

    fn float_buffer(tensor: FloatTensor<Self>) -> FlexTensor {
        tensor
    }

    fn int_buffer(tensor: IntTensor<Self>) -> FlexTensor {
        tensor
    }

    fn float_from_buffer(tensor: FlexTensor) -> FloatTensor<Self> {
        tensor
    }
}

/// The sparse gradient of a table.
#[derive(Debug)]
pub struct TableGradients {
    gradients: RowGradients,
    table_rows: usize,
}

/// What the backward pass of a call needs.
pub struct Trace {
    call: Buffers<Processor>,
    saved: Saved,
}

impl fmt::Debug for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trace").field("config", &self.call.config).finish_non_exhaustive()
    }
}

impl Engine for Processor {
    type Tensor = FlexTensor;
    type Rows = Arc<TableGradients>;
    type Trace = Trace;
    type Optimiser = Optimiser;

    fn packed(tensor: FlexTensor) -> FlexTensor {
        if tensor.is_contiguous() { tensor } else { tensor.to_contiguous() }
    }

    fn shaped(tensor: FlexTensor, shape: Shape) -> FlexTensor {
        tensor.reshape(shape)
    }

    fn check_table(table: &FlexTensor, shape: [usize; 2]) -> Result<()> {
        let (tensor, found) = ("values", table.shape().to_vec());
        if found != shape {
            return Err(ultramem_kernels::Error::Shape { tensor, found, expected: shape.to_vec() }.into());
        }
        if !table.is_contiguous() {
            let strides = table.layout().strides().iter().map(|stride| stride.unsigned_abs()).collect();
            return Err(ultramem_kernels::Error::NotContiguous { tensor, shape: found, strides }.into());
        }
        numbers(tensor, table).map(drop)
    }

    fn join(_: &Stream, _: &FlexTensor) {}

    fn forward(call: Buffers<Self>) -> Result<FlexTensor> {
        let call = call.packed();
        let output = call.layer()?.forward(&call.input()?)?.output;
        Ok(call.like_input(output, call.input.shape()))
    }

    fn forward_saving(call: Buffers<Self>) -> Result<(FlexTensor, Trace)> {
        let call = call.packed();
        let (forward, saved) = call.layer()?.forward_saving(&call.input()?)?;
        Ok((call.like_input(forward.output, call.input.shape()), Trace { call, saved }))
    }

    fn backward(trace: &Trace, grad_output: FlexTensor) -> Result<Gradients<Self>> {
        let Trace { call, saved } = trace;
        let (config, grad_output) = (&call.config, Self::packed(grad_output));
        let grad_output = floats("the output's gradient", &grad_output)?;
        let mut found = call.layer()?.backward(&call.input()?, saved, &grad_output)?;
        let of_weights = by_weight(&found);
        let mut tensors = PerWeight::from_fn(|weight| {
            let weights = call.tensors[weight].as_ref().filter(|_| !of_weights[weight].is_empty());
            weights.map(|weights| call.like_input(of_weights[weight].to_vec(), weights.shape()))
        });
        let keys = dense(&found.keys, config.heads * 2 * config.side_keys);
        tensors[Weight::Keys] = call.tensors[Weight::Keys].as_ref().map(|own| call.like_input(keys, own.shape()));
        let table = |gradients| Arc::new(TableGradients { gradients, table_rows: config.table_rows() });
        Ok(Gradients {
            input: call.like_input(std::mem::take(&mut found.maps.input), call.input.shape()),
            tensors,
            values: table(found.values),
            pre_values: found.pre_values.map(table),
        })
    }

    fn dense(trace: &Trace, rows: &Arc<TableGradients>) -> Result<FlexTensor> {
        let shape = [rows.table_rows, rows.gradients.width];
        Ok(trace.call.like_input(dense(&rows.gradients, rows.table_rows), shape.into()))
    }

    fn sum(parts: &[Arc<TableGradients>], rows: usize) -> Result<Arc<TableGradients>> {
        for part in parts {
            let (value, expected) = (part.table_rows as u64, rows as u64);
            if value != expected {
                let what = "rows of a gradient's table";
                return Err(ultramem_kernels::Error::Number { what, value, expected }.into());
            }
        }
        if let [only] = parts {
            return Ok(only.clone());
        }
        let parts: Vec<_> = parts.iter().map(|part| &part.gradients).collect();
        Ok(Arc::new(TableGradients { gradients: RowGradients::sum(&parts)?, table_rows: rows }))
    }

    fn listed(rows: &Arc<TableGradients>, _: &FlexTensor) -> Result<(FlexTensor, usize)> {
        let RowGradients { rows, numbers, width } = &rows.gradients;
        let data = TensorData::new(numbers.clone(), [rows.len(), *width]);
        Ok((FlexTensor::from_data(data), rows.len()))
    }
}

impl Buffers<Processor> {
    /// The call with every tensor contiguous.
    fn packed(self) -> Self {
        Self {
            tensors: self.tensors.map(|tensor| tensor.map(Processor::packed)),
            vectors: self.vectors.map(|vectors| vectors.map(Processor::packed)),
            shuffle: self.shuffle.map(Processor::packed),
            input: Processor::packed(self.input),
            ..self
        }
    }

    /// The layer over the call's tensors.
    fn layer(&self) -> Result<Layer<'_>> {
        let mut tensors = PerWeight::default();
        for weight in Weight::ALL {
            let own = self.tensors[weight].as_ref();
            tensors[weight] = own.map(|tensor| numbers(weight.olmo(), tensor)).transpose()?;
        }
        let vectors = match &self.vectors {
            Some([u, v]) => [floats("u", u)?, floats("v", v)?],
            None => Default::default(),
        };
        Borrowed { tensors, vectors, shuffle: self.shuffle.as_ref().map(addresses) }.layer(&self.config)
    }

    fn input(&self) -> Result<Cow<'_, [f32]>> {
        floats("input", &self.input)
    }

    /// Numbers as a tensor of the input's type.
    fn like_input(&self, numbers: Vec<f32>, shape: Shape) -> FlexTensor {
        FlexTensor::from_data(TensorData::new(numbers, shape).convert_dtype(self.input.dtype()))
    }
}

/// The numbers of a contiguous tensor, where they lie.
fn numbers<'a>(name: &'static str, tensor: &'a FlexTensor) -> Result<Numbers<'a>> {
    let Some(dtype) = element_type(tensor.dtype()) else {
        let (found, expected) = (format!("{:?}", tensor.dtype()), "F32, F16 or BF16".into());
        return Err(ultramem_kernels::Error::Type { tensor: name, found, expected }.into());
    };
    Ok(Numbers::of_bytes(dtype, bytes(tensor)))
}

/// The same in f32.
fn floats<'a>(name: &'static str, tensor: &'a FlexTensor) -> Result<Cow<'a, [f32]>> {
    numbers(name, tensor).map(widened)
}

/// The bytes of a contiguous tensor.
fn bytes(tensor: &FlexTensor) -> &[u8] {
    let (start, end) = tensor.layout().contiguous_offsets().unwrap_or_default();
    let size = tensor.dtype().size();
    &tensor.bytes()[start * size..end * size]
}

/// The shuffle. Its numbers are below 2³¹, so that the bits of an i32 are a u32's.
fn addresses(tensor: &FlexTensor) -> Cow<'_, [u32]> {
    match (tensor.dtype(), bytemuck::try_cast_slice(bytes(tensor))) {
        (DType::I32 | DType::U32, Ok(numbers)) => Cow::Borrowed(numbers),
        _ => Cow::Owned(tensor.clone().into_data().iter::<u32>().collect()),
    }
}

/// A table's optimiser.
#[derive(Debug, Clone)]
pub struct Optimiser(Arc<optimiser::Optimiser>);

impl TableOptimiser<Processor> for Optimiser {
    fn new(_: &FlexTensor, [rows, width]: [usize; 2], rule: Rule, rounding: Rounding) -> Result<Self> {
        Ok(Self(Arc::new(optimiser::Optimiser::new(rule, rows, width)?.with_rounding(rounding))))
    }

    fn steps(&self) -> u64 {
        self.0.steps()
    }

    fn tensors(&self) -> usize {
        self.0.state().len()
    }

    fn state(&self) -> Vec<FlexTensor> {
        let flat = |numbers: &[f32]| FlexTensor::from_data(TensorData::new(numbers.to_vec(), [numbers.len()]));
        self.0.state().into_iter().map(|(_, numbers)| flat(numbers)).collect()
    }

    fn restore(&mut self, steps: u64, state: Vec<FlexTensor>) -> Result<()> {
        let numbers = |tensor| floats("optimiser's state", &Processor::packed(tensor)).map(Cow::into_owned);
        let state = state.into_iter().map(numbers).collect::<Result<_>>()?;
        Ok(Arc::make_mut(&mut self.0).restore(steps, state)?)
    }

    fn check(&self, table: &FlexTensor, rows: &Arc<TableGradients>, step: Step) -> Result<()> {
        Ok(self.0.check(numbers("values", table)?.len(), &rows.gradients, &of_processor(step))?)
    }

    fn step(&mut self, mut table: FlexTensor, rows: &Arc<TableGradients>, step: Step) -> (FlexTensor, Result<()>) {
        let done = self.check(&table, rows, step).and_then(|()| {
            tell_of_copy(&table);
            let own = Arc::make_mut(&mut self.0);
            Ok(own.step(numbers_mut(&mut table)?, &rows.gradients, &of_processor(step))?)
        });
        (table, done)
    }
}

fn of_processor(step: Step) -> optimiser::Step<'static> {
    optimiser::Step { scale: step.scale, ..optimiser::Step::new(step.learning_rate) }
}

/// Says that a table is not updated in place.
fn tell_of_copy(table: &FlexTensor) {
    if !table.is_unique() {
        let bytes = table.bytes().len();
        tracing::debug!(bytes, "a shared buffer is copied before its update");
    }
}

/// The numbers of a contiguous tensor, to be changed: in a copy of their own where somebody else holds them.
fn numbers_mut(tensor: &mut FlexTensor) -> Result<NumbersMut<'_>> {
    let (start, end) = tensor.layout().contiguous_offsets().unwrap_or_default();
    match tensor.dtype() {
        DType::F32 => Ok(NumbersMut::F32(&mut tensor.storage_mut()[start..end])),
        DType::F16 => Ok(NumbersMut::F16(&mut tensor.storage_mut()[start..end])),
        DType::BF16 => Ok(NumbersMut::BF16(&mut tensor.storage_mut()[start..end])),
        other => {
            let (tensor, found, expected) = ("values", format!("{other:?}"), "F32, F16 or BF16".into());
            Err(ultramem_kernels::Error::Type { tensor, found, expected }.into())
        }
    }
}
