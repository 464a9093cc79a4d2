//! Logic, shifts and fields of bits (PTX ISA 8.7, sections 9.7.1 and 9.7.8), and permutations of bytes (9.7.9.7).

use super::function::Function;
use super::lanewise::{for_flag, for_type, op};

/// The function of an opcode of logic, of shifts or of bit fields.
pub(super) fn find(name: &str, middle: &[&str], kind: &str) -> Option<Function> {
    match (name, middle) {
        ("and" | "or" | "xor" | "not" | "cnot", []) => logic(name, kind),
        ("shl" | "shr", []) => shift(name, kind),
        ("shf", [direction @ ("l" | "r"), mode @ ("wrap" | "clamp")]) if kind == "b32" => funnel(direction, mode),
        ("lop3", []) if kind == "b32" => {
            Some(op!(|a: u32, b: u32, c: u32, table: u32| -> u32 { lop3(a, b, c, table) }))
        }
        ("prmt", []) if kind == "b32" => Some(op!(|a: u32, b: u32, control: u32| -> u32 { permute(a, b, control) })),
        ("prmt", ["b32"]) => permute_by_mode(kind),
        ("brev", []) => for_type!(kind, T in { "b32" => u32, "b64" => u64 } =>
            Some(op!(|a: T| -> T { a.reverse_bits() }))),
        ("popc", []) => for_type!(kind, T in { "b32" => u32, "b64" => u64 } =>
            Some(op!(|a: T| -> u32 { a.count_ones() }))),
        ("clz", []) => for_type!(kind, T in { "b32" => u32, "b64" => u64 } =>
            Some(op!(|a: T| -> u32 { a.leading_zeros() }))),
        ("bfind", [] | ["shiftamt"]) => find_bit(!middle.is_empty(), kind),
        ("bfe", []) => extract(kind),
        ("bfi", []) => insert(kind),
        ("bmsk", [mode @ ("clamp" | "wrap")]) if kind == "b32" => mask(mode),
        ("szext", [mode @ ("clamp" | "wrap")]) => extend(mode, kind),
        ("fns", []) if kind == "b32" => {
            Some(op!(|mask: u32, base: u32, offset: i32| -> u32 { nth_set(mask, base, offset) }))
        }
        _ => None,
    }
}

/// `and`, `or`, `xor`, `not` and `cnot`, which is one for zero and zero for all else.
fn logic(name: &str, kind: &str) -> Option<Function> {
    for_type!(kind, T in { "b16" => u16, "b32" => u32, "b64" => u64 } => match name {
        "and" => Some(op!(|a: T, b: T| -> T { a & b })),
        "or" => Some(op!(|a: T, b: T| -> T { a | b })),
        "xor" => Some(op!(|a: T, b: T| -> T { a ^ b })),
        "not" => Some(op!(|a: T| -> T { !a })),
        _ => Some(op!(|a: T| -> T { T::from(a == 0) })),
    })
}

/// `shl` and `shr`: an amount of the width or more shifts everything out.
fn shift(name: &str, kind: &str) -> Option<Function> {
    match (name, kind) {
        ("shl", "b16") => Some(op!(|a: u16, amount: u32| -> u16 { a.checked_shl(amount).unwrap_or(0) })),
        ("shl", "b32") => Some(op!(|a: u32, amount: u32| -> u32 { a.checked_shl(amount).unwrap_or(0) })),
        ("shl", "b64") => Some(op!(|a: u64, amount: u32| -> u64 { a.checked_shl(amount).unwrap_or(0) })),
        ("shr", "s16") => Some(op!(|a: i16, amount: u32| -> i16 { a >> amount.min(15) })),
        ("shr", "s32") => Some(op!(|a: i32, amount: u32| -> i32 { a >> amount.min(31) })),
        ("shr", "s64") => Some(op!(|a: i64, amount: u32| -> i64 { a >> amount.min(63) })),
        ("shr", "b16" | "u16") => Some(op!(|a: u16, amount: u32| -> u16 { a.checked_shr(amount).unwrap_or(0) })),
        ("shr", "b32" | "u32") => Some(op!(|a: u32, amount: u32| -> u32 { a.checked_shr(amount).unwrap_or(0) })),
        ("shr", "b64" | "u64") => Some(op!(|a: u64, amount: u32| -> u64 { a.checked_shr(amount).unwrap_or(0) })),
        _ => None,
    }
}

/// `shf`: the upper half of two words shifted left, or the lower half of them shifted right. The second operand is the
/// upper word.
fn funnel(direction: &str, mode: &str) -> Option<Function> {
    for_flag!(direction == "l", LEFT => for_flag!(mode == "clamp", CLAMP =>
    Some(op!(|low: u32, high: u32, amount: u32| -> u32 {
        let amount = if CLAMP { amount.min(32) } else { amount & 31 };
        let both = u64::from(high) << 32 | u64::from(low);
        if LEFT { ((both << amount) >> 32) as u32 } else { (both >> amount) as u32 }
    }))))
}

/// Each bit of the result is the bit of the table that the three operands' bits choose, `a`'s the highest.
#[inline(always)]
fn lop3(a: u32, b: u32, c: u32, table: u32) -> u32 {
    (0..8).fold(0, |result, row| {
        let chosen = (if row & 4 == 0 { !a } else { a })
            & (if row & 2 == 0 { !b } else { b })
            & (if row & 1 == 0 { !c } else { c });
        result | chosen & (table >> row & 1).wrapping_neg()
    })
}

/// `prmt`: four bytes out of the eight of `a` and `b`, chosen by the nibbles of `control`; a nibble's highest bit
/// spreads the byte's sign.
#[inline(always)]
fn permute(a: u32, b: u32, control: u32) -> u32 {
    let bytes = u64::from(b) << 32 | u64::from(a);
    (0..4).fold(0, |result, place| {
        let selector = control >> (4 * place) & 15;
        let byte = (bytes >> (8 * (selector & 7))) as u8;
        let byte = if selector & 8 == 0 { byte } else { (byte as i8 >> 7) as u8 };
        result | u32::from(byte) << (8 * place)
    })
}

/// `prmt` with a mode: the two lowest bits of the control choose one of four patterns.
fn permute_by_mode(mode: &str) -> Option<Function> {
    /// A permutation whose byte `place` comes from byte `source(place, control)`.
    macro_rules! pattern {
        ($source:expr) => {
            Some(op!(|a: u32, b: u32, control: u32| -> u32 {
                let source: fn(u32, u32) -> u32 = $source;
                permute(a, b, (0..4).fold(0, |nibbles, place| nibbles | source(place, control & 3) << (4 * place)))
            }))
        };
    }
    match mode {
        "f4e" => pattern!(|place, control| control + place),
        "b4e" => pattern!(|place, control| control.wrapping_sub(place) & 7),
        "rc8" => pattern!(|_, control| control),
        "ecl" => pattern!(|place, control| control.max(place)),
        "ecr" => pattern!(|place, control| control.min(place)),
        "rc16" => pattern!(|place, control| (control & 1) * 2 + (place & 1)),
        _ => None,
    }
}

/// `bfind`: the place of the highest bit that differs from the sign, or its distance from the top; all ones if there is
/// none.
fn find_bit(distance: bool, kind: &str) -> Option<Function> {
    for_flag!(distance, DISTANCE => match kind {
        "u32" => Some(op!(|a: u32| -> u32 { place::<DISTANCE>(a.leading_zeros(), 32) })),
        "u64" => Some(op!(|a: u64| -> u32 { place::<DISTANCE>(a.leading_zeros(), 64) })),
        "s32" => Some(op!(|a: i32| -> u32 { place::<DISTANCE>((a ^ a >> 31).leading_zeros(), 32) })),
        "s64" => Some(op!(|a: i64| -> u32 { place::<DISTANCE>((a ^ a >> 63).leading_zeros(), 64) })),
        _ => None,
    })
}

/// The place of the highest bit below `zeros` zeros, or its distance from the top.
#[inline(always)]
fn place<const DISTANCE: bool>(zeros: u32, width: u32) -> u32 {
    match (zeros == width, DISTANCE) {
        (true, _) => u32::MAX,
        (_, true) => zeros,
        (_, false) => width - 1 - zeros,
    }
}

/// `bfe`: a field of bits, with zeros or with copies of its highest bit above it. Position and length are taken modulo
/// 256.
fn extract(kind: &str) -> Option<Function> {
    match kind {
        "u32" | "u64" => for_type!(kind, T in { "u32" => u32, "u64" => u64 } =>
        Some(op!(|a: T, from: u32, length: u32| -> T {
            let above = T::MAX.checked_shl(length & 0xff).unwrap_or(0);
            a.checked_shr(from & 0xff).unwrap_or(0) & !above
        }))),
        _ => for_type!(kind, T in { "s32" => i32, "s64" => i64 } =>
        Some(op!(|a: T, from: u32, length: u32| -> T {
            let (from, length) = ((from & 0xff).min(T::BITS - 1), length & 0xff);
            let end = (from + length).clamp(1, T::BITS);
            if length == 0 { 0 } else { a << (T::BITS - end) >> (T::BITS - end + from) }
        }))),
    }
}

/// `bfi`: the second operand with a field of bits replaced by the lowest bits of the first. Position and length are
/// taken modulo 256.
fn insert(kind: &str) -> Option<Function> {
    for_type!(kind, T in { "b32" => u32, "b64" => u64 } =>
    Some(op!(|field: T, into: T, from: u32, length: u32| -> T {
        let above = T::MAX.checked_shl(length & 0xff).unwrap_or(0);
        let mask = (!above).checked_shl(from & 0xff).unwrap_or(0);
        into & !mask | field.checked_shl(from & 0xff).unwrap_or(0) & mask
    })))
}

/// `bmsk`: ones from a position over a length.
fn mask(mode: &str) -> Option<Function> {
    for_flag!(mode == "clamp", CLAMP => Some(op!(|from: u32, length: u32| -> u32 {
        let (from, length) = if CLAMP { (from, length) } else { (from & 31, length & 31) };
        (!u32::MAX.checked_shl(length).unwrap_or(0)).checked_shl(from).unwrap_or(0)
    })))
}

/// `szext`: a number of so many bits with its sign, or with zeros, in the bits above it.
fn extend(mode: &str, kind: &str) -> Option<Function> {
    for_flag!(mode == "clamp", CLAMP => for_type!(kind, T in { "u32" => u32, "s32" => i32 } =>
    Some(op!(|a: T, width: u32| -> T {
        let width = if CLAMP { width.min(32) } else { width & 31 };
        if width == 0 { 0 } else { a << (32 - width) >> (32 - width) }
    }))))
}

/// `fns`: the place of the `offset`-th set bit, counted from `base` upwards, or downwards for a negative offset; all
/// ones if there is none.
#[inline(always)]
fn nth_set(mask: u32, base: u32, offset: i32) -> u32 {
    if base > 31 {
        return u32::MAX;
    }
    let upwards = u32::MAX << base;
    let (mut rest, count) = match offset {
        0 => (mask & 1 << base, 1),
        1.. => (mask & upwards, offset.unsigned_abs()),
        _ => ((mask & !(upwards << 1)).reverse_bits(), offset.unsigned_abs()),
    };
    for _ in 1..count.min(33) {
        rest &= rest.wrapping_sub(1);
    }
    match (rest, offset < 0) {
        (0, _) => u32::MAX,
        (_, false) => rest.trailing_zeros(),
        (_, true) => 31 - rest.trailing_zeros(),
    }
}
