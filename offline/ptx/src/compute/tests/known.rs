//! That every opcode known is tested, and what is not an opcode is not known.

use super::{approximate, compare, convert, find, float, half, integer, logic};
use std::collections::HashSet;

/// The opcodes that some test covers.
fn tested() -> HashSet<String> {
    [integer::cases(), logic::cases(), float::cases(), half::cases(), compare::cases(), convert::cases()]
        .into_iter()
        .flatten()
        .map(|case| case.opcode)
        .chain(approximate::opcodes())
        .collect()
}

const KINDS: &str = "b8 b16 b32 b64 u8 u16 u32 u64 s8 s16 s32 s64 f16 bf16 f32 f64 tf32 f16x2 bf16x2 f32x2 u16x2 s16x2 \
    e4m3x2 e5m2x2 e2m3x2 e3m2x2 e2m1x2 pred f4e b4e rc8 ecl ecr rc16";

/// Names, and the words that may follow them in this order, apart from types.
const NAMES: [(&str, &str); 9] = [
    (
        "add sub mul fma mad div rcp sqrt rsqrt min max",
        "lo hi wide rn rz rm rp approx full ftz sat relu NaN xorsign abs",
    ),
    ("abs neg sin cos lg2 ex2 tanh", "rn approx ftz sat relu NaN"),
    ("rem sad mul24 mad24", "lo hi wide sat"),
    ("dp4a dp2a", "lo hi u32 s32"),
    ("and or xor not cnot shl shr lop3 prmt brev popc clz bfe bfi fns copysign", "b32 ftz and wrap"),
    ("shf bfind bmsk szext", "l r shiftamt clamp wrap"),
    ("testp", "finite infinite number notanumber normal subnormal ftz"),
    ("setp", "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan ftz and"),
    ("slct", "ftz b16 b32 b64 u16 u32 u64 s16 s32 s64 f16 f32 f64"),
];

/// Calls a function with each choice of at most four of the words, in order.
fn choices<'a>(chosen: &mut Vec<&'a str>, words: &[&'a str], each: &mut impl FnMut(&[&'a str])) {
    each(chosen);
    if chosen.len() == 5 {
        return;
    }
    for (index, word) in words.iter().enumerate() {
        chosen.push(word);
        choices(chosen, &words[index + 1..], each);
        chosen.pop();
    }
}

/// Candidates with a name, words and a type.
fn candidates(mut each: impl FnMut(String)) {
    let kinds: Vec<&str> = KINDS.split_whitespace().collect();
    for (names, words) in NAMES {
        let words: Vec<&str> = words.split(' ').collect();
        for name in names.split(' ') {
            choices(&mut Vec::new(), &words, &mut |chosen| {
                let start = [&[name], chosen].concat().join(".");
                kinds.iter().for_each(|kind| each(format!("{start}.{kind}")));
            });
        }
    }
    let words = ["pack", "rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi", "ftz", "relu", "satfinite", "sat"];
    choices(&mut Vec::new(), &words, &mut |chosen| {
        if chosen.len() > 3 {
            return;
        }
        let start = [&["cvt"], chosen].concat().join(".");
        for target in &kinds {
            kinds.iter().for_each(|source| each(format!("{start}.{target}.{source}")));
        }
    });
}

#[test]
fn every_known_opcode_is_tested() {
    let tested = tested();
    let mut known = 0;
    candidates(|opcode| {
        if find(&opcode).is_some() {
            known += 1;
            assert!(tested.contains(&opcode), "{opcode} is known, but not tested");
        }
    });
    let unusual = tested.iter().filter(|opcode| opcode.contains("satfinite.relu") || opcode.contains("pack")).count();
    assert!(known + unusual >= tested.len(), "{known} of {} tested opcodes were candidates", tested.len());
}

#[test]
fn other_words_are_not_known() {
    for opcode in [
        "",
        "add",
        "add.",
        ".s32",
        "add.b32",
        "add.s8",
        "add.s32.",
        "add.rn.s32",
        "add.sat.u32",
        "sub.u16x2",
        "mul.s32",
        "mul.lo.f32",
        "mad.wide.s64",
        "mad.f32",
        "fma.f32",
        "fma.rn.sat.relu.f16",
        "fma.rn.sat.bf16",
        "add.ftz.bf16",
        "add.rz.f16",
        "add.rz.f64",
        "add.ftz.f64",
        "div.f32",
        "div.approx.f64",
        "sqrt.f32",
        "min.NaN.f64",
        "min.xorsign.f32",
        "min.relu.u32",
        "abs.u32",
        "neg.b32",
        "and.s32",
        "and.pred",
        "shl.s32",
        "lop3.b64",
        "brev.s32",
        "bfe.b32",
        "bfi.u32",
        "setp.s32",
        "setp.lt.b32",
        "setp.lo.s32",
        "setp.equ.s32",
        "setp.eq.u8",
        "setp.lt.and.s32",
        "setp.lt.ftz.f64",
        "setp.lt.f16x2",
        "testp.zero.f32",
        "ex2.f32",
        "ex2.approx.bf16",
        "ex2.approx.ftz.f16",
        "tanh.approx.ftz.f32",
        "cvt.f32.s32",
        "cvt.rni.f32.s32",
        "cvt.rn.s32.f32",
        "cvt.f16.f32",
        "cvt.rn.f32.f16",
        "cvt.rn.s32.s32",
        "cvt.ftz.f64.f16",
        "cvt.rn.f16x2.f16",
        "cvt.rn.e4m3x2.f32",
        "cvt.rna.f16.f32",
        "cvt.rn.f32",
        "slct.f32",
        "slct.ftz.f32.s32",
        "ld.global.f32",
        "bra",
        "prmt.b32.xyz",
        "dp4a.s32",
        "dp2a.s32.s32",
    ] {
        assert!(find(opcode).is_none(), "{opcode} is known");
    }
}
