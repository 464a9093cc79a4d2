//! Microbenchmarks of what [`Rates`] assumes: one kernel a constant, the same that a GPU is measured with and that the offline device counts,
//! so that a kernel nobody could run yet is known to do what its name says.
//!
//! Two runs that differ in rounds give what a round takes, whatever a launch costs besides. [`Probe::value`] makes the constant of it.

use crate::profile::raw::Raw;
use crate::profile::{Profile, Rates};
use crate::{Error, Gpu, HostBuffer, Result};

/// The kernels, in CUDA C++; each is compiled with `ONLY_` and its name defined. Their parameters: a buffer, one of [`SINK`] bytes,
/// then [`scalars`].
pub const SOURCE: &str = include_str!("kernels.cu");

/// Bytes of the buffer that results go to.
pub const SINK: usize = 64;

/// Bytes from one place of a chain in memory to the next.
pub const LINE: usize = 128;

/// One constant and the kernel that gives it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Probe {
    /// A field of [`Rates`].
    pub constant: &'static str,
    /// The kernel.
    pub entry: &'static str,
    /// Blocks.
    pub grid: Grid,
    /// Threads of a block.
    pub threads: u32,
    /// Rounds of the shorter run on a GPU; the longer has twice as many.
    pub rounds: u32,
    /// The buffer.
    pub data: Data,
    /// What a round's time gives.
    pub gives: Gives,
}

/// Blocks of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grid {
    /// One.
    One,
    /// So many for each multiprocessor.
    Each(u32),
}

/// A buffer of so many bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Data {
    /// Zeros.
    Zeros(usize),
    /// Places, [`LINE`] bytes apart, each of which names the next of a random round trip. The kernel `link` makes addresses of them.
    Chain(usize),
}

/// What the time of a round gives.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Gives {
    /// What a multiprocessor does in a round, over its cycles.
    PerCycle(f64),
    /// The cycles of each of so many one after the other, less some that it takes besides.
    Cycles(f64, f64),
    /// Bytes a nanosecond: of a block, and besides of all together.
    Bytes(f64, f64),
}

/// Microseconds of two runs, the second with twice the rounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Runs {
    /// Of the first.
    pub rounds: u32,
    /// Of the first.
    pub short: f64,
    /// Of the second.
    pub long: f64,
}

const MIB: usize = 1 << 20;

const fn rate(constant: &'static str, entry: &'static str, lanes: f64) -> Probe {
    // Two blocks of 16 warps; 128 instructions of a warp a round.
    let gives = Gives::PerCycle(lanes);
    Probe { constant, entry, grid: Grid::Each(2), threads: 512, rounds: 1024, data: Data::Zeros(LINE), gives }
}

const fn latency(constant: &'static str, data: Data) -> Probe {
    Probe { constant, entry: constant, grid: Grid::One, threads: 32, rounds: 64, data, gives: Gives::Cycles(64.0, 0.0) }
}

/// Lanes of a multiprocessor's 32 warps in 128 instructions.
const LANES: f64 = 32.0 * 128.0 * 32.0;

/// All of them, the most telling first.
pub const PROBES: [Probe; 19] = [
    Probe {
        // Eight warps, eight additions each; one of them takes a cycle besides its conflict.
        constant: "same_address",
        entry: "same_address",
        grid: Grid::Each(1),
        threads: 256,
        rounds: 1024,
        data: Data::Zeros(LINE),
        gives: Gives::Cycles(64.0, 1.0),
    },
    Probe {
        constant: "cache",
        entry: "cache",
        grid: Grid::Each(4),
        threads: 512,
        rounds: 16,
        data: Data::Zeros(16 * MIB),
        gives: Gives::Bytes(MIB as f64, 0.0),
    },
    Probe {
        constant: "memory",
        entry: "memory",
        grid: Grid::Each(8),
        threads: 256,
        rounds: 2,
        data: Data::Zeros(1024 * MIB),
        gives: Gives::Bytes(0.0, 1024.0 * MIB as f64),
    },
    Probe {
        // Eight warps, sixteen loads each of 32 lines.
        constant: "tags",
        entry: "tags",
        grid: Grid::Each(1),
        threads: 256,
        rounds: 512,
        data: Data::Zeros(64 << 10),
        gives: Gives::PerCycle(8.0 * 16.0 * 32.0),
    },
    Probe {
        // Four warps of each quarter, 32 products each.
        constant: "matrix_cycles",
        entry: "matrix",
        grid: Grid::Each(1),
        threads: 512,
        rounds: 512,
        data: Data::Zeros(LINE),
        gives: Gives::Cycles(4.0 * 32.0, 0.0),
    },
    latency("latency_memory", Data::Chain(256 * MIB)),
    latency("latency_cache", Data::Chain(MIB / 2)),
    latency("latency_first_level", Data::Chain(8 << 10)),
    latency("latency_shared", Data::Zeros(LINE)),
    latency("latency_alu", Data::Zeros(LINE)),
    latency("latency_special", Data::Zeros(LINE)),
    latency("latency_matrix", Data::Zeros(LINE)),
    // Two warps of a quarter come one after the other.
    Probe { threads: 256, gives: Gives::Cycles(16.0, 2.0), ..latency("latency_barrier", Data::Zeros(LINE)) },
    rate("alu", "alu", LANES),
    rate("imad", "imad", LANES),
    rate("fma", "multiply_add", LANES),
    rate("special", "special", LANES),
    rate("conversion", "conversion", LANES),
    rate("issue", "issue", LANES / 32.0),
];

/// In f64, which GeForces have little of: fewer rounds.
pub const DOUBLE: Probe = Probe { rounds: 256, ..rate("double", "doubles", LANES) };

impl Probe {
    /// Blocks of its launch.
    pub fn blocks(&self, multiprocessors: u32) -> u32 {
        match self.grid {
            Grid::One => 1,
            Grid::Each(count) => count * multiprocessors,
        }
    }

    /// Bytes of its buffer.
    pub fn bytes(&self) -> usize {
        match self.data {
            Data::Zeros(bytes) | Data::Chain(bytes) => bytes,
        }
    }

    /// Rounds of the shorter run where it is interpreted: of a chain, enough to go through all of it that a cache has.
    pub fn few(&self) -> u32 {
        match self.data {
            Data::Chain(_) => self.rounds,
            Data::Zeros(_) => self.rounds.min(16),
        }
    }

    /// The constant, of two runs on so many multiprocessors of so many cycles a nanosecond.
    pub fn value(&self, runs: Runs, clock: f64, multiprocessors: u32) -> f64 {
        let round = (runs.long - runs.short) / f64::from(runs.rounds) * 1000.0;
        match self.gives {
            Gives::PerCycle(work) => work / (round * clock),
            Gives::Cycles(count, besides) => round * clock / count - besides,
            Gives::Bytes(block, all) => (block * f64::from(self.blocks(multiprocessors)) + all) / round,
        }
    }

    /// What the launch would do on a GPU: counted of its first block.
    ///
    /// # Errors
    /// Compilers that are not installed, memory that the system refuses.
    pub fn profile(&self, gpu: Gpu, rates: &Rates, rounds: u32) -> Result<Profile> {
        let bytes = self.bytes();
        let zeroed = |bytes: usize| HostBuffer::zeroed(bytes).map_err(Error::io(std::path::Path::new("memory")));
        let buffers = [zeroed(bytes)?, zeroed(SINK)?];
        let scalars = scalars(bytes, rounds);
        let launch = |entry, count, threads, blocks| Raw {
            source: SOURCE,
            entry,
            count: [count, 1, 1],
            dim: [threads, 1, 1],
            shared: 0,
            buffers: &buffers,
            scalars: &scalars,
            blocks,
        };
        if let Data::Chain(_) = self.data {
            for (place, next) in chain(bytes) {
                buffers[0].write(place, &(next as u64).to_le_bytes());
            }
            let blocks = (bytes / LINE).div_ceil(256);
            launch("link", blocks as u32, 256, blocks).count(gpu)?;
        }
        let blocks = self.blocks(gpu.specification().multiprocessors);
        launch(self.entry, blocks, self.threads, 1).profile(gpu, rates)
    }
}

/// The source of one kernel.
pub fn source(entry: &str) -> String {
    format!("#define ONLY_{entry}\n{SOURCE}")
}

/// The last parameter: bytes of the buffer, rounds, and a number that no compiler knows.
pub fn scalars(bytes: usize, rounds: u32) -> [u8; 16] {
    let mut scalars = [0; 16];
    scalars[..8].copy_from_slice(&(bytes as u64).to_le_bytes());
    scalars[8..12].copy_from_slice(&rounds.to_le_bytes());
    scalars[12..].copy_from_slice(&3u32.to_le_bytes());
    scalars
}

/// Places in a buffer, and which comes after each: one round trip through all, in an order without a pattern.
pub fn chain(bytes: usize) -> Vec<(usize, usize)> {
    let mut places: Vec<usize> = (0..bytes / LINE).collect();
    // The first stays first: the trip begins there.
    let mut state = 1u64;
    for at in (2..places.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        places.swap(at, 1 + (state >> 33) as usize % at);
    }
    let next = places.iter().cycle().skip(1);
    places.iter().zip(next).map(|(&place, &next)| (place * LINE, next * LINE)).collect()
}
