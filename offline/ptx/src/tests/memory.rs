//! `ld` and `st` of each type in each space: what is written, and what of it is read back into which bits.

use super::{LANE, check, pattern};
use crate::testing::{self, WARP, bytes, longs, numbers};
use crate::{ParseError, Shape};

/// A type of elements: bytes, whether wider registers repeat its sign, the register that takes it here, and how that becomes `%rd0`.
struct Type(&'static str, usize, bool, &'static str, &'static str);

const TYPES: [Type; 14] = [
    Type("u8", 1, false, "%r0", "cvt.u64.u32 %rd0, %r0;"),
    Type("b8", 1, false, "%h0", "cvt.u64.u16 %rd0, %h0;"),
    Type("s8", 1, true, "%r0", "cvt.s64.s32 %rd0, %r0;"),
    Type("u16", 2, false, "%r0", "cvt.u64.u32 %rd0, %r0;"),
    Type("b16", 2, false, "%h0", "cvt.u64.u16 %rd0, %h0;"),
    Type("s16", 2, true, "%r0", "cvt.s64.s32 %rd0, %r0;"),
    Type("u32", 4, false, "%rd0", ""),
    Type("b32", 4, false, "%r0", "cvt.u64.u32 %rd0, %r0;"),
    Type("s32", 4, true, "%rd0", ""),
    Type("f32", 4, false, "%f0", "mov.b32 %r0, %f0;\ncvt.u64.u32 %rd0, %r0;"),
    Type("u64", 8, false, "%rd0", ""),
    Type("b64", 8, false, "%rd0", ""),
    Type("s64", 8, true, "%rd0", ""),
    Type("f64", 8, false, "%fd0", "mov.b64 %rd0, %fd0;"),
];

/// Ways to eight bytes of the lane at `%rd3`: what opcodes say of the space, and code that finds the address.
const SPACES: [(&str, &str); 13] = [
    (".global", "shl.b64 %rd3, %rd1, 3;\nadd.u64 %rd3, %rd3, %a0;\n"),
    ("", "shl.b64 %rd3, %rd1, 3;\nadd.u64 %rd3, %rd3, %a0;\n"),
    (".global", "shl.b64 %rd3, %rd1, 3;\nadd.u64 %rd3, %rd3, %a0;\ncvta.to.global.u64 %rd3, %rd3;\n"),
    (".shared", ".shared .align 8 .b8 tile[256];\nmov.u64 %rd3, tile;\nmad.wide.u32 %rd3, %r1, 8, %rd3;\n"),
    (".shared::cta", ".shared .align 8 .b8 tile[256];\nmov.u64 %rd3, tile;\nmad.wide.u32 %rd3, %r1, 8, %rd3;\n"),
    (".shared", ".extern .shared .align 16 .b8 more[];\nmov.u64 %rd3, more;\nmad.wide.u32 %rd3, %r1, 8, %rd3;\n"),
    (
        "",
        ".shared .align 8 .b8 tile[256];\nmov.u64 %rd3, tile;\ncvta.shared.u64 %rd3, %rd3;\nmad.wide.u32 %rd3, %r1, 8, %rd3;\n",
    ),
    (
        ".shared",
        ".shared .align 8 .b8 tile[264];\ncvta.shared.u64 %rd3, tile;\nmad.wide.u32 %rd3, %r1, 8, %rd3;\n\
         add.u64 %rd3, %rd3, 8;\ncvta.to.shared.u64 %rd3, %rd3;\n",
    ),
    (".local", ".local .align 8 .b8 own[24];\nmov.u64 %rd3, own;\nadd.u64 %rd3, %rd3, 16;\n"),
    ("", ".local .align 8 .b8 own[24];\nmov.u64 %rd3, own;\ncvta.local.u64 %rd3, %rd3;\n"),
    (
        ".local",
        ".local .align 8 .b8 own[24];\nmov.u64 %rd3, own;\ncvta.local.u64 %rd3, %rd3;\ncvta.to.local.u64 %rd3, %rd3;\n",
    ),
    (".global", ".global .align 8 .b8 many[256];\nmov.u64 %rd3, many;\nmad.wide.u32 %rd3, %r1, 8, %rd3;\n"),
    ("", ".global .align 8 .b8 many[256];\nmov.u64 %rd3, many;\nmad.wide.u32 %rd3, %r1, 8, %rd3;\n"),
];

const SHAPE: Shape = Shape { dynamic_shared: 256, ..WARP };

/// The lowest bytes of a number, as a wider register takes them.
fn extended(number: u64, size: usize, signed: bool) -> u64 {
    let modulus = 1i128 << (8 * size);
    let low = i128::from(number) % modulus;
    (if signed && low >= modulus / 2 { low - modulus } else { low }) as u64
}

#[test]
fn loads_of_each_type_in_each_space() {
    for (space, place) in SPACES {
        for Type(ty, size, signed, register, widened) in TYPES {
            for skip in (0..8).step_by(size) {
                let body = format!(
                    "{LANE}{place}st{space}.u64 [%rd3], %rd2;\nmov.u64 %rd0, -1;\nmov.u32 %r0, -1;\nmov.b16 %h0, -1;\n\
                     ld{space}.{ty} {register}, [%rd3+{skip}];\n{widened}"
                );
                let wanted: Vec<u64> =
                    (0..32).map(|lane| extended(pattern(lane) >> (8 * skip), size, signed)).collect();
                assert_eq!(longs(SHAPE, &body), wanted, "{body}");
            }
        }
    }
}

#[test]
fn stores_of_each_type_in_each_space() {
    for (space, place) in SPACES {
        for Type(ty, size, ..) in TYPES {
            // What is stored is cut from a wider register, where there is one.
            let register = if ty == "f64" { "%fd0" } else { "%rd4" };
            for skip in (0..8).step_by(size) {
                let body = format!(
                    "{LANE}{place}st{space}.u64 [%rd3], %rd2;\nnot.b64 %rd4, %rd2;\nmov.b64 %fd0, %rd4;\n\
                     st{space}.{ty} [%rd3+{skip}], {register};\nld{space}.u64 %rd0, [%rd3];"
                );
                let changed = extended(u64::MAX, size, false) << (8 * skip);
                let stored = |lane| extended(!pattern(lane), size, false) << (8 * skip);
                let wanted: Vec<u64> = (0..32).map(|lane| pattern(lane) & !changed | stored(lane)).collect();
                assert_eq!(longs(SHAPE, &body), wanted, "{body}");
            }
        }
    }
}

#[test]
fn words_and_numbers_are_stored() {
    let shown = |store: &str, ty: &str, to: &str| {
        format!(
            "{LANE}mov.b64 {{%r2, %r3}}, %rd2;\nmov.b32 {{%h2, %h3}}, %r2;\nmov.b32 %f2, %r2;\n\
             .local .align 8 .b8 own[8];\nst.local.{store};\nld.local.{ty} {to}, [own];\n"
        )
    };
    let low = |lane: u64| pattern(lane) & 0xffff_ffff;
    check(&[
        (&shown("u32 [own], %r2", "u64", "%rd0"), &low),
        (&shown("f32 [own], %f2", "u64", "%rd0"), &low),
        (&shown("u16 [own], %r2", "u64", "%rd0"), &|lane| pattern(lane) & 0xffff),
        (&shown("u16 [own+2], %h3", "u64", "%rd0"), &|lane| low(lane) & 0xffff_0000),
        (&shown("u8 [own+7], %h2", "u64", "%rd0"), &|lane| (pattern(lane) & 0xff) << 56),
        (&shown("b32 [own], -2", "s64", "%rd0"), &|_| 0xffff_fffe),
        (&shown("f32 [own+4], 0f3F800000", "u64", "%rd0"), &|_| u64::from(1f32.to_bits()) << 32),
        (&shown("v2.u16 [own+4], {%h2, 7}", "u64", "%rd0"), &|lane| (pattern(lane) & 0xffff | 7 << 16) << 32),
    ]);
}

/// A lane's 32 bytes of one buffer go to another, element by element and in the opposite order.
#[test]
fn vectors_of_each_width() {
    for (count, ty, size, register) in [
        (2, "u8", 1, "%r"),
        (4, "b8", 1, "%h"),
        (2, "u16", 2, "%h"),
        (4, "b16", 2, "%r"),
        (4, "f16", 2, "%h"),
        (2, "u32", 4, "%r"),
        (4, "u32", 4, "%rd"),
        (2, "f32", 4, "%f"),
        (4, "f32", 4, "%f"),
        (4, "s32", 4, "%r"),
        (8, "b32", 4, "%r"),
        (8, "f32", 4, "%f"),
        (2, "u64", 8, "%rd"),
        (2, "f64", 8, "%fd"),
        (4, "b64", 8, "%rd"),
        (1, "u32", 4, "%r"),
    ] {
        let names: Vec<String> = (0..count).map(|at| format!("{register}{}", 20 + at)).collect();
        let reversed: Vec<&str> = names.iter().rev().map(String::as_str).collect();
        let (names, reversed) = (format!("{{{}}}", names.join(", ")), format!("{{{}}}", reversed.join(", ")));
        let vector = if count == 1 { String::new() } else { format!(".v{count}") };
        let source: Vec<u8> = (0..1024).map(|at| (at * 7 % 251) as u8).collect();
        let expected: Vec<u8> = source
            .chunks(32)
            .flat_map(|lane| {
                let moved = lane[..count * size].chunks(size).rev().flatten().copied();
                moved.chain(std::iter::repeat(9)).take(32).collect::<Vec<u8>>()
            })
            .collect();
        for through in ["", ".shared .align 32 .b8 tile[1024];\n"] {
            let place = "shl.b64 %rd4, %rd1, 5;\nadd.u64 %rd5, %rd4, %a0;\nadd.u64 %rd6, %rd4, %a1;\n";
            let copy = match through {
                "" => format!("st.global{vector}.{ty} [%rd6], {reversed};\n"),
                _ => format!(
                    "mov.u64 %rd7, tile;\nadd.u64 %rd7, %rd7, %rd4;\nst.shared{vector}.{ty} [%rd7], {reversed};\n\
                     ld.shared{vector}.{ty} {names}, [%rd7];\nst.global{vector}.{ty} [%rd6], {names};\n"
                ),
            };
            let body = format!("{through}{LANE}{place}ld.global.nc{vector}.{ty} {names}, [%rd5];\n{copy}");
            let mut buffers = [source.clone(), vec![9; 1024]];
            testing::run(&body, &mut buffers).unwrap_or_else(|stop| panic!("{stop:?}\n{body}"));
            assert_eq!(buffers[1], expected, "{body}");
        }
    }
}

#[test]
fn elements_of_vectors_are_extended_and_dropped() {
    let lane = |body: &str| format!(".local .align 8 .b8 own[8];\n{LANE}st.local.u64 [own], %rd2;\n{body}");
    check(&[
        (&lane("ld.local.v2.s8 {%r2, %r3}, [own+6];\ncvt.s64.s32 %rd0, %r3;"), &|lane| {
            extended(pattern(lane) >> 56, 1, true)
        }),
        (&lane("ld.local.v4.s16 {%rd3, %rd0, %rd4, %rd5}, [own];"), &|lane| extended(pattern(lane) >> 16, 2, true)),
        (&lane("ld.local.v2.u32 {_, %r2}, [own];\ncvt.u64.u32 %rd0, %r2;"), &|lane| pattern(lane) >> 32),
        (&lane("ld.local.v4.u16 {_, _, _, %r2}, [own];\ncvt.u64.u32 %rd0, %r2;"), &|lane| pattern(lane) >> 48),
        (&lane("mov.u64 %rd0, 5;\nld.local.u64 _, [own];"), &|_| 5),
        // The address may be overwritten by what is read.
        (
            &lane(
                "mov.u64 %rd3, own;\nld.local.v2.u32 {%rd3, %rd4}, [%rd3];\nshl.b64 %rd4, %rd4, 32;\nor.b64 %rd0, %rd3, %rd4;",
            ),
            &pattern,
        ),
    ]);
}

#[test]
fn words_for_caches_and_order_are_read_over() {
    let place = ".shared .align 8 .b8 tile[256];\nmov.u64 %rd4, tile;\nmad.wide.u32 %rd4, %r1, 8, %rd4;\nmad.wide.u32 %rd3, %r1, 8, %a0;\n\
        st.global.u64 [%rd3], %rd2;\nst.shared.u64 [%rd4], %rd2;\n";
    for load in [
        "ld.global.nc.u64 %rd0, [%rd3];",
        "ld.global.nc.L1::evict_last.u64 %rd0, [%rd3];",
        "ld.global.nc.L1::no_allocate.L2::128B.u64 %rd0, [%rd3];",
        "ld.global.L1::evict_first.L2::evict_last.L2::256B.u64 %rd0, [%rd3];",
        "ld.global.nc.L2::cache_hint.L2::64B.u64 %rd0, [%rd3], %rd9;",
        "ld.volatile.global.u64 %rd0, [%rd3];",
        "ld.volatile.shared.u64 %rd0, [%rd4];",
        "ld.relaxed.gpu.global.u64 %rd0, [%rd3];",
        "ld.acquire.cta.shared::cta.u64 %rd0, [%rd4];",
        "ld.acquire.sys.u64 %rd0, [%rd3];",
        "ld.relaxed.cluster.shared::cluster.u64 %rd0, [%rd4];",
        "ld.mmio.relaxed.sys.global.u64 %rd0, [%rd3];",
        "ld.weak.global.ca.u64 %rd0, [%rd3];",
        "ld.global.cg.u64 %rd0, [%rd3];",
        "ld.global.cs.u64 %rd0, [%rd3];",
        "ld.global.lu.u64 %rd0, [%rd3];",
        "ld.global.cv.u64 %rd0, [%rd3];",
        "ldu.global.u64 %rd0, [%rd3];",
        "st.global.wb.u64 [%rd3], %rd2;\nld.global.u64 %rd0, [%rd3];",
        "st.weak.global.cg.u64 [%rd3], %rd2;\nld.global.u64 %rd0, [%rd3];",
        "st.global.cs.u64 [%rd3], %rd2;\nld.global.u64 %rd0, [%rd3];",
        "st.global.wt.u64 [%rd3], %rd2;\nld.global.u64 %rd0, [%rd3];",
        "st.volatile.global.u64 [%rd3], %rd2;\nld.global.u64 %rd0, [%rd3];",
        "st.release.gpu.global.u64 [%rd3], %rd2;\nld.global.u64 %rd0, [%rd3];",
        "st.relaxed.sys.global.u64 [%rd3], %rd2;\nld.global.u64 %rd0, [%rd3];",
        "st.global.L1::no_allocate.u64 [%rd3], %rd2;\nld.global.u64 %rd0, [%rd3];",
        "st.global.L2::cache_hint.u64 [%rd3], %rd2, %rd9;\nld.global.u64 %rd0, [%rd3];",
    ] {
        let wanted: Vec<u64> = (0..32).map(pattern).collect();
        assert_eq!(longs(WARP, &format!("{LANE}{place}{load}")), wanted, "{load}");
    }
}

/// Lanes that are off neither read nor write, wherever their address points.
#[test]
fn lanes_that_are_off_do_nothing() {
    for space in [".global", ".shared", ".local", ""] {
        let wild = "setp.lt.u32 %p0, %r1, 11;\nmov.u64 %rd4, 0xfffffffffffffff0;\nselp.b64 %rd3, %rd3, %rd4, %p0;\n";
        let place = match space {
            ".shared" => ".shared .align 8 .b8 tile[256];\nmad.wide.u32 %rd3, %r1, 8, tile;\n",
            ".local" => ".local .align 8 .b8 own[8];\nmov.u64 %rd3, own;\n",
            _ => "mad.wide.u32 %rd3, %r1, 8, %a0;\n",
        };
        let body = format!(
            "{LANE}{place}mov.u64 %rd5, %rd3;\n{wild}mov.u64 %rd0, 3;\n@%p0 st{space}.u64 [%rd3], %rd2;\n\
             @%p0 ld{space}.u64 %rd0, [%rd3];"
        );
        let wanted: Vec<u64> = (0..32).map(|lane| if lane < 11 { pattern(lane) } else { 3 }).collect();
        assert_eq!(longs(WARP, &body), wanted, "{body}");
        let body = format!(
            "{LANE}{place}st{space}.u64 [%rd3], 6;\nmov.u64 %rd5, %rd3;\n{wild}@!%p0 mov.u64 %rd3, %rd5;\n\
             @!%p0 st{space}.u64 [%rd3], %rd2;\nld{space}.u64 %rd0, [%rd5];"
        );
        let wanted: Vec<u64> = (0..32).map(|lane| if lane < 11 { 6 } else { pattern(lane) }).collect();
        assert_eq!(longs(WARP, &body), wanted, "{body}");
    }
}

/// Addresses are a register, a number, a variable, each with an offset of either sign.
#[test]
fn addresses_with_offsets() {
    let lane = |body: &str| format!(".local .align 8 .b8 own[16];\n{LANE}st.local.u64 [own+8], %rd2;\n{body}");
    check(&[
        (&lane("ld.local.u64 %rd0, [8];"), &pattern),
        (&lane("ld.local.u64 %rd0, [own+0x8];"), &pattern),
        (&lane("mov.u32 %r2, 24;\nld.local.u64 %rd0, [%r2+-16];"), &pattern),
        (&lane("mov.u64 %rd3, 3;\nld.local.u64 %rd0, [ %rd3 + 5 ];"), &pattern),
        (&lane("mov.u64 %rd3, -8;\nld.local.u64 %rd0, [%rd3+16];"), &pattern),
    ]);
}

/// Of lanes that write to one place the last one's number stays; each block starts with shared memory as the last left it.
#[test]
fn blocks_have_local_memory_of_their_own() {
    let shape = Shape { blocks: [4, 1, 1], ..WARP };
    let body = ".local .align 4 .b8 own[4];\nld.local.u32 %r0, [own];\nst.local.u32 [own], 7;\ncvt.u64.u32 %rd0, %r0;";
    assert_eq!(longs(shape, body), [0; 128]);
    let mut buffers = [vec![0; 4]];
    testing::run("mov.u32 %r0, %laneid;\nst.global.u32 [%a0], %r0;", &mut buffers).unwrap();
    assert_eq!(buffers[0], [31, 0, 0, 0]);
}

/// One instruction whose lanes are in buffers, in shared memory, in local memory, in variables and among parameters.
#[test]
fn generic_addresses_of_lanes_in_different_places() {
    let body = ".shared .align 8 .b8 tile[64];\n.local .align 8 .b8 own[8];\n.global .align 8 .u64 named = 44;\n\
        mov.u32 %r1, %laneid;\nst.shared.u64 [tile+8], 11;\nst.local.u64 [own], 22;\ncvta.shared.u64 %rd10, tile;\n\
        add.u64 %rd10, %rd10, 8;\ncvta.local.u64 %rd11, own;\nmov.u64 %rd12, %a1;\nmov.u64 %rd13, named;\n\
        cvta.param.u64 %rd14, p0;\nrem.u32 %r2, %r1, 6;\nmov.u64 %rd3, %a2;\nsetp.eq.u32 %p0, %r2, 0;\n\
        @%p0 mov.u64 %rd3, %rd10;\nsetp.eq.u32 %p0, %r2, 1;\n@%p0 mov.u64 %rd3, %rd11;\nsetp.eq.u32 %p0, %r2, 2;\n\
        @%p0 mov.u64 %rd3, %rd12;\nsetp.eq.u32 %p0, %r2, 3;\n@%p0 mov.u64 %rd3, %rd13;\nsetp.eq.u32 %p0, %r2, 4;\n\
        @%p0 mov.u64 %rd3, %rd14;\nld.u64 %rd0, [%rd3];\nmad.wide.u32 %rd4, %r1, 8, %a0;\nst.u64 [%rd4], %rd0;\n";
    let mut buffers = [vec![0; 256], bytes(&[33u64], u64::to_le_bytes), bytes(&[55u64], u64::to_le_bytes)];
    testing::run(body, &mut buffers).unwrap();
    let found = numbers(&buffers[0], u64::from_le_bytes);
    // A parameter is the address of the first page.
    (0..32).for_each(|lane| assert_eq!(found[lane], [11, 22, 33, 44, 1 << 40, 55][lane % 6], "lane {lane}"));
}

#[test]
fn what_ld_and_st_do_not_have_is_not_known() {
    for form in [
        "ld.global.v3.u32 {%r0, %r1, %r2}, [%a0];",
        "ld.global.v2.u32 {%r0, %r1, %r2}, [%a0];",
        "ld.global.v2.u32 %r0, [%a0];",
        "ld.global.v4.u32 {}, [%a0];",
        "ld.global.v8.b64 {%rd0, %rd1, %rd2, %rd3, %rd4, %rd5, %rd6, %rd7}, [%a0];",
        "ld.global.b128 %rd0, [%a0];",
        "ld.global.u64 %r0, [%a0];",
        "ld.global.u32 %p0, [%a0];",
        "ld.global %r0, [%a0];",
        "ld.global.nx.u32 %r0, [%a0];",
        "ld.global.u32 %r0, %a0;",
        "ld.global.u32 %r0, [%a0], %rd9;",
        "ld.u32 %r0;",
        "st.global.u64 [%a0], %r0;",
        "st.global.u32 [%a0], %p0;",
        "st.global.u32 [%a0], {%r0, %r1};",
        "st.global.v2.u32 [%a0], %r0;",
        "st.const.u32 [%a0], %r0;",
        "st.param.u32 [p0], %r0;",
        "st.global.near.u32 [%a0], %r0;",
        "st.global.u32 %a0, %r0;",
        "st.async.u32 [%a0], %r0, [%a0];",
        "cvta.u64 %rd0, %rd1;",
        "cvta.const.u64 %rd0, %rd1;",
        "cvta.shared.u64 %r0, %rd1;",
    ] {
        let found = testing::program(form, 1);
        assert!(matches!(found, Err(ParseError::Unknown { .. })), "{form}");
    }
}
