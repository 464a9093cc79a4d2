//! Loads that NVVM makes wider than what is asked for: a pragma says which bytes matter, and no others are watched.

use super::{Argument, Finding, Space, Watch, watch};
use crate::{Buffer, ControlFlow, Memory, Program, Shape};

/// Three threads write a word each, and after a barrier each loads four words, of which the pragma says that three are used.
fn kernel(pragma: &str) -> Program {
    let text = format!(
        ".extern .shared .align 16 .b8 words[];\n.visible .entry test(.param .u64 out)\n{{\n.reg .b32 %r<9>;\n.reg .b64 %rd<9>;\n\
         ld.param.u64 %rd1, [out];\nmov.u32 %r1, %tid.x;\nmul.wide.u32 %rd2, %r1, 4;\nmov.u64 %rd3, words;\nadd.s64 %rd4, %rd3, %rd2;\n\
         st.shared.u32 [%rd4], %r1;\nbar.sync 0;\n{pragma}ld.shared.v4.u32 {{%r2, %r3, %r4, %r5}}, [words];\n\
         add.s32 %r6, %r3, %r4;\nadd.s64 %rd5, %rd1, %rd2;\nst.global.u32 [%rd5], %r6;\nret;\n}}\n"
    );
    Program::parse(&text).unwrap()
}

/// What three threads with `shared` bytes leave behind, and what is found.
fn run(program: &Program, shared: usize) -> (Vec<u8>, Vec<Finding>) {
    let (mut bytes, buffer) = (vec![0; 12], Buffer { page: 0, offset: 0, length: 12 });
    let shape = Shape { threads: [3, 1, 1], blocks: [1; 3], dynamic_shared: shared };
    let argument = Argument { buffer, element: 4, writable: true };
    let mut watched = Watch::new(program, &shape, &[argument], vec![vec![false; 12]]);
    let parameters = buffer.address().to_le_bytes().to_vec();
    let mut memory = Memory::new(program, &shape, vec![&mut bytes], vec![buffer], parameters);
    let flow = ControlFlow::of(&program.code);
    watch((program, &flow), shape, &mut memory, &mut watched, &mut ()).unwrap();
    let found = watched.faults.iter().map(|fault| fault.finding).collect();
    drop(watched);
    (bytes, found)
}

#[test]
fn bytes_that_nobody_uses_are_not_watched() {
    let narrow = kernel(".pragma \"used_bytes_mask 4095\";\n");
    let expected: Vec<u8> = [3u32; 3].iter().flat_map(|sum| sum.to_le_bytes()).collect();
    // Whether the fourth word is there and nobody wrote it, or is not there.
    for shared in [16, 12] {
        assert_eq!(run(&narrow, shared), (expected.clone(), Vec::new()), "{shared} bytes");
    }
}

#[test]
fn without_a_pragma_all_bytes_are() {
    let whole = kernel("");
    let unwritten = Finding::Unwritten { space: Space::Shared { byte: 0 } };
    assert_eq!(run(&whole, 16).1, [unwritten]);
    let space = Space::OutsideShared { byte: 0, length: 12 };
    assert_eq!(run(&whole, 12).1, [Finding::OutOfBounds { space, size: 16, store: false }]);
}
