//! `mov`: of numbers, of what the hardware knows, of addresses, and of numbers side by side.

use super::{LANE, check, pattern};
use crate::testing::{WARP, longs, program, words};
use crate::{ParseError, Shape};

#[test]
fn numbers_into_registers_of_each_type() {
    check(&[
        ("mov.u32 %r0, 7;\ncvt.u64.u32 %rd0, %r0;", &|_| 7),
        ("mov.s32 %r0, -7;\ncvt.u64.u32 %rd0, %r0;", &|_| 0xffff_fff9),
        ("mov.b32 %r0, 0xdeadbeef;\ncvt.u64.u32 %rd0, %r0;", &|_| 0xdead_beef),
        ("mov.u32 %r0, 4294967295U;\ncvt.u64.u32 %rd0, %r0;", &|_| 0xffff_ffff),
        ("mov.u32 %r0, 017;\ncvt.u64.u32 %rd0, %r0;", &|_| 15),
        ("mov.u32 %r0, 0b1011;\ncvt.u64.u32 %rd0, %r0;", &|_| 11),
        ("mov.u32 %r0, 0X1fU;\ncvt.u64.u32 %rd0, %r0;", &|_| 31),
        ("mov.u32 %r0, 0;\ncvt.u64.u32 %rd0, %r0;", &|_| 0),
        ("mov.u32 %r0, WARP_SZ;\ncvt.u64.u32 %rd0, %r0;", &|_| 32),
        ("mov.f32 %f0, 0f3FC00000;\nmov.b32 %r0, %f0;\ncvt.u64.u32 %rd0, %r0;", &|_| u64::from(1.5f32.to_bits())),
        ("mov.f32 %f0, 0Fbfc00000;\nmov.b32 %r0, %f0;\ncvt.u64.u32 %rd0, %r0;", &|_| u64::from((-1.5f32).to_bits())),
        ("mov.u16 %h0, 65535;\ncvt.u64.u16 %rd0, %h0;", &|_| 0xffff),
        ("mov.u16 %h0, -1;\ncvt.u64.u16 %rd0, %h0;", &|_| 0xffff),
        ("mov.s16 %h0, -2;\ncvt.s64.s16 %rd0, %h0;", &|_| -2i64 as u64),
        ("mov.b16 %h0, 0xBC00;\nmov.b16 %h1, %h0;\ncvt.u64.u16 %rd0, %h1;", &|_| 0xbc00),
        ("mov.u64 %rd0, 0x123456789abcdef0;", &|_| 0x1234_5678_9abc_def0),
        ("mov.s64 %rd0, -1;", &|_| u64::MAX),
        ("mov.b64 %rd0, -9223372036854775808;", &|_| 1 << 63),
        ("mov.u64 %rd0, 18446744073709551615;", &|_| u64::MAX),
        ("mov.f64 %fd0, 0dBFF8000000000000;\nmov.b64 %rd0, %fd0;", &|_| (-1.5f64).to_bits()),
        ("mov.pred %p0, 1;\nmov.pred %p1, %p0;\nselp.u64 %rd0, 5, 6, %p1;", &|_| 5),
        ("mov.pred %p0, 0;\nmov.pred %p1, %p0;\nselp.u64 %rd0, 5, 6, %p1;", &|_| 6),
        ("setp.eq.u32 %p0, %r0, 1;\nmov.pred %p1, !%p0;\nselp.u64 %rd0, 5, 6, %p1;", &|_| 5),
    ]);
}

#[test]
fn registers_into_registers() {
    let lane = |body: &str| format!("{LANE}{body}");
    check(&[
        (&lane("mov.b64 %rd0, %rd2;"), &pattern),
        (&lane("mov.u32 %r2, %r1;\ncvt.u64.u32 %rd0, %r2;"), &|lane| lane),
        (&lane("setp.lt.u32 %p0, %r1, 9;\nmov.u64 %rd0, 1;\n@%p0 mov.u64 %rd0, 2;"), &|lane| 1 + u64::from(lane < 9)),
        (&lane("setp.lt.u32 %p0, %r1, 9;\nmov.u64 %rd0, 1;\n@!%p0 mov.u64 %rd0, 2;"), &|lane| 1 + u64::from(lane >= 9)),
    ]);
}

/// Blocks of 5 x 3 x 4 threads, the last warp of which is not full, in a grid of 3 x 2 x 2.
const ODD: Shape = Shape { threads: [5, 3, 4], blocks: [3, 2, 2], dynamic_shared: 144 };

/// What a special register holds by thread, by block and by the thread's number in its block.
type Special<'a> = &'a dyn Fn([u32; 3], [u32; 3], u32) -> u32;

#[test]
fn what_the_hardware_knows() {
    let rows: &[(&str, Special)] = &[
        ("%tid.x", &|thread, _, _| thread[0]),
        ("%tid.y", &|thread, _, _| thread[1]),
        ("%tid.z", &|thread, _, _| thread[2]),
        ("%ntid.x", &|_, _, _| 5),
        ("%ntid.y", &|_, _, _| 3),
        ("%ntid.z", &|_, _, _| 4),
        ("%ctaid.x", &|_, block, _| block[0]),
        ("%ctaid.y", &|_, block, _| block[1]),
        ("%ctaid.z", &|_, block, _| block[2]),
        ("%nctaid.x", &|_, _, _| 3),
        ("%nctaid.y", &|_, _, _| 2),
        ("%nctaid.z", &|_, _, _| 2),
        ("%laneid", &|_, _, number| number % 32),
        ("%warpid", &|_, _, number| number / 32),
        ("%lanemask_eq", &|_, _, number| (0..32).filter(|bit| *bit == number % 32).map(|bit| 1 << bit).sum()),
        ("%lanemask_lt", &|_, _, number| (0..32).filter(|bit| *bit < number % 32).map(|bit| 1 << bit).sum()),
        ("%lanemask_le", &|_, _, number| (0..32).filter(|bit| *bit <= number % 32).map(|bit| 1 << bit).sum()),
        ("%lanemask_gt", &|_, _, number| (0..32).filter(|bit| *bit > number % 32).map(|bit| 1 << bit).sum()),
        ("%lanemask_ge", &|_, _, number| (0..32).filter(|bit| *bit >= number % 32).map(|bit| 1 << bit).sum()),
        ("%dynamic_smem_size", &|_, _, _| 144),
        ("%total_smem_size", &|_, _, _| 128 + 144),
        ("%cluster_ctarank", &|_, _, _| 0),
        ("%cluster_nctarank", &|_, _, _| 1),
        ("%cluster_ctaid.y", &|_, _, _| 0),
        ("%cluster_nctaid.z", &|_, _, _| 1),
    ];
    for (name, expected) in rows {
        let body = format!(
            ".shared .align 4 .b8 few[12];\n.extern .shared .align 16 .b8 more[];\nmov.u32 %r0, {name};\ncvt.u64.u32 %rd0, %r0;"
        );
        let mut found = longs(ODD, &body).into_iter();
        for block in triples(ODD.blocks) {
            for (number, thread) in triples(ODD.threads).enumerate() {
                let wanted = u64::from(expected(thread, block, number as u32));
                assert_eq!(found.next(), Some(wanted), "{name} of {thread:?} in {block:?}");
            }
        }
    }
}

/// All places of a box, along x first.
fn triples([x, y, z]: [u32; 3]) -> impl Iterator<Item = [u32; 3]> {
    (0..x * y * z).map(move |at| [at % x, at / x % y, at / (x * y)])
}

#[test]
fn clocks_go_on() {
    for (clock, ty) in [("%clock", "u32"), ("%clock64", "u64"), ("%globaltimer", "u64")] {
        let (first, second) = if ty == "u32" { ("%r1", "%r2") } else { ("%rd1", "%rd2") };
        let body = format!(
            "mov.{ty} {first}, {clock};\nmov.{ty} {second}, {clock};\nsetp.gt.{ty} %p0, {second}, {first};\nselp.u64 %rd0, 1, 0, %p0;"
        );
        assert_eq!(longs(WARP, &body), [1; 32], "{clock}");
    }
}

#[test]
fn parts_side_by_side() {
    let lane = |body: &str| format!("{LANE}mov.b64 {{%r2, %r3}}, %rd2;\nmov.b64 {{%h2, %h3, %h4, %h5}}, %rd2;\n{body}");
    let rotated = |lane: u64, bits| pattern(lane).rotate_left(bits);
    check(&[
        (&lane("cvt.u64.u32 %rd0, %r2;"), &|lane| pattern(lane) & 0xffff_ffff),
        (&lane("cvt.u64.u32 %rd0, %r3;"), &|lane| pattern(lane) >> 32),
        (&lane("cvt.u64.u16 %rd0, %h2;"), &|lane| pattern(lane) & 0xffff),
        (&lane("cvt.u64.u16 %rd0, %h3;"), &|lane| pattern(lane) >> 16 & 0xffff),
        (&lane("cvt.u64.u16 %rd0, %h4;"), &|lane| pattern(lane) >> 32 & 0xffff),
        (&lane("cvt.u64.u16 %rd0, %h5;"), &|lane| pattern(lane) >> 48),
        (&lane("mov.b64 %rd0, {%r2, %r3};"), &pattern),
        (&lane("mov.b64 %rd0, {%r3, %r2};"), &|lane| rotated(lane, 32)),
        (&lane("mov.b64 %rd0, {%h5, %h2, %h3, %h4};"), &|lane| rotated(lane, 16)),
        (&lane("mov.b64 %rd0, {%r2, 1};"), &|lane| 1 << 32 | pattern(lane) & 0xffff_ffff),
        (&lane("mov.b32 %r0, {%h3, %h2};\ncvt.u64.u32 %rd0, %r0;"), &|lane| {
            (pattern(lane) >> 16 & 0xffff) | (pattern(lane) & 0xffff) << 16
        }),
        (&lane("mov.b32 {%h6, %h7}, %r3;\ncvt.u64.u16 %rd0, %h7;"), &|lane| pattern(lane) >> 48),
        (&lane("mov.b32 {%h6, _}, %r3;\ncvt.u64.u16 %rd0, %h6;"), &|lane| pattern(lane) >> 32 & 0xffff),
        (&lane("mov.b64 {_, %r4}, %rd2;\ncvt.u64.u32 %rd0, %r4;"), &|lane| pattern(lane) >> 32),
        (&lane("mov.b64 {_, _, %h6, _}, %rd2;\ncvt.u64.u16 %rd0, %h6;"), &|lane| pattern(lane) >> 32 & 0xffff),
        // A part that is as wide as a register holds more: only its lower bits count.
        (&lane("cvt.s16.s8 %h6, -1;\nmov.b64 %rd0, {%h6, 0, %h6, 0};"), &|_| 0x0000_ffff_0000_ffff),
        // What is written may be what is read.
        (&lane("mov.b64 {%r3, %r2}, %rd2;\nmov.b64 %rd2, {%r2, %r3};\nmov.b64 %rd0, %rd2;"), &|lane| rotated(lane, 32)),
    ]);
}

#[test]
fn addresses_of_variables() {
    let declared = ".shared .align 16 .b8 first[20];\n.shared .align 8 .b32 second[4];\n.local .align 8 .b8 own[12];\n\
        .local .align 4 .u32 own_too;\n.const .align 4 .b8 fixed[6];\n.const .align 8 .f64 fixed_too;\n";
    for (name, expected) in [
        ("first", 0),
        ("second", 24),
        ("second+8", 32),
        ("second + 8", 32),
        ("second+-4", 20),
        ("own", 0),
        ("own_too", 12),
        ("fixed_too", 8),
        ("fixed_too+0x10", 24),
        ("p0", 0),
    ] {
        assert_eq!(longs(WARP, &format!("{declared}mov.u64 %rd0, {name};")), [expected; 32], "{name}");
    }
    assert_eq!(words(&format!("{declared}mov.u32 %r0, second+4;")), [28; 32]);
}

#[test]
fn what_mov_does_not_have_is_not_known() {
    for form in [
        "mov.v4.u32 {%r0, %r1, %r2, %r3}, %tid;",
        "mov.b128 %rd0, {%rd1, %rd2};",
        "mov.b64 {%r0, %r1, %r2}, %rd0;",
        "mov.b64 {%r0}, %rd0;",
        "mov.b64 {}, %rd0;",
        "mov.b64 %rd0, {};",
        "mov.b64 {%r0, %r1}, 5;",
        "mov.b32 {%p0, %p1}, %r0;",
        "mov.b32 %r0, {%p0, %p1};",
        "mov.u64 %r0, 5;",
        "mov.u32 %rd0, 5;",
        "mov.u32 %p0, 5;",
        "mov.pred %r0, 5;",
        "mov.pred %p0, %r0;",
        "mov.u32 %r0, %p0;",
        "mov.u32 %r0, 1.5;",
        "mov.f32 %f0, 0f3F8;",
        "mov.f32 %f0, -0f3F800000;",
        "mov.u32 %r0, 08;",
        "mov.u32 %r0, nothing+4;",
        "mov.u32 %r0;",
        "mov.u32 %r0, 1, 2;",
        "mov %r0, 1;",
        "mov.u32 %r0, %smid;",
    ] {
        assert!(matches!(program(form, 1), Err(ParseError::Unknown { .. })), "{form}");
    }
}
