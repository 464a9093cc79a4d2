//! The order in which a compiler issues a straight run of instructions: a list schedule by the longest way to the run's end, so that loads
//! come early and chains are interleaved. Registers, and what is stored between loads, are respected.

use std::collections::{BinaryHeap, HashMap};

use super::machine::Cost;
use crate::operand::{Register, Space};
use crate::program::{Instruction, Op, Program};

/// Instructions in the order in which they are issued, and where each run begins that is to be replayed as a whole.
#[derive(Debug, Clone)]
pub struct Schedule {
    /// Of each place in the program's text, the instruction that is issued there.
    pub order: Vec<u32>,
    /// Of each instruction, how many the run has that begins with it; 0 in the midst of one.
    pub runs: Vec<u32>,
}

impl Schedule {
    /// Orders each run of a program. `latency` says how long an instruction's result takes.
    pub fn of(program: &Program, costs: &[Cost], latency: impl Fn(&Op) -> f64) -> Self {
        let code = &program.code;
        let mut schedule = Self { order: (0..code.len() as u32).collect(), runs: vec![0; code.len()] };
        let starts = starts(code);
        let mut first = 0;
        while first < code.len() {
            let end = (first + 1..code.len()).find(|&at| starts[at]).unwrap_or(code.len());
            schedule.runs[first] = (end - first) as u32;
            let result = |at: usize| costs[at].latency + latency(&code[at].op);
            let ordered = ordered(&code[first..end], |at| result(first + at));
            for (at, instruction) in ordered.into_iter().enumerate() {
                schedule.order[first + at] = (first + instruction) as u32;
            }
            first = end;
        }
        schedule
    }
}

/// Where runs begin: at what is jumped to, behind jumps, and about whatever waits for others.
fn starts(code: &[Instruction]) -> Vec<bool> {
    let mut starts = vec![false; code.len() + 1];
    for (at, instruction) in code.iter().enumerate() {
        match &instruction.op {
            Op::Branch(target) => starts[*target] = true,
            Op::BranchTable(_, targets) => targets.iter().for_each(|&target| starts[target] = true),
            Op::Barrier(_) | Op::Transfer(_) => starts[at] = true,
            Op::Exit | Op::Trap => {}
            _ => continue,
        }
        starts[at + 1] = true;
    }
    starts
}

/// What an instruction does to memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    None,
    Load(Space),
    /// Also what exchanges numbers between lanes: it orders stores before and loads after.
    Store(Space),
}

fn memory(instruction: &Instruction) -> Use {
    match &instruction.op {
        Op::Load(..) if instruction.opcode.contains(".nc") || instruction.opcode.contains(".param") => Use::None,
        Op::Load(space, ..) => Use::Load(*space),
        Op::Store(space, ..) => Use::Store(*space),
        Op::Atomic(atomic) => Use::Store(atomic.space),
        Op::Matrix(matrix) => match (matrix.products(), instruction.opcode.contains("store")) {
            (Some(_), _) => Use::None,
            (None, true) => Use::Store(Space::Generic),
            (None, false) => Use::Load(Space::Generic),
        },
        _ => Use::None,
    }
}

fn may_meet(a: Space, b: Space) -> bool {
    a == b || a == Space::Generic || b == Space::Generic
}

/// Which instructions each one has to come before.
fn followers(run: &[Instruction]) -> Vec<Vec<usize>> {
    let mut followers = vec![Vec::new(); run.len()];
    let mut writer: HashMap<Register, usize> = HashMap::new();
    let mut readers: HashMap<Register, Vec<usize>> = HashMap::new();
    let mut accesses: Vec<(usize, Use)> = Vec::new();
    for (at, instruction) in run.iter().enumerate() {
        let mut before = |earlier: usize| {
            if followers[earlier].last() != Some(&at) {
                followers[earlier].push(at);
            }
        };
        instruction.reads.iter().filter_map(|register| writer.get(register)).for_each(|&it| before(it));
        for register in &instruction.writes {
            writer.get(register).into_iter().for_each(|&it| before(it));
            readers.remove(register).into_iter().flatten().filter(|&it| it != at).for_each(&mut before);
        }
        let own = memory(instruction);
        for &(earlier, other) in &accesses {
            let meets = match (own, other) {
                (Use::Load(own), Use::Store(other)) | (Use::Store(own), Use::Load(other) | Use::Store(other)) => {
                    may_meet(own, other)
                }
                _ => false,
            };
            if meets {
                before(earlier);
            }
        }
        match own {
            Use::None => {}
            // Whatever came before an earlier store comes before this one too.
            Use::Store(Space::Generic) => accesses = vec![(at, own)],
            Use::Store(space) => {
                accesses.retain(|(_, it)| !matches!(it, Use::Load(other) | Use::Store(other) if *other == space));
                accesses.push((at, own));
            }
            Use::Load(_) => accesses.push((at, own)),
        }
        instruction.reads.iter().for_each(|&register| readers.entry(register).or_default().push(at));
        writer.extend(instruction.writes.iter().map(|&register| (register, at)));
    }
    followers
}

/// The places of a run in the order in which they are issued; what ends it comes last.
fn ordered(run: &[Instruction], latency: impl Fn(usize) -> f64) -> Vec<usize> {
    let followers = followers(run);
    let last = run.len() - 1;
    let ends = matches!(run[last].op, Op::Branch(_) | Op::BranchTable(..) | Op::Exit | Op::Trap);
    let mut waiting = vec![0; run.len()];
    followers.iter().flatten().for_each(|&at| waiting[at] += 1);
    // Hundredths of cycles: whole numbers can be ordered.
    let mut way = vec![0u64; run.len()];
    for at in (0..run.len()).rev() {
        let longest = followers[at].iter().map(|&next| way[next]).max().unwrap_or(0);
        way[at] = longest + (100.0 * latency(at).max(0.0)) as u64 + 1;
    }
    let place = |at: usize| (way[at], std::cmp::Reverse(at));
    let mut ready: BinaryHeap<_> =
        (0..run.len()).filter(|&at| waiting[at] == 0 && !(ends && at == last)).map(place).collect();
    let mut order = Vec::with_capacity(run.len());
    while let Some((_, std::cmp::Reverse(at))) = ready.pop() {
        order.push(at);
        for &next in &followers[at] {
            waiting[next] -= 1;
            if waiting[next] == 0 && !(ends && next == last) {
                ready.push(place(next));
            }
        }
    }
    if ends {
        order.push(last);
    }
    order
}
