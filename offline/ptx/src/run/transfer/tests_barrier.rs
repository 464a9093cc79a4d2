//! Barriers in shared memory: phases, counts of threads and bytes, copies that they wait for, and warps that wait for ever.

use crate::operand::Space;
use crate::testing::{self, Accesses, bytes, numbers, threads};
use crate::{Kind, Place, Stop};

/// A barrier at `%r1` for as many threads as are asked for, behind it room for 1024 bytes at `%r2`; the thread's word of the first
/// buffer lies at `%rd0`.
fn begun(count: u32) -> String {
    format!(
        ".shared .align 128 .b8 room[1152];\nmov.u32 %r0, %tid.x;\nmov.u32 %r1, room;\nadd.u32 %r2, %r1, 128;\n\
         mad.wide.u32 %rd0, %r0, 4, %a0;\nsetp.eq.u32 %p0, %r0, 0;\n\
         @%p0 mbarrier.init.shared::cta.b64 [%r1], {count};\nfence.mbarrier_init.release.cluster;\nbar.sync 0;\n"
    )
}

/// Waits until the phase of `state` is over.
fn wait(form: &str, state: &str, label: &str) -> String {
    format!("{label}:\nmbarrier.{form}.b64 %p9, [%r1], {state};\n@!%p9 bra {label};\n")
}

/// Runs a body in so many threads and returns the word of each.
fn words(count: u32, body: &str) -> Result<Vec<u32>, Stop> {
    let mut buffers = [vec![0; 4 * count as usize], (0..4096u32).map(|at| (at % 253) as u8).collect()];
    testing::run_as(body, threads(count), &mut buffers, &mut ())?;
    Ok(numbers(&buffers[0], u32::from_le_bytes))
}

/// Lane 0 alone does this; what it leaves in `%r9` is returned.
fn alone(count: u32, body: &str) -> u32 {
    let body = format!("{}@!%p0 bra END;\n{body}\nst.global.u32 [%rd0], %r9;\nEND:\n", begun(count));
    words(32, &body).unwrap_or_else(|stop| panic!("{stop:?}\n{body}"))[0]
}

/// Has `%r9` say whether a test holds.
fn tested(test: &str) -> String {
    format!("mbarrier.{test};\nselp.u32 %r9, 1, 0, %p9;\n")
}

#[test]
fn phases_by_state_and_parity() {
    let arrive = "mbarrier.arrive.shared::cta.b64 %rd4, [%r1];\n";
    let by_state = tested("test_wait.shared.b64 %p9, [%r1], %rd4");
    assert_eq!(alone(2, &(arrive.to_string() + &by_state)), 0);
    assert_eq!(alone(2, &(arrive.to_string() + arrive + &by_state)), 1);
    assert_eq!(alone(2, &(arrive.repeat(3) + &by_state)), 0, "the state is that of the second phase");
    for (arrivals, parity, over) in [(0, 0, 0), (0, 1, 1), (1, 0, 0), (2, 0, 1), (2, 1, 0), (4, 0, 0), (4, 1, 1)] {
        for form in ["test_wait.parity.shared::cta", "try_wait.parity.acquire.cta.shared::cta"] {
            let test = tested(&format!("{form}.b64 %p9, [%r1], {parity}"));
            assert_eq!(alone(2, &(arrive.repeat(arrivals) + &test)), over, "{arrivals} {parity}");
        }
    }
}

#[test]
fn counts_of_threads() {
    let pending = "mbarrier.arrive.shared.b64 %rd4, [%r1];\nmbarrier.pending_count.b64 %r9, %rd4;\n";
    assert_eq!(alone(7, pending), 7);
    for (before, left) in [
        ("mbarrier.arrive.release.cta.shared::cta.b64 _, [%r1], 3;\n", 4),
        ("mbarrier.arrive.noComplete.shared.b64 %rd4, [%r1], 2;\n", 5),
        ("mbarrier.arrive.shared::cluster.b64 _, [%r1];\n", 6),
        ("mbarrier.arrive_drop.shared.b64 %rd4, [%r1];\n", 6),
        ("mbarrier.arrive_drop.noComplete.shared.b64 %rd4, [%r1], 3;\n", 4),
        // A phase later those that were dropped are missing.
        ("mbarrier.arrive_drop.shared.b64 %rd4, [%r1];\nmbarrier.arrive.shared.b64 %rd4, [%r1], 6;\n", 6),
        ("mbarrier.arrive.shared.b64 %rd4, [%r1], 7;\n", 7),
        // What was a barrier may be one again.
        ("mbarrier.inval.shared.b64 [%r1];\nmbarrier.init.shared.b64 [%r1], 2;\n", 2),
    ] {
        assert_eq!(alone(7, &(before.to_string() + pending)), left, "{before}");
    }
}

#[test]
fn counts_of_bytes() {
    let test = tested("test_wait.parity.shared.b64 %p9, [%r1], 0");
    for (before, over) in [
        ("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 %rd4, [%r1], 64;\n", 0),
        (
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 64;\nmbarrier.complete_tx.shared::cta.b64 [%r1], 64;\n",
            1,
        ),
        (
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 64;\nmbarrier.complete_tx.shared::cta.b64 [%r1], 63;\n",
            0,
        ),
        ("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r1], 32;\nmbarrier.arrive.shared.b64 %rd4, [%r1];\n", 0),
        // Bytes may come before they are expected.
        ("mbarrier.complete_tx.shared.b64 [%r1], 64;\nmbarrier.arrive.expect_tx.shared.b64 %rd4, [%r1], 64;\n", 1),
    ] {
        assert_eq!(alone(1, &(before.to_string() + &test)), over, "{before}");
    }
}

#[test]
fn generic_addresses_are_of_shared_memory() {
    let generic = "cvt.u64.u32 %rd5, %r1;\ncvta.shared.u64 %rd5, %rd5;\nmbarrier.init.b64 [%rd5], 1;\n\
        mbarrier.arrive.b64 %rd4, [%rd5];\n";
    assert_eq!(alone(9, &(generic.to_string() + &tested("test_wait.b64 %p9, [%rd5], %rd4"))), 1);
    let stop = words(32, "mbarrier.init.b64 [%a1], 1;\n").unwrap_err();
    assert!(matches!(stop, Stop::OutOfBounds { space: Space::Shared, size: 8, store: true, .. }), "{stop:?}");
    let stop = words(32, &(begun(1) + "mbarrier.arrive.shared.b64 %rd4, [%r1+4];\n")).unwrap_err();
    assert!(matches!(stop, Stop::Misaligned { size: 8, .. }), "{stop:?}");
}

/// Threads write, all wait, threads read what others wrote, twice.
fn exchanged(form: &str, count: u32) -> String {
    let mut body = begun(count) + "shl.b32 %r3, %r0, 2;\nadd.u32 %r4, %r2, %r3;\n";
    for phase in 0..2 {
        let state = if form.contains("parity") { phase.to_string() } else { "%rd4".to_string() };
        body += &format!(
            "add.u32 %r5, %r0, {phase};\nst.shared.u32 [%r4], %r5;\nmbarrier.arrive.shared.b64 %rd4, [%r1];\n"
        );
        body += &wait(form, &state, &format!("WAIT{phase}"));
        body += &format!("xor.b32 %r6, %r3, {};\nadd.u32 %r6, %r6, %r2;\nld.shared.u32 %r7, [%r6];\n", 4 * count - 4);
        body += "add.u32 %r9, %r9, %r7;\nbar.sync 0;\n";
    }
    body + "st.global.u32 [%rd0], %r9;\n"
}

#[test]
fn warps_wait_for_each_other() {
    for form in ["test_wait.shared", "try_wait.shared", "try_wait.parity.shared::cta"] {
        for count in [32, 128] {
            let found = words(count, &exchanged(form, count)).unwrap();
            (0..count).for_each(|thread| assert_eq!(found[thread as usize], 2 * (count - 1 - thread) + 1, "{form}"));
        }
    }
}

#[test]
fn a_wait_that_nobody_ends_stops() {
    for form in ["test_wait.shared", "try_wait.shared"] {
        // One thread more than there are.
        let body = exchanged(form, 64).replace("[%r1], 64;\nfence", "[%r1], 65;\nfence");
        let program = testing::program(&body, 2).unwrap();
        let stop = words(64, &body).unwrap_err();
        let Stop::DivergentBlock { at, .. } = stop else { panic!("{stop:?}") };
        assert!(program.code[at.instruction].opcode.starts_with("mbarrier.t"), "{stop:?}");
    }
}

/// Copies 512 bytes by one thread, with what it says before and after that, and has all read them.
fn bulk(before: &str, after: &str) -> Result<Vec<u32>, Stop> {
    let body = format!(
        "{}@!%p0 bra REST;\n{before}mov.u32 %r5, 512;\ncp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes \
         [%r2], [%a1], %r5, [%r1];\n{after}REST:\nbar.sync 0;\nshl.b32 %r3, %r0, 3;\nadd.u32 %r3, %r3, %r2;\n\
         ld.shared.u32 %r8, [%r3];\nbar.sync 0;\n{}ld.shared.u32 %r7, [%r3];\nmul.lo.u32 %r8, %r8, 16777216;\nadd.u32 %r7, %r7, %r8;\n\
         st.global.u32 [%rd0], %r7;\n",
        begun(1),
        wait("try_wait.parity.shared::cta", "0", "WAIT"),
    );
    words(64, &body)
}

#[test]
fn long_copies_arrive_at_the_barrier() {
    let expect = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 512;\n";
    let word = |thread: usize| u32::from_le_bytes(std::array::from_fn(|at| ((thread * 8 + at) % 253) as u8));
    for (before, after) in [(expect, ""), ("", expect)] {
        let found = bulk(before, after).unwrap();
        (0..64).for_each(|thread| assert_eq!(found[thread], word(thread), "what is read before the wait is zero"));
    }
    assert!(matches!(bulk(&expect.replace("512", "528"), ""), Err(Stop::DivergentBlock { .. })));
    assert!(matches!(bulk("add.u32 %r2, %r2, 8;\n", ""), Err(Stop::Misaligned { size: 16, .. })));
    let stop = bulk("add.u32 %r2, %r2, 528;\n", "").unwrap_err();
    assert!(matches!(stop, Stop::OutOfBounds { at, space: Space::Shared, store: true, .. } if at.thread == 0));
    let stop = bulk("add.u64 %a1, %a1, 3600;\n", "").unwrap_err();
    assert!(matches!(stop, Stop::OutOfBounds { at, space: Space::Global, store: false, .. } if at.thread == 0));
}

/// All threads copy a word each, and the barrier is told when they have arrived; what is copied later is not waited for.
#[test]
fn barriers_wait_for_small_copies() {
    for (form, count) in [("", 64), (".noinc", 128)] {
        let body = format!(
            "{}shl.b32 %r3, %r0, 2;\nxor.b32 %r6, %r3, 252;\nadd.u32 %r6, %r6, %r2;\nadd.u32 %r3, %r3, %r2;\nmad.wide.u32 %rd1, %r0, 4, %a1;\n\
             cp.async.ca.shared.global [%r3], [%rd1], 4;\ncp.async.mbarrier.arrive{form}.shared::cta.b64 [%r1];\n\
             cp.async.ca.shared.global [%r3+256], [%rd1], 4;\n\
             ld.shared.u32 %r8, [%r3];\nbar.sync 0;\nmbarrier.arrive.shared.b64 %rd4, [%r1];\n{}\
             ld.shared.u32 %r7, [%r6];\nld.shared.u32 %r9, [%r6+256];\nadd.u32 %r7, %r7, %r9;\n\
             mul.lo.u32 %r8, %r8, 16777216;\nadd.u32 %r7, %r7, %r8;\nst.global.u32 [%rd0], %r7;\n",
            begun(count),
            wait("test_wait.shared", "%rd4", "WAIT"),
        );
        let found = words(64, &body).unwrap();
        let word = |thread: usize| u32::from_le_bytes(std::array::from_fn(|at| ((thread * 4 + at) % 253) as u8));
        (0..64).for_each(|thread| assert_eq!(found[thread], word(63 - thread), "{form} {thread}"));
    }
}

/// What comes before a phase's end is in an epoch before what comes after it: a sanitiser finds them in order.
#[test]
fn a_phase_is_an_epoch() {
    let body = exchanged("try_wait.parity.shared::cta", 64).replace("bar.sync 0;\nst.global", "st.global");
    let mut accesses = Accesses::default();
    testing::run_as(&body, threads(64), &mut [vec![0; 256], vec![]], &mut accesses).unwrap();
    let of = |kind| accesses.of(Place::Shared).filter(move |it| it.kind == kind).map(|it| it.at.epoch);
    let (stores, loads): (Vec<u32>, Vec<u32>) = (of(Kind::Store).skip(1).collect(), of(Kind::Load).collect());
    assert_eq!((stores.len(), loads.len()), (4, 4));
    assert!(stores[..2].iter().max() < loads[..2].iter().min(), "{stores:?} {loads:?}");
    assert!(loads[..2].iter().max() < stores[2..].iter().min(), "{stores:?} {loads:?}");
    assert!(stores[2..].iter().max() < loads[2..].iter().min(), "{stores:?} {loads:?}");
}

#[test]
fn a_long_copy_is_seen_in_its_thread() {
    let body = begun(1)
        + "@!%p0 bra REST;\nmbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 64;\nmov.u32 %r5, 64;\n\
           cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%a1], %r5, [%r1];\nREST:\n"
        + &wait("try_wait.parity.shared::cta", "0", "WAIT");
    let mut accesses = Accesses::default();
    testing::run_as(&body, threads(64), &mut [vec![], bytes(&[1u32; 16], u32::to_le_bytes)], &mut accesses).unwrap();
    let stores: Vec<usize> =
        accesses.of(Place::Shared).filter(|it| it.kind == Kind::Store).map(|it| it.at.warp).collect();
    assert_eq!(stores, [0, 0], "the barrier is made, the bytes arrive");
}
