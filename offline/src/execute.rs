//! Runs a launch: the PTX that NVRTC makes of the kernel is interpreted on the launch's buffers, and watched.
//!
//! Blocks, warps and the lanes of atomic operations run in an order that is drawn anew for each launch: what depends on it is a fault of
//! the kernel.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rand::{Rng, SeedableRng, rngs::StdRng};
use ultramem_ptx::{Buffer, Chance, Flow, Memory, Program, Shape, Site, Stop};

use crate::compile::{self, Architecture};
use crate::report::{Fault, Finding, Place, Space};
use crate::watch::Watch;
use crate::{Error, HostBuffer, Kernel, LaunchReport, Result};

/// What a launch is given besides its kernel.
pub struct Launch<'a> {
    pub architecture: Architecture,
    /// Whether loops are left as they are written.
    pub rolled: bool,
    pub buffers: &'a [HostBuffer],
    /// Scalars and lengths: those that are passed by value, then those that are passed by pointer.
    pub info: &'a [u64],
    /// Where in `info` the latter start.
    pub dynamic: usize,
}

/// A kernel that is ready to run.
pub struct Loaded {
    pub program: Program,
    pub flow: Flow,
}

/// The kernel of an architecture, compiled and read once in a process.
pub fn load(kernel: &Kernel, architecture: Architecture, rolled: bool) -> Result<Arc<Loaded>> {
    type Slot = Arc<OnceLock<Arc<Loaded>>>;
    type Key = (String, String, Architecture, bool);
    static LOADED: Mutex<Option<HashMap<Key, Slot>>> = Mutex::new(None);
    let key = (kernel.source.clone(), kernel.entry.clone(), architecture, rolled);
    let slot =
        LOADED.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default().entry(key).or_default().clone();
    if let Some(loaded) = slot.get() {
        return Ok(loaded.clone());
    }
    let text = compile::ptx(kernel, architecture, rolled)?;
    let refused = |reason: String| Error::NotExecutable { kernel: kernel.entry.clone(), reason };
    let program = Program::parse(&text).map_err(|error| refused(error.to_string()))?;
    let flow = Flow::of(&program.code);
    Ok(slot.get_or_init(|| Arc::new(Loaded { program, flow })).clone())
}

/// Draws the order of blocks and warps.
struct Order(StdRng);

impl Chance for Order {
    fn below(&mut self, end: usize) -> usize {
        self.0.random_range(0..end)
    }
}

/// Runs the launch and leaves its results in the buffers, its faults and its traffic in the report.
pub fn execute(launch: &Launch<'_>, report: &mut LaunchReport) -> Result<()> {
    let kernel = report.kernel.clone();
    let loaded = load(&kernel, launch.architecture, launch.rolled)?;
    let Loaded { program, flow } = &*loaded;

    // Two arguments may share a page, which is locked once.
    let mut ids: Vec<usize> = launch.buffers.iter().map(HostBuffer::page_id).collect();
    let of_buffer = ids.clone();
    ids.sort_unstable();
    ids.dedup();
    let owner = |id: &usize| &launch.buffers[of_buffer.iter().position(|it| it == id).expect("an argument's page")];
    let mut pages: Vec<_> = ids.iter().map(|id| owner(id).page()).collect();
    let marks = pages.iter_mut().map(|page| std::mem::take(&mut page.written)).collect();
    let place = |buffer: &HostBuffer| ids.binary_search(&buffer.page_id()).expect("a locked page");
    let mut buffers: Vec<Buffer> =
        launch.buffers.iter().map(|it| Buffer { page: place(it), offset: it.offset(), length: it.length() }).collect();
    let mut watch = Watch::new(&buffers, &kernel, marks, program);

    // What is passed by pointer lies in a page of its own.
    let mut passed: Vec<u8> =
        launch.info[launch.dynamic.min(launch.info.len())..].iter().flat_map(|it| it.to_le_bytes()).collect();
    if !passed.is_empty() {
        buffers.push(Buffer { page: pages.len(), offset: 0, length: passed.len() });
    }
    let parameters = parameters(program, &buffers, launch.info);
    let mut page_bytes: Vec<&mut [u8]> = pages.iter_mut().map(|page| &mut page.memory[..]).collect();
    page_bytes.push(&mut passed);
    let mut memory = Memory {
        pages: page_bytes,
        buffers,
        shared: vec![0; watch.dynamic_shared() + kernel.shared],
        parameters,
        module: program.module.clone(),
        local: program.local,
    };
    let shape = Shape { threads: kernel.dim, blocks: report.count, dynamic_shared: kernel.shared };
    let mut order = Order(StdRng::seed_from_u64(report.seed));
    let done = ultramem_ptx::run((program, flow), shape, None, &mut memory, &mut watch, &mut order);

    let mut failure = None;
    match done {
        Ok(done) => report.loops = done.loops,
        Err(stop) => match found(stop, &watch, &memory.buffers[..launch.buffers.len()]) {
            Ok((at, finding)) => watch.stop(at, finding),
            Err(reason) => failure = Some(Error::NotExecutable { kernel: kernel.entry.clone(), reason }),
        },
    }
    report.traffic = watch.traffic();
    report.gaps = if done.is_ok() { watch.gaps() } else { Vec::new() };
    report.products = watch.products;
    report.executed = true;
    report.faults = std::mem::take(&mut watch.faults);
    drop(memory);
    for (page, marks) in pages.iter_mut().zip(watch.into_marks()) {
        page.written = marks;
    }
    if let Some(failure) = failure {
        return Err(failure);
    }
    if report.faults.is_empty() {
        return Ok(());
    }
    let faults = report.faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    Err(Error::Faults { kernel: report.kernel.entry.clone(), seed: report.seed, faults })
}

/// The block of parameters: the buffers' addresses, then scalars and lengths by value.
fn parameters(program: &Program, buffers: &[Buffer], info: &[u64]) -> Vec<u8> {
    let size = program.parameters.last().map_or(0, |last| last.offset + last.size);
    let mut block = vec![0; size];
    for (parameter, buffer) in program.parameters.iter().zip(buffers) {
        block[parameter.offset..][..8].copy_from_slice(&buffer.address().to_le_bytes());
    }
    if let Some(parameter) = program.parameters.get(buffers.len()) {
        let bytes: Vec<u8> = info.iter().flat_map(|word| word.to_le_bytes()).take(parameter.size).collect();
        block[parameter.offset..][..bytes.len()].copy_from_slice(&bytes);
    }
    block
}

/// What the sanitiser makes of a launch that does not go on, or why it can't go on.
fn found(stop: Stop, watch: &Watch, buffers: &[Buffer]) -> Result<(Site, Finding), String> {
    match stop {
        Stop::OutOfBounds { at, space, address, size, store } => {
            let space = outside(space, address, watch, buffers)?;
            Ok((at, Finding::OutOfBounds { space, size, store }))
        }
        Stop::Misaligned { at, address, size } => Ok((at, Finding::Misaligned { address, size })),
        Stop::DivergentWarp { at, missing } => {
            let thread = at.thread / 32 * 32 + missing.trailing_zeros().min(31) as usize;
            Ok((at, Finding::Divergent { other: Place { block: at.block, thread } }))
        }
        Stop::DivergentBlock { at, other } => {
            Ok((at, Finding::Divergent { other: Place { block: at.block, thread: other } }))
        }
        Stop::Trap { at } => Err(format!("thread {} of block {} stops it", at.thread, at.block)),
        Stop::Endless { at } => Err(format!("thread {} of block {} does not end", at.thread, at.block)),
    }
}

/// What an address that is out of bounds would be.
fn outside(
    space: ultramem_ptx::program::Space,
    address: u64,
    watch: &Watch,
    buffers: &[Buffer],
) -> Result<Space, String> {
    use ultramem_ptx::program::Space as Named;
    let shared = ultramem_ptx::shared_offset(space, address);
    if let Some(offset) = shared {
        let byte = offset.wrapping_sub(watch.dynamic_shared() as u64) as usize;
        return Ok(Space::OutsideShared { byte, length: watch.shared_length() });
    }
    if !matches!(space, Named::Global | Named::Generic) {
        return Err(format!("it accesses byte {address} of its memory of kind {space:?}, which has fewer"));
    }
    let gap = |buffer: &Buffer| {
        let distance = address.wrapping_sub(buffer.address()) as i64;
        if distance < 0 { distance.unsigned_abs() } else { (distance as u64).saturating_sub(buffer.length as u64) }
    };
    let nearest = (0..buffers.len()).min_by_key(|&buffer| gap(&buffers[buffer]));
    let Some(buffer) = nearest else { return Err(format!("it accesses {address:#x}, and there are no buffers")) };
    let (size, distance) = (watch.element(buffer), address.wrapping_sub(buffers[buffer].address()) as i64);
    Ok(Space::Outside { buffer, element: distance.div_euclid(size as i64), length: buffers[buffer].length / size })
}

/// A fault at an instruction of the program.
pub fn fault(program: &Program, at: Site, finding: Finding) -> Fault {
    let line = program.code.get(at.instruction).map(|it| it.line).filter(|&line| line > 0);
    Fault { place: Place { block: at.block, thread: at.thread }, line, finding }
}
