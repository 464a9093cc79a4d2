//! One training step of a model with memory layers, all of what such a model needs in its order, for the sum of the gradients of one or
//! several backward passes:
//!
//! 1. the auxiliary loss's gradient is added to the cores' (the loss itself never enters the graph: it can't be forgotten);
//! 2. the whole gradient, sparse tables included, is clipped to a norm;
//! 3. every parameter takes an AdamW step; the value tables without weight decay, at a rate that falls from 4 times the others' to
//!    theirs; of a sparse table, only the rows that were read;
//! 4. `u` and `v` follow the cores.

use std::collections::HashMap;

use burn::{
    config::Config,
    module::{AutodiffModule, ModuleVisitor, Param, ParamId},
    optim::{AdamW, AdamWConfig, GradientsAccumulator, GradientsParams, Optimizer, adaptor::OptimizerAdaptor},
    record::Record,
    tensor::{
        ElementConversion, Int, Tensor, TensorData, TensorPrimitive,
        backend::{AutodiffBackend, Backend},
    },
};
use burn_cubecl::tensor::CubeTensor;
use ultramem_kernels::optimiser::{Optimiser, Rule, Step};
use ultramem_kernels::{RowGradients, Tensor as DeviceTensor};

use super::backend::{MemoryBackend, like};
use super::module::{Core, Memory, primitive};
use crate::{Error, Spectrum};

/// A model with memory layers.
pub trait MemoryModel<B: MemoryBackend + AutodiffBackend>: AutodiffModule<B> {
    /// All memory layers of the model. [`Trainer::step`] refuses a list that leaves one out.
    fn memories(&mut self) -> Vec<&mut Memory<B>>;
}

/// How a model is trained.
#[derive(Config, Debug)]
pub struct TrainerConfig {
    /// Steps of the whole training, in which the values' rate falls.
    pub steps: usize,
    /// Decay of AdamW's first moment.
    #[config(default = 0.9)]
    pub beta_1: f32,
    /// Decay of AdamW's second moment.
    #[config(default = 0.95)]
    pub beta_2: f32,
    /// Added to AdamW's root.
    #[config(default = 1e-8)]
    pub epsilon: f32,
    /// Weight decay of everything but the value tables.
    #[config(default = 0.01)]
    pub weight_decay: f32,
    /// The norm that the gradient is clipped to.
    #[config(default = 1.0)]
    pub clip: f32,
    /// The value tables' learning rate in the first step, as a multiple of the others'. It falls to 1.
    #[config(default = 4.0)]
    pub value_rate: f64,
    /// Weight of the auxiliary loss.
    #[config(default = 0.001)]
    pub auxiliary: f64,
}

/// The optimiser of a model with memory layers, and its state.
pub struct Trainer<B: MemoryBackend + AutodiffBackend, M: AutodiffModule<B>> {
    config: TrainerConfig,
    rule: Rule,
    weights: OptimizerAdaptor<AdamW, M, B>,
    values: OptimizerAdaptor<AdamW, M, B>,
    tables: HashMap<ParamId, Optimiser<B::Runtime>>,
    /// What [`accumulate`](Self::accumulate) has taken for the next step, the sparse tables' in the model's order.
    gradients: GradientsAccumulator<M>,
    sparse: Vec<Sparse<B::Runtime>>,
    /// State from a record whose table has not been met yet.
    restored: Vec<TableRecord<B>>,
    steps: usize,
}

/// A sparse table and its gradient.
type Sparse<R> = (ParamId, RowGradients<R>);

/// What a step was like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// The gradient's norm before it was clipped.
    pub gradient_norm: f32,
    /// The auxiliary loss of all layers, before its weight.
    pub auxiliary_loss: f32,
    /// Whether the weights changed: they don't where the gradient is not finite.
    pub done: bool,
}

/// The state of a [`Trainer`]: steps, AdamW's for weights and for dense tables, and the sparse tables' optimisers.
pub type TrainerRecord<B, M> = (usize, AdamRecord<B, M>, AdamRecord<B, M>, Vec<TableRecord<B>>);
type AdamRecord<B, M> = <OptimizerAdaptor<AdamW, M, B> as Optimizer<M, B>>::Record;

/// The state of a sparse table's optimiser.
#[derive(Record, Clone, Debug)]
pub struct TableRecord<B: Backend> {
    /// The table.
    pub table: String,
    /// Its steps.
    pub steps: usize,
    /// Its tensors, flat, in the order of [`Optimiser::state`].
    pub state: Vec<Tensor<B, 1>>,
}

impl<B: MemoryBackend + AutodiffBackend, M: MemoryModel<B>> Trainer<B, M>
where
    B::InnerBackend: MemoryBackend<Runtime = B::Runtime>,
{
    /// A trainer that has made no step. Sparse tables learn by lazy Adam.
    pub fn new(config: TrainerConfig) -> Self {
        let adam = AdamWConfig::new().with_beta_1(config.beta_1).with_beta_2(config.beta_2);
        let adam = adam.with_epsilon(config.epsilon);
        let (beta1, beta2, eps) = (config.beta_1, config.beta_2, config.epsilon);
        Self {
            weights: adam.clone().with_weight_decay(config.weight_decay).init(),
            values: adam.with_weight_decay(0.0).init(),
            rule: Rule::Adam { beta1, beta2, eps, weight_decay: 0.0, decoupled: true },
            tables: HashMap::new(),
            gradients: GradientsAccumulator::new(),
            sparse: Vec::new(),
            restored: Vec::new(),
            steps: 0,
            config,
        }
    }

    /// The same with another rule for sparse tables. To be called before the first step.
    pub fn with_rule(self, rule: Rule) -> Self {
        Self { rule, ..self }
    }

    /// Steps done.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// The factor that the value tables' learning rate has in the next step.
    pub fn value_factor(&self) -> f64 {
        let left = 1.0 - self.steps as f64 / self.config.steps.max(1) as f64;
        1.0 + (self.config.value_rate - 1.0) * left.max(0.0)
    }

    /// Takes the gradients of a loss for the next step, which adds up all that it was given: several backward passes, one step. A loss that
    /// is to be the mean of `n` is divided by `n` before its backward pass. Of a sparse table it keeps the sum over the rows that were
    /// read. Waits for nothing; no record holds what waits here.
    ///
    /// # Errors
    /// A memory layer that [`MemoryModel::memories`] leaves out or lists twice, or gradients whose sparse part is gone: `accumulate` or `step`
    /// was called with those of another pass, later than theirs. Nothing is taken then.
    pub fn accumulate(&mut self, model: &mut M, mut gradients: B::Gradients) -> crate::Result<()> {
        self.check_list(model)?;
        let mut sparse = Vec::new();
        for memory in model.memories() {
            let Some(pending) = &memory.pending else { continue };
            let id = memory.values.id;
            let mut calls = pending.take::<B>(&gradients);
            if calls.is_empty() && memory.took_part(&gradients) {
                return Err(Error::Config {
                    what: "the sparse part of these gradients",
                    value: "gone with the gradients of another pass that a trainer was given first".to_string(),
                    expected: "there: give each pass's gradients to `accumulate` or `step` before the next backward pass",
                });
            }
            let before = self.sparse.iter().find(|(table, _)| *table == id).map(|(_, rows)| rows.clone());
            calls.splice(0..0, before);
            if !calls.is_empty() {
                let client = B::float_cube(primitive(memory.values.val())).client;
                sparse.push((id, RowGradients::sum(&client, &calls, memory.config.rows())?));
            }
        }
        self.sparse = sparse;
        self.gradients.accumulate(model, GradientsParams::from_module(&mut gradients, model));
        Ok(())
    }

    /// Whether [`MemoryModel::memories`] lists every layer of the model, and each once.
    fn check_list(&self, model: &mut M) -> crate::Result<()> {
        let mut found = Found::default();
        model.visit(&mut found);
        let mut listed: Vec<_> = model.memories().iter().map(|memory| memory.values.id).collect();
        let count = listed.len();
        listed.sort_unstable();
        listed.dedup();
        if listed.len() == count && found.memories == count {
            return Ok(());
        }
        Err(Error::Config {
            what: "number of memory layers that MemoryModel::memories lists",
            value: listed.len().to_string(),
            expected: "all of the model's, each once",
        })
    }

    /// One step with the gradients of a loss, and those that [`accumulate`](Self::accumulate) has taken before. Waits for the device, to read
    /// the gradient's norm and the cores.
    ///
    /// # Errors
    /// Those of [`accumulate`](Self::accumulate), or a rule whose state the device can't hold.
    pub fn step(
        &mut self,
        learning_rate: f64,
        mut model: M,
        gradients: B::Gradients,
    ) -> crate::Result<(M, StepReport)> {
        self.accumulate(&mut model, gradients)?;
        let mut gradients = self.gradients.grads();
        let sparse = std::mem::take(&mut self.sparse);
        let auxiliary_loss = self.add_auxiliary(&mut model, &mut gradients)?;
        let gradient_norm = norm(&model, &gradients, &sparse);
        if !gradient_norm.is_finite() {
            return Ok((model, StepReport { gradient_norm, auxiliary_loss, done: false }));
        }
        let scale = (self.config.clip / (gradient_norm + 1e-6)).min(1.0);
        if scale < 1.0 {
            model.visit(&mut Scale { gradients: &mut gradients, scale });
        }
        let value_rate = learning_rate * self.value_factor();
        let mut tables = GradientsParams::new();
        for memory in model.memories() {
            let id = memory.values.id;
            if let Some(gradient) = gradients.remove::<B::InnerBackend, 2>(id) {
                tables.register(id, gradient);
            }
        }
        model = self.values.step(value_rate, model, tables);
        model = self.weights.step(learning_rate, model, gradients);
        for memory in model.memories() {
            if let Some((_, gradient)) = sparse.iter().find(|(table, _)| *table == memory.values.id) {
                let mut step = Step::new(value_rate as f32);
                step.scale = scale;
                self.update(memory, gradient, &step)?;
            }
            memory.follow_cores()?;
        }
        self.steps += 1;
        Ok((model, StepReport { gradient_norm, auxiliary_loss, done: true }))
    }

    /// Adds the auxiliary loss's gradient to the cores' and gives the loss.
    fn add_auxiliary(&self, model: &mut M, gradients: &mut GradientsParams) -> crate::Result<f32> {
        let mut sum = 0.0;
        for memory in model.memories() {
            let Some(core) = &memory.core else { continue };
            let (loss, gradient) =
                Spectrum::new(&memory.config, &numbers(core.cores.val())?)?.auxiliary_loss(&memory.config);
            sum += loss;
            if let Some(cores) = gradients.remove::<B::InnerBackend, 4>(core.cores.id) {
                let gradient: Vec<f32> = gradient.iter().map(|g| (g * self.config.auxiliary) as f32).collect();
                let gradient = Tensor::from_data(TensorData::new(gradient, cores.dims()), &cores.device());
                gradients.register(core.cores.id, cores + gradient);
            }
        }
        Ok(sum as f32)
    }

    /// A sparse table's step, in place.
    fn update(
        &mut self,
        memory: &Memory<B>,
        gradient: &RowGradients<B::Runtime>,
        step: &Step<'_, B::Runtime>,
    ) -> crate::Result<()> {
        let table = B::float_cube(primitive(memory.values.val()));
        let id = memory.values.id;
        let client = table.client.clone();
        if !self.tables.contains_key(&id) {
            let (rows, width) = (memory.config.rows(), memory.config.value_dim);
            let mut optimiser = Optimiser::new(&client, self.rule, &[rows], width)?;
            if let Some(at) = self.restored.iter().position(|record| record.table == id.serialize()) {
                restore(&mut optimiser, self.restored.swap_remove(at))?;
            }
            self.tables.insert(id, optimiser);
        }
        let table = DeviceTensor::from(table);
        match self.tables.get_mut(&id) {
            Some(optimiser) => Ok(optimiser.step(&client, &[table], gradient, step)?),
            None => Ok(()),
        }
    }

    /// The state, to be saved before the next step.
    pub fn to_record(&self, model: &mut M) -> TrainerRecord<B, M> {
        let mut tables = self.restored.clone();
        for memory in model.memories() {
            if let Some(optimiser) = self.tables.get(&memory.values.id) {
                let table = B::float_cube(primitive(memory.values.val()));
                tables.push(table_record(memory.values.id, &table, optimiser));
            }
        }
        (self.steps, self.weights.to_record(), self.values.to_record(), tables)
    }

    /// A trainer that goes on where the one that was saved stood.
    pub fn load_record(self, record: TrainerRecord<B, M>) -> Self {
        let (steps, weights, values, restored) = record;
        Self {
            steps,
            weights: self.weights.load_record(weights),
            values: self.values.load_record(values),
            restored,
            tables: HashMap::new(),
            gradients: GradientsAccumulator::new(),
            sparse: Vec::new(),
            ..self
        }
    }
}

impl<B: MemoryBackend> Memory<B> {
    /// Sets `u` and `v` to the leading singular vectors of the summed core. Waits for the device. [`Trainer::step`] does it; whoever
    /// changes the cores otherwise calls it afterwards.
    ///
    /// # Errors
    /// [`Error::Device`] if the device failed in what was enqueued before.
    pub fn follow_cores(&mut self) -> crate::Result<()> {
        let Some(Core { cores, u, v, .. }) = &mut self.core else { return Ok(()) };
        let spectrum = Spectrum::new(&self.config, &numbers(cores.val())?)?;
        let (left, right) = spectrum.leading((&numbers(u.val())?, &numbers(v.val())?));
        for (param, numbers) in [(u, left), (v, right)] {
            let old = param.val();
            let new = Tensor::from_data(TensorData::new(numbers, old.dims()), &old.device());
            *param = Param::initialized(param.id, new);
        }
        Ok(())
    }
}

/// The numbers of a tensor on the host.
fn numbers<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> crate::Result<Vec<f32>> {
    let data = tensor.try_into_data().map_err(|error| Error::Device(error.to_string()))?;
    Ok(data.iter::<f32>().collect())
}

/// The norm of everything. Waits for the device.
fn norm<B: MemoryBackend + AutodiffBackend, M: MemoryModel<B>>(
    model: &M,
    gradients: &GradientsParams,
    sparse: &[Sparse<B::Runtime>],
) -> f32
where
    B::InnerBackend: MemoryBackend<Runtime = B::Runtime>,
{
    let mut squares = Squares::<B> { gradients, sum: None };
    model.visit(&mut squares);
    let device = model.devices().first().cloned().unwrap_or_default();
    let tables = sparse.iter().map(|(_, rows)| table_square::<B::InnerBackend>(rows, &device));
    let sum = squares.sum.into_iter().chain(tables).reduce(|a, b| a + b);
    sum.map_or(0.0, |sum| sum.sqrt().into_scalar().elem())
}

/// The sum of the squares of the listed rows: what lies behind them is undefined.
fn table_square<B: MemoryBackend>(rows: &RowGradients<B::Runtime>, device: &B::Device) -> Tensor<B, 1> {
    let some = B::float_cube(primitive(Tensor::<B, 1>::zeros([1], device)));
    let float = |tensor: &DeviceTensor<B::Runtime>, dtype| B::float_from_cube(like(&some, tensor.clone(), dtype));
    let gradients =
        Tensor::<B, 2>::from_primitive(TensorPrimitive::Float(float(rows.gradients(), burn::tensor::DType::F32)));
    let capacity = gradients.dims()[0] as i64;
    let count = some.client.clone();
    let count =
        count.read_one(rows.count().handle.clone()).map(|bytes| bytemuck::pod_read_unaligned::<u32>(&bytes[..4]));
    let unlisted = Tensor::<B, 1, Int>::arange(0..capacity, device).greater_equal_elem(count.unwrap_or(0) as i64);
    square_sum(gradients.mask_fill(unlisted.unsqueeze_dim(1), 0.0))
}

/// The sum of the squares, row by row and then of the rows: Burn's `sum` adds with atomics, in another order each time.
fn square_sum<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Tensor<B, 1> {
    let width = tensor.dims()[D - 1];
    let rows = tensor.shape().num_elements() / width.max(1);
    tensor.reshape([rows, width]).square().sum_dim(1).sum_dim(0).reshape([1])
}

/// Counts the memory layers that a model holds.
#[derive(Default)]
struct Found {
    memories: usize,
}

impl<B: Backend> ModuleVisitor<B> for Found {
    /// Comes with each field of a struct.
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.memories += usize::from((name, container_type) == ("values", "Struct:Memory"));
    }
}

struct Squares<'a, B: AutodiffBackend> {
    gradients: &'a GradientsParams,
    sum: Option<Tensor<B::InnerBackend, 1>>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Squares<'_, B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if let Some(gradient) = self.gradients.get::<B::InnerBackend, D>(param.id) {
            let square = square_sum(gradient);
            self.sum = Some(match self.sum.take() {
                Some(sum) => sum + square,
                None => square,
            });
        }
    }
}

struct Scale<'a> {
    gradients: &'a mut GradientsParams,
    scale: f32,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Scale<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if let Some(gradient) = self.gradients.remove::<B::InnerBackend, D>(param.id) {
            self.gradients.register(param.id, gradient.mul_scalar(self.scale));
        }
    }
}

/// A copy of the state, for steps update it in place.
fn table_record<B: MemoryBackend>(
    id: ParamId,
    table: &CubeTensor<B::Runtime>,
    optimiser: &Optimiser<B::Runtime>,
) -> TableRecord<B> {
    let tensor = |tensor: &DeviceTensor<B::Runtime>| {
        let count = tensor.shape().iter().product::<usize>();
        let flat = DeviceTensor::new_contiguous(vec![count], tensor.handle.clone(), tensor.dtype);
        let copy = like(table, flat, burn::tensor::DType::F32).copy();
        Tensor::from_primitive(TensorPrimitive::Float(B::float_from_cube(copy)))
    };
    let state = optimiser.state().into_iter().flat_map(|(_, pages)| pages).map(tensor).collect();
    TableRecord { table: id.serialize(), steps: optimiser.steps() as usize, state }
}

fn restore<B: MemoryBackend>(optimiser: &mut Optimiser<B::Runtime>, record: TableRecord<B>) -> crate::Result<()> {
    let own: Vec<_> =
        optimiser.state().into_iter().flat_map(|(_, pages)| pages).map(|page| page.shape().to_vec()).collect();
    let shaped = |(tensor, shape): (Tensor<B, 1>, Vec<usize>)| {
        let tensor = B::float_cube(primitive(tensor)).copy();
        DeviceTensor::new_contiguous(shape, tensor.handle, tensor.dtype.into())
    };
    // A Burn tensor is one buffer, so its table has one page.
    let state: Vec<_> = record.state.into_iter().zip(own).map(|pair| vec![shaped(pair)]).collect();
    Ok(optimiser.restore(record.steps as u32, &state)?)
}
