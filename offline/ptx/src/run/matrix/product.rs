//! Products of matrices.
//!
//! The manual leaves open in which order a unit sums up, and how it rounds between. Here products are exact, the sum over `k` is one of
//! doubles, what is added comes last, and the result is rounded once, to nearest.

use half::f16;
use multiversion::multiversion;

use crate::lanes::{WARP, Word};
use crate::program::fragment::{Fragment, MOST, Number, Steps};
use crate::program::matrix::{Product, Products};
use crate::run::context::Context;
use crate::run::warp::Warp;

/// Executes a product.
pub fn run<O>(warp: &mut Warp, product: &Product, context: &Context<'_, '_, O>) {
    let Products { m, n, k, .. } = product.products;
    let (mut a, mut b, mut c) = ([0.0; MOST], [0.0; MOST], [0.0; MOST]);
    let across = |length| Steps { down: length, across: 1 };
    numbers(&product.a.0, &warp.registers(&product.a.1, context), across(k), &mut a);
    // The second factor's fragment is that of its transpose.
    numbers(&product.b.0, &warp.registers(&product.b.1, context), Steps { down: 1, across: n }, &mut b);
    numbers(&product.c.0, &warp.registers(&product.c.1, context), across(n), &mut c);
    match n {
        8 => multiply::<8>((m, k), &a, &b, &mut c),
        16 => multiply::<16>((m, k), &a, &b, &mut c),
        _ => multiply::<32>((m, k), &a, &b, &mut c),
    }
    let (fragment, targets) = &product.d;
    let words =
        fragment.put(across(n), |places| rounded(fragment.number, &places.map(|place| c[place]), product.saturates));
    warp.set_registers(targets, &words);
}

/// Adds the product of `a`, of `m` rows, and `b`, of `N` columns, to `c`.
#[multiversion(targets("x86_64+avx512f+avx2+fma", "x86_64+avx2+fma", "aarch64+neon"))]
fn multiply<const N: usize>((m, k): (usize, usize), a: &[f64; MOST], b: &[f64; MOST], c: &mut [f64; MOST]) {
    for row in 0..m {
        let mut sums = [0.0; N];
        for (number, others) in a[row * k..][..k].iter().zip(b.chunks_exact(N)) {
            for (sum, other) in sums.iter_mut().zip(others) {
                *sum += number * other;
            }
        }
        c[row * N..][..N].iter_mut().zip(sums).for_each(|(c, sum)| *c += sum);
    }
}

/// The numbers that a fragment holds.
fn numbers(fragment: &Fragment, words: &[Word], steps: Steps, out: &mut [f64; MOST]) {
    fragment.take(words, steps, |places, bits| {
        let found = widened(fragment.number, bits);
        places.iter().zip(found).for_each(|(&place, number)| out[place] = number);
    });
}

/// Each lane's number.
fn widened(number: Number, bits: &Word) -> [f64; WARP] {
    match number {
        Number::F16 => by_lane(bits, half_to_double),
        Number::Bf16 => by_lane(bits, |bits| f32::from_bits(bits << 16).into()),
        Number::Tf32 => by_lane(bits, |bits| f32::from_bits(bits & !0x1fff).into()),
        Number::F32 => by_lane(bits, |bits| f32::from_bits(bits).into()),
        Number::S8 => by_lane(bits, |bits| (bits as u8 as i8).into()),
        Number::U8 => by_lane(bits, |bits| (bits as u8).into()),
        Number::S32 => by_lane(bits, |bits| (bits as i32).into()),
    }
}

fn by_lane(bits: &Word, widened: impl Fn(u32) -> f64) -> [f64; WARP] {
    let mut all = [0.0; WARP];
    all.iter_mut().zip(bits).for_each(|(number, bits)| *number = widened(*bits));
    all
}

/// Of 16 bits moved to where an f32 has its exponent's end and its fraction, the value is too small by 2^112; infinities and NaNs have
/// all of the exponent set.
fn half_to_double(bits: u32) -> f64 {
    let moved = (bits & 0x7fff) << 13;
    let scaled = f32::from_bits(moved) * f32::from_bits((127 + 112) << 23);
    let magnitude = if bits & 0x7c00 == 0x7c00 { moved | 0xff << 23 } else { scaled.to_bits() };
    f64::from(f32::from_bits(magnitude | (bits & 0x8000) << 16))
}

fn rounded(number: Number, sums: &[f64; WARP], saturates: bool) -> Word {
    match number {
        Number::F16 => sums.map(|sum| if sum.is_nan() { 0x7fff } else { u32::from(f16::from_f64(sum).to_bits()) }),
        Number::S32 if saturates => sums.map(|sum| sum as i32 as u32),
        // Sums of integers are exact.
        Number::S32 => sums.map(|sum| sum as i64 as u32),
        _ => sums.map(|sum| if sum.is_nan() { 0x7fff_ffff } else { (sum as f32).to_bits() }),
    }
}
