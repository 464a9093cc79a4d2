//! What stops a launch: accesses outside of all memory and such that are not aligned, and that a store that is stopped writes nothing.

use crate::operand::Space;
use crate::testing::{self, WARP, program};
use crate::{Shape, Stop};

/// One lane of all accesses `%rd3` where the rest are where they may be.
const LANE: &str = "mov.u32 %r1, %laneid;\nsetp.eq.u32 %p0, %r1, 5;\n";

/// Code that stops, with the place where the others are and the one where the fifth lane is.
fn stopped(access: &str, declared: &str, good: &str, bad: &str, shape: Shape) -> (Stop, usize) {
    let body = format!(
        "{declared}{LANE}mov.u64 %rd3, {good};\nmov.u64 %rd4, {bad};\n@%p0 mov.u64 %rd3, %rd4;\nmov.u64 %rd5, -1;\n{access}"
    );
    let kernel = program(&body, 2).unwrap();
    let instruction = kernel.code.iter().position(|it| *it.opcode == *access.split(' ').next().unwrap()).unwrap();
    let mut buffers = [vec![77; 256], vec![78; 60]];
    let stop = testing::run_program(&kernel, shape, &mut buffers, &mut ()).expect_err(&body);
    assert!(buffers[0].iter().all(|byte| *byte == 77) && buffers[1].iter().all(|byte| *byte == 78), "{body}");
    (stop, instruction)
}

/// An access of the fifth lane alone that is in no memory.
fn out_of_bounds(access: &str, declared: &str, (good, bad): (&str, &str), expected: (Space, u64, usize, bool)) {
    let shape = Shape { dynamic_shared: 16, ..WARP };
    let (stop, place) = stopped(access, declared, good, bad, shape);
    let Stop::OutOfBounds { at, space, address, size, store } = stop else { panic!("{access} at {bad}: {stop:?}") };
    assert_eq!((space, address, size, store), expected, "{access} at {bad}");
    assert_eq!((at.block, at.thread, at.instruction), (0, 5, place), "{access} at {bad}");
}

/// The address of the first buffer, and that of the second.
const PAGES: [u64; 2] = [1 << 40, 2 << 40];

#[test]
fn buffers_have_bounds() {
    let good = PAGES[0].to_string();
    for (access, size, store) in [
        ("ld.global.u8 %r0, [%rd3];", 1, false),
        ("ld.global.nc.u16 %r0, [%rd3];", 2, false),
        ("ld.global.v2.f32 {%f0, %f1}, [%rd3];", 8, false),
        ("ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%rd3];", 16, false),
        ("st.global.u8 [%rd3], %rd5;", 1, true),
        ("st.global.u32 [%rd3], %rd5;", 4, true),
        ("st.global.v4.u32 [%rd3], {%rd5, %rd5, %rd5, %rd5};", 16, true),
        ("st.global.v4.u64 [%rd3], {%rd5, %rd5, %rd5, %rd5};", 32, true),
        ("atom.global.add.u32 %r9, [%rd3], %r8;", 4, true),
        ("atom.global.exch.b64 %rd9, [%rd3], %rd8;", 8, true),
        ("red.global.add.u32 [%rd3], %r8;", 4, true),
        ("atom.global.v4.f32.add {%f0, %f1, %f2, %f3}, [%rd3], {%f4, %f5, %f6, %f7};", 16, true),
    ] {
        // The last one lies inside with its first bytes alone.
        let last = PAGES[1] + 60 / size as u64 * size as u64;
        for bad in [0, 64, PAGES[0] - 32, PAGES[0] + 256, last, PAGES[1] - 32, 3 << 40, u64::MAX - 31] {
            out_of_bounds(access, "", (&good, &bad.to_string()), (Space::Global, bad, size, store));
        }
    }
}

#[test]
fn other_spaces_have_bounds() {
    let shared = ".shared .align 8 .b8 tile[24];\n.extern .shared .align 8 .b8 more[];\n";
    let local = ".local .align 8 .b8 own[16];\n";
    let constant = ".const .align 8 .b8 fixed[16];\n";
    for (access, declared, good, bad, space) in [
        ("ld.shared.u64 %rd0, [%rd3];", shared, 0, 144, Space::Shared),
        ("st.shared.u64 [%rd3], %rd5;", shared, 136, 144, Space::Shared),
        ("st.shared.u64 [%rd3], %rd5;", shared, 0, 1 << 40, Space::Shared),
        ("ld.shared.u64 %rd0, [%rd3];", shared, 0, u64::MAX - 7, Space::Shared),
        ("ld.local.u64 %rd0, [%rd3];", local, 8, 16, Space::Local),
        ("st.local.u64 [%rd3], %rd5;", local, 8, 16, Space::Local),
        ("st.local.u64 [%rd3], %rd5;", local, 8, u64::MAX - 7, Space::Local),
        ("ld.const.u64 %rd0, [%rd3];", constant, 8, 16, Space::Constant),
        ("ld.param.u64 %rd0, [%rd3];", "", 8, 16, Space::Parameter),
        // Nothing is declared: nothing is there.
        ("ld.local.u64 %rd0, [%rd3+64];", local, 0, 1 << 20, Space::Local),
    ] {
        let store = access.starts_with("st");
        let first_of_all = access.contains("+64");
        let (stop, _) =
            stopped(access, declared, &good.to_string(), &bad.to_string(), Shape { dynamic_shared: 16, ..WARP });
        let Stop::OutOfBounds { at, space: found, address, size: 8, store: stores } = stop else { panic!("{access}") };
        let (lane, wanted) = if first_of_all { (0, good + 64) } else { (5, bad) };
        assert_eq!((at.thread, found, address, stores), (lane, space, wanted, store), "{access} at {bad}");
    }
}

/// A generic address has the bounds of the place that it lies in.
#[test]
fn generic_addresses_have_bounds() {
    let declared = ".shared .align 8 .b8 tile[128];\n.local .align 8 .b8 own[16];\n.global .align 8 .b8 many[16];\n";
    for access in ["ld.u64 %rd0, [%rd3];", "st.u64 [%rd3], %rd5;"] {
        for (convert, variable, length) in
            [("shared", "tile", 128), ("local", "own", 16), ("global", "many", 16), ("param", "p0", 16)]
        {
            for beyond in [length, 1 << 30] {
                let body = format!(
                    "{declared}{LANE}mov.u64 %rd3, {variable};\ncvta.{convert}.u64 %rd3, %rd3;\nmov.u64 %rd5, -1;\n\
                     @%p0 add.u64 %rd3, %rd3, {beyond};\n{access}"
                );
                let stop = testing::run(&body, &mut [vec![0; 8], vec![0; 8]]).expect_err(&body);
                let Stop::OutOfBounds { at, space: Space::Generic, size: 8, .. } = stop else {
                    panic!("{stop:?} {body}")
                };
                assert_eq!(at.thread, 5, "{body}");
            }
        }
    }
}

#[test]
fn addresses_are_aligned() {
    let declared =
        ".shared .align 128 .b8 tile[256];\n.local .align 128 .b8 own[256];\n.const .align 128 .b8 fixed[256];\n";
    for (ty, registers, size) in [
        ("u16", "%r0", 2u64),
        ("b32", "%r0", 4),
        ("f32", "%f0", 4),
        ("u64", "%rd0", 8),
        ("v2.u8", "{%r0, %r1}", 2),
        ("v2.u32", "{%r0, %r1}", 8),
        ("v4.u16", "{%r0, %r1, %r2, %r3}", 8),
        ("v4.f32", "{%f0, %f1, %f2, %f3}", 16),
        ("v2.u64", "{%rd0, %rd1}", 16),
        ("v8.b32", "{%r0, %r1, %r2, %r3, %r4, %r5, %r6, %r7}", 32),
    ] {
        for (space, start) in [(".global", PAGES[0]), ("", PAGES[0]), (".shared", 0), (".local", 0), (".const", 0)] {
            for skip in [1, size / 2, size - 1, 3 * size / 2] {
                let (good, bad) = (start.to_string(), (start + skip).to_string());
                let load = format!("ld{space}.{ty} {registers}, [%rd3];");
                let store = format!("st{space}.{ty} [%rd3], {registers};");
                for access in [load, store].iter().filter(|it| !it.starts_with("st.const")) {
                    let (stop, instruction) = stopped(access, declared, &good, &bad, WARP);
                    let Stop::Misaligned { at, address, size: found } = stop else { panic!("{access}: {stop:?}") };
                    assert_eq!((address, found as u64), (start + skip, size), "{access}");
                    assert_eq!((at.thread, at.instruction), (5, instruction), "{access}");
                }
            }
        }
    }
    for access in [
        "atom.global.add.u32 %r9, [%rd3], 1;",
        "red.global.add.u32 [%rd3], 1;",
        "atom.global.cas.b32 %r9, [%rd3], 1, 2;",
    ] {
        let (stop, _) = stopped(access, "", &PAGES[0].to_string(), &(PAGES[0] + 2).to_string(), WARP);
        assert!(matches!(stop, Stop::Misaligned { size: 4, .. }), "{access}");
    }
}

/// A stop is told with the block and the thread of that block.
#[test]
fn stops_name_block_and_thread() {
    let body = "mov.u32 %r1, %ctaid.x;\nmov.u32 %r2, %tid.x;\nsetp.eq.u32 %p0, %r1, 2;\nsetp.eq.u32 %p1, %r2, 70;\n\
        and.pred %p0, %p0, %p1;\nmov.u64 %rd3, %a0;\n@%p0 mov.u64 %rd3, 8;\nst.global.u64 [%rd3], %rd0;\n";
    let shape = Shape { threads: [96, 1, 1], blocks: [4, 1, 1], dynamic_shared: 0 };
    let found = testing::run_as(body, shape, &mut [vec![0; 8]], &mut ());
    let Err(Stop::OutOfBounds { at, address: 8, store: true, .. }) = found else { panic!("{found:?}") };
    assert_eq!((at.block, at.thread), (2, 70));
}

#[test]
fn traps_stop() {
    let body =
        "mov.u32 %r1, %laneid;\nsetp.gt.u32 %p0, %r1, 6;\nst.global.u32 [%a0], 1;\n@%p0 trap;\nst.global.u32 [%a0], 2;";
    let mut buffers = [vec![0; 4]];
    let Err(Stop::Trap { at }) = testing::run(body, &mut buffers) else { panic!() };
    assert_eq!((at.thread, buffers[0][0]), (7, 1));
    let body = "setp.eq.u32 %p0, %r1, 6;\n@%p0 trap;\nst.global.u32 [%a0], 2;";
    testing::run(body, &mut buffers).unwrap();
    assert_eq!(buffers[0][0], 2);
}

/// In tests a launch is endless sooner.
#[test]
fn endless_loops_stop() {
    let body = "ON:\nadd.u32 %r1, %r1, 1;\nbra.uni ON;";
    assert!(matches!(testing::run(body, &mut []), Err(Stop::Endless { .. })));
}
