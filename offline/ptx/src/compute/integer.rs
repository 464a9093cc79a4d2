//! Integer arithmetic (PTX ISA 8.7, section 9.7.1): sums, products, quotients, extrema and dot products; and halves of
//! words side by side.
//!
//! The manual leaves a division by zero open. Here the quotient is then all ones, as the hardware's is, and the
//! remainder is the dividend. The most negative number divided by minus one gives itself, remainder zero.

use super::function::Function;
use super::lanewise::{Number, Words, for_flag, for_type, op};

/// The function of an opcode of integer arithmetic.
pub(super) fn find(name: &str, middle: &[&str], kind: &str) -> Option<Function> {
    let mut words = Words(middle);
    match name {
        "add" | "sub" => sum(name, &mut words, kind),
        "mul" => product(words.0, kind),
        "mad" => product_sum(words.0, kind),
        "mul24" | "mad24" => product24(name, words.0, kind),
        "div" | "rem" if words.end().is_some() => quotient(name, kind),
        "min" | "max" => extremum(name, &mut words, kind),
        "abs" | "neg" if words.end().is_some() => sign(name, kind),
        "sad" if words.end().is_some() => for_type!(kind, T in {
            "u16" => u16, "s16" => i16, "u32" => u32, "s32" => i32, "u64" => u64, "s64" => i64,
        } => Some(op!(|a: T, b: T, c: T| -> T {
            c.wrapping_add(if a > b { a.wrapping_sub(b) } else { b.wrapping_sub(a) })
        }))),
        "dp4a" => dot4(words.0, kind),
        "dp2a" => dot2(words.0, kind),
        _ => None,
    }
}

/// `add` and `sub`: wrapping; the saturating forms exist for `s32` alone.
fn sum(name: &str, words: &mut Words, kind: &str) -> Option<Function> {
    let saturates = words.take("sat");
    words.end()?;
    if saturates {
        return match (name, kind) {
            ("add", "s32") => Some(op!(|a: i32, b: i32| -> i32 { a.saturating_add(b) })),
            ("sub", "s32") => Some(op!(|a: i32, b: i32| -> i32 { a.saturating_sub(b) })),
            _ => None,
        };
    }
    if let ("add", "u16x2" | "s16x2") = (name, kind) {
        const PAIR: bool = true;
        return Some(op!(PAIR, |a: u16, b: u16| -> u16 { a.wrapping_add(b) }));
    }
    for_type!(kind, T in { "u16" | "s16" => u16, "u32" | "s32" => u32, "u64" | "s64" => u64 } => {
        for_flag!(name == "add", ADD => Some(op!(|a: T, b: T| -> T {
            if ADD { a.wrapping_add(b) } else { a.wrapping_sub(b) }
        })))
    })
}

/// `mul`: the lower or the upper half of the product, or all of it in a register of twice the width.
fn product(words: &[&str], kind: &str) -> Option<Function> {
    match words {
        ["lo"] => for_type!(kind, T in { "u16" | "s16" => u16, "u32" | "s32" => u32, "u64" | "s64" => u64 } =>
            Some(op!(|a: T, b: T| -> T { a.wrapping_mul(b) }))),
        ["hi"] => for_type!(kind, T in {
            "u16" => u16, "s16" => i16, "u32" => u32, "s32" => i32, "u64" => u64, "s64" => i64,
        } => Some(op!(|a: T, b: T| -> T { a.high(b) }))),
        ["wide"] => for_type!(kind, T in { "u16" => u16, "s16" => i16, "u32" => u32, "s32" => i32 } =>
            Some(op!(|a: T, b: T| -> <T as Whole>::Wide { a.wide(b) }))),
        _ => None,
    }
}

/// `mad`: a half of a product, or all of it, and a third operand.
fn product_sum(words: &[&str], kind: &str) -> Option<Function> {
    match words {
        ["lo"] => for_type!(kind, T in { "u16" | "s16" => u16, "u32" | "s32" => u32, "u64" | "s64" => u64 } =>
            Some(op!(|a: T, b: T, c: T| -> T { a.wrapping_mul(b).wrapping_add(c) }))),
        ["hi"] => for_type!(kind, T in {
            "u16" => u16, "s16" => i16, "u32" => u32, "s32" => i32, "u64" => u64, "s64" => i64,
        } => Some(op!(|a: T, b: T, c: T| -> T { a.high(b).wrapping_add(c) }))),
        ["hi", "sat"] if kind == "s32" => Some(op!(|a: i32, b: i32, c: i32| -> i32 { a.high(b).saturating_add(c) })),
        ["wide"] => for_type!(kind, T in { "u16" => u16, "s16" => i16, "u32" => u32, "s32" => i32 } =>
            Some(op!(|a: T, b: T, c: <T as Whole>::Wide| -> <T as Whole>::Wide { a.wide(b).wrapping_add(c) }))),
        _ => None,
    }
}

/// `mul24` and `mad24`: products of the operands' lower 24 bits; `lo` keeps bits 0 to 31 of the 48, `hi` bits 16 to 47.
fn product24(name: &str, words: &[&str], kind: &str) -> Option<Function> {
    let high = match words {
        ["lo"] => false,
        ["hi"] => true,
        ["hi", "sat"] if (name, kind) == ("mad24", "s32") => {
            return Some(op!(|a: i32, b: i32, c: i32| -> i32 {
                ((i64::from(a << 8 >> 8) * i64::from(b << 8 >> 8)) >> 16).saturating_add(c.into()).clamp(LEAST, MOST)
                    as i32
            }));
        }
        _ => return None,
    };
    for_type!(kind, T in { "u32" => u32, "s32" => i32 } => for_flag!(high, HIGH => {
        const SHIFT: u32 = if HIGH { 16 } else { 0 };
        match name {
            "mul24" => Some(op!(|a: T, b: T| -> T {
                ((i64::from(a << 8 >> 8) * i64::from(b << 8 >> 8)) >> SHIFT) as T
            })),
            _ => Some(op!(|a: T, b: T, c: T| -> T {
                c.wrapping_add(((i64::from(a << 8 >> 8) * i64::from(b << 8 >> 8)) >> SHIFT) as T)
            })),
        }
    }))
}

/// The bounds of `s32`.
const LEAST: i64 = i32::MIN as i64;
const MOST: i64 = i32::MAX as i64;

/// `div` and `rem`; see the file's description for a divisor of zero.
fn quotient(name: &str, kind: &str) -> Option<Function> {
    for_type!(kind, T in {
        "u16" => u16, "s16" => i16, "u32" => u32, "s32" => i32, "u64" => u64, "s64" => i64,
    } => for_flag!(name == "div", DIV => Some(op!(|a: T, b: T| -> T {
        match (b, DIV) {
            (0, true) => !0,
            (0, false) => a,
            (_, true) => a.wrapping_div(b),
            (_, false) => a.wrapping_rem(b),
        }
    }))))
}

/// `min` and `max`; `relu` then takes zero for a negative result.
fn extremum(name: &str, words: &mut Words, kind: &str) -> Option<Function> {
    let relu = words.take("relu");
    words.end()?;
    if relu && !matches!(kind, "s32" | "s16x2") {
        return None;
    }
    let (part, pair) = kind.strip_suffix("x2").map_or((kind, false), |part| (part, true));
    for_flag!(name == "min", MIN => for_flag!(relu, RELU => for_flag!(pair, PAIR =>
        for_type!(part, T in { "u16" => u16, "s16" => i16 } =>
            Some(op!(PAIR, |a: T, b: T| -> T { extreme::<MIN, RELU, T>(a, b) })))
        .or_else(|| for_type!(kind, T in { "u32" => u32, "s32" => i32, "u64" => u64, "s64" => i64 } =>
            Some(op!(|a: T, b: T| -> T { extreme::<MIN, RELU, T>(a, b) })))))))
}

/// The smaller or the larger of two numbers, and not less than zero where `RELU` says so.
#[inline(always)]
fn extreme<const MIN: bool, const RELU: bool, T: Ord + Default>(a: T, b: T) -> T {
    let extreme = if (a < b) == MIN { a } else { b };
    if RELU && extreme < T::default() { T::default() } else { extreme }
}

/// `abs` and `neg`, which leave the most negative number as it is.
fn sign(name: &str, kind: &str) -> Option<Function> {
    for_type!(kind, T in { "s16" => i16, "s32" => i32, "s64" => i64 } => match name {
        "abs" => Some(op!(|a: T| -> T { a.wrapping_abs() })),
        _ => Some(op!(|a: T| -> T { a.wrapping_neg() })),
    })
}

/// `dp4a`: the dot product of four bytes with four bytes, and a third operand. The types are those of `a` and of `b`.
fn dot4(words: &[&str], kind: &str) -> Option<Function> {
    let [a_kind] = words else { return None };
    for_type!(*a_kind, A in { "u32" => u8, "s32" => i8 } => for_type!(kind, B in { "u32" => u8, "s32" => i8 } =>
    Some(op!(|a: u32, b: u32, c: u32| -> u32 {
        (0..4).fold(c, |sum, byte| {
            let (a, b) = ((a >> (8 * byte)) as A, (b >> (8 * byte)) as B);
            sum.wrapping_add((i32::from(a) * i32::from(b)) as u32)
        })
    }))))
}

/// `dp2a`: the dot product of two halves with the lower or the upper two bytes, and a third operand.
fn dot2(words: &[&str], kind: &str) -> Option<Function> {
    let [half @ ("lo" | "hi"), a_kind] = words else { return None };
    for_flag!(*half == "hi", HIGH =>
    for_type!(*a_kind, A in { "u32" => u16, "s32" => i16 } => for_type!(kind, B in { "u32" => u8, "s32" => i8 } =>
        Some(op!(|a: u32, b: u32, c: u32| -> u32 {
            (0..2).fold(c, |sum, part| {
                let (a, b) = ((a >> (16 * part)) as A, (b >> (8 * part + if HIGH { 16 } else { 0 })) as B);
                sum.wrapping_add((i32::from(a) * i32::from(b)) as u32)
            })
        })))))
}

/// What the types of integers have in common.
trait Whole: Number {
    /// The type of twice the width.
    type Wide;
    /// The whole product.
    fn wide(self, other: Self) -> Self::Wide;
    /// The upper half of the product.
    fn high(self, other: Self) -> Self;
}

macro_rules! whole {
    ($($number:ty, $wide:ty;)*) => {$(
        impl Whole for $number {
            type Wide = $wide;
            #[inline(always)]
            fn wide(self, other: Self) -> $wide {
                <$wide>::from(self) * <$wide>::from(other)
            }
            #[inline(always)]
            fn high(self, other: Self) -> Self {
                (self.wide(other) >> <$number>::BITS) as $number
            }
        }
    )*};
}

whole! {
    u16, u32;
    i16, i32;
    u32, u64;
    i32, i64;
    u64, u128;
    i64, i128;
}
