//! What can go wrong before a kernel runs, and what stops one that runs.

use crate::lanes::Mask;
use crate::operand::Space;

/// Why a text is not executed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseError {
    /// An instruction that is not known, or not in this form.
    #[error("line {line} of the PTX: the instruction {instruction} is not known")]
    Unknown {
        /// The line of the PTX.
        line: usize,
        /// The instruction as it is written.
        instruction: String,
    },
    /// What is not PTX as NVRTC writes it.
    #[error("line {line} of the PTX: {reason}")]
    Syntax {
        /// The line of the PTX.
        line: usize,
        /// What is wrong.
        reason: String,
    },
}

/// Why a launch does not go on. Blocks, warps and instructions are numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// An access that is in no memory of the launch.
    OutOfBounds {
        /// Who and where.
        at: Site,
        /// The space of the instruction.
        space: Space,
        /// The address in it.
        address: u64,
        /// Bytes.
        size: usize,
        /// Whether it stores.
        store: bool,
    },
    /// An address that is not a multiple of what is accessed.
    Misaligned {
        /// Who and where.
        at: Site,
        /// The address.
        address: u64,
        /// Bytes.
        size: usize,
    },
    /// Lanes of a warp that wait for lanes that don't come to the same instruction.
    DivergentWarp {
        /// Who waits, and where.
        at: Site,
        /// The lanes that don't come.
        missing: Mask,
    },
    /// Warps of a block that wait for one that does not come to the same barrier.
    DivergentBlock {
        /// Who waits, and where.
        at: Site,
        /// A thread of the block that does not come.
        other: usize,
    },
    /// The kernel stops itself.
    Trap {
        /// Who and where.
        at: Site,
    },
    /// A block executes more instructions than any that ends.
    Endless {
        /// Who and where.
        at: Site,
    },
}

/// A thread at an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Site {
    /// The block, counted along x first.
    pub block: usize,
    /// The thread in its block.
    pub thread: usize,
    /// The instruction.
    pub instruction: usize,
}
