//! Which registers a statement reads and which it writes, by its operands alone: PTX names what is written first.

use std::collections::HashMap;

use crate::operand::{Register, Source};
use crate::parse::statement::{Operand, Statement};

/// Registers that a statement reads, its guard among them, and registers that it writes.
pub fn registers(statement: &Statement) -> (Box<[Register]>, Box<[Register]>) {
    let written = usize::from(writes_first(statement)).min(statement.operands.len());
    let (first, others) = statement.operands.split_at(written);
    let mut reads: Vec<Register> = statement.guard.iter().map(|guard| Register::Predicate(guard.register)).collect();
    others.iter().for_each(|operand| each(operand, &mut |register| reads.push(register)));
    let mut writes = Vec::new();
    first.iter().for_each(|operand| each(operand, &mut |register| writes.push(register)));
    (reads.into(), writes.into())
}

/// Whether the first operand is written.
fn writes_first(statement: &Statement) -> bool {
    let mut parts = statement.opcode.split('.');
    match (parts.next(), statement.operands.first()) {
        (_, Some(Operand::Address { .. } | Operand::Label(_)) | None) => false,
        (Some("bar" | "barrier"), _) => parts.any(|part| part == "red"),
        (Some("bra" | "brx" | "cp" | "nanosleep"), _) => false,
        _ => true,
    }
}

/// How often each register is named, guards left out.
pub fn counts(statements: &[Statement]) -> HashMap<Register, usize> {
    let mut counts = HashMap::new();
    let operands = statements.iter().flat_map(|statement| &statement.operands);
    operands.for_each(|operand| each(operand, &mut |register| *counts.entry(register).or_default() += 1));
    counts
}

/// Visits the registers of an operand.
fn each(operand: &Operand, visit: &mut impl FnMut(Register)) {
    match operand {
        Operand::Source(Source::Register(register)) => visit(*register),
        Operand::Source(Source::Not(register)) => visit(Register::Predicate(*register)),
        Operand::Pair(first, second) => {
            visit(*first);
            visit(Register::Predicate(*second));
        }
        Operand::Address { base: Some(base), .. } => visit(*base),
        Operand::Vector(all) => all.iter().for_each(|operand| each(operand, visit)),
        _ => {}
    }
}
