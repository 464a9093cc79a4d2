//! Runs a few lines of PTX in tests.
//!
//! A body has registers `%r<512>` and `%f<512>` of 32 bits, `%h<512>` of 16, `%rd<512>` and `%fd<512>` of 64, predicates `%p<64>`, and
//! the addresses of the buffers in `%a0`, `%a1` and so on. Lines of a body that declare variables are the module's.

use crate::lanes::{Long, Mask};
use crate::{
    Access, At, Buffer, Chance, ControlFlow, Done, Kind, Memory, Observer, ParseError, Place, Program, Shape, Stop,
    run as launch,
};

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
    run_in_order(program, shape, buffers, observer, &mut ())
}

/// The same, with blocks, warps and lanes in an order of one's own.
pub fn run_in_order(
    program: &Program,
    shape: Shape,
    buffers: &mut [Vec<u8>],
    observer: &mut impl Observer,
    chance: &mut dyn Chance,
) -> Result<Done, Stop> {
    let whole = |(page, bytes): (usize, &Vec<u8>)| Buffer { page, offset: 0, length: bytes.len() };
    let places: Vec<Buffer> = buffers.iter().enumerate().map(whole).collect();
    let parameters = places.iter().flat_map(|buffer| buffer.address().to_le_bytes()).collect();
    let pages = buffers.iter_mut().map(Vec::as_mut_slice).collect();
    let mut memory = Memory::new(program, &shape, pages, places, parameters);
    launch((program, &ControlFlow::of(&program.code)), shape, None, &mut memory, observer, chance)
}

/// The other order than that of `()`: the first comes last.
pub struct Backwards;

impl Chance for Backwards {
    fn below(&mut self, _: usize) -> usize {
        0
    }
}

/// An access that was seen.
#[derive(Clone, Copy)]
pub struct Seen {
    pub at: At,
    pub place: Place,
    pub kind: Kind,
    /// Bytes of a lane.
    pub size: usize,
    pub mask: Mask,
    pub offsets: Long,
}

/// Keeps what is accessed.
#[derive(Default)]
pub struct Accesses(pub Vec<Seen>);

impl Observer for Accesses {
    fn accessed(&mut self, at: &At, access: &Access<'_>) {
        let &Access { place, offsets, mask, size, kind, .. } = access;
        self.0.push(Seen { at: *at, place, kind, size, mask, offsets: *offsets });
    }
}

impl Accesses {
    /// Those of a place.
    pub fn of(&self, place: Place) -> impl Iterator<Item = &Seen> {
        self.0.iter().filter(move |seen| seen.place == place)
    }
}

/// What each thread has in `%rd0` at the end of a body, in the order of blocks and of threads in them.
pub fn try_longs(shape: Shape, body: &str) -> Result<Vec<u64>, Stop> {
    let threads: u32 = shape.threads.iter().chain(&shape.blocks).product();
    let mut buffers = [vec![0; threads as usize * 8]];
    run_as(&format!("{PLACE}{body}\nst.global.u64 [%rd500], %rd0;"), shape, &mut buffers, &mut ())?;
    Ok(numbers(&buffers[0], u64::from_le_bytes))
}

/// The same of a body that does not stop.
pub fn longs(shape: Shape, body: &str) -> Vec<u64> {
    try_longs(shape, body).unwrap_or_else(|stop| panic!("{stop:?}\n{body}"))
}

/// What each lane of a warp has in `%r0` at the end of a body.
pub fn words(body: &str) -> Vec<u32> {
    words_as(WARP, body)
}

/// The same of all threads.
pub fn words_as(shape: Shape, body: &str) -> Vec<u32> {
    let body = format!("{body}\ncvt.u64.u32 %rd0, %r0;");
    longs(shape, &body).into_iter().map(|long| u32::try_from(long).expect("a word")).collect()
}

/// Eight bytes of each thread at `%rd500`: its number among all threads of all blocks counted along x first.
const PLACE: &str = "mov.u32 %r500, %ctaid.z;\nmov.u32 %r501, %nctaid.y;\nmov.u32 %r502, %ctaid.y;\n\
    mad.lo.u32 %r500, %r500, %r501, %r502;\nmov.u32 %r501, %nctaid.x;\nmov.u32 %r502, %ctaid.x;\n\
    mad.lo.u32 %r500, %r500, %r501, %r502;\nmov.u32 %r501, %ntid.z;\nmov.u32 %r502, %tid.z;\n\
    mad.lo.u32 %r500, %r500, %r501, %r502;\nmov.u32 %r501, %ntid.y;\nmov.u32 %r502, %tid.y;\n\
    mad.lo.u32 %r500, %r500, %r501, %r502;\nmov.u32 %r501, %ntid.x;\nmov.u32 %r502, %tid.x;\n\
    mad.lo.u32 %r500, %r500, %r501, %r502;\nmad.wide.u32 %rd500, %r500, 8, %a0;\n";

/// Numbers as a buffer.
pub fn bytes<const N: usize, T: Copy>(numbers: &[T], to: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    numbers.iter().flat_map(|&number| to(number)).collect()
}

/// A buffer as numbers.
pub fn numbers<const N: usize, T>(bytes: &[u8], from: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|&chunk| from(chunk)).collect()
}
