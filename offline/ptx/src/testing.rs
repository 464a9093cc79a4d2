//! Runs a few lines of PTX in tests.
//!
//! A body has registers `%r<512>` and `%f<512>` of 32 bits, `%h<512>` of 16, `%rd<512>` and `%fd<512>` of 64, predicates `%p<64>`, and
//! the addresses of the buffers in `%a0`, `%a1` and so on.

use crate::{Buffer, ControlFlow, Done, Memory, Observer, ParseError, Program, Shape, Stop, run as launch};

/// A launch of one warp, without dynamic shared memory.
pub const WARP: Shape = threads(32);

/// A launch of one block of so many threads.
pub const fn threads(threads: u32) -> Shape {
    Shape { threads: [threads, 1, 1], blocks: [1; 3], dynamic_shared: 0 }
}

/// A kernel that is made of a body.
pub fn program(body: &str, buffers: usize) -> Result<Program, ParseError> {
    let parameters: Vec<String> = (0..buffers).map(|at| format!(".param .u64 p{at}")).collect();
    let addresses: String = (0..buffers).map(|at| format!("ld.param.u64 %a{at}, [p{at}];\n")).collect();
    let registers = [".b32 %r", ".f32 %f", ".b16 %h", ".b64 %rd", ".f64 %fd"].map(|it| format!(".reg {it}<512>;\n"));
    Program::parse(&format!(
        ".version 8.7\n.target sm_90a\n.address_size 64\n.visible .entry test({})\n{{\n{}.reg .pred %p<64>;\n\
         .reg .b64 %a<{}>;\n{addresses}{body}\nret;\n}}\n",
        parameters.join(", "),
        registers.concat(),
        buffers.max(1),
    ))
}

/// Runs a body in one warp.
pub fn run(body: &str, buffers: &mut [Vec<u8>]) -> Result<Done, Stop> {
    run_as(body, WARP, buffers, &mut ())
}

/// Runs a body, and has somebody look on.
pub fn run_as(body: &str, shape: Shape, buffers: &mut [Vec<u8>], observer: &mut impl Observer) -> Result<Done, Stop> {
    let program = program(body, buffers.len()).unwrap_or_else(|error| panic!("{error}\n{body}"));
    run_program(&program, shape, buffers, observer)
}

/// Runs a kernel whose parameters are the addresses of the buffers.
pub fn run_program(
    program: &Program,
    shape: Shape,
    buffers: &mut [Vec<u8>],
    observer: &mut impl Observer,
) -> Result<Done, Stop> {
    let whole = |(page, bytes): (usize, &Vec<u8>)| Buffer { page, offset: 0, length: bytes.len() };
    let places: Vec<Buffer> = buffers.iter().enumerate().map(whole).collect();
    let mut memory = Memory {
        parameters: places.iter().flat_map(|buffer| buffer.address().to_le_bytes()).collect(),
        buffers: places,
        pages: buffers.iter_mut().map(Vec::as_mut_slice).collect(),
        shared: vec![0; program.static_shared + shape.dynamic_shared],
        module: program.module.clone(),
        local: program.local,
    };
    launch((program, &ControlFlow::of(&program.code)), shape, None, &mut memory, observer, &mut ())
}

/// Numbers as a buffer.
pub fn bytes<const N: usize, T: Copy>(numbers: &[T], to: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    numbers.iter().flat_map(|&number| to(number)).collect()
}

/// A buffer as numbers.
pub fn numbers<const N: usize, T>(bytes: &[u8], from: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|&chunk| from(chunk)).collect()
}
