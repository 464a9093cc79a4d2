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

/// Steps of a bisection, more than rows of numbers in random order need.
const STEPS: usize = 24;
/// Order keys that a lane holds in registers while it bisects.
const IN_REGISTERS: usize = 36;

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
    let bisections = 1 + 2 * (plan.keep * growth).div_ceil(free);
    strided(vectors, plan.plane) + bisections * (2 + STEPS) * (1 + plan.slots())
}

/// Where a row's lists begin.
#[cube]
pub(crate) fn first_of(row: usize, #[comptime] plan: SelectPlan) -> usize {
    row * comptime!(plan.plane * plan.slots())
}

/// What a plane has of `rows` rows, one behind the other, that it selects side by side: what one waits for is time for the others.
#[derive(CubeType)]
pub(crate) struct Listing {
    /// Where the first row's lists begin.
    first: usize,
    lane: usize,
    /// Candidates in the lane's list of each row.
    counts: Array<u32>,
    /// What is still to be listed has a smaller order key.
    bounds: Array<u32>,
    #[cube(comptime)]
    rows: usize,
    #[cube(comptime)]
    plan: SelectPlan,
}

#[cube]
impl Listing {
    /// Nothing listed, of `rows` rows from `row` on, and nothing passed over.
    pub fn new(row: usize, lane: usize, #[comptime] rows: usize, #[comptime] plan: SelectPlan) -> Listing {
        let mut counts = Array::<u32>::new(rows);
        let mut bounds = Array::<u32>::new(rows);
        #[unroll]
        for r in 0..rows {
            counts[r] = 0u32;
            bounds[r] = NOTHING;
        }
        Listing { first: first_of(row, plan), lane, counts, bounds, rows, plan }
    }

    /// The lane's place in slot `slot` of the lists of row `r`.
    fn place(&self, #[comptime] r: usize, slot: usize) -> usize {
        self.first + comptime!(r * self.plan.plane * self.plan.slots()) + slot * self.plan.plane + self.lane
    }

    /// Lists what may be among the best of four candidates of each row, at `position` and after. The rows' whole plane comes here, with what follows
    /// all that it has come with before.
    pub fn list(&mut self, scratch: &mut Scratch, keys: &Array<Vector<u32, Four>>, position: u32) {
        let most = comptime!((self.plan.slots() - FOUR) as u32);
        let mut full = false;
        #[unroll]
        for r in 0..self.rows {
            full = full || self.counts[r] > most;
        }
        if plane_any(full) {
            let left = self.bisect(scratch, comptime!(self.plan.most()));
            #[unroll]
            for r in 0..self.rows {
                self.bounds[r] = min(self.bounds[r], left.keys[r]);
            }
            self.keep(scratch, &left);
        }
        #[unroll]
        for r in 0..self.rows {
            #[unroll]
            for n in 0..FOUR {
                let key = keys[r][n];
                if key < self.bounds[r] {
                    let place = self.place(r, self.counts[r] as usize);
                    scratch.keys[place] = key;
                    scratch.positions[place] = position + comptime!(n as u32);
                    self.counts[r] += 1;
                }
            }
        }
    }

    /// Leaves the best `keep` of each row, in no order, at the beginning of its lists. Of rows with fewer candidates, whose positions end at
    /// `end`, the last positions fill up the rest: no candidate has them. Ends with a barrier of the plane.
    pub fn leave_best(&mut self, scratch: &mut Scratch, end: usize) {
        let left = self.bisect(scratch, self.plan.keep);
        self.keep(scratch, &left);
        #[unroll]
        for r in 0..self.rows {
            let found = plane_sum(self.counts[r]) as usize;
            if found < self.plan.keep {
                for i in range_stepped(found + self.lane, self.plan.keep, self.plan.plane) {
                    let place = self.first + comptime!(r * self.plan.plane * self.plan.slots()) + i;
                    scratch.keys[place] = NOTHING;
                    scratch.positions[place] = (end - self.plan.keep + i) as u32;
                }
            }
        }
        sync_plane();
    }

    /// Bounds that hold `keep` to `most` of each row's listed candidates; all, where they are no more.
    fn bisect(&self, scratch: &Scratch, #[comptime] most: usize) -> Bounds {
        let (rows, slots) = (self.rows, comptime!(self.plan.slots()));
        let cached = comptime!(slots * self.rows <= IN_REGISTERS);
        let (keep, limit) = comptime!((self.plan.keep as u32, most as u32));
        let mut own = Array::<u32>::new(comptime!(if cached { slots * self.rows } else { 1 }));
        let mut search = Search::new(rows);
        #[unroll]
        for r in 0..rows {
            let mut low = NOTHING.runtime();
            let mut high = 0u32.runtime();
            #[unroll(cached)]
            for slot in 0..slots {
                let mut key = NOTHING.runtime();
                if (slot as u32) < self.counts[r] {
                    key = scratch.keys[self.place(r, slot)];
                    high = max(high, key);
                }
                low = min(low, key);
                if cached {
                    own[r * slots + slot] = key;
                }
            }
            search.low[r] = plane_min(low);
            search.high[r] = plane_max(high);
            search.held[r] = plane_sum(self.counts[r]);
            search.below[r] = 0u32;
            search.all[r] = search.held[r] <= limit;
        }
        let mut halve = false;
        while search.goes_on(limit) {
            let middles = search.middles(halve, comptime!((keep as usize + most + 1) as f32 / 2.0));
            halve = !halve;
            let mut within = Array::<u32>::new(rows);
            #[unroll]
            for r in 0..rows {
                let mut count = 0u32;
                #[unroll(cached)]
                for slot in 0..slots {
                    if cached {
                        count += u32::cast_from(own[r * slots + slot] <= middles[r]);
                    } else if (slot as u32) < self.counts[r] {
                        count += u32::cast_from(scratch.keys[self.place(r, slot)] <= middles[r]);
                    }
                }
                within[r] = count;
            }
            sum_rows(&mut within, rows);
            search.narrow(&middles, &within, keep, limit);
        }
        let mut bounds = Bounds { keys: Array::<u32>::new(rows), positions: Array::<u32>::new(rows) };
        #[unroll]
        for r in 0..rows {
            bounds.keys[r] = select(search.all[r], NOTHING, search.high[r]);
            bounds.positions[r] = NOTHING;
            if search.held[r] > limit {
                bounds.positions[r] = self.bisect_positions(scratch, search.high[r], r);
            }
        }
        bounds
    }

    /// The position up to which candidates of row `r` with order key `key` are among the best `keep`: too many are equal.
    fn bisect_positions(&self, scratch: &Scratch, key: u32, #[comptime] r: usize) -> u32 {
        let mut low = 0u32.runtime();
        let mut high = NOTHING.runtime();
        while low < high {
            let middle = low + (high - low) / 2;
            let mut within = 0u32;
            for slot in 0..self.counts[r] as usize {
                let place = self.place(r, slot);
                within += u32::cast_from(holds(key, middle, scratch.keys[place], scratch.positions[place]));
            }
            within = plane_sum(within);
            if within >= comptime!(self.plan.keep as u32) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        high
    }

    /// Drops what `bounds` do not hold. What is left fills a row's lists slot by slot. An entry never moves to a later slot, so that one barrier
    /// between reading a slot and writing will do.
    fn keep(&mut self, scratch: &mut Scratch, bounds: &Bounds) {
        let plane = self.plan.plane;
        let mut left = Array::<u32>::new(self.rows);
        #[unroll]
        for r in 0..self.rows {
            left[r] = 0u32;
        }
        let before = (1u32 << self.lane as u32) - 1;
        for slot in 0..comptime!(self.plan.slots()) {
            let mut keys = Array::<u32>::new(self.rows);
            let mut positions = Array::<u32>::new(self.rows);
            let mut ballots = Array::<u32>::new(self.rows);
            #[unroll]
            for r in 0..self.rows {
                let place = self.place(r, slot);
                let mut held = false;
                keys[r] = 0u32;
                positions[r] = 0u32;
                if (slot as u32) < self.counts[r] {
                    keys[r] = scratch.keys[place];
                    positions[r] = scratch.positions[place];
                    held = holds(bounds.keys[r], bounds.positions[r], keys[r], positions[r]);
                }
                ballots[r] = plane_ballot(held)[0];
            }
            sync_plane();
            #[unroll]
            for r in 0..self.rows {
                if (ballots[r] >> self.lane as u32) % 2 == 1 {
                    let to = left[r] + (ballots[r] & before).count_ones();
                    let place = self.first + comptime!(r * plane * self.plan.slots()) + to as usize;
                    scratch.keys[place] = keys[r];
                    scratch.positions[place] = positions[r];
                }
                left[r] += ballots[r].count_ones();
            }
        }
        sync_plane();
        #[unroll]
        for r in 0..self.rows {
            let units = comptime!(plane as u32);
            self.counts[r] = left[r] / units + u32::cast_from((self.lane as u32) < left[r] % units);
        }
    }
}

/// Leaves the order keys and positions of the best `keep` of each row, in no order, in `scratch.keys` and `scratch.positions` from the returned
/// place on. The units of whole planes come here, the first of each row. Ends with a barrier of the plane.
#[cube]
pub(super) fn best<C: Candidates>(candidates: &C, vectors: usize, at: Lane, scratch: &mut Scratch) -> usize {
    let plan = comptime!(scratch.plan);
    let mut listing = Listing::new(at.row, at.lane, 1usize, plan);
    for start in range_stepped(0usize, vectors, plan.plane) {
        let vector = start + at.lane;
        let mut keys = Array::<Vector<u32, Four>>::new(1usize);
        keys[0] = Vector::new(NOTHING);
        if vector < vectors {
            keys[0] = candidates.keys(vector);
        }
        listing.list(scratch, &keys, (vector * FOUR) as u32);
    }
    listing.leave_best(scratch, vectors * FOUR);
    listing.first
}

/// Of each row what is listed and left: what has an order key below the row's, or this one and at most the position.
#[derive(CubeType)]
struct Bounds {
    keys: Array<u32>,
    positions: Array<u32>,
}

#[cube]
fn holds(bound: u32, last: u32, key: u32, position: u32) -> bool {
    key < bound || (key == bound && position <= last)
}

/// A bisection of each row: `held` candidates, no fewer than are kept, have order key `high` or a smaller one; `below`, fewer than are kept, one
/// smaller than `low`.
#[derive(CubeType)]
struct Search {
    low: Array<u32>,
    high: Array<u32>,
    held: Array<u32>,
    below: Array<u32>,
    /// Whether a row has so few candidates that all are left.
    all: Array<bool>,
    #[cube(comptime)]
    rows: usize,
}

#[cube]
impl Search {
    fn new(#[comptime] rows: usize) -> Search {
        Search {
            low: Array::new(rows),
            high: Array::new(rows),
            held: Array::new(rows),
            below: Array::new(rows),
            all: Array::new(rows),
            rows,
        }
    }

    /// Whether a row is bisected on: more than `limit` are held, and not all of them by one order key.
    fn open(&self, limit: u32, #[comptime] r: usize) -> bool {
        self.low[r] < self.high[r] && self.held[r] > limit
    }

    fn goes_on(&self, limit: u32) -> bool {
        let mut any = false;
        #[unroll]
        for r in 0..self.rows {
            any = any || self.open(limit, r);
        }
        any
    }

    /// Where each row is cut: in the middle, or where evenly spread order keys would leave `wanted`.
    fn middles(&self, halve: bool, #[comptime] wanted: f32) -> Array<u32> {
        let mut middles = Array::<u32>::new(self.rows);
        #[unroll]
        for r in 0..self.rows {
            let span = self.high[r] - self.low[r];
            let mut step = span / 2;
            if !halve {
                let share = (wanted - f32::cast_from(self.below[r])) / f32::cast_from(self.held[r] - self.below[r]);
                step = u32::cast_from(f32::cast_from(span) * share);
            }
            middles[r] = self.low[r] + min(step, max(span, 1) - 1);
        }
        middles
    }

    /// Takes the half of each row in which its bound lies.
    fn narrow(&mut self, middles: &Array<u32>, within: &Array<u32>, keep: u32, limit: u32) {
        #[unroll]
        for r in 0..self.rows {
            if self.open(limit, r) {
                if within[r] >= keep {
                    self.high[r] = middles[r];
                    self.held[r] = within[r];
                } else {
                    self.low[r] = middles[r] + 1;
                    self.below[r] = within[r];
                }
            }
        }
    }
}

/// Sums over the plane of what its lanes have counted in each row, two rows in a word.
#[cube]
fn sum_rows(counts: &mut Array<u32>, #[comptime] rows: usize) {
    #[unroll]
    for pair in 0..comptime!(rows.div_ceil(2)) {
        let (first, second) = comptime!((2 * pair, 2 * pair + 1));
        if comptime!(second < rows) {
            let sum = plane_sum(counts[first] | (counts[second] << 16));
            counts[first] = sum % 65_536;
            counts[second] = sum / 65_536;
        } else {
            counts[first] = plane_sum(counts[first]);
        }
    }
}
