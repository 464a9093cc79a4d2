//! Exact top-m of a row of scores, in the defined order: larger score first, equal scores by smaller position, NaN never
//! before a number.
//!
//! Rows are worked on side by side: a cube of `rows · lanes` units gives each row `lanes` of them. Two ways to the same result:
//!
//! - [`threshold`]: a plane, or several for a share each, goes through a row once and lists what can still be among the best. Where the units of a plane can exchange
//!   numbers through shared memory.
//! - [`digits`]: a radix select over the digits of order keys, without plane operations. A lane alone needs no barrier.

#![expect(missing_docs, reason = "CubeCL's macros document nothing of what they make of a public function")]

mod digits;
pub(crate) mod held;
pub(crate) mod sort;
pub(crate) mod threshold;
pub(crate) mod top_m;

use cubecl::prelude::*;

use self::sort::{sort_pairs, sort_positions};
use crate::launch::device::Device;
use crate::launch::loops::strided;

/// Order keys that are read at a time.
pub(crate) type Four = Const<4>;
pub(crate) const FOUR: usize = 4;
/// The order key of no candidate at all, which fills up a row's last vector. A NaN's is one less.
pub(crate) const NOTHING: u32 = u32::MAX;
pub(crate) const NAN_KEY: u32 = u32::MAX - 1;

/// Maps a score to a key whose ascending order is the order of selection: larger scores have smaller keys, both zeros
/// have one key, every NaN has the last.
#[cube]
pub fn order_key(score: f32) -> u32 {
    let bits = u32::reinterpret(score);
    let magnitude = bits & 0x7fff_ffffu32;
    let mut key = 0x7fff_ffffu32 - magnitude;
    if bits > 0x8000_0000u32 {
        key = bits;
    }
    if magnitude > 0x7f80_0000u32 {
        key = NAN_KEY.runtime();
    }
    key
}

/// The score behind an order key: a zero without its sign, a NaN without its payload.
#[cube]
pub(crate) fn score_of(key: u32) -> f32 {
    let mut bits = 0x7fff_ffffu32 - key;
    if key > 0x7fff_ffffu32 {
        bits = key;
    }
    f32::reinterpret(bits)
}

/// The score of no candidate: a NaN.
#[cube]
pub(crate) fn no_score() -> f32 {
    // A number that is known when the kernel is compiled has no bits to take.
    let mut bits = 0u32;
    bits += NOTHING;
    f32::reinterpret(bits)
}

/// A row of candidates, addressed by position, four at a time.
#[cube]
pub(crate) trait Candidates {
    /// The order keys of the candidates at `4 · vector` and after; [`NOTHING`] past the last. Must give the same bits each time.
    fn keys(&self, vector: usize) -> Vector<u32, Four>;

    /// Their scores; NaN past the last.
    fn scores(&self, vector: usize) -> Vector<f32, Four>;
}

/// The order key of one candidate.
#[cube]
pub(crate) fn key_at<C: Candidates>(candidates: &C, position: usize) -> u32 {
    let keys = candidates.keys(position / FOUR);
    let mut key = keys[0];
    #[unroll]
    for n in 1..FOUR {
        if position % FOUR == n {
            key = keys[n];
        }
    }
    key
}

/// Candidates whose order keys lie in shared memory, from vector `first` on.
#[derive(CubeType)]
pub(crate) struct Stored {
    pub keys: SharedMemory<Vector<u32, Four>>,
    pub first: usize,
}

#[cube]
impl Candidates for Stored {
    fn keys(&self, vector: usize) -> Vector<u32, Four> {
        self.keys[self.first + vector]
    }

    fn scores(&self, vector: usize) -> Vector<f32, Four> {
        let keys = self.keys[self.first + vector];
        let mut scores = Vector::<f32, Four>::new(0.0);
        #[unroll]
        for n in 0..FOUR {
            scores[n] = score_of(keys[n]);
        }
        scores
    }
}

/// Where a unit stands: its row in the cube and its place among the row's lanes.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Lane {
    pub row: usize,
    pub lane: usize,
    #[cube(comptime)]
    pub lanes: usize,
    /// Units of a plane whose units exchange through shared memory, or 0.
    #[cube(comptime)]
    pub plane: usize,
}

/// The unit's row and lane in a cube of `units` that gives `units / rows` lanes to each row.
#[cube]
pub(crate) fn lane_of(#[comptime] rows: usize, #[comptime] units: usize) -> Lane {
    let lanes = comptime!(units / rows);
    Lane { row: UNIT_POS as usize / lanes, lane: UNIT_POS as usize % lanes, lanes, plane: 0usize }
}

/// The same for rows that are selected from.
#[cube]
pub(crate) fn select_lane(#[comptime] plan: SelectPlan) -> Lane {
    let lanes = plan.lanes;
    Lane { row: UNIT_POS as usize / lanes, lane: UNIT_POS as usize % lanes, lanes, plane: plan.plane }
}

/// Lanes that share a row of `vectors` vectors: whole sectors in a few loads side by side.
pub(crate) fn row_lanes(device: &Device, vectors: usize) -> usize {
    if device.on_cpu { 1 } else { vectors.min(ROW_LANES).next_power_of_two() }
}

const ROW_LANES: usize = 8;

/// The sum of what a row's lanes have each, the same for all of them. With several lanes all units of the cube come here together, with
/// `partial` of a number for each.
#[cube]
pub(crate) fn lane_sum(own: f32, partial: &mut SharedMemory<f32>, at: Lane) -> f32 {
    let mut sum = own;
    if comptime!(at.lanes > 1) {
        partial[UNIT_POS as usize] = own;
        sync_cube();
        sum = 0.0;
        for lane in 0..at.lanes {
            sum += partial[at.row * at.lanes + lane];
        }
        sync_cube();
    }
    sum
}

/// How rows of a cube are selected from: what is fixed when a kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct SelectPlan {
    /// Rows of a cube.
    pub rows: usize,
    /// Units of a row.
    pub lanes: usize,
    /// Candidates that a row keeps.
    pub keep: usize,
    /// Units of a plane that selects, one of a row's or several; 0 where lanes go by digits.
    pub plane: usize,
    /// Candidates that a lane of a plane can list at least before it has to bisect again.
    pub free: usize,
    /// Candidates of a row that is put in order of positions by a mark for each; 0 where rows are put in order by comparing.
    pub marked: usize,
}

/// Enough for two or three bisections of a long row.
const FREE: usize = 12;

impl SelectPlan {
    /// The plan of cubes of `rows · lanes` units: by planes where each row has whole ones, of `plane` units.
    pub fn new(rows: usize, lanes: usize, keep: usize, plane: usize) -> Self {
        let plane = if plane > 0 && lanes.is_multiple_of(plane) { plane } else { 0 };
        Self { rows, lanes, keep, plane, free: FREE, marked: 0 }
    }

    /// Bytes of [`Scratch`].
    pub fn bytes(&self) -> usize {
        4 * (self.atomics() + 2 * self.sums() + threshold::shares(self) + 2 * threshold::entries(self))
    }

    /// Loop iterations of a lane in [`select`], among candidates in `vectors` vectors.
    pub fn loops(&self, vectors: usize) -> usize {
        if self.plane == 0 {
            return digits::loops(vectors, self.lanes);
        }
        threshold::loops(self, vectors) + self.sort_loops(self.keep) + strided(self.keep, self.plane)
    }

    /// Loop iterations of a lane in [`sort_pairs`].
    pub fn sort_loops(&self, count: usize) -> usize {
        sort::loops(count, self.lanes, self.plane)
    }

    /// Words of bins or marks.
    fn atomics(&self) -> usize {
        digits::bins(self).max(self.rows * sort::marks(self))
    }

    /// Words of what lanes count.
    fn sums(&self) -> usize {
        if self.lanes == 1 || self.plane > 0 { 1 } else { self.rows * self.lanes }
    }
}

/// Shared memory of [`select`].
#[derive(CubeType)]
pub(crate) struct Scratch {
    /// `[rows, PASSES, BINS]`, or a row's marks.
    bins: SharedMemory<Atomic<u32>>,
    /// `[rows, lanes]`: a lane's candidates before the threshold, and at it.
    better: SharedMemory<u32>,
    equal: SharedMemory<u32>,
    /// `[rows, planes, slots, plane]`: scores, as bits, and positions of what can still be among the best.
    pub keys: SharedMemory<u32>,
    pub positions: SharedMemory<u32>,
    /// `[rows, planes]`: how many each plane of a row has left.
    shares: SharedMemory<u32>,
    #[cube(comptime)]
    plan: SelectPlan,
}

#[cube]
impl Scratch {
    pub fn new(#[comptime] plan: SelectPlan) -> Scratch {
        Scratch {
            bins: SharedMemory::new(comptime!(plan.atomics())),
            better: SharedMemory::new(comptime!(plan.sums())),
            equal: SharedMemory::new(comptime!(plan.sums())),
            keys: SharedMemory::new(comptime!(threshold::entries(&plan))),
            positions: SharedMemory::new(comptime!(threshold::entries(&plan))),
            shares: SharedMemory::new(comptime!(threshold::shares(&plan))),
            plan,
        }
    }
}

/// Writes the positions of the best of each row's candidates, given in `vectors` vectors, to `kept[row · keep ..]`, ascending.
///
/// There are at least `keep` candidates. All units of the cube come here together, where rows have several lanes; ends with a barrier.
#[cube]
pub(crate) fn select<C: Candidates>(
    candidates: &C,
    vectors: usize,
    at: Lane,
    kept: &mut SharedMemory<u32>,
    scratch: &mut Scratch,
) {
    let plan = comptime!(scratch.plan);
    if comptime!(plan.plane > 0) {
        let first = threshold::best::<C>(candidates, vectors, at, scratch);
        if at.lane < plan.plane {
            let plane = plane_of(at, plan);
            if comptime!(sort::marks(&plan) > 0) {
                sort_positions(&scratch.positions, &scratch.bins, first, kept, plane, plan);
            } else {
                sort_pairs(&mut scratch.positions, &mut scratch.keys, first, plane, plan.keep);
                for i in range_stepped(at.lane, plan.keep, plan.plane) {
                    kept[at.row * plan.keep + i] = scratch.positions[first + i];
                }
            }
        }
        sync_cube();
    } else {
        digits::select::<C>(candidates, vectors, at, kept, scratch, plan.keep);
    }
}

/// The same from the best on, with their order keys in `keys[row · keep ..]`.
#[cube]
pub(crate) fn select_sorted<C: Candidates>(
    candidates: &C,
    vectors: usize,
    at: Lane,
    keys: &mut SharedMemory<u32>,
    kept: &mut SharedMemory<u32>,
    scratch: &mut Scratch,
) {
    let plan = comptime!(scratch.plan);
    let row = at.row * plan.keep;
    if comptime!(plan.plane > 0) {
        let first = threshold::best::<C>(candidates, vectors, at, scratch);
        if at.lane < plan.plane {
            let plane = plane_of(at, plan);
            for i in range_stepped(at.lane, plan.keep, plan.plane) {
                scratch.keys[first + i] = order_key(f32::reinterpret(scratch.keys[first + i]));
            }
            sync_plane();
            sort_pairs(&mut scratch.keys, &mut scratch.positions, first, plane, plan.keep);
            for i in range_stepped(at.lane, plan.keep, plan.plane) {
                keys[row + i] = scratch.keys[first + i];
                kept[row + i] = scratch.positions[first + i];
            }
        }
        sync_cube();
    } else {
        digits::select::<C>(candidates, vectors, at, kept, scratch, plan.keep);
        for i in range_stepped(at.lane, plan.keep, at.lanes) {
            keys[row + i] = key_at::<C>(candidates, kept[row + i] as usize);
        }
        sync_cube();
        sort_pairs(keys, kept, row, at, plan.keep);
    }
}

/// The place among the units of a row's plane.
#[cube]
fn plane_of(at: Lane, #[comptime] plan: SelectPlan) -> Lane {
    Lane { row: at.row, lane: at.lane, lanes: plan.plane, plane: plan.plane }
}

/// The sum of what the row's lanes before this one have. With several lanes all units of the cube come here together.
#[cube]
pub(crate) fn lanes_before(own: u32, scratch: &mut Scratch, at: Lane) -> u32 {
    let mut before = 0u32;
    if comptime!(at.lanes == at.plane) {
        before = plane_exclusive_sum(own);
    } else if comptime!(at.plane > 0) {
        let mut sums = SharedMemory::<u32>::new(comptime!(scratch.plan.rows * at.lanes));
        sums[at.row * at.lanes + at.lane] = own;
        sync_cube();
        before = sum_before(&sums, at);
    } else if comptime!(at.lanes > 1) {
        scratch.better[at.row * at.lanes + at.lane] = own;
        sync_cube();
        before = sum_before(&scratch.better, at);
    }
    before
}

/// Sum of what the row's lanes before this one have written.
#[cube]
fn sum_before(sums: &SharedMemory<u32>, at: Lane) -> u32 {
    let mut sum = 0u32;
    for lane in 0..at.lane {
        sum += sums[at.row * at.lanes + lane];
    }
    sum
}
