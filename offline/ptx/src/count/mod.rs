//! Counts what a launch does, instruction by instruction: how often warps issue it and in how many lanes, cycles of shared memory with
//! their conflicts, lines and sectors of the first-level cache, sectors that come from the second level.

mod cache;
mod trace;

use self::cache::{Cache, LINE};
use self::trace::Traces;
pub use self::trace::{Step, Trace};
use crate::error::Stop;
use crate::flow::ControlFlow;
use crate::lanes::{Mask, WARP, lanes};
use crate::operand::{Register, Space};
use crate::program::{Op, Program};
use crate::run::launch::{Done, run};
use crate::run::memory::{Access, Kind, Memory, Place};
use crate::run::observe::{At, Observer};
use crate::run::shape::Shape;
use crate::sanitise::SECTOR;

/// What one instruction of the program did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counted {
    /// Warps that issued it.
    pub issued: u64,
    /// Lanes that executed it, of all.
    pub lanes: u64,
    /// Lanes that had not ended and did not execute it.
    pub idle: u64,
    /// Cycles of shared memory: one for each different word of the busiest bank, in each phase of a wide access.
    pub shared_cycles: u64,
    /// Different words of shared memory that an access moves.
    pub words: u64,
    /// Of an atomic operation on shared memory, for each warp the most lanes that hit one address.
    pub same_address: u64,
    /// Lines of the first-level cache that were looked up.
    pub tags: u64,
    /// Sectors that came from the second-level cache, or went there.
    pub sectors: u64,
}

/// What a launch moved of one buffer.
#[derive(Debug, Clone, Default)]
pub struct Moved {
    /// Sectors that came from the second-level cache, or went there.
    pub sectors: u64,
    /// Of each byte that was stored, whether it was; empty where none was.
    pub written: Vec<bool>,
    /// Sectors that blocks have touched, each block's own.
    pub by_block: u64,
    /// Of each sector, the block that touched it last, counted from 1 in the order in which they ran; 0 is none.
    touched: Vec<u32>,
    /// Of each sector, whether it was loaded.
    loaded: Vec<bool>,
}

impl Moved {
    /// Sectors that were loaded and stored: they come and go.
    pub fn changed(&self) -> u64 {
        let stored = self.written.chunks(SECTOR as usize).map(|bytes| bytes.contains(&true));
        self.loaded.iter().zip(stored).filter(|(loaded, stored)| **loaded && *stored).count() as u64
    }

    /// Sectors that were touched at all.
    pub fn distinct(&self) -> u64 {
        self.touched.iter().filter(|block| **block > 0).count() as u64
    }
}

/// The counts of a launch.
pub struct Count<'a> {
    program: &'a Program,
    /// Of each instruction.
    pub counts: Vec<Counted>,
    /// Warps that waited at a barrier.
    pub barriers: u64,
    /// Blocks that ran.
    pub blocks: u64,
    /// Of each buffer.
    pub buffers: Vec<Moved>,
    /// The most loads, each of which needs the one before for its address.
    pub chain: u32,
    cache: Cache,
    traces: Traces,
    /// Of each warp of the block and each register, the loads that its value hangs on.
    depths: Vec<Vec<u32>>,
}

/// Banks of shared memory, of four bytes each.
const BANKS: usize = 32;

impl<'a> Count<'a> {
    /// Nothing yet, for blocks that have `cache` bytes of a first-level cache each, and buffers of so many bytes.
    pub fn new(program: &'a Program, cache: usize, lengths: &[usize]) -> Self {
        let moved = |&length: &usize| {
            let sectors = length.div_ceil(SECTOR as usize);
            Moved { touched: vec![0; sectors], loaded: vec![false; sectors], ..Moved::default() }
        };
        Self {
            program,
            counts: vec![Counted::default(); program.code.len()],
            barriers: 0,
            blocks: 0,
            buffers: lengths.iter().map(moved).collect(),
            chain: 0,
            cache: Cache::new(cache),
            traces: Traces::default(),
            depths: Vec::new(),
        }
    }

    /// Keeps traces of the first blocks, until they have so many steps together.
    pub fn traced(mut self, steps: usize) -> Self {
        self.traces = Traces::new(steps);
        self
    }

    /// The traces, a block each.
    pub fn take_traces(&mut self) -> Vec<Trace> {
        std::mem::take(&mut self.traces.blocks)
    }

    fn register(&self, register: Register) -> usize {
        let banks = self.program.registers;
        match register {
            Register::Word(at) => at as usize,
            Register::Long(at) => banks.words + at as usize,
            Register::Predicate(at) => banks.words + banks.longs + at as usize,
        }
    }

    /// Follows the chain of loads through an instruction.
    fn follow(&mut self, at: &At) {
        let instruction = &self.program.code[at.instruction];
        let banks = self.program.registers;
        let size = banks.words + banks.longs + banks.predicates;
        if self.depths.len() <= at.warp {
            self.depths.resize(at.warp + 1, Vec::new());
        }
        self.depths[at.warp].resize(size, 0);
        let deepest = instruction.reads.iter().map(|&it| self.depths[at.warp][self.register(it)]).max().unwrap_or(0);
        let loads = matches!(instruction.op, Op::Load(Space::Global | Space::Generic, ..));
        let depth = deepest + u32::from(loads);
        self.chain = self.chain.max(depth);
        for &register in &instruction.writes {
            let place = self.register(register);
            self.depths[at.warp][place] = depth;
        }
    }

    fn access_shared(&mut self, at: &At, access: &Access<'_>) {
        let counted = &mut self.counts[at.instruction];
        let (cycles, words) = shared_cycles(access);
        let alike = if access.kind.is_atomic() { most_alike(access) } else { 0 };
        counted.shared_cycles += cycles;
        counted.words += words;
        counted.same_address += alike;
        if let Some(step) = self.traces.current(at.warp) {
            step.shared += cycles as u16;
            step.words += words as u16;
            step.same_address += alike as u16;
        }
    }

    fn access_buffer(&mut self, at: &At, buffer: usize, access: &Access<'_>) {
        let base = (buffer as u64 + 1) << 40;
        let mut touched: Vec<(u64, u8)> = Vec::with_capacity(WARP);
        for lane in lanes(access.mask) {
            let (first, last) = (access.offsets[lane], access.offsets[lane] + access.size as u64 - 1);
            for sector in first / SECTOR..=last / SECTOR {
                let (line, bit) = ((base + sector * SECTOR) / LINE, 1u8 << (sector % (LINE / SECTOR)));
                match touched.last_mut().filter(|it| it.0 == line) {
                    Some(it) => it.1 |= bit,
                    None => touched.push((line, bit)),
                }
            }
        }
        self.note(buffer, access);
        touched.sort_unstable();
        let counted = &mut self.counts[at.instruction];
        let mut step = self.traces.current(at.warp);
        for group in touched.chunk_by(|a, b| a.0 == b.0) {
            let sectors = group.iter().fold(0, |all, it| all | it.1);
            counted.tags += 1;
            let moved = if access.kind == Kind::Load { self.cache.read(group[0].0, sectors) } else { sectors };
            counted.sectors += u64::from(moved.count_ones());
            if let Some(step) = &mut step {
                step.tags += 1;
                step.sectors += moved.count_ones() as u16;
                step.buffer = buffer as u16;
            }
            if let Some(buffer) = self.buffers.get_mut(buffer) {
                buffer.sectors += u64::from(moved.count_ones());
            }
        }
    }

    /// Notes which parts of a buffer an access touches, and which it writes.
    fn note(&mut self, buffer: usize, access: &Access<'_>) {
        let block = self.blocks as u32;
        let Some(moved) = self.buffers.get_mut(buffer) else { return };
        for lane in lanes(access.mask) {
            let (first, end) = (access.offsets[lane] as usize, access.offsets[lane] as usize + access.size);
            let sectors = first / SECTOR as usize..end.div_ceil(SECTOR as usize);
            for touched in &mut moved.touched[sectors.clone()] {
                moved.by_block += u64::from(*touched != block);
                *touched = block;
            }
            if access.kind == Kind::Load || access.kind.is_atomic() {
                moved.loaded[sectors].fill(true);
            }
            if access.kind.stores() {
                if moved.written.is_empty() {
                    moved.written = vec![false; moved.touched.len() * SECTOR as usize];
                }
                moved.written[first..end].fill(true);
            }
        }
    }
}

impl Observer for Count<'_> {
    fn issued(&mut self, at: &At, mask: Mask, running: Mask) {
        let counted = &mut self.counts[at.instruction];
        counted.issued += 1;
        counted.lanes += u64::from(mask.count_ones());
        counted.idle += u64::from((running & !mask).count_ones());
        self.barriers += u64::from(matches!(self.program.code[at.instruction].op, Op::Barrier(_)));
        self.traces.issued(at.warp, at.instruction, mask != 0);
        self.follow(at);
    }

    fn accessed(&mut self, at: &At, access: &Access<'_>) {
        match access.place {
            Place::Shared => self.access_shared(at, access),
            Place::Buffer(buffer) => self.access_buffer(at, buffer, access),
            Place::Local | Place::Parameter | Place::Module => {}
        }
    }

    fn block_begins(&mut self, _: usize, _: u32) {
        self.blocks += 1;
        self.traces.begin_block();
        // Each block as if it had its part of the cache to itself.
        self.cache.clear();
        self.depths.iter_mut().for_each(|depths| depths.fill(0));
    }
}

/// Runs blocks and counts what they do.
///
/// # Errors
/// Why the launch does not go on.
pub fn count(
    program: (&Program, &ControlFlow),
    shape: Shape,
    blocks: &[usize],
    memory: &mut Memory<'_>,
    count: &mut Count<'_>,
) -> Result<Done, Stop> {
    run(program, shape, Some(blocks), memory, count, &mut ())
}

/// Cycles of an access to shared memory: in each phase, 32 lanes of 4 bytes, 16 of 8 or 8 of 16, the different words of the busiest bank. And the different words of all banks.
fn shared_cycles(access: &Access<'_>) -> (u64, u64) {
    let words = access.size.div_ceil(4);
    let phase = WARP / words.clamp(1, WARP);
    let (mut cycles, mut different) = (0, 0);
    for first in (0..WARP).step_by(phase.max(1)) {
        let mut banks: [Vec<u64>; BANKS] = Default::default();
        for lane in (first..first + phase.max(1)).filter(|lane| access.mask >> lane & 1 == 1) {
            for word in 0..words as u64 {
                let word = access.offsets[lane] / 4 + word;
                let bank = &mut banks[word as usize % BANKS];
                if !bank.contains(&word) {
                    bank.push(word);
                }
            }
        }
        cycles += banks.iter().map(Vec::len).max().unwrap_or(0) as u64;
        different += banks.iter().map(Vec::len).sum::<usize>() as u64;
    }
    (cycles, different)
}

/// The most lanes that access the same address.
fn most_alike(access: &Access<'_>) -> u64 {
    let mut addresses: Vec<u64> = lanes(access.mask).map(|lane| access.offsets[lane]).collect();
    addresses.sort_unstable();
    addresses.chunk_by(|a, b| a == b).map(<[u64]>::len).max().unwrap_or(0) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lanes::ALL;

    fn access(offsets: &[u64; WARP], mask: Mask, size: usize) -> Access<'_> {
        Access { place: Place::Shared, offsets, mask, size, used: u32::MAX, kind: Kind::Load }
    }

    #[test]
    fn shared_memory_takes_a_cycle_for_each_word_of_the_busiest_bank() {
        let strided = |stride: u64| std::array::from_fn(|lane| lane as u64 * stride);
        // Bytes from lane to lane, bytes of a lane, cycles.
        for (stride, size, cycles) in [
            (4, 4, 1),
            (0, 4, 1),
            (8, 4, 2),
            (128, 4, 32),
            (132, 4, 1),
            (2, 2, 1),
            (8, 8, 2),
            (16, 16, 4),
            (32, 16, 8),
            (0, 16, 4),
        ] {
            assert_eq!(shared_cycles(&access(&strided(stride), ALL, size)).0, cycles, "{size} bytes, {stride} apart");
        }
        assert_eq!(shared_cycles(&access(&strided(128), 0b101, 4)), (2, 2));
        assert_eq!(shared_cycles(&access(&strided(0), ALL, 4)), (1, 1));
        // Each of four phases reads the same four words.
        assert_eq!(shared_cycles(&access(&strided(0), ALL, 16)), (4, 16));
        assert_eq!(shared_cycles(&access(&strided(16), ALL, 16)), (4, 128));
    }

    #[test]
    fn lanes_that_hit_one_address_are_counted() {
        let offsets = std::array::from_fn(|lane| 4 * (lane as u64 / 5));
        assert_eq!(most_alike(&access(&offsets, ALL, 4)), 5);
        assert_eq!(most_alike(&access(&[0; WARP], ALL, 4)), 32);
        assert_eq!(most_alike(&access(&[0; WARP], 0b1001, 4)), 2);
    }
}
