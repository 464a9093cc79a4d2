//! Every opcode that [`find`] knows, against a definition of its own: integers in 128 bits, roundings by search among
//! all numbers of a format, the rest case by case.

mod approximate;
mod compare;
mod convert;
mod float;
mod half;
mod integer;
mod known;
mod logic;
mod oracle;

use super::{Function, find};
use crate::lanes::WARP;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// What an opcode gives for the numbers of one lane.
type Expectation = Box<dyn Fn(&[i128]) -> i128>;

/// An opcode, the types of its result and of its operands, and what it should give for the numbers of one lane.
struct Case {
    opcode: String,
    result: String,
    operands: Vec<String>,
    expected: Expectation,
}

/// A case; types separated by blanks.
fn case(opcode: &str, result: &str, operands: &str, expected: impl Fn(&[i128]) -> i128 + 'static) -> Case {
    Case {
        opcode: opcode.to_owned(),
        result: result.to_owned(),
        operands: operands.split(' ').map(str::to_owned).collect(),
        expected: Box::new(expected),
    }
}

/// The width of a type in bits.
fn width(kind: &str) -> u32 {
    match kind {
        "pred" => 1,
        "byte" => 8,
        _ => kind.trim_start_matches(|letter: char| !letter.is_ascii_digit()).parse().expect("a type with its width"),
    }
}

/// The number that the lower bits of a register are; of floating-point types, the bits.
fn decode(kind: &str, bits: u64) -> i128 {
    let bits = i128::from(bits) & ((1 << width(kind)) - 1);
    if kind.starts_with('s') && bits >> (width(kind) - 1) == 1 { bits - (1 << width(kind)) } else { bits }
}

/// The register that holds a number of a type.
fn encode(kind: &str, number: i128) -> u64 {
    let width = if kind == "s8" { 16 } else { width(kind) };
    (number & ((1 << width) - 1)) as u64
}

/// Bits that matter for a type: edges, small and large numbers, and any.
fn draw(kind: &str, rng: &mut StdRng) -> u64 {
    match kind {
        "amount32" => return rng.random_range(0..70),
        "steps32" => return rng.random_range(-35i32..35) as u32 as u64,
        _ => {}
    }
    let width = width(kind);
    let any: u64 = rng.random();
    let (sign, ones) = (1u64 << (width - 1), u64::MAX >> (64 - width));
    let edges = [0, 1, 2, 3, sign, sign - 1, sign + 1, ones, ones - 1, 0x5555_5555_5555_5555 & ones];
    let special: &[u64] = match kind {
        "f16" => &[0x3c00, 0xbc00, 0x7c00, 0xfc00, 0x7e01, 0x7bff, 0xfbff, 0x0400, 0x03ff, 0x8400, 0x3800],
        "bf16" => &[0x3f80, 0xbf80, 0x7f80, 0xff80, 0x7fc1, 0x7f7f, 0xff7f, 0x0080, 0x007f, 0x8080, 0x3f00],
        "f32" => &[
            0x3f80_0000,
            0xbf80_0000,
            0x7f80_0000,
            0xff80_0000,
            0x7fc0_0001,
            0x7f7f_ffff,
            0xff7f_ffff,
            0x0080_0000,
            0x007f_ffff,
            0x8080_0000,
            0x3f00_0000,
            0x4f00_0000,
            0xcf00_0000,
            0x4b7f_ffff,
        ],
        "f64" => &[
            1.0f64.to_bits(),
            (-1.0f64).to_bits(),
            0x7ff0 << 48,
            0xfff0 << 48,
            0x7ff8_0000_0000_0001,
            f64::MAX.to_bits(),
            f64::MIN.to_bits(),
            0x0010 << 48,
            0.5f64.to_bits(),
            (1e300f64).to_bits(),
            f64::from(f32::MAX).to_bits() + 1,
            f64::from(f32::MAX).to_bits() | 1 << 28,
        ],
        _ => &[],
    };
    match rng.random_range(0..8) {
        0 => edges[rng.random_range(0..edges.len())],
        1 | 2 if !special.is_empty() => special[rng.random_range(0..special.len())],
        3 | 4 => middling(kind, any),
        5 => any & ones >> rng.random_range(0..width),
        _ => any & ones,
    }
}

/// A floating-point number not far from one with any bits below, so that sums meet; for integers any number.
fn middling(kind: &str, any: u64) -> u64 {
    let near = any >> 32 & 31;
    match kind {
        "f16" => any & 0x83ff | (near.min(28) + 1) << 10,
        "bf16" => any & 0x807f | (near + 111) << 7,
        "f32" => any & 0x807f_ffff | (near + 111) << 23,
        "f64" => any & 0x800f_ffff_ffff_ffff | (near + 1007) << 52,
        _ => any & u64::MAX >> (64 - width(kind)),
    }
}

/// Runs an opcode on registers, all given as 64 bits a lane; a predicate is one bit a lane.
fn apply(opcode: &str, operands: &[[u64; WARP]]) -> [u64; WARP] {
    let long = |index: usize| &operands[index];
    let word = |index: usize| operands[index].map(|bits| bits as u32);
    let predicate = |mask: u32| std::array::from_fn(|lane| u64::from(mask >> lane & 1));
    match find(opcode).unwrap_or_else(|| panic!("{opcode} is not known")) {
        Function::W(f) => f(&word(0)).map(u64::from),
        Function::WW(f) => f(&word(0), &word(1)).map(u64::from),
        Function::WWW(f) => f(&word(0), &word(1), &word(2)).map(u64::from),
        Function::WWWW(f) => f(&word(0), &word(1), &word(2), &word(3)).map(u64::from),
        Function::WofL(f) => f(long(0)).map(u64::from),
        Function::L(f) => f(long(0)),
        Function::LL(f) => f(long(0), long(1)),
        Function::LLL(f) => f(long(0), long(1), long(2)),
        Function::LofLW(f) => f(long(0), &word(1)),
        Function::LofLWW(f) => f(long(0), &word(1), &word(2)),
        Function::LofLLW(f) => f(long(0), long(1), &word(2)),
        Function::LofLLWW(f) => f(long(0), long(1), &word(2), &word(3)),
        Function::LofW(f) => f(&word(0)),
        Function::LofWW(f) => f(&word(0), &word(1)),
        Function::LofWWL(f) => f(&word(0), &word(1), long(2)),
        Function::PofW(f) => predicate(f(&word(0))),
        Function::PofWW(f) => predicate(f(&word(0), &word(1))),
        Function::PofL(f) => predicate(f(long(0))),
        Function::PofLL(f) => predicate(f(long(0), long(1))),
    }
}

/// Checks cases on drawn operands, with rubbish above the bits of a narrow one.
fn check(cases: &[Case]) {
    let mut rng = StdRng::seed_from_u64(26);
    for case in cases {
        for _ in 0..40 {
            let rubbish: u64 = rng.random();
            let operands: Vec<[u64; WARP]> = case
                .operands
                .iter()
                .map(|kind| {
                    let above =
                        if kind.starts_with(['f', 'b']) || width(kind) >= 32 { 0 } else { rubbish << width(kind) };
                    std::array::from_fn(|_| draw(kind, &mut rng) | above)
                })
                .collect();
            compare_lanes(case, &operands);
        }
    }
}

/// Checks a case on operands; any NaN of `f64` is as good as another.
fn compare_lanes(case: &Case, operands: &[[u64; WARP]]) {
    let results = apply(&case.opcode, operands);
    for lane in 0..WARP {
        let numbers: Vec<i128> =
            operands.iter().zip(&case.operands).map(|(bits, kind)| decode(kind, bits[lane])).collect();
        let expected = encode(&case.result, (case.expected)(&numbers));
        let both_nan =
            case.result == "f64" && f64::from_bits(expected).is_nan() && f64::from_bits(results[lane]).is_nan();
        assert!(
            both_nan || results[lane] == expected,
            "{} of {numbers:x?}: {:#x}, not {expected:#x}",
            case.opcode,
            results[lane]
        );
    }
}
