//! Parameters, and variables of the module with what they hold from the start.

use super::check;
use crate::operand::Range;
use crate::testing::{WARP, longs, numbers, threads};
use crate::{Buffer, ControlFlow, Memory, Program, run};

#[test]
fn parameters_lie_as_their_types_ask() {
    let text = ".visible .entry test(\n.param .u8 a,\n.param .u64 .ptr .global .align 1 out,\n.param .u16 b,\n.param .f32 c,\n\
        .param .align 8 .b8 d[12],\n.param .s8 e,\n.param .u64 .ptr .align 256 f\n)\n.maxntid 32, 1, 1\n{\n\
        .reg .b64 %rd<9>;\n.reg .b32 %r<9>;\nld.param.u64 %rd1, [out];\nld.param.u8 %r1, [a];\nld.param.u16 %r2, [b];\n\
        ld.param.f32 %r3, [c];\nld.param.u32 %r4, [d+8];\nld.param.s8 %r5, [e];\nmov.b64 %rd2, d;\nld.param.u64 %rd3, [%rd2];\n\
        st.global.v4.u32 [%rd1], {%r1, %r2, %r3, %r4};\nst.global.u32 [%rd1+16], %r5;\nst.global.u64 [%rd1+24], %rd3;\nret;\n}\n";
    let program = Program::parse(text).unwrap();
    let places = [(0, 1), (8, 8), (16, 2), (20, 4), (24, 12), (36, 1), (40, 8)];
    assert_eq!(program.parameters, places.map(|(offset, size)| Range { offset, size }));
    let mut bytes = vec![0; 32];
    let buffer = Buffer { page: 0, offset: 0, length: 32 };
    let mut parameters: Vec<u8> = (100..148).collect();
    parameters[8..16].copy_from_slice(&buffer.address().to_le_bytes());
    parameters[36] = 0x85;
    let mut memory = Memory::new(&program, &WARP, vec![&mut bytes], vec![buffer], parameters);
    run((&program, &ControlFlow::of(&program.code)), WARP, None, &mut memory, &mut (), &mut ()).unwrap();
    let words = numbers(&bytes, u32::from_le_bytes);
    assert_eq!(words[..5], [100, 117 << 8 | 116, 0x7b7a_7978, 0x8786_8584, 0xffff_ff85]);
    assert_eq!(words[6..], [0x7f7e_7d7c, 0x8382_8180]);
}

const DECLARED: &str = ".const .align 4 .u32 table[4] = {1, -2, 0x30, 4};\n.const .s16 minus = -7;\n\
    .global .align 8 .f64 half = 0d3FE0000000000000;\n.visible .global .align 4 .f32 many[4] = {0f3F800000, 0f40000000};\n\
    .global .b8 text[] = {72, 105, 0};\n.global .align 1 .u8 empty;\n.global .align 16 .v4 .u32 wide = {5, 6, 7, 8};\n\
    .const .align 8 .b64 big[2] = {0x123456789abcdef0, -1};\n";

#[test]
fn variables_hold_their_values() {
    let with = |body: &str| format!("{DECLARED}{body}");
    let word = |body: &str| with(&format!("{body}\ncvt.u64.u32 %rd0, %r0;"));
    check(&[
        (&word("ld.const.u32 %r0, [table];"), &|_| 1),
        (&word("ld.const.u32 %r0, [table+4];"), &|_| 0xffff_fffe),
        (&word("ld.const.s16 %r0, [minus];"), &|_| 0xffff_fff9),
        (&word("mov.u64 %rd1, table;\nld.const.u32 %r0, [%rd1+8];"), &|_| 0x30),
        (&with("ld.const.u64 %rd0, [big];"), &|_| 0x1234_5678_9abc_def0),
        (&with("ld.const.u64 %rd0, [big+8];"), &|_| u64::MAX),
        (&with("ld.global.u64 %rd0, [half];"), &|_| 0.5f64.to_bits()),
        (&with("mov.u64 %rd1, half;\nld.global.u64 %rd0, [%rd1];"), &|_| 0.5f64.to_bits()),
        (&with("mov.u64 %rd1, half;\ncvta.global.u64 %rd1, %rd1;\nld.u64 %rd0, [%rd1];"), &|_| 0.5f64.to_bits()),
        (&word("ld.global.u32 %r0, [many+4];"), &|_| u64::from(2f32.to_bits())),
        (&word("ld.global.u32 %r0, [many+12];"), &|_| 0),
        (&word("ld.global.u8 %r0, [text+1];"), &|_| 105),
        (&word("ld.global.u8 %r0, [text+2];"), &|_| 0),
        (&word("ld.global.u8 %r0, [empty];"), &|_| 0),
        (&word("ld.global.v4.u32 {%r3, %r2, %r1, %r0}, [wide];"), &|_| 8),
        (&with("mov.u64 %rd0, wide;\nand.b64 %rd0, %rd0, 15;"), &|_| 0),
    ]);
}

/// What one block writes into a variable of the module, the next one reads.
#[test]
fn global_variables_are_of_the_whole_launch() {
    let body = ".global .align 8 .u64 total = 5;\nmov.u64 %rd1, 1;\natom.global.add.u64 %rd2, [total], %rd1;\n\
        ld.global.u64 %rd0, [total];";
    let shape = crate::Shape { blocks: [3, 1, 1], ..threads(1) };
    let mut found = longs(shape, body);
    found.sort_unstable();
    assert_eq!(found, [6, 7, 8]);
}

/// Shared memory that the launch asks for is behind the static one, as aligned as it says, whichever is declared first.
#[test]
fn dynamic_shared_memory_lies_behind() {
    for (alignment, start) in [(4, 128), (128, 128), (1024, 1024)] {
        let more = format!(".extern .shared .align {alignment} .b8 more[];\n");
        let few = ".shared .align 4 .b8 few[20];\n";
        for declared in [format!("{more}{few}"), format!("{few}{more}")] {
            let shape = crate::Shape { dynamic_shared: 8, ..WARP };
            let body = format!("{declared}st.shared.u64 [more], 9;\nmov.u64 %rd0, more;");
            assert_eq!(longs(shape, &body), [start; 32], "{declared}");
        }
    }
    // Alone it lies at the start.
    let shape = crate::Shape { dynamic_shared: 8, ..WARP };
    assert_eq!(longs(shape, ".extern .shared .align 16 .b8 more[];\nmov.u64 %rd0, more;"), [0; 32]);
}
