//! Comparisons and choices.

use super::float::flushed;
use super::oracle::format;
use super::{Case, case, check};
use std::cmp::Ordering;

/// Whether a comparison's name holds for an order; none is the order of a NaN.
fn holds(name: &str, order: Option<Ordering>) -> bool {
    let (name, unordered) = match name {
        "num" => return order.is_some(),
        "nan" => return order.is_none(),
        "lo" => ("lt", false),
        "ls" => ("le", false),
        "hi" => ("gt", false),
        "hs" => ("ge", false),
        _ => name.strip_suffix('u').map_or((name, false), |name| (name, true)),
    };
    order.map_or(unordered, |order| match name {
        "eq" => order.is_eq(),
        "ne" => order.is_ne(),
        "lt" => order.is_lt(),
        "le" => order.is_le(),
        "gt" => order.is_gt(),
        "ge" => order.is_ge(),
        _ => panic!("no comparison {name}"),
    })
}

/// `setp` of integers.
fn integers(cases: &mut Vec<Case>) {
    for bits in [16, 32, 64] {
        for (letter, names) in [
            ("b", &["eq", "ne"][..]),
            ("s", &["eq", "ne", "lt", "le", "gt", "ge"]),
            ("u", &["eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs"]),
        ] {
            for name in names {
                let kind = format!("{letter}{bits}");
                cases.push(case(&format!("setp.{name}.{kind}"), "pred", &format!("{kind} {kind}"), |x| {
                    i128::from(holds(name, Some(x[0].cmp(&x[1]))))
                }));
            }
        }
    }
}

/// `setp` of floating-point numbers.
fn floats(cases: &mut Vec<Case>) {
    const NAMES: [&str; 14] =
        ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"];
    for name in NAMES {
        for (kind, flushing) in [("f16", true), ("bf16", false), ("f32", true), ("f64", false)] {
            for flushes in [false, true] {
                if flushes && !flushing {
                    continue;
                }
                let opcode = format!("setp.{name}{}.{kind}", if flushes { ".ftz" } else { "" });
                cases.push(case(&opcode, "pred", &format!("{kind} {kind}"), move |x| {
                    let value = |bits| format(kind).value(flushed(format(kind), bits, flushes));
                    i128::from(holds(name, value(x[0]).partial_cmp(&value(x[1]))))
                }));
            }
        }
    }
}

/// `slct`.
fn choices(cases: &mut Vec<Case>) {
    for bits in [16, 32, 64] {
        for letter in ["b", "u", "s", "f"] {
            if (letter, bits) == ("f", 16) {
                continue;
            }
            let (kind, plain) = (format!("{letter}{bits}"), format!("b{bits}"));
            let choose = |x: &[i128], first: bool| if first { x[0] } else { x[1] };
            cases.push(case(&format!("slct.{kind}.s32"), &plain, &format!("{plain} {plain} s32"), move |x| {
                choose(x, x[2] >= 0)
            }));
            let operands = format!("{plain} {plain} f32");
            cases.push(case(&format!("slct.{kind}.f32"), &plain, &operands, move |x| {
                choose(x, format("f32").value(x[2]) >= 0.0)
            }));
            cases.push(case(&format!("slct.ftz.{kind}.f32"), &plain, &operands, move |x| {
                choose(x, format("f32").value(x[2]) > -f64::from(f32::MIN_POSITIVE))
            }));
        }
    }
}

/// `testp` and `copysign`.
fn properties(cases: &mut Vec<Case>) {
    use std::num::FpCategory::{Infinite, Nan, Normal, Subnormal, Zero};
    for (name, classes) in [
        ("finite", &[Normal, Subnormal, Zero][..]),
        ("infinite", &[Infinite]),
        ("number", &[Normal, Subnormal, Zero, Infinite]),
        ("notanumber", &[Nan]),
        ("normal", &[Normal, Zero]),
        ("subnormal", &[Subnormal]),
    ] {
        cases.push(case(&format!("testp.{name}.f32"), "pred", "f32", |x| {
            i128::from(classes.contains(&f32::from_bits(x[0] as u32).classify()))
        }));
        cases.push(case(&format!("testp.{name}.f64"), "pred", "f64", |x| {
            i128::from(classes.contains(&f64::from_bits(x[0] as u64).classify()))
        }));
    }
    for (kind, sign) in [("f32", 1 << 31), ("f64", 1 << 63)] {
        cases.push(case(&format!("copysign.{kind}"), &kind.replace('f', "b"), &format!("{kind} {kind}"), move |x| {
            x[0] & sign | x[1] & (sign - 1)
        }));
    }
}

/// All cases.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    integers(&mut cases);
    floats(&mut cases);
    choices(&mut cases);
    properties(&mut cases);
    cases
}

#[test]
fn comparisons_hold_where_the_order_says() {
    check(&cases());
}
