//! Atomic operations and reductions on memory (sections 9.7.13.5 and 9.7.13.6). The lanes of a warp come one after the other, from the
//! first to the last or the other way round.

use half::{bf16, f16};

use crate::access::read;
use crate::decode::{Operands, is_hint, space, takes, vector};
use crate::error::Stop;
use crate::lanes::{Long, Mask, WARP, lanes};
use crate::memory::Kind;
use crate::observe::{At, Observer};
use crate::operand::{Element, Space};
use crate::program::{Atomic, AtomicFunction};
use crate::warp::{Context, Warp};
use crate::windows::is_within;

/// The operation that an opcode names.
pub fn decode(parts: &[&str], operands: &mut Operands<'_>) -> Option<Atomic> {
    use AtomicFunction as F;
    // The type is the last word, or of a vector's form stands before the operation.
    let at = parts.iter().rposition(|word| crate::decode::element(word).is_some())?;
    let (ty, element) = (parts[at], crate::decode::element(parts[at])?);
    let (name, hints) = name_and_hints(&[&parts[1..at], &parts[at + 1..]].concat())?;
    let function = match (name, ty) {
        ("add", "u32" | "s32" | "u64" | "s64") => F::Add,
        ("add", "f32") => F::AddF32,
        ("add", "f64") => F::AddF64,
        ("add", "f16") => F::AddF16,
        ("add", "f16x2") => F::AddF16x2,
        ("add", "bf16") => F::AddBf16,
        ("add", "bf16x2") => F::AddBf16x2,
        ("and", "b32" | "b64") => F::And,
        ("or", "b32" | "b64") => F::Or,
        ("xor", "b32" | "b64") => F::Xor,
        ("exch", "b32" | "b64") if parts[0] == "atom" => F::Exchange,
        ("cas", "b16" | "b32" | "b64") if parts[0] == "atom" => F::CompareAndSwap,
        ("inc", "u32") => F::Increment,
        ("dec", "u32") => F::Decrement,
        ("min", "u32" | "u64") => F::MinUnsigned,
        ("max", "u32" | "u64") => F::MaxUnsigned,
        ("min", "s32" | "s64") => F::MinSigned,
        ("max", "s32" | "s64") => F::MaxSigned,
        _ => return None,
    };
    let (space, count) = (space(&hints), vector(&hints)?);
    operands.skip_policy(&hints);
    let targets = if parts[0] == "red" { Box::new([]) } else { operands.targets()? };
    let (address, mut sources) = (operands.address()?, operands.sources()?.into_vec());
    let floats = matches!(ty.strip_prefix('b').unwrap_or(ty), "f16" | "f16x2" | "f32");
    let vectors = count == 1 || floats && usize::from(element.size) * count <= 16;
    let fits = sources.len() == count
        && (parts[0] == "red" || targets.len() == count)
        && targets.iter().flatten().all(|target| takes(*target, element));
    if function == F::CompareAndSwap {
        sources.push(operands.source()?);
    }
    let known = fits && vectors && matches!(space, Space::Generic | Space::Global | Space::Shared);
    let (size, sources) = (element.size, sources.into());
    known.then_some(Atomic { space, function, size, targets, address, sources })
}

/// The operation among the words of an opcode, and the others, which are all without effect here.
fn name_and_hints<'a>(words: &[&'a str]) -> Option<(&'a str, Vec<&'a str>)> {
    const NAMES: [&str; 10] = ["add", "and", "or", "xor", "exch", "cas", "inc", "dec", "min", "max"];
    let (names, hints): (Vec<&str>, Vec<&str>) = words.iter().partition(|word| NAMES.contains(word));
    let known = hints.iter().all(|word| *word == "noftz" || is_hint(word));
    match names.as_slice() {
        [name] if known => Some((name, hints)),
        _ => None,
    }
}

/// What is there afterwards.
fn apply(function: AtomicFunction, bits: u32, old: u64, operand: u64) -> u64 {
    use AtomicFunction as F;
    let signed = |number: u64| (number << (64 - bits)) as i64 >> (64 - bits);
    let half = |old: u64, operand: u64| {
        let sum = f16::from_bits(old as u16).to_f64() + f16::from_bits(operand as u16).to_f64();
        u64::from(f16::from_f64(sum).to_bits())
    };
    let brain = |old: u64, operand: u64| {
        let sum = bf16::from_bits(old as u16).to_f64() + bf16::from_bits(operand as u16).to_f64();
        u64::from(bf16::from_f64(sum).to_bits())
    };
    let both =
        |add: &dyn Fn(u64, u64) -> u64| add(old & 0xffff, operand & 0xffff) | add(old >> 16, operand >> 16) << 16;
    match function {
        F::Add => old.wrapping_add(operand),
        F::AddF32 => u64::from((f32::from_bits(old as u32) + f32::from_bits(operand as u32)).to_bits()),
        F::AddF64 => (f64::from_bits(old) + f64::from_bits(operand)).to_bits(),
        F::AddF16 => half(old, operand),
        F::AddBf16 => brain(old, operand),
        F::AddF16x2 => both(&half),
        F::AddBf16x2 => both(&brain),
        F::And => old & operand,
        F::Or => old | operand,
        F::Xor => old ^ operand,
        F::Exchange => operand,
        F::CompareAndSwap => unreachable!("it takes two operands"),
        F::Increment => {
            if old >= operand {
                0
            } else {
                old + 1
            }
        }
        F::Decrement => {
            if old == 0 || old > operand {
                operand
            } else {
                old - 1
            }
        }
        F::MinUnsigned => old.min(operand),
        F::MaxUnsigned => old.max(operand),
        F::MinSigned => signed(old).min(signed(operand)) as u64,
        F::MaxSigned => signed(old).max(signed(operand)) as u64,
    }
}

/// A sum of `f32` in global memory: subnormal numbers are zeros of their sign before and after.
fn flushed_sum(old: u64, operand: u64) -> u64 {
    let flushed = |bits: u64| if f32::from_bits(bits as u32).is_subnormal() { bits & 1 << 31 } else { bits };
    flushed(apply(AtomicFunction::AddF32, 32, flushed(old), flushed(operand)))
}

/// Whether an address of an operation is one of global memory.
fn is_global(space: Space, address: u64) -> bool {
    space == Space::Global || space == Space::Generic && is_within(Space::Global, address)
}

/// Executes an operation in the lanes of `mask`.
pub fn run<O: Observer>(
    warp: &mut Warp,
    at: &At,
    mask: Mask,
    atomic: &Atomic,
    context: &mut Context<'_, '_, O>,
) -> Result<(), Stop> {
    let Atomic { space, function, size, targets, address, sources } = atomic;
    let addresses = warp.addresses(address, context);
    let operands: Vec<Long> = sources.iter().map(|source| warp.long(source, context)).collect();
    let (bits, size) = (8 * u32::from(*size), usize::from(*size));
    let cut = |number: u64| number << (64 - bits) >> (64 - bits);
    let element = Element { size: size as u8, signed: false };
    let swaps = *function == AtomicFunction::CompareAndSwap;
    let count = if swaps { 1 } else { sources.len() };
    let reversed = context.reversed;
    let stores = *function == AtomicFunction::Exchange && targets.is_empty();
    let kind = if stores { Kind::AtomicStore } else { Kind::Atomic };
    warp.reach(at, mask, (*space, size * count, kind), &addresses, context, |warp, bytes, offsets, mask| {
        for number in 0..count {
            let mut before: Long = [0; WARP];
            let mut order: Vec<usize> = lanes(mask).collect();
            if reversed {
                order.reverse();
            }
            for lane in order {
                let start = offsets[lane] as usize + number * size;
                let old = read(bytes, start, element);
                before[lane] = old;
                let new = match swaps {
                    true if old == cut(operands[0][lane]) => operands[1][lane],
                    true => old,
                    false if *function == AtomicFunction::AddF32 && is_global(*space, addresses[lane]) => {
                        flushed_sum(old, cut(operands[number][lane]))
                    }
                    false => apply(*function, bits, old, cut(operands[number][lane])),
                };
                bytes[start..start + size].copy_from_slice(&new.to_le_bytes()[..size]);
            }
            if let Some(Some(target)) = targets.get(number) {
                warp.set(*target, &before, mask);
            }
        }
    })
}
