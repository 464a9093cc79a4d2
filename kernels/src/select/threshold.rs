//! Top-m of a row by a plane: no atomics, and no barrier of the cube.
//!
//! The plane goes through the row once. Each lane lists candidates in shared memory: at first all, until a list is full, then those that are better
//! than a bound. Where a list could overflow, the plane finds by bisection an order key that at least `keep` of the listed
//! have or are better than, and not many more: that is the bound. It drops the rest, and deals out what is left to the lanes again. Whatever is dropped,
//! or passed over, has `keep` candidates before it, so that nothing is guessed and nothing is looked at twice. In the end the bisection is exact.
//!
//! Of n candidates in random order some `keep · ln(n / entries)` pass the first bound: a row of 6,400 that keeps 80 is bisected three times.
//! A row whose every candidate is better than those before it is bisected each time that the lists are full. A bisection cuts the order keys at three
//! places at once: a step is as long as the exchange between the lanes that ends it.
//!
//! Where rows are few, several planes share one: each selects among every so many candidates, and after two barriers of the cube the first
//! plane among what all of them have left.

use cubecl::prelude::{select as select_value, *};

use super::{Candidates, CandidatesExpand, FOUR, Lane, NOTHING, Scratch, SelectPlan, order_key, score_of};
use crate::launch::loops::strided;
use crate::launch::planes::{smallest, total};

/// Steps of a bisection, more than rows of numbers in random order need.
const STEPS: usize = 12;
/// Order keys that a lane holds in registers while it bisects.
const IN_REGISTERS: usize = 36;
/// Places at which a step cuts, and bits of what it counts at each, which share a word.
pub(super) const CUTS: usize = 3;
pub(super) const BITS: u32 = 10;
/// The order key of the worst number.
const WORST: u32 = 0xff80_0000;

impl SelectPlan {
    /// Planes that share a row.
    pub(super) fn planes(&self) -> usize {
        self.lanes / self.plane.max(1)
    }

    /// How the first plane of a row selects among the best of all of them.
    fn joined(&self) -> Self {
        let slots = (self.planes() * self.keep).div_ceil(self.plane);
        Self { lanes: self.plane, free: slots.saturating_sub(self.most().div_ceil(self.plane)), ..*self }
    }

    /// Entries of the lists of all rows and planes.
    fn listed(&self) -> usize {
        self.rows * self.planes() * self.of_plane()
    }

    /// Entries of a plane's lists.
    fn of_plane(&self) -> usize {
        self.plane * self.slots()
    }

    /// Entries of a lane's list: what is left after a bisection, one lane having one more than another, and what is free.
    fn slots(&self) -> usize {
        let left = self.most().div_ceil(self.plane);
        left + self.free.max(left)
    }

    /// What a bisection may leave before the last one, which leaves `keep`.
    fn most(&self) -> usize {
        self.keep + self.plane / 2
    }

    /// Places at which a step of a bisection cuts: one where counts could overflow.
    fn cuts(&self) -> usize {
        if self.of_plane() < 1 << BITS { CUTS } else { 1 }
    }
}

/// Words of the lists' scores, and as many of their positions.
pub(super) fn entries(plan: &SelectPlan) -> usize {
    match plan.planes() {
        _ if plan.plane == 0 => 1,
        1 => plan.listed(),
        _ => plan.listed() + plan.joined().listed(),
    }
}

/// Words of what the planes of a row have left each.
pub(super) fn shares(plan: &SelectPlan) -> usize {
    if plan.plane > 0 && plan.planes() > 1 { plan.rows * plan.planes() } else { 1 }
}

/// Loop iterations of a lane among candidates in `vectors` vectors, in random order: twice the bisections that are to be expected.
pub(super) fn loops(plan: &SelectPlan, vectors: usize) -> usize {
    let free = plan.plane * (plan.slots() - plan.most().div_ceil(plan.plane));
    let own = vectors.div_ceil(plan.planes());
    let growth = (own * FOUR).div_ceil(plan.of_plane()).next_power_of_two().ilog2() as usize;
    let bisections = 1 + 2 * (plan.keep * growth).div_ceil(free);
    let steps = 2 + STEPS * CUTS / plan.cuts();
    let joined = match plan.planes() {
        1 => 0,
        planes => planes + strided(plan.keep, plan.plane) + steps * (1 + plan.joined().slots()),
    };
    strided(own, plan.plane) + bisections * steps * (1 + plan.slots()) + joined
}

/// Leaves the scores, as bits, and positions of the best `keep` of each row, in no order, in `scratch.keys` and `scratch.positions` from the returned
/// place on; of rows with fewer candidates the last positions fill up the rest, which no candidate has. All units of the cube come here. Ends with a
/// barrier of a row's first plane, the only one that may read what is left.
#[cube]
pub(super) fn best<C: Candidates>(candidates: &C, vectors: usize, at: Lane, scratch: &mut Scratch) -> usize {
    let plan = comptime!(scratch.plan);
    let planes = comptime!(plan.planes());
    let stride = comptime!(planes * plan.plane);
    let (plane, lane) = (at.lane / plan.plane, at.lane % plan.plane);
    let first = (at.row * planes + plane) * comptime!(plan.of_plane());
    let listing = Listing::new(first, lane, 0u32, plan);
    let mut start = plane * plan.plane;
    while start < vectors && !listing.bounded.read() {
        if listing.is_full() {
            listing.reduce(scratch, comptime!(plan.most()));
        } else {
            if start + lane < vectors {
                listing.list_all::<C>(scratch, candidates, start + lane);
            }
            start += stride;
        }
    }
    for next in range_stepped(start, vectors, stride) {
        if listing.is_full() {
            listing.reduce(scratch, comptime!(plan.most()));
        }
        if next + lane < vectors {
            listing.list_better::<C>(scratch, candidates, next + lane);
        }
    }
    listing.reduce(scratch, plan.keep);
    if planes > 1 {
        join(scratch, &listing, at.row, plane, vectors * FOUR)
    } else {
        fill(scratch, &listing, first, vectors * FOUR);
        first
    }
}

/// Brings what the planes of a row have left together, and leaves the best of it from the returned place on.
#[cube]
fn join(scratch: &mut Scratch, listing: &Listing, row: usize, plane: usize, end: usize) -> usize {
    let plan = comptime!(scratch.plan);
    let (planes, joined) = comptime!((plan.planes(), plan.joined()));
    let lane = listing.lane;
    let first = comptime!(plan.listed()) + row * comptime!(joined.of_plane());
    let own = total(listing.count.read(), plan.plane);
    if lane == 0 {
        scratch.shares[row * planes + plane] = own;
    }
    sync_cube();
    let mut before = 0u32;
    let mut all = 0u32;
    for other in 0..planes {
        let share = scratch.shares[row * planes + other];
        before += select_value(other < plane, share, 0u32);
        all += share;
    }
    for i in range_stepped(lane, own as usize, plan.plane) {
        let to = first + before as usize + i;
        scratch.keys[to] = scratch.keys[listing.first + i];
        scratch.positions[to] = scratch.positions[listing.first + i];
    }
    sync_cube();
    if plane == 0 {
        let share = all / comptime!(plan.plane as u32);
        let count = share + u32::cast_from((lane as u32) < all % comptime!(plan.plane as u32));
        let of_all = Listing::new(first, lane, count, joined);
        of_all.reduce(scratch, plan.keep);
        fill(scratch, &of_all, first, end);
    }
    first
}

/// Fills up a row that has fewer than `keep` candidates, whose positions end at `end`. Ends with a barrier of the plane.
#[cube]
fn fill(scratch: &mut Scratch, listing: &Listing, first: usize, end: usize) {
    let keep = listing.plan.keep;
    let found = total(listing.count.read(), listing.plan.plane) as usize;
    for i in range_stepped(found + listing.lane, keep, listing.plan.plane) {
        scratch.keys[first + i] = NOTHING;
        scratch.positions[first + i] = (end - keep + i) as u32;
    }
    sync_plane();
}

/// What a plane has listed of a row.
#[derive(CubeType)]
struct Listing {
    /// Where the lists begin: slot by slot, a slot having an entry for each lane.
    first: usize,
    lane: usize,
    /// Candidates in the lane's list.
    count: RuntimeCell<u32>,
    /// Whether there is a bound, and what is still to be listed has at least this score then.
    bounded: RuntimeCell<bool>,
    least: RuntimeCell<f32>,
    #[cube(comptime)]
    plan: SelectPlan,
}

/// Of what is listed, what is left: an order key below `key`, or this one and at most position `last`.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Bound {
    pub key: u32,
    pub last: u32,
}

#[cube]
impl Bound {
    pub fn holds(&self, key: u32, position: u32) -> bool {
        key < self.key || (key == self.key && position <= self.last)
    }
}

#[cube]
impl Listing {
    /// Of `count` entries that the lane's list has.
    fn new(first: usize, lane: usize, count: u32, #[comptime] plan: SelectPlan) -> Listing {
        Listing {
            first,
            lane,
            count: RuntimeCell::new(count),
            bounded: RuntimeCell::new(false),
            least: RuntimeCell::new(0.0f32),
            plan,
        }
    }

    /// The lane's place in slot `slot`.
    fn place(&self, slot: usize) -> usize {
        self.first + slot * self.plan.plane + self.lane
    }

    /// Whether a lane of the plane lacks room for four more.
    fn is_full(&self) -> bool {
        plane_any(self.count.read() > comptime!((self.plan.slots() - FOUR) as u32))
    }

    /// The order key of entry `slot`; nothing past the last.
    fn key(&self, scratch: &Scratch, slot: usize) -> u32 {
        let mut key = NOTHING.runtime();
        if (slot as u32) < self.count.read() {
            key = order_key(f32::reinterpret(scratch.keys[self.place(slot)]));
        }
        key
    }

    /// Lists the candidates of a vector.
    fn list_all<C: Candidates>(&self, scratch: &mut Scratch, candidates: &C, vector: usize) {
        let keys = candidates.keys(vector);
        #[unroll]
        for n in 0..FOUR {
            if keys[n] != NOTHING {
                self.push(scratch, score_of(keys[n]), vector, n);
            }
        }
    }

    /// Lists those that may be among the best: what has an equal score and comes later is not.
    fn list_better<C: Candidates>(&self, scratch: &mut Scratch, candidates: &C, vector: usize) {
        let scores = candidates.scores(vector);
        let least = self.least.read();
        #[unroll]
        for n in 0..FOUR {
            if scores[n] >= least {
                self.push(scratch, scores[n], vector, n);
            }
        }
    }

    fn push(&self, scratch: &mut Scratch, score: f32, vector: usize, #[comptime] n: usize) {
        let place = self.place(self.count.read() as usize);
        scratch.keys[place] = u32::reinterpret(score);
        scratch.positions[place] = (vector * FOUR + n) as u32;
        self.count.store(self.count.read() + 1);
    }

    /// Leaves `keep` to `most` of the listed, if they are more, and takes the bound for what is still to be listed.
    fn reduce(&self, scratch: &mut Scratch, #[comptime] most: usize) {
        let held = total(self.count.read(), self.plan.plane);
        let bounds = held > comptime!(most as u32);
        let mut key = NOTHING.runtime();
        let mut last = 0u32;
        if bounds {
            let bound = self.bisect(scratch, held, most);
            key = bound.key;
            last = bound.last;
            self.bounded.store(true);
            // The order key before the bound's is that of the next better score.
            self.least.store(score_of(min(key - 1, WORST)));
        }
        self.retain(scratch, Bound { key, last });
    }

    /// A bound that holds `keep` to `most` of the `held` listed candidates, which are more.
    fn bisect(&self, scratch: &Scratch, held: u32, #[comptime] most: usize) -> Bound {
        let slots = comptime!(self.plan.slots());
        let (cached, cuts) = comptime!((slots <= IN_REGISTERS, self.plan.cuts()));
        let mut own = Array::<u32>::new(comptime!(if cached { slots } else { 1 }));
        let mut least = NOTHING.runtime();
        let mut worst = NOTHING.runtime();
        #[unroll(cached)]
        for slot in 0..slots {
            let key = self.key(scratch, slot);
            least = min(least, key);
            worst = min(worst, select_value(key == NOTHING, NOTHING, NOTHING - key));
            if cached {
                own[slot] = key;
            }
        }
        let (low, high) = (smallest(least, self.plan.plane), NOTHING - smallest(worst, self.plan.plane));
        let search = Search::new(low, high, held, comptime!(self.plan.keep as u32), cuts);
        let mut halve = false;
        while search.goes_on(comptime!(most as u32)) {
            let middles = search.middles(halve, comptime!((self.plan.keep + most + 1) as f32 / 2.0));
            halve = !halve;
            let mut within = 0u32;
            #[unroll(cached)]
            for slot in 0..slots {
                let key = if cached { own[slot] } else { self.key(scratch, slot) };
                #[unroll]
                for cut in 0..cuts {
                    within += select_value(key <= middles[cut], comptime!(1u32 << (BITS * cut as u32)), 0u32);
                }
            }
            search.narrow(&middles, total(within, self.plan.plane));
        }
        let key = search.high.read();
        let mut last = NOTHING.runtime();
        if search.held.read() > comptime!(most as u32) {
            last = self.bisect_positions(scratch, key);
        }
        Bound { key, last }
    }

    /// The position up to which candidates with order key `key` are among the best `keep`: too many are equal.
    fn bisect_positions(&self, scratch: &Scratch, key: u32) -> u32 {
        let mut low = 0u32.runtime();
        let mut high = NOTHING.runtime();
        while low < high {
            let middle = low + (high - low) / 2;
            let bound = Bound { key, last: middle };
            let mut within = 0u32;
            for slot in 0..self.count.read() as usize {
                let held = bound.holds(self.key(scratch, slot), scratch.positions[self.place(slot)]);
                within += u32::cast_from(held);
            }
            if total(within, self.plan.plane) >= comptime!(self.plan.keep as u32) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        high
    }

    /// Drops what `bound` does not hold. What is left fills the lists slot by slot. An entry never moves to a later slot, so that one barrier
    /// between reading a slot and writing will do.
    fn retain(&self, scratch: &mut Scratch, bound: Bound) {
        let mut left = 0u32;
        let before = (1u32 << self.lane as u32) - 1;
        for slot in 0..comptime!(self.plan.slots()) {
            let place = self.place(slot);
            let mut held = false;
            let mut score = 0u32;
            let mut position = 0u32;
            if (slot as u32) < self.count.read() {
                score = scratch.keys[place];
                position = scratch.positions[place];
                held = bound.holds(order_key(f32::reinterpret(score)), position);
            }
            let ballot = plane_ballot(held)[0];
            sync_plane();
            if held {
                let to = self.first + (left + (ballot & before).count_ones()) as usize;
                scratch.keys[to] = score;
                scratch.positions[to] = position;
            }
            left += ballot.count_ones();
        }
        sync_plane();
        let units = comptime!(self.plan.plane as u32);
        self.count.store(left / units + u32::cast_from((self.lane as u32) < left % units));
    }
}

/// A bisection: `held` candidates, no fewer than are kept, have order key `high` or a smaller one; `below`, fewer than are kept, one
/// smaller than `low`.
#[derive(CubeType)]
pub(super) struct Search {
    low: RuntimeCell<u32>,
    pub high: RuntimeCell<u32>,
    pub held: RuntimeCell<u32>,
    below: RuntimeCell<u32>,
    #[cube(comptime)]
    keep: u32,
    #[cube(comptime)]
    cuts: usize,
}

#[cube]
impl Search {
    /// Of `held` candidates from `low` to `high`, `keep` of which are wanted.
    pub fn new(low: u32, high: u32, held: u32, #[comptime] keep: u32, #[comptime] cuts: usize) -> Search {
        Search {
            low: RuntimeCell::new(low),
            high: RuntimeCell::new(high),
            held: RuntimeCell::new(held),
            below: RuntimeCell::new(0u32),
            keep,
            cuts,
        }
    }

    /// Whether more than `most` are held, and not all that are too many are equal.
    pub fn goes_on(&self, #[comptime] most: u32) -> bool {
        self.low.read() < self.high.read() && self.held.read() > most
    }

    /// Where the range is cut, ascending: at even distances, or around where evenly spread order keys would leave `wanted`.
    pub fn middles(&self, halve: bool, #[comptime] wanted: f32) -> Array<u32> {
        let mut middles = Array::<u32>::new(self.cuts);
        let span = f32::cast_from(self.high.read() - self.low.read());
        let last = self.high.read() - 1;
        let below = f32::cast_from(self.below.read());
        let share = (wanted - below) / (f32::cast_from(self.held.read()) - below);
        #[unroll]
        for cut in 0..self.cuts {
            let part = comptime!((cut + 1) as f32 / (self.cuts + 1) as f32);
            let around = share + comptime!((part - 0.5) / 2.0);
            let at = span * select_value(halve, part, min(max(around, 0.0), 1.0));
            middles[cut] = min(self.low.read() + u32::cast_from(at), last);
        }
        middles
    }

    /// Takes the part in which the bound lies; `within` has how many are at each of the middles or before it.
    pub fn narrow(&self, middles: &Array<u32>, within: u32) {
        #[unroll]
        for cut in 0..self.cuts {
            let mut count = within;
            if comptime!(self.cuts > 1) {
                count = (within >> comptime!(BITS * cut as u32)) % comptime!(1u32 << BITS);
            }
            let middle = middles[cut];
            if middle >= self.low.read() && middle < self.high.read() {
                if count >= self.keep {
                    self.high.store(middle);
                    self.held.store(count);
                } else {
                    self.low.store(middle + 1);
                    self.below.store(count);
                }
            }
        }
    }
}
