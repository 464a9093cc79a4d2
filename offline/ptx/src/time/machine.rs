//! What a replay knows of the hardware, and of each instruction on it.

/// Pipes of a quarter, whichever they are.
pub const PIPES: usize = 8;

/// What a PTX instruction is to the machine.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Cost {
    /// Machine instructions that are issued for it; 0 where the compiler has left it out.
    pub issued: f64,
    /// Cycles that it keeps each pipe of its quarter.
    pub pipes: [f64; PIPES],
    /// Cycles of the unit that loads, stores and shuffles, at least: one for each machine instruction that goes there.
    pub unit: f64,
    /// Of a load from shared memory, the part of a machine instruction that it is: less than 1 where several were joined.
    pub joined: f64,
    /// Cycles from its issue until its result can be read, what memory takes left out.
    pub latency: f64,
    /// Cycles until the warp issues its next: more than `issued` after a jump.
    pub pause: f64,
    /// Loads of its kind that a warp may have under way when it is one; 0 where nothing is known of it.
    pub in_flight: usize,
}

/// What a multiprocessor does in a cycle, and how long memory takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Machine {
    /// Blocks that it holds at once.
    pub resident: usize,
    /// Lines of the first-level cache that are looked up in a cycle.
    pub tags: f64,
    /// Cycles of an atomic operation on shared memory whose 32 lanes hit one address.
    pub same_address: f64,
    /// Bytes of a cycle between it and the second-level cache.
    pub cache: f64,
    /// Bytes of a cycle between device memory and chip that are its part.
    pub memory: f64,
    /// Cycles from a load's issue to its use: from shared memory.
    pub latency_shared: f64,
    /// From its first-level cache.
    pub latency_first_level: f64,
    /// From the second-level cache.
    pub latency_cache: f64,
    /// From device memory.
    pub latency_memory: f64,
    /// From the last warp's coming to a barrier until all go on.
    pub latency_barrier: f64,
    /// From a block's end to the first instruction of the one that takes its place.
    pub latency_block: f64,
}
