//! What a launch reports: what was launched, what its accesses cost, and what is wrong with it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use ultramem_ptx::sanitise::{Fault, Gap, Traffic};

/// One launch.
#[derive(Debug, Clone)]
pub struct LaunchReport {
    /// The kernel as it was launched.
    pub kernel: Arc<Kernel>,
    /// Blocks in each dimension; zeros where the device counts them itself and nothing has run.
    pub count: [u32; 3],
    /// Bytes of each buffer that was given.
    pub lengths: Vec<u64>,
    /// The scalars and lengths that follow the buffers, as 64-bit words.
    pub words: Vec<u64>,
    /// What the order of blocks and warps was drawn from.
    pub seed: u64,
    /// What was read and written of each buffer, in the order of the arguments; empty where nothing was watched. What is given
    /// to a kernel twice counts for the first argument.
    pub traffic: Vec<Traffic>,
    /// What the sanitiser found, at most one finding for each place in the source.
    pub faults: Vec<Fault>,
    /// Parts of writable buffers that nothing has written when the launch is over.
    pub gaps: Vec<Gap>,
    /// Products of matrix units that warps asked for.
    pub products: u64,
    /// Loop iterations, all loops together, of the thread that went through most: those of the compiled loops, which are the source's where
    /// [`rolled_loops`](crate::Options::rolled_loops) is set.
    pub loops: u64,
    /// The stream that it was given to.
    pub stream: u64,
    /// Pieces of memory that were asked for since the launch before, or since reports were taken.
    pub allocations: usize,
    /// What its instructions did, where they were counted.
    pub counts: Option<Arc<crate::profile::Counts>>,
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
    /// CUDA C++, or what else it was compiled to.
    pub source: String,
    /// SPIR-V, where it was compiled to that.
    pub binary: Option<Vec<u32>>,
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

impl LaunchReport {
    /// Bytes that device memory has to move, with a second-level cache of `cache` bytes.
    pub fn moved(&self, cache: u64) -> u64 {
        self.traffic.iter().map(|traffic| traffic.moved(cache)).sum()
    }

    /// Whether it ran and nothing is wrong with it.
    pub fn is_clean(&self) -> bool {
        self.executed && self.faults.is_empty() && self.gaps.is_empty()
    }
}
