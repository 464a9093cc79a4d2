//! Conversions to and from pairs, and to the formats that have no arithmetic (PTX ISA 8.7, section 9.7.9.21, `cvt`, and
//! 9.7.9.22, `cvt.pack`): `f16x2`, `bf16x2`, `tf32`, and the pairs of 8, 6 and 4 bits.
//!
//! Of two operands the first goes to the upper part.

use super::arithmetic::Arithmetic;
use super::floats::{Bf16, F16, Float};
use super::function::Function;
use super::lanewise::{Words, for_flag, for_type, op};
use super::rounding::{BRAIN, E2M1, E2M3, E3M2, E4M3, E5M2, Format, HALF, Rounding, TENSOR, for_rounding};

/// The function of a conversion to or from a pair, or to a format that has no arithmetic.
pub(super) fn find(words: &[&str], target: &str, source: &str) -> Option<Function> {
    if let ["pack", "sat", packed] = words {
        return pack_third(packed, target, source);
    }
    if let ["pack", "sat"] = words {
        return pack(target, source);
    }
    let mut words = Words(words);
    let rounding = ["rn", "rz", "rna"].into_iter().find(|word| words.take(word))?;
    let (rectifies, finite) = options(&mut words);
    words.end()?;
    match (target, source) {
        ("f16" | "bf16", "f32") if rectifies || finite => single(target, rounding, rectifies, finite),
        ("f16x2" | "bf16x2", "f32") => pair(target, rounding, rectifies, finite),
        ("tf32", "f32") => tensor(rounding, rectifies, finite),
        (_, "f32" | "f16x2") if rounding == "rn" && finite => small_pair(target, source, rectifies),
        ("f16x2", _) if rounding == "rn" && !finite => from_small_pair(source, rectifies),
        _ => None,
    }
}

/// Whether `relu` and `satfinite` follow, in whichever order.
fn options(words: &mut Words) -> (bool, bool) {
    let first = words.take("relu");
    let finite = words.take("satfinite");
    (words.take("relu") || first, finite)
}

/// A compile-time choice of a format of 16 bits.
macro_rules! for_format {
    ($name:expr, $F:ident in { $($text:literal => $format:expr),+ $(,)? } => $body:expr) => {
        match $name {
            $($text => {
                const $F: Format = $format;
                $body
            })+
            _ => None,
        }
    };
}

/// The bits of a number in a format, after `relu` and with `satfinite` as asked.
#[inline(always)]
fn bits<const RELU: bool, const FINITE: bool>(number: f64, format: Format, rounding: Rounding) -> u32 {
    let number = if RELU { number.rectified() } else { number };
    if FINITE { format.narrow_finite(number, rounding) } else { format.narrow(number, rounding) }
}

/// `f32` to a format of 16 bits with `relu` or `satfinite`.
fn single(target: &str, word: &str, rectifies: bool, finite: bool) -> Option<Function> {
    for_flag!(rectifies, RELU => for_flag!(finite, FINITE => for_rounding!(word, R =>
        for_format!(target, F in { "f16" => HALF, "bf16" => BRAIN } =>
            Some(op!(|a: f32| -> u32 { bits::<RELU, FINITE>(a.into(), F, R) }))))))
}

/// Two numbers of `f32` to a pair of 16 bits each.
fn pair(target: &str, word: &str, rectifies: bool, finite: bool) -> Option<Function> {
    if (word, rectifies, finite) == ("rn", false, false) {
        return for_type!(target, T in { "f16x2" => F16, "bf16x2" => Bf16 } => Some(op!(|a: f32, b: f32| -> u32 {
            let (a, b) = (T::of_single(a, Rounding::Nearest), T::of_single(b, Rounding::Nearest));
            u32::from(a.0) << 16 | u32::from(b.0)
        })));
    }
    for_flag!(rectifies, RELU => for_flag!(finite, FINITE => for_rounding!(word, R =>
    for_format!(target, F in { "f16x2" => HALF, "bf16x2" => BRAIN } =>
        Some(op!(|a: f32, b: f32| -> u32 {
            bits::<RELU, FINITE>(a.into(), F, R) << 16 | bits::<RELU, FINITE>(b.into(), F, R)
        }))))))
}

/// `f32` to `tf32`, the bits below it zero; a NaN has them set, as that of `f32` has.
fn tensor(word: &str, rectifies: bool, finite: bool) -> Option<Function> {
    if word == "rna" {
        const R: Rounding = Rounding::NearestAway;
        return match rectifies {
            false => for_flag!(finite, FINITE => Some(op!(|a: f32| -> u32 { tensor_bits::<false, FINITE>(a, R) }))),
            true => None,
        };
    }
    for_flag!(rectifies, RELU => for_flag!(finite, FINITE => for_rounding!(word, R =>
        Some(op!(|a: f32| -> u32 { tensor_bits::<RELU, FINITE>(a, R) })))))
}

/// The bits of a number of `f32` in `tf32`.
#[inline(always)]
fn tensor_bits<const RELU: bool, const FINITE: bool>(a: f32, rounding: Rounding) -> u32 {
    let bits = bits::<RELU, FINITE>(a.into(), TENSOR, rounding) << 13;
    if a.is_nan() { 0x7fff_ffff } else { bits }
}

/// Two numbers of `f32`, or a pair of `f16`, to a pair of small numbers; what is beyond the largest becomes it.
fn small_pair(target: &str, source: &str, rectifies: bool) -> Option<Function> {
    const R: Rounding = Rounding::Nearest;
    for_flag!(rectifies, RELU => for_format!(target, F in {
        "e4m3x2" => E4M3, "e5m2x2" => E5M2, "e2m3x2" => E2M3, "e3m2x2" => E3M2, "e2m1x2" => E2M1,
    } => {
        const SHIFT: u32 = if F.sign == 3 { 4 } else { 8 };
        match (source, F.sign) {
            ("f32", _) => Some(op!(|a: f32, b: f32| -> u32 {
                bits::<RELU, true>(a.into(), F, R) << SHIFT | bits::<RELU, true>(b.into(), F, R)
            })),
            (_, 7) => Some(op!(|a: u32| -> u32 {
                let (upper, lower) = (F16((a >> 16) as u16), F16(a as u16));
                bits::<RELU, true>(upper.wide(), F, R) << SHIFT | bits::<RELU, true>(lower.wide(), F, R)
            })),
            _ => None,
        }
    }))
}

/// A pair of small numbers to a pair of `f16`, which holds them all.
fn from_small_pair(source: &str, rectifies: bool) -> Option<Function> {
    for_flag!(rectifies, RELU => for_format!(source, F in {
        "e4m3x2" => E4M3, "e5m2x2" => E5M2, "e2m3x2" => E2M3, "e3m2x2" => E3M2, "e2m1x2" => E2M1,
    } => {
        const SHIFT: u32 = if F.sign == 3 { 4 } else { 8 };
        const MASK: u32 = (2 << F.sign) - 1;
        Some(op!(|a: u32| -> u32 {
            let (upper, lower) = (F.widen(a >> SHIFT & MASK), F.widen(a & MASK));
            half_bits::<RELU>(upper) << 16 | half_bits::<RELU>(lower)
        }))
    }))
}

/// The bits in `f16` of a number that `f16` holds.
#[inline(always)]
fn half_bits<const RELU: bool>(number: f64) -> u32 {
    let number = if RELU { number.rectified() } else { number };
    F16::of_single(number as f32, Rounding::Nearest).0.into()
}

/// `cvt.pack` of two integers into halves of a word, each the nearest number there is.
fn pack(target: &str, source: &str) -> Option<Function> {
    if source != "s32" {
        return None;
    }
    for_type!(target, T in { "u16" => u16, "s16" => i16 } => Some(op!(|a: i32, b: i32| -> u32 {
        let half = |number: i32| number.clamp(T::MIN.into(), T::MAX.into()) as u16;
        u32::from(half(a)) << 16 | u32::from(half(b))
    })))
}

/// `cvt.pack` of two integers into bytes below the lower bits of a third operand.
fn pack_third(packed: &str, source: &str, third: &str) -> Option<Function> {
    if (source, third) != ("s32", "b32") {
        return None;
    }
    for_type!(packed, T in { "u8" => u8, "s8" => i8 } => Some(op!(|a: i32, b: i32, c: u32| -> u32 {
        let byte = |number: i32| number.clamp(T::MIN.into(), T::MAX.into()) as u8;
        c << 16 | u32::from(byte(a)) << 8 | u32::from(byte(b))
    })))
}
