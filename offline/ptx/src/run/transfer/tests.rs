//! Copies: what has arrived when, what is filled up with zeros, groups, bounds and alignment.

use crate::operand::Space;
use crate::testing::{self, Accesses, Seen, bytes, numbers};
use crate::{Kind, Place, Stop};

/// Shared memory, and where the lane's 16 bytes lie in it (`%r2`) and in two buffers (`%rd0`, `%rd1`).
const PLACES: &str = ".shared .align 128 .b8 tile[1024];\nmov.u32 %r0, %tid.x;\nmov.u32 %r1, tile;\n\
    shl.b32 %r3, %r0, 4;\nadd.u32 %r2, %r1, %r3;\nmad.wide.u32 %rd0, %r0, 16, %a0;\nmad.wide.u32 %rd1, %r0, 16, %a1;\n";

/// Stores what lies in shared memory at `%r2` at `%rd1`.
const SHOWN: &str =
    "ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%r2];\nst.global.v4.u32 [%rd1], {%r10, %r11, %r12, %r13};\n";

/// Runs 32 lanes with 512 bytes that count from one and returns what the second buffer holds then.
fn shown(body: &str) -> Vec<u8> {
    let mut buffers = vec![(0..512).map(source).collect(), vec![99; 512]];
    testing::run(&format!("{PLACES}{body}{SHOWN}"), &mut buffers).unwrap_or_else(|stop| panic!("{stop:?}\n{body}"));
    buffers.pop().unwrap()
}

fn source(at: usize) -> u8 {
    (at % 251) as u8 + 1
}

#[test]
fn bytes_arrive_at_the_wait() {
    for (form, size) in [
        ("cp.async.ca.shared.global [%r2], [%rd0], 4;", 4),
        ("cp.async.ca.shared::cta.global [%r2], [%rd0], 8;", 8),
        ("cp.async.ca.shared.global [%r2], [%rd0], 16;", 16),
        ("cp.async.cg.shared::cta.global [%r2], [%rd0], 16;", 16),
        ("cp.async.cg.shared.global.L2::128B [%r2], [%rd0], 16, 16;", 16),
        ("cp.async.cg.shared.global.L2::cache_hint.L2::256B [%r2], [%rd0], 16, %rd9;", 16),
        ("cp.async.ca.shared.global.L2::cache_hint [%r2], [%rd0], 8, 8, %rd9;", 8),
    ] {
        let arrived: Vec<u8> = (0..512).map(|at| if at % 16 < size { source(at) } else { 0 }).collect();
        for wait in ["cp.async.wait_all;", "cp.async.commit_group;\ncp.async.wait_group 0;"] {
            assert_eq!(shown(&format!("{form}\n{wait}\n")), arrived, "{form} {wait}");
        }
        for wait in
            ["", "cp.async.commit_group;", "cp.async.commit_group;\ncp.async.wait_group 1;", "cp.async.wait_group 0;"]
        {
            assert_eq!(shown(&format!("{form}\n{wait}\n")), [0; 512], "{form} {wait}");
        }
    }
}

#[test]
fn groups_arrive_in_their_order() {
    let part = |at| format!("cp.async.ca.shared.global [%r2+{at}], [%rd0+{at}], 4;\ncp.async.commit_group;\n");
    let all = part(0) + &part(4) + "cp.async.commit_group;\n" + &part(8);
    for (left, arrived) in [(0, 12), (1, 8), (2, 8), (3, 4), (4, 0), (9, 0), (u32::MAX, 0)] {
        let expected: Vec<u8> = (0..512).map(|at| if at % 16 < arrived { source(at) } else { 0 }).collect();
        assert_eq!(shown(&format!("{all}cp.async.wait_group {left};\n")), expected, "{left} left");
    }
}

/// Each thread has groups of its own: lanes below 16 close one, the others two.
#[test]
fn lanes_have_their_own_groups() {
    let body = "cp.async.ca.shared.global [%r2], [%rd0], 16;\ncp.async.commit_group;\nsetp.ge.u32 %p0, %r0, 16;\n\
        @%p0 cp.async.commit_group;\ncp.async.wait_group 1;\n";
    let expected: Vec<u8> = (0..512).map(|at| if at >= 256 { source(at) } else { 0 }).collect();
    assert_eq!(shown(body), expected);
    let body = "cp.async.ca.shared.global [%r2], [%rd0], 16;\nsetp.ge.u32 %p0, %r0, 16;\n@%p0 cp.async.wait_all;\n";
    assert_eq!(shown(body), expected);
}

#[test]
fn what_is_not_read_is_zero() {
    // Each lane reads as many bytes as its number; what is more than there is to copy is not read.
    let body = "st.shared.v4.u32 [%r2], {%r1, -1, -1, -1};\ncp.async.cg.shared.global [%r2], [%rd0], 16, %r0;\ncp.async.wait_all;\n";
    let expected: Vec<u8> = (0..512).map(|at| if at % 16 < at / 16 { source(at) } else { 0 }).collect();
    assert_eq!(shown(body), expected);
    let body = "setp.lt.u32 %p0, %r0, 3;\ncp.async.ca.shared.global [%r2], [%rd0], 16, %p0;\ncp.async.wait_all;\n";
    let expected: Vec<u8> = (0..512).map(|at| if at < 48 { 0 } else { source(at) }).collect();
    assert_eq!(shown(body), expected);
    // Nobody looks at an address that nothing is read from.
    let body = "mov.u32 %r4, 0;\nadd.u64 %rd0, %rd0, 1048576;\ncp.async.ca.shared.global [%r2], [%rd0], 4, %r4;\ncp.async.wait_all;\n";
    assert_eq!(shown(body), [0; 512]);
}

fn stopped(body: &str) -> Stop {
    testing::run(&format!("{PLACES}{body}"), &mut [(0..250).map(source).collect(), vec![0; 512]]).unwrap_err()
}

#[test]
fn bounds_and_alignment_are_checked_where_a_copy_begins() {
    let stop = stopped("cp.async.ca.shared.global [%r2], [%rd0], 16;\n");
    assert!(matches!(stop, Stop::OutOfBounds { at, size: 16, store: false, .. } if at.thread == 15), "{stop:?}");
    let stop = stopped("cp.async.ca.shared.global [%r2+640], [%a0], 16;\n");
    assert!(
        matches!(stop, Stop::OutOfBounds { at, space: Space::Shared, store: true, .. } if at.thread == 24),
        "{stop:?}"
    );
    let stop = stopped("cp.async.ca.shared.global [%r2+4], [%a0], 8;\n");
    assert!(matches!(stop, Stop::Misaligned { size: 8, .. }), "{stop:?}");
    let stop = stopped("mov.u32 %r4, 2;\ncp.async.ca.shared.global [%r2], [%a0+2], 8, %r4;\n");
    assert!(matches!(stop, Stop::Misaligned { size: 8, .. }), "{stop:?}");
}

#[test]
fn who_looks_on_sees_the_load_first_and_the_store_at_the_wait() {
    let body = "cp.async.ca.shared.global [%r2], [%rd0], 16;\ncp.async.commit_group;\nst.global.u32 [%rd1], %r0;\n\
        cp.async.wait_group 0;\n";
    let mut accesses = Accesses::default();
    testing::run_as(&format!("{PLACES}{body}"), testing::WARP, &mut [vec![1; 512], vec![0; 512]], &mut accesses)
        .unwrap();
    let program = testing::program(&format!("{PLACES}{body}"), 2).unwrap();
    let copy = program.code.iter().position(|it| it.opcode.starts_with("cp.async.ca")).unwrap();
    let expected = [
        (Place::Buffer(0), Kind::Load, copy, 32),
        (Place::Buffer(1), Kind::Store, copy + 2, 32),
        (Place::Shared, Kind::Store, copy, 32),
    ];
    let seen = |it: &Seen| (it.place, it.kind, it.at.instruction, it.mask.count_ones());
    assert_eq!(accesses.0[2..].iter().map(seen).collect::<Vec<_>>(), expected);
}

/// One lane copies shared memory to a buffer, with lanes' numbers in it.
fn bulk(size: u32, rest: &str) -> Result<Vec<u8>, Stop> {
    let body = format!(
        "{PLACES}st.shared.v4.u32 [%r2], {{%r0, %r0, %r0, %r0}};\nbar.warp.sync 0xffffffff;\nsetp.eq.u32 %p0, %r0, 5;\n\
         mov.u32 %r5, {size};\n@!%p0 bra END;\n\
         cp.async.bulk.global.shared::cta.bulk_group [%a1], [%r1], %r5;\n{rest}\nEND:\n"
    );
    let mut buffers = [vec![], vec![99; 528]];
    testing::run(&body, &mut buffers).map(|_| buffers[1].clone())
}

#[test]
fn long_copies_to_global_memory() {
    for size in [0, 16, 496, 512] {
        let lanes = bytes(&(0..128).map(|at| at / 4).collect::<Vec<u32>>(), u32::to_le_bytes);
        let expected = [&lanes[..size], &vec![99; 528 - size]].concat();
        for wait in ["cp.async.bulk.wait_group 0;", "cp.async.bulk.wait_group.read 0;"] {
            let found = bulk(size as u32, &format!("cp.async.bulk.commit_group;\n{wait}"));
            assert_eq!(found.unwrap(), expected, "{size} {wait}");
        }
        for wait in ["", "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 1;", "cp.async.wait_all;"] {
            assert_eq!(bulk(size as u32, wait).unwrap(), [99; 528], "{size} {wait}");
        }
    }
    let stop = bulk(544, "").unwrap_err();
    assert!(matches!(stop, Stop::OutOfBounds { at, store: true, .. } if at.thread == 5), "{stop:?}");
    assert!(matches!(bulk(20, "").unwrap_err(), Stop::Misaligned { address: 20, .. }));
}

#[test]
fn tensors_and_reductions_are_not_known() {
    for text in [
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1], [%r2];",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%rd1], [%r1], %r2;",
        "cp.async.cg.shared.global [%r1], [%rd1], 8;",
        "cp.async.ca.shared.global [%r1], [%rd1], 12;",
        "mbarrier.try_wait.shared.b32 %p0, [%r1], %rd1;",
    ] {
        assert!(testing::program(text, 0).is_err(), "{text}");
    }
}

/// A pipeline of two stages, as matrix kernels have it: what is in shared memory is used while the next part is on its way.
#[test]
fn a_pipeline_of_two_stages() {
    let stage = "mul.lo.u32 %r20, %r7, 512;\nand.b32 %r21, %r20, 512;\nadd.u32 %r22, %r2, %r21;\n\
        cvt.u64.u32 %rd5, %r20;\nadd.u64 %rd6, %rd0, %rd5;\n";
    let body = format!(
        "{PLACES}mov.u32 %r6, 0;\nmov.u32 %r8, 0;\nmov.u32 %r7, 0;\n\
         {stage}cp.async.cg.shared.global [%r22], [%rd6], 16;\ncp.async.commit_group;\n\
         LOOP:\nadd.u32 %r7, %r6, 1;\nsetp.lt.u32 %p1, %r7, 4;\n{stage}\
         @%p1 cp.async.cg.shared.global [%r22], [%rd6], 16;\ncp.async.commit_group;\ncp.async.wait_group 1;\nbar.sync 0;\n\
         mov.u32 %r7, %r6;\n{stage}xor.b32 %r23, %r22, 16;\nld.shared.u32 %r24, [%r23];\nadd.u32 %r8, %r8, %r24;\nbar.sync 0;\n\
         add.u32 %r6, %r6, 1;\nsetp.lt.u32 %p2, %r6, 4;\n@%p2 bra LOOP;\nst.global.u32 [%rd1], %r8;\n"
    );
    let words: Vec<u32> = (0..512).map(|at| at * 3 + 1).collect();
    let mut buffers = [bytes(&words, u32::to_le_bytes), vec![0; 512]];
    testing::run(&body, &mut buffers).unwrap();
    let found = numbers(&buffers[1], u32::from_le_bytes);
    for lane in 0..32 {
        let expected = (0..4).map(|stage| words[stage * 128 + (lane ^ 1) * 4]).sum::<u32>();
        assert_eq!(found[lane * 4], expected);
    }
}
