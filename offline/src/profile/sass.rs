//! Machine code beside PTX: how many instructions of each pipe `ptxas` made of each line of the source.
//!
//! What is executed is PTX, so an instruction's count is that of its line; what it costs is the line's machine code, shared out among the
//! line's PTX instructions. A line whose machine code `ptxas` has moved elsewhere or left out costs nothing there.

use std::collections::HashMap;

use ultramem_ptx::Program;

use super::copies::copies;
use super::listing::listed;
use super::pipes::Pipe;

/// Instructions by pipe.
pub type ByPipe = [f64; Pipe::ALL.len()];

/// Machine instructions of each line, by pipe.
pub fn by_line(listing: &str) -> HashMap<u32, ByPipe> {
    let mut lines: HashMap<u32, ByPipe> = HashMap::new();
    for it in listed(listing) {
        lines.entry(it.line).or_default()[Pipe::of_sass(it.mnemonic) as usize] += 1.0;
    }
    lines
}

/// The machine instructions that each instruction of a program stands for, by pipe: those of its line, of one copy of it.
pub fn costs(program: &Program, listing: &str) -> Vec<ByPipe> {
    let machine = by_line(listing);
    let copies = copies(program, &listed(listing));
    let mut of_line: HashMap<u32, Vec<usize>> = HashMap::new();
    program.code.iter().enumerate().for_each(|(at, it)| of_line.entry(it.line).or_default().push(at));
    let mut costs = vec![ByPipe::default(); program.code.len()];
    for (line, machine) in machine {
        let Some(all) = of_line.get(&line) else { continue };
        for pipe in Pipe::ALL {
            let own: Vec<usize> =
                all.iter().copied().filter(|&at| Pipe::of_ptx(&program.code[at].opcode) == pipe).collect();
            let sharing = if own.is_empty() { all } else { &own };
            for &at in sharing {
                costs[at][pipe as usize] += machine[pipe as usize] / sharing.len() as f64 / copies[at];
            }
        }
    }
    costs
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTING: &str = "
.text.test:
	//## File \"/x/default_program\", line 3
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 IMAD.WIDE.U32 R2, R0, 0x4, R2 ;
	//## File \"/x/cuda_bf16.hpp\", line 99 inlined at \"/x/default_program\", line 4
        /*0020*/                   LDG.E.CONSTANT R2, desc[UR4][R2.64] ;
        /*0030*/                   FFMA R5, R4, R3, R2 ;
        /*0040*/                   LOP3.LUT R5, R4, R3, R2, 0xc0, !PT ;
.L_x_1:
        /*0050*/                   BRA `(.L_x_1);
";

    #[test]
    fn machine_instructions_are_counted_by_line_and_pipe() {
        let lines = by_line(LISTING);
        let count = |line: u32, pipe: Pipe| lines[&line][pipe as usize];
        assert_eq!((count(3, Pipe::Other), count(3, Pipe::Imad)), (1.0, 1.0));
        let of_four = [Pipe::Memory, Pipe::Fma, Pipe::Alu, Pipe::Branch].map(|pipe| count(4, pipe));
        assert_eq!((lines.len(), of_four), (2, [1.0; 4]));
    }

    #[test]
    fn a_lines_machine_code_is_shared_by_its_instructions() {
        let text = ".visible .entry test()\n{\n.reg .f32 %f<5>;\n.reg .b32 %r<3>;\n.loc 1 4 0\nfma.rn.f32 %f1, %f2, %f3, %f4;\n\
                    fma.rn.f32 %f1, %f2, %f3, %f4;\nand.b32 %r1, %r2, 3;\n.loc 1 5 0\nret;\n}\n";
        let program = Program::parse(text).unwrap();
        let costs = costs(&program, LISTING);
        let of = |at: usize, pipe: Pipe| costs[at][pipe as usize];
        assert_eq!((of(0, Pipe::Fma), of(1, Pipe::Fma), of(2, Pipe::Fma)), (0.5, 0.5, 0.0));
        assert_eq!((of(2, Pipe::Alu), of(0, Pipe::Alu)), (1.0, 0.0));
        // A load of which PTX has none on the line falls on all of it; line 5 has no machine code.
        assert!((of(2, Pipe::Memory) - 1.0 / 3.0).abs() < 1e-9);
        assert_eq!(costs[3], ByPipe::default());
    }
}
