//! Control flow: jumps, loops and ends, and that lanes are together again behind each.

use super::check;
use crate::testing::{self, WARP, longs, numbers, threads, words};
use crate::{ParseError, Shape, Stop};

/// A body with the lane in `%r1`, whose result is `%r0`.
fn rows(rows: &[(&str, &dyn Fn(u32) -> u32)]) {
    for (body, expected) in rows {
        let found = words(&format!("mov.u32 %r1, %laneid;\n{body}"));
        let wanted: Vec<u32> = (0..32).map(expected).collect();
        assert_eq!(found, wanted, "{body}");
    }
}

/// Which lanes are here, in every way that says it.
const TOGETHER: &str = "activemask.b32 %r10;\nvote.sync.ballot.b32 %r11, 1, -1;\nbar.warp.sync -1;\n\
    setp.eq.u32 %p9, %r10, -1;\nsetp.eq.and.u32 %p9, %r11, -1, %p9;\nselp.b32 %r0, %r0, 0xdead, %p9;\n";

/// A body behind which all lanes are together.
fn joined(body: &str, expected: &dyn Fn(u32) -> u32) {
    rows(&[(&format!("{body}{TOGETHER}"), expected)]);
}

#[test]
fn jumps_forward_and_back() {
    rows(&[
        ("mov.u32 %r0, 1;\nbra ON;\nmov.u32 %r0, 2;\nON:", &|_| 1),
        (
            "mov.u32 %r0, 1;\nbra.uni FIRST;\nSECOND:\nadd.u32 %r0, %r0, 5;\nbra.uni OUT;\nFIRST:\nadd.u32 %r0, %r0, 1;\nbra.uni SECOND;\nOUT:",
            &|_| 7,
        ),
        ("mov.u32 %r0, 1;\nsetp.eq.u32 %p0, %r0, 1;\n@%p0 bra ON;\nmov.u32 %r0, 2;\nON:", &|_| 1),
        ("mov.u32 %r0, 1;\nsetp.eq.u32 %p0, %r0, 1;\n@!%p0 bra ON;\nmov.u32 %r0, 2;\nON:", &|_| 2),
        // To the next instruction, and to a label beside another.
        ("mov.u32 %r0, 3;\nsetp.lt.u32 %p0, %r1, 9;\n@%p0 bra A;\nA:\nB: add.u32 %r0, %r0, 1;", &|_| 4),
    ]);
}

#[test]
fn sides_of_a_branch() {
    let start = "setp.lt.u32 %p0, %r1, 11;\nand.b32 %r2, %r1, 1;\nsetp.eq.u32 %p1, %r2, 1;\n";
    let body = |rest: &str| format!("{start}{rest}");
    joined(&body("mov.u32 %r0, 1;\n@%p0 bra ON;\nactivemask.b32 %r0;\nON:\n"), &|lane| {
        if lane < 11 { 1 } else { u32::MAX << 11 }
    });
    joined(&body("@%p0 bra YES;\nactivemask.b32 %r0;\nbra.uni ON;\nYES:\nactivemask.b32 %r0;\nON:\n"), &|lane| {
        if lane < 11 { 0x7ff } else { u32::MAX << 11 }
    });
    // A branch in each side of another.
    let nested = "@%p0 bra YES;\n@%p1 bra NO_ODD;\nactivemask.b32 %r0;\nbra.uni NO_ON;\nNO_ODD:\nactivemask.b32 %r0;\nNO_ON:\n\
        activemask.b32 %r3;\nbra.uni ON;\nYES:\n@%p1 bra YES_ODD;\nactivemask.b32 %r0;\nbra.uni YES_ON;\nYES_ODD:\n\
        activemask.b32 %r0;\nYES_ON:\nactivemask.b32 %r3;\nON:\nselp.b32 %r4, 0x7ff, 0xfffff800, %p0;\n\
        xor.b32 %r3, %r3, %r4;\nor.b32 %r0, %r0, %r3;\n";
    joined(&body(nested), &|lane| {
        let side = if lane < 11 { 0x7ff } else { u32::MAX << 11 };
        side & if lane % 2 == 1 { 0xaaaa_aaaa } else { 0x5555_5555 }
    });
    // What the guard leaves out waits, whichever lanes they are.
    joined(&body("mov.u32 %r0, 5;\n@%p1 bra ON;\n@%p0 add.u32 %r0, %r0, 1;\nON:\n"), &|lane| {
        5 + u32::from(lane < 11 && lane % 2 == 0)
    });
}

#[test]
fn loops_of_different_lengths() {
    // One trip more than the lane's number.
    joined(
        "mov.u32 %r0, 0;\nmov.u32 %r2, 0;\nMORE:\nadd.u32 %r0, %r0, %r2;\nadd.u32 %r2, %r2, 1;\nsetp.le.u32 %p0, %r2, %r1;\n@%p0 bra MORE;\n",
        &|lane| (0..=lane).sum(),
    );
    // The test comes first: lanes may not go in at all.
    joined(
        "mov.u32 %r0, 0;\nand.b32 %r2, %r1, 3;\nHEAD:\nsetp.eq.u32 %p0, %r2, 0;\n@%p0 bra OUT;\nadd.u32 %r0, %r0, 10;\n\
         sub.u32 %r2, %r2, 1;\nbra.uni HEAD;\nOUT:\n",
        &|lane| lane % 4 * 10,
    );
    // Within each trip lanes part and come together, and some leave in the middle or go on sooner.
    joined(
        "mov.u32 %r0, 0;\nmov.u32 %r2, 0;\nMORE:\nadd.u32 %r2, %r2, 1;\nsetp.gt.u32 %p0, %r2, %r1;\n@%p0 bra OUT;\n\
         and.b32 %r3, %r2, 1;\nsetp.eq.u32 %p1, %r3, 1;\n@%p1 bra ON;\nadd.u32 %r0, %r0, %r2;\nON:\n\
         setp.lt.u32 %p2, %r2, 20;\n@%p2 bra MORE;\nOUT:\n",
        &|lane| (1..=lane.min(20)).filter(|trip| trip % 2 == 0).sum(),
    );
    // A loop in a loop, both as long as the lane says.
    joined(
        "mov.u32 %r0, 0;\nand.b32 %r4, %r1, 7;\nmov.u32 %r2, 0;\nOUTER:\nsetp.ge.u32 %p0, %r2, %r4;\n@%p0 bra OUT;\nmov.u32 %r3, 0;\n\
         INNER:\nadd.u32 %r0, %r0, 1;\nadd.u32 %r3, %r3, 1;\nsetp.le.u32 %p1, %r3, %r2;\n@%p1 bra INNER;\nadd.u32 %r2, %r2, 1;\n\
         bra.uni OUTER;\nOUT:\n",
        &|lane| (0..lane % 8).map(|outer| outer + 1).sum(),
    );
}

/// Lanes that leave a loop by different ways.
#[test]
fn breaks_to_different_places() {
    joined(
        "mov.u32 %r0, 0;\nmov.u32 %r2, 0;\nMORE:\nadd.u32 %r2, %r2, 1;\nsetp.eq.u32 %p0, %r2, %r1;\n@%p0 bra FOUND;\n\
         setp.lt.u32 %p1, %r2, 15;\n@%p1 bra MORE;\nmov.u32 %r0, 1000;\nbra.uni OUT;\nFOUND:\nadd.u32 %r0, %r2, 100;\nOUT:\n",
        &|lane| if (1..=15).contains(&lane) { lane + 100 } else { 1000 },
    );
}

const TABLE: &str = "T:\n.branchtargets CASE0, CASE1, CASE2, CASE1;\n";
const CASES: &str = "bra.uni OUT;\nCASE0:\nmov.u32 %r0, 100;\nbra.uni OUT;\nCASE1:\nactivemask.b32 %r0;\nbra.uni OUT;\nCASE2:\n\
    mov.u32 %r0, 300;\nOUT:\n";

#[test]
fn jumps_by_number() {
    let masks = |lane: u32| match lane % 4 {
        0 => 100,
        2 => 300,
        _ => 0xaaaa_aaaa,
    };
    joined(&format!("and.b32 %r2, %r1, 3;\n{TABLE}brx.idx %r2, T;\n{CASES}"), &masks);
    // Other labels at the same place; and on one line, as NVRTC writes it.
    let table = TABLE.replace('\n', " ").replace("T:", "A: B: T:") + "\n";
    joined(&format!("and.b32 %r2, %r1, 3;\n{table}brx.idx %r2, T;\n{CASES}"), &masks);
    // All lanes go the same way.
    joined(&format!("mov.u32 %r2, 2;\n{TABLE}brx.idx.uni %r2, T;\n{CASES}"), &|_| 300);
    // Lanes that are off go on.
    joined(
        &format!(
            "and.b32 %r2, %r1, 3;\nmov.u32 %r0, 7;\nsetp.lt.u32 %p0, %r1, 8;\n{TABLE}@%p0 brx.idx %r2, T;\n{CASES}"
        ),
        &|lane| match (lane, lane % 4) {
            (8.., _) => 7,
            (_, 0) => 100,
            (_, 2) => 300,
            _ => 0xaa,
        },
    );
}

/// In a loop, back to its head.
#[test]
fn jumps_by_number_in_a_loop() {
    joined(
        "mov.u32 %r0, 0;\nmov.u32 %r2, %r1;\nNEXT:\nadd.u32 %r0, %r0, 1;\nand.b32 %r3, %r2, 1;\nshr.u32 %r2, %r2, 1;\n\
         setp.eq.u32 %p0, %r2, 0;\nselp.b32 %r3, 2, %r3, %p0;\nT:\n.branchtargets NEXT, ODD, OUT;\nbrx.idx %r3, T;\nODD:\n\
         add.u32 %r0, %r0, 100;\nbra.uni NEXT;\nOUT:\n",
        &|lane| {
            let bits = (32 - lane.leading_zeros()).max(1);
            bits + 100 * (lane & !(1 << (bits - 1))).count_ones()
        },
    );
}

/// The threads that end early leave what they had written; the others go on without them.
#[test]
fn ends_in_the_middle() {
    for end in ["ret", "exit", "ret.uni"] {
        for (code, stay) in [
            (format!("@%p0 {end};\n"), 11..32),
            (format!("@!%p0 {end};\n"), 0..11),
            (format!("@%p0 bra ON;\n{end};\nON:\n"), 0..11),
            (format!("@%p0 bra END;\nbra.uni ON;\nEND:\n{end};\nON:\n"), 11..32),
        ] {
            let left: u32 = (0..32).filter(|lane| stay.contains(lane)).map(|lane| 1 << lane).sum();
            let body = format!(
                "mov.u32 %r1, %laneid;\nmad.wide.u32 %rd1, %r1, 4, %a0;\nst.global.u32 [%rd1], 5;\n\
                 setp.lt.u32 %p0, %r1, 11;\n{code}activemask.b32 %r2;\nvote.sync.ballot.b32 %r3, 1, {left};\n\
                 xor.b32 %r3, %r3, %r2;\nadd.u32 %r2, %r2, %r3;\nst.global.u32 [%rd1], %r2;\n"
            );
            let mut buffers = [vec![0; 128]];
            testing::run(&body, &mut buffers).unwrap_or_else(|stop| panic!("{stop:?}\n{body}"));
            for (lane, found) in (0..32).zip(numbers(&buffers[0], u32::from_le_bytes)) {
                assert_eq!(found, if stay.contains(&lane) { left } else { 5 }, "{body}");
            }
        }
    }
}

/// Lanes leave a loop to the end of the kernel, one trip after the other; the members that are named may have ended.
#[test]
fn ends_in_a_loop() {
    let body = "mov.u32 %r1, %laneid;\nmad.wide.u32 %rd1, %r1, 4, %a0;\nmov.u32 %r2, 0;\nMORE:\n\
        vote.sync.ballot.b32 %r3, 1, -1;\nst.global.u32 [%rd1], %r3;\nsetp.eq.u32 %p0, %r2, %r1;\n@%p0 ret;\n\
        add.u32 %r2, %r2, 1;\nbra.uni MORE;\n";
    let mut buffers = [vec![0; 128]];
    testing::run(body, &mut buffers).unwrap();
    let found = numbers(&buffers[0], u32::from_le_bytes);
    (0..32).for_each(|lane| assert_eq!(found[lane], u32::MAX << lane));
}

#[test]
fn the_end_of_the_text_is_an_end() {
    let text = ".visible .entry test(.param .u64 p)\n{\n.reg .b64 %rd<2>;\n.reg .pred %p;\n.reg .b32 %r;\n\
        ld.param.u64 %rd1, [p];\nmov.u32 %r, %laneid;\nsetp.lt.u32 %p, %r, 4;\nst.global.u32 [%rd1], 3;\n@%p bra END;\n\
        st.global.u32 [%rd1], 4;\nEND:\n}\n";
    let mut buffers = [vec![0; 4]];
    testing::run_program(&crate::Program::parse(text).unwrap(), WARP, &mut buffers, &mut ()).unwrap();
    assert_eq!(buffers[0], [4, 0, 0, 0]);
}

#[test]
fn iterations_are_counted() {
    let mut buffers = [vec![0; 4]];
    let mut loops = |body: &str, shape: Shape| testing::run_as(body, shape, &mut buffers, &mut ()).unwrap().loops;
    assert_eq!(loops("st.global.u32 [%a0], 1;", WARP), 0);
    let body = "mov.u32 %r1, %tid.x;\nmov.u32 %r2, 0;\nMORE:\nadd.u32 %r2, %r2, 1;\nsetp.le.u32 %p0, %r2, %r1;\n@%p0 bra MORE;\n";
    for (count, most) in [(1, 1), (32, 32), (33, 33), (70, 70)] {
        assert_eq!(loops(body, threads(count)), most);
    }
    // Three trips around, two within each.
    let nested = "mov.u32 %r2, 0;\nOUTER:\nmov.u32 %r3, 0;\nINNER:\nadd.u32 %r3, %r3, 1;\nsetp.lt.u32 %p0, %r3, 2;\n@%p0 bra INNER;\n\
        add.u32 %r2, %r2, 1;\nsetp.lt.u32 %p1, %r2, 3;\n@%p1 bra OUTER;\n";
    assert_eq!(loops(nested, WARP), 3 + 3 * 2);
}

#[test]
fn instructions_are_counted() {
    let done = testing::run(
        "add.u32 %r1, %r1, 1;\nsetp.eq.u32 %p0, %r1, 0;\n@%p0 bra ON;\nadd.u32 %r1, %r1, 1;\nON:",
        &mut [],
    );
    assert_eq!(done.unwrap().executed, 5);
    // Both sides of a branch are executed.
    let body = "mov.u32 %r1, %laneid;\nsetp.eq.u32 %p0, %r1, 0;\n@%p0 bra ON;\nadd.u32 %r1, %r1, 1;\nbra.uni OUT;\nON:\nadd.u32 %r1, %r1, 2;\nOUT:";
    assert_eq!(testing::run(body, &mut []).unwrap().executed, 7);
    assert_eq!(testing::run_as(body, threads(64), &mut [], &mut ()).unwrap().executed, 7 + 7);
}

/// What only hints does nothing.
#[test]
fn hints_do_nothing() {
    let hints = "membar.gl;\nmembar.cta;\nfence.acq_rel.gpu;\nfence.sc.sys;\nfence.proxy.async;\nprefetch.global.L2 [%a0];\n\
        prefetchu.L1 [%a0];\nnanosleep.u32 100;\ngriddepcontrol.wait;\ngriddepcontrol.launch_dependents;\n\
        applypriority.global.L2::evict_normal [%a0], 128;\n.pragma \"nounroll\";\n.loc 1 7 3\nmov.u64 %rd0, 6;";
    check(&[(hints, &|_| 6)]);
    assert_eq!(longs(threads(1), hints), [6]);
}

#[test]
fn what_jumps_nowhere_is_not_known() {
    for form in [
        "bra NOWHERE;",
        "bra %r0;",
        "bra 5;",
        "bra;",
        "brx.idx %r0, NOWHERE;",
        "brx.idx %p0, T;\nT: .branchtargets T;",
        "T: .branchtargets NOWHERE;\nbrx.idx %r0, T;",
        "T: .branchtargets ;\nbrx.idx %r0, T;",
        "T: .branchtargets T;\nbrx %r0, T;",
        "call function;",
        "ret %r0;",
    ] {
        assert!(matches!(testing::program(form, 1), Err(ParseError::Unknown { .. })), "{form}");
    }
}

/// Lanes that are named but on the other side of a branch.
#[test]
fn lanes_that_are_not_together_are_missed() {
    for line in [
        "vote.sync.ballot.b32 %r0, 1, -1;",
        "bar.warp.sync -1;",
        "shfl.sync.idx.b32 %r0, %r1, 0, 31, -1;",
        "redux.sync.add.u32 %r0, %r1, -1;",
        "match.any.sync.b32 %r0, %r1, -1;",
        "elect.sync %r0|%p1, -1;",
        "bar.sync 0;",
    ] {
        for guarded in [format!("@%p0 {line}\n"), format!("@!%p0 bra ON;\n{line}\nON:\nadd.u32 %r2, %r2, 1;\n")] {
            let body = format!("mov.u32 %r1, %laneid;\nsetp.lt.u32 %p0, %r1, 11;\n{guarded}");
            let Err(Stop::DivergentWarp { at, missing }) = testing::run(&body, &mut []) else { panic!("{body}") };
            assert_eq!((at.thread, missing), (0, u32::MAX << 11), "{body}");
        }
    }
}
