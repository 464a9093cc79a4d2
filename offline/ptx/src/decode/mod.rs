//! From statements to instructions: which operation an opcode is, and whether its operands are what that operation takes.
//!
//! What only computes is looked up in [`compute`]. Atomic operations, what lanes and warps do together, matrix units
//! and copies that go on by themselves have files of their own; the rest is here.

mod atomic;
mod matrix;
mod reader;
mod together;
mod transfer;
mod uses;

use self::reader::{Operands, second};
use crate::compute::{self, Function};
use crate::error::ParseError;
use crate::operand::{Register, Source, Space};
use crate::parse::opcode::{element, is_hint, is_of, is_predicate, is_truth, space, takes, vector};
use crate::parse::parse;
use crate::parse::statement::{Operand, Parsed, Statement};
use crate::program::{Instruction, Logic, Op, Program};
use crate::windows::{LOCAL_WINDOW, PARAMETER_WINDOW, SHARED_WINDOW};

impl Program {
    /// Reads a kernel.
    ///
    /// # Errors
    /// What is not PTX, and the first instruction that is not known.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let parsed = parse(text)?;
        let counts = uses::counts(&parsed.statements);
        let code = parsed
            .statements
            .iter()
            .map(|statement| {
                let unknown = || ParseError::Unknown { line: statement.at, instruction: shown(statement) };
                let mut op = decode(statement, &parsed).ok_or_else(unknown)?;
                if let Op::Atomic(atomic) = &mut op {
                    // A result that is named here alone is asked for by nobody.
                    let unread = |target: &Option<Register>| target.is_none_or(|it| counts.get(&it) == Some(&1));
                    if atomic.targets.iter().all(unread) {
                        atomic.targets = Box::new([]);
                    }
                }
                let opcode = statement.opcode.as_str().into();
                let (reads, writes) = uses::registers(statement);
                Ok(Instruction {
                    guard: statement.guard,
                    op,
                    opcode,
                    line: statement.line,
                    used: statement.used,
                    reads,
                    writes,
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { code, ..parsed.program })
    }
}

/// An instruction that is not known, in words.
fn shown(statement: &Statement) -> String {
    format!("{} with {} operands", statement.opcode, statement.operands.len())
}

/// The instruction of a statement; None where it is not known.
fn decode(statement: &Statement, parsed: &Parsed) -> Option<Op> {
    let parts: Vec<&str> = statement.opcode.split('.').collect();
    let mut operands = Operands(&statement.operands);
    let op = of(&parts, statement, &mut operands, parsed)?;
    operands.done().then_some(op)
}

fn of(parts: &[&str], statement: &Statement, operands: &mut Operands<'_>, parsed: &Parsed) -> Option<Op> {
    let has = |word: &str| parts.contains(&word);
    match parts[0] {
        "ret" | "exit" => Some(Op::Exit),
        "trap" => Some(Op::Trap),
        "bra" => parsed.labels.get(operands.label()?).map(|at| Op::Branch(*at)),
        "brx" if has("idx") => {
            let index = operands.number()?;
            let labels = parsed.tables.get(operands.label()?)?;
            let targets = labels.iter().map(|label| parsed.labels.get(label).copied()).collect::<Option<_>>()?;
            Some(Op::BranchTable(index, targets))
        }
        "mov" => moved(parts, operands),
        "ld" | "ldu" | "st" => transferred(parts, operands),
        "atom" | "red" if parts.get(1) != Some(&"async") => {
            atomic::decode(parts, operands).map(|it| Op::Atomic(Box::new(it)))
        }
        "cvta" => converted(parts, operands),
        "isspacep" => {
            let space = Some(space(parts)).filter(|space| *space != Space::Generic)?;
            Some(Op::Within(operands.truth()?, operands.number()?, space))
        }
        "selp" => selected(parts, operands),
        "and" | "or" | "xor" | "not" if parts[1..] == ["pred"] => logic(parts[0], operands),
        "setp" => compared(parts, operands),
        "bar" | "barrier" | "shfl" | "vote" | "match" | "activemask" | "redux" | "elect" => {
            together::decode(parts, operands)
        }
        "membar" | "fence" | "prefetch" | "prefetchu" | "nanosleep" | "griddepcontrol" | "discard"
        | "applypriority" => {
            operands.0 = &[];
            Some(Op::Nothing)
        }
        "wmma" | "mma" | "ldmatrix" | "stmatrix" | "movmatrix" => {
            matrix::decode(parts, operands).map(|it| Op::Matrix(Box::new(it)))
        }
        "cp" | "mbarrier" => transfer::decode(parts, operands).map(|it| Op::Transfer(Box::new(it))),
        _ => computed(&statement.opcode, operands),
    }
}

/// `ld` and `st`. Registers may be wider than what is in memory.
fn transferred(parts: &[&str], operands: &mut Operands<'_>) -> Option<Op> {
    let (ty, words) = parts[1..].split_last()?;
    let (space, element, count) = (space(parts), element(ty)?, vector(parts)?);
    let known = words.iter().all(|word| is_hint(word)) && usize::from(element.size) * count <= 32;
    operands.skip_policy(words);
    if parts[0] != "st" {
        let (targets, address) = (operands.targets()?, operands.address()?);
        let fits = targets.iter().flatten().all(|target| takes(*target, element));
        return (known && fits && targets.len() == count).then_some(Op::Load(space, element, targets, address));
    }
    let (address, sources) = (operands.address()?, operands.sources()?);
    let fits = sources.iter().all(|source| match source {
        Source::Register(register) => takes(*register, element),
        source => !is_predicate(source),
    });
    let written = !matches!(space, Space::Parameter | Space::Constant);
    (known && fits && written && sources.len() == count).then_some(Op::Store(space, element, sources, address))
}

/// `cvta`, of registers of 64 bits.
fn converted(parts: &[&str], operands: &mut Operands<'_>) -> Option<Op> {
    let target = operands.register().filter(|target| matches!(target, Register::Long(_)))?;
    let window = match space(parts) {
        Space::Global => 0,
        Space::Shared => SHARED_WINDOW,
        Space::Local => LOCAL_WINDOW,
        Space::Parameter => PARAMETER_WINDOW,
        Space::Constant | Space::Generic => return None,
    };
    Some(Op::Convert(target, operands.number()?, if parts.contains(&"to") { window.wrapping_neg() } else { window }))
}

/// `selp`
fn selected(parts: &[&str], operands: &mut Operands<'_>) -> Option<Op> {
    let target = operands.register()?;
    let fits = parts.len() == 2 && is_of(target, parts[1]);
    let (yes, no, predicate) = (operands.number()?, operands.number()?, operands.predicate()?);
    fits.then_some(Op::Select(target, yes, no, predicate))
}

/// `mov`: of a register, of a predicate, of numbers side by side.
fn moved(parts: &[&str], operands: &mut Operands<'_>) -> Option<Op> {
    let [_, ty] = parts else { return None };
    match operands.0 {
        [Operand::Vector(_), _] => {
            let (targets, source) = (operands.targets()?, operands.source()?);
            let Source::Register(whole) = source else { return None };
            let known = parted(ty, whole, targets.len()) && !targets.iter().flatten().any(|it| is_truth(*it));
            known.then_some(Op::Unpack(targets, source))
        }
        [_, Operand::Vector(_)] => {
            let (target, sources) = (operands.register()?, operands.sources()?);
            let known = parted(ty, target, sources.len()) && !sources.iter().any(is_predicate);
            known.then_some(Op::Pack(target, sources))
        }
        _ if *ty == "pred" => {
            Some(Op::Logic(Logic::First, operands.truth()?, operands.predicate()?, Source::Constant(0)))
        }
        _ => {
            let (target, source) = (operands.register()?, operands.number()?);
            is_of(target, ty).then_some(Op::Move(target, source))
        }
    }
}

/// Whether numbers of this type are made of so many parts.
fn parted(ty: &str, whole: Register, parts: usize) -> bool {
    ["b32", "b64"].contains(&ty) && is_of(whole, ty) && [2, 4].contains(&parts)
}

fn logic(name: &str, operands: &mut Operands<'_>) -> Option<Op> {
    let (target, first) = (operands.truth()?, operands.predicate()?);
    let (kind, second) = match name {
        "and" => (Logic::And, operands.predicate()?),
        "or" => (Logic::Or, operands.predicate()?),
        "xor" => (Logic::Xor, operands.predicate()?),
        _ => (Logic::Not, Source::Constant(0)),
    };
    Some(Op::Logic(kind, target, first, second))
}

/// `setp`, joined with another predicate or not.
fn compared(parts: &[&str], operands: &mut Operands<'_>) -> Option<Op> {
    let join = parts.iter().find_map(|part| match *part {
        "and" => Some(Logic::And),
        "or" => Some(Logic::Or),
        "xor" => Some(Logic::Xor),
        _ => None,
    });
    let plain: Vec<&str> = parts.iter().copied().filter(|part| !["and", "or", "xor"].contains(part)).collect();
    let function = compute::find(&plain.join("."))?;
    let (target, opposite) = match operands.next()? {
        Operand::Pair(Register::Predicate(target), opposite) => (Some(*target), Some(*opposite)),
        Operand::Source(Source::Register(Register::Predicate(target))) => (Some(*target), None),
        Operand::Nowhere => (None, None),
        both => (None, Some(second(both)?)),
    };
    let sources = [operands.number()?, operands.number()?, Source::Constant(0), Source::Constant(0)];
    let join = match join {
        Some(logic) => Some((logic, operands.predicate()?)),
        None => None,
    };
    Some(Op::Compare { function, target, opposite, join, sources })
}

/// What only computes.
fn computed(opcode: &str, operands: &mut Operands<'_>) -> Option<Op> {
    let function = compute::find(opcode)?;
    let target = operands.register()?;
    let mut sources = [Source::Constant(0); 4];
    for source in &mut sources[..arity(function)] {
        *source = operands.number()?;
    }
    fits(function, target).then_some(match target {
        Register::Predicate(target) => {
            Op::Compare { function, target: Some(target), opposite: None, join: None, sources }
        }
        target => Op::Compute { function, target, sources },
    })
}

fn fits(function: Function, target: Register) -> bool {
    use Function as F;
    match function {
        F::W(_) | F::WW(_) | F::WWW(_) | F::WWWW(_) | F::WofL(_) => matches!(target, Register::Word(_)),
        F::PofW(_) | F::PofWW(_) | F::PofL(_) | F::PofLL(_) => is_truth(target),
        _ => matches!(target, Register::Long(_)),
    }
}

fn arity(function: Function) -> usize {
    use Function as F;
    match function {
        F::W(_) | F::WofL(_) | F::L(_) | F::LofW(_) | F::PofW(_) | F::PofL(_) => 1,
        F::WW(_) | F::LL(_) | F::LofLW(_) | F::LofWW(_) | F::PofWW(_) | F::PofLL(_) => 2,
        F::WWW(_) | F::LLL(_) | F::LofLLW(_) | F::LofLWW(_) | F::LofWWL(_) => 3,
        F::WWWW(_) | F::LofLLWW(_) => 4,
    }
}
