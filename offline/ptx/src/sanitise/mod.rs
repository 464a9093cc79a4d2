//! Watches a launch: whether what is read was written, races, bytes and sectors.

mod report;
mod stopped;
#[cfg(test)]
mod tests;

use std::mem::{Discriminant, discriminant};

pub use self::report::{Fault, Finding, Flow, Gap, Place, SECTOR, Space, Traffic};
use crate::error::Site;
use crate::flow::ControlFlow;
use crate::lanes::{Mask, WARP, lanes};
use crate::program::{Op, Program};
use crate::run::launch::{Chance, Done, run};
use crate::run::memory::{self, Access, Buffer, Memory};
use crate::run::observe::{At, Observer};
use crate::run::shape::Shape;

/// A buffer that a kernel takes.
#[derive(Debug, Clone, Copy)]
pub struct Argument {
    /// Where it lies.
    pub buffer: Buffer,
    /// Bytes of an element.
    pub element: usize,
    /// Whether the kernel may write to it.
    pub writable: bool,
}

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
    /// See `known`.
    pub faults: Vec<Fault>,
    /// Products of matrix units.
    pub products: u64,
}

impl<'a> Watch<'a> {
    /// Watches the kernel's arguments, which come before all other buffers. `marks` are those of the pages' bytes: whether anything was
    /// written to each.
    pub fn new(program: &'a Program, shape: &Shape, arguments: &[Argument], marks: Vec<Vec<bool>>) -> Self {
        let region = |&Argument { buffer, element, writable }: &Argument| Region {
            length: buffer.length,
            size: element.max(1),
            writable,
            marks: (buffer.page, buffer.offset),
            cells: Cells::new(if writable { buffer.length } else { 0 }),
            touched: vec![0; buffer.length],
            flows: Default::default(),
        };
        let start = program.static_shared;
        Self {
            program,
            buffers: arguments.iter().map(region).collect(),
            shared: (start, shape.dynamic_shared, Cells::new(start + shape.dynamic_shared)),
            marks,
            threads: shape.threads.iter().map(|&n| n as usize).product(),
            started: 0,
            known: Vec::new(),
            faults: Vec::new(),
            products: 0,
        }
    }

    /// Takes note of what is wrong with a lane's access: it reads what nothing has written, or races with another's.
    fn note(&mut self, at: &At, lane: usize, space: Space, store: bool, found: (bool, Option<(Place, bool)>)) {
        let finding = match found {
            (true, _) => Finding::Unwritten { space },
            (false, Some((other, stored))) => Finding::Race { space, store, other, stored },
            (false, None) => return,
        };
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
            let start = access.offsets[lane] as usize;
            for (byte, size) in used(access).map(|(skip, size)| (start + skip, size)) {
                let region = &mut self.buffers[index];
                let marks = &mut self.marks[region.marks.0][region.marks.1 + byte..][..size];
                let unwritten = loads && marks.contains(&false);
                region.touched[byte..][..size].iter_mut().for_each(|touched| *touched |= touch);
                if stores {
                    marks.fill(true);
                }
                let race = match region.writable {
                    true => race(&mut region.cells, (byte, size), (stamp, stores), self.threads, false),
                    false => None,
                };
                let space = Space::Buffer { buffer: index, element: start / region.size };
                self.note(at, lane, space, stores, (unwritten, race));
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
            let start = access.offsets[lane] as usize;
            for (byte, size) in used(access).map(|(skip, size)| (start + skip, size)) {
                let cells = &mut self.shared.2;
                let mut unwritten = false;
                if loads {
                    cells.each(byte, size, |cell| {
                        unwritten |= cell.stored.thread == 0 || cell.stored.epoch < started;
                    });
                }
                let race = race(cells, (byte, size), (stamp, stores), self.threads, true);
                let space = Space::Shared { byte: start.wrapping_sub(self.shared.0) };
                self.note(at, lane, space, stores, (unwritten, race));
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
            memory::Place::Buffer(index) if index < self.buffers.len() => self.access_buffer(at, index, access),
            memory::Place::Shared => self.access_shared(at, access),
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

/// Runs a launch and watches it. What stops it is among the faults, or an error in words where it is none of the kernel's accesses or
/// barriers.
pub fn watch(
    program: (&Program, &ControlFlow),
    shape: Shape,
    memory: &mut Memory<'_>,
    watch: &mut Watch<'_>,
    chance: &mut dyn Chance,
) -> Result<Option<Done>, String> {
    match run(program, shape, None, memory, watch, chance) {
        Ok(done) => Ok(Some(done)),
        Err(stop) => {
            let (at, finding) = watch.found(stop, memory)?;
            watch.faults.push(fault(watch.program, at, finding));
            Ok(None)
        }
    }
}

/// A fault at an instruction of the program.
fn fault(program: &Program, at: Site, finding: Finding) -> Fault {
    let line = program.code.get(at.instruction).map(|it| it.line).filter(|&line| line > 0);
    Fault { place: Place { block: at.block, thread: at.thread }, line, finding }
}

/// The runs of an access's bytes that matter: where each begins, and its length.
fn used(access: &Access<'_>) -> impl Iterator<Item = (usize, usize)> + use<> {
    let (size, used) = (access.size, access.used);
    let mut at = 0;
    std::iter::from_fn(move || {
        if used == u32::MAX {
            return (std::mem::replace(&mut at, size) == 0).then_some((0, size));
        }
        let matters = |byte: usize| used >> byte & 1 == 1;
        let start = (at..size).find(|&byte| matters(byte))?;
        at = (start..size).find(|&byte| !matters(byte)).unwrap_or(size);
        Some((start, at - start))
    })
}
