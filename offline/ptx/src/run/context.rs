//! What a warp runs in.

use super::memory::Memory;
use super::shape::Shape;
use super::transfer::state::Transfers;
use crate::flow::ControlFlow;
use crate::program::Program;

/// What a warp runs in.
pub struct Context<'c, 'm, O> {
    /// The kernel.
    pub program: &'c Program,
    /// Where its lanes come together.
    pub flow: &'c ControlFlow,
    /// The launch's memory.
    pub memory: &'c mut Memory<'m>,
    /// Who looks on.
    pub observer: &'c mut O,
    /// Threads of a block, and blocks.
    pub shape: Shape,
    /// The epoch of the block.
    pub epoch: u32,
    /// Whether atomic operations take lanes from the last to the first.
    pub reversed: bool,
    /// Barriers in shared memory.
    pub transfers: &'c mut Transfers,
}
