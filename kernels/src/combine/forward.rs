//! The best `top_m` of a head's `top_m²` pairs of kept keys, with one score per core.
//!
//! One cube takes a tile of rows, a row being one head of one token: it brings the kept score vectors into shared memory, selects among
//! the totals of its pairs, and sorts what is kept. The grid of totals stays in shared memory, or is computed anew in each pass where it does not fit. Reads `2 · top_m` score vectors and keys, writes
//! `top_m` slots and `top_m · cores` scores.

use cubecl::prelude::*;

use crate::select::{Candidates, CandidatesExpand, Lane, Scratch, Stored, lane_of, order_key, select};

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct CombinePlan {
    pub heads: usize,
    pub side_keys: usize,
    pub top_m: usize,
    pub rank: usize,
    pub cores: usize,
    /// Pairs that are looked at: all `top_m²` for a Tucker core, the undominated ones for additive scores.
    pub pairs: usize,
    /// Product keys: the total is the sum of the sides, and a softmax runs over the kept.
    pub additive: bool,
    /// Whether the pairs' order keys are kept in shared memory, or computed anew in each pass of the selection.
    pub stored: bool,
    /// Rows of a cube.
    pub tile: usize,
    pub units: usize,
}

/// Pairs of kept keys in the order of their slots; the total of `(a, b)` is `left[a] · right[b]` or `left[a] + right[b]`.
#[derive(CubeType)]
pub(crate) struct Pairs {
    /// Row side, `[tile, top_m, rank]`, multiplied by the summed core.
    left: SharedMemory<f32>,
    /// Column side, `[tile, top_m, rank]`.
    right: SharedMemory<f32>,
    /// The pairs that are looked at, `[tile, pairs]`, as `a · top_m + b`; empty where all are.
    undominated: SharedMemory<u32>,
    row: usize,
    #[cube(comptime)]
    plan: CombinePlan,
}

#[cube]
impl Pairs {
    fn pair(&self, position: usize) -> usize {
        let mut pair = position;
        if comptime!(self.plan.additive) {
            pair = self.undominated[self.row * self.plan.pairs + position] as usize;
        }
        pair
    }

    /// The total. A product and fused multiply-adds in one fixed order: the same bits wherever it is computed.
    fn total(&self, position: usize) -> f32 {
        let pair = self.pair(position);
        let first = self.row * comptime!(self.plan.top_m * self.plan.rank);
        let a = first + pair / self.plan.top_m * self.plan.rank;
        let b = first + pair % self.plan.top_m * self.plan.rank;
        let mut total = self.left[a] * self.right[b];
        if comptime!(self.plan.additive) {
            total = self.left[a] + self.right[b];
        } else {
            #[unroll]
            for rho in 1..self.plan.rank {
                total = fma(self.left[a + rho], self.right[b + rho], total);
            }
        }
        total
    }
}

#[cube]
impl Candidates for Pairs {
    fn key(&self, position: usize) -> u32 {
        order_key(self.total(position))
    }
}

/// `CUBE_POS` counts tiles of rows, a row being `token · heads + head`.
#[cube(launch_unchecked)]
pub(crate) fn combine_kernel(
    kept_keys: &Array<u32>,
    kept_scores: &Array<f32>,
    core: &Array<f32>,
    slots: &mut Array<u32>,
    scores: &mut Array<f32>,
    rows: u32,
    #[comptime] plan: CombinePlan,
) {
    let side = comptime!(plan.top_m * plan.rank);
    let at = lane_of(plan.tile, plan.units);
    let row = CUBE_POS * plan.tile + at.row;
    if CUBE_POS * plan.tile >= rows as usize {
        terminate!();
    }
    // A row past the last one computes the last one again and writes nothing.
    let source = min(row, rows as usize - 1);
    let head = source % plan.heads;
    let mut own = SharedMemory::<f32>::new(comptime!(plan.tile * side));
    let mut left = SharedMemory::<f32>::new(comptime!(plan.tile * side));
    let mut right = SharedMemory::<f32>::new(comptime!(plan.tile * side));
    let listed = comptime!(if plan.additive { plan.tile * plan.pairs } else { 1 });
    let mut undominated = SharedMemory::<u32>::new(listed);
    let mut kept = SharedMemory::<u32>::new(comptime!(plan.tile * plan.top_m));
    let mut totals = SharedMemory::<f32>::new(comptime!(plan.tile * plan.top_m));
    let mut scratch = Scratch::new(plan.tile, at.lanes);

    for i in range_stepped(at.lane, side, at.lanes) {
        own[at.row * side + i] = kept_scores[source * 2 * side + i];
        right[at.row * side + i] = kept_scores[(source * 2 + 1) * side + i];
    }
    sync_cube();
    for i in range_stepped(at.lane, side, at.lanes) {
        left[at.row * side + i] = if plan.additive {
            own[at.row * side + i]
        } else {
            through_summed_core(&own, core, at.row * side, head, i, plan)
        };
    }
    if comptime!(plan.additive) {
        list_undominated(&own, &right, &mut undominated, at, plan);
    }
    sync_cube();
    let pairs = Pairs { left, right, undominated, row: at.row, plan };
    if comptime!(plan.stored) {
        let mut keys = SharedMemory::<u32>::new(comptime!(plan.tile * plan.pairs));
        for position in range_stepped(at.lane, plan.pairs, at.lanes) {
            keys[at.row * plan.pairs + position] = pairs.key(position);
        }
        sync_cube();
        let grid = Stored { keys, first: at.row * plan.pairs };
        select::<Stored>(&grid, plan.pairs, at, &mut kept, &mut scratch, plan.top_m);
    } else {
        select::<Pairs>(&pairs, plan.pairs, at, &mut kept, &mut scratch, plan.top_m);
    }

    let first = at.row * plan.top_m;
    for i in range_stepped(at.lane, plan.top_m, at.lanes) {
        totals[first + i] = pairs.total(kept[first + i] as usize);
    }
    sync_cube();
    if row < rows as usize {
        for i in range_stepped(at.lane, plan.top_m, at.lanes) {
            let pair = pairs.pair(kept[first + i] as usize);
            let a = pair / plan.top_m;
            let b = pair % plan.top_m;
            let place = row * plan.top_m + rank_among(&totals, first, i, plan.top_m);
            let keys = row * 2 * plan.top_m;
            slots[place] = kept_keys[keys + a] * comptime!(plan.side_keys as u32) + kept_keys[keys + plan.top_m + b];
            if comptime!(plan.additive) {
                scores[place] = softmax_weight(&totals, first, i, plan.top_m);
            } else {
                for k in 0..plan.cores {
                    let of_core = (k * plan.heads + head) * comptime!(plan.rank * plan.rank);
                    let (a, b) = (at.row * side + a * plan.rank, at.row * side + b * plan.rank);
                    scores[place * plan.cores + k] = core_score(&own, &pairs.right, core, of_core, a, b, plan.rank);
                }
            }
        }
    }
}

/// Entry `i = a · rank + σ` of `rows · Σ_k C_k`, the rows starting at `first`.
#[cube]
fn through_summed_core(
    rows: &SharedMemory<f32>,
    core: &Array<f32>,
    first: usize,
    head: usize,
    i: usize,
    #[comptime] plan: CombinePlan,
) -> f32 {
    let a = first + i / plan.rank * plan.rank;
    let mut sum = 0.0f32;
    for rho in 0..plan.rank {
        let mut summed = 0.0f32;
        for k in 0..plan.cores {
            summed += core[((k * plan.heads + head) * plan.rank + rho) * plan.rank + i % plan.rank];
        }
        sum += rows[a + rho] * summed;
    }
    sum
}

/// `s_k = S_rowᵀ · C_k · S_col` for the score vectors at `a` and `b` and the core at `of_core`.
#[cube]
fn core_score(
    rows: &SharedMemory<f32>,
    columns: &SharedMemory<f32>,
    core: &Array<f32>,
    of_core: usize,
    a: usize,
    b: usize,
    #[comptime] rank: usize,
) -> f32 {
    let mut score = 0.0f32;
    for rho in 0..rank {
        let mut through = 0.0f32;
        for sigma in 0..rank {
            through += core[of_core + rho * rank + sigma] * columns[b + sigma];
        }
        score += rows[a + rho] * through;
    }
    score
}

/// Lists the pairs that can be among the best `top_m` of an additive score, in slot order.
///
/// With each side ranked by score, then key, the pair at ranks `(x, y)` follows `(x + 1)(y + 1) - 1` pairs, so it can be kept only if
/// `(x + 1)(y + 1) <= top_m`: about `top_m · ln(top_m)` of the `top_m²` pairs. Whoever ranks `x` on the row side goes with the
/// `top_m / (x + 1)` best of the column side.
#[cube]
fn list_undominated(
    rows: &SharedMemory<f32>,
    columns: &SharedMemory<f32>,
    undominated: &mut SharedMemory<u32>,
    at: Lane,
    #[comptime] plan: CombinePlan,
) {
    let first = at.row * plan.top_m;
    let mut row_partners = SharedMemory::<u32>::new(comptime!(plan.tile * plan.top_m));
    let mut column_ranks = SharedMemory::<u32>::new(comptime!(plan.tile * plan.top_m));
    for i in range_stepped(at.lane, plan.top_m, at.lanes) {
        row_partners[first + i] = (plan.top_m / (rank_among(rows, first, i, plan.top_m) + 1)) as u32;
        column_ranks[first + i] = rank_among(columns, first, i, plan.top_m) as u32;
    }
    sync_cube();
    for a in range_stepped(at.lane, plan.top_m, at.lanes) {
        let mut out = at.row * plan.pairs;
        for before in 0..a {
            out += row_partners[first + before] as usize;
        }
        for b in 0..plan.top_m {
            if column_ranks[first + b] < row_partners[first + a] {
                undominated[out] = (a * plan.top_m + b) as u32;
                out += 1;
            }
        }
    }
}

/// How many of the `count` scores from `first` on come before score `i` in the defined order.
#[cube]
fn rank_among(scores: &SharedMemory<f32>, first: usize, i: usize, #[comptime] count: usize) -> usize {
    let own = order_key(scores[first + i]);
    let mut rank = 0u32;
    for other in 0..count {
        let key = order_key(scores[first + other]);
        rank += u32::cast_from(key < own || (key == own && other < i));
    }
    rank as usize
}

/// `exp(totals[i]) / Σ exp(totals)` over the `count` totals from `first` on, against the largest for range.
#[cube]
fn softmax_weight(totals: &SharedMemory<f32>, first: usize, i: usize, #[comptime] count: usize) -> f32 {
    let mut largest = totals[first];
    for other in 1..count {
        largest = max(largest, totals[first + other]);
    }
    let mut sum = 0.0f32;
    for other in 0..count {
        sum += f32::exp(totals[first + other] - largest);
    }
    f32::exp(totals[first + i] - largest) / sum
}
