//! Logic, shifts and bit fields, against the manual's definitions, bit by bit.

use super::{Case, case, check, width};

/// A number made of the bits that a function gives for places 0 to `bits`.
fn from_bits(bits: u32, bit: impl Fn(u32) -> bool) -> i128 {
    (0..bits).map(|place| i128::from(bit(place)) << place).sum()
}

/// One bit of a number.
fn bit(number: i128, place: u32) -> bool {
    number >> place & 1 == 1
}

/// Logic and counts.
fn logic(cases: &mut Vec<Case>) {
    for kind in ["b16", "b32", "b64"] {
        let two = format!("{kind} {kind}");
        let bits = width(kind);
        cases.push(case(&format!("and.{kind}"), kind, &two, |x| x[0] & x[1]));
        cases.push(case(&format!("or.{kind}"), kind, &two, |x| x[0] | x[1]));
        cases.push(case(&format!("xor.{kind}"), kind, &two, |x| x[0] ^ x[1]));
        cases.push(case(&format!("not.{kind}"), kind, kind, |x| !x[0]));
        cases.push(case(&format!("cnot.{kind}"), kind, kind, |x| i128::from(x[0] == 0)));
        if bits == 16 {
            continue;
        }
        cases.push(case(&format!("brev.{kind}"), kind, kind, move |x| from_bits(bits, |i| bit(x[0], bits - 1 - i))));
        let count = move |x: &[i128]| (0..bits).filter(|&i| bit(x[0], i)).count() as i128;
        cases.push(case(&format!("popc.{kind}"), "u32", kind, count));
        let zeros = move |x: &[i128]| (0..bits).rev().take_while(|&i| !bit(x[0], i)).count() as i128;
        cases.push(case(&format!("clz.{kind}"), "u32", kind, zeros));
    }
    cases.push(case("lop3.b32", "b32", "b32 b32 b32 byte", |x| {
        from_bits(32, |i| {
            bit(x[3], 4 * u32::from(bit(x[0], i)) + 2 * u32::from(bit(x[1], i)) + u32::from(bit(x[2], i)))
        })
    }));
}

/// Shifts.
fn shifts(cases: &mut Vec<Case>) {
    for bits in [16, 32, 64] {
        for letter in ["b", "u", "s"] {
            let kind = format!("{letter}{bits}");
            let right = move |x: &[i128]| x[0] >> x[1].min(100);
            cases.push(case(&format!("shr.{kind}"), &kind, &format!("{kind} amount32"), right));
            cases.push(case(&format!("shr.{kind}"), &kind, &format!("{kind} u32"), right));
        }
        let kind = format!("b{bits}");
        let left = move |x: &[i128]| if x[1] >= bits { 0 } else { x[0] << x[1] };
        cases.push(case(&format!("shl.{kind}"), &kind, &format!("{kind} amount32"), left));
        cases.push(case(&format!("shl.{kind}"), &kind, &format!("{kind} u32"), left));
    }
    for (mode, clamps) in [("clamp", true), ("wrap", false)] {
        let amount = move |c: i128| if clamps { c.min(32) } else { c % 32 };
        for operands in ["b32 b32 amount32", "b32 b32 u32"] {
            cases.push(case(&format!("shf.l.{mode}.b32"), "b32", operands, move |x| {
                (x[1] << 32 | x[0]) << amount(x[2]) >> 32
            }));
            cases.push(case(&format!("shf.r.{mode}.b32"), "b32", operands, move |x| {
                (x[1] << 32 | x[0]) >> amount(x[2])
            }));
        }
    }
}

/// The place of the highest bit that differs from the sign.
fn highest(number: i128, bits: u32) -> Option<u32> {
    (0..bits).rev().find(|&i| bit(number, i) != (number < 0))
}

/// Fields of bits.
fn fields(cases: &mut Vec<Case>) {
    for bits in [32u32, 64] {
        for letter in ["u", "s"] {
            let kind = format!("{letter}{bits}");
            let find = move |x: &[i128]| highest(x[0], bits).map_or(-1, i128::from);
            cases.push(case(&format!("bfind.{kind}"), "u32", &kind, find));
            let distance = move |x: &[i128]| highest(x[0], bits).map_or(-1, |place| i128::from(bits - 1 - place));
            cases.push(case(&format!("bfind.shiftamt.{kind}"), "u32", &kind, distance));
            let signed = letter == "s";
            let extract = move |x: &[i128]| {
                let (from, length) = (x[1] as u32 & 255, x[2] as u32 & 255);
                let sign = signed && length > 0 && bit(x[0], (from + length - 1).min(bits - 1));
                from_bits(bits, |i| if i < length && from + i < bits { bit(x[0], from + i) } else { sign })
            };
            cases.push(case(&format!("bfe.{kind}"), &kind, &format!("{kind} amount32 amount32"), extract));
            cases.push(case(&format!("bfe.{kind}"), &kind, &format!("{kind} u32 u32"), extract));
        }
        let kind = format!("b{bits}");
        let insert = move |x: &[i128]| {
            let (from, length) = (x[2] as u32 & 255, x[3] as u32 & 255);
            from_bits(bits, |i| if i >= from && i - from < length { bit(x[0], i - from) } else { bit(x[1], i) })
        };
        cases.push(case(&format!("bfi.{kind}"), &kind, &format!("{kind} {kind} amount32 amount32"), insert));
        cases.push(case(&format!("bfi.{kind}"), &kind, &format!("{kind} {kind} u32 u32"), insert));
    }
}

/// Masks and extensions.
fn masks(cases: &mut Vec<Case>) {
    for (mode, clamps) in [("clamp", true), ("wrap", false)] {
        let reduced = move |number: i128| if clamps { number } else { number % 32 };
        for operands in ["amount32 amount32", "u32 u32"] {
            cases.push(case(&format!("bmsk.{mode}.b32"), "b32", operands, move |x| {
                let (from, length) = (reduced(x[0]), reduced(x[1]));
                from_bits(32, |i| i128::from(i) >= from && i128::from(i) - from < length)
            }));
        }
        for (kind, signed) in [("u32", false), ("s32", true)] {
            cases.push(case(&format!("szext.{mode}.{kind}"), kind, &format!("{kind} amount32"), move |x| {
                let count = reduced(x[1]).min(32) as u32;
                let sign = signed && count > 0 && bit(x[0], count - 1);
                from_bits(32, |i| if i < count { bit(x[0], i) } else { sign })
            }));
        }
    }
}

/// The manual's loop for `fns`; a base beyond the word finds nothing.
fn nth_set(mask: i128, base: i128, offset: i128) -> i128 {
    if base > 31 {
        return -1;
    }
    if offset == 0 {
        return if bit(mask, base as u32) { base } else { -1 };
    }
    let mut left = offset.abs();
    let mut place = base;
    while (0..32).contains(&place) {
        left -= i128::from(bit(mask, place as u32));
        if left == 0 {
            return place;
        }
        place += offset.signum();
    }
    -1
}

/// The sources of bytes 3 to 0 in the manual's table of `prmt` modes, for the four selectors.
const MODES: [(&str, [u32; 4]); 6] = [
    ("f4e", [0x3210, 0x4321, 0x5432, 0x6543]),
    ("b4e", [0x5670, 0x6701, 0x7012, 0x0123]),
    ("rc8", [0x0000, 0x1111, 0x2222, 0x3333]),
    ("ecl", [0x3210, 0x3211, 0x3222, 0x3333]),
    ("ecr", [0x0000, 0x1110, 0x2210, 0x3210]),
    ("rc16", [0x1010, 0x3232, 0x1010, 0x3232]),
];

/// The bytes of `b` and `a` that the nibbles of `control` choose.
fn permuted(a: i128, b: i128, control: i128) -> i128 {
    from_bits(32, |i| {
        let nibble = control >> (4 * (i / 8)) & 15;
        let within = if nibble >= 8 { 7 } else { i % 8 };
        bit(b << 32 | a, (nibble % 8) as u32 * 8 + within)
    })
}

/// All cases.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    logic(&mut cases);
    shifts(&mut cases);
    fields(&mut cases);
    masks(&mut cases);
    for operands in ["b32 amount32 steps32", "b32 amount32 s32"] {
        cases.push(case("fns.b32", "b32", operands, |x| nth_set(x[0], x[1], x[2])));
    }
    cases.push(case("prmt.b32", "b32", "b32 b32 b32", |x| permuted(x[0], x[1], x[2])));
    for (mode, table) in MODES {
        cases.push(case(&format!("prmt.b32.{mode}"), "b32", "b32 b32 b32", move |x| {
            permuted(x[0], x[1], table[(x[2] & 3) as usize].into())
        }));
    }
    cases
}

#[test]
fn logic_matches_the_manual_bit_by_bit() {
    check(&cases());
}
