//! Arithmetic of `f32` and `f64`: `f32` against roundings by their definition, `f64` against the host's.

use super::oracle::{self, Format, Word, format};
use super::{Case, case, check};

const ROUNDINGS: [Word; 4] = ["rn", "rz", "rm", "rp"];

/// A zero of the same sign for a subnormal number.
pub(super) fn flushed(format: Format, bits: i128, flushes: bool) -> i128 {
    if flushes && format.value(bits).abs() < format.normal() { bits & format.sign() } else { bits }
}

/// The nearest number from zero to one.
pub(super) fn saturated(format: Format, bits: i128, saturates: bool) -> i128 {
    let number = format.value(bits);
    match saturates {
        true if number > 0.0 => format.bits(number.min(1.0)),
        true => 0,
        false => bits,
    }
}

/// Arithmetic on numbers of a format, rounded.
type Exact = fn(Format, Word, &[f64]) -> i128;

/// Cases of an operation in all forms of `f32`.
fn forms(cases: &mut Vec<Case>, name: &str, word: &'static str, count: usize, saturating: bool, exact: Exact) {
    let format = format("f32");
    for flushes in [false, true] {
        for saturates in [false, true] {
            if saturates && !saturating {
                continue;
            }
            let opcode =
                [name, if flushes { ".ftz" } else { "" }, if saturates { ".sat" } else { "" }, ".f32"].concat();
            cases.push(case(&opcode, "f32", vec!["f32"; count].join(" ").as_str(), move |x| {
                let numbers: Vec<f64> = x.iter().map(|&bits| format.value(flushed(format, bits, flushes))).collect();
                let result = exact(format, word, &numbers);
                saturated(format, flushed(format, result, flushes), saturates)
            }));
        }
    }
}

/// Arithmetic of `f32` with rounding words.
fn rounded(cases: &mut Vec<Case>) {
    for word in ROUNDINGS {
        let names = |name: &str| match word {
            "rn" => vec![name.to_owned(), format!("{name}.rn")],
            _ => vec![format!("{name}.{word}")],
        };
        for name in names("add") {
            forms(cases, &name, word, 2, true, |f, word, x| oracle::fused(f, word, x[0], 1.0, x[1]));
        }
        for name in names("sub") {
            forms(cases, &name, word, 2, true, |f, word, x| oracle::fused(f, word, x[0], 1.0, -x[1]));
        }
        for name in names("mul") {
            forms(cases, &name, word, 2, true, |f, word, x| oracle::product(f, word, x[0], x[1]));
        }
        for name in ["fma", "mad"] {
            let name = format!("{name}.{word}");
            forms(cases, &name, word, 3, true, |f, word, x| oracle::fused(f, word, x[0], x[1], x[2]));
        }
        let name = |name: &str| format!("{name}.{word}");
        forms(cases, &name("div"), word, 2, false, |f, word, x| oracle::quotient(f, word, x[0], x[1]));
        forms(cases, &name("rcp"), word, 1, false, |f, word, x| oracle::quotient(f, word, 1.0, x[0]));
        forms(cases, &name("sqrt"), word, 1, false, |f, word, x| oracle::root(f, word, x[0]));
    }
}

/// `min` or `max` of two numbers by the manual's rules.
pub(super) fn extreme(format: Format, a: i128, b: i128, min: bool, nan: bool) -> i128 {
    let order = |bits: i128| if bits & format.sign() == 0 { bits } else { format.sign() - 1 - bits };
    match (format.value(a).is_nan(), format.value(b).is_nan()) {
        (false, false) if (order(a) < order(b)) == min => a,
        (false, false) => b,
        (true, false) if !nan => b,
        (false, true) if !nan => a,
        _ => format.nan,
    }
}

/// `min` and `max` of a format in the forms that have these words between name and type.
pub(super) fn extremes(cases: &mut Vec<Case>, kind: &'static str, flushing: bool) {
    let format = format(kind);
    for (name, min) in [("min", true), ("max", false)] {
        for flushes in [false, true] {
            if flushes && !flushing {
                continue;
            }
            for nan in [false, true] {
                let words = [if flushes { ".ftz" } else { "" }, if nan { ".NaN" } else { "" }].concat();
                let two = format!("{kind} {kind}");
                let flush = move |bits| flushed(format, bits, flushes);
                cases.push(case(&format!("{name}{words}.{kind}"), kind, &two, move |x| {
                    extreme(format, flush(x[0]), flush(x[1]), min, nan)
                }));
                cases.push(case(&format!("{name}{words}.xorsign.abs.{kind}"), kind, &two, move |x| {
                    let magnitude = |bits: i128| flush(bits) & (format.sign() - 1);
                    let result = extreme(format, magnitude(x[0]), magnitude(x[1]), min, nan);
                    let signed = result ^ (x[0] ^ x[1]) & format.sign();
                    if kind == "f32" && format.value(result).is_nan() { format.nan } else { signed }
                }));
            }
        }
    }
}

/// `abs` and `neg` of `f32`.
fn signs(cases: &mut Vec<Case>) {
    let format = format("f32");
    for flushes in [false, true] {
        let words = if flushes { ".ftz" } else { "" };
        for (name, change) in [("abs", (|bits| bits & 0x7fff_ffff) as fn(i128) -> i128), ("neg", |bits| bits ^ 1 << 31)]
        {
            cases.push(case(&format!("{name}{words}.f32"), "f32", "f32", move |x| {
                if format.value(x[0]).is_nan() { format.nan } else { change(flushed(format, x[0], flushes)) }
            }));
        }
    }
}

/// Arithmetic of `f64`, which the host does as IEEE 754 says.
fn doubles(cases: &mut Vec<Case>) {
    let mut add = |names: &[&str], count: usize, expected: fn(&[f64]) -> f64| {
        for name in names {
            cases.push(case(&format!("{name}.f64"), "f64", vec!["f64"; count].join(" ").as_str(), move |x| {
                let numbers: Vec<f64> = x.iter().map(|&bits| f64::from_bits(bits as u64)).collect();
                expected(&numbers).to_bits().into()
            }));
        }
    };
    add(&["add", "add.rn"], 2, |x| x[0] + x[1]);
    add(&["sub", "sub.rn"], 2, |x| x[0] - x[1]);
    add(&["mul", "mul.rn"], 2, |x| x[0] * x[1]);
    add(&["fma.rn", "mad.rn"], 3, |x| x[0].mul_add(x[1], x[2]));
    add(&["div.rn"], 2, |x| x[0] / x[1]);
    add(&["rcp.rn"], 1, |x| 1.0 / x[0]);
    add(&["sqrt.rn"], 1, |x| x[0].sqrt());
    add(&["abs"], 1, |x| x[0].abs());
    add(&["neg"], 1, |x| -x[0]);
    for (name, min) in [("min.f64", true), ("max.f64", false)] {
        cases.push(case(name, "f64", "f64 f64", move |x| extreme(format("f64"), x[0], x[1], min, false)));
    }
}

/// All cases.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    rounded(&mut cases);
    extremes(&mut cases, "f32", true);
    signs(&mut cases);
    doubles(&mut cases);
    cases
}

#[test]
fn floats_are_the_exact_results_rounded_once() {
    check(&cases());
}
