//! Conversions, against roundings by their definition; those between formats of 16 bits and `f32` for all 65,536
//! numbers, against the `half` crate too.

use super::float::{flushed, saturated};
use super::oracle::{self, Format, Word, format};
use super::{Case, WARP, apply, case, check, decode, width};
use half::{bf16, f16};

const INTEGERS: [&str; 8] = ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"];
const FLOATS: [&str; 4] = ["f16", "bf16", "f32", "f64"];
const ROUNDINGS: [Word; 4] = ["rn", "rz", "rm", "rp"];

/// The least and the largest number of a type.
fn bounds(kind: &str) -> (i128, i128) {
    match kind.starts_with('s') {
        true => (-(1 << (width(kind) - 1)), (1 << (width(kind) - 1)) - 1),
        false => (0, (1 << width(kind)) - 1),
    }
}

/// The words between `cvt` and the types for these choices.
fn words(flushes: bool, saturates: bool) -> String {
    [if flushes { ".ftz" } else { "" }, if saturates { ".sat" } else { "" }].concat()
}

/// Both choices of `ftz` if a type is `f32`, with both of `sat`.
fn choices(target: &str, source: &str) -> Vec<(bool, bool)> {
    let single = target == "f32" || source == "f32";
    [(false, false), (false, true), (true, false), (true, true)]
        .into_iter()
        .filter(|&(ftz, _)| single || !ftz)
        .collect()
}

/// A number's bits after `ftz` where the type is `f32`.
fn flush(kind: &str, bits: i128, flushes: bool) -> i128 {
    flushed(format(kind), bits, flushes && kind == "f32")
}

/// Integers to integers.
fn between_integers(cases: &mut Vec<Case>) {
    for source in INTEGERS {
        for target in INTEGERS {
            let (least, most) = bounds(target);
            cases.push(case(&format!("cvt.{target}.{source}"), target, source, move |x| decode(target, x[0] as u64)));
            cases.push(case(&format!("cvt.sat.{target}.{source}"), target, source, move |x| x[0].clamp(least, most)));
        }
    }
}

/// Integers to floating point.
fn from_integers(cases: &mut Vec<Case>) {
    for source in INTEGERS {
        for target in FLOATS {
            for word in ROUNDINGS {
                for words in if target == "f32" { &["", ".ftz"][..] } else { &[""] } {
                    cases.push(case(&format!("cvt.{word}{words}.{target}.{source}"), target, source, move |x| {
                        oracle::integer(format(target), word, x[0])
                    }));
                }
            }
        }
    }
}

/// A number rounded to an integer by what the words mean.
fn rounded(word: &str, number: f64) -> f64 {
    let (below, above) = (number.floor(), number.ceil());
    match word {
        "rm" => below,
        "rp" => above,
        "rz" => {
            if number < 0.0 {
                above
            } else {
                below
            }
        }
        _ if number - below < above - number => below,
        _ if number - below > above - number => above,
        _ if below % 2.0 == 0.0 => below,
        _ => above,
    }
}

/// Floating point to integers, and to whole numbers of the same type.
fn to_integers(cases: &mut Vec<Case>) {
    for source in FLOATS {
        for word in ROUNDINGS {
            for target in INTEGERS {
                for (flushes, saturates) in choices(target, source) {
                    let opcode = format!("cvt.{word}i{}.{target}.{source}", words(flushes, saturates));
                    let (least, most) = bounds(target);
                    cases.push(case(&opcode, target, source, move |x| {
                        let number = format(source).value(flush(source, x[0], flushes));
                        match number.is_nan() {
                            true if width(source) == 64 || width(target) == 64 => {
                                decode(target, 1 << (width(target) - 1))
                            }
                            true => 0,
                            false => (rounded(word, number) as i128).clamp(least, most),
                        }
                    }));
                }
            }
            for (flushes, saturates) in choices(source, source) {
                let opcode = format!("cvt.{word}i{}.{source}.{source}", words(flushes, saturates));
                cases.push(case(&opcode, source, source, move |x| {
                    let format = format(source);
                    let number = format.value(flush(source, x[0], flushes));
                    saturated(format, format.bits(rounded(word, number).copysign(number)), saturates)
                }));
            }
        }
    }
}

/// Floating point to floating point.
fn between_floats(cases: &mut Vec<Case>) {
    for source in FLOATS {
        for target in FLOATS {
            let rounds = source != target && width(target) <= width(source);
            for word in if rounds { &ROUNDINGS[..] } else { &["rn"] } {
                for (flushes, saturates) in choices(target, source) {
                    let rounding = if rounds { format!(".{word}") } else { String::new() };
                    let opcode = format!("cvt{rounding}{}.{target}.{source}", words(flushes, saturates));
                    cases.push(case(&opcode, target, source, move |x| {
                        let number = format(source).value(flush(source, x[0], flushes));
                        let result = match source == target && !number.is_nan() {
                            true => flush(source, x[0], flushes),
                            false => oracle::number(format(target), word, number),
                        };
                        let canonical = source == target && target.ends_with("16") && number.is_nan();
                        let result = if canonical { format(target).nan } else { result };
                        saturated(format(target), flush(target, result, flushes), saturates)
                    }));
                }
            }
        }
    }
}

/// A number in a format, after `relu` and with `satfinite`.
fn packed(format: Format, word: Word, number: f64, rectifies: bool, finite: bool) -> i128 {
    if number.is_nan() {
        return format.nan;
    }
    let number = if rectifies && number <= 0.0 { 0.0 } else { number };
    let largest = format.infinity - 1;
    if finite && number.abs() > format.magnitude(largest) {
        return largest | if number < 0.0 { format.sign() } else { 0 };
    }
    oracle::number(format, word, number)
}

/// `relu` and `satfinite` in their orders.
const OPTIONS: [(&str, bool, bool); 5] = [
    ("", false, false),
    (".relu", true, false),
    (".satfinite", false, true),
    (".relu.satfinite", true, true),
    (".satfinite.relu", true, true),
];

/// Single numbers and pairs of 16 bits, and `tf32`.
fn to_halves(cases: &mut Vec<Case>) {
    let single = |bits| format("f32").value(bits);
    for word in ["rn", "rz"] {
        for (options, relu, finite) in OPTIONS {
            for kind in ["f16", "bf16"] {
                let convert = move |bits| packed(format(kind), word, single(bits), relu, finite);
                if relu || finite {
                    let opcode = format!("cvt.{word}{options}.{kind}.f32");
                    cases.push(case(&opcode, kind, "f32", move |x| convert(x[0])));
                }
                cases.push(case(&format!("cvt.{word}{options}.{kind}x2.f32"), "b32", "f32 f32", move |x| {
                    convert(x[0]) << 16 | convert(x[1])
                }));
            }
            cases.push(case(&format!("cvt.{word}{options}.tf32.f32"), "b32", "f32", move |x| {
                tensor(packed(format("tf32"), word, single(x[0]), relu, finite))
            }));
        }
    }
    for (options, _, finite) in [OPTIONS[0], OPTIONS[2]] {
        cases.push(case(&format!("cvt.rna{options}.tf32.f32"), "b32", "f32", move |x| {
            tensor(packed(format("tf32"), "rna", single(x[0]), false, finite))
        }));
    }
}

/// `tf32` in a word.
fn tensor(bits: i128) -> i128 {
    if bits == format("tf32").nan { 0x7fff_ffff } else { bits << 13 }
}

/// Pairs of small numbers.
fn small_pairs(cases: &mut Vec<Case>) {
    for (kind, shift) in [("e4m3", 8), ("e5m2", 8), ("e2m3", 8), ("e3m2", 8), ("e2m1", 4)] {
        let small = format(kind);
        for (options, relu, _) in [OPTIONS[2], OPTIONS[3], OPTIONS[4]] {
            let convert = move |number: f64| packed(small, "rn", number, relu, true);
            let single = |bits| format("f32").value(bits);
            cases.push(case(&format!("cvt.rn{options}.{kind}x2.f32"), "b32", "f32 f32", move |x| {
                convert(single(x[0])) << shift | convert(single(x[1]))
            }));
            let half = |bits| format("f16").value(bits);
            if small.sign() == 128 {
                cases.push(case(&format!("cvt.rn{options}.{kind}x2.f16x2"), "b32", "b32", move |x| {
                    convert(half(x[0] >> 16)) << shift | convert(half(x[0] & 0xffff))
                }));
            }
        }
        for (options, relu, _) in [OPTIONS[0], OPTIONS[1]] {
            let mask = 2 * small.sign() - 1;
            let widen = move |bits: i128| {
                let number = match kind {
                    "e5m2" => small.value(bits),
                    "e4m3" if bits & 0x7f == 0x7f => f64::NAN,
                    _ => small.magnitude(bits & (mask >> 1)) * if bits & small.sign() == 0 { 1.0 } else { -1.0 },
                };
                format("f16").bits(if relu && number <= 0.0 { 0.0 } else { number })
            };
            cases.push(case(&format!("cvt.rn{options}.f16x2.{kind}x2"), "b32", "b16", move |x| {
                widen(x[0] >> shift & mask) << 16 | widen(x[0] & mask)
            }));
        }
    }
}

/// `cvt.pack`.
fn packs(cases: &mut Vec<Case>) {
    for kind in ["u16", "s16"] {
        let (least, most) = bounds(kind);
        cases.push(case(&format!("cvt.pack.sat.{kind}.s32"), "b32", "s32 s32", move |x| {
            (x[0].clamp(least, most) & 0xffff) << 16 | x[1].clamp(least, most) & 0xffff
        }));
    }
    for kind in ["u8", "s8"] {
        let (least, most) = bounds(kind);
        cases.push(case(&format!("cvt.pack.sat.{kind}.s32.b32"), "b32", "s32 s32 b32", move |x| {
            x[2] << 16 | (x[0].clamp(least, most) & 0xff) << 8 | x[1].clamp(least, most) & 0xff
        }));
    }
}

/// All cases.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    between_integers(&mut cases);
    from_integers(&mut cases);
    to_integers(&mut cases);
    between_floats(&mut cases);
    to_halves(&mut cases);
    small_pairs(&mut cases);
    packs(&mut cases);
    cases
}

#[test]
fn conversions_are_rounded_once() {
    check(&cases());
}

/// The results of an opcode for each of these words.
fn all(opcode: &str, words: impl Iterator<Item = u64>) -> Vec<(u64, u64)> {
    let words: Vec<u64> = words.collect();
    words
        .chunks_exact(WARP)
        .flat_map(|chunk| {
            let register: [u64; WARP] = chunk.try_into().expect("a warp's worth");
            register.into_iter().zip(apply(opcode, &[register]))
        })
        .collect()
}

#[test]
fn all_numbers_of_16_bits_widen_as_the_half_crate_does() {
    for (bits, result) in all("cvt.f32.f16", 0..1 << 16) {
        let expected = f16::from_bits(bits as u16).to_f32();
        assert!(f32::from_bits(result as u32) == expected || expected.is_nan() && result == 0x7fff_ffff, "{bits:#x}");
    }
    for (bits, result) in all("cvt.f32.bf16", 0..1 << 16) {
        let expected = bf16::from_bits(bits as u16).to_f32();
        assert!(f32::from_bits(result as u32) == expected || expected.is_nan() && result == 0x7fff_ffff, "{bits:#x}");
    }
}

/// Around each number of 16 bits in `f32`: itself, its neighbours, the middle to the next one and the middle's
/// neighbours.
fn around(number: f32, next: f32) -> [u64; 6] {
    let (bits, middle) = (number.to_bits(), number.midpoint(next).to_bits());
    [bits, bits + 1, bits.wrapping_sub(1), middle, middle + 1, middle.wrapping_sub(1)].map(u64::from)
}

#[test]
fn numbers_around_all_of_16_bits_narrow_as_the_half_crate_does() {
    let halves = (0..0xffff).flat_map(|bits| around(f16::from_bits(bits).into(), f16::from_bits(bits + 1).into()));
    for (bits, result) in all("cvt.rn.f16.f32", halves) {
        let number = f32::from_bits(bits as u32);
        let expected = if number.is_nan() { 0x7fff } else { f16::from_f32(number).to_bits() };
        assert_eq!(result, u64::from(expected), "{number:e}");
    }
    let brains = (0..0xffff).flat_map(|bits| around(bf16::from_bits(bits).into(), bf16::from_bits(bits + 1).into()));
    for (bits, result) in all("cvt.rn.bf16.f32", brains) {
        let number = f32::from_bits(bits as u32);
        let expected = if number.is_nan() { 0x7fff } else { bf16::from_f32(number).to_bits() };
        assert_eq!(result, u64::from(expected), "{number:e}");
    }
}
