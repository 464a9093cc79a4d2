//! Which copy, or which operation on a barrier in shared memory, an opcode is. Modifiers that only hint or order memory, which is in order here, are read over.

use super::reader::Operands;
use crate::operand::{Register, Source, Space};
use crate::parse::opcode::space;
use crate::program::transfer::{Arrival, BulkForm, CopyForm, Group, Place, Sign, Transfer};

/// Modifiers without effect here: one block is a cluster of its own.
const ORDER: [&str; 7] = ["release", "acquire", "relaxed", "cta", "cluster", "shared::cluster", "shared::cta"];

/// The instruction that an opcode names.
pub fn decode(parts: &[&str], operands: &mut Operands<'_>) -> Option<Transfer> {
    match parts {
        ["cp", "async", "bulk", "commit_group"] => Some(Transfer::Commit(Group::Bulk)),
        ["cp", "async", "bulk", "wait_group"] | ["cp", "async", "bulk", "wait_group", "read"] => {
            Some(Transfer::Wait(Group::Bulk, constant(operands)?))
        }
        ["cp", "async", "bulk", rest @ ..] => bulk(rest, operands),
        ["cp", "async", "commit_group"] => Some(Transfer::Commit(Group::Small)),
        ["cp", "async", "wait_group"] => Some(Transfer::Wait(Group::Small, constant(operands)?)),
        ["cp", "async", "wait_all"] => Some(Transfer::WaitAll),
        ["cp", "async", "mbarrier", "arrive", rest @ .., "b64"] => {
            let (counted, rest) = rest.strip_prefix(&["noinc"]).map_or((false, rest), |rest| (true, rest));
            let known = rest.iter().all(|part| ["shared", "shared::cta"].contains(part));
            known.then_some(Transfer::ArriveAfter(barrier(rest, operands)?, counted))
        }
        ["cp", "async", rest @ ..] => copy(rest, operands),
        ["mbarrier", name, rest @ .., "b64"] => of_barrier(name, rest, operands),
        _ => None,
    }
}

fn constant(operands: &mut Operands<'_>) -> Option<u32> {
    match operands.source()? {
        Source::Constant(number) => u32::try_from(number).ok(),
        _ => None,
    }
}

fn place(space: Space, operands: &mut Operands<'_>) -> Option<Place> {
    Some(Place { space, address: operands.address()? })
}

/// A barrier: a generic address of one is one in shared memory too.
fn barrier(parts: &[&str], operands: &mut Operands<'_>) -> Option<Place> {
    place(space(parts), operands)
}

/// `cp.async.ca.shared.global [to], [from], 16, read, policy`
fn copy(parts: &[&str], operands: &mut Operands<'_>) -> Option<Transfer> {
    let hints = parts.iter().filter(|part| part.starts_with("L2::")).count();
    let plain: Vec<&str> = parts.iter().copied().filter(|part| !part.starts_with("L2::")).collect();
    let kept_close = match *plain.as_slice() {
        [level @ ("ca" | "cg"), "shared" | "shared::cta", "global"] => level == "ca",
        _ => return None,
    };
    let (to, from) = (place(Space::Shared, operands)?, place(Space::Global, operands)?);
    let size = constant(operands)? as usize;
    if hints > 0 && parts.contains(&"L2::cache_hint") {
        operands.0 = operands.0.split_last()?.1;
    }
    let read = operands.optional()?;
    let known = size == 16 || kept_close && [4, 8].contains(&size);
    known.then_some(Transfer::Copy(CopyForm { to, from, size, read }))
}

/// `cp.async.bulk` along one dimension, with what follows that name.
fn bulk(parts: &[&str], operands: &mut Operands<'_>) -> Option<Transfer> {
    let hint = parts.last() == Some(&"L2::cache_hint");
    let parts = if hint { &parts[..parts.len() - 1] } else { parts };
    let (to, from, counted) = match parts {
        ["shared::cluster" | "shared::cta", "global", "mbarrier::complete_tx::bytes"] => {
            (Space::Shared, Space::Global, true)
        }
        ["shared::cluster", "shared::cta", "mbarrier::complete_tx::bytes"] => (Space::Shared, Space::Shared, true),
        ["global", "shared::cta", "bulk_group"] => (Space::Global, Space::Shared, false),
        _ => return None,
    };
    let (to, from, size) = (place(to, operands)?, place(from, operands)?, operands.source()?);
    let barrier = if counted { Some(place(Space::Shared, operands)?) } else { None };
    if hint {
        operands.source()?;
    }
    Some(Transfer::Bulk(BulkForm { to, from, size, barrier }))
}

/// `mbarrier`, with what stands between its name and its type.
fn of_barrier(name: &str, parts: &[&str], operands: &mut Operands<'_>) -> Option<Transfer> {
    let has = |word: &str| parts.contains(&word);
    let known = |own: &[&str]| parts.iter().all(|part| *part == "shared" || ORDER.contains(part) || own.contains(part));
    match name {
        "init" if known(&[]) => Some(Transfer::Init(barrier(parts, operands)?, operands.source()?)),
        "inval" if known(&[]) => Some(Transfer::Invalidate(barrier(parts, operands)?)),
        "arrive" | "arrive_drop" if known(&["expect_tx", "noComplete"]) => {
            let (target, place, last) = (operands.target()?, barrier(parts, operands)?, operands.optional()?);
            let (count, expected) = if has("expect_tx") { (None, Some(last?)) } else { (last, None) };
            Some(Transfer::Arrive(Arrival { target, place, count, expected, drops: name == "arrive_drop" }))
        }
        "expect_tx" | "complete_tx" if known(&[]) => {
            let sign = if name == "expect_tx" { Sign::Expect } else { Sign::Complete };
            Some(Transfer::Bytes(barrier(parts, operands)?, operands.source()?, sign))
        }
        "test_wait" | "try_wait" if known(&["parity"]) => {
            let Register::Predicate(target) = operands.register()? else { return None };
            let (place, phase) = (barrier(parts, operands)?, operands.source()?);
            if name == "try_wait" {
                // For how long it may wait.
                operands.optional()?;
            }
            Some(Transfer::Test { target, place, phase, parity: has("parity") })
        }
        "pending_count" if parts.is_empty() => Some(Transfer::Pending(operands.register()?, operands.source()?)),
        _ => None,
    }
}
