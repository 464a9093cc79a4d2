//! Conversions of one number (PTX ISA 8.7, section 9.7.9.21, `cvt`) between integers of 8 to 64 bits, `f16`, `bf16`,
//! `f32` and `f64`.
//!
//! A result of 8 or 16 bits is written as a register of 16 bits has it: extended to 16 bits by its sign if it has one,
//! zeros above.

use super::arithmetic::Arithmetic;
use super::convert_packed;
use super::floats::{Bf16, F16, Float, Flushed};
use super::function::Function;
use super::lanewise::{Number, Words, for_flag, for_type, op};
use super::rounding::{self, Rounding, for_rounding};

/// The function of a conversion.
pub(super) fn find(name: &str, middle: &[&str], source: &str) -> Option<Function> {
    let (target, words) = middle.split_last()?;
    if name != "cvt" {
        return None;
    }
    convert_packed::find(words, target, source).or_else(|| one(words, target, source))
}

/// Conversions of one number.
fn one(words: &[&str], target: &str, source: &str) -> Option<Function> {
    let mut words = Words(words);
    let rounding = ["rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi"].into_iter().find(|word| words.take(word));
    let (flushes, saturates) = (words.take("ftz"), words.take("sat"));
    words.end()?;
    if flushes && source != "f32" && target != "f32" {
        return None;
    }
    let (target, source) = (typed(flushes, target), typed(flushes, source));
    let (target, source) = (target.as_str(), source.as_str());
    let to_whole = rounding.is_some_and(|word| word.ends_with('i'));
    match (width(source), width(target), rounding) {
        (None, None, None) => integers(target, source, saturates),
        (None, Some(_), Some(word)) if !to_whole && !saturates => from_integer(target, source, word),
        (Some(_), None, Some(word)) if to_whole => to_integer(target, source, word),
        (Some(_), Some(_), Some(word)) if to_whole && source == target => whole(source, word, saturates),
        (Some(from), Some(to), Some(word)) if !to_whole && source != target && to <= from => {
            narrower(target, source, word, saturates)
        }
        (Some(from), Some(to), None) if source == target || to > from => wider(target, source, saturates),
        _ => None,
    }
}

/// A type's name with the word that stands before it where it matters.
fn typed(flushes: bool, kind: &str) -> String {
    if flushes && kind == "f32" { "ftz.f32".to_owned() } else { kind.to_owned() }
}

/// The bits of a floating-point type.
fn width(kind: &str) -> Option<u32> {
    match kind {
        "f16" | "bf16" => Some(16),
        "f32" | "ftz.f32" => Some(32),
        "f64" => Some(64),
        _ => None,
    }
}

/// [`for_type`] of all integer types.
macro_rules! for_integer {
    ($name:expr, $T:ident => $body:expr) => {
        for_type!($name, $T in {
            "u8" => u8, "s8" => i8, "u16" => u16, "s16" => i16,
            "u32" => u32, "s32" => i32, "u64" => u64, "s64" => i64,
        } => $body)
    };
}

/// [`for_type`] of all floating-point types.
macro_rules! for_float {
    ($name:expr, $T:ident => $body:expr) => {
        for_type!($name, $T in {
            "f16" => F16, "bf16" => Bf16, "f32" => f32, "ftz.f32" => Flushed<f32>, "f64" => f64,
        } => $body)
    };
}

/// Integer to integer: the lower bits, or the nearest number there is.
fn integers(target: &str, source: &str, saturates: bool) -> Option<Function> {
    for_flag!(saturates, SAT => for_integer!(source, S => for_integer!(target, D => Some(op!(|a: S| -> D {
        if SAT { i128::from(a).clamp(D::MIN.into(), D::MAX.into()) as D } else { a as D }
    })))))
}

/// Integer to floating point, where nothing is subnormal.
fn from_integer(target: &str, source: &str, word: &str) -> Option<Function> {
    for_rounding!(word, R => for_integer!(source, S =>
    for_type!(target, D in { "f16" => F16, "bf16" => Bf16, "f32" | "ftz.f32" => f32, "f64" => f64 } =>
        Some(op!(|a: S| -> D {
            let number = match (S::BITS, size_of::<<D as Number>::Bits>()) {
                (64, 8) => rounding::of_integer(a.into(), R),
                (64, _) => rounding::of_integer_to_odd(a.into()),
                _ => a as f64,
            };
            D::rounded(number, R)
        })))))
}

/// Floating point to integer: the nearest one there is. NaN gives zero; but where either is of 64 bits, the highest bit
/// alone.
fn to_integer(target: &str, source: &str, word: &str) -> Option<Function> {
    for_rounding!(word, R => for_float!(source, S => for_integer!(target, D => Some(op!(|a: S| -> D {
        const LONG: bool = D::BITS == 64 || size_of::<<S as Number>::Bits>() == 8;
        let number = rounding::whole(a.wide(), R);
        match number.is_nan() {
            true if LONG => 1 << (D::BITS - 1),
            true => 0,
            false => number as D,
        }
    })))))
}

/// Floating point to a whole number of the same type.
fn whole(kind: &str, word: &str, saturates: bool) -> Option<Function> {
    for_flag!(saturates, SAT => for_rounding!(word, R => for_float!(kind, T => Some(op!(|a: T| -> T {
        let result = T::rounded(rounding::whole(a.wide(), R), Rounding::Nearest);
        if SAT { result.saturated() } else { result }
    })))))
}

/// Floating point to a type of fewer bits, or to the other type of 16 bits.
fn narrower(target: &str, source: &str, word: &str, saturates: bool) -> Option<Function> {
    for_flag!(saturates, SAT => for_rounding!(word, R => match source {
        "f64" => for_float!(target, D => Some(op!(|a: f64| -> D { converted::<SAT, D>(a, R) }))),
        _ => for_type!(source, S in { "f32" => f32, "ftz.f32" => Flushed<f32>, "f16" => F16, "bf16" => Bf16 } =>
            for_type!(target, D in { "f16" => F16, "bf16" => Bf16 } =>
                Some(op!(|a: S| -> D {
                    let result = D::of_single(a.wide() as f32, R);
                    if SAT { result.saturated() } else { result }
                })))),
    }))
}

/// Floating point to a type of as many bits or more.
fn wider(target: &str, source: &str, saturates: bool) -> Option<Function> {
    for_flag!(saturates, SAT => for_float!(source, S => for_float!(target, D =>
        Some(op!(|a: S| -> D { converted::<SAT, D>(a.wide(), Rounding::Nearest) })))))
}

/// A number rounded to a type, saturated if `SAT`.
#[inline(always)]
fn converted<const SAT: bool, D: Float + Arithmetic>(number: f64, rounding: Rounding) -> D {
    let result = D::rounded(number, rounding);
    if SAT { result.saturated() } else { result }
}
