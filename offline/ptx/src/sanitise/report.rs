//! What the sanitiser reports: bytes and sectors of each buffer, and what is wrong.

use serde::{Deserialize, Serialize};

/// The accesses of one launch to one buffer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Bytes of the buffer.
    pub length: u64,
    /// What was loaded.
    pub read: Flow,
    /// What was stored. An atomic operation loads and stores.
    pub written: Flow,
}

/// Bytes of a sector, the least that a GPU moves.
pub const SECTOR: u64 = 32;

/// Loads or stores of one launch to one buffer. The figures are those of warps in lock step: exact, and the same whatever the
/// order in which warps ran.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// Accesses of a warp: its lanes at the same instruction, for the same time.
    pub requests: u64,
    /// Bytes that threads asked for.
    pub bytes: u64,
    /// 32-byte sectors, once for each request that touches them.
    pub sectors: u64,
    /// Bytes that were touched at all.
    pub distinct_bytes: u64,
    /// Sectors that were touched at all.
    pub distinct_sectors: u64,
    /// Bytes of a thread's narrowest access; 0 where there is none.
    pub narrowest: u64,
    /// Bytes of a thread's widest access.
    pub widest: u64,
}

impl Flow {
    /// Bytes that device memory has to move: the sectors that were touched, once where `cached`, else at each request.
    pub fn moved(&self, cached: bool) -> u64 {
        SECTOR * if cached { self.distinct_sectors } else { self.sectors }
    }

    /// Whether a thread's accesses are narrower than rows of `row` bytes allow, a GPU's widest being of 16.
    pub fn is_narrow(&self, row: u64) -> bool {
        self.bytes > 0 && self.narrowest < 1 << row.trailing_zeros().min(4)
    }

    /// Sectors over those that the bytes fill: 1 where each request is coalesced.
    pub fn spread(&self) -> f64 {
        (self.sectors * SECTOR) as f64 / self.bytes as f64
    }
}

impl Traffic {
    /// Bytes that device memory has to move for this buffer, which stays in a cache if it is no larger than half of `cache` bytes.
    pub fn moved(&self, cache: u64) -> u64 {
        let cached = 2 * self.length <= cache;
        self.read.moved(cached) + self.written.moved(cached)
    }
}

/// Where a fault happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The block, counted along x first.
    pub block: usize,
    /// The thread in its block.
    pub thread: usize,
}

/// What was accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// A buffer.
    Buffer {
        /// Which argument.
        buffer: usize,
        /// Which element.
        element: usize,
    },
    /// Shared memory.
    Shared {
        /// At which byte.
        byte: usize,
    },
    /// No memory of the launch.
    Outside {
        /// The buffer that is nearest.
        buffer: usize,
        /// The element that it would be.
        element: i64,
        /// The elements that there are.
        length: usize,
    },
    /// Past the end of the shared memory.
    OutsideShared {
        /// At which byte.
        byte: usize,
        /// The bytes that there are.
        length: usize,
    },
}

/// What the sanitiser found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Who did it.
    pub place: Place,
    /// The line of the source.
    pub line: Option<u32>,
    /// What is wrong.
    pub finding: Finding,
}

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finding {
    /// An access that is not within a buffer or the shared memory. The launch stops there.
    OutOfBounds {
        /// What was accessed.
        space: Space,
        /// How many bytes.
        size: usize,
        /// Whether it was a store.
        store: bool,
    },
    /// An address that is not a multiple of what is accessed there. The launch stops there.
    Misaligned {
        /// The address.
        address: u64,
        /// How many bytes are accessed.
        size: usize,
    },
    /// A load of bytes that nothing has written.
    Unwritten {
        /// What was loaded.
        space: Space,
    },
    /// Two threads access the same bytes, one of them writes, and no barrier is in between.
    Race {
        /// What was accessed.
        space: Space,
        /// Whether the thread writes.
        store: bool,
        /// The thread that came before.
        other: Place,
        /// Whether that one wrote.
        stored: bool,
    },
    /// Threads of a block, or of a warp, wait for each other in different places, or for threads that are gone. The launch
    /// stops there.
    Divergent {
        /// A thread that does not come.
        other: Place,
    },
}

/// A part of a writable buffer that nothing has written, neither the launch nor anyone before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// Which argument.
    pub buffer: usize,
    /// The first element that is not written in full.
    pub element: usize,
    /// Bytes that are not written, of the whole buffer.
    pub bytes: usize,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "thread {} of block {}", self.thread, self.block)
    }
}

impl std::fmt::Display for Space {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Buffer { buffer, element } => write!(f, "element {element} of buffer {buffer}"),
            Self::Shared { byte } => write!(f, "byte {byte} of shared memory"),
            Self::Outside { buffer, element, length } => {
                write!(f, "element {element} of buffer {buffer}, which has {length}")
            }
            Self::OutsideShared { byte, length } => write!(f, "byte {byte} of shared memory, which has {length}"),
        }
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let verb = |store: bool| if store { "writes" } else { "reads" };
        let place = self.place;
        match self.finding {
            Finding::OutOfBounds { space, size, store } => {
                write!(f, "{place} {} {size} bytes out of bounds: {space}", verb(store))?;
            }
            Finding::Misaligned { address, size } => {
                write!(f, "{place} accesses {size} bytes at {address:#x}, which is no multiple of {size}")?;
            }
            Finding::Unwritten { space } => write!(f, "{place} reads what nothing has written: {space}")?,
            Finding::Race { space, store, other, stored } => {
                write!(f, "{place} {} {space}, which {other} {} with no barrier between", verb(store), verb(stored))?;
            }
            Finding::Divergent { other } => write!(f, "{place} waits for {other}, which does not come")?,
        }
        self.line.map_or(Ok(()), |line| write!(f, " (line {line})"))
    }
}

impl std::fmt::Display for Gap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { buffer, element, bytes } = self;
        write!(f, "{bytes} bytes of buffer {buffer} are not written, the first in element {element}")
    }
}
