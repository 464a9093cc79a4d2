//! The sparse tables of a model and their optimisers, beside whatever trains the rest.

use std::collections::HashMap;

use burn::{
    module::{Param, ParamId},
    record::Record,
    tensor::{
        Int, Tensor,
        backend::{AutodiffBackend, Backend},
    },
};
use ultramem_kernels::optimiser::{Rounding, Rule};

use super::backend::{Buffer, MemoryBackend};
use super::engine::{Engine, Optimiser, Rows, Step, TableOptimiser};
use super::full::FullTensor;
use super::model::{MemoryModel, read, square_sum};
use super::module::{Memory, TableMut, from_buffer, primitive};
use super::pending::{Found, Pending, wrong_list};
use crate::{Error, Result};

/// The optimisers of a model's sparse tables: [`take`](Self::take) after each backward pass, then [`norm`](Self::norm) where the gradient is
/// clipped, and [`step`](Self::step). Whatever optimiser trains the other parameters runs beside it; it leaves a sparse table alone, whose
/// gradient it never sees. Where it changes the cores of an [`UltraMem`](super::UltraMem), call [`Memory::follow_cores`] then.
///
/// Memory: of each table, the state of the rule (f32, of the table's shape: twice for Adam, once for SGD with momentum; a number a row for
/// Adagrad), and the gradients that wait, at most a table's size in f32. A clone shares the states until one of the two makes a step.
pub struct SparseTables<B: MemoryBackend> {
    rule: Rule,
    rounding: Rounding,
    tables: HashMap<ParamId, Table<B>>,
    /// In the model's order.
    waiting: Vec<(ParamId, Rows<B>)>,
    /// State from a record whose table has not been met yet.
    restored: Vec<TableRecord<B>>,
}

/// A table's optimiser.
struct Table<B: MemoryBackend> {
    optimiser: Optimiser<B>,
    rows: usize,
    width: usize,
}

/// The state of a sparse table's optimiser.
#[derive(Record, Clone, Debug)]
pub struct TableRecord<B: Backend> {
    /// The table: its parameter's id.
    pub table: String,
    /// [`Rule::name`] of the rule that the state belongs to.
    pub rule: String,
    /// Rows of the table.
    pub rows: usize,
    /// Numbers of a row.
    pub width: usize,
    /// Its steps.
    pub steps: u64,
    /// Its tensors, flat, in the order of [`state`](ultramem_kernels::optimiser::Optimiser::state).
    pub state: Vec<FullTensor<B, 1>>,
}

impl<B: MemoryBackend> Clone for Table<B> {
    fn clone(&self) -> Self {
        Self { optimiser: self.optimiser.clone(), rows: self.rows, width: self.width }
    }
}

impl<B: MemoryBackend> Clone for SparseTables<B> {
    fn clone(&self) -> Self {
        Self {
            rule: self.rule,
            rounding: self.rounding,
            tables: self.tables.clone(),
            waiting: self.waiting.clone(),
            restored: self.restored.clone(),
        }
    }
}

impl<B: MemoryBackend> SparseTables<B> {
    /// Tables that have made no step, which all learn by `rule`. Tables in half precision are rounded stochastically.
    pub fn new(rule: Rule) -> Self {
        Self { rule, rounding: Rounding::default(), tables: HashMap::new(), waiting: Vec::new(), restored: Vec::new() }
    }

    /// The same with another rounding of tables in half precision. To be called before the first step.
    pub fn with_rounding(self, rounding: Rounding) -> Self {
        Self { rounding, ..self }
    }

    /// The rule of all tables.
    pub fn rule(&self) -> Rule {
        self.rule
    }

    /// Lets go of the gradients that wait.
    pub fn discard(&mut self) {
        self.waiting.clear();
    }

    /// The state, to be saved: shared with the tables until their next step.
    pub fn to_record(&self) -> Vec<TableRecord<B>> {
        let records = self.tables.iter().map(|(id, table)| table.record(*id, self.rule));
        let mut records: Vec<_> = self.restored.iter().cloned().chain(records).collect();
        records.sort_by(|a, b| a.table.cmp(&b.table));
        records
    }

    /// Tables that go on where those that were saved stood. Gradients that wait are let go.
    ///
    /// # Errors
    /// [`Error::Record`] for the state of another rule. That of a table of another shape, or of no table of the model, is refused by the
    /// first step, before it changes anything.
    pub fn load_record(self, record: Vec<TableRecord<B>>) -> Result<Self> {
        let tables = Self { restored: record, tables: HashMap::new(), waiting: Vec::new(), ..self };
        tables.check_rules().map(|()| tables)
    }

    /// [`load_record`](Self::load_record), whose refusal comes with the first step.
    pub(super) fn restore(self, record: Vec<TableRecord<B>>) -> Self {
        Self { restored: record, tables: HashMap::new(), waiting: Vec::new(), ..self }
    }

    fn check_rules(&self) -> Result<()> {
        let rule = self.rule.name();
        match self.restored.iter().find(|record| record.rule != rule) {
            Some(record) => Err(record.refused("rule", &record.rule, rule)),
            None => Ok(()),
        }
    }
}

impl<B: MemoryBackend + AutodiffBackend> SparseTables<B>
where
    B::InnerBackend: MemoryBackend<Engine = B::Engine>,
{
    /// Takes what a backward pass has found of the sparse tables, for the next step; several passes add up.
    ///
    /// # Errors
    /// A memory layer that [`MemoryModel::memories`] leaves out or lists twice, gradients whose sparse part is gone: another backward pass came
    /// before they were taken, or a table that is not contiguous. Nothing is taken then, of no table.
    pub fn take<M: MemoryModel<B>>(&mut self, model: &mut M, gradients: &B::Gradients) -> Result<()> {
        check_list(model)?;
        let mut waiting = Vec::new();
        for memory in model.memories() {
            let took_part = memory.took_part(gradients);
            for table in memory.tables_mut() {
                let Some(pending) = table.pending else { continue };
                table.check()?;
                let found = pending.through::<B>(gradients);
                if found.is_none() && took_part {
                    return Err(Error::Config {
                        what: "the sparse part of these gradients",
                        value: "gone: it was taken, or another backward pass has replaced it".to_string(),
                        expected: "there: give each pass's gradients to `accumulate`, `step` or `take` before the next backward pass",
                    });
                }
                waiting.extend(self.with_waiting(&table, found.flatten())?);
            }
        }
        for table in model.memories().into_iter().flat_map(Memory::tables_mut) {
            let taken = table.pending.into_iter().filter(|pending| pending.through::<B>(gradients).is_some());
            taken.for_each(|pending| pending.clear());
        }
        self.waiting = waiting;
        Ok(())
    }

    /// [`take`](Self::take), of what adds up in the layers: every pass since the last step.
    pub(super) fn take_sums<M: MemoryModel<B>>(&mut self, model: &mut M) -> Result<()> {
        check_list(model)?;
        let mut waiting = Vec::new();
        for table in model.memories().into_iter().flat_map(Memory::tables_mut) {
            let Some(pending) = table.pending else { continue };
            table.check()?;
            waiting.extend(self.with_waiting(&table, pending.sum::<B>())?);
        }
        for table in model.memories().into_iter().flat_map(Memory::tables_mut) {
            table.pending.into_iter().for_each(Pending::clear);
        }
        self.waiting = waiting;
        Ok(())
    }

    /// The sum of what was found for a table and of what waits for it already.
    fn with_waiting(&self, table: &TableMut<'_, B>, found: Option<Rows<B>>) -> Result<Option<(ParamId, Rows<B>)>> {
        let id = table.param.id;
        let before = self.waiting.iter().find(|(table, _)| *table == id).map(|(_, rows)| rows.clone());
        let parts: Vec<_> = before.into_iter().chain(found).collect();
        if parts.is_empty() {
            return Ok(None);
        }
        Ok(Some((id, B::Engine::sum(&parts, table.rows)?)))
    }

    /// The norm of the gradients that wait. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Device`] if the device failed in what was enqueued before.
    pub fn norm<M: MemoryModel<B>>(&self, model: &M) -> Result<f32> {
        let sum = self.squares(model)?.into_iter().reduce(|a, b| a + b);
        Ok(sum.map(|sum| read(sum.sqrt())).transpose()?.and_then(|norm| norm.first().copied()).unwrap_or(0.0))
    }

    /// The sum of squares of each gradient that waits.
    pub(super) fn squares<M: MemoryModel<B>>(&self, model: &M) -> Result<Vec<Tensor<B::InnerBackend, 1>>> {
        let device = model.devices().first().cloned().unwrap_or_default();
        self.waiting.iter().map(|(_, rows)| table_square::<B::InnerBackend>(rows, &device)).collect()
    }

    /// Updates the rows that were read by the gradients that wait, each multiplied with `scale`, and lets go of them. A table that somebody else
    /// holds, a clone of the model for instance, is copied first, once.
    ///
    /// # Errors
    /// A list of layers that is not the model's, a record of another shape or table, or numbers and sizes that don't fit: the model is as it was
    /// then, and the gradients still wait.
    pub fn step<M: MemoryModel<B>>(&mut self, model: &mut M, learning_rate: f64, scale: f32) -> Result<()> {
        let step = Step { learning_rate: learning_rate as f32, scale };
        self.check(model, step)?;
        for table in model.memories().into_iter().flat_map(Memory::tables_mut) {
            let id = table.param.id;
            let Some(at) = self.waiting.iter().position(|(of, _)| *of == id) else { continue };
            let Some(state) = self.tables.get_mut(&id) else { continue };
            table.update(&mut state.optimiser, &self.waiting[at].1, step)?;
            self.waiting.remove(at);
        }
        self.waiting.clear();
        Ok(())
    }

    /// Checks all that [`step`](Self::step) can refuse, and makes the optimisers that it needs.
    pub(super) fn check<M: MemoryModel<B>>(&mut self, model: &mut M, step: Step) -> Result<()> {
        check_list(model)?;
        self.check_rules()?;
        let tables: Vec<_> = model.memories().into_iter().flat_map(Memory::tables_mut).collect();
        for record in &self.restored {
            let table = tables.iter().find(|table| table.param.id.serialize() == record.table);
            let Some(table) = table else { return Err(record.refused("table", "of no layer of the model", "one")) };
            for (what, found, expected) in [("rows", record.rows, table.rows), ("width", record.width, table.width)] {
                if found != expected {
                    return Err(record.refused(what, &found.to_string(), &expected.to_string()));
                }
            }
        }
        for of_model in tables {
            let id = of_model.param.id;
            let Some((_, gradient)) = self.waiting.iter().find(|(table, _)| *table == id) else { continue };
            let table = B::float_buffer(primitive(of_model.param.val()));
            if !self.tables.contains_key(&id) {
                let record = self.restored.iter().position(|record| record.table == id.serialize());
                let state = record.map(|at| self.restored[at].clone());
                let made = Table::new(&table, &of_model, self.rule, self.rounding, state)?;
                self.tables.insert(id, made);
                record.map(|at| self.restored.swap_remove(at));
            }
            let Some(state) = self.tables.get(&id) else { continue };
            state.optimiser.check(&table, gradient, step)?;
        }
        Ok(())
    }
}

impl<B: Backend> TableRecord<B> {
    fn refused(&self, what: &'static str, found: &str, expected: &str) -> Error {
        Error::Record { table: self.table.clone(), what, found: found.into(), expected: expected.into() }
    }
}

impl<B: MemoryBackend> Table<B> {
    fn new(
        table: &Buffer<B>,
        of_model: &TableMut<'_, B>,
        rule: Rule,
        rounding: Rounding,
        record: Option<TableRecord<B>>,
    ) -> Result<Self> {
        let (rows, width) = (of_model.rows, of_model.width);
        let mut optimiser = Optimiser::<B>::new(table, [rows, width], rule, rounding)?;
        if let Some(record) = record {
            let (found, expected) = (record.state.len(), optimiser.tensors());
            if found != expected {
                return Err(record.refused("tensors", &found.to_string(), &expected.to_string()));
            }
            let state = record.state.into_iter().map(|tensor| B::float_buffer(primitive(tensor.0))).collect();
            optimiser.restore(record.steps, state)?;
        }
        Ok(Self { optimiser, rows, width })
    }

    fn record(&self, id: ParamId, rule: Rule) -> TableRecord<B> {
        TableRecord {
            table: id.serialize(),
            rule: rule.name().into(),
            rows: self.rows,
            width: self.width,
            steps: self.optimiser.steps(),
            state: self.optimiser.state().into_iter().map(|tensor| FullTensor(from_buffer(tensor))).collect(),
        }
    }
}

impl<B: MemoryBackend> TableMut<'_, B> {
    /// A sparse table's step: in place, for the parameter gives its tensor away meanwhile and only what others hold is copied.
    fn update(self, optimiser: &mut Optimiser<B>, gradient: &Rows<B>, step: Step) -> Result<()> {
        let device = self.param.val().device();
        let nothing = |device: &B::Device, _| Tensor::zeros([1, 1], device);
        let nothing = Param::uninitialized(self.param.id, nothing, device, false, [1, 1].into());
        let (id, values, mapper) = std::mem::replace(self.param, nothing).consume();
        let (values, done) = optimiser.step(B::float_buffer(primitive(values)), gradient, step);
        *self.param = Param::from_mapped_value(id, from_buffer(values), mapper);
        done
    }
}

/// Whether [`MemoryModel::memories`] lists every layer of the model, and each once.
pub(super) fn check_list<B: MemoryBackend + AutodiffBackend, M: MemoryModel<B>>(model: &mut M) -> Result<()> {
    let mut found = Found::default();
    model.visit(&mut found);
    let mut listed: Vec<_> = model.memories().iter().map(|memory| memory.id()).collect();
    let count = listed.len();
    listed.sort_unstable();
    listed.dedup();
    if listed.len() == count && found.memories == count { Ok(()) } else { Err(wrong_list(listed.len())) }
}

/// The sum of the squares of the listed rows: what lies behind them is undefined.
fn table_square<B: MemoryBackend>(rows: &Rows<B>, device: &B::Device) -> Result<Tensor<B, 1>> {
    let some = B::float_buffer(primitive(Tensor::<B, 1>::zeros([1], device)));
    let (gradients, count) = B::Engine::listed(rows, &some)?;
    let gradients: Tensor<B, 2> = from_buffer(gradients);
    let capacity = gradients.dims()[0];
    if count >= capacity {
        return Ok(square_sum(gradients));
    }
    let unlisted = Tensor::<B, 1, Int>::arange(0..capacity as i64, device).greater_equal_elem(count as i64);
    Ok(square_sum(gradients.mask_fill(unlisted.unsqueeze_dim(1), 0.0)))
}
