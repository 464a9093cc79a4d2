//! Approximated functions: within the manual's bounds of a formula of their own, and the values that the manual lists.

use super::float::flushed;
use super::oracle::format;
use super::{WARP, apply};

/// An opcode, the functions it should be near, the largest error in units of its last place, and its words.
struct Near {
    opcode: &'static str,
    operands: usize,
    kind: &'static str,
    expected: fn(&[f64]) -> f64,
    places: f64,
}

/// One row.
fn near(opcode: &'static str, kind: &'static str, operands: usize, places: f64, expected: fn(&[f64]) -> f64) -> Near {
    Near { opcode, operands, kind, expected, places }
}

/// A tangent by its exponentials.
fn tanh(x: f64) -> f64 {
    let square = (2.0 * x).exp();
    if square.is_infinite() {
        1.0
    } else if x.abs() < 1e-3 {
        x - x * x * x / 3.0
    } else {
        (square - 1.0) / (square + 1.0)
    }
}

/// All rows. The manual's bounds are 2 units for most; `sin`, `cos` and `lg2` have absolute bounds near their zeros.
fn rows() -> Vec<Near> {
    let exp2 = |x: &[f64]| (x[0] * std::f64::consts::LN_2).exp();
    let log2 = |x: &[f64]| x[0].ln() / std::f64::consts::LN_2;
    let sine = |x: &[f64]| (x[0] / 2.0).sin() * (x[0] / 2.0).cos() * 2.0;
    let cosine = |x: &[f64]| 1.0 - 2.0 * (x[0] / 2.0).sin().powi(2);
    let divide = |x: &[f64]| x[0] * x[1].recip();
    vec![
        near("div.approx.f32", "f32", 2, 2.0, divide),
        near("div.approx.ftz.f32", "f32", 2, 2.0, divide),
        near("div.full.f32", "f32", 2, 2.0, divide),
        near("div.full.ftz.f32", "f32", 2, 2.0, divide),
        near("rcp.approx.f32", "f32", 1, 1.0, |x| x[0].recip()),
        near("rcp.approx.ftz.f32", "f32", 1, 1.0, |x| x[0].recip()),
        near("sqrt.approx.f32", "f32", 1, 2.0, |x| x[0].powf(0.5)),
        near("sqrt.approx.ftz.f32", "f32", 1, 2.0, |x| x[0].powf(0.5)),
        near("rsqrt.approx.f32", "f32", 1, 2.0, |x| x[0].powf(-0.5)),
        near("rsqrt.approx.ftz.f32", "f32", 1, 2.0, |x| x[0].powf(-0.5)),
        near("sin.approx.f32", "f32", 1, 2.0, sine),
        near("sin.approx.ftz.f32", "f32", 1, 2.0, sine),
        near("cos.approx.f32", "f32", 1, 2.0, cosine),
        near("cos.approx.ftz.f32", "f32", 1, 2.0, cosine),
        near("lg2.approx.f32", "f32", 1, 2.0, log2),
        near("lg2.approx.ftz.f32", "f32", 1, 2.0, log2),
        near("ex2.approx.f32", "f32", 1, 2.0, exp2),
        near("ex2.approx.ftz.f32", "f32", 1, 2.0, exp2),
        near("ex2.approx.f16", "f16", 1, 1.0, exp2),
        near("ex2.approx.ftz.bf16", "bf16", 1, 1.0, exp2),
        near("tanh.approx.f32", "f32", 1, 2.0, |x| tanh(x[0])),
        near("tanh.approx.f16", "f16", 1, 1.0, |x| tanh(x[0])),
        near("tanh.approx.bf16", "bf16", 1, 1.0, |x| tanh(x[0])),
    ]
}

/// The opcodes of pairs, each made from one of the rows.
const PAIRS: [&str; 4] = ["ex2.approx.f16x2", "ex2.approx.ftz.bf16x2", "tanh.approx.f16x2", "tanh.approx.bf16x2"];

/// All opcodes.
pub(super) fn opcodes() -> Vec<String> {
    rows().iter().map(|row| row.opcode).chain(PAIRS).map(str::to_owned).collect()
}

/// Numbers from 2^-8 to 2^5, and their negatives, as bits of a format.
fn sample(kind: &str, index: usize) -> i128 {
    let number = 2f64.powf(-8.0 + (index * 7919 % 1000) as f64 * 0.013);
    let bits = super::oracle::number(format(kind), "rn", number);
    if index % 3 == 1 { bits | format(kind).sign() } else { bits }
}

#[test]
fn results_are_within_the_bounds() {
    for row in rows() {
        let format = format(row.kind);
        for start in (0..960).step_by(WARP) {
            let operands: Vec<[u64; WARP]> = (0..row.operands)
                .map(|operand| std::array::from_fn(|lane| sample(row.kind, start + lane + 17 * operand) as u64))
                .collect();
            for (lane, result) in apply(row.opcode, &operands).into_iter().enumerate() {
                let numbers: Vec<f64> = operands.iter().map(|bits| format.value(bits[lane].into())).collect();
                let (exact, result) = ((row.expected)(&numbers), format.value(result.into()));
                let (smallest, normal) = (format.magnitude(1), format.normal());
                let place = smallest * (exact.abs() / normal).max(1.0);
                let close = (exact - result).abs() <= row.places * place + 1e-13;
                let beyond =
                    exact.abs() > format.magnitude(format.infinity - 1) && result == exact.signum() * f64::INFINITY;
                assert!(
                    close || beyond || exact.is_nan() && result.is_nan(),
                    "{}: {numbers:?}: {result}, not {exact}",
                    row.opcode
                );
            }
        }
    }
}

/// What an opcode of `f32` gives for a number.
fn one(opcode: &str, number: f32) -> f32 {
    f32::from_bits(apply(opcode, &[[number.to_bits().into(); WARP]])[0] as u32)
}

#[test]
fn listed_values_are_exact() {
    let (inf, tiny) = (f32::INFINITY, f32::MIN_POSITIVE / 4.0);
    let same = |opcode: &str, number: f32, expected: f32| {
        let result = one(opcode, number);
        let equal = result.to_bits() == expected.to_bits() || result.is_nan() && expected.is_nan();
        assert!(equal, "{opcode} of {number:e}: {result:e}, not {expected:e}");
    };
    for (number, expected) in [(-inf, -0.0), (-0.0, -inf), (0.0, inf), (inf, 0.0), (f32::NAN, f32::NAN), (4.0, 0.25)] {
        same("rcp.approx.f32", number, expected);
    }
    same("rcp.approx.ftz.f32", -tiny, -inf);
    for (number, expected) in [(-inf, f32::NAN), (-1.0, f32::NAN), (-0.0, -0.0), (0.0, 0.0), (inf, inf), (4.0, 2.0)] {
        same("sqrt.approx.f32", number, expected);
    }
    same("sqrt.approx.ftz.f32", -tiny, -0.0);
    for (number, expected) in [(-inf, f32::NAN), (-1.0, f32::NAN), (-0.0, -inf), (0.0, inf), (inf, 0.0), (4.0, 0.5)] {
        same("rsqrt.approx.f32", number, expected);
    }
    same("rsqrt.approx.ftz.f32", tiny, inf);
    for (number, expected) in [(-inf, f32::NAN), (-0.0, -0.0), (0.0, 0.0), (inf, f32::NAN)] {
        same("sin.approx.f32", number, expected);
    }
    same("sin.approx.ftz.f32", -tiny, -0.0);
    for (number, expected) in [(-inf, f32::NAN), (-0.0, 1.0), (0.0, 1.0), (inf, f32::NAN)] {
        same("cos.approx.f32", number, expected);
    }
    same("cos.approx.ftz.f32", tiny, 1.0);
    for (number, expected) in [(-inf, f32::NAN), (-0.0, -inf), (0.0, -inf), (inf, inf), (8.0, 3.0), (tiny, -128.0)] {
        same("lg2.approx.f32", number, expected);
    }
    same("lg2.approx.ftz.f32", tiny, -inf);
    for (number, expected) in [(-inf, 0.0), (-0.0, 1.0), (0.0, 1.0), (inf, inf), (-128.0, tiny), (128.0, inf)] {
        same("ex2.approx.f32", number, expected);
    }
    same("ex2.approx.ftz.f32", -128.0, 0.0);
    for (number, expected) in [(-inf, -1.0), (-0.0, -0.0), (0.0, 0.0), (inf, 1.0), (f32::NAN, f32::NAN)] {
        same("tanh.approx.f32", number, expected);
    }
}

#[test]
fn a_large_divisor_gives_zero() {
    let divide = |opcode: &str, a: f32, b: f32| {
        let operands = [[a.to_bits().into(); WARP], [b.to_bits().into(); WARP]];
        f32::from_bits(apply(opcode, &operands)[0] as u32)
    };
    let large = 1.5 * 2f32.powi(126);
    for opcode in ["div.approx.f32", "div.approx.ftz.f32"] {
        assert_eq!(divide(opcode, 3.0, large), 0.0);
        assert!(divide(opcode, f32::INFINITY, large).is_nan());
        assert_eq!(divide(opcode, 3.0, 2f32.powi(126)), 3.0 * 2f32.powi(-126));
    }
    assert_eq!(divide("div.full.f32", large, large), 1.0);
}

#[test]
fn pairs_do_what_single_numbers_do() {
    for opcode in PAIRS {
        let single = opcode.trim_end_matches("x2");
        let kind = single.rsplit('.').next().expect("a type");
        let (low, high): (Vec<u64>, Vec<u64>) =
            (0..WARP).map(|lane| (sample(kind, lane) as u64, sample(kind, lane + WARP) as u64)).unzip();
        let (low, high): ([u64; WARP], [u64; WARP]) =
            (low.try_into().expect("a warp"), high.try_into().expect("a warp"));
        let pairs = std::array::from_fn(|lane| high[lane] << 16 | low[lane]);
        let (low, high) = (apply(single, &[low]), apply(single, &[high]));
        assert_eq!(apply(opcode, &[pairs]), std::array::from_fn(|lane| high[lane] << 16 | low[lane]), "{opcode}");
    }
}

#[test]
fn subnormal_results_are_flushed() {
    let format = format("bf16");
    let operand = super::oracle::number(format, "rn", -130.0) as u64;
    assert_eq!(flushed(format, format.bits(2f64.powi(-130)), true), 0);
    assert_eq!(apply("ex2.approx.ftz.bf16", &[[operand; WARP]]), [0; WARP]);
}
