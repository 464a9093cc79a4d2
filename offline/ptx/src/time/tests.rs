//! Kernels whose time can be said by hand.

use super::*;
use crate::count::{Count, Trace, count};
use crate::program::{Op, Program};
use crate::testing::{program, threads};
use crate::{Buffer, ControlFlow, Memory};

/// The traces of a body over a buffer of some bytes.
fn traces(body: &str, count_of: u32) -> (Program, Vec<Trace>) {
    let program = program(body, 1).unwrap();
    let mut page = vec![0u8; 1 << 16];
    let (shape, length) = (threads(count_of), page.len());
    let buffer = Buffer { page: 0, offset: 0, length };
    let parameters = buffer.address().to_le_bytes().to_vec();
    let mut memory = Memory::new(&program, &shape, vec![&mut page], vec![buffer], parameters);
    let mut counted = Count::new(&program, 1 << 14, &[length]).traced(1 << 20);
    count((&program, &ControlFlow::of(&program.code)), shape, &[0], &mut memory, &mut counted).unwrap();
    let traces = counted.take_traces();
    drop(counted);
    (program, traces)
}

const MACHINE: Machine = Machine {
    resident: 1,
    tags: 4.0,
    same_address: 32.0,
    cache: 32.0,
    memory: 16.0,
    latency_shared: 30.0,
    latency_first_level: 40.0,
    latency_cache: 260.0,
    latency_memory: 480.0,
    latency_barrier: 20.0,
    latency_block: 0.0,
};

/// Arithmetic takes an issue slot and a cycle of pipe 0, and its result four cycles; memory takes a slot; parameters, moves and the end nothing.
fn costs(program: &Program) -> Vec<Cost> {
    let of = |it: &crate::program::Instruction| match &it.op {
        _ if it.opcode.contains(".param") => Cost::default(),
        Op::Move(..) | Op::Exit => Cost::default(),
        Op::Load(..) | Op::Store(..) | Op::Atomic(_) => Cost { issued: 1.0, unit: 1.0, joined: 1.0, ..Cost::default() },
        Op::Barrier(_) => Cost { issued: 1.0, ..Cost::default() },
        _ => {
            let mut pipes = [0.0; PIPES];
            pipes[0] = 1.0;
            Cost { issued: 1.0, pipes, latency: 4.0, ..Cost::default() }
        }
    };
    program.code.iter().map(of).collect()
}

fn cycles_of(body: &str, units: u32, machine: Machine, share: f64, change: impl Fn(&mut Cost, &str)) -> f64 {
    let (program, traces) = traces(body, units);
    let mut costs = costs(&program);
    for (cost, instruction) in costs.iter_mut().zip(&program.code) {
        change(cost, &instruction.opcode);
    }
    let blocks = Blocks { traces: &traces, count: 1, from_memory: &[share], steps: 1 << 20 };
    replay(&program, &costs, &machine, blocks).cycles
}

fn cycles(body: &str, units: u32) -> f64 {
    cycles_of(body, units, MACHINE, 0.0, |_, _| {})
}

/// `count` additions, each to what the one `apart` before has found.
fn chains(count: usize, apart: usize) -> String {
    let line = |at: usize| format!("add.u32 %r{0}, %r{0}, 1;\n", at % apart);
    (0..count).map(line).collect()
}

#[test]
fn a_chain_takes_its_latency_and_chains_side_by_side_hide_it() {
    // The last is issued after 99 others have given their results; the end does not wait for it.
    assert_eq!(cycles(&chains(100, 1), 32), 99.0 * 4.0 + 1.0);
    assert_eq!(cycles(&chains(400, 4), 32), 400.0);
    assert_eq!(cycles(&chains(200, 2), 32), 99.0 * 4.0 + 2.0);
}

#[test]
fn chains_one_after_the_other_are_interleaved() {
    let one_by_one: String = (0..4).map(|chain| format!("add.u32 %r{chain}, %r{chain}, 1;\n").repeat(100)).collect();
    assert_eq!(cycles(&one_by_one, 32), 400.0);
}

#[test]
fn warps_hide_each_others_latency_in_their_own_quarter() {
    // Four warps are one a quarter; sixteen fill the slots.
    assert_eq!(cycles(&chains(100, 1), 128), 99.0 * 4.0 + 1.0);
    assert_eq!(cycles(&chains(100, 1), 512), 400.0);
    assert_eq!(cycles(&chains(100, 1), 1024), 800.0);
}

#[test]
fn a_pipe_that_is_slower_than_the_issue_binds() {
    let slow = |cost: &mut Cost, opcode: &str| {
        if opcode.starts_with("add") {
            cost.pipes[0] = 2.0;
        }
    };
    // The pipe is busy for a cycle beyond the last issue, for which nobody waits.
    assert_eq!(cycles_of(&chains(400, 8), 128, MACHINE, 0.0, slow), 2.0 * 399.0 + 1.0);
}

/// Loads of `count` different lines by a warp, then a sum of all.
fn loads(count: usize) -> String {
    let load = |at: usize| format!("ld.global.u32 %r{at}, [%a0+{}];\n", at * 128);
    let sum = |at: usize| format!("add.u32 %r500, %r500, %r{at};\n");
    (0..count).map(load).chain((0..count).map(sum)).collect()
}

#[test]
fn loads_under_way_together_take_their_latency_once() {
    // A sector of 32 bytes takes a cycle of the way to the second level, and the unit's cycle goes before.
    let first = 1.0 + 1.0 + 260.0;
    assert_eq!(cycles(&loads(1), 32), first + 1.0);
    assert_eq!(cycles(&loads(8), 32), first + 7.0 * 4.0 + 1.0);
    // Two cycles a sector of device memory.
    assert_eq!(cycles_of(&loads(1), 32, MACHINE, 1.0, |_, _| {}), 1.0 + 1.0 + 2.0 - 1.0 + 480.0 + 1.0);
}

#[test]
fn registers_for_few_loads_leave_few_under_way() {
    let few = |limit: usize| {
        move |cost: &mut Cost, opcode: &str| cost.in_flight = limit * usize::from(opcode.starts_with("ld.global"))
    };
    let (one, two, all) = (few(1), few(2), few(8));
    let of = |change: &dyn Fn(&mut Cost, &str)| cycles_of(&loads(8), 32, MACHINE, 0.0, change);
    let (one, two, all) = (of(&one), of(&two), of(&all));
    assert!(one > 8.0 * 260.0 && one < 9.0 * 265.0, "{one}");
    assert!(two > 4.0 * 260.0 && two < 5.0 * 265.0, "{two}");
    assert_eq!(all, cycles(&loads(8), 32));
}

#[test]
fn a_load_is_not_moved_before_a_store_that_it_may_see() {
    let body = "st.global.u32 [%a0], %r1;\nld.global.u32 %r2, [%a0];\nadd.u32 %r3, %r2, 1;\n";
    let program = program(body, 1).unwrap();
    let costs = costs(&program);
    let schedule = schedule::Schedule::of(&program, &costs, |op| if matches!(op, Op::Load(..)) { 260.0 } else { 0.0 });
    let place = |name: &str| {
        let at = |at: &u32| program.code[*at as usize].opcode.starts_with(name);
        schedule.order.iter().position(at).unwrap()
    };
    assert!(place("st.global") < place("ld.global"));
    assert!(place("ld.global") < place("add"));
}

#[test]
fn warps_wait_at_a_barrier_for_the_last() {
    // Warp 0 alone has a chain of 100 to do; all go on after it.
    let body = format!(
        "mov.u32 %r400, %tid.x;\nsetp.gt.u32 %p1, %r400, 31;\n@%p1 bra MEET;\n{}MEET:\nbar.sync 0;\n{}",
        chains(100, 1),
        chains(50, 1)
    );
    let found = cycles(&body, 128);
    let least = 99.0 * 4.0 + 20.0 + 49.0 * 4.0;
    assert!(found >= least && found < least + 20.0, "{found}, at least {least}");
}

#[test]
fn blocks_that_do_not_fit_come_in_waves() {
    let (program, traces) = traces(&chains(100, 1), 32);
    let costs = costs(&program);
    let begun = |resident: usize, count: u64, steps: usize, latency_block: f64| {
        let blocks = Blocks { traces: &traces, count, from_memory: &[0.0], steps };
        replay(&program, &costs, &Machine { resident, latency_block, ..MACHINE }, blocks)
    };
    let time = |resident: usize, count: u64, steps: usize| begun(resident, count, steps, 0.0);
    let one = 99.0 * 4.0 + 1.0;
    assert_eq!(time(4, 4, 1 << 20).cycles, one, "one a quarter");
    assert_eq!(time(4, 12, 1 << 20).cycles, 3.0 * one);
    assert_eq!(time(1, 12, 1 << 20).cycles, 12.0 * one);
    assert_eq!(begun(4, 12, 1 << 20, 100.0).cycles, 3.0 * one + 200.0);
    // Some stand for all.
    let scaled = time(4, 1200, 1);
    assert_eq!(scaled.replayed, 12);
    assert!((scaled.cycles / (300.0 * one) - 1.0).abs() < 0.01, "{scaled:?}");
}

#[test]
fn loads_from_shared_memory_that_are_joined_take_what_their_words_take() {
    // Sixteen loads of a word that all lanes share, and of a word each.
    let load = |address: &str| {
        let one = |at: usize| format!("ld.shared.u32 %r{at}, [{address}+{}];\n", at * 128);
        (0..16).map(one).collect::<String>()
    };
    let body = |address: &str| {
        format!(
            ".shared .align 16 .b8 room[4096];\nmov.u32 %r400, room;\nmov.u32 %r401, %tid.x;\nmad.lo.u32 %r402, %r401, 4, %r400;\n{}",
            load(address)
        )
    };
    let of = |address: &str, joined: f64| {
        cycles_of(&body(address), 32, MACHINE, 0.0, |cost, opcode| {
            if opcode.starts_with("ld.shared") {
                (cost.issued, cost.unit, cost.joined) = (joined, joined, joined);
            }
        })
    };
    let (apart, joined) = (of("%r400", 1.0), of("%r400", 0.25));
    assert_eq!(apart - joined, 12.0);
    assert_eq!(of("%r402", 1.0), of("%r402", 0.25));
}
