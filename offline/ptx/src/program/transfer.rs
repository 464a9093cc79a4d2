//! Copies that go on while the thread does, and the barriers in shared memory that wait for them: `cp.async`, `cp.async.bulk` and
//! `mbarrier` (sections 9.7.9.25 and 9.7.13.15).

use crate::operand::{Address, Register, Source, Space};

/// An instruction of these.
#[derive(Debug, Clone)]
pub enum Transfer {
    /// `cp.async`
    Copy(CopyForm),
    /// `cp.async.commit_group` and `cp.async.bulk.commit_group`
    Commit(Group),
    /// `cp.async.wait_group`, `cp.async.bulk.wait_group`: how many of the last groups may be under way.
    Wait(Group, u32),
    /// `cp.async.wait_all`
    WaitAll,
    /// `cp.async.bulk`
    Bulk(BulkForm),
    /// `cp.async.mbarrier.arrive`, and whether the barrier has counted it already (`.noinc`).
    ArriveAfter(Place, bool),
    /// `mbarrier.init`: threads that it waits for.
    Init(Place, Source),
    /// `mbarrier.inval`
    Invalidate(Place),
    /// `mbarrier.arrive` and the like.
    Arrive(Arrival),
    /// `mbarrier.expect_tx`, and `mbarrier.complete_tx`, which takes away: bytes.
    Bytes(Place, Source, Sign),
    /// `mbarrier.test_wait` and `mbarrier.try_wait`.
    Test {
        /// The result.
        target: u32,
        /// The barrier.
        place: Place,
        /// The phase that shall be over: its state, or its parity.
        phase: Source,
        /// Whether it is its parity.
        parity: bool,
    },
    /// `mbarrier.pending_count`: threads that a state waits for.
    Pending(Register, Source),
}

/// Where something is.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    pub space: Space,
    pub address: Address,
}

/// Whether bytes are expected or have come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// Expected.
    Expect,
    /// Have come.
    Complete,
}

/// Kinds of groups that a thread puts its copies in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Of `cp.async`.
    Small,
    /// Of `cp.async.bulk`.
    Bulk,
}

/// `cp.async`
#[derive(Debug, Clone)]
pub struct CopyForm {
    pub to: Place,
    pub from: Place,
    pub size: usize,
    /// Bytes that are read, or whether nothing is, where that is a predicate; the rest is zero.
    pub read: Option<Source>,
}

/// `cp.async.bulk`
#[derive(Debug, Clone)]
pub struct BulkForm {
    pub to: Place,
    pub from: Place,
    pub size: Source,
    /// The barrier that counts the bytes that have come; None puts the copy in the thread's group.
    pub barrier: Option<Place>,
}

/// `mbarrier.arrive` and `mbarrier.arrive_drop`.
#[derive(Debug, Clone)]
pub struct Arrival {
    pub target: Option<Register>,
    pub place: Place,
    /// Threads that come; None is one.
    pub count: Option<Source>,
    /// Bytes that are to come besides.
    pub expected: Option<Source>,
    /// Whether these threads are not waited for any more.
    pub drops: bool,
}
