//! Functions that the hardware approximates (PTX ISA 8.7, section 9.7.3, and for `f16` and `bf16` 9.7.4): `sin`, `cos`,
//! `lg2`, `ex2`, `tanh`, `rsqrt`, and `div`, `rcp`, `sqrt` with `approx` or `full`.
//!
//! Each is computed in 64 bits and rounded once, so that the result lies within the manual's error bounds; the
//! hardware's last bits may differ.

use super::floats::{Bf16, F16, Float, Flushed};
use super::function::Function;
use super::lanewise::{Words, for_flag, for_type, op};
use super::rounding::Rounding;

/// The function of an approximated opcode.
pub(super) fn find(name: &str, middle: &[&str], kind: &str) -> Option<Function> {
    let mut words = Words(middle);
    if name == "div" && words.take("full") {
        let flushes = words.take("ftz");
        words.end()?;
        return for_type!(typed(flushes, kind).as_str(), T in { "f32" => f32, "ftz.f32" => Flushed<f32> } =>
            Some(op!(|a: T, b: T| -> T { T::rounded(a.wide() / b.wide(), Rounding::Nearest) })));
    }
    if !words.take("approx") {
        return None;
    }
    let flushes = words.take("ftz");
    words.end()?;
    match name {
        "div" => for_type!(typed(flushes, kind).as_str(), T in { "f32" => f32, "ftz.f32" => Flushed<f32> } =>
            Some(op!(|a: T, b: T| -> T { T::rounded(divide(a.wide(), b.wide()), Rounding::Nearest) }))),
        "ex2" | "tanh" => half_too(name, typed(flushes, kind).as_str()),
        _ => single(name, typed(flushes, kind).as_str()),
    }
}

/// A type's name with the word that stands before it.
fn typed(flushes: bool, kind: &str) -> String {
    if flushes { format!("ftz.{kind}") } else { kind.to_owned() }
}

/// `div.approx`: the manual gives zero for a divisor above 2^126 in magnitude, and NaN if the dividend is infinite as
/// well.
#[inline(always)]
fn divide(a: f64, b: f64) -> f64 {
    const LARGE: f64 = (1u128 << 126) as f64;
    match b.is_finite() && b.abs() > LARGE {
        true => a * 0.0 * b.signum(),
        false => a / b,
    }
}

/// Functions of `f32` alone.
fn single(name: &str, typed: &str) -> Option<Function> {
    for_type!(typed, T in { "f32" => f32, "ftz.f32" => Flushed<f32> } => match name {
        "rcp" => Some(op!(|a: T| -> T { T::rounded(1.0 / a.wide(), Rounding::Nearest) })),
        "sqrt" => Some(op!(|a: T| -> T { T::rounded(a.wide().sqrt(), Rounding::Nearest) })),
        "rsqrt" => Some(op!(|a: T| -> T { T::rounded(1.0 / a.wide().sqrt(), Rounding::Nearest) })),
        "sin" => Some(op!(|a: T| -> T { T::rounded(a.wide().sin(), Rounding::Nearest) })),
        "cos" => Some(op!(|a: T| -> T { T::rounded(a.wide().cos(), Rounding::Nearest) })),
        "lg2" => Some(op!(|a: T| -> T { T::rounded(a.wide().log2(), Rounding::Nearest) })),
        _ => None,
    })
}

/// `ex2` and `tanh`, which exist for numbers of 16 bits too; `tanh` has no `ftz`, and `ex2` has it for `f32` by choice,
/// for `bf16` always.
fn half_too(name: &str, typed: &str) -> Option<Function> {
    let (typed, pair) = typed.strip_suffix("x2").map_or((typed, false), |part| (part, true));
    if pair && typed.ends_with("f32") {
        return None;
    }
    for_flag!(pair, PAIR => match name {
        "ex2" => for_type!(typed, T in {
            "f32" => f32, "ftz.f32" => Flushed<f32>, "f16" => F16, "ftz.bf16" => Flushed<Bf16>,
        } => Some(op!(PAIR, |a: T| -> T { T::rounded(a.wide().exp2(), Rounding::Nearest) }))),
        _ => for_type!(typed, T in { "f32" => f32, "f16" => F16, "bf16" => Bf16 } =>
            Some(op!(PAIR, |a: T| -> T { T::rounded(a.wide().tanh(), Rounding::Nearest) }))),
    })
}
