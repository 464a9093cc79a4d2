//! One training step of a model with memory layers, all of what such a model needs in its order, for the sum of the gradients of one or
//! several backward passes:
//!
//! 1. everything is checked: an error gives the model back as it was;
//! 2. the auxiliary loss's gradient is added to the cores' (the loss itself never enters the graph: it can't be forgotten);
//! 3. the whole gradient, sparse tables included, is clipped to a norm;
//! 4. every parameter takes an AdamW step, in f32 whatever its type; the value tables without weight decay, at a rate that falls from
//!    4 times the others' to theirs; of a sparse table, only the rows that were read;
//! 5. `u` and `v` follow the cores.

use std::{error, fmt};

use burn::{
    config::Config,
    module::{AutodiffModule, Param},
    optim::{AdamWConfig, GradientsAccumulator, GradientsParams, Optimizer, adaptor::OptimizerAdaptor},
    tensor::{Tensor, TensorData, backend::AutodiffBackend},
};
use ultramem_kernels::optimiser::{Rounding, Rule};

use super::adamw::FullAdamW;
use super::backend::MemoryBackend;
use super::engine::Step;
use super::gradients::{Ready, auxiliary, norm};
use super::model::{MemoryModel, read};
use super::module::{Core, Memory};
use super::sparse::{SparseTables, TableRecord};
use crate::{Error, Spectrum};

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

/// The optimiser of a model with memory layers, and its state. [`SparseTables`] tells what memory the sparse tables' takes.
pub struct Trainer<B: MemoryBackend + AutodiffBackend, M: AutodiffModule<B>> {
    config: TrainerConfig,
    weights: OptimizerAdaptor<FullAdamW, M, B>,
    values: OptimizerAdaptor<FullAdamW, M, B>,
    /// What [`accumulate`](Self::accumulate) has taken for the next step waits here and in `gradients`.
    tables: SparseTables<B>,
    gradients: GradientsAccumulator<M>,
    steps: usize,
}

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

/// Why a step was not made, and the model, as it was before.
#[derive(Debug)]
pub struct StepError<M> {
    /// The model.
    pub model: M,
    /// The reason.
    pub error: Error,
}

impl<M> fmt::Display for StepError<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<M: fmt::Debug> error::Error for StepError<M> {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        self.error.source()
    }
}

impl<M> From<StepError<M>> for Error {
    fn from(refused: StepError<M>) -> Self {
        refused.error
    }
}

/// The model after a step and what the step was like, or the model as it was and why there was no step.
pub type Stepped<M> = std::result::Result<(M, StepReport), StepError<M>>;

/// The state of a [`Trainer`]: steps, AdamW's for weights and for dense tables, and the sparse tables' optimisers.
pub type TrainerRecord<B, M> = (usize, AdamRecord<B, M>, AdamRecord<B, M>, Vec<TableRecord<B>>);
type AdamRecord<B, M> = <OptimizerAdaptor<FullAdamW, M, B> as Optimizer<M, B>>::Record;

impl<B: MemoryBackend + AutodiffBackend, M: MemoryModel<B>> Trainer<B, M>
where
    B::InnerBackend: MemoryBackend<Engine = B::Engine>,
{
    /// A trainer that has made no step. Sparse tables learn by lazy Adam.
    pub fn new(config: TrainerConfig) -> Self {
        let adam = AdamWConfig::new().with_beta_1(config.beta_1).with_beta_2(config.beta_2);
        let adam = adam.with_epsilon(config.epsilon);
        let (beta1, beta2, eps) = (config.beta_1, config.beta_2, config.epsilon);
        Self {
            weights: FullAdamW::init(&adam.clone().with_weight_decay(config.weight_decay)),
            values: FullAdamW::init(&adam.with_weight_decay(0.0)),
            tables: SparseTables::new(Rule::Adam { beta1, beta2, eps, weight_decay: 0.0, decoupled: true }),
            gradients: GradientsAccumulator::new(),
            steps: 0,
            config,
        }
    }

    /// The same with another rule for sparse tables. To be called before the first step.
    pub fn with_rule(self, rule: Rule) -> Self {
        Self { tables: SparseTables::new(rule), ..self }
    }

    /// The same with another rounding of sparse tables in half precision than the stochastic one. To be called before the first step, after
    /// [`with_rule`](Self::with_rule).
    pub fn with_rounding(self, rounding: Rounding) -> Self {
        Self { tables: self.tables.with_rounding(rounding), ..self }
    }

    /// Steps done.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// The factor that the value tables' learning rate has in the next step.
    pub fn value_factor(&self) -> f64 {
        value_factor(self.config.value_rate, self.steps, self.config.steps)
    }

    /// Takes the gradients of a loss for the next step, which adds up all that it was given: several backward passes, one step. A loss that
    /// is to be the mean of `n` is divided by `n` before its backward pass. Of a sparse table it keeps the sum over the rows that were
    /// read. Waits for nothing; no record holds what waits here.
    ///
    /// # Errors
    /// A memory layer that [`MemoryModel::memories`] leaves out or lists twice, or gradients whose sparse part is gone: another backward pass came
    /// before they were taken. Nothing is taken then, of no layer.
    pub fn accumulate(&mut self, model: &mut M, mut gradients: B::Gradients) -> crate::Result<()> {
        self.tables.take(model, &gradients)?;
        self.gradients.accumulate(model, GradientsParams::from_module(&mut gradients, model));
        Ok(())
    }

    /// Lets go of what [`accumulate`](Self::accumulate) has taken.
    pub fn discard(&mut self) {
        self.tables.discard();
        drop(self.gradients.grads());
    }

    /// One step with the gradients of a loss, and those that [`accumulate`](Self::accumulate) has taken before. Waits for the device, to read
    /// the gradient's norm and the cores.
    ///
    /// # Errors
    /// Those of [`accumulate`](Self::accumulate) and of [`apply`](Self::apply).
    pub fn step(&mut self, learning_rate: f64, mut model: M, gradients: B::Gradients) -> Stepped<M> {
        match self.accumulate(&mut model, gradients) {
            Ok(()) => self.apply(learning_rate, model),
            Err(error) => Err(StepError { model, error }),
        }
    }

    /// One step with the gradients that [`accumulate`](Self::accumulate) has taken. Waits for the device.
    ///
    /// # Errors
    /// A learning rate that is not finite, a rule whose state the device can't hold, a record of another table, or a device that failed. The
    /// model and the trainer are as they were then, and the gradients still wait: for another try, or for [`discard`](Self::discard).
    pub fn apply(&mut self, learning_rate: f64, mut model: M) -> Stepped<M> {
        let gradients = self.gradients.grads();
        let (report, more, scale) = match self.prepare(learning_rate, &mut model, &gradients) {
            Ok(prepared) => prepared,
            Err(error) => {
                self.gradients.accumulate(&model, gradients);
                return Err(StepError { model, error });
            }
        };
        if !report.done {
            self.tables.discard();
            return Ok((model, report));
        }
        let memories = model.memories();
        let cores: Vec<_> =
            memories.iter().filter_map(|memory| memory.core.as_ref()).map(|core| core.cores.id).collect();
        let of_tables = memories.into_iter().flat_map(Memory::tables_mut);
        let tables: Vec<_> = of_tables.map(|table| table.param.id).collect();
        let ready = |model: &M, takes: &dyn Fn(burn::module::ParamId) -> bool| {
            let mut ready = Ready { gradients: &gradients, more: &more, scale, found: GradientsParams::new(), takes };
            model.visit(&mut ready);
            ready.found
        };
        // The cores go first, for what follows them is read from the device, which can fail.
        let before = (self.weights.clone(), model.clone());
        let of_cores = ready(&model, &|id| cores.contains(&id));
        model = self.weights.step(learning_rate, model, of_cores);
        if let Err(error) = model.memories().into_iter().try_for_each(Memory::follow_cores) {
            let (weights, model) = before;
            self.weights = weights;
            self.gradients.accumulate(&model, gradients);
            return Err(StepError { model, error });
        }
        drop(before);
        let of_tables = ready(&model, &|id| tables.contains(&id));
        let of_others = ready(&model, &|id| !cores.contains(&id) && !tables.contains(&id));
        drop(gradients);
        let value_rate = learning_rate * self.value_factor();
        model = self.values.step(value_rate, model, of_tables);
        model = self.weights.step(learning_rate, model, of_others);
        if let Err(error) = self.tables.step(&mut model, value_rate, scale) {
            return Err(StepError { model, error });
        }
        self.steps += 1;
        Ok((model, report))
    }

    /// Checks all that a step can refuse, and gives what the step is like, the auxiliary loss's gradient, and the scale that clips.
    fn prepare(
        &mut self,
        learning_rate: f64,
        model: &mut M,
        gradients: &GradientsParams,
    ) -> crate::Result<(StepReport, GradientsParams, f32)> {
        check_rate(learning_rate)?;
        let (auxiliary_loss, more) = auxiliary(model, gradients, self.config.auxiliary)?;
        let gradient_norm = norm(model, gradients, &more, &self.tables)?;
        let done = gradient_norm.is_finite();
        let scale = if done { (self.config.clip / (gradient_norm + 1e-6)).min(1.0) } else { 1.0 };
        let learning_rate = (learning_rate * self.value_factor()) as f32;
        self.tables.check(model, Step { learning_rate, scale })?;
        Ok((StepReport { gradient_norm, auxiliary_loss, done }, more, scale))
    }

    /// The state, to be saved. It shares buffers with the trainer until the next step.
    pub fn to_record(&self) -> TrainerRecord<B, M> {
        (self.steps, self.weights.to_record(), self.values.to_record(), self.tables.to_record())
    }

    /// A trainer that goes on where the one that was saved stood. Gradients that wait are let go.
    ///
    /// # Errors
    /// [`Error::Record`] for the state of another rule. That of a table of another shape, or of no table of the model, is refused by the
    /// first step, before it changes anything.
    pub fn load_record(self, record: TrainerRecord<B, M>) -> crate::Result<Self> {
        let (steps, weights, values, tables) = record;
        Ok(Self {
            steps,
            weights: self.weights.load_record(weights),
            values: self.values.load_record(values),
            tables: self.tables.load_record(tables)?,
            gradients: GradientsAccumulator::new(),
            ..self
        })
    }
}

/// A rate that falls in `all` steps from `first` to 1.
pub(super) fn value_factor(first: f64, steps: usize, all: usize) -> f64 {
    let left = 1.0 - steps as f64 / all.max(1) as f64;
    1.0 + (first - 1.0) * left.max(0.0)
}

pub(super) fn check_rate(learning_rate: f64) -> crate::Result<()> {
    if learning_rate.is_finite() {
        return Ok(());
    }
    let value = learning_rate.to_string();
    Err(Error::Config { what: "learning rate", value, expected: "a finite number" })
}

impl<B: MemoryBackend> Memory<B> {
    /// Sets `u` and `v` to the leading singular vectors of the summed core. Waits for the device. [`Trainer`] and [`SparseOptimizer`](super::SparseOptimizer)
    /// do it; whoever changes the cores otherwise calls it afterwards.
    ///
    /// # Errors
    /// [`Error::Device`] if the device failed in what was enqueued before.
    pub fn follow_cores(&mut self) -> crate::Result<()> {
        let Some(Core { cores, u, v }) = &mut self.core else { return Ok(()) };
        let spectrum = Spectrum::new(&self.config, &read(cores.val())?)?;
        let (left, right) = spectrum.leading((&read(u.val())?, &read(v.val())?));
        for (param, numbers) in [(u, left), (v, right)] {
            let old = param.val();
            let new = Tensor::from_data(TensorData::new(numbers, old.dims()), &old.device());
            *param = Param::initialized(param.id, new);
        }
        Ok(())
    }
}
