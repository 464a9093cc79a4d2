//! `bar` and `barrier`: warps of a block wait for each other, by number and count, vote, or only say that they were here.

use crate::testing::{self, Backwards, longs, numbers, program, threads, words_as};
use crate::{At, Chance, Observer, ParseError, Shape, Stop};

/// Runs a body in both orders.
fn in_both_orders(body: &str, shape: Shape, buffers: &[Vec<u8>], mut check: impl FnMut(&[Vec<u8>])) {
    let kernel = program(body, buffers.len()).unwrap_or_else(|error| panic!("{error}\n{body}"));
    let orders: [&mut dyn Chance; 2] = [&mut (), &mut Backwards];
    for chance in orders {
        let mut buffers = buffers.to_vec();
        let done = testing::run_in_order(&kernel, shape, &mut buffers, &mut (), chance);
        done.unwrap_or_else(|stop| panic!("{stop:?}\n{body}"));
        check(&buffers);
    }
}

/// Each thread gives its number to the one that mirrors it, in three rounds.
#[test]
fn all_threads_wait() {
    for count in [32, 64, 96, 256, 33, 70, 1] {
        for (wait, again) in [
            ("bar.sync 0;", "bar.sync 0;"),
            ("barrier.sync 0;", "barrier.sync.aligned 1;"),
            ("bar.cta.sync 15;", "barrier.cta.sync.aligned 15;"),
            ("mov.u32 %r9, 3;\nbar.sync %r9;", "bar.sync 3;"),
        ] {
            let body = format!(
                ".shared .align 4 .b8 tile[1024];\nmov.u32 %r1, %tid.x;\nmov.u32 %r2, %ntid.x;\nmov.u32 %r0, %r1;\nmov.u32 %r8, 0;\n\
                 MORE:\nmad.lo.u32 %r3, %r1, 4, tile;\nst.shared.u32 [%r3], %r0;\n{wait}\nsub.u32 %r4, %r2, %r1;\n\
                 sub.u32 %r4, %r4, 1;\nmad.lo.u32 %r4, %r4, 4, tile;\nld.shared.u32 %r0, [%r4];\nadd.u32 %r0, %r0, 1000;\n{again}\n\
                 add.u32 %r8, %r8, 1;\nsetp.lt.u32 %p0, %r8, 3;\n@%p0 bra MORE;\nmad.wide.u32 %rd1, %r1, 4, %a0;\nst.global.u32 [%rd1], %r0;\n"
            );
            in_both_orders(&body, threads(count), &[vec![0; 1024]], |buffers| {
                let found = numbers(&buffers[0], u32::from_le_bytes);
                (0..count).for_each(|at| assert_eq!(found[at as usize], 3000 + count - 1 - at, "{count} {wait}"));
            });
        }
    }
}

/// Warps 0 and 1 wait for each other, and warps 2 and 3, each in lines of their own and different numbers of times.
#[test]
fn some_threads_wait() {
    let body = ".shared .align 4 .b8 tile[512];\nmov.u32 %r1, %tid.x;\nmov.u32 %r2, %warpid;\nshr.u32 %r3, %r2, 1;\nsetp.eq.u32 %p0, %r3, 0;\n\
        mad.lo.u32 %r4, %r1, 4, tile;\nst.shared.u32 [%r4], %r1;\nxor.b32 %r5, %r1, 32;\nmad.lo.u32 %r5, %r5, 4, tile;\n@%p0 bra LOW;\n\
        .loc 1 10 1\nbar.sync 2, 64;\nld.shared.u32 %r6, [%r5];\nbarrier.sync 2, 64;\nbar.sync 2, 64;\nbra.uni OUT;\nLOW:\n\
        .loc 1 20 1\nbar.sync 1, 64;\nld.shared.u32 %r6, [%r5];\nOUT:\nmad.wide.u32 %rd1, %r1, 4, %a0;\nst.global.u32 [%rd1], %r6;\n";
    in_both_orders(body, threads(128), &[vec![0; 512]], |buffers| {
        let found = numbers(&buffers[0], u32::from_le_bytes);
        (0..128).for_each(|at| assert_eq!(found[at as usize], at ^ 32));
    });
}

/// Two warps meet at different lines of the source, where each says how many it waits for.
#[test]
fn counted_barriers_are_one_wherever_they_stand() {
    let body = "mov.u32 %r2, %warpid;\nsetp.eq.u32 %p0, %r2, 0;\n@%p0 bra LOW;\n.loc 1 10 1\nbar.sync 1, 64;\nbra.uni OUT;\nLOW:\n\
        .loc 1 20 1\nbar.sync 1, 64;\nOUT:\n";
    testing::run_as(body, threads(64), &mut [], &mut ()).unwrap();
    let uncounted = body.replace(", 64;", ";");
    let stop = testing::run_as(&uncounted, threads(64), &mut [], &mut ());
    assert!(matches!(stop, Err(Stop::DivergentBlock { .. })), "{stop:?}");
}

/// A warp counts as 32 threads, however many it has.
#[test]
fn counts_are_of_whole_warps() {
    let body = "bar.sync 1, 64;\nmov.u64 %rd0, 1;";
    assert_eq!(longs(threads(48), body), [1; 48]);
    assert_eq!(longs(threads(33), body), [1; 33]);
}

/// A warp writes, says so and goes on; another waits for it and reads; the first waits until that is done before it writes again.
#[test]
fn one_warp_produces_and_one_consumes() {
    let body = ".shared .align 4 .b8 tile[128];\nmov.u32 %r1, %laneid;\nmov.u32 %r2, %warpid;\nmad.lo.u32 %r3, %r1, 4, tile;\n\
        mov.u32 %r8, 0;\nsetp.eq.u32 %p0, %r2, 1;\n@%p0 bra CONSUME;\nPRODUCE:\nmad.lo.u32 %r4, %r8, 100, %r1;\nst.shared.u32 [%r3], %r4;\n\
        bar.arrive 1, 64;\nbar.sync 2, 64;\nadd.u32 %r8, %r8, 1;\nsetp.lt.u32 %p1, %r8, 5;\n@%p1 bra PRODUCE;\nret;\nCONSUME:\n\
        barrier.sync 1, 64;\nxor.b32 %r5, %r1, 1;\nmad.lo.u32 %r5, %r5, 4, tile;\nld.shared.u32 %r6, [%r5];\nadd.u32 %r7, %r7, %r6;\n\
        barrier.arrive 2, 64;\nadd.u32 %r8, %r8, 1;\nsetp.lt.u32 %p1, %r8, 5;\n@%p1 bra CONSUME;\nmad.wide.u32 %rd1, %r1, 4, %a0;\n\
        st.global.u32 [%rd1], %r7;\n";
    in_both_orders(body, threads(64), &[vec![0; 128]], |buffers| {
        let found = numbers(&buffers[0], u32::from_le_bytes);
        (0..32).for_each(|lane| assert_eq!(found[lane as usize], 5 * (lane ^ 1) + 1000));
    });
}

/// Two that have come by complete a barrier of 64 threads by themselves: who waits for it afterwards waits for ever.
#[test]
fn arrivals_complete_a_barrier() {
    let body = "mov.u32 %r2, %warpid;\nsetp.eq.u32 %p0, %r2, 2;\n@%p0 bra LAST;\nbar.arrive 1, 64;\nbar.sync 2, 96;\nret;\nLAST:\n\
        bar.sync 2, 96;\nbar.sync 1, 64;\n";
    let stop = testing::run_as(body, threads(96), &mut [], &mut ());
    let Err(Stop::DivergentBlock { at, .. }) = stop else { panic!("{stop:?}") };
    assert_eq!(at.thread, 64);
    // One that is left over is the first of the next time.
    let body = "bar.sync 1, 64;\nmov.u64 %rd0, 1;";
    let stop = testing::try_longs(threads(96), body);
    assert!(matches!(stop, Err(Stop::DivergentBlock { .. })), "{stop:?}");
    assert_eq!(longs(threads(128), body), [1; 128]);
}

#[test]
fn votes_at_a_barrier() {
    for count in [32, 64, 70] {
        let vote = |body: &str| {
            words_as(
                threads(count),
                &format!("mov.u32 %r1, %tid.x;\nsetp.lt.u32 %p0, %r1, 40;\nsetp.lt.u32 %p2, %r1, 9999;\n{body}"),
            )
        };
        let all = vec![count.min(40); count as usize];
        assert_eq!(vote("bar.red.popc.u32 %r0, 0, %p0;"), all);
        assert_eq!(vote("barrier.cta.red.popc.aligned.u32 %r0, 1, %p0;"), all);
        assert_eq!(vote("bar.red.popc.u32 %r0, 0, !%p0;"), vec![count.saturating_sub(40); count as usize]);
        let threads = count.div_ceil(32) * 32;
        assert_eq!(vote(&format!("bar.red.popc.u32 %r0, 0, {threads}, %p0;")), all);
        let truth = |line: &str| vote(&format!("{line}\nselp.b32 %r0, 1, 0, %p1;"));
        for (line, holds) in [
            ("bar.red.and.pred %p1, 0, %p0;", count <= 40),
            ("bar.red.or.pred %p1, 0, %p0;", true),
            ("bar.red.and.pred %p1, 0, %p2;", true),
            ("bar.red.or.pred %p1, 0, !%p2;", false),
            ("bar.red.and.pred %p1, 0, !%p2;", false),
            ("bar.red.or.pred %p1, 0, !%p0;", count > 40),
            ("barrier.red.or.pred %p1, 4, 1;", true),
            ("bar.red.and.pred %p0, 0, %p0;\nmov.pred %p1, %p0;", count <= 40),
        ] {
            assert_eq!(truth(line), vec![u32::from(holds); count as usize], "{line} of {count}");
        }
    }
}

/// A guard that holds in no lane of a warp leaves that warp out.
#[test]
fn warps_that_are_off_pass() {
    let body = "mov.u32 %r2, %warpid;\nsetp.lt.u32 %p0, %r2, 2;\nmov.u64 %rd0, 1;\n@%p0 bar.sync 1, 64;\n@%p0 mov.u64 %rd0, 2;";
    let found = longs(threads(96), body);
    assert_eq!(found, [[2; 64].as_slice(), &[1; 32]].concat());
}

#[test]
fn part_of_a_warp_stops() {
    for line in ["bar.sync 0;", "bar.arrive 1, 64;", "bar.red.popc.u32 %r0, 0, %p1;"] {
        let body = format!("mov.u32 %r1, %tid.x;\nsetp.ne.u32 %p0, %r1, 37;\n@%p0 {line}");
        let stop = testing::run_as(&body, threads(64), &mut [], &mut ());
        let Err(Stop::DivergentWarp { at, missing }) = stop else { panic!("{stop:?}") };
        assert_eq!((at.thread, missing), (32, 1 << 5), "{line}");
    }
}

/// A barrier that a warp does not come to, because it has ended or waits elsewhere.
#[test]
fn warps_that_do_not_come_stop() {
    for (body, waits, other) in [
        ("@%p0 ret;\nbar.sync 0;", 0, 64),
        ("@!%p0 ret;\nbar.sync 0;", 64, 0),
        ("@%p0 bra ON;\nbar.sync 0;\nON:", 0, 64),
        ("@%p0 bra ON;\nbar.sync 0;\nret;\nON:\nbar.sync 1;", 0, 64),
        ("@%p0 ret;\nbar.sync 3, 96;", 0, 64),
    ] {
        let body = format!("mov.u32 %r1, %tid.x;\nsetp.ge.u32 %p0, %r1, 64;\n{body}");
        let stop = testing::run_as(&body, threads(96), &mut [], &mut ());
        let Err(Stop::DivergentBlock { at, other: found }) = stop else { panic!("{stop:?} {body}") };
        assert_eq!((at.thread, found), (waits, other), "{body}");
    }
}

/// Epochs by instruction, of the first warp.
#[derive(Default)]
struct Epochs(Vec<u32>);

impl Observer for Epochs {
    fn issued(&mut self, at: &At, _: u32, _: u32) {
        if at.warp == 0 {
            self.0.push(at.epoch);
        }
    }
}

/// Each barrier begins an epoch, and so does each block.
#[test]
fn barriers_begin_epochs() {
    let kernel = program("bar.sync 0;\nadd.u32 %r0, %r0, 1;\nbar.sync 0;\nbar.warp.sync -1;", 0).unwrap();
    let mut epochs = Epochs::default();
    let shape = Shape { blocks: [2, 1, 1], ..threads(64) };
    testing::run_program(&kernel, shape, &mut [], &mut epochs).unwrap();
    assert_eq!(epochs.0, [1, 2, 2, 3, 3, 4, 5, 5, 6, 6]);
}

#[test]
fn what_barriers_do_not_have_is_not_known() {
    for form in [
        "bar.sync;",
        "bar.sync 16;",
        "bar.sync -1;",
        "bar.sync %p0;",
        "bar.sync 0, 32, 32;",
        "bar.arrive 0;",
        "bar.wait 0;",
        "bar.red.popc.u32 %p0, 0, %p1;",
        "bar.red.and.pred %r0, 0, %p1;",
        "bar.red.xor.pred %p0, 0, %p1;",
        "bar.red.popc.u32 %r0, 0, %r1;",
        "bar.warp.sync %p0;",
        "bar.warp.arrive 1;",
        "barrier.cluster.arrive;",
        "barrier.cluster.wait;",
    ] {
        assert!(matches!(program(form, 1), Err(ParseError::Unknown { .. })), "{form}");
    }
}
