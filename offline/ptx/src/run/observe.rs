//! Who looks on while a launch runs: a sanitiser, a counter, or nobody.

use super::memory::Access;
use crate::error::Site;
use crate::lanes::{Mask, WARP};

/// A warp at an instruction.
#[derive(Debug, Clone, Copy)]
pub struct At {
    /// The block, counted along x first.
    pub block: usize,
    /// The warp in its block.
    pub warp: usize,
    /// The instruction.
    pub instruction: usize,
    /// Barriers of blocks since the launch began; never the same in two blocks.
    pub epoch: u32,
    /// How often the warp's lanes have waited for each other since the block began.
    pub step: u32,
}

impl At {
    /// The first lane of a mask.
    pub(super) fn site(&self, mask: Mask) -> Site {
        let lane = mask.trailing_zeros().min(WARP as u32 - 1) as usize;
        Site { block: self.block, thread: self.warp * WARP + lane, instruction: self.instruction }
    }
}

/// Is told what a launch does, as it does it.
pub trait Observer {
    /// An instruction begins in the lanes of `mask`, of the `running` lanes that have not ended.
    fn issued(&mut self, at: &At, mask: Mask, running: Mask) {
        let _ = (at, mask, running);
    }

    /// Lanes access memory. What is out of bounds stops the launch and is not seen here.
    fn accessed(&mut self, at: &At, access: &Access<'_>) {
        let _ = (at, access);
    }

    /// A block begins, in a new epoch.
    fn block_begins(&mut self, block: usize, epoch: u32) {
        let _ = (block, epoch);
    }
}

/// Nobody.
impl Observer for () {}
