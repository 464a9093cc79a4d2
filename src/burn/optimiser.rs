//! An optimiser of Burn's for models with sparse tables: any other of Burn's for the rest, and [`SparseTables`] beside it.

use burn::{
    optim::{GradientsParams, MultiGradientsParams, Optimizer},
    tensor::backend::AutodiffBackend,
};
use ultramem_kernels::optimiser::{Rounding, Rule};

use super::backend::MemoryBackend;
use super::engine::Step;
use super::gradients::{Ready, auxiliary, norm};
use super::model::MemoryModel;
use super::module::Memory;
use super::sparse::{SparseTables, TableRecord};
use super::training::{StepError, check_rate, value_factor};
use crate::{Error, Result};

/// Any optimiser of Burn's, for a model with memory layers: it steps everything but the sparse tables, which learn by a rule of their own
/// beside it. It is itself one of Burn's, so that `burn-train`'s learner can train with it. In each step it does what
/// [`Trainer`](super::Trainer) does: the auxiliary loss's gradient, the clipping of the whole, and `u` and `v` that follow the cores.
///
/// It takes the sum of every backward pass that went through the layers since its last step, as a learner that accumulates gradients gives
/// them: passes whose other gradients are thrown away count, too.
///
/// Memory: that of [`SparseTables`]. A learner keeps its model while the optimiser makes the next one of a clone, and nothing of ours can change
/// that: each step copies the tables, as it does every other parameter. For a moment there are two of each, and a step reads and writes all bytes
/// of the tables once: 2 GiB moved for one of 1 GiB, some 0.7 ms at the 3 TB/s of a large GPU and 40 ms at 50 GB/s.
/// [`Trainer`](super::Trainer) updates in place.
///
/// # Panics
/// In `step`, which has no error to give, where [`Trainer::apply`](super::Trainer::apply) has one, and in `step_multi`, for gradients of several
/// devices.
#[derive(Clone)]
pub struct SparseOptimizer<B: MemoryBackend, O> {
    inner: O,
    tables: SparseTables<B>,
    /// The first factor of the tables' rate, and the steps in which it falls to 1.
    value_rate: (f64, usize),
    auxiliary: f64,
    clip: Option<f32>,
    steps: usize,
}

/// The state of a [`SparseOptimizer`]: its steps, the other optimiser's, and the sparse tables'.
pub type SparseOptimizerRecord<B, R> = (usize, R, Vec<TableRecord<B>>);

impl<B: MemoryBackend + AutodiffBackend, O> SparseOptimizer<B, O>
where
    B::InnerBackend: MemoryBackend<Engine = B::Engine>,
{
    /// `inner` for everything but the sparse tables of `model`, which learn by `rule` at the rate of the rest. From now on the gradients of all
    /// passes through its layers, and its clones', add up until a step of this optimiser or of a clone takes them.
    ///
    /// # Errors
    /// A memory layer that [`MemoryModel::memories`] leaves out or lists twice.
    pub fn new<M: MemoryModel<B>>(inner: O, rule: Rule, model: &mut M) -> Result<Self> {
        super::sparse::check_list(model)?;
        let tables = model.memories().into_iter().flat_map(Memory::tables_mut);
        tables.filter_map(|table| table.pending).for_each(|pending| pending.add_up());
        Ok(Self {
            inner,
            tables: SparseTables::new(rule),
            value_rate: (1.0, 1),
            auxiliary: 0.001,
            clip: None,
            steps: 0,
        })
    }

    /// The same with the sparse tables' rate at first `factor` times the rest's, falling to theirs in `steps` steps.
    pub fn with_value_rate(self, factor: f64, steps: usize) -> Self {
        Self { value_rate: (factor, steps), ..self }
    }

    /// The same with another weight of the auxiliary loss than 0.001.
    pub fn with_auxiliary(self, weight: f64) -> Self {
        Self { auxiliary: weight, ..self }
    }

    /// The same with the norm of the whole gradient, sparse tables included, clipped to `norm`.
    pub fn with_clip(self, norm: f32) -> Self {
        Self { clip: Some(norm), ..self }
    }

    /// The same with another rounding of tables in half precision than the stochastic one.
    pub fn with_rounding(self, rounding: Rounding) -> Self {
        Self { tables: self.tables.with_rounding(rounding), ..self }
    }

    /// The optimiser of the rest.
    pub fn inner(&self) -> &O {
        &self.inner
    }

    fn try_step<M: MemoryModel<B>>(
        &mut self,
        learning_rate: f64,
        mut model: M,
        gradients: &GradientsParams,
    ) -> std::result::Result<M, StepError<M>>
    where
        O: Optimizer<M, B>,
    {
        let (more, scale) = match self.prepare(learning_rate, &mut model, gradients) {
            Ok(prepared) => prepared,
            Err(error) => return Err(StepError { model, error }),
        };
        let mut ready = Ready { gradients, more: &more, scale, found: GradientsParams::new(), takes: &|_| true };
        model.visit(&mut ready);
        let rate = learning_rate * self.value_factor();
        model = self.inner.step(learning_rate, model, ready.found);
        let followed = model.memories().into_iter().try_for_each(Memory::follow_cores);
        match followed.and_then(|()| self.tables.step(&mut model, rate, scale)) {
            Ok(()) => {
                self.steps += 1;
                Ok(model)
            }
            Err(error) => Err(StepError { model, error }),
        }
    }

    /// Takes the tables' gradients and checks all that a step can refuse; gives the auxiliary loss's gradient and the scale that clips.
    fn prepare<M: MemoryModel<B>>(
        &mut self,
        learning_rate: f64,
        model: &mut M,
        gradients: &GradientsParams,
    ) -> Result<(GradientsParams, f32)> {
        check_rate(learning_rate)?;
        self.tables.take_sums(model)?;
        let (_, more) = auxiliary(model, gradients, self.auxiliary)?;
        let scale = match self.clip {
            Some(clip) => (clip / (norm(model, gradients, &more, &self.tables)? + 1e-6)).min(1.0),
            None => 1.0,
        };
        let learning_rate = (learning_rate * self.value_factor()) as f32;
        self.tables.check(model, Step { learning_rate, scale })?;
        Ok((more, scale))
    }

    fn value_factor(&self) -> f64 {
        value_factor(self.value_rate.0, self.steps, self.value_rate.1)
    }
}

impl<B, M, O> Optimizer<M, B> for SparseOptimizer<B, O>
where
    B: MemoryBackend + AutodiffBackend,
    B::InnerBackend: MemoryBackend<Engine = B::Engine>,
    M: MemoryModel<B>,
    O: Optimizer<M, B>,
{
    type Record = SparseOptimizerRecord<B, O::Record>;

    fn step(&mut self, lr: f64, module: M, grads: GradientsParams) -> M {
        self.try_step(lr, module, &grads).unwrap_or_else(|refused| panic!("memory layers, step: {}", refused.error))
    }

    fn step_multi(&mut self, lr: f64, module: M, mut grads: MultiGradientsParams) -> M {
        match (grads.grads.pop(), grads.grads.len()) {
            (Some((grads, _)), 0) => self.step(lr, module, grads),
            (None, _) => module,
            (_, others) => {
                let value = (others + 1).to_string();
                let what = "number of devices whose gradients one step is given";
                panic!(
                    "memory layers: {}",
                    Error::Config { what, value, expected: "1: a sparse table learns on one device" }
                )
            }
        }
    }

    fn to_record(&self) -> Self::Record {
        (self.steps, self.inner.to_record(), self.tables.to_record())
    }

    fn load_record(self, record: Self::Record) -> Self {
        let (steps, inner, tables) = record;
        Self { steps, inner: self.inner.load_record(inner), tables: self.tables.restore(tables), ..self }
    }
}
