//! A warp that replays its trace: which step comes next, and when its registers and its loads allow that.

use std::collections::VecDeque;

use super::machine::Cost;
use super::schedule::Schedule;
use crate::count::Step;
use crate::operand::{Register, Space};
use crate::program::{Banks, Instruction, Op, Program};

/// Loads of a kind wait for each other: those from shared memory, and all others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Shared,
    Other,
}

/// The kind of a load; None of what is none.
pub fn kind(instruction: &Instruction, step: &Step) -> Option<Kind> {
    let loads = match &instruction.op {
        Op::Load(Space::Parameter, ..) => false,
        Op::Load(..) => true,
        Op::Matrix(matrix) => matrix.products().is_none(),
        _ => false,
    };
    loads.then_some(if step.tags == 0 { Kind::Shared } else { Kind::Other })
}

/// What is the same for all warps.
#[derive(Clone, Copy)]
pub struct Text<'a> {
    pub program: &'a Program,
    pub costs: &'a [Cost],
    pub schedule: &'a Schedule,
}

/// A warp.
pub struct Warp<'a> {
    pub trace: &'a [Step],
    /// The first step of the run that it is in, and how many of it were issued.
    run: usize,
    issued: usize,
    /// When each register can be read.
    ready: Vec<f64>,
    /// When loads that are under way will be there, by kind.
    loads: [VecDeque<f64>; 2],
    /// Copies of the open group, and closed groups, that are under way.
    open: f64,
    groups: VecDeque<f64>,
    /// The earliest cycle at which it may issue.
    pub next: f64,
    /// The earliest cycle for the step that comes next.
    pub due: f64,
    /// The barrier that it waits at.
    pub waits: Option<u64>,
    /// Whether it has come to the end of its trace.
    pub ended: bool,
}

impl<'a> Warp<'a> {
    /// A warp at the start of a trace.
    pub fn new(trace: &'a [Step], banks: Banks, now: f64) -> Self {
        Self {
            trace,
            run: 0,
            issued: 0,
            ready: vec![0.0; banks.words + banks.longs + banks.predicates],
            loads: Default::default(),
            open: 0.0,
            groups: VecDeque::new(),
            next: now,
            due: now,
            waits: None,
            ended: false,
        }
    }

    /// The step that comes next; None at the end.
    pub fn step(&self, text: Text<'_>) -> Option<&'a Step> {
        let first = self.trace.get(self.run)?.instruction as usize;
        if self.length(text) == 1 {
            return self.trace.get(self.run);
        }
        let instruction = text.schedule.order[first + self.issued] as usize;
        self.trace.get(self.run + instruction - first)
    }

    /// Steps of the run that it is in: one, where the trace does not have all of it.
    fn length(&self, text: Text<'_>) -> usize {
        let first = self.trace[self.run].instruction as usize;
        let length = text.schedule.runs[first].max(1) as usize;
        let last = self.trace.get(self.run + length - 1).map(|it| it.instruction as usize);
        if last == Some(first + length - 1) { length } else { 1 }
    }

    /// Goes on to the next step.
    pub fn pass(&mut self, text: Text<'_>) {
        self.issued += 1;
        if self.issued >= self.length(text) {
            self.run += self.issued;
            self.issued = 0;
        }
    }

    /// When the registers that a step reads, and the loads that it has to wait for, are there.
    pub fn earliest(&self, text: Text<'_>, step: &Step) -> f64 {
        let instruction = &text.program.code[step.instruction as usize];
        let cost = &text.costs[step.instruction as usize];
        let banks = text.program.registers;
        let operands = instruction.reads.iter().map(|&register| self.ready[place(banks, register)]);
        let operands = operands.fold(self.next, f64::max);
        let Some(kind) = kind(instruction, step).filter(|_| cost.in_flight > 0) else { return operands };
        let loads = &self.loads[kind as usize];
        // The one that has to be there before another may go out.
        let waits = loads.len().checked_sub(cost.in_flight).map_or(0.0, |at| loads[at]);
        operands.max(waits)
    }

    /// Notes that a step's results can be read at `done`.
    pub fn write(&mut self, text: Text<'_>, step: &Step, done: f64) {
        let banks = text.program.registers;
        let instruction = &text.program.code[step.instruction as usize];
        instruction.writes.iter().for_each(|&register| self.ready[place(banks, register)] = done);
    }

    /// Notes a load that is there at `done`.
    pub fn load(&mut self, kind: Kind, now: f64, done: f64) {
        let loads = &mut self.loads[kind as usize];
        while loads.front().is_some_and(|&it| it <= now) {
            loads.pop_front();
        }
        loads.push_back(done);
    }

    /// Notes a copy that is there at `done`.
    pub fn copy(&mut self, done: f64) {
        self.open = self.open.max(done);
    }

    /// Closes a group of copies.
    pub fn commit(&mut self) {
        self.groups.push_back(std::mem::take(&mut self.open));
    }

    /// Waits until no more than so many groups are under way.
    pub fn wait(&mut self, left: usize) {
        while self.groups.len() > left {
            let done = self.groups.pop_front().expect("there are some");
            self.next = self.next.max(done);
        }
    }
}

fn place(banks: Banks, register: Register) -> usize {
    match register {
        Register::Word(at) => at as usize,
        Register::Long(at) => banks.words + at as usize,
        Register::Predicate(at) => banks.words + banks.longs + at as usize,
    }
}
