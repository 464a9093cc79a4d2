//! A warp's registers as instructions read and write them.

use super::context::Context;
use super::shape::Shape;
use super::warp::Warp;
use crate::lanes::{ALL, Long, Mask, WARP, Word, blend, those};
use crate::operand::{Register, Source, Special, Vector};

impl Warp {
    /// A source as words, a register where it lies, else in `room`.
    pub(super) fn word_in<'a, O>(
        &'a self,
        source: &Source,
        room: &'a mut Word,
        context: &Context<'_, '_, O>,
    ) -> &'a Word {
        match source {
            Source::Register(Register::Word(at)) => return &self.words[*at as usize],
            Source::Register(Register::Long(at)) => *room = self.longs[*at as usize].map(|number| number as u32),
            Source::Register(Register::Predicate(_)) | Source::Not(_) => {
                let mask = self.predicate(source);
                *room = std::array::from_fn(|lane| mask >> lane & 1);
            }
            Source::Constant(number) => *room = [*number as u32; WARP],
            Source::Special(special) => *room = self.special(*special, context),
        }
        room
    }

    /// A source as words.
    pub(super) fn word<O>(&self, source: &Source, context: &Context<'_, '_, O>) -> Word {
        let mut room = [0; WARP];
        *self.word_in(source, &mut room, context)
    }

    /// A source as long words.
    pub(super) fn long_in<'a, O>(
        &'a self,
        source: &Source,
        room: &'a mut Long,
        context: &Context<'_, '_, O>,
    ) -> &'a Long {
        match source {
            Source::Register(Register::Long(at)) => return &self.longs[*at as usize],
            Source::Constant(number) => *room = [*number; WARP],
            source => *room = self.word(source, context).map(u64::from),
        }
        room
    }

    /// A source as long words.
    pub(super) fn long<O>(&self, source: &Source, context: &Context<'_, '_, O>) -> Long {
        let mut room = [0; WARP];
        *self.long_in(source, &mut room, context)
    }

    /// A predicate, or a number that stands for one: it holds where it is not zero.
    pub(super) fn predicate(&self, source: &Source) -> Mask {
        match source {
            Source::Register(Register::Predicate(at)) => self.predicates[*at as usize],
            Source::Not(at) => !self.predicates[*at as usize],
            Source::Constant(0) => 0,
            Source::Constant(_) => ALL,
            source => unreachable!("{source:?} is no predicate"),
        }
    }

    /// Writes numbers, cut to what the register holds.
    pub(super) fn set(&mut self, target: Register, value: &Long, mask: Mask) {
        match target {
            Register::Word(_) => self.set_word(target, &value.map(|number| number as u32), mask),
            _ => self.set_long(target, value, mask),
        }
    }

    /// Writes words.
    pub(super) fn set_word(&mut self, target: Register, value: &Word, mask: Mask) {
        match target {
            Register::Word(at) => blend(&mut self.words[at as usize], value, mask),
            Register::Long(at) => blend(&mut self.longs[at as usize], &value.map(u64::from), mask),
            Register::Predicate(at) => {
                self.set_predicate(at, those(|lane| value[lane] != 0), mask);
            }
        }
    }

    /// Writes long words.
    pub(super) fn set_long(&mut self, target: Register, value: &Long, mask: Mask) {
        match target {
            Register::Long(at) => blend(&mut self.longs[at as usize], value, mask),
            target => self.set_word(target, &value.map(|number| number as u32), mask),
        }
    }

    /// Writes a predicate.
    pub(super) fn set_predicate(&mut self, target: u32, value: Mask, mask: Mask) {
        let target = &mut self.predicates[target as usize];
        *target = *target & !mask | value & mask;
    }

    /// The registers of a fragment.
    pub(super) fn registers<O>(&self, sources: &[Source], context: &Context<'_, '_, O>) -> Vec<Word> {
        sources.iter().map(|source| self.word(source, context)).collect()
    }

    /// Writes the registers of a fragment.
    pub(super) fn set_registers(&mut self, targets: &Vector, words: &[Word]) {
        for (target, word) in targets.iter().zip(words) {
            if let Some(target) = target {
                self.set_word(*target, word, ALL);
            }
        }
    }

    fn special<O>(&self, special: Special, context: &Context<'_, '_, O>) -> Word {
        let Shape { threads, blocks, dynamic_shared } = context.shape;
        let by_lane = |of: fn(u32) -> u32| std::array::from_fn(|lane| of(lane as u32));
        let [columns, rows, _] = blocks.map(|count| count as usize);
        let (column, rest) = (self.block % columns, self.block / columns);
        let block_at = [column, rest % rows, rest / rows].map(|at| at as u32);
        match special {
            Special::Thread(dimension) => self.threads[usize::from(dimension)],
            Special::Threads(dimension) => [threads[usize::from(dimension)]; WARP],
            Special::Block(dimension) => [block_at[usize::from(dimension)]; WARP],
            Special::Blocks(dimension) => [blocks[usize::from(dimension)]; WARP],
            Special::Lane => by_lane(|lane| lane),
            Special::Warp => [self.number as u32; WARP],
            Special::LanesBelow => by_lane(|lane| (1 << lane) - 1),
            Special::LanesUpTo => by_lane(|lane| u32::MAX >> (31 - lane)),
            Special::LaneAlone => by_lane(|lane| 1 << lane),
            Special::LanesFrom => by_lane(|lane| u32::MAX << lane),
            Special::LanesAbove => by_lane(|lane| u32::MAX << lane << 1),
            Special::Clock => [self.executed as u32; WARP],
            Special::DynamicShared => [dynamic_shared as u32; WARP],
            Special::TotalShared => [context.memory.shared.len() as u32; WARP],
        }
    }
}
