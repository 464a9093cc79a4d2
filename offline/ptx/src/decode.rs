//! From statements to instructions: which operation an opcode is, and whether its operands are what that operation takes.
//!
//! What only computes is looked up in [`compute`](crate::compute), what matrix units do in [`matrix`](crate::matrix), copies that go
//! on by themselves in [`transfer`](crate::transfer); the rest is here.

use std::collections::HashMap;

use crate::compute::{self, Function};
use crate::error::ParseError;
use crate::parse::{LOCAL_WINDOW, Operand, PARAMETER_WINDOW, Parsed, SHARED_WINDOW, Statement, parse};
use crate::program::{
    Address, Barrier, BarrierVote, Collective, CollectiveKind, Element, Instruction, Logic, Op, Program, Register,
    Source, Space, Vector,
};
use crate::{atomic, matrix, transfer};

impl Program {
    /// Reads a kernel.
    ///
    /// # Errors
    /// What is not PTX, and the first instruction that is not known.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let parsed = parse(text)?;
        let uses = uses(&parsed.statements);
        let code = parsed
            .statements
            .iter()
            .map(|statement| {
                let unknown = || ParseError::Unknown { line: statement.at, instruction: shown(statement) };
                let mut op = decode(statement, &parsed).ok_or_else(unknown)?;
                if let Op::Atomic(atomic) = &mut op {
                    // A result that is named here alone is asked for by nobody.
                    let unread = |target: &Option<Register>| target.is_none_or(|it| uses.get(&it) == Some(&1));
                    if atomic.targets.iter().all(unread) {
                        atomic.targets = Box::new([]);
                    }
                }
                let opcode = statement.opcode.as_str().into();
                Ok(Instruction { guard: statement.guard, op, opcode, line: statement.line })
            })
            .collect::<Result<_, _>>()?;
        let Parsed { entry, registers, parameters, static_shared, local, module, .. } = parsed;
        Ok(Self { entry, registers, parameters, static_shared, local, module, code })
    }
}

/// How often each register is named.
fn uses(statements: &[Statement]) -> HashMap<Register, usize> {
    fn count(operand: &Operand, uses: &mut HashMap<Register, usize>) {
        let mut add = |register| *uses.entry(register).or_default() += 1;
        match operand {
            Operand::Source(Source::Register(register)) => add(*register),
            Operand::Source(Source::Not(register)) => add(Register::Predicate(*register)),
            Operand::Pair(first, second) => {
                add(*first);
                add(Register::Predicate(*second));
            }
            Operand::Address { base: Some(base), .. } => add(*base),
            Operand::Vector(all) => all.iter().for_each(|operand| count(operand, uses)),
            _ => {}
        }
    }
    let mut uses = HashMap::new();
    statements.iter().flat_map(|statement| &statement.operands).for_each(|operand| count(operand, &mut uses));
    uses
}

/// An instruction that is not known, in words.
fn shown(statement: &Statement) -> String {
    format!("{} with {} operands", statement.opcode, statement.operands.len())
}

/// A statement's operands, read one kind after the other.
pub struct Operands<'a>(pub &'a [Operand]);

impl<'a> Operands<'a> {
    fn next(&mut self) -> Option<&'a Operand> {
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

    fn label(&mut self) -> Option<&'a str> {
        match self.next()? {
            Operand::Label(name) => Some(name),
            _ => None,
        }
    }
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
        "brx" => {
            let index = operands.source()?;
            let labels = parsed.tables.get(operands.label()?)?;
            let targets = labels.iter().map(|label| parsed.labels.get(label).copied()).collect::<Option<_>>()?;
            Some(Op::BranchTable(index, targets))
        }
        "mov" => moved(operands),
        "ld" | "ldu" => {
            let space = space(parts);
            let (targets, address) = (operands.targets()?, operands.address()?);
            let element = element(parts.last()?)?;
            loaded(&targets, vector(parts)?).then_some(Op::Load(space, element, targets, address))
        }
        "st" => {
            let (address, sources) = (operands.address()?, operands.sources()?);
            let element = element(parts.last()?)?;
            (sources.len() == vector(parts)?).then_some(Op::Store(space(parts), element, sources, address))
        }
        "atom" | "red" if parts.get(1) != Some(&"async") => {
            atomic::decode(parts, operands).map(|it| Op::Atomic(Box::new(it)))
        }
        "cvta" => {
            let (target, source) = (operands.register()?, operands.source()?);
            let window = match space(parts) {
                Space::Global => 0,
                Space::Shared => SHARED_WINDOW,
                Space::Local => LOCAL_WINDOW,
                Space::Parameter => PARAMETER_WINDOW,
                Space::Constant | Space::Generic => return None,
            };
            Some(Op::Convert(target, source, if has("to") { window.wrapping_neg() } else { window }))
        }
        "isspacep" => match operands.register()? {
            Register::Predicate(target) => Some(Op::Within(target, operands.source()?, space(parts))),
            _ => None,
        },
        "selp" => Some(Op::Select(operands.register()?, operands.source()?, operands.source()?, operands.source()?)),
        "and" | "or" | "xor" | "not" if has("pred") => logic(parts[0], operands),
        "setp" => compared(parts, operands),
        "bar" | "barrier" | "shfl" | "vote" | "match" | "activemask" | "redux" | "elect" => gathered(parts, operands),
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

/// How many elements a vector instruction has.
fn vector(parts: &[&str]) -> Option<usize> {
    let found = parts.iter().find_map(|part| part.strip_prefix('v')?.parse().ok());
    Some(found.unwrap_or(1)).filter(|count| [1, 2, 4, 8].contains(count))
}

fn loaded(targets: &Vector, count: usize) -> bool {
    targets.len() == count && !targets.iter().any(|it| matches!(it, Some(Register::Predicate(_))))
}

/// The space that an opcode names.
pub fn space(parts: &[&str]) -> Space {
    let found = parts.iter().find_map(|part| match part.split("::").next()? {
        "global" => Some(Space::Global),
        "shared" => Some(Space::Shared),
        "local" => Some(Space::Local),
        "param" => Some(Space::Parameter),
        "const" => Some(Space::Constant),
        _ => None,
    });
    found.unwrap_or(Space::Generic)
}

/// The element that a type names.
pub fn element(ty: &str) -> Option<Element> {
    let size = match ty {
        "b8" | "u8" | "s8" => 1,
        "b16" | "u16" | "s16" | "f16" | "bf16" => 2,
        "b32" | "u32" | "s32" | "f32" | "f16x2" | "bf16x2" => 4,
        "b64" | "u64" | "s64" | "f64" => 8,
        _ => return None,
    };
    Some(Element { size, signed: ty.starts_with('s') })
}

/// `mov`: of a register, of a predicate, of numbers side by side.
fn moved(operands: &mut Operands<'_>) -> Option<Op> {
    match operands.0 {
        [Operand::Vector(_), _] => Some(Op::Unpack(operands.targets()?, operands.source()?)),
        [_, Operand::Vector(_)] => Some(Op::Pack(operands.register()?, operands.sources()?)),
        _ => match operands.register()? {
            Register::Predicate(target) => {
                Some(Op::Logic(Logic::First, target, operands.source()?, Source::Constant(0)))
            }
            target => Some(Op::Move(target, operands.source()?)),
        },
    }
}

fn logic(name: &str, operands: &mut Operands<'_>) -> Option<Op> {
    let Register::Predicate(target) = operands.register()? else { return None };
    let first = operands.source()?;
    let (kind, second) = match name {
        "and" => (Logic::And, operands.source()?),
        "or" => (Logic::Or, operands.source()?),
        "xor" => (Logic::Xor, operands.source()?),
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
        _ => return None,
    };
    let sources = [operands.source()?, operands.source()?, Source::Constant(0), Source::Constant(0)];
    let join = match join {
        Some(logic) => Some((logic, operands.source()?)),
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
        *source = operands.source()?;
    }
    if let Register::Predicate(target) = target {
        let (target, opposite, join) = (Some(target), None, None);
        return Some(Op::Compare { function, target, opposite, join, sources });
    }
    fits(function, target).then_some(Op::Compute { function, target, sources })
}

fn fits(function: Function, target: Register) -> bool {
    use Function as F;
    match function {
        F::W(_) | F::WW(_) | F::WWW(_) | F::WWWW(_) | F::WofL(_) | F::WofLL(_) => matches!(target, Register::Word(_)),
        F::PofW(_) | F::PofWW(_) | F::PofL(_) | F::PofLL(_) => false,
        _ => matches!(target, Register::Long(_)),
    }
}

fn arity(function: Function) -> usize {
    use Function as F;
    match function {
        F::W(_) | F::WofL(_) | F::L(_) | F::LofW(_) | F::PofW(_) | F::PofL(_) => 1,
        F::WW(_) | F::LL(_) | F::WofLL(_) | F::LofLW(_) | F::LofWW(_) | F::PofWW(_) | F::PofLL(_) => 2,
        F::WWW(_) | F::LLL(_) | F::LofLLW(_) | F::LofLWW(_) | F::LofWWL(_) => 3,
        F::WWWW(_) | F::LofLLWW(_) => 4,
    }
}

/// Barriers, shuffles, votes, matches and reductions of a warp.
fn gathered(parts: &[&str], operands: &mut Operands<'_>) -> Option<Op> {
    use CollectiveKind as Kind;
    let has = |word: &str| parts.contains(&word);
    let none = Source::Constant(0);
    let collective = |kind, target, predicate, sources, members| {
        Some(Op::Collective(Box::new(Collective { kind, target, predicate, sources, members })))
    };
    match parts[0] {
        "bar" if has("warp") => collective(Kind::Wait, None, None, [none; 3], Some(operands.source()?)),
        "bar" | "barrier" if !has("cluster") => barrier(parts, operands),
        "shfl" if has("sync") => {
            let kind = match *parts.get(2)? {
                "up" => Kind::ShuffleUp,
                "down" => Kind::ShuffleDown,
                "bfly" => Kind::ShuffleXor,
                "idx" => Kind::ShuffleIndex,
                _ => return None,
            };
            let (target, predicate) = match operands.next()? {
                Operand::Pair(target, predicate) => (*target, Some(*predicate)),
                Operand::Source(Source::Register(target)) => (*target, None),
                _ => return None,
            };
            let sources = [operands.source()?, operands.source()?, operands.source()?];
            collective(kind, Some(target), predicate, sources, Some(operands.source()?))
        }
        "vote" if has("sync") => {
            let kind = match *parts.get(2)? {
                "all" => Kind::VoteAll,
                "any" => Kind::VoteAny,
                "uni" => Kind::VoteUniform,
                "ballot" => Kind::VoteBallot,
                _ => return None,
            };
            let (target, source) = (operands.register()?, operands.source()?);
            collective(kind, Some(target), None, [source, none, none], Some(operands.source()?))
        }
        "match" if has("sync") => {
            let kind = if has("all") { Kind::MatchAll } else { Kind::MatchAny };
            let (target, predicate) = match operands.next()? {
                Operand::Pair(target, predicate) => (*target, Some(*predicate)),
                Operand::Source(Source::Register(target)) => (*target, None),
                _ => return None,
            };
            let source = operands.source()?;
            collective(kind, Some(target), predicate, [source, none, none], Some(operands.source()?))
        }
        "activemask" => collective(Kind::ActiveMask, Some(operands.register()?), None, [none; 3], None),
        "elect" => {
            let (target, predicate) = match operands.next()? {
                Operand::Pair(target, predicate) => (Some(*target), *predicate),
                Operand::Source(Source::Register(Register::Predicate(predicate))) => (None, *predicate),
                _ => return None,
            };
            collective(Kind::Elect, target, Some(predicate), [none; 3], Some(operands.source()?))
        }
        "redux" if has("sync") => {
            let signed = has("s32");
            let kind = match (*parts.get(2)?, signed) {
                ("add", _) => Kind::ReduceAdd,
                ("min", true) => Kind::ReduceMinSigned,
                ("min", false) => Kind::ReduceMinUnsigned,
                ("max", true) => Kind::ReduceMaxSigned,
                ("max", false) => Kind::ReduceMaxUnsigned,
                ("and", _) => Kind::ReduceAnd,
                ("or", _) => Kind::ReduceOr,
                ("xor", _) => Kind::ReduceXor,
                _ => return None,
            };
            if !["s32", "u32", "b32"].contains(parts.last()?) {
                return None;
            }
            let (target, source) = (operands.register()?, operands.source()?);
            collective(kind, Some(target), None, [source, none, none], Some(operands.source()?))
        }
        _ => None,
    }
}

fn barrier(parts: &[&str], operands: &mut Operands<'_>) -> Option<Op> {
    let has = |word: &str| parts.contains(&word);
    if has("red") {
        let kind = match (has("popc"), has("and"), has("or")) {
            (true, ..) => BarrierVote::Count,
            (_, true, _) => BarrierVote::All,
            (_, _, true) => BarrierVote::Any,
            _ => return None,
        };
        let (target, number) = (operands.register()?, operands.source()?);
        let threads = if operands.0.len() > 1 { Some(operands.source()?) } else { None };
        let vote = Some((kind, target, operands.source()?));
        return Some(Op::Barrier(Barrier { number, threads, waits: true, vote }));
    }
    let waits = match (has("sync"), has("arrive")) {
        (true, _) => true,
        (_, true) => false,
        _ => return None,
    };
    Some(Op::Barrier(Barrier { number: operands.source()?, threads: operands.optional()?, waits, vote: None }))
}
