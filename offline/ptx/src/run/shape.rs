//! Sizes of a launch.

/// Sizes of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Threads of a block in each dimension.
    pub threads: [u32; 3],
    /// Blocks in each dimension.
    pub blocks: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub dynamic_shared: usize,
}
