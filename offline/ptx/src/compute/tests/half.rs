//! Arithmetic of `f16`, `bf16` and pairs of them, against roundings by their definition.

use super::float::{extremes, flushed, saturated};
use super::oracle::{self, Format, format};
use super::{Case, Expectation, case, check};

/// A case of a pair made from a case of one number.
fn paired(single: Case) -> [Case; 2] {
    let expected: std::rc::Rc<Expectation> = single.expected.into();
    let both = expected.clone();
    let count = single.operands.len();
    let pair = case(&format!("{}x2", single.opcode), "b32", &vec!["b32"; count].join(" "), move |x| {
        let half = |shift: u32| both(&x.iter().map(|bits| bits >> shift & 0xffff).collect::<Vec<_>>());
        half(16) << 16 | half(0)
    });
    [Case { expected: Box::new(move |x| expected(x)), ..single }, pair]
}

/// Zero for a negative result.
fn rectified(format: Format, bits: i128, rectifies: bool) -> i128 {
    if rectifies && format.value(bits) <= 0.0 { 0 } else { bits }
}

/// What an operation gives on numbers of a format.
type Exact = fn(Format, &[f64]) -> i128;

/// Cases of an operation with these words after its name.
fn forms(cases: &mut Vec<Case>, kind: &'static str, name: &str, words: &[&str], count: usize, exact: Exact) {
    let format = format(kind);
    for words in words {
        let has = |word: &str| words.split('.').any(|other| other == word);
        let (flushes, saturates, rectifies) = (has("ftz"), has("sat"), has("relu"));
        let operands = vec![kind; count].join(" ");
        cases.push(case(&format!("{name}{words}.{kind}"), kind, &operands, move |x| {
            let numbers: Vec<f64> = x.iter().map(|&bits| format.value(flushed(format, bits, flushes))).collect();
            let result = flushed(format, exact(format, &numbers), flushes);
            rectified(format, saturated(format, result, saturates), rectifies)
        }));
    }
}

/// Sums, products and signs.
fn arithmetic(cases: &mut Vec<Case>) {
    for kind in ["f16", "bf16"] {
        let two: &[&str] = match kind {
            "f16" => &["", ".rn", ".ftz", ".rn.ftz", ".sat", ".rn.sat", ".ftz.sat", ".rn.ftz.sat"],
            _ => &["", ".rn"],
        };
        let three: &[&str] = match kind {
            "f16" => &[".rn", ".rn.ftz", ".rn.sat", ".rn.ftz.sat", ".rn.relu", ".rn.ftz.relu"],
            _ => &[".rn", ".rn.relu"],
        };
        forms(cases, kind, "add", two, 2, |f, x| oracle::fused(f, "rn", x[0], 1.0, x[1]));
        forms(cases, kind, "sub", two, 2, |f, x| oracle::fused(f, "rn", x[0], 1.0, -x[1]));
        forms(cases, kind, "mul", two, 2, |f, x| oracle::product(f, "rn", x[0], x[1]));
        forms(cases, kind, "fma", three, 3, |f, x| oracle::fused(f, "rn", x[0], x[1], x[2]));
        extremes(cases, kind, kind == "f16");
        for words in if kind == "f16" { &["", ".ftz"][..] } else { &[""] } {
            let (format, flushes) = (format(kind), *words == ".ftz");
            let flush = move |bits| flushed(format, bits, flushes);
            cases.push(case(&format!("abs{words}.{kind}"), kind, kind, move |x| flush(x[0]) & 0x7fff));
            cases.push(case(&format!("neg{words}.{kind}"), kind, kind, move |x| flush(x[0]) ^ 0x8000));
        }
    }
}

/// All cases.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    arithmetic(&mut cases);
    cases.into_iter().flat_map(paired).collect()
}

#[test]
fn halves_are_the_exact_results_rounded_once() {
    check(&cases());
}
