//! Top-m of a row by one plane: no atomics, and no barrier of the cube.
//!
//! The plane goes through the row once. Each lane lists, in shared memory, the candidates that are better than a bound, which at first lets
//! everything pass. Where a list could overflow, the plane finds by bisection an order key that at least `keep` of the listed
//! have or are better than, and not many more; drops the rest; and deals out what is left to the lanes again. Whatever is dropped, or passed over, has
//! `keep` candidates before it, so that nothing is guessed and nothing is looked at twice. In the end the bisection is exact: `keep` are left.
//!
//! Of n candidates in random order some `keep · ln(n / entries)` pass the first bound: a row of 6,400 that keeps 80 is bisected three times.
//! A row whose every candidate is better than those before it is bisected each time that the lists are full.

use cubecl::prelude::*;

use super::{Candidates, CandidatesExpand, FOUR, Four, Lane, NOTHING, Scratch, SelectPlan};
use crate::launch::loops::strided;

/// Slots of a lane whose order keys it holds in registers while it bisects.
const IN_REGISTERS: usize = 16;

impl SelectPlan {
    /// Entries of a lane's list: what is left after a bisection, one lane having one more than another, and what is free.
    fn slots(&self) -> usize {
        let left = self.most().div_ceil(self.plane);
        left + self.free.max(left)
    }

    /// What a bisection may leave before the last one, which leaves `keep`.
    fn most(&self) -> usize {
        self.keep + self.plane / 2
    }
}

/// Words of the lists' order keys, and as many of their positions.
pub(super) fn entries(plan: &SelectPlan) -> usize {
    if plan.plane == 0 { 1 } else { plan.rows * plan.plane * plan.slots() }
}

/// Loop iterations of a lane among candidates in `vectors` vectors, in random order: twice the bisections that are to be expected.
pub(super) fn loops(plan: &SelectPlan, vectors: usize) -> usize {
    let (listed, free) = (plan.plane * plan.slots(), plan.plane * (plan.slots() - plan.most().div_ceil(plan.plane)));
    let growth = (vectors * FOUR).div_ceil(listed).next_power_of_two().ilog2() as usize;
    let bisections = 2 + 2 * (plan.keep * growth).div_ceil(free);
    strided(vectors, plan.plane) + bisections * (3 + u32::BITS as usize) * (1 + plan.slots())
}

/// What a plane has of a row so far.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Listed {
    /// Candidates in the lane's list.
    pub count: u32,
    /// What is to be listed has a smaller order key; [`NOTHING`] at first.
    pub bound: u32,
}

/// Where a row's lists begin.
#[cube]
pub(crate) fn first_of(row: usize, #[comptime] plan: SelectPlan) -> usize {
    row * comptime!(plan.plane * plan.slots())
}

/// Lists what may be among the best of four candidates of a lane, at `position` and after. The row's whole plane comes here, with what
/// follows all that it has come with before.
#[cube]
pub(crate) fn list(
    scratch: &mut Scratch,
    first: usize,
    lane: usize,
    so_far: Listed,
    keys: Vector<u32, Four>,
    position: u32,
) -> Listed {
    let plan = comptime!(scratch.plan);
    let slots = comptime!(plan.slots());
    let mut count = so_far.count;
    let mut bound = so_far.bound;
    if plane_any(count > comptime!((slots - FOUR) as u32)) {
        let left = bisect(scratch, first, lane, count, comptime!(plan.most()));
        bound = min(bound, left.key);
        count = keep_best(scratch, first, lane, count, left);
    }
    #[unroll]
    for n in 0..FOUR {
        if keys[n] < bound {
            let place = first + count as usize * plan.plane + lane;
            scratch.keys[place] = keys[n];
            scratch.positions[place] = position + comptime!(n as u32);
            count += 1;
        }
    }
    Listed { count, bound }
}

/// Leaves the best `keep` of what is listed, from place `first` on, in no order. Ends with a barrier of the plane.
#[cube]
pub(crate) fn leave_best(scratch: &mut Scratch, first: usize, lane: usize, listed: Listed) {
    let left = bisect(scratch, first, lane, listed.count, comptime!(scratch.plan.keep));
    keep_best(scratch, first, lane, listed.count, left);
}

/// Leaves the order keys and positions of the best `keep` of each row, in no order, in `scratch.keys` and `scratch.positions` from the returned
/// place on. The units of whole planes come here, the first of each row. Ends with a barrier of the plane.
#[cube]
pub(super) fn best<C: Candidates>(candidates: &C, vectors: usize, at: Lane, scratch: &mut Scratch) -> usize {
    let plan = comptime!(scratch.plan);
    let first = first_of(at.row, plan);
    let mut count = 0u32;
    let mut bound = NOTHING.runtime();
    for start in range_stepped(0usize, vectors, plan.plane) {
        let vector = start + at.lane;
        let mut keys = Vector::<u32, Four>::new(NOTHING);
        if vector < vectors {
            keys = candidates.keys(vector);
        }
        let listed = list(scratch, first, at.lane, Listed { count, bound }, keys, (vector * FOUR) as u32);
        count = listed.count;
        bound = listed.bound;
    }
    leave_best(scratch, first, at.lane, Listed { count, bound });
    first
}

/// What is listed and left: what has an order key below `key`, or this one and at most this position.
#[derive(CubeType, Clone, Copy)]
struct Bound {
    key: u32,
    position: u32,
}

#[cube]
impl Bound {
    fn holds(self, key: u32, position: u32) -> bool {
        key < self.key || (key == self.key && position <= self.position)
    }
}

/// A bound that holds `keep` to `most` of the plane's listed candidates; all, where they are no more.
#[cube]
fn bisect(scratch: &Scratch, first: usize, lane: usize, listed: u32, #[comptime] most: usize) -> Bound {
    let plan = comptime!(scratch.plan);
    let slots = comptime!(plan.slots());
    let cached = comptime!(slots <= IN_REGISTERS);
    let keep = comptime!(plan.keep as u32);
    let mut own = Array::<u32>::new(comptime!(if cached { slots } else { 1 }));
    let mut low = NOTHING.runtime();
    let mut high = 0u32.runtime();
    #[unroll(cached)]
    for slot in 0..slots {
        let mut key = NOTHING.runtime();
        if (slot as u32) < listed {
            key = scratch.keys[first + slot * plan.plane + lane];
            high = max(high, key);
        }
        low = min(low, key);
        if cached {
            own[slot] = key;
        }
    }
    low = plane_min(low);
    high = plane_max(high);
    let mut bound = Bound { key: NOTHING.runtime(), position: NOTHING.runtime() };
    let mut held = plane_sum(listed);
    if held > comptime!(most as u32) {
        bound.key = high;
        // `keep` or more have `high` or a smaller key, fewer a smaller key than `low`.
        while low < high && held > comptime!(most as u32) {
            let middle = low + (high - low) / 2;
            let mut within = 0u32;
            #[unroll(cached)]
            for slot in 0..slots {
                if cached {
                    within += u32::cast_from(own[slot] <= middle);
                } else if (slot as u32) < listed {
                    within += u32::cast_from(scratch.keys[first + slot * plan.plane + lane] <= middle);
                }
            }
            within = plane_sum(within);
            if within >= keep {
                high = middle;
                held = within;
            } else {
                low = middle + 1;
            }
        }
        bound.key = high;
        if held > comptime!(most as u32) {
            bound.position = bisect_positions(scratch, first, lane, listed, high);
        }
    }
    bound
}

/// The position up to which candidates of order key `key` are among the best `keep`: too many are equal.
#[cube]
fn bisect_positions(scratch: &Scratch, first: usize, lane: usize, listed: u32, key: u32) -> u32 {
    let plan = comptime!(scratch.plan);
    let mut low = 0u32.runtime();
    let mut high = NOTHING.runtime();
    while low < high {
        let middle = low + (high - low) / 2;
        let bound = Bound { key, position: middle };
        let mut within = 0u32;
        for slot in 0..listed as usize {
            let place = first + slot * plan.plane + lane;
            within += u32::cast_from(bound.holds(scratch.keys[place], scratch.positions[place]));
        }
        within = plane_sum(within);
        if within >= comptime!(plan.keep as u32) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    high
}

/// Drops what `bound` does not hold. What is left fills the plane's lists slot by slot; returns the lane's part of it. An entry never
/// moves to a later slot, so that one barrier between reading a slot and writing will do.
#[cube]
fn keep_best(scratch: &mut Scratch, first: usize, lane: usize, listed: u32, bound: Bound) -> u32 {
    let plan = comptime!(scratch.plan);
    let slots = comptime!(plan.slots());
    let mut left = 0u32;
    let before = (1u32 << lane as u32) - 1;
    for slot in 0..slots {
        let place = first + slot * plan.plane + lane;
        let mut key = 0u32;
        let mut position = 0u32;
        let mut held = false;
        if (slot as u32) < listed {
            key = scratch.keys[place];
            position = scratch.positions[place];
            held = bound.holds(key, position);
        }
        let ballot = plane_ballot(held)[0];
        sync_plane();
        if held {
            let to = first + (left + (ballot & before).count_ones()) as usize;
            scratch.keys[to] = key;
            scratch.positions[to] = position;
        }
        left += ballot.count_ones();
    }
    sync_plane();
    let plane = comptime!(plan.plane as u32);
    left / plane + u32::cast_from((lane as u32) < left % plane)
}
