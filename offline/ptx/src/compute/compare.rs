//! Comparisons and choices (PTX ISA 8.7, sections 9.7.6 and 9.7.7): `setp`, `set`, `slct`; and `testp` and `copysign`
//! of 9.7.3.

use super::floats::{Bf16, F16, Float, Flushed};
use super::function::Function;
use super::lanewise::{Words, for_type, op};

/// The condition that a comparison's name stands for, given to a macro that makes a function of it.
macro_rules! integer_condition {
    ($comparison:expr, $make:ident, $T:ty) => {
        match $comparison {
            "eq" => $make!($T, |a, b| a == b),
            "ne" => $make!($T, |a, b| a != b),
            "lt" => $make!($T, |a, b| a < b),
            "le" => $make!($T, |a, b| a <= b),
            "gt" => $make!($T, |a, b| a > b),
            "ge" => $make!($T, |a, b| a >= b),
            _ => None,
        }
    };
}

/// The same for floating-point numbers, where the names that end in `u` hold for NaN.
macro_rules! float_condition {
    ($comparison:expr, $make:ident, $T:ty) => {
        match $comparison {
            "eq" => $make!($T, |a, b| a.wide() == b.wide()),
            "ne" => $make!($T, |a, b| a.wide() < b.wide() || a.wide() > b.wide()),
            "lt" => $make!($T, |a, b| a.wide() < b.wide()),
            "le" => $make!($T, |a, b| a.wide() <= b.wide()),
            "gt" => $make!($T, |a, b| a.wide() > b.wide()),
            "ge" => $make!($T, |a, b| a.wide() >= b.wide()),
            "equ" => $make!($T, |a, b| a.wide() == b.wide() || unordered(a, b)),
            "neu" => $make!($T, |a, b| a.wide() != b.wide()),
            "ltu" => $make!($T, |a, b| a.wide() < b.wide() || unordered(a, b)),
            "leu" => $make!($T, |a, b| a.wide() <= b.wide() || unordered(a, b)),
            "gtu" => $make!($T, |a, b| a.wide() > b.wide() || unordered(a, b)),
            "geu" => $make!($T, |a, b| a.wide() >= b.wide() || unordered(a, b)),
            "num" => $make!($T, |a, b| !unordered(a, b)),
            "nan" => $make!($T, |a, b| unordered(a, b)),
            _ => None,
        }
    };
}

/// Whether a NaN is among two numbers.
#[inline(always)]
fn unordered<T: Float>(a: T, b: T) -> bool {
    a.wide().is_nan() | b.wide().is_nan()
}

/// A predicate from a condition.
macro_rules! predicate {
    ($T:ty, |$a:ident, $b:ident| $condition:expr) => {
        Some(op!(|$a: $T, $b: $T| -> bool { $condition }))
    };
}

/// The function of an opcode that compares or chooses.
pub(super) fn find(name: &str, middle: &[&str], kind: &str) -> Option<Function> {
    match name {
        "setp" => {
            let (comparison, rest) = middle.split_first()?;
            let mut words = Words(rest);
            let flushes = words.take("ftz");
            words.end()?;
            predicates(comparison, flushes, kind)
        }
        "slct" => choice(middle, kind),
        "testp" => class(middle, kind),
        "copysign" if middle.is_empty() => match kind {
            "f32" => Some(op!(|sign: u32, a: u32| -> u32 { a & !(1 << 31) | sign & 1 << 31 })),
            "f64" => Some(op!(|sign: u64, a: u64| -> u64 { a & !(1 << 63) | sign & 1 << 63 })),
            _ => None,
        },
        _ => None,
    }
}

/// The name of a comparison of this type, with `lo`, `ls`, `hi` and `hs` read as what they are for unsigned numbers;
/// none if the type has no such comparison.
fn comparison<'a>(name: &'a str, kind: &str) -> Option<&'a str> {
    match (kind.as_bytes().first()?, name) {
        (b'b', "eq" | "ne") if !kind.starts_with("bf") => Some(name),
        (b'b', _) if !kind.starts_with("bf") => None,
        (b'u', "lo") => Some("lt"),
        (b'u', "ls") => Some("le"),
        (b'u', "hi") => Some("gt"),
        (b'u', "hs") => Some("ge"),
        _ => Some(name),
    }
}

/// `setp`.
fn predicates(name: &str, flushes: bool, kind: &str) -> Option<Function> {
    let name = comparison(name, kind)?;
    if flushes {
        return for_type!(kind, T in { "f32" => Flushed<f32>, "f16" => Flushed<F16> } =>
            float_condition!(name, predicate, T));
    }
    for_type!(kind, T in {
        "b16" | "u16" => u16, "s16" => i16, "b32" | "u32" => u32, "s32" => i32, "b64" | "u64" => u64, "s64" => i64,
    } => integer_condition!(name, predicate, T))
    .or_else(|| {
        for_type!(kind, T in { "f32" => f32, "f64" => f64, "f16" => F16, "bf16" => Bf16 } =>
        float_condition!(name, predicate, T))
    })
}

/// `slct`: the first operand where the third is not negative, the second elsewhere, for a NaN too.
fn choice(middle: &[&str], kind: &str) -> Option<Function> {
    let mut words = Words(middle);
    let flushes = words.take("ftz");
    let [chosen] = words.0 else { return None };
    for_type!(*chosen, T in {
        "b16" | "u16" | "s16" => u16, "b32" | "u32" | "s32" | "f32" => u32, "b64" | "u64" | "s64" | "f64" => u64,
    } => match (kind, flushes) {
        ("s32", false) => Some(op!(|a: T, b: T, c: i32| -> T { if c >= 0 { a } else { b } })),
        ("f32", false) => Some(op!(|a: T, b: T, c: f32| -> T { if c >= 0.0 { a } else { b } })),
        ("f32", true) => Some(op!(|a: T, b: T, c: Flushed<f32>| -> T { if c.0 >= 0.0 { a } else { b } })),
        _ => None,
    })
}

/// `testp`: what sort of number it is. Zeros count as normal.
fn class(middle: &[&str], kind: &str) -> Option<Function> {
    let [class] = middle else { return None };
    for_type!(kind, T in { "f32" => f32, "f64" => f64 } => match *class {
        "finite" => Some(op!(|a: T| -> bool { a.is_finite() })),
        "infinite" => Some(op!(|a: T| -> bool { a.is_infinite() })),
        "number" => Some(op!(|a: T| -> bool { !a.is_nan() })),
        "notanumber" => Some(op!(|a: T| -> bool { a.is_nan() })),
        "normal" => Some(op!(|a: T| -> bool { a.is_normal() || a == 0.0 })),
        "subnormal" => Some(op!(|a: T| -> bool { a.is_subnormal() })),
        _ => None,
    })
}
