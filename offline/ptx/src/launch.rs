//! A launch: one block after the other, each block's warps in turn until they wait for each other. Blocks, warps and the lanes of atomic
//! operations run in an order that is drawn anew from a seed: what depends on it is a fault of the kernel.

use crate::error::{Site, Stop};
use crate::flow::Flow;
use crate::lanes::{Mask, WARP, lanes};
use crate::memory::Memory;
use crate::observe::Observer;
use crate::program::{Barrier, BarrierVote, Op, Program, Register};
use crate::transfer::Transfers;
use crate::warp::{Context, Shape, State, Warp};

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
const TURN: usize = 4096;
/// Turns of all warps in which nothing happens but that some find that they have to wait, after which nothing will.
const PATIENCE: usize = 1000;
/// Instructions of a warp after which a launch counts as endless.
const ENDLESS: u64 = 1 << 34;

/// Shuffles `all`.
fn shuffle<T>(all: &mut [T], chance: &mut impl Chance) {
    for at in (1..all.len()).rev() {
        all.swap(at, chance.below(at + 1));
    }
}

/// Runs the blocks that `blocks` numbers, or all.
///
/// # Errors
/// Why the launch does not go on. Memory is as the instructions before have left it.
pub fn run<O: Observer>(
    (program, flow): (&Program, &Flow),
    shape: Shape,
    blocks: Option<&[usize]>,
    memory: &mut Memory<'_>,
    observer: &mut O,
    chance: &mut impl Chance,
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
        (program, flow): (&Program, &Flow),
        shape: Shape,
        memory: &mut Memory<'_>,
        observer: &mut O,
        chance: &mut impl Chance,
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
            moved |= self.release(program, shape, memory, observer, &mut transfers, flow)?;
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

    /// Lets go those that wait at a barrier that all have come to; whether there is one.
    fn release<O: Observer>(
        &mut self,
        program: &Program,
        shape: Shape,
        memory: &mut Memory<'_>,
        observer: &mut O,
        transfers: &mut Transfers,
        flow: &Flow,
    ) -> Result<bool, Stop> {
        let epoch = self.epoch;
        let context = Context { program, flow, memory, observer, shape, epoch, reversed: false, transfers };
        // Those that only come by go on at once.
        let mut released = false;
        for warp in &mut self.warps {
            let Some((_, barrier)) = waits(warp, program) else { continue };
            if !barrier.waits {
                self.arrived[number(warp, &barrier, &context)] += warp.existing.count_ones() as usize;
                warp.state = State::Runs;
                released = true;
            }
        }
        for which in 0..16 {
            let here: Vec<usize> = (0..self.warps.len())
                .filter(|&at| {
                    let warp = &self.warps[at];
                    waits(warp, program).is_some_and(|(_, barrier)| number(warp, &barrier, &context) == which)
                })
                .collect();
            let Some(&first) = here.first() else { continue };
            let (_, barrier) = waits(&self.warps[first], program).expect("it waits");
            let all = self.warps.iter().map(|warp| warp.existing.count_ones() as usize).sum();
            let expected = match barrier.threads {
                Some(threads) => self.warps[first].word(&threads, &context)[0] as usize,
                None => all,
            };
            let come = here.iter().map(|&at| self.warps[at].existing.count_ones() as usize).sum::<usize>();
            if come + self.arrived[which] < expected {
                continue;
            }
            // All of the block wait in one line of the source, or the kernel's barriers don't match.
            let line = |at: usize| waits(&self.warps[at], program).map(|(at, _)| program.code[at].line);
            if let Some(&other) = here.iter().find(|&&at| line(at) != line(first)) {
                return Err(self.parted(first, other));
            }
            self.vote(&here, program, &context);
            here.iter().for_each(|&at| self.warps[at].state = State::Runs);
            self.arrived[which] = 0;
            self.epoch += 1;
            released = true;
        }
        Ok(released)
    }

    /// What the threads at a barrier find out together.
    fn vote<O>(&mut self, here: &[usize], program: &Program, context: &Context<'_, '_, O>) {
        let votes: Vec<(Mask, Mask)> = here
            .iter()
            .filter_map(|&at| {
                let warp = &self.warps[at];
                let (_, operand) = waits(warp, program)?.1.vote.map(|(_, target, source)| (target, source))?;
                Some((warp.predicate(&operand) & warp.existing, warp.existing))
            })
            .collect();
        let count: u32 = votes.iter().map(|(votes, _)| votes.count_ones()).sum();
        let all: u32 = votes.iter().map(|(_, existing)| existing.count_ones()).sum();
        for &at in here {
            let warp = &mut self.warps[at];
            let Some((kind, target, _)) = waits(warp, program).and_then(|(_, barrier)| barrier.vote) else { continue };
            let found = match kind {
                BarrierVote::Count => count,
                BarrierVote::All => u32::from(count == all),
                BarrierVote::Any => u32::from(count > 0),
            };
            let existing = warp.existing;
            match target {
                Register::Predicate(target) => {
                    warp.set_predicate(target, if found > 0 { Mask::MAX } else { 0 }, existing);
                }
                target => warp.set_word(target, &[found; WARP], existing),
            }
        }
        let _ = context;
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
