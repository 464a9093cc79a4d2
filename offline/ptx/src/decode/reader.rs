//! A statement's operands as instructions take them, read one after the other.

use crate::operand::{Address, Register, Source, Vector};
use crate::parse::opcode::{is_of, is_predicate};
use crate::parse::statement::Operand;

/// A statement's operands, read one kind after the other.
pub struct Operands<'a>(pub &'a [Operand]);

impl<'a> Operands<'a> {
    /// The next one.
    pub fn next(&mut self) -> Option<&'a Operand> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    /// Whether all are read.
    pub fn done(&self) -> bool {
        self.0.is_empty()
    }

    /// A register that is written.
    pub fn register(&mut self) -> Option<Register> {
        match self.next()? {
            Operand::Source(Source::Register(register)) => Some(*register),
            _ => None,
        }
    }

    /// A register that is written, or `_`.
    pub fn target(&mut self) -> Option<Option<Register>> {
        match self.next()? {
            Operand::Source(Source::Register(register)) => Some(Some(*register)),
            Operand::Nowhere => Some(None),
            _ => None,
        }
    }

    /// What is read.
    pub fn source(&mut self) -> Option<Source> {
        match self.next()? {
            Operand::Source(source) => Some(*source),
            _ => None,
        }
    }

    /// A predicate that is read.
    pub fn predicate(&mut self) -> Option<Source> {
        self.source().filter(|source| is_predicate(source) || matches!(source, Source::Constant(_)))
    }

    /// A number that is read.
    pub fn number(&mut self) -> Option<Source> {
        self.source().filter(|source| !is_predicate(source))
    }

    /// A predicate that is written.
    pub fn truth(&mut self) -> Option<u32> {
        match self.register()? {
            Register::Predicate(target) => Some(target),
            _ => None,
        }
    }

    /// A register of 32 bits that is written.
    pub fn word(&mut self) -> Option<Register> {
        self.register().filter(|target| is_of(*target, "b32"))
    }

    /// A register of 32 bits that is written, perhaps with a predicate beside it.
    pub fn pair(&mut self) -> Option<(Register, Option<u32>)> {
        let (target, predicate) = match self.next()? {
            Operand::Pair(target, predicate) => (*target, Some(*predicate)),
            Operand::Source(Source::Register(target)) => (*target, None),
            _ => return None,
        };
        is_of(target, "b32").then_some((target, predicate))
    }

    /// The number of one of a block's barriers.
    pub fn barrier(&mut self) -> Option<Source> {
        self.number().filter(|number| !matches!(number, Source::Constant(16..)))
    }

    /// Reads over how long caches shall keep what is accessed.
    pub fn skip_policy(&mut self, parts: &[&str]) {
        if let (true, [before @ .., _]) = (parts.contains(&"L2::cache_hint"), self.0) {
            self.0 = before;
        }
    }

    /// What is read, where there is one more.
    pub fn optional(&mut self) -> Option<Option<Source>> {
        if self.done() { Some(None) } else { self.source().map(Some) }
    }

    /// A vector of registers that are written, or one alone.
    pub fn targets(&mut self) -> Option<Vector> {
        let target = |operand: &Operand| match operand {
            Operand::Source(Source::Register(register)) => Some(Some(*register)),
            Operand::Nowhere => Some(None),
            _ => None,
        };
        match self.next()? {
            Operand::Vector(all) => all.iter().map(target).collect(),
            one => Some(Box::new([target(one)?])),
        }
    }

    /// A vector of what is read, or one alone.
    pub fn sources(&mut self) -> Option<Box<[Source]>> {
        let source = |operand: &Operand| match operand {
            Operand::Source(source) => Some(*source),
            _ => None,
        };
        match self.next()? {
            Operand::Vector(all) => all.iter().map(source).collect(),
            one => Some(Box::new([source(one)?])),
        }
    }

    /// A place in memory.
    pub fn address(&mut self) -> Option<Address> {
        match self.next()? {
            Operand::Address { base, offset } => Some(Address { base: *base, offset: *offset }),
            _ => None,
        }
    }

    /// A label's name.
    pub fn label(&mut self) -> Option<&'a str> {
        match self.next()? {
            Operand::Label(name) => Some(name),
            _ => None,
        }
    }
}

/// The predicate of `_|p`.
pub fn second(operand: &Operand) -> Option<u32> {
    let Operand::Vector(both) = operand else { return None };
    match both.as_slice() {
        [Operand::Nowhere, Operand::Source(Source::Register(Register::Predicate(second)))] => Some(*second),
        _ => None,
    }
}
