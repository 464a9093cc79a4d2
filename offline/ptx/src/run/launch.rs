//! A launch: one block after the other, each block's warps in turn until they wait for each other. Blocks, warps and the lanes of atomic
//! operations run in an order that is drawn anew from a seed: what depends on it is a fault of the kernel.

use super::context::Context;
use super::memory::Memory;
use super::observe::Observer;
use super::shape::Shape;
use super::transfer::state::Transfers;
use super::warp::{State, Warp};
use crate::error::{Site, Stop};
use crate::flow::ControlFlow;
use crate::lanes::{Mask, WARP, lanes};
use crate::program::{Barrier, BarrierVote, Op, Program};

/// A source of chances, which the launch draws its order from.
pub trait Chance {
    /// A number below `end`.
    fn below(&mut self, end: usize) -> usize;
}

/// In order, whatever the end.
impl Chance for () {
    fn below(&mut self, end: usize) -> usize {
        end - 1
    }
}

/// What a launch did, besides what it left in memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Done {
    /// Loop iterations, all loops together, of the thread that went through most.
    pub loops: u64,
    /// Instructions of warps.
    pub executed: u64,
}

/// Instructions that a warp executes before another has its turn.
const TURN: usize = 128;
/// Turns of all warps in which nothing happens but that some find that they have to wait, after which nothing will.
const PATIENCE: usize = 1000;
/// Instructions of a warp after which a launch counts as endless. Tests have endless loops that they want to see the end of.
const ENDLESS: u64 = if cfg!(test) { 1 << 16 } else { 1 << 34 };

/// Shuffles `all`.
fn shuffle<T>(all: &mut [T], chance: &mut dyn Chance) {
    for at in (1..all.len()).rev() {
        all.swap(at, chance.below(at + 1));
    }
}

/// Runs the blocks that `blocks` numbers, or all.
///
/// # Errors
/// Why the launch does not go on. Memory is as the instructions before have left it.
pub fn run<O: Observer>(
    (program, flow): (&Program, &ControlFlow),
    shape: Shape,
    blocks: Option<&[usize]>,
    memory: &mut Memory<'_>,
    observer: &mut O,
    chance: &mut dyn Chance,
) -> Result<Done, Stop> {
    let total = shape.blocks.iter().map(|&n| n as usize).product();
    let mut order: Vec<usize> = blocks.map_or_else(|| (0..total).collect(), <[usize]>::to_vec);
    shuffle(&mut order, chance);
    let threads = shape.threads.iter().product::<u32>() as usize;
    let mut block = Block {
        warps: (0..threads.div_ceil(WARP)).map(|number| Warp::new(program, &shape, 0, number)).collect(),
        epoch: 0,
        arrived: [0; 16],
        done: Done::default(),
    };
    for number in order {
        block.run(number, (program, flow), shape, memory, observer, chance)?;
    }
    Ok(block.done)
}

struct Block {
    warps: Vec<Warp>,
    /// Barriers since the launch began.
    epoch: u32,
    /// Threads that came to a barrier without waiting.
    arrived: [usize; 16],
    done: Done,
}

impl Block {
    fn run<O: Observer>(
        &mut self,
        number: usize,
        (program, flow): (&Program, &ControlFlow),
        shape: Shape,
        memory: &mut Memory<'_>,
        observer: &mut O,
        chance: &mut dyn Chance,
    ) -> Result<(), Stop> {
        self.epoch += 1;
        observer.block_begins(number, self.epoch);
        self.arrived = [0; 16];
        self.warps.iter_mut().for_each(|warp| warp.restart(number));
        let mut transfers = Transfers::default();
        let mut order: Vec<usize> = (0..self.warps.len()).collect();
        let mut idle = 0;
        loop {
            shuffle(&mut order, chance);
            let (mut moved, changes) = (false, transfers.changes);
            for &warp in &order {
                let reversed = chance.below(2) == 0;
                let mut context = Context {
                    program,
                    flow,
                    memory,
                    observer,
                    shape,
                    epoch: self.epoch,
                    reversed,
                    transfers: &mut transfers,
                };
                moved |= turn(&mut self.warps[warp], &mut context)?;
                self.epoch = context.epoch;
            }
            if self.warps.iter().all(|warp| warp.state == State::Done) {
                break;
            }
            let (epoch, transfers_now) = (self.epoch, &mut transfers);
            let context =
                Context { program, flow, memory, observer, shape, epoch, reversed: false, transfers: transfers_now };
            moved |= self.release(&context)?;
            moved |= transfers.changes != changes;
            idle = if moved { 0 } else { idle + 1 };
            if idle > 0 && (idle > PATIENCE || !self.warps.iter().any(|warp| warp.state == State::Polls)) {
                return Err(self.stuck(program));
            }
        }
        for warp in &self.warps {
            self.done.executed += warp.executed;
            self.done.loops = warp.loops.iter().map(|&loops| u64::from(loops)).fold(self.done.loops, u64::max);
        }
        Ok(())
    }

    /// Lets go those that wait at a barrier that all have come to, and those that only come by; whether there are any.
    fn release<O: Observer>(&mut self, context: &Context<'_, '_, O>) -> Result<bool, Stop> {
        let mut released = false;
        for which in 0..16 {
            while self.release_at(which, context)? {
                released = true;
            }
        }
        Ok(released)
    }

    /// Has warps come to a barrier until it is full, or all that are there have come; whether any goes on.
    fn release_at<O: Observer>(&mut self, which: usize, context: &Context<'_, '_, O>) -> Result<bool, Stop> {
        let here: Vec<(usize, Barrier)> = self
            .warps
            .iter()
            .enumerate()
            .filter_map(|(at, warp)| Some((at, waits(warp, context.program)?.1)))
            .filter(|(at, barrier)| number(&self.warps[*at], barrier, context) == which)
            .collect();
        let Some((first, barrier)) = here.first() else { return Ok(false) };
        // A warp counts with all its lanes, whether they exist or not.
        let expected = match barrier.threads {
            Some(threads) => self.warps[*first].word(&threads, context)[0] as usize,
            None => self.warps.len() * WARP,
        };
        let missing = expected.saturating_sub(self.arrived[which]).div_ceil(WARP).max(1);
        if let Some(all) = here.get(..missing) {
            self.complete(all, context.program)?;
            self.arrived[which] = 0;
            return Ok(true);
        }
        let mut passed = false;
        for (at, _) in here.iter().filter(|(_, barrier)| !barrier.waits) {
            self.arrived[which] += WARP;
            self.warps[*at].state = State::Runs;
            passed = true;
        }
        Ok(passed)
    }

    /// Lets warps go on that have all come to a barrier.
    fn complete(&mut self, all: &[(usize, Barrier)], program: &Program) -> Result<(), Stop> {
        // Where all of the block wait for each other they do so in one line of the source, or the kernel's barriers don't match.
        let line = |at: usize| waits(&self.warps[at], program).map(|(at, _)| program.code[at].line);
        let (first, barrier) = all[0];
        if let Some(&(other, _)) = all.iter().find(|(at, _)| barrier.threads.is_none() && line(*at) != line(first)) {
            return Err(self.parted(first, other));
        }
        self.vote(all);
        all.iter().for_each(|(at, _)| self.warps[*at].state = State::Runs);
        self.epoch += 1;
        Ok(())
    }

    /// What the threads at a barrier find out together.
    fn vote(&mut self, all: &[(usize, Barrier)]) {
        let votes = |(at, barrier): &(usize, Barrier)| {
            let (warp, (_, _, operand)) = (&self.warps[*at], barrier.vote?);
            Some((warp.predicate(&operand) & warp.existing, warp.existing))
        };
        let votes: Vec<(Mask, Mask)> = all.iter().filter_map(votes).collect();
        let count: u32 = votes.iter().map(|(votes, _)| votes.count_ones()).sum();
        let threads: u32 = votes.iter().map(|(_, existing)| existing.count_ones()).sum();
        for (at, barrier) in all {
            let Some((kind, target, _)) = barrier.vote else { continue };
            let found = match kind {
                BarrierVote::Count => count,
                BarrierVote::All => u32::from(count == threads),
                BarrierVote::Any => u32::from(count > 0),
            };
            let warp = &mut self.warps[*at];
            warp.set_word(target, &[found; WARP], warp.existing);
        }
    }

    fn parted(&self, first: usize, other: usize) -> Stop {
        let State::Waits(instruction) = self.warps[first].state else { unreachable!("it waits") };
        let at = Site { block: self.warps[first].block, thread: first * WARP, instruction };
        Stop::DivergentBlock { at, other: other * WARP }
    }

    /// Nobody can go on: someone waits for a warp that has ended or waits elsewhere.
    fn stuck(&self, program: &Program) -> Stop {
        let waiting = |warp: &&Warp| matches!(warp.state, State::Waits(_) | State::Polls);
        let warp = self.warps.iter().find(waiting).expect("somebody waits");
        let instruction = match warp.state {
            State::Waits(at) => at,
            _ => warp.copies.tested,
        };
        let at = Site { block: warp.block, thread: warp.number * WARP, instruction };
        let absent = |other: &&Warp| waits(other, program).map(|it| it.0) != waits(warp, program).map(|it| it.0);
        let other = self.warps.iter().find(absent).unwrap_or(warp);
        // The thread that does not come: one that has ended, where there is one.
        let lane = lanes(other.existing & !other.running).next().unwrap_or(0);
        Stop::DivergentBlock { at, other: other.number * WARP + lane }
    }
}

/// The barrier that a warp waits at.
fn waits(warp: &Warp, program: &Program) -> Option<(usize, Barrier)> {
    let State::Waits(at) = warp.state else { return None };
    match program.code[at].op {
        Op::Barrier(barrier) => Some((at, barrier)),
        _ => None,
    }
}

fn number<O>(warp: &Warp, barrier: &Barrier, context: &Context<'_, '_, O>) -> usize {
    warp.word(&barrier.number, context)[0] as usize % 16
}

/// Runs a warp until it waits, ends, or others shall have their turn; whether it did anything but find that it has to wait.
fn turn<O: Observer>(warp: &mut Warp, context: &mut Context<'_, '_, O>) -> Result<bool, Stop> {
    if warp.state == State::Polls {
        warp.state = State::Runs;
    }
    let before = warp.executed;
    for _ in 0..TURN {
        match warp.state {
            State::Runs => warp.advance(context)?,
            State::Waits(_) | State::Polls | State::Done => break,
        }
    }
    if warp.executed > ENDLESS {
        let at = Site { block: warp.block, thread: warp.number * WARP, instruction: 0 };
        return Err(Stop::Endless { at });
    }
    Ok(warp.executed > before && warp.state != State::Polls)
}
