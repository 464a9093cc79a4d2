//! Arithmetic of `f32` that rounds as IEEE 754 says, in four directions (PTX ISA 8.7, section 9.7.3).
//!
//! An `add` or `mul` without a rounding word rounds to nearest; NVIDIA's compiler may fuse the two, which is not done
//! here.

use super::arithmetic::{Arithmetic, Division};
use super::floats::Flushed;
use super::function::Function;
use super::lanewise::{Words, for_flag, op};
use super::rounding::{Rounding, for_rounding};

/// The function of an opcode of arithmetic of `f32`.
pub(super) fn find(name: &str, middle: &[&str], kind: &str) -> Option<Function> {
    let mut words = Words(middle);
    if kind != "f32" {
        return None;
    }
    match name {
        "add" | "sub" | "mul" => sum_or_product(name, &mut words),
        "fma" | "mad" => fused(&mut words),
        "div" | "rcp" | "sqrt" => division(name, &mut words),
        "min" | "max" => extremum(name, &mut words),
        "abs" | "neg" => sign(name, &mut words),
        _ => None,
    }
}

/// An expression compiled for `f32` with its subnormal numbers or with zeros in their place.
macro_rules! for_single {
    ($flushes:expr, $T:ident => $body:expr) => {
        if $flushes {
            type $T = Flushed<f32>;
            $body
        } else {
            type $T = f32;
            $body
        }
    };
}

/// The rounding that stands first among the words.
fn direction(words: &mut Words) -> Option<&'static str> {
    ["rn", "rz", "rm", "rp"].into_iter().find(|word| words.take(word))
}

/// A result, saturated if `SAT`.
#[inline(always)]
fn finish<const SAT: bool, T: Arithmetic>(number: T) -> T {
    if SAT { number.saturated() } else { number }
}

/// `add`, `sub` and `mul`.
fn sum_or_product(name: &str, words: &mut Words) -> Option<Function> {
    let rounding = direction(words).unwrap_or("rn");
    let (flushes, saturates) = (words.take("ftz"), words.take("sat"));
    words.end()?;
    for_single!(flushes, T => for_flag!(saturates, SAT => for_rounding!(rounding, R => match name {
        "add" => Some(op!(|a: T, b: T| -> T { finish::<SAT, T>(a.plus(b, R)) })),
        "sub" => Some(op!(|a: T, b: T| -> T { finish::<SAT, T>(a.plus(b.negated(), R)) })),
        _ => Some(op!(|a: T, b: T| -> T { finish::<SAT, T>(a.times(b, R)) })),
    })))
}

/// `fma`, and `mad`, which is the same.
fn fused(words: &mut Words) -> Option<Function> {
    let rounding = direction(words)?;
    let (flushes, saturates) = (words.take("ftz"), words.take("sat"));
    words.end()?;
    for_single!(flushes, T => for_flag!(saturates, SAT => for_rounding!(rounding, R =>
        Some(op!(|a: T, b: T, c: T| -> T { finish::<SAT, T>(a.times_plus(b, c, R)) })))))
}

/// `div`, `rcp` and `sqrt`.
fn division(name: &str, words: &mut Words) -> Option<Function> {
    let rounding = direction(words)?;
    let flushes = words.take("ftz");
    words.end()?;
    for_single!(flushes, T => for_rounding!(rounding, R => match name {
        "div" => Some(op!(|a: T, b: T| -> T { a.over(b, R) })),
        "rcp" => Some(op!(|a: T| -> T { T::ONE.over(a, R) })),
        _ => Some(op!(|a: T| -> T { a.root(R) })),
    }))
}

/// `min` and `max`: of a number and a NaN the number, or NaN where `NaN` says so. With `xorsign.abs` it is the
/// magnitudes that are compared, and the result is negative if one operand is.
fn extremum(name: &str, words: &mut Words) -> Option<Function> {
    let (flushes, nan) = (words.take("ftz"), words.take("NaN"));
    let magnitudes = words.take_both("xorsign", "abs");
    words.end()?;
    for_single!(flushes, T => for_flag!(name == "min", MIN => for_flag!(nan, NAN => for_flag!(magnitudes, ABS =>
    Some(op!(|a: T, b: T| -> T {
        if ABS {
            a.magnitude().extreme::<MIN, NAN>(b.magnitude()).signed_by(a).signed_by(b)
        } else {
            a.extreme::<MIN, NAN>(b)
        }
    }))))))
}

/// `abs` and `neg`.
fn sign(name: &str, words: &mut Words) -> Option<Function> {
    let flushes = words.take("ftz");
    words.end()?;
    for_single!(flushes, T => match name {
        "abs" => Some(op!(|a: T| -> T { a.magnitude() })),
        _ => Some(op!(|a: T| -> T { a.negated() })),
    })
}
