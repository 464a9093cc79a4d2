//! What is made of each access: whether what is read was written, races, bytes and sectors.

use std::mem::{Discriminant, discriminant};

use ultramem_ptx::lanes::{Mask, WARP, lanes};
use ultramem_ptx::program::Op;
use ultramem_ptx::{Access, At, Buffer, Observer, Program, Site};

use crate::Kernel;
use crate::execute::fault;
use crate::report::{Fault, Finding, Flow, Gap, Place, SECTOR, Space, Traffic};

/// Marks of a byte that was loaded, and of one that was stored.
const LOAD: u8 = 1;
const STORE: u8 = 2;

/// Bytes that share a note of who accessed them: the smallest element that kernels store side by side.
const GRAIN: usize = 2;
/// Faults that a launch reports at most.
const MOST_FAULTS: usize = 16;

/// Who accessed something, and when. `epoch` counts barriers of blocks and never repeats in a launch; `step` counts those of the
/// thread's warp.
#[derive(Debug, Clone, Copy, Default)]
struct Stamp {
    /// The thread among all of the launch, from 1 on; 0 is nobody.
    thread: u32,
    epoch: u32,
    step: u32,
    atomic: bool,
}

/// The last store, and the last loads of two threads.
#[derive(Clone, Copy, Default)]
struct Cell {
    stored: Stamp,
    loaded: [Stamp; 2],
}

/// Cells of a region, made where something is accessed: a table is larger than the memory that its cells would take.
struct Cells(Vec<Option<Box<[Cell]>>>);

/// Cells that are made at once.
const CHUNK: usize = 1024;

impl Cells {
    /// Those of `length` bytes.
    fn new(length: usize) -> Self {
        Self(vec![None; length.div_ceil(GRAIN) / CHUNK + 1])
    }

    /// The cells of `size` bytes from `byte` on.
    fn each(&mut self, byte: usize, size: usize, mut visit: impl FnMut(&mut Cell)) {
        for at in byte / GRAIN..(byte + size).div_ceil(GRAIN) {
            let chunk = self.0[at / CHUNK].get_or_insert_with(|| vec![Cell::default(); CHUNK].into());
            visit(&mut chunk[at % CHUNK]);
        }
    }
}

/// A buffer as it is watched.
struct Region {
    length: usize,
    /// Bytes of an element.
    size: usize,
    writable: bool,
    /// Where its marks are: a page and an offset.
    marks: (usize, usize),
    cells: Cells,
    /// Of each byte, whether it was loaded or stored.
    touched: Vec<u8>,
    flows: [Flow; 2],
}

/// Everything that is known of a launch's memory.
pub struct Watch<'a> {
    program: &'a Program,
    buffers: Vec<Region>,
    /// The shared memory: where in it that of the launch starts, its bytes, and its cells.
    shared: (usize, usize, Cells),
    /// Marks of the pages' bytes: whether anything was written to each.
    marks: Vec<Vec<bool>>,
    /// Threads of a block.
    threads: usize,
    /// The epoch in which the block started.
    started: u32,
    /// What was found, one of a kind at an instruction.
    known: Vec<(usize, Discriminant<Finding>)>,
    pub faults: Vec<Fault>,
    /// Products of matrix units.
    pub products: u64,
}

impl<'a> Watch<'a> {
    /// Watches `buffers`, the kernel's arguments. `marks` are those of the pages.
    pub fn new(buffers: &[Buffer], kernel: &Kernel, marks: Vec<Vec<bool>>, program: &'a Program) -> Self {
        let region = |(buffer, argument): (&Buffer, &crate::Argument)| Region {
            length: buffer.length,
            size: argument.size.max(1),
            writable: argument.writable,
            marks: (buffer.page, buffer.offset),
            cells: Cells::new(if argument.writable { buffer.length } else { 0 }),
            touched: vec![0; buffer.length],
            flows: Default::default(),
        };
        let start = program.static_shared.next_multiple_of(128);
        Self {
            program,
            buffers: buffers.iter().zip(&kernel.buffers).map(region).collect(),
            shared: (start, kernel.shared, Cells::new(start + kernel.shared)),
            marks,
            threads: kernel.dim.iter().map(|&n| n as usize).product(),
            started: 0,
            known: Vec::new(),
            faults: Vec::new(),
            products: 0,
        }
    }

    /// Where the shared memory that the launch asks for starts.
    pub fn dynamic_shared(&self) -> usize {
        self.shared.0
    }

    /// Its bytes.
    pub fn shared_length(&self) -> usize {
        self.shared.1
    }

    /// Bytes of an element of a buffer.
    pub fn element(&self, buffer: usize) -> usize {
        self.buffers[buffer].size
    }

    /// Takes note of what has stopped the launch.
    pub fn stop(&mut self, at: Site, finding: Finding) {
        self.faults.push(fault(self.program, at, finding));
    }

    fn note(&mut self, at: &At, lane: usize, finding: Finding) {
        let kind = (at.instruction, discriminant(&finding));
        if self.faults.len() < MOST_FAULTS && !self.known.contains(&kind) {
            self.known.push(kind);
            let site = Site { block: at.block, thread: at.warp * WARP + lane, instruction: at.instruction };
            self.faults.push(fault(self.program, site, finding));
        }
    }

    fn stamp(&self, at: &At, lane: usize, access: &Access<'_>) -> Stamp {
        let thread = (at.block * self.threads + at.warp * WARP + lane + 1) as u32;
        Stamp { thread, epoch: at.epoch, step: at.step, atomic: access.kind.is_atomic() }
    }

    fn access_buffer(&mut self, at: &At, index: usize, access: &Access<'_>) {
        let (loads, stores) = (access.kind.loads(), access.kind.stores());
        let touch = if loads { LOAD } else { 0 } | if stores { STORE } else { 0 };
        for lane in lanes(access.mask) {
            let stamp = self.stamp(at, lane, access);
            let region = &mut self.buffers[index];
            let byte = access.offsets[lane] as usize;
            let space = Space::Buffer { buffer: index, element: byte / region.size };
            let marks = &mut self.marks[region.marks.0][region.marks.1 + byte..][..access.size];
            let unwritten = loads && marks.contains(&false);
            region.touched[byte..][..access.size].iter_mut().for_each(|touched| *touched |= touch);
            if stores {
                marks.fill(true);
            }
            let race = match region.writable {
                true => race(&mut region.cells, (byte, access.size), (stamp, stores), self.threads, false),
                false => None,
            };
            if unwritten {
                self.note(at, lane, Finding::Unwritten { space });
            } else if let Some((other, stored)) = race {
                self.note(at, lane, Finding::Race { space, store: stores, other, stored });
            }
        }
        let sectors = sectors(access);
        let flows = self.buffers[index].flows.iter_mut().zip([loads, stores]);
        for flow in flows.filter(|(_, moves)| *moves).map(|(flow, _)| flow) {
            flow.requests += 1;
            flow.sectors += sectors;
            flow.bytes += u64::from(access.mask.count_ones()) * access.size as u64;
            flow.widest = flow.widest.max(access.size as u64);
            flow.narrowest = match flow.narrowest {
                0 => access.size as u64,
                narrowest => narrowest.min(access.size as u64),
            };
        }
    }

    fn access_shared(&mut self, at: &At, access: &Access<'_>) {
        let (loads, stores) = (access.kind.loads(), access.kind.stores());
        for lane in lanes(access.mask) {
            let (stamp, started) = (self.stamp(at, lane, access), self.started);
            let byte = access.offsets[lane] as usize;
            let cells = &mut self.shared.2;
            let mut unwritten = false;
            if loads {
                cells.each(byte, access.size, |cell| {
                    unwritten |= cell.stored.thread == 0 || cell.stored.epoch < started;
                });
            }
            let race = race(cells, (byte, access.size), (stamp, stores), self.threads, true);
            let space = Space::Shared { byte: byte.wrapping_sub(self.shared.0) };
            if unwritten {
                self.note(at, lane, Finding::Unwritten { space });
            } else if let Some((other, stored)) = race {
                self.note(at, lane, Finding::Race { space, store: stores, other, stored });
            }
        }
    }

    /// What was read and written of each buffer.
    pub fn traffic(&self) -> Vec<Traffic> {
        let distinct = |region: &Region, kind: u8| {
            let mut flow = region.flows[usize::from(kind / STORE)];
            // Buffers start where sectors do.
            for sector in region.touched.chunks(SECTOR as usize) {
                let bytes = sector.iter().filter(|touched| **touched & kind != 0).count() as u64;
                flow.distinct_bytes += bytes;
                flow.distinct_sectors += u64::from(bytes > 0);
            }
            flow
        };
        let traffic = |region| Traffic {
            length: (region as &Region).length as u64,
            read: distinct(region, LOAD),
            written: distinct(region, STORE),
        };
        self.buffers.iter().map(traffic).collect()
    }

    /// What nothing has written.
    pub fn gaps(&self) -> Vec<Gap> {
        let gap = |(buffer, region): (usize, &Region)| {
            let marks = &self.marks[region.marks.0][region.marks.1..][..region.length];
            let first = marks.iter().position(|written| !written)?;
            let bytes = marks.iter().filter(|written| !**written).count();
            Some(Gap { buffer, element: first / region.size, bytes })
        };
        let writable = self.buffers.iter().enumerate().filter(|(_, region)| region.writable);
        writable.filter_map(gap).collect()
    }

    /// Gives the marks of the pages back.
    pub fn into_marks(self) -> Vec<Vec<bool>> {
        self.marks
    }
}

impl Observer for Watch<'_> {
    fn issued(&mut self, at: &At, _: Mask, _: Mask) {
        if let Op::Matrix(matrix) = &self.program.code[at.instruction].op {
            self.products += u64::from(matrix.products().is_some());
        }
    }

    fn accessed(&mut self, at: &At, access: &Access<'_>) {
        match access.place {
            ultramem_ptx::Place::Buffer(index) if index < self.buffers.len() => self.access_buffer(at, index, access),
            ultramem_ptx::Place::Shared => self.access_shared(at, access),
            // Parameters and constants are whole, a thread's memory is its own.
            _ => {}
        }
    }

    fn block_begins(&mut self, _: usize, epoch: u32) {
        self.started = epoch;
    }
}

/// The sectors that the lanes of an access touch. It is aligned to its size: a piece of up to 16 bytes lies in one.
fn sectors(access: &Access<'_>) -> u64 {
    let mut touched = [0; 2 * WARP];
    let mut count = 0;
    for lane in lanes(access.mask) {
        let (first, last) = (access.offsets[lane] / SECTOR, (access.offsets[lane] + access.size as u64 - 1) / SECTOR);
        for sector in [first, last] {
            touched[count] = sector;
            count += 1;
        }
    }
    let touched = &mut touched[..count];
    if !touched.is_sorted() {
        touched.sort_unstable();
    }
    touched.chunk_by(|a, b| a == b).count() as u64
}

/// Notes an access in the cells of its bytes; the thread that it races with, and whether that one stored.
fn race(
    cells: &mut Cells,
    (byte, size): (usize, usize),
    (stamp, stores): (Stamp, bool),
    threads: usize,
    shared: bool,
) -> Option<(Place, bool)> {
    let block = |it: Stamp| (it.thread as usize - 1) / threads;
    let warp = |it: Stamp| (it.thread as usize - 1) % threads / WARP;
    let together = |it: Stamp| match it.thread {
        0 => false,
        thread if thread == stamp.thread || (it.atomic && stamp.atomic) => false,
        _ if block(it) != block(stamp) => !shared,
        _ => it.epoch == stamp.epoch && (warp(it) != warp(stamp) || it.step == stamp.step),
    };
    let mut found = None;
    cells.each(byte, size, |cell| {
        if together(cell.stored) {
            found = found.or(Some((cell.stored, true)));
        }
        if stores {
            let loaded = cell.loaded.into_iter().find(|&it| together(it));
            found = found.or(loaded.map(|it| (it, false)));
            *cell = Cell { stored: stamp, loaded: Default::default() };
        } else if cell.loaded[0].thread == stamp.thread || !together(cell.loaded[0]) {
            cell.loaded[0] = stamp;
        } else {
            cell.loaded[1] = stamp;
        }
    });
    let place = |it: Stamp| Place { block: block(it), thread: (it.thread as usize - 1) % threads };
    found.map(|(it, stored)| (place(it), stored))
}
