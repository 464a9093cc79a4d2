//! `shfl.sync`: each way, each clamp and each segment, against the manual's pseudo code (section 9.7.9.6), in full and in partial warps.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::ParseError;
use crate::testing::{longs, program, threads};

/// Where the manual's pseudo code has a lane read, and whether that is another's number or one's own that was asked for.
fn source(mode: &str, lane: u32, b: u32, c: u32) -> (u32, bool) {
    let (bval, cval, segmask) = (b & 0x1f, c & 0x1f, c >> 8 & 0x1f);
    let max_lane = (lane & segmask) | (cval & !segmask & 0x1f);
    let min_lane = lane & segmask;
    let (j, pval) = match mode {
        "up" => {
            let j = i64::from(lane) - i64::from(bval);
            (j, j >= i64::from(max_lane))
        }
        "down" => (i64::from(lane + bval), lane + bval <= max_lane),
        "bfly" => (i64::from(lane ^ bval), lane ^ bval <= max_lane),
        _ => {
            let j = min_lane | (bval & !segmask & 0x1f);
            (i64::from(j), j <= max_lane)
        }
    };
    if pval { (j as u32, true) } else { (lane, false) }
}

/// Each lane's number is 1000 and the lane; the predicate is the lowest bit of the upper half. Operands of each lane lie in tables.
fn check(mode: &str, count: u32, (b, c): (&str, &str), by_lane: impl Fn(u32) -> (u32, u32)) {
    let members = if count == 32 { u32::MAX } else { (1 << count) - 1 };
    for members in [u32::MAX, members] {
        let body = format!(
            "mov.u32 %r1, %laneid;\nadd.u32 %r2, %r1, 1000;\n{b}{c}shfl.sync.{mode}.b32 %r5|%p1, %r2, %r3, %r4, {members};\n\
             selp.b32 %r6, 1, 0, %p1;\nmov.b64 %rd0, {{%r5, %r6}};"
        );
        for (lane, found) in (0..count).zip(longs(threads(count), &body)) {
            let (b, c) = by_lane(lane);
            let (from, within) = source(mode, lane, b, c);
            // Of a lane that does not exist nothing is defined.
            if from < count {
                let wanted = u64::from(1000 + from) | u64::from(within) << 32;
                assert_eq!(found, wanted, "lane {lane} of {count}: {mode} {b} {c:#x}");
            } else {
                assert_eq!(found >> 32, u64::from(within), "lane {lane} of {count}: {mode} {b} {c:#x}");
            }
        }
    }
}

/// The clamps and segments that CUDA makes of widths, and some that it doesn't.
const LIMITS: [u32; 12] = [0x1f, 0x0, 0x101f, 0x1000, 0x181f, 0x1800, 0x1c1f, 0x1c00, 0x1e1f, 0x1e00, 0x1f1f, 0x50a];

#[test]
fn distances_that_all_lanes_have() {
    for mode in ["up", "down", "bfly", "idx"] {
        for count in [32, 20, 1] {
            for distance in (0..32).chain([33, 0xffff_ffe1]) {
                for limits in LIMITS {
                    let operands = (format!("mov.u32 %r3, {distance};\n"), format!("mov.u32 %r4, {limits};\n"));
                    check(mode, count, (&operands.0, &operands.1), |_| (distance, limits));
                }
            }
        }
    }
}

#[test]
fn distances_that_each_lane_has() {
    let mut rng = StdRng::seed_from_u64(9);
    for _ in 0..100 {
        let (factor, more, limits) =
            (rng.random_range(0..99u32), rng.random::<u32>() >> 8, rng.random_range(0..0x2000u32));
        for mode in ["up", "down", "bfly", "idx"] {
            let distance = format!("mad.lo.u32 %r3, %r1, {factor}, {more};\n");
            check(mode, 32, (&distance, &format!("mov.u32 %r4, {limits};\n")), |lane| (lane * factor + more, limits));
        }
    }
}

/// Constants as operands, no predicate, a result that is an operand, and `_` for the predicate.
#[test]
fn other_operands() {
    for form in [
        "shfl.sync.bfly.b32 %r1, %r1, 1, 0x1f, -1;",
        "shfl.sync.bfly.b32 %r1|%p0, %r1, 1, 31, 0xffffffff;",
        "shfl.sync.bfly.b32 %r1|_, %r1, 1, 31, 0xffffffff;",
        "mov.b32 %f1, %r1;\nshfl.sync.bfly.b32 %f1|%p0, %f1, 1, 31, -1;\nmov.b32 %r1, %f1;",
        "xor.b32 %r1, %r1, 3;\nmov.u32 %r2, %laneid;\nxor.b32 %r3, %r2, 1;\nshfl.sync.idx.b32 %r1, %r1, %r3, 31, -1;\nxor.b32 %r1, %r1, 3;",
    ] {
        let body = format!("mov.u32 %r1, %laneid;\n{form}\ncvt.u64.u32 %rd0, %r1;");
        let wanted: Vec<u64> = (0..32).map(|lane| lane ^ 1).collect();
        assert_eq!(longs(threads(32), &body), wanted, "{form}");
    }
}

/// Some lanes, which name each other only, while the rest is off.
#[test]
fn some_lanes_of_a_warp() {
    let body = "mov.u32 %r1, %laneid;\nand.b32 %r2, %r1, 1;\nsetp.eq.u32 %p0, %r2, 1;\nmov.u32 %r3, 77;\n\
        @%p0 shfl.sync.down.b32 %r3|%p1, %r1, 2, 31, 0xaaaaaaaa;\ncvt.u64.u32 %rd0, %r3;";
    let wanted: Vec<u64> = (0..32)
        .map(|lane| match lane {
            31 => 31,
            _ if lane % 2 == 1 => lane + 2,
            _ => 77,
        })
        .collect();
    assert_eq!(longs(threads(32), body), wanted);
}

#[test]
fn what_shuffles_do_not_have_is_not_known() {
    for form in [
        "shfl.bfly.b32 %r0, %r1, 1, 31;",
        "shfl.sync.left.b32 %r0, %r1, 1, 31, -1;",
        "shfl.sync.bfly.b64 %rd0, %rd1, 1, 31, -1;",
        "shfl.sync.bfly.b32 %rd0, %r1, 1, 31, -1;",
        "shfl.sync.bfly.b32 %p0, %r1, 1, 31, -1;",
        "shfl.sync.bfly.b32 %r0, %p1, 1, 31, -1;",
        "shfl.sync.bfly.b32 %r0, %r1, 1, 31;",
        "shfl.sync.bfly.b32 %r0, %r1, 1, 31, -1, 0;",
    ] {
        assert!(matches!(program(form, 1), Err(ParseError::Unknown { .. })), "{form}");
    }
}
