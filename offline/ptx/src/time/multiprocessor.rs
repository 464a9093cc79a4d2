//! The replay: quarters issue, blocks meet at barriers, and give way to others as they end.

use std::collections::HashMap;

use super::machine::{Cost, Machine, PIPES};
use super::schedule::Schedule;
use super::unit::Unit;
use super::warp::{Text, Warp, kind};
use crate::count::{Step, Trace};
use crate::operand::Source;
use crate::program::transfer::Transfer;
use crate::program::{Barrier, Op, Program};

/// Quarters of a multiprocessor, each with a scheduler of its own.
const QUARTERS: usize = 4;

/// The blocks that a multiprocessor is given.
#[derive(Debug, Clone, Copy)]
pub struct Blocks<'a> {
    /// What some of them did; they stand for all in turn.
    pub traces: &'a [Trace],
    /// How many there are.
    pub count: u64,
    /// Of each buffer, the share of its sectors that device memory gives or takes.
    pub from_memory: &'a [f64],
    /// Steps after which no more blocks are replayed.
    pub steps: usize,
}

/// How long they take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timed {
    /// Cycles for all.
    pub cycles: f64,
    /// Blocks that were replayed; the others take what the last waves of these took.
    pub replayed: u64,
}

/// Replays the blocks of a multiprocessor.
pub fn replay(program: &Program, costs: &[Cost], machine: &Machine, blocks: Blocks<'_>) -> Timed {
    let latency = |op: &Op| match op {
        Op::Load(space, ..) if *space == crate::operand::Space::Shared => machine.latency_shared,
        Op::Load(..) => machine.latency_cache,
        Op::Collective(_) | Op::Matrix(_) | Op::Atomic(_) => machine.latency_shared,
        _ => 0.0,
    };
    let schedule = Schedule::of(program, costs, latency);
    let text = Text { program, costs, schedule: &schedule };
    let length = |trace: &Trace| trace.iter().map(Vec::len).sum::<usize>();
    let average = blocks.traces.iter().map(length).sum::<usize>() / blocks.traces.len().max(1);
    let room = (blocks.steps / average.max(1)).max(3 * machine.resident) as u64;
    let mut it = Multiprocessor {
        text,
        machine,
        unit: Unit::new(machine, blocks.from_memory),
        quarters: Default::default(),
        slots: Vec::new(),
        warps: Vec::new(),
        traces: blocks.traces,
        begun: 0,
        count: blocks.count.min(room),
        ended: Vec::new(),
    };
    it.run();
    it.timed(blocks.count)
}

/// A quarter.
#[derive(Default)]
struct Quarter {
    warps: Vec<usize>,
    /// When it issues again, and when each of its pipes is free.
    free: f64,
    pipes: [f64; PIPES],
    /// The warp that issued last.
    last: usize,
    /// What it will do next, and when; None is not known.
    next: Option<(f64, usize)>,
}

/// A block's place.
#[derive(Default)]
struct Slot {
    first: usize,
    warps: usize,
    left: usize,
    /// Of each barrier, warps that have come to it.
    arrived: HashMap<u64, usize>,
    /// When all bulk copies are there.
    copied: f64,
}

struct Multiprocessor<'a> {
    text: Text<'a>,
    machine: &'a Machine,
    unit: Unit<'a>,
    quarters: [Quarter; QUARTERS],
    slots: Vec<Slot>,
    /// Of each slot in turn; the second number is the slot.
    warps: Vec<(Warp<'a>, usize)>,
    traces: &'a [Trace],
    begun: u64,
    count: u64,
    /// When each block ended.
    ended: Vec<f64>,
}

impl<'a> Multiprocessor<'a> {
    fn run(&mut self) {
        for slot in 0..self.machine.resident.min(self.count as usize) {
            self.slots.push(Slot::default());
            self.begin(slot, 0.0);
        }
        while let Some(quarter) = self.earliest_quarter() {
            let (now, warp) = self.quarters[quarter].next.take().expect("it was chosen for it");
            self.issue(quarter, warp, now);
        }
    }

    /// Begins another block in a slot.
    fn begin(&mut self, slot: usize, now: f64) {
        if self.begun == self.count {
            return;
        }
        let traces = self.traces;
        let trace = &traces[self.begun as usize % traces.len()];
        self.begun += 1;
        let banks = self.text.program.registers;
        let new = self.slots[slot].warps == 0;
        let first = if new { self.warps.len() } else { self.slots[slot].first };
        for (number, steps) in trace.iter().enumerate() {
            let warp = (Warp::new(steps, banks, now), slot);
            if new {
                self.quarters[(first + number) % QUARTERS].warps.push(first + number);
                self.warps.push(warp);
            } else {
                self.warps[first + number] = warp;
            }
        }
        self.slots[slot] = Slot { first, warps: trace.len(), left: trace.len(), ..Slot::default() };
        for number in first..first + trace.len() {
            self.settle(number, now);
        }
    }

    /// The quarter that issues next.
    fn earliest_quarter(&mut self) -> Option<usize> {
        for quarter in 0..QUARTERS {
            if self.quarters[quarter].next.is_none() {
                self.quarters[quarter].next = self.choose(quarter);
            }
        }
        let time = |quarter: &usize| self.quarters[*quarter].next.map(|it| it.0);
        (0..QUARTERS)
            .filter(|quarter| time(quarter).is_some())
            .min_by(|a, b| time(a).unwrap_or(f64::MAX).total_cmp(&time(b).unwrap_or(f64::MAX)))
    }

    /// The warp that a quarter issues from next: the first that can; of several the one that issued last, or the oldest.
    fn choose(&self, quarter: usize) -> Option<(f64, usize)> {
        let it = &self.quarters[quarter];
        let mut best: Option<(f64, usize)> = None;
        for &number in &it.warps {
            let warp = &self.warps[number].0;
            if warp.waits.is_some() || warp.ended {
                continue;
            }
            let Some(step) = warp.step(self.text) else { continue };
            let cost = &self.text.costs[step.instruction as usize];
            let busy = (0..PIPES).filter(|&pipe| cost.pipes[pipe] > 0.0).map(|pipe| it.pipes[pipe]);
            let time = busy.fold(warp.due.max(it.free), f64::max);
            let better = best.is_none_or(|(first, _)| time < first || time == first && number == it.last);
            if better {
                best = Some((time, number));
            }
        }
        best
    }

    fn issue(&mut self, quarter: usize, number: usize, now: f64) {
        let text = self.text;
        let (warp, slot) = &mut self.warps[number];
        let (step, slot) = (warp.step(text).expect("it was chosen for it"), *slot);
        let instruction = &text.program.code[step.instruction as usize];
        let cost = &text.costs[step.instruction as usize];
        let it = &mut self.quarters[quarter];
        it.free = now + cost.issued;
        it.last = number;
        for (free, cycles) in it.pipes.iter_mut().zip(cost.pipes).filter(|(_, cycles)| *cycles > 0.0) {
            *free = free.max(now) + cycles;
        }
        warp.next = now + cost.issued.max(cost.pause);
        let mut done = now + cost.latency;
        if step.active && (cost.unit > 0.0 || step.shared > 0 || step.tags > 0) {
            done = done.max(self.unit.take(now, step, cost));
            if let Some(kind) = kind(instruction, step) {
                warp.load(kind, now, done);
            }
        }
        warp.write(text, step, done);
        warp.pass(text);
        match &instruction.op {
            Op::Barrier(barrier) if step.active => self.arrive(number, slot, barrier, now),
            Op::Transfer(transfer) if step.active => self.transfer(number, slot, transfer, done),
            _ => {}
        }
        self.settle(number, now);
    }

    /// Passes over what costs nothing, and ends the warp at its end.
    fn settle(&mut self, number: usize, now: f64) {
        let text = self.text;
        let (warp, slot) = &mut self.warps[number];
        if warp.waits.is_some() {
            return;
        }
        while let Some(step) = warp.step(text) {
            warp.due = warp.earliest(text, step);
            if !free(step, text) {
                return;
            }
            warp.write(text, step, warp.due);
            warp.pass(text);
        }
        let (slot, end) = (*slot, warp.next.max(now));
        warp.ended = true;
        self.end(slot, end);
    }

    fn end(&mut self, slot: usize, now: f64) {
        self.slots[slot].left -= 1;
        if self.slots[slot].left == 0 {
            self.ended.push(now);
            self.quarters.iter_mut().for_each(|quarter| quarter.next = None);
            return self.begin(slot, now + self.machine.latency_block);
        }
        let barriers: Vec<u64> = self.slots[slot].arrived.keys().copied().collect();
        barriers.into_iter().for_each(|barrier| self.release(slot, barrier, None, now));
    }

    fn arrive(&mut self, number: usize, slot: usize, barrier: &Barrier, now: f64) {
        let which = constant(&barrier.number).unwrap_or(0);
        *self.slots[slot].arrived.entry(which).or_default() += 1;
        self.warps[number].0.waits = barrier.waits.then_some(which);
        let threads = barrier.threads.as_ref().and_then(constant);
        self.release(slot, which, threads, now);
    }

    /// Lets a block's warps go on if all that a barrier waits for have come.
    fn release(&mut self, slot: usize, barrier: u64, threads: Option<u64>, now: f64) {
        let it = &mut self.slots[slot];
        let needed = threads.map_or(it.left, |threads| threads.div_ceil(32) as usize);
        if it.arrived.get(&barrier).is_none_or(|&arrived| arrived < needed) {
            return;
        }
        it.arrived.remove(&barrier);
        let waiting: Vec<usize> =
            (it.first..it.first + it.warps).filter(|&number| self.warps[number].0.waits == Some(barrier)).collect();
        for &number in &waiting {
            let warp = &mut self.warps[number].0;
            warp.waits = None;
            warp.next = warp.next.max(now + self.machine.latency_barrier);
        }
        self.quarters.iter_mut().for_each(|quarter| quarter.next = None);
        waiting.into_iter().for_each(|number| self.settle(number, now));
    }

    fn transfer(&mut self, number: usize, slot: usize, transfer: &Transfer, done: f64) {
        let (warp, slot) = (&mut self.warps[number].0, &mut self.slots[slot]);
        match transfer {
            Transfer::Copy(_) => warp.copy(done),
            Transfer::Bulk(_) => slot.copied = slot.copied.max(done),
            Transfer::Commit(_) => warp.commit(),
            Transfer::Wait(_, left) => warp.wait(*left as usize),
            Transfer::WaitAll => {
                warp.commit();
                warp.wait(0);
            }
            Transfer::Test { .. } => warp.next = warp.next.max(slot.copied),
            _ => {}
        }
    }

    /// The time of all blocks of which these were the first.
    fn timed(&self, count: u64) -> Timed {
        let replayed = self.ended.len() as u64;
        let last = self.ended.iter().copied().fold(0.0, f64::max);
        let end = last.max(self.unit.idle());
        if count == replayed || replayed == 0 {
            return Timed { cycles: end, replayed };
        }
        // Over whole waves, where blocks begin and end together.
        let mut ended = self.ended.clone();
        ended.sort_by(f64::total_cmp);
        let waves = ((ended.len() - 1) / self.machine.resident / 2).max(1) * self.machine.resident;
        let waves = waves.min(ended.len() - 1).max(1);
        let pace = (last - ended.get(ended.len() - 1 - waves).copied().unwrap_or(0.0)) / waves as f64;
        Timed { cycles: end + pace * (count - replayed) as f64, replayed }
    }
}

/// Whether a step takes neither an issue slot nor memory.
fn free(step: &Step, text: Text<'_>) -> bool {
    let (cost, instruction) = (&text.costs[step.instruction as usize], &text.program.code[step.instruction as usize]);
    let waits = matches!(instruction.op, Op::Barrier(_) | Op::Transfer(_));
    cost.issued == 0.0 && !waits && step.shared == 0 && step.tags == 0
}

fn constant(source: &Source) -> Option<u64> {
    match source {
        Source::Constant(number) => Some(*number),
        _ => None,
    }
}
