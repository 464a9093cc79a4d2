//! Copies under way: those of a block, and the groups that a warp's lanes have put theirs in.

use crate::lanes::{Long, Mask, WARP, Word};
use crate::operand::Space;
use crate::program::transfer::Group;
use crate::run::observe::At;

/// Bytes of the largest copy of a lane, and of the pieces of a long one.
pub const PIECE: usize = 16;

/// A block's copies that are under way.
#[derive(Debug, Default)]
pub struct Transfers {
    pub copies: Vec<Copy>,
    pub bulks: Vec<Bulk>,
    pub after: Vec<After>,
    /// Copies of `cp.async` that have begun.
    pub begun: u64,
    /// How often a barrier has changed.
    pub changes: u64,
}

/// A warp's groups of copies.
#[derive(Debug, Default)]
pub struct Copies {
    small: Word,
    bulk: Word,
    /// The test of a barrier that failed last.
    pub tested: usize,
}

impl Copies {
    /// Groups of a kind that each lane has closed.
    pub fn closed(&mut self, group: Group) -> &mut Word {
        match group {
            Group::Small => &mut self.small,
            Group::Bulk => &mut self.bulk,
        }
    }
}

/// What the lanes of a warp copy in one instruction.
#[derive(Debug)]
pub struct Copy {
    /// Who copies, and where.
    pub at: At,
    /// Copies of the block before.
    pub number: u64,
    /// Lanes whose bytes have not arrived.
    pub mask: Mask,
    /// The group of each.
    pub groups: Word,
    pub to: Long,
    pub size: usize,
    pub bytes: [[u8; PIECE]; WARP],
}

/// What a lane copies by `cp.async.bulk`.
#[derive(Debug)]
pub struct Bulk {
    pub at: At,
    pub lane: usize,
    pub to: (Space, u64),
    pub bytes: Vec<u8>,
    pub until: Until,
}

/// What a long copy is waited for with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// The lane's group of this number.
    Group(u32),
    /// A barrier.
    Barrier(u64),
}

/// Lanes that come to barriers when copies that they began before have arrived.
#[derive(Debug)]
pub struct After {
    pub at: At,
    /// Copies of the block before.
    pub number: u64,
    pub mask: Mask,
    pub barriers: Long,
}
