//! From statements to instructions: which operation an opcode is, and whether its operands are what that operation takes.
//!
//! What only computes is looked up in [`compute`](crate::compute), what matrix units do in [`matrix`](crate::matrix), copies that go
//! on by themselves in [`transfer`](crate::transfer); the rest is here.

use crate::compute::{self, Function};
use crate::error::ParseError;
use crate::operand::{Address, Element, Register, Source, Space, Vector};
use crate::parse::{Operand, Parsed, Statement, parse};
use crate::program::{Barrier, BarrierVote, Collective, CollectiveKind, Instruction, Logic, Op, Program};
use crate::windows::{LOCAL_WINDOW, PARAMETER_WINDOW, SHARED_WINDOW};
use crate::{atomic, matrix, transfer, uses};

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
        let Parsed { entry, registers, parameters, static_shared, local, module, .. } = parsed;
        Ok(Self { entry, registers, parameters, static_shared, local, module, code })
    }
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

    /// A predicate that is read.
    fn predicate(&mut self) -> Option<Source> {
        self.source().filter(|source| is_predicate(source) || matches!(source, Source::Constant(_)))
    }

    /// A number that is read.
    fn number(&mut self) -> Option<Source> {
        self.source().filter(|source| !is_predicate(source))
    }

    /// A predicate that is written.
    fn truth(&mut self) -> Option<u32> {
        match self.register()? {
            Register::Predicate(target) => Some(target),
            _ => None,
        }
    }

    /// A register of 32 bits that is written.
    fn word(&mut self) -> Option<Register> {
        self.register().filter(|target| is_of(*target, "b32"))
    }

    /// A register of 32 bits that is written, perhaps with a predicate beside it.
    fn pair(&mut self) -> Option<(Register, Option<u32>)> {
        let (target, predicate) = match self.next()? {
            Operand::Pair(target, predicate) => (*target, Some(*predicate)),
            Operand::Source(Source::Register(target)) => (*target, None),
            _ => return None,
        };
        is_of(target, "b32").then_some((target, predicate))
    }

    /// The number of one of a block's barriers.
    fn barrier(&mut self) -> Option<Source> {
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

/// Words of loads and stores that order them or tell caches what to keep: here memory is in order, and there are no caches.
const HINTS: &str =
    "weak volatile relaxed acquire release acq_rel mmio cta cluster gpu sys nc ca cg cs lu cv wb wt unified";

/// Whether a word of an opcode names a space, a vector, or what is of no effect here.
pub fn is_hint(word: &str) -> bool {
    let is_space = space(&[word]) != Space::Generic;
    HINTS.split(' ').any(|hint| hint == word)
        || is_space
        || vector(&[word]) != Some(1)
        || ["L1::", "L2::"].iter().any(|it| word.starts_with(it))
}

/// How many elements a vector instruction has.
pub fn vector(parts: &[&str]) -> Option<usize> {
    let found = parts.iter().find_map(|part| part.strip_prefix('v')?.parse().ok());
    Some(found.unwrap_or(1)).filter(|count| [1, 2, 4, 8].contains(count))
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

/// Whether a register holds all of an element.
pub fn takes(register: Register, element: Element) -> bool {
    match register {
        Register::Word(_) => element.size < 8,
        Register::Long(_) => true,
        Register::Predicate(_) => false,
    }
}

fn is_predicate(source: &Source) -> bool {
    matches!(source, Source::Not(_) | Source::Register(Register::Predicate(_)))
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

/// Whether a register is of a type's bank.
fn is_of(register: Register, ty: &str) -> bool {
    element(ty)
        .is_some_and(|element| takes(register, element) && (element.size == 8) == matches!(register, Register::Long(_)))
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

fn is_truth(register: Register) -> bool {
    matches!(register, Register::Predicate(_))
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

/// Barriers, shuffles, votes, matches and reductions of a warp.
fn gathered(parts: &[&str], operands: &mut Operands<'_>) -> Option<Op> {
    let has = |word: &str| parts.contains(&word);
    let wait = CollectiveKind::Wait;
    match parts[0] {
        "bar" | "barrier" if !has("warp") && !has("cluster") => barrier(parts, operands),
        "bar" if parts[1..] == ["warp", "sync"] => collective(wait, None, None, None, operands),
        "shfl" if has("sync") && parts.last() == Some(&"b32") => shuffled(parts, operands),
        "vote" if has("sync") => voted(parts, operands),
        "match" if has("sync") && ["b32", "b64"].contains(parts.last()?) => matched(parts, operands),
        "activemask" => {
            let (kind, target, sources) =
                (CollectiveKind::ActiveMask, Some(operands.word()?), [Source::Constant(0); 3]);
            let collective = Collective { kind, target, predicate: None, sources, members: None };
            Some(Op::Collective(Box::new(collective)))
        }
        "elect" => elected(operands),
        "redux" if has("sync") => reduced(parts, operands),
        _ => None,
    }
}

/// What lanes do together, with one operand or none; which lanes they are is what is left to read.
fn collective(
    kind: CollectiveKind,
    target: Option<Register>,
    predicate: Option<u32>,
    source: Option<Source>,
    operands: &mut Operands<'_>,
) -> Option<Op> {
    let none = Source::Constant(0);
    let (sources, members) = ([source.unwrap_or(none), none, none], Some(operands.number()?));
    Some(Op::Collective(Box::new(Collective { kind, target, predicate, sources, members })))
}

/// `shfl.sync`
fn shuffled(parts: &[&str], operands: &mut Operands<'_>) -> Option<Op> {
    let kind = match *parts.get(2)? {
        "up" => CollectiveKind::ShuffleUp,
        "down" => CollectiveKind::ShuffleDown,
        "bfly" => CollectiveKind::ShuffleXor,
        "idx" => CollectiveKind::ShuffleIndex,
        _ => return None,
    };
    let (target, predicate) = operands.pair()?;
    let sources = [operands.number()?, operands.number()?, operands.number()?];
    let (target, members) = (Some(target), Some(operands.number()?));
    Some(Op::Collective(Box::new(Collective { kind, target, predicate, sources, members })))
}

/// `vote.sync`
fn voted(parts: &[&str], operands: &mut Operands<'_>) -> Option<Op> {
    let (kind, ty) = match *parts.get(2)? {
        "all" => (CollectiveKind::VoteAll, "pred"),
        "any" => (CollectiveKind::VoteAny, "pred"),
        "uni" => (CollectiveKind::VoteUniform, "pred"),
        "ballot" => (CollectiveKind::VoteBallot, "b32"),
        _ => return None,
    };
    let target = operands.register()?;
    let fits = parts.last() == Some(&ty) && (if ty == "pred" { is_truth(target) } else { is_of(target, ty) });
    let source = operands.predicate().filter(|_| fits)?;
    collective(kind, Some(target), None, Some(source), operands)
}

/// `match.sync`
fn matched(parts: &[&str], operands: &mut Operands<'_>) -> Option<Op> {
    let (target, predicate) = operands.pair()?;
    let kind = match *parts.get(1)? {
        "all" => CollectiveKind::MatchAll,
        "any" if predicate.is_none() => CollectiveKind::MatchAny,
        _ => return None,
    };
    let source = operands.number()?;
    collective(kind, Some(target), predicate, Some(source), operands)
}

/// `elect.sync`
fn elected(operands: &mut Operands<'_>) -> Option<Op> {
    let (target, predicate) = match operands.next()? {
        Operand::Pair(target, predicate) => (Some(*target), *predicate),
        both => (None, second(both)?),
    };
    collective(CollectiveKind::Elect, target, Some(predicate), None, operands)
}

/// The predicate of `_|p`.
fn second(operand: &Operand) -> Option<u32> {
    let Operand::Vector(both) = operand else { return None };
    match both.as_slice() {
        [Operand::Nowhere, Operand::Source(Source::Register(Register::Predicate(second)))] => Some(*second),
        _ => None,
    }
}

/// `redux.sync`
fn reduced(parts: &[&str], operands: &mut Operands<'_>) -> Option<Op> {
    let kind = match (*parts.get(2)?, *parts.last()?) {
        ("add", "s32" | "u32") => CollectiveKind::ReduceAdd,
        ("min", "s32") => CollectiveKind::ReduceMinSigned,
        ("min", "u32") => CollectiveKind::ReduceMinUnsigned,
        ("max", "s32") => CollectiveKind::ReduceMaxSigned,
        ("max", "u32") => CollectiveKind::ReduceMaxUnsigned,
        ("and", "b32") => CollectiveKind::ReduceAnd,
        ("or", "b32") => CollectiveKind::ReduceOr,
        ("xor", "b32") => CollectiveKind::ReduceXor,
        _ => return None,
    };
    let (target, source) = (operands.word()?, operands.number()?);
    collective(kind, Some(target), None, Some(source), operands)
}

/// `bar` and `barrier` of a block's warps.
fn barrier(parts: &[&str], operands: &mut Operands<'_>) -> Option<Op> {
    let has = |word: &str| parts.contains(&word);
    if has("red") {
        let kind = match (has("popc"), has("and"), has("or")) {
            (true, ..) => BarrierVote::Count,
            (_, true, _) => BarrierVote::All,
            (_, _, true) => BarrierVote::Any,
            _ => return None,
        };
        let target = operands.register().filter(|target| is_truth(*target) == (kind != BarrierVote::Count))?;
        let number = operands.barrier()?;
        let threads = if operands.0.len() > 1 { Some(operands.number()?) } else { None };
        let vote = Some((kind, target, operands.predicate()?));
        return Some(Op::Barrier(Barrier { number, threads, waits: true, vote }));
    }
    let waits = match (has("sync"), has("arrive")) {
        (true, _) => true,
        (_, true) => false,
        _ => return None,
    };
    let (number, threads) = (operands.barrier()?, operands.optional()?);
    (waits || threads.is_some()).then_some(Op::Barrier(Barrier { number, threads, waits, vote: None }))
}
