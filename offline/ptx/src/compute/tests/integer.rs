//! Integer arithmetic, against numbers of 128 bits.

use super::{Case, case, check, width};

const TYPES: [&str; 6] = ["u16", "s16", "u32", "s32", "u64", "s64"];

/// The type of twice the width.
fn wide(kind: &str) -> String {
    format!("{}{}", &kind[..1], 2 * width(kind))
}

/// The quotient, all ones for a divisor of zero.
fn quotient(a: i128, b: i128) -> i128 {
    if b == 0 { -1 } else { a / b }
}

/// The remainder, the dividend for a divisor of zero.
fn remainder(a: i128, b: i128) -> i128 {
    if b == 0 { a } else { a % b }
}

/// The nearest number of `s32`.
fn clamp(number: i128) -> i128 {
    number.clamp(i32::MIN.into(), i32::MAX.into())
}

/// The number that the lower bits are, with the sign of the type.
fn low(number: i128, bits: u32, signed: bool) -> i128 {
    let number = number.rem_euclid(1 << bits);
    if signed && number >= 1 << (bits - 1) { number - (1 << bits) } else { number }
}

/// Opcodes that all types of 16 to 64 bits have.
fn common(cases: &mut Vec<Case>) {
    for kind in TYPES {
        let (bits, two, three) = (width(kind), format!("{kind} {kind}"), format!("{kind} {kind} {kind}"));
        let mut two = |name: &str, expected: fn(i128, i128, u32) -> i128| {
            cases.push(case(&format!("{name}.{kind}"), kind, &two, move |x| expected(x[0], x[1], bits)));
        };
        two("add", |a, b, _| a + b);
        two("sub", |a, b, _| a - b);
        two("mul.lo", |a, b, _| a.wrapping_mul(b));
        two("mul.hi", |a, b, bits| ((a as u128).wrapping_mul(b as u128) >> bits) as i128);
        two("div", |a, b, _| quotient(a, b));
        two("rem", |a, b, _| remainder(a, b));
        two("min", |a, b, _| a.min(b));
        two("max", |a, b, _| a.max(b));
        let mut three = |name: &str, expected: fn(i128, i128, i128, u32) -> i128| {
            cases.push(case(&format!("{name}.{kind}"), kind, &three, move |x| expected(x[0], x[1], x[2], bits)));
        };
        three("mad.lo", |a, b, c, _| a.wrapping_mul(b).wrapping_add(c));
        three("mad.hi", |a, b, c, bits| ((a as u128).wrapping_mul(b as u128) >> bits) as i128 + c);
        three("sad", |a, b, c, _| c + (a - b).abs());
    }
}

/// Opcodes of some types.
fn special(cases: &mut Vec<Case>) {
    for kind in ["u16", "s16", "u32", "s32"] {
        let wide = wide(kind);
        cases.push(case(&format!("mul.wide.{kind}"), &wide, &format!("{kind} {kind}"), |x| x[0] * x[1]));
        let operands = format!("{kind} {kind} {wide}");
        cases.push(case(&format!("mad.wide.{kind}"), &wide, &operands, |x| x[0] * x[1] + x[2]));
    }
    for kind in ["s16", "s32", "s64"] {
        cases.push(case(&format!("abs.{kind}"), kind, kind, |x| x[0].abs()));
        cases.push(case(&format!("neg.{kind}"), kind, kind, |x| -x[0]));
    }
    cases.push(case("add.sat.s32", "s32", "s32 s32", |x| clamp(x[0] + x[1])));
    cases.push(case("sub.sat.s32", "s32", "s32 s32", |x| clamp(x[0] - x[1])));
    cases.push(case("mad.hi.sat.s32", "s32", "s32 s32 s32", |x| clamp(((x[0] * x[1]) >> 32) + x[2])));
    cases.push(case("min.relu.s32", "s32", "s32 s32", |x| x[0].min(x[1]).max(0)));
    cases.push(case("max.relu.s32", "s32", "s32 s32", |x| x[0].max(x[1]).max(0)));
}

/// Products of 24 bits.
fn short(cases: &mut Vec<Case>) {
    for (kind, signed) in [("u32", false), ("s32", true)] {
        for (half, shift) in [("lo", 0), ("hi", 16)] {
            let product = move |x: &[i128]| (low(x[0], 24, signed) * low(x[1], 24, signed)) >> shift;
            cases.push(case(&format!("mul24.{half}.{kind}"), kind, &format!("{kind} {kind}"), product));
            let operands = format!("{kind} {kind} {kind}");
            cases.push(case(&format!("mad24.{half}.{kind}"), kind, &operands, move |x| product(x) + x[2]));
        }
    }
    cases.push(case("mad24.hi.sat.s32", "s32", "s32 s32 s32", |x| {
        clamp(((low(x[0], 24, true) * low(x[1], 24, true)) >> 16) + x[2])
    }));
}

/// Two halves side by side.
fn pairs(cases: &mut Vec<Case>) {
    for (kind, signed) in [("u16x2", false), ("s16x2", true)] {
        let mut add = |name: &str, expected: fn(i128, i128) -> i128| {
            cases.push(case(&format!("{name}.{kind}"), "b32", "b32 b32", move |x| {
                let half = |shift| expected(low(x[0] >> shift, 16, signed), low(x[1] >> shift, 16, signed)) & 0xffff;
                half(16) << 16 | half(0)
            }));
        };
        add("add", |a, b| a + b);
        add("min", |a, b| a.min(b));
        add("max", |a, b| a.max(b));
        if signed {
            add("min.relu", |a, b| a.min(b).max(0));
            add("max.relu", |a, b| a.max(b).max(0));
        }
    }
}

/// Dot products of bytes, and of halves with bytes.
fn dots(cases: &mut Vec<Case>) {
    for (a_kind, a_signed) in [("u32", false), ("s32", true)] {
        for (b_kind, b_signed) in [("u32", false), ("s32", true)] {
            cases.push(case(&format!("dp4a.{a_kind}.{b_kind}"), "b32", "b32 b32 b32", move |x| {
                x[2] + (0..4)
                    .map(|i| low(x[0] >> (8 * i), 8, a_signed) * low(x[1] >> (8 * i), 8, b_signed))
                    .sum::<i128>()
            }));
            for (half, first) in [("lo", 0), ("hi", 2)] {
                cases.push(case(&format!("dp2a.{half}.{a_kind}.{b_kind}"), "b32", "b32 b32 b32", move |x| {
                    let term =
                        |i: i32| low(x[0] >> (16 * i), 16, a_signed) * low(x[1] >> (8 * (first + i)), 8, b_signed);
                    x[2] + term(0) + term(1)
                }));
            }
        }
    }
}

/// All cases.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    common(&mut cases);
    special(&mut cases);
    short(&mut cases);
    pairs(&mut cases);
    dots(&mut cases);
    cases
}

#[test]
fn integers_match_numbers_of_128_bits() {
    check(&cases());
}
