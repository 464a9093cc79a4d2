//! What a launch reports: what was launched, what its accesses cost, and what is wrong with it.

use serde::{Deserialize, Serialize};

/// One launch.
#[derive(Debug, Clone)]
pub struct LaunchReport {
    /// The kernel as it was launched.
    pub kernel: Kernel,
    /// Blocks in each dimension.
    pub count: [u32; 3],
    /// What was read and written of each buffer, in the order of the arguments; empty where nothing was watched.
    pub traffic: Vec<Traffic>,
    /// What the sanitiser found.
    pub faults: Vec<Fault>,
    /// Whether the kernel ran.
    pub executed: bool,
}

/// A kernel: what CubeCL's CUDA runtime would hand to NVRTC and to the driver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kernel {
    /// The path of the function that was launched.
    pub name: String,
    /// The entry point in the source.
    pub entry: String,
    /// CUDA C++.
    pub source: String,
    /// Threads of a block in each dimension.
    pub dim: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: usize,
    /// The buffers, in order.
    pub buffers: Vec<Argument>,
    /// Bytes of the scalars and lengths that follow the buffers, by value.
    pub info: usize,
}

/// A buffer that a kernel takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Argument {
    /// The type of its elements in the source.
    pub element: String,
    /// Bytes of an element.
    pub size: usize,
    /// Whether the kernel may write to it.
    pub writable: bool,
}

/// The accesses of one launch to one buffer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Bytes of the buffer.
    pub length: u64,
    /// Bytes that threads loaded.
    pub read: u64,
    /// Bytes that threads stored.
    pub written: u64,
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
    /// The buffer of this number, at this byte.
    Buffer(usize, usize),
    /// Shared memory, at this byte.
    Shared(usize),
    /// No memory of the launch; at the distance from the buffer that is nearest.
    Outside(usize, i64),
}

/// What the sanitiser found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// An access that is not within a buffer or the shared memory.
    OutOfBounds {
        /// Who accessed.
        place: Place,
        /// What was accessed.
        space: Space,
        /// How many bytes.
        size: usize,
        /// Whether it was a store.
        store: bool,
    },
    /// A load of bytes that nothing has written.
    Unwritten {
        /// Who loaded.
        place: Place,
        /// What was loaded.
        space: Space,
    },
    /// Threads of a block, or of a warp, wait for each other in different places, or for threads that are gone.
    Divergent {
        /// A thread that waits.
        place: Place,
        /// The line of the source where it waits.
        line: u32,
        /// A thread that does not come.
        other: Place,
    },
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "thread {} of block {}", self.thread, self.block)
    }
}

impl std::fmt::Display for Space {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Buffer(buffer, byte) => write!(f, "buffer {buffer} at byte {byte}"),
            Self::Shared(byte) => write!(f, "shared memory at byte {byte}"),
            Self::Outside(buffer, distance) => write!(f, "what is {distance} bytes from the start of buffer {buffer}"),
        }
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::OutOfBounds { place, space, size, store } => {
                let verb = if *store { "writes" } else { "reads" };
                write!(f, "{place} {verb} {size} bytes out of bounds: {space}")
            }
            Self::Unwritten { place, space } => write!(f, "{place} reads what nothing has written: {space}"),
            Self::Divergent { place, line, other } => {
                write!(f, "{place} waits in line {line} for {other}, which does not come")
            }
        }
    }
}
