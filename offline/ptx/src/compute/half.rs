//! Arithmetic of `f16` and `bf16` and of pairs of them (PTX ISA 8.7, section 9.7.4): rounded once, to nearest.

use super::arithmetic::Arithmetic;
use super::floats::{Bf16, F16, Flushed};
use super::function::Function;
use super::lanewise::{Words, for_flag, for_type, op};
use super::rounding::Rounding;

/// The function of an opcode of arithmetic of 16-bit numbers.
pub(super) fn find(name: &str, middle: &[&str], kind: &str) -> Option<Function> {
    let mut words = Words(middle);
    let (kind, pair) = kind.strip_suffix("x2").map_or((kind, false), |part| (part, true));
    if kind != "f16" && kind != "bf16" {
        return None;
    }
    match name {
        "add" | "sub" | "mul" => sum_or_product(name, &mut words, kind, pair),
        "fma" => fused(&mut words, kind, pair),
        "min" | "max" => extremum(name, &mut words, kind, pair),
        "abs" | "neg" => sign(name, &mut words, kind, pair),
        _ => None,
    }
}

/// A type's name with the word that chooses between its two forms, if it comes next: `ftz.f16`.
fn typed(words: &mut Words, kind: &str) -> String {
    if words.take("ftz") { format!("ftz.{kind}") } else { kind.to_owned() }
}

/// [`for_type`] of `f16` with and without subnormal numbers, and `bf16`, for which there is no `ftz`.
macro_rules! for_half {
    ($typed:expr, $T:ident => $body:expr) => {
        for_type!($typed.as_str(), $T in { "f16" => F16, "ftz.f16" => Flushed<F16>, "bf16" => Bf16 } => $body)
    };
}

/// `add`, `sub` and `mul`; `sat` for `f16` alone.
fn sum_or_product(name: &str, words: &mut Words, kind: &str, pair: bool) -> Option<Function> {
    const R: Rounding = Rounding::Nearest;
    words.take("rn");
    let typed = typed(words, kind);
    let saturates = words.take("sat");
    words.end()?;
    if saturates && kind != "f16" {
        return None;
    }
    for_flag!(pair, PAIR => for_flag!(saturates, SAT => for_half!(typed, T => match name {
        "add" => Some(op!(PAIR, |a: T, b: T| -> T { finish::<SAT, false, T>(a.plus(b, R)) })),
        "sub" => Some(op!(PAIR, |a: T, b: T| -> T { finish::<SAT, false, T>(a.plus(b.negated(), R)) })),
        _ => Some(op!(PAIR, |a: T, b: T| -> T { finish::<SAT, false, T>(a.times(b, R)) })),
    })))
}

/// `fma`; `sat` for `f16` alone, and not together with `relu`.
fn fused(words: &mut Words, kind: &str, pair: bool) -> Option<Function> {
    let nearest = words.take("rn");
    let typed = typed(words, kind);
    let (saturates, rectifies) = (words.take("sat"), words.take("relu"));
    words.end()?;
    if !nearest || saturates && (rectifies || kind != "f16") {
        return None;
    }
    for_flag!(pair, PAIR => for_flag!(saturates, SAT => for_flag!(rectifies, RELU => for_half!(typed, T =>
    Some(op!(PAIR, |a: T, b: T, c: T| -> T {
        finish::<SAT, RELU, T>(a.times_plus(b, c, Rounding::Nearest))
    }))))))
}

/// A result, saturated if `SAT`, zero for negative ones if `RELU`.
#[inline(always)]
fn finish<const SAT: bool, const RELU: bool, T: Arithmetic>(number: T) -> T {
    let number = if SAT { number.saturated() } else { number };
    if RELU { number.rectified() } else { number }
}

/// `min` and `max`, which treat NaN and `xorsign.abs` as those of `f32` do.
fn extremum(name: &str, words: &mut Words, kind: &str, pair: bool) -> Option<Function> {
    let typed = typed(words, kind);
    let nan = words.take("NaN");
    let magnitudes = words.take_both("xorsign", "abs");
    words.end()?;
    for_flag!(pair, PAIR => for_flag!(name == "min", MIN => for_flag!(nan, NAN => for_flag!(magnitudes, ABS =>
    for_half!(typed, T => Some(op!(PAIR, |a: T, b: T| -> T {
        if ABS {
            a.magnitude().extreme::<MIN, NAN>(b.magnitude()).signed_by(a).signed_by(b)
        } else {
            a.extreme::<MIN, NAN>(b)
        }
    })))))))
}

/// `abs` and `neg`.
fn sign(name: &str, words: &mut Words, kind: &str, pair: bool) -> Option<Function> {
    let typed = typed(words, kind);
    words.end()?;
    for_flag!(pair, PAIR => for_half!(typed, T => match name {
        "abs" => Some(op!(PAIR, |a: T| -> T { a.magnitude() })),
        _ => Some(op!(PAIR, |a: T| -> T { a.negated() })),
    }))
}
