//! Runs a launch: the PTX that NVRTC makes of the kernel is interpreted on the launch's buffers, and watched.
//!
//! Blocks, warps and the lanes of atomic operations run in an order that is drawn anew for each launch: what depends on it is a fault of
//! the kernel.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rand::{Rng, SeedableRng, rngs::StdRng};
use ultramem_ptx::sanitise::{self, Argument, Watch};
use ultramem_ptx::{Buffer, Chance, ControlFlow, Memory, Program, Shape};

use crate::compile::{self, Architecture};
use crate::memory::Page;
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
#[derive(Debug)]
pub struct Loaded {
    pub program: Program,
    pub flow: ControlFlow,
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
    let flow = ControlFlow::of(&program.code);
    Ok(slot.get_or_init(|| Arc::new(Loaded { program, flow })).clone())
}

/// Draws the order of blocks and warps.
struct Order(StdRng);

impl Chance for Order {
    fn below(&mut self, end: usize) -> usize {
        self.0.random_range(0..end)
    }
}

/// The pages of a launch's buffers, each locked once, and where the buffers lie in them.
pub struct Pages<'a> {
    /// In the order of their identities.
    pub pages: Vec<MutexGuard<'a, Page>>,
    pub buffers: Vec<Buffer>,
    /// What is passed by pointer, a page of its own.
    passed: Vec<u8>,
}

impl<'a> Pages<'a> {
    pub fn lock(launch: &Launch<'a>) -> Self {
        // Two arguments may share a page.
        let mut ids: Vec<usize> = launch.buffers.iter().map(HostBuffer::page_id).collect();
        let of_buffer = ids.clone();
        ids.sort_unstable();
        ids.dedup();
        let owner = |id: &usize| &launch.buffers[of_buffer.iter().position(|it| it == id).expect("an argument's page")];
        let pages: Vec<_> = ids.iter().map(|id| owner(id).page()).collect();
        let place = |buffer: &HostBuffer| ids.binary_search(&buffer.page_id()).expect("a locked page");
        let buffer = |it: &HostBuffer| Buffer { page: place(it), offset: it.offset(), length: it.length() };
        let mut buffers: Vec<Buffer> = launch.buffers.iter().map(buffer).collect();
        let pointed = &launch.info[launch.dynamic.min(launch.info.len())..];
        let passed: Vec<u8> = pointed.iter().flat_map(|it| it.to_le_bytes()).collect();
        if !passed.is_empty() {
            buffers.push(Buffer { page: pages.len(), offset: 0, length: passed.len() });
        }
        Self { pages, buffers, passed }
    }

    pub fn memory(&mut self, program: &Program, shape: &Shape, info: &[u64]) -> Memory<'_> {
        let parameters = parameters(program, &self.buffers, info);
        let mut pages: Vec<&mut [u8]> = self.pages.iter_mut().map(|page| &mut page.memory[..]).collect();
        pages.push(&mut self.passed);
        Memory::new(program, shape, pages, self.buffers.clone(), parameters)
    }
}

pub fn shape(report: &LaunchReport) -> Shape {
    Shape { threads: report.kernel.dim, blocks: report.count, dynamic_shared: report.kernel.shared }
}

/// Runs the launch and leaves its results in the buffers, its faults and its traffic in the report.
pub fn execute(launch: &Launch<'_>, report: &mut LaunchReport) -> Result<()> {
    let kernel = report.kernel.clone();
    let loaded = load(&kernel, launch.architecture, launch.rolled)?;
    let Loaded { program, flow } = &*loaded;
    let mut pages = Pages::lock(launch);
    let marks = pages.pages.iter_mut().map(|page| std::mem::take(&mut page.written)).collect();
    let argument =
        |(&buffer, it): (&Buffer, &crate::Argument)| Argument { buffer, element: it.size, writable: it.writable };
    let arguments: Vec<Argument> = pages.buffers.iter().zip(&kernel.buffers).map(argument).collect();
    let shape = shape(report);
    let mut watch = Watch::new(program, &shape, &arguments, marks);
    let mut order = Order(StdRng::seed_from_u64(report.seed));
    let mut memory = pages.memory(program, &shape, launch.info);
    let done = sanitise::watch((program, flow), shape, &mut memory, &mut watch, &mut order);

    report.loops = done.as_ref().ok().copied().flatten().map_or(0, |done| done.loops);
    report.traffic = watch.traffic();
    report.gaps = if matches!(done, Ok(Some(_))) { watch.gaps() } else { Vec::new() };
    report.products = watch.products;
    report.executed = true;
    report.faults = std::mem::take(&mut watch.faults);
    for (page, marks) in pages.pages.iter_mut().zip(watch.into_marks()) {
        page.written = marks;
    }
    if let Err(reason) = done {
        return Err(Error::NotExecutable { kernel: report.kernel.entry.clone(), reason });
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
