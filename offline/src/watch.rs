//! What is made of each access: its bounds, whether what is read was written, races, bytes and sectors.

use crate::gpu::WARP;
use crate::memory::HostBuffer;
use crate::report::{Finding, Flow, Gap, Place, SECTOR, Space, Traffic};

/// Kinds of access, the bits that the headers pass.
pub const LOAD: u32 = 1;
pub const STORE: u32 = 2;
const ATOMIC: u32 = 4;

/// Bytes that a GPU accesses at once.
const WIDEST: usize = 16;
/// Bytes that share a note of who accessed them: the smallest element that kernels store side by side.
const GRAIN: usize = 2;

/// Who accessed something, and when. `epoch` counts barriers of blocks and never repeats in a launch; `step` counts those of the
/// thread's warp.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stamp {
    /// The thread among all of the launch, from 1 on; 0 is nobody.
    thread: u32,
    epoch: u32,
    step: u32,
    atomic: bool,
}

impl Stamp {
    pub fn new(thread: u32, epoch: u32, step: u32) -> Self {
        Self { thread, epoch, step, atomic: false }
    }
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

/// A buffer or the shared memory as it is watched.
struct Region {
    start: usize,
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

/// A sector that a lane touches, with what makes the lanes' accesses one request.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Record {
    site: u32,
    /// The how many-th access at this site since the warp last waited, times eight, plus the piece of a wide access.
    time: u32,
    kind: u32,
    region: u32,
    sector: usize,
}

/// Everything that is known of a launch's memory.
pub struct Watch {
    buffers: Vec<Region>,
    shared: Region,
    /// Marks of the pages' bytes: whether anything was written to each.
    marks: Vec<Vec<bool>>,
    /// Threads of a block.
    threads: usize,
    /// The epoch in which the block started.
    pub started: u32,
    /// Of each address in the kernel's library that has made an access, a small number.
    sites: Vec<u32>,
    known: u32,
    records: Vec<Record>,
}

/// Of each site, when a lane's warp last waited before it, and the accesses since.
pub type Times = Vec<(u64, u32)>;

/// An access of a lane.
pub struct Access {
    pub address: usize,
    pub size: usize,
    pub kind: u32,
    /// The instruction, from the start of the library.
    pub site: usize,
    pub stamp: Stamp,
}

impl Access {
    fn stores(&self) -> bool {
        self.kind & STORE != 0
    }
}

impl Watch {
    /// Watches `buffers`, whose memory starts at `starts` and whose elements have `sizes` bytes and may be `writable`. `marks` are those
    /// of the pages that the buffers' `pages` number. `image` is the length of the library.
    pub fn new(
        buffers: impl Iterator<Item = (HostBuffer, usize, usize, bool, usize)>,
        marks: Vec<Vec<bool>>,
        shared: (usize, usize),
        threads: usize,
        image: usize,
    ) -> Self {
        let buffers = buffers.map(|(buffer, page, start, writable, size)| {
            let length = buffer.length();
            let cells = Cells::new(if writable { length } else { 0 });
            let (marks, touched) = ((page, buffer.offset()), vec![0; length]);
            Region { start, length, size: size.max(1), writable, marks, cells, touched, flows: Default::default() }
        });
        let shared = Region {
            start: shared.0,
            length: shared.1,
            size: 1,
            writable: true,
            marks: (0, 0),
            cells: Cells::new(shared.1),
            touched: Vec::new(),
            flows: Default::default(),
        };
        let sites = vec![0; image + 1];
        Self { buffers: buffers.collect(), shared, marks, threads, started: 0, sites, known: 0, records: Vec::new() }
    }

    /// Takes note of an access; what is wrong with it.
    pub fn access(&mut self, access: &Access, times: &mut Times) -> Option<Finding> {
        let within = |region: &Region| access.address.wrapping_sub(region.start) < region.length.max(1);
        if within(&self.shared) {
            return self.access_shared(access);
        }
        let Some(index) = self.buffers.iter().position(within) else { return Some(self.outside(access)) };
        let region = &mut self.buffers[index];
        let byte = access.address - region.start;
        if byte + access.size > region.length {
            return Some(self.outside(access));
        }
        let space = Space::Buffer { buffer: index, element: byte / region.size };
        let marks = &mut self.marks[region.marks.0][region.marks.1 + byte..][..access.size];
        let unwritten = access.kind & LOAD != 0 && marks.contains(&false);
        for touched in &mut region.touched[byte..][..access.size] {
            *touched |= access.kind as u8;
        }
        if access.stores() {
            marks.fill(true);
        }
        let race = match region.writable {
            true => race(&mut region.cells, byte, access, self.threads, false),
            false => None,
        };
        for (kind, flow) in [LOAD, STORE].into_iter().zip(&mut region.flows) {
            if access.kind & kind != 0 {
                flow.bytes += access.size as u64;
                flow.widest = flow.widest.max(access.size as u64);
                flow.narrowest = match flow.narrowest {
                    0 => access.size as u64,
                    narrowest => narrowest.min(access.size as u64),
                };
            }
        }
        self.record(access, index, times);
        let race = race.map(|(other, stored)| Finding::Race { space, store: access.stores(), other, stored });
        if unwritten { Some(Finding::Unwritten { space }) } else { race }
    }

    fn access_shared(&mut self, access: &Access) -> Option<Finding> {
        let byte = access.address - self.shared.start;
        if byte + access.size > self.shared.length {
            return Some(self.outside(access));
        }
        let space = Space::Shared { byte };
        let cells = &mut self.shared.cells;
        let mut unwritten = false;
        if access.kind & LOAD != 0 {
            cells.each(byte, access.size, |cell| {
                unwritten |= cell.stored.thread == 0 || cell.stored.epoch < self.started;
            });
        }
        let race = race(cells, byte, access, self.threads, true);
        let race = race.map(|(other, stored)| Finding::Race { space, store: access.stores(), other, stored });
        if unwritten { Some(Finding::Unwritten { space }) } else { race }
    }

    fn outside(&self, access: &Access) -> Finding {
        let (size, store) = (access.size, access.stores());
        let beyond = access.address.wrapping_sub(self.shared.start);
        let gap = |region: &Region| {
            let distance = access.address.wrapping_sub(region.start) as i64;
            if distance < 0 { distance.unsigned_abs() } else { (distance as u64).saturating_sub(region.length as u64) }
        };
        let nearest = (0..self.buffers.len()).min_by_key(|&buffer| gap(&self.buffers[buffer]));
        let near = nearest.map_or(u64::MAX, |buffer| gap(&self.buffers[buffer]));
        let space = match nearest {
            Some(buffer) if near <= gap(&self.shared) => {
                let region = &self.buffers[buffer];
                let distance = access.address.wrapping_sub(region.start) as i64;
                let (element, length) = (distance.div_euclid(region.size as i64), region.length / region.size);
                Space::Outside { buffer, element, length }
            }
            _ => Space::OutsideShared { byte: beyond, length: self.shared.length },
        };
        Finding::OutOfBounds { space, size, store }
    }

    /// Notes the sectors of an access, in pieces of at most [`WIDEST`] bytes.
    fn record(&mut self, access: &Access, region: usize, times: &mut Times) {
        let site = &mut self.sites[access.site];
        if *site == 0 {
            self.known += 1;
            *site = self.known;
        }
        let site = *site;
        if times.len() <= site as usize {
            times.resize(site as usize + 1, (0, 0));
        }
        let wait = u64::from(access.stamp.epoch) << 32 | u64::from(access.stamp.step);
        let (since, count) = &mut times[site as usize];
        if *since != wait {
            (*since, *count) = (wait, 0);
        }
        let time = *count * 8;
        *count += 1;
        let sector = SECTOR as usize;
        let mut first = access.address;
        for piece in 0.. {
            let last = (first + WIDEST).min(access.address + access.size);
            for sector in first / sector..=(last - 1) / sector {
                let (time, kind) = (time + piece, access.kind & (LOAD | STORE));
                self.records.push(Record { site, time, kind, region: region as u32, sector });
            }
            first = last;
            if first == access.address + access.size {
                break;
            }
        }
    }

    /// Adds up a warp's requests. All its lanes wait or are done.
    pub fn flush(&mut self) {
        self.records.sort_unstable();
        self.records.dedup();
        let mut before = None;
        for record in self.records.drain(..) {
            let request = (record.site, record.time, record.kind, record.region);
            for (kind, flow) in [LOAD, STORE].into_iter().zip(&mut self.buffers[record.region as usize].flows) {
                if record.kind & kind != 0 {
                    flow.sectors += 1;
                    flow.requests += u64::from(before != Some(request));
                }
            }
            before = Some(request);
        }
    }

    /// What was read and written of each buffer.
    pub fn traffic(&self) -> Vec<Traffic> {
        let distinct = |region: &Region, kind: u32| {
            let mut flow = region.flows[(kind / STORE) as usize];
            let is = |touched: &&u8| u32::from(**touched) & kind != 0;
            // Buffers start where sectors do.
            for sector in region.touched.chunks(SECTOR as usize) {
                let bytes = sector.iter().filter(is).count() as u64;
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

/// Notes an access in the cells of its bytes; the thread that it races with, and whether that one stored.
fn race(cells: &mut Cells, byte: usize, access: &Access, threads: usize, shared: bool) -> Option<(Place, bool)> {
    let stamp = Stamp { atomic: access.kind & ATOMIC != 0, ..access.stamp };
    let block = |it: Stamp| (it.thread as usize - 1) / threads;
    let warp = |it: Stamp| (it.thread as usize - 1) % threads / WARP;
    let together = |it: Stamp| match it.thread {
        0 => false,
        thread if thread == stamp.thread || (it.atomic && stamp.atomic) => false,
        _ if block(it) != block(stamp) => !shared,
        _ => it.epoch == stamp.epoch && (warp(it) != warp(stamp) || it.step == stamp.step),
    };
    let mut found = None;
    cells.each(byte, access.size, |cell| {
        if together(cell.stored) {
            found = found.or(Some((cell.stored, true)));
        }
        if access.stores() {
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
