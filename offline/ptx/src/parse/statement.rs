//! What a kernel's text consists of: statements with their operands, labels and tables of labels.

use std::collections::HashMap;

use crate::operand::{Predicate, Register, Source};
use crate::program::Program;

/// A statement before its instruction is looked up.
#[derive(Debug, Clone, PartialEq)]
pub struct Statement {
    pub guard: Option<Predicate>,
    pub opcode: String,
    pub operands: Vec<Operand>,
    /// Of the source.
    pub line: u32,
    /// Of the PTX.
    pub at: usize,
    /// The bytes of a load that are used, a bit each: NVVM may load more.
    pub used: u32,
}

/// An operand as it is written.
#[derive(Debug, Clone, PartialEq)]
pub enum Operand {
    Source(Source),
    /// `_`, or a number that goes nowhere.
    Nowhere,
    /// `{a, b}`; and `_|b`, of which only the second is written.
    Vector(Vec<Operand>),
    /// `a|b`
    Pair(Register, u32),
    /// `[a+16]`
    Address {
        base: Option<Register>,
        offset: i64,
    },
    /// A label, or a table of labels.
    Label(String),
}

/// A kernel's text, taken apart.
#[derive(Debug, Default)]
pub struct Parsed {
    /// Without its instructions.
    pub program: Program,
    pub statements: Vec<Statement>,
    /// Of each label, the statement that follows it.
    pub labels: HashMap<String, usize>,
    /// Lists of labels to jump to by number.
    pub tables: HashMap<String, Vec<String>>,
}
