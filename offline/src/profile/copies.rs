//! How often machine code has what PTX has once: `ptxas` unrolls loops, and the turns that are left over come in copies of their own. Only one
//! of the copies is run for an instruction of PTX that is run.
//!
//! What is never made of several instructions tells: loads, stores, atomics, shuffles, barriers, products of matrix units, multiply-adds.
//! A line that has none of these has as many copies as those that run together with it.

use std::collections::HashMap;

use ultramem_ptx::Program;
use ultramem_ptx::program::{Instruction, Op};

use super::listing::Machine;

/// Fewer are no copies: an instruction was moved to another line, or a load is done in two parts now and then.
const LEAST: f64 = 1.5;

/// Of each instruction of a program, its copies in machine code.
pub fn copies(program: &Program, machine: &[Machine<'_>]) -> Vec<f64> {
    let of_line = of_lines(program, machine);
    let mut copies: Vec<Option<f64>> = program.code.iter().map(|it| of_line.get(&it.line).copied()).collect();
    let mut first = 0;
    for end in ends(&program.code) {
        let block = &mut copies[first..end];
        let fewest = block.iter().flatten().copied().reduce(f64::min);
        block.iter_mut().for_each(|it| *it = it.or(fewest));
        first = end;
    }
    copies.into_iter().map(|it| it.filter(|&it| it >= LEAST).unwrap_or(1.0)).collect()
}

/// Of each line that tells, its copies.
fn of_lines(program: &Program, machine: &[Machine<'_>]) -> HashMap<u32, f64> {
    let mut counts: HashMap<(u32, &str), (f64, f64)> = HashMap::new();
    let mut composed: HashMap<u32, bool> = HashMap::new();
    for it in &program.code {
        *composed.entry(it.line).or_default() |= is_composed(&it.opcode);
        ptx_kind(it).into_iter().for_each(|kind| counts.entry((it.line, kind)).or_default().0 += 1.0);
    }
    for it in machine {
        machine_kind(it.mnemonic).into_iter().for_each(|kind| counts.entry((it.line, kind)).or_default().1 += 1.0);
    }
    let tells = |line: u32, kind: &str| {
        let &(ptx, machine) = counts.get(&(line, kind))?;
        let misleads = kind == FUSED && composed.get(&line).is_some_and(|it| *it);
        (ptx > 0.0 && machine > 0.0 && !misleads).then(|| machine / ptx)
    };
    let of_line = |line: &u32| Some((*line, KINDS.iter().find_map(|kind| tells(*line, kind))?));
    composed.keys().filter_map(of_line).collect()
}

/// Machine instructions that tell, the most reliable first: loads are joined, or done in parts.
const KINDS: [&str; 13] =
    ["HMMA", FUSED, "BAR", "SHFL", "VOTE", "POPC", "ATOMS", "ATOMG", "STG", "STS", "LDSM", "LDG", "LDS"];

/// Where straight runs of instructions end.
fn ends(code: &[Instruction]) -> Vec<usize> {
    let mut ends = vec![code.len()];
    for (at, instruction) in code.iter().enumerate() {
        match &instruction.op {
            Op::Branch(target) => ends.extend([*target, at + 1]),
            Op::BranchTable(_, targets) => ends.extend(targets.iter().copied().chain([at + 1])),
            Op::Exit | Op::Trap => ends.push(at + 1),
            _ => {}
        }
    }
    ends.sort_unstable();
    ends.dedup();
    ends
}

const FUSED: &str = "FFMA";

/// Whether multiply-adds are made of it.
fn is_composed(opcode: &str) -> bool {
    let name = opcode.split('.').next().unwrap_or(opcode);
    ["div", "rem", "sqrt", "rsqrt", "rcp", "ex2", "lg2", "sin", "cos", "tanh"].contains(&name)
}

/// The machine instruction that a PTX instruction is one of, for those that tell.
fn ptx_kind(instruction: &Instruction) -> Option<&'static str> {
    let mut parts = instruction.opcode.split('.');
    let name = parts.next()?;
    let has = |word: &str| parts.clone().any(|it| it.starts_with(word));
    let shared = has("shared");
    match name {
        "ld" | "st" if has("param") || has("local") || has("const") => None,
        "ld" => Some(if shared { "LDS" } else { "LDG" }),
        "st" => Some(if shared { "STS" } else { "STG" }),
        "atom" | "red" => Some(if shared { "ATOMS" } else { "ATOMG" }),
        "shfl" => Some("SHFL"),
        "vote" => Some("VOTE"),
        "popc" => Some("POPC"),
        "bar" | "barrier" => Some("BAR"),
        "mma" => Some("HMMA"),
        "ldmatrix" => Some("LDSM"),
        "fma" if has("f32") => Some(FUSED),
        _ => None,
    }
}

fn machine_kind(mnemonic: &str) -> Option<&'static str> {
    match mnemonic.split('.').next()? {
        "LDG" | "LD" => Some("LDG"),
        "STG" | "ST" => Some("STG"),
        "ATOMG" | "ATOM" | "RED" | "REDG" => Some("ATOMG"),
        "LDS" => Some("LDS"),
        "STS" => Some("STS"),
        "ATOMS" => Some("ATOMS"),
        "SHFL" => Some("SHFL"),
        "VOTE" | "VOTEU" => Some("VOTE"),
        "POPC" | "UPOPC" => Some("POPC"),
        "BAR" => Some("BAR"),
        "HMMA" => Some("HMMA"),
        "LDSM" => Some("LDSM"),
        "FFMA" => Some(FUSED),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::listing::listed;
    use super::*;

    #[test]
    fn a_loop_that_was_unrolled_has_copies() {
        let text = ".visible .entry test()\n{\n.reg .f32 %f<5>;\n.reg .b32 %r<3>;\n.reg .pred %p<2>;\n.reg .b64 %rd<2>;\n.loc 1 3 0\nadd.u32 %r1, %r1, 7;\n\
                    L:\n.loc 1 4 0\nld.global.f32 %f1, [%rd1];\n.loc 1 5 0\nadd.u32 %r2, %r2, 1;\nsetp.lt.u32 %p1, %r2, %r1;\n@%p1 bra L;\nret;\n}\n";
        let program = Program::parse(text).unwrap();
        let line = |line: u32, code: &[&str]| {
            let code: String = code.iter().map(|it| format!("/*0000*/ {it} R1, R2 ;\n")).collect();
            format!("//## File \"/x/default_program\", line {line}\n{code}")
        };
        let listing = [line(3, &["IADD3"]), line(4, &["LDG.E"; 5]), line(5, &["IADD3", "ISETP", "BRA"])].concat();
        // Four turns at once and one for what is left. The line that counts the turns has none of its own, but runs with them.
        assert_eq!(copies(&program, &listed(&listing)), [1.0, 5.0, 5.0, 5.0, 5.0, 1.0]);
        let straight = [line(3, &["IADD3"]), line(4, &["LDG.E"]), line(5, &["IADD3", "ISETP", "BRA"])].concat();
        assert_eq!(copies(&program, &listed(&straight)), [1.0; 6]);
    }

    #[test]
    fn multiply_adds_of_a_division_are_no_copies() {
        let text = ".visible .entry test()\n{\n.reg .f32 %f<5>;\n.loc 1 3 0\nfma.rn.f32 %f1, %f2, %f3, %f4;\ndiv.rn.f32 %f1, %f1, %f2;\nret;\n}\n";
        let program = Program::parse(text).unwrap();
        let listing =
            format!("//## File \"/x/default_program\", line 3\n{}", "/*0000*/ FFMA R1, R2, R3, R4 ;\n".repeat(8));
        assert_eq!(copies(&program, &listed(&listing)), [1.0; 3]);
    }
}
