//! Where lanes that part at a branch come together again: at the branch's immediate post-dominator, the first instruction that
//! every way from the branch to the end leads through.

use crate::program::{Instruction, Op};

/// Of each branch, the instruction at which its lanes come together; [`usize::MAX`] where they only do so at the end.
#[derive(Debug, Clone)]
pub struct ControlFlow {
    /// Of each instruction that may branch.
    pub joins: Vec<usize>,
    /// Whether an instruction is the head of a loop: a later one jumps to it.
    pub heads: Vec<bool>,
}

/// Behind the last instruction.
pub const END: usize = usize::MAX;

impl ControlFlow {
    /// Finds them, by blocks of instructions.
    pub fn of(code: &[Instruction]) -> Self {
        let mut starts = vec![false; code.len() + 1];
        let mut heads = vec![false; code.len()];
        starts[0] = true;
        for (at, instruction) in code.iter().enumerate() {
            for target in targets(&instruction.op) {
                starts[target] = true;
                if target <= at {
                    heads[target] = true;
                }
            }
            if ends_block(&instruction.op) {
                starts[at + 1] = true;
            }
        }
        let firsts: Vec<usize> = (0..code.len()).filter(|at| starts[*at]).collect();
        let block_of = |at: usize| firsts.partition_point(|first| *first <= at) - 1;
        let end = firsts.len();
        let post_dominators = |leaving: bool| {
            let next = |block: usize| {
                let last = firsts.get(block + 1).map_or(code.len(), |next| *next) - 1;
                let all = successors(code, last, leaving).into_iter();
                all.map(|at| if at >= code.len() { end } else { block_of(at) }).collect()
            };
            post_dominators(&(0..end).map(next).collect::<Vec<_>>())
        };
        // Lanes that leave early are not waited for. Where there is no other way to the end, all of them leave.
        let (staying, leaving) = (post_dominators(false), post_dominators(true));
        let immediate: Vec<usize> =
            staying.into_iter().zip(leaving).map(|(it, all)| it.or(all).unwrap_or(end)).collect();
        let mut joins = vec![END; code.len()];
        for (block, first) in firsts.iter().enumerate() {
            let last = firsts.get(block + 1).map_or(code.len(), |next| *next) - 1;
            debug_assert!(*first <= last);
            joins[last] = firsts.get(immediate[block]).map_or(END, |first| *first);
        }
        Self { joins, heads }
    }
}

fn targets(op: &Op) -> Vec<usize> {
    match op {
        Op::Branch(target) => vec![*target],
        Op::BranchTable(_, targets) => targets.to_vec(),
        _ => Vec::new(),
    }
}

fn ends_block(op: &Op) -> bool {
    matches!(op, Op::Branch(_) | Op::BranchTable(..) | Op::Exit | Op::Trap)
}

/// The instructions that may follow the one at `at`; without those of lanes that leave while others stay unless `leaving`. What traps
/// ends the launch: nobody waits for what follows.
fn successors(code: &[Instruction], at: usize, leaving: bool) -> Vec<usize> {
    let Instruction { op, guard, .. } = &code[at];
    let leaves = |at: usize| matches!(code.get(at), Some(Instruction { op: Op::Exit, guard: None, .. }) | None);
    let mut found = match op {
        Op::Exit => vec![code.len()],
        Op::Trap if leaving => vec![at + 1],
        op => targets(op),
    };
    if guard.is_some() && !leaving {
        found.retain(|&at| !leaves(at));
    }
    if guard.is_some() || !ends_block(op) {
        found.push(at + 1);
    }
    found.sort_unstable();
    found.dedup();
    found
}

/// Of each block its immediate post-dominator; the end, numbered behind the blocks, has itself; a block from
/// which no way leads to the end has none. Iterates to the fixed point over the
/// reversed graph, as Cooper, Harvey and Kennedy describe it.
fn post_dominators(successors: &[Vec<usize>]) -> Vec<Option<usize>> {
    let end = successors.len();
    let mut predecessors = vec![Vec::new(); end + 1];
    for (block, all) in successors.iter().enumerate() {
        all.iter().for_each(|&next| predecessors[next].push(block));
    }
    let order = postorder(&predecessors, end);
    let mut number = vec![0; end + 1];
    order.iter().enumerate().for_each(|(at, block)| number[*block] = at);
    let mut immediate = vec![usize::MAX; end + 1];
    immediate[end] = end;
    let mut changed = true;
    while changed {
        changed = false;
        for &block in order.iter().rev().filter(|block| **block != end) {
            let known = successors[block].iter().copied().filter(|next| immediate[*next] != usize::MAX);
            let Some(found) = known.reduce(|a, b| meet(&immediate, &number, a, b)) else { continue };
            if immediate[block] != found {
                immediate[block] = found;
                changed = true;
            }
        }
    }
    immediate.into_iter().map(|it| (it != usize::MAX).then_some(it)).collect()
}

/// The nearest block that post-dominates both.
fn meet(immediate: &[usize], number: &[usize], mut a: usize, mut b: usize) -> usize {
    while a != b {
        while number[a] < number[b] {
            a = immediate[a];
        }
        while number[b] < number[a] {
            b = immediate[b];
        }
    }
    a
}

/// The blocks that lead to `end`, each after all that it is reached by first.
fn postorder(predecessors: &[Vec<usize>], end: usize) -> Vec<usize> {
    let (mut order, mut seen) = (Vec::new(), vec![false; predecessors.len()]);
    let mut open = vec![(end, 0)];
    seen[end] = true;
    while let Some((block, next)) = open.last_mut() {
        match predecessors[*block].get(*next) {
            Some(&before) => {
                *next += 1;
                if !std::mem::replace(&mut seen[before], true) {
                    open.push((before, 0));
                }
            }
            None => {
                order.push(*block);
                open.pop();
            }
        }
    }
    order
}

#[cfg(test)]
mod tests {
    use crate::testing;

    /// Lanes part, some of them leave or would trap, the rest come together at a shuffle of all that are left.
    fn together(leaving: &str, members: &str) {
        let body = format!(
            "mov.u32 %r0, %tid.x;\nsetp.lt.u32 %p0, %r0, 16;\nsetp.lt.u32 %p1, %r0, 8;\nsetp.gt.u32 %p2, %r0, 90;\n\
             @%p0 bra LOW;\nmov.u32 %r1, 5;\nbra.uni ON;\nLOW:\n{leaving}mov.u32 %r1, 7;\nON:\n\
             vote.sync.ballot.b32 %r2, 1, {members};\nmad.wide.u32 %rd0, %r0, 4, %a0;\nst.global.u32 [%rd0], %r1;\nOUT:\nret;\n\
             STOP:\ntrap;\nbra.uni OUT;"
        );
        let mut buffers = [vec![0; 128]];
        testing::run(&body, &mut buffers).unwrap_or_else(|stop| panic!("{stop:?}\n{body}"));
        let left = if members.starts_with('-') { 0 } else { 8 };
        for (lane, found) in testing::numbers(&buffers[0], u32::from_le_bytes).into_iter().enumerate() {
            let stayed = if lane < 16 { 7 } else { 5 };
            assert_eq!(found, if lane < left { 0 } else { stayed }, "{leaving}");
        }
    }

    #[test]
    fn lanes_come_together_whoever_leaves() {
        together("@%p1 bra OUT;\n", "0xffffff00");
        together("@%p1 exit;\n", "0xffffff00");
        together("@%p2 bra STOP;\n", "-1");
        together("@%p2 trap;\n", "-1");
    }

    /// A loop that is left to the end of the kernel only: sides within it still come together.
    #[test]
    fn loops_without_another_end() {
        let body = "mov.u32 %r0, %tid.x;\nmov.u32 %r1, 0;\nmad.wide.u32 %rd0, %r0, 4, %a0;\nLOOP:\nand.b32 %r2, %r0, 1;\n\
            setp.eq.u32 %p0, %r2, 0;\n@%p0 bra EVEN;\nadd.u32 %r1, %r1, 3;\nbra.uni ON;\nEVEN:\nadd.u32 %r1, %r1, 4;\nON:\n\
            vote.sync.ballot.b32 %r3, 1, -1;\nst.global.u32 [%rd0], %r1;\nadd.u32 %r4, %r4, 1;\nsetp.gt.u32 %p1, %r4, 4;\n\
            @%p1 bra OUT;\nbra.uni LOOP;\nOUT:";
        let mut buffers = [vec![0; 128]];
        testing::run(body, &mut buffers).unwrap();
        let found = testing::numbers(&buffers[0], u32::from_le_bytes);
        (0..32).for_each(|lane| assert_eq!(found[lane], if lane % 2 == 0 { 20 } else { 15 }));
    }
}
