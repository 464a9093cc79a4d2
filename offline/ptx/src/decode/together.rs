//! Which barrier, shuffle, vote, match or reduction of a warp an opcode is.

use super::reader::{Operands, second};
use crate::operand::{Register, Source};
use crate::parse::opcode::{is_of, is_truth};
use crate::parse::statement::Operand;
use crate::program::{Barrier, BarrierVote, Collective, CollectiveKind, Op};

/// Barriers, shuffles, votes, matches and reductions of a warp.
pub fn decode(parts: &[&str], operands: &mut Operands<'_>) -> Option<Op> {
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
