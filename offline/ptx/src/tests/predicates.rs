//! Predicates: what sets them, what joins them, what chooses by them; and the spaces that addresses are in.

use super::{LANE, check, pattern};
use crate::ParseError;
use crate::testing::{longs, program, threads};

/// Predicates of the lane's two lowest bits in `%p1` and `%p2`.
const BITS: &str = "mov.u32 %r1, %laneid;\nand.b32 %r2, %r1, 1;\nshr.u32 %r3, %r1, 1;\nand.b32 %r3, %r3, 1;\n\
    setp.ne.u32 %p1, %r2, 0;\nsetp.ne.u32 %p2, %r3, 0;\n";

/// What two predicates make.
type Join = fn(bool, bool) -> bool;

/// See [`BITS`].
fn bits(lane: u64) -> (bool, bool) {
    (lane & 1 == 1, lane >> 1 & 1 == 1)
}

#[test]
fn logic_of_predicates() {
    let rows: [(&str, Join); 12] = [
        ("and.pred %p0, %p1, %p2;", |a, b| a && b),
        ("or.pred %p0, %p1, %p2;", |a, b| a || b),
        ("xor.pred %p0, %p1, %p2;", |a, b| a != b),
        ("not.pred %p0, %p1;", |a, _| !a),
        ("not.pred %p0, !%p1;", |a, _| a),
        ("and.pred %p0, %p1, !%p2;", |a, b| a && !b),
        ("and.pred %p0, !%p1, %p2;", |a, b| !a && b),
        ("or.pred %p0, %p1, 0;", |a, _| a),
        ("xor.pred %p0, %p1, 1;", |a, _| !a),
        ("mov.pred %p0, %p2;", |_, b| b),
        ("mov.pred %p0, 1;\n@%p1 and.pred %p0, %p2, %p2;", |a, b| !a || b),
        ("mov.pred %p0, %p2;\n@!%p1 not.pred %p0, %p0;", |a, b| if a { b } else { !b }),
    ];
    for (body, expected) in rows {
        let body = format!("{BITS}{body}\nselp.u64 %rd0, 1, 0, %p0;");
        check(&[(&body, &|lane| u64::from(expected(bits(lane).0, bits(lane).1)))]);
    }
}

/// `p` is the comparison joined with the third operand, `q` its opposite joined with it.
#[test]
fn comparisons_joined_with_a_predicate() {
    let joins: [(&str, Join); 3] = [("and", |a, b| a && b), ("or", |a, b| a || b), ("xor", |a, b| a != b)];
    for (name, join) in joins {
        for (ty, left, right) in
            [("s32", "%r2", "0"), ("b32", "%r2", "0"), ("f32", "%f1", "0f00000000"), ("u64", "%rd1", "0")]
        {
            for (other, value) in [("%p2", None), ("!%p2", None), ("1", Some(true)), ("0", Some(false))] {
                let start = format!("{BITS}cvt.rn.f32.u32 %f1, %r2;\ncvt.u64.u32 %rd1, %r2;\n");
                let compared = format!("setp.ne.{name}.{ty}");
                let joined = |lane: u64, opposite: bool| {
                    let (first, second) = bits(lane);
                    let second = value.unwrap_or(second != other.starts_with('!'));
                    u64::from(join(first != opposite, second))
                };
                for (targets, shown) in [
                    ("%p3|%p4", "selp.u64 %rd0, 1, 0, %p3;\n@%p4 add.u64 %rd0, %rd0, 2;"),
                    ("%p3", "selp.u64 %rd0, 1, 0, %p3;"),
                    ("_|%p4", "selp.u64 %rd0, 2, 0, %p4;"),
                    ("%p3|_", "selp.u64 %rd0, 1, 0, %p3;"),
                ] {
                    let body = format!("{start}{compared} {targets}, {left}, {right}, {other};\n{shown}");
                    let (with, opposite) = (!targets.starts_with('_'), targets.ends_with("%p4"));
                    check(&[(&body, &|lane| {
                        u64::from(with) * joined(lane, false) + 2 * u64::from(opposite) * joined(lane, true)
                    })]);
                }
            }
        }
    }
}

/// Without another predicate; and a target may be an operand.
#[test]
fn comparisons_alone() {
    let both = "selp.u64 %rd0, 1, 0, %p3;\n@%p4 add.u64 %rd0, %rd0, 2;";
    let body = |line: &str| format!("{BITS}{line}\n{both}");
    check(&[
        (&body("setp.lt.u32 %p3|%p4, %r1, 9;"), &|lane| if lane < 9 { 1 } else { 2 }),
        (&body("setp.ge.s64 %p3|%p4, %rd9, 1;"), &|_| 2),
        // Neither holds in comparison with NaN but the opposite.
        (&body("setp.lt.f32 %p3|%p4, %f9, 0f7FC00000;"), &|_| 2),
        (&body("setp.ltu.f32 %p3|%p4, %f9, 0f7FC00000;"), &|_| 1),
        (&body("mov.pred %p3, %p1;\nsetp.eq.and.u32 %p3, %r1, %r1, %p3;"), &|lane| lane & 1),
        (&body("mov.pred %p3, 1;\n@%p1 setp.eq.u32 %p3|%p4, %r1, 99;"), &|lane| if lane % 2 == 1 { 2 } else { 1 }),
    ]);
}

#[test]
fn choices_of_each_type() {
    let lane = |body: &str| format!("{LANE}mov.b64 {{%r2, %r3}}, %rd2;\nsetp.lt.u32 %p0, %r1, 13;\n{body}");
    let choice = |lane: u64, yes: u64, no: u64| if lane < 13 { yes } else { no };
    let (low, high) = (|lane| pattern(lane) & 0xffff_ffff, |lane| pattern(lane) >> 32);
    for ty in ["b32", "u32", "s32", "f32"] {
        check(&[
            (&lane(&format!("selp.{ty} %r4, %r2, %r3, %p0;\ncvt.u64.u32 %rd0, %r4;")), &|it| {
                choice(it, low(it), high(it))
            }),
            (&lane(&format!("selp.{ty} %r2, %r3, %r2, !%p0;\ncvt.u64.u32 %rd0, %r2;")), &|it| {
                choice(it, low(it), high(it))
            }),
            (&lane(&format!("selp.{ty} %r4, -1, 0f3F800000, %p0;\ncvt.u64.u32 %rd0, %r4;")), &|it| {
                choice(it, 0xffff_ffff, 0x3f80_0000)
            }),
        ]);
    }
    for ty in ["b64", "u64", "s64", "f64"] {
        check(&[
            (&lane(&format!("selp.{ty} %rd0, %rd2, -5, %p0;")), &|it| choice(it, pattern(it), -5i64 as u64)),
            (&lane(&format!("mov.u64 %rd0, 3;\n@%p0 selp.{ty} %rd0, 4, 5, %p0;")), &|it| choice(it, 4, 3)),
        ]);
    }
    for ty in ["b16", "u16", "s16"] {
        let body = format!("mov.b32 {{%h1, %h2}}, %r2;\nselp.{ty} %h3, %h2, -1, %p0;\ncvt.u64.u16 %rd0, %h3;");
        check(&[(&lane(&body), &|it| choice(it, pattern(it) >> 16 & 0xffff, 0xffff))]);
    }
}

#[test]
fn spaces_of_generic_addresses() {
    let declared = ".shared .align 8 .b8 tile[128];\n.local .align 8 .b8 own[16];\n.global .align 8 .b8 many[16];\n";
    let places = [
        ("mov.u64 %rd1, %a0;", "global"),
        ("mov.u64 %rd1, many;", "global"),
        ("mov.u64 %rd1, many;\ncvta.global.u64 %rd1, %rd1;", "global"),
        ("cvta.shared.u64 %rd1, tile;", "shared"),
        ("cvta.shared.u64 %rd1, tile;\nadd.u64 %rd1, %rd1, 127;", "shared"),
        ("cvta.local.u64 %rd1, own;", "local"),
        ("cvta.param.u64 %rd1, p0;", "param"),
    ];
    for (place, of) in places {
        for space in ["global", "shared", "shared::cta", "shared::cluster", "local", "param", "const"] {
            let body = format!("{declared}{place}\nisspacep.{space} %p0, %rd1;\nselp.u64 %rd0, 1, 0, %p0;");
            let expected = space.split("::").next() == Some(of);
            assert_eq!(longs(threads(1), &body), [u64::from(expected)], "{place} {space}");
        }
    }
}

#[test]
fn what_is_no_predicate_is_not_known() {
    for form in [
        "and.pred %p0, %p1, %r0;",
        "and.pred %r0, %p1, %p2;",
        "and.pred.x %p0, %p1, %p2;",
        "not.pred %p0, %p1, %p2;",
        "selp.b32 %r0, %r1, %r2, %r3;",
        "selp.b32 %r0, %r1, %r2, %tid.x;",
        "selp.b32 %rd0, %r1, %r2, %p3;",
        "selp.b64 %r0, %r1, %r2, %p3;",
        "selp.pred %p0, %p1, %p2, %p3;",
        "selp.b32 %r0, %p1, %r2, %p3;",
        "selp.b32 %r0, %r1, %r2;",
        "setp.lt.u32 %r0, %r1, %r2;",
        "setp.lt.u32 %p0, %p1, %r2;",
        "setp.lt.and.u32 %p0, %r1, %r2;",
        "setp.lt.and.u32 %p0, %r1, %r2, %r3;",
        "setp.lt.u32 %p0, %r1, %r2, %p3;",
        "setp.below.u32 %p0, %r1, %r2;",
        "isspacep %p0, %rd1;",
        "isspacep.shared %r0, %rd1;",
        "add.u32 %p0, %r1, %r2;",
        "add.u32 %r0, %p1, %r2;",
        "testp.finite.f32 %r0, %f1;",
    ] {
        assert!(matches!(program(form, 1), Err(ParseError::Unknown { .. })), "{form}");
    }
}
