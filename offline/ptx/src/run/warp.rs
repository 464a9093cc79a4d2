//! A warp: 32 lanes in lock step. Lanes that part at a branch run one side after the other and come together at the branch's
//! post-dominator, by a stack of what is left to run.

use super::shape::Shape;
use super::transfer::state::Copies;
use crate::flow::END;
use crate::lanes::{ALL, Long, Mask, WARP, Word};
use crate::program::Program;

/// Lanes that run together: where they are, and where they wait for others.
#[derive(Debug, Clone, Copy)]
struct Frame {
    next: usize,
    join: usize,
    mask: Mask,
}

/// What a warp does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum State {
    /// It runs.
    Runs,
    /// It waits at a barrier of the block, an instruction.
    Waits(usize),
    /// It has found that what a barrier in shared memory waits for has not happened, and lets others go on.
    Polls,
    /// All its lanes have ended.
    Done,
}

/// A warp.
pub struct Warp {
    /// The block, and the warp in it.
    pub block: usize,
    /// See `block`.
    pub number: usize,
    /// Lanes that there are.
    pub existing: Mask,
    /// Lanes that have not ended.
    pub running: Mask,
    /// What it does.
    pub state: State,
    /// How often its lanes have waited for each other.
    pub step: u32,
    /// Instructions that it has executed.
    pub executed: u64,
    /// Loop iterations of each lane.
    pub loops: Word,
    pub(super) words: Vec<Word>,
    pub(super) longs: Vec<Long>,
    pub(super) predicates: Vec<Mask>,
    pub(super) local: Vec<u8>,
    /// Copies that are under way.
    pub(super) copies: Copies,
    /// Each lane's thread in the block.
    pub(super) threads: [Word; 3],
    stack: Vec<Frame>,
}

impl Warp {
    /// A warp at the first instruction, whose registers hold zeros.
    pub fn new(program: &Program, shape: &Shape, block: usize, number: usize) -> Self {
        let [x, y, z] = shape.threads;
        let total = (x * y * z) as usize;
        let count = (total - number * WARP).min(WARP);
        let existing = if count == WARP { ALL } else { (1 << count) - 1 };
        let thread = |lane: usize| (number * WARP + lane) as u32;
        let threads = [
            std::array::from_fn(|lane| thread(lane) % x),
            std::array::from_fn(|lane| thread(lane) / x % y),
            std::array::from_fn(|lane| thread(lane) / (x * y)),
        ];
        let registers = program.registers;
        Self {
            block,
            number,
            existing,
            running: existing,
            state: State::Runs,
            step: 0,
            executed: 0,
            loops: [0; WARP],
            words: vec![[0; WARP]; registers.words],
            longs: vec![[0; WARP]; registers.longs],
            predicates: vec![0; registers.predicates],
            local: vec![0; program.local * WARP],
            copies: Default::default(),
            threads,
            stack: vec![Frame { next: 0, join: END, mask: existing }],
        }
    }

    /// Makes it another block's warp of the same number.
    pub fn restart(&mut self, block: usize) {
        self.words.fill([0; WARP]);
        self.longs.fill([0; WARP]);
        self.predicates.fill(0);
        self.local.fill(0);
        self.copies = Default::default();
        self.stack.clear();
        self.stack.push(Frame { next: 0, join: END, mask: self.existing });
        (self.block, self.running, self.state) = (block, self.existing, State::Runs);
        (self.step, self.executed, self.loops) = (0, 0, [0; WARP]);
    }

    /// The instruction that comes next, and the lanes that will run it; None at the end.
    pub fn upcoming(&mut self) -> Option<(usize, Mask)> {
        while let Some(frame) = self.stack.last() {
            if frame.mask != 0 && frame.next != frame.join {
                return Some((frame.next, frame.mask));
            }
            self.stack.pop();
        }
        None
    }

    pub(super) fn jump(&mut self, next: usize) {
        self.stack.last_mut().expect("lanes are running").next = next;
    }

    /// Ends lanes.
    pub(super) fn end(&mut self, mask: Mask) {
        self.running &= !mask;
        self.stack.iter_mut().for_each(|frame| frame.mask &= !mask);
        if self.running == 0 {
            self.state = State::Done;
        }
    }

    pub(super) fn branch(&mut self, instruction: usize, target: usize, taken: Mask, frame: Mask, join: usize) {
        if taken == 0 || taken == frame {
            return self.jump(if taken == 0 { instruction + 1 } else { target });
        }
        self.part(join, &[(instruction + 1, frame & !taken), (target, taken)]);
    }

    /// Parts the lanes that run: each side is run until it comes to `join`.
    pub(super) fn part(&mut self, join: usize, sides: &[(usize, Mask)]) {
        let top = self.stack.last_mut().expect("lanes are running");
        if top.join == join {
            // Those below wait there for these already.
            self.stack.pop();
        } else {
            top.next = join;
        }
        for &(next, mask) in sides {
            if next != join && mask != 0 {
                self.stack.push(Frame { next, join, mask });
            }
        }
    }
}
