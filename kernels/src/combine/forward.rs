//! The best `top_m` of a head's `top_m²` pairs of kept keys, with one score per core.
//!
//! One cube takes one head of one token: it brings the kept score vectors into shared memory, computes the total of a pair
//! from them whenever the selection asks for it (the grid is never stored), and sorts what is kept. Reads `2 · top_m` score vectors and keys, writes
//! `top_m` slots and `top_m · cores` scores.

use cubecl::prelude::*;

use crate::select::{Candidates, CandidatesExpand, Scratch, lane_of, order_key, select};

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
    pub units: usize,
}

/// Pairs of kept keys in the order of their slots; the total of `(a, b)` is `left[a] · right[b]` or `left[a] + right[b]`.
#[derive(CubeType)]
pub(crate) struct Pairs {
    /// Row side, `[top_m, rank]`, multiplied by the summed core.
    left: SharedMemory<f32>,
    /// Column side, `[top_m, rank]`.
    right: SharedMemory<f32>,
    /// The pairs that are looked at, as `a · top_m + b`; empty where all are.
    undominated: SharedMemory<u32>,
    #[cube(comptime)]
    plan: CombinePlan,
}

#[cube]
impl Pairs {
    fn pair(&self, position: usize) -> usize {
        let mut pair = position;
        if comptime!(self.plan.additive) {
            pair = self.undominated[position] as usize;
        }
        pair
    }

    /// The total. A product and fused multiply-adds in one fixed order: the same bits wherever it is computed.
    fn total(&self, position: usize) -> f32 {
        let pair = self.pair(position);
        let a = pair / self.plan.top_m * self.plan.rank;
        let b = pair % self.plan.top_m * self.plan.rank;
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

/// One cube a token and head; `CUBE_POS` is `token · heads + head`.
#[cube(launch_unchecked)]
pub(crate) fn combine_kernel(
    kept_keys: &Array<u32>,
    kept_scores: &Array<f32>,
    core: &Array<f32>,
    slots: &mut Array<u32>,
    scores: &mut Array<f32>,
    cubes: u32,
    #[comptime] plan: CombinePlan,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let side = comptime!(plan.top_m * plan.rank);
    let head = CUBE_POS % plan.heads;
    let mut rows = SharedMemory::<f32>::new(side);
    let mut left = SharedMemory::<f32>::new(side);
    let mut right = SharedMemory::<f32>::new(side);
    let mut undominated = SharedMemory::<u32>::new(comptime!(if plan.additive { plan.pairs } else { 1 }));
    let mut kept = SharedMemory::<u32>::new(plan.top_m);
    let mut totals = SharedMemory::<f32>::new(plan.top_m);
    let mut scratch = Scratch::new(1usize, plan.units);

    let first = CUBE_POS * 2 * side;
    for i in range_stepped(UNIT_POS as usize, side, plan.units) {
        rows[i] = kept_scores[first + i];
        right[i] = kept_scores[first + side + i];
    }
    sync_cube();
    for i in range_stepped(UNIT_POS as usize, side, plan.units) {
        left[i] = if plan.additive { rows[i] } else { through_summed_core(&rows, core, head, i, plan) };
    }
    if comptime!(plan.additive) {
        list_undominated(&rows, &right, &mut undominated, plan);
    }
    sync_cube();
    let pairs = Pairs { left, right, undominated, plan };
    let at = lane_of(1usize, plan.units);
    select::<Pairs>(&pairs, plan.pairs, at, &mut kept, &mut scratch, plan.top_m);

    for i in range_stepped(UNIT_POS as usize, plan.top_m, plan.units) {
        totals[i] = pairs.total(kept[i] as usize);
    }
    sync_cube();
    let out = CUBE_POS * plan.top_m;
    for i in range_stepped(UNIT_POS as usize, plan.top_m, plan.units) {
        let pair = pairs.pair(kept[i] as usize);
        let a = pair / plan.top_m;
        let b = pair % plan.top_m;
        let place = out + rank_among(&totals, i, plan.top_m);
        let keys = CUBE_POS * 2 * plan.top_m;
        slots[place] = kept_keys[keys + a] * comptime!(plan.side_keys as u32) + kept_keys[keys + plan.top_m + b];
        if comptime!(plan.additive) {
            scores[place] = softmax_weight(&totals, i, plan.top_m);
        } else {
            for k in 0..plan.cores {
                let of_core = (k * plan.heads + head) * comptime!(plan.rank * plan.rank);
                scores[place * plan.cores + k] = core_score(&rows, &pairs.right, core, of_core, a, b, plan.rank);
            }
        }
    }
}

/// Entry `i = a · rank + σ` of `rows · Σ_k C_k`.
#[cube]
fn through_summed_core(
    rows: &SharedMemory<f32>,
    core: &Array<f32>,
    head: usize,
    i: usize,
    #[comptime] plan: CombinePlan,
) -> f32 {
    let a = i / plan.rank * plan.rank;
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

/// `s_k = S_row[a]ᵀ · C_k · S_col[b]`.
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
            through += core[of_core + rho * rank + sigma] * columns[b * rank + sigma];
        }
        score += rows[a * rank + rho] * through;
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
    #[comptime] plan: CombinePlan,
) {
    let mut row_partners = SharedMemory::<u32>::new(plan.top_m);
    let mut column_ranks = SharedMemory::<u32>::new(plan.top_m);
    for i in range_stepped(UNIT_POS as usize, plan.top_m, plan.units) {
        row_partners[i] = (plan.top_m / (rank_among(rows, i, plan.top_m) + 1)) as u32;
        column_ranks[i] = rank_among(columns, i, plan.top_m) as u32;
    }
    sync_cube();
    for a in range_stepped(UNIT_POS as usize, plan.top_m, plan.units) {
        let mut out = 0u32;
        for before in 0..a {
            out += row_partners[before];
        }
        for b in 0..plan.top_m {
            if column_ranks[b] < row_partners[a] {
                undominated[out as usize] = (a * plan.top_m + b) as u32;
                out += 1;
            }
        }
    }
}

/// How many of `count` scores come before score `i` in the defined order.
#[cube]
fn rank_among(scores: &SharedMemory<f32>, i: usize, #[comptime] count: usize) -> usize {
    let own = order_key(scores[i]);
    let mut rank = 0u32;
    for other in 0..count {
        let key = order_key(scores[other]);
        rank += u32::cast_from(key < own || (key == own && other < i));
    }
    rank as usize
}

/// `exp(totals[i]) / Σ exp(totals)`, against the largest for range.
#[cube]
fn softmax_weight(totals: &SharedMemory<f32>, i: usize, #[comptime] count: usize) -> f32 {
    let mut largest = totals[0];
    for other in 1..count {
        largest = max(largest, totals[other]);
    }
    let mut sum = 0.0f32;
    for other in 0..count {
        sum += f32::exp(totals[other] - largest);
    }
    f32::exp(totals[i] - largest) / sum
}
