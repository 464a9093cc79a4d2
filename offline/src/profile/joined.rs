//! Loads from shared memory that `ptxas` joins: four of four bytes become one of sixteen. It joins what a thread reads side by side, which is what
//! lanes share; so a line's widest loads are those of its loads whose lanes have the fewest words between them.

use std::collections::HashMap;

use ultramem_ptx::operand::Space;
use ultramem_ptx::program::Op;

use super::Counts;
use super::listing::Machine;

/// Of each instruction, the part of a machine instruction that it is: 1 but for loads that were joined.
pub fn joined(counts: &Counts, machine: &[Machine<'_>]) -> Vec<f64> {
    let code = &counts.loaded.program.code;
    let mut of_line: HashMap<u32, Vec<(usize, f64)>> = HashMap::new();
    for (at, instruction) in code.iter().enumerate() {
        if let Op::Load(Space::Shared, element, targets, _) = &instruction.op {
            let bytes = f64::from(element.size) * targets.len() as f64;
            of_line.entry(instruction.line).or_default().push((at, bytes));
        }
    }
    let mut widths: HashMap<u32, Vec<f64>> = HashMap::new();
    for it in machine.iter().filter(|it| it.mnemonic.split('.').next() == Some("LDS")) {
        widths.entry(it.line).or_default().push(bytes(it.mnemonic));
    }
    let words = |at: usize| counts.instructions[at].words as f64 / counts.instructions[at].issued.max(1) as f64;
    let mut parts = vec![1.0; code.len()];
    for (line, mut loads) in of_line {
        let Some(widths) = widths.get_mut(&line) else { continue };
        loads.sort_by(|a, b| words(a.0).total_cmp(&words(b.0)));
        widths.sort_by(|a, b| b.total_cmp(a));
        join(&loads, widths, &mut parts);
    }
    parts
}

/// Gives each load the width that stands where it does, both by their bytes from the first to the last.
fn join(loads: &[(usize, f64)], widths: &[f64], parts: &mut [f64]) {
    let scale = widths.iter().sum::<f64>() / loads.iter().map(|it| it.1).sum::<f64>();
    let (mut width, mut end, mut passed) = (0, widths[0], 0.0);
    for &(at, bytes) in loads {
        let middle = (passed + bytes / 2.0) * scale;
        while end < middle && width + 1 < widths.len() {
            width += 1;
            end += widths[width];
        }
        parts[at] = (bytes / widths[width]).min(1.0);
        passed += bytes;
    }
}

/// Bytes of a lane.
fn bytes(mnemonic: &str) -> f64 {
    let has = |part: &str| mnemonic.split('.').any(|it| it == part);
    match () {
        () if has("128") => 16.0,
        () if has("64") => 8.0,
        () if has("U16") || has("S16") => 2.0,
        () if has("U8") || has("S8") => 1.0,
        () => 4.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loads_that_come_first_are_joined_the_widest() {
        let of = |widths: &[f64]| {
            let mut parts = vec![0.0; 8];
            join(&[0, 1, 2, 3, 4, 5, 6, 7].map(|at| (at, 4.0)), widths, &mut parts);
            parts
        };
        assert_eq!(of(&[4.0; 8]), [1.0; 8]);
        assert_eq!(of(&[16.0, 4.0, 4.0, 4.0, 4.0]), [0.25, 0.25, 0.25, 0.25, 1.0, 1.0, 1.0, 1.0]);
        // Two turns of a loop in one.
        assert_eq!(of(&[16.0, 16.0, 8.0, 8.0, 8.0, 8.0]), [0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 0.5]);
        assert_eq!(of(&[2.0; 16]), [1.0; 8]);
    }

    #[test]
    fn widths_are_in_the_mnemonic() {
        let widths = ["LDS", "LDS.64", "LDS.128", "LDS.U16", "LDS.S8"].map(bytes);
        assert_eq!(widths, [4.0, 8.0, 16.0, 2.0, 1.0]);
    }
}
