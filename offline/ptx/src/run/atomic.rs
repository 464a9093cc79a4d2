//! Atomic operations and reductions on memory (sections 9.7.13.5 and 9.7.13.6). The lanes of a warp come one after the other, from the
//! first to the last or the other way round.

use half::{bf16, f16};

use super::context::Context;
use super::memory::{Kind, read, write};
use super::observe::{At, Observer};
use super::warp::Warp;
use crate::error::Stop;
use crate::lanes::{Long, Mask, WARP, lanes};
use crate::operand::Space;
use crate::program::{Atomic, AtomicFunction};
use crate::windows::is_within;

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
                let old = read(bytes, start, size);
                before[lane] = old;
                let new = match swaps {
                    true if old == cut(operands[0][lane]) => operands[1][lane],
                    true => old,
                    false if *function == AtomicFunction::AddF32 && is_global(*space, addresses[lane]) => {
                        flushed_sum(old, cut(operands[number][lane]))
                    }
                    false => apply(*function, bits, old, cut(operands[number][lane])),
                };
                write(bytes, start, size, new);
            }
            if let Some(Some(target)) = targets.get(number) {
                warp.set(*target, &before, mask);
            }
        }
    })
}
