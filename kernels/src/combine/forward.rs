//! The best `top_m` of a head's `top_m²` pairs of kept keys, with one score per core.
//!
//! One cube takes a tile of rows, a row being one head of one token. It brings the row side through the summed core into shared
//! memory, selects among the totals of the pairs, and sorts what is kept. The grid of totals stays in shared memory, or is computed
//! anew in each pass of the selection where it does not fit or would leave room for too few rows. Reads `2 · top_m` keys and score vectors, writes `top_m` slots and
//! `top_m · cores` scores.

use cubecl::prelude::*;

use crate::select::{
    Candidates, CandidatesExpand, FOUR, Four, Lane, NOTHING, Scratch, Stored, key_at, lane_of, order_key, score_of,
    select,
};

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct CombinePlan {
    pub heads: usize,
    pub side_keys: usize,
    pub top_m: usize,
    pub rank: usize,
    pub cores: usize,
    /// Positions that are looked at: for a Tucker core every pair, each row of the grid filled up to whole vectors; for additive scores
    /// the undominated pairs.
    pub pairs: usize,
    /// Product keys: the total is the sum of the sides, and a softmax runs over the kept.
    pub additive: bool,
    /// Whether the pairs' order keys are kept in shared memory.
    pub stored: bool,
    /// Rows of a cube.
    pub tile: usize,
    pub units: usize,
}

/// Pairs of kept keys in the order of their slots; the total of `(a, b)` is `left[a] · right[b]` or `left[a] + right[b]`.
#[derive(CubeType)]
struct Pairs {
    /// Row side, `[tile, top_m, rank]`, through the summed core.
    left: SharedMemory<f32>,
    /// Column side, `[tile, rank, top_m]`, each ρ filled up to whole vectors.
    right: SharedMemory<Vector<f32, Four>>,
    /// Product keys: the pairs that are looked at, `[tile, pairs]`, as `a · top_m + b`, and their column side, `[tile, top_m]`.
    undominated: SharedMemory<u32>,
    columns: SharedMemory<f32>,
    row: usize,
    #[cube(comptime)]
    plan: CombinePlan,
}

#[cube]
impl Pairs {
    /// The pair at a position, as `a · top_m + b`.
    fn pair(&self, position: usize) -> usize {
        let padded = comptime!(self.plan.top_m.next_multiple_of(FOUR));
        let mut pair = position / padded * self.plan.top_m + position % padded;
        if comptime!(self.plan.additive) {
            pair = self.undominated[self.row * self.plan.pairs + position] as usize;
        }
        pair
    }

    /// Sums of the sides of four listed pairs.
    fn additive_keys(&self, vector: usize) -> Vector<u32, Four> {
        let mut keys = Vector::<u32, Four>::new(NOTHING);
        #[unroll]
        for n in 0..FOUR {
            let position = vector * FOUR + n;
            if position < self.plan.pairs {
                let pair = self.pair(position);
                let a = self.row * self.plan.top_m + pair / self.plan.top_m;
                let b = self.row * self.plan.top_m + pair % self.plan.top_m;
                keys[n] = order_key(self.left[a] + self.columns[b]);
            }
        }
        keys
    }

    /// Bilinear totals of four neighbours in a row of the grid. A product and fused multiply-adds in one fixed order: the same
    /// bits wherever they are computed.
    fn bilinear_keys(&self, vector: usize) -> Vector<u32, Four> {
        let line = comptime!(self.plan.top_m.div_ceil(FOUR));
        let a = (self.row * self.plan.top_m + vector / line) * self.plan.rank;
        let b = self.row * comptime!(self.plan.rank * line) + vector % line;
        let mut totals = Vector::<f32, Four>::new(self.left[a]) * self.right[b];
        #[unroll]
        for rho in 1..self.plan.rank {
            totals = fma(Vector::new(self.left[a + rho]), self.right[b + rho * line], totals);
        }
        let mut keys = Vector::<u32, Four>::new(NOTHING);
        #[unroll]
        for n in 0..FOUR {
            if vector % line * FOUR + n < self.plan.top_m {
                keys[n] = order_key(totals[n]);
            }
        }
        keys
    }
}

#[cube]
impl Candidates for Pairs {
    fn keys(&self, vector: usize) -> Vector<u32, Four> {
        if comptime!(self.plan.additive) { self.additive_keys(vector) } else { self.bilinear_keys(vector) }
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
    if CUBE_POS * plan.tile >= rows as usize {
        terminate!();
    }
    let at = lane_of(plan.tile, plan.units);
    let row = CUBE_POS * plan.tile + at.row;
    // A row past the last one computes the last one again and writes nothing.
    let source = min(row, rows as usize - 1);
    let place = Row { source, out: row, rows: rows as usize, head: source % plan.heads };
    choose_pairs(&kept_keys.to_slice(), &kept_scores.to_slice(), core, slots, scores, place, at, plan);
}

/// A row of pairs: where its sides lie among the kept, and where its result goes.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Row {
    /// Counts pairs of sides in the lists of kept keys.
    pub source: usize,
    /// `token · heads + head`; nothing is written where it is `rows` or more.
    pub out: usize,
    pub rows: usize,
    pub head: usize,
}

/// The best `top_m` pairs of each row of the cube, sorted, with their scores.
#[cube]
pub(crate) fn choose_pairs(
    kept_keys: &Slice<u32>,
    kept_scores: &Slice<f32>,
    core: &Array<f32>,
    slots: &mut Array<u32>,
    scores: &mut Array<f32>,
    row: Row,
    at: Lane,
    #[comptime] plan: CombinePlan,
) {
    let mut kept = SharedMemory::<u32>::new(comptime!(plan.tile * plan.top_m));
    let mut chosen = SharedMemory::<u32>::new(comptime!(plan.tile * plan.top_m));
    let mut scratch = Scratch::new(plan.tile, at.lanes);
    let pairs = load_pairs(kept_scores, core, row, at, plan);
    let vectors = comptime!(plan.pairs.div_ceil(FOUR));
    if comptime!(plan.stored) {
        let mut keys = SharedMemory::<Vector<u32, Four>>::new(comptime!(plan.tile * vectors));
        for vector in range_stepped(at.lane, vectors, at.lanes) {
            keys[at.row * vectors + vector] = pairs.keys(vector);
        }
        sync_cube();
        let grid = Stored { keys, first: at.row * vectors };
        select::<Stored>(&grid, vectors, at, &mut kept, &mut scratch, plan.top_m);
    } else {
        select::<Pairs>(&pairs, vectors, at, &mut kept, &mut scratch, plan.top_m);
    }

    let first = at.row * plan.top_m;
    for i in range_stepped(at.lane, plan.top_m, at.lanes) {
        chosen[first + i] = key_at::<Pairs>(&pairs, kept[first + i] as usize);
    }
    sync_cube();
    if row.out < row.rows {
        for i in range_stepped(at.lane, plan.top_m, at.lanes) {
            let pair = pairs.pair(kept[first + i] as usize);
            let a = row.source * 2 * plan.top_m + pair / plan.top_m;
            let b = (row.source * 2 + 1) * plan.top_m + pair % plan.top_m;
            let place = row.out * plan.top_m + rank_among(&chosen, first, i, plan.top_m);
            slots[place] = kept_keys[a] * comptime!(plan.side_keys as u32) + kept_keys[b];
            if comptime!(plan.additive) {
                scores[place] = softmax_weight(&chosen, first, i, plan.top_m);
            } else {
                for k in 0..plan.cores {
                    let of_core = (k * plan.heads + row.head) * comptime!(plan.rank * plan.rank);
                    scores[place * plan.cores + k] =
                        core_score(kept_scores, core, of_core, a * plan.rank, b * plan.rank, plan.rank);
                }
            }
        }
    }
}

/// Brings a row's score vectors into shared memory. Ends with a barrier.
#[cube]
fn load_pairs(kept_scores: &Slice<f32>, core: &Array<f32>, row: Row, at: Lane, #[comptime] plan: CombinePlan) -> Pairs {
    let line = comptime!(plan.top_m.div_ceil(FOUR));
    let listed = comptime!(if plan.additive { plan.tile } else { 0 });
    let mut left = SharedMemory::<f32>::new(comptime!(plan.tile * plan.top_m * plan.rank));
    let mut right = SharedMemory::<Vector<f32, Four>>::new(comptime!(plan.tile * plan.rank * line));
    let mut columns = SharedMemory::<f32>::new(comptime!((listed * plan.top_m).max(1)));
    let mut undominated = SharedMemory::<u32>::new(comptime!((listed * plan.pairs).max(1)));
    let row_side = row.source * 2 * comptime!(plan.top_m * plan.rank);
    let column_side = row_side + comptime!(plan.top_m * plan.rank);
    if comptime!(plan.additive) {
        for i in range_stepped(at.lane, plan.top_m, at.lanes) {
            left[at.row * plan.top_m + i] = kept_scores[row_side + i];
            columns[at.row * plan.top_m + i] = kept_scores[column_side + i];
        }
        sync_cube();
        list_undominated(&left, &columns, &mut undominated, at, plan);
    } else {
        for i in range_stepped(at.lane, comptime!(plan.top_m * plan.rank), at.lanes) {
            left[at.row * comptime!(plan.top_m * plan.rank) + i] =
                through_summed_core(kept_scores, core, row_side, row.head, i, plan);
        }
        for i in range_stepped(at.lane, comptime!(plan.rank * line), at.lanes) {
            let mut vector = Vector::<f32, Four>::new(0.0);
            #[unroll]
            for n in 0..FOUR {
                let b = min(i % line * FOUR + n, comptime!(plan.top_m - 1));
                vector[n] = kept_scores[column_side + b * plan.rank + i / line];
            }
            right[at.row * comptime!(plan.rank * line) + i] = vector;
        }
    }
    sync_cube();
    Pairs { left, right, undominated, columns, row: at.row, plan }
}

/// Entry `i = a · rank + σ` of the row side's score vectors, which start at `first`, through the summed core.
#[cube]
fn through_summed_core(
    kept_scores: &Slice<f32>,
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
        sum += kept_scores[a + rho] * summed;
    }
    sum
}

/// `s_k = S_rowᵀ · C_k · S_col` for the score vectors at `a` and `b` and the core at `of_core`.
#[cube]
fn core_score(
    kept_scores: &Slice<f32>,
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
            through += core[of_core + rho * rank + sigma] * kept_scores[b + sigma];
        }
        score += kept_scores[a + rho] * through;
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
    left: &SharedMemory<f32>,
    columns: &SharedMemory<f32>,
    undominated: &mut SharedMemory<u32>,
    at: Lane,
    #[comptime] plan: CombinePlan,
) {
    let first = at.row * plan.top_m;
    let mut row_keys = SharedMemory::<u32>::new(comptime!(plan.tile * plan.top_m));
    let mut column_keys = SharedMemory::<u32>::new(comptime!(plan.tile * plan.top_m));
    let mut partners = SharedMemory::<u32>::new(comptime!(plan.tile * plan.top_m));
    let mut ranks = SharedMemory::<u32>::new(comptime!(plan.tile * plan.top_m));
    for i in range_stepped(at.lane, plan.top_m, at.lanes) {
        row_keys[first + i] = order_key(left[first + i]);
        column_keys[first + i] = order_key(columns[first + i]);
    }
    sync_cube();
    for i in range_stepped(at.lane, plan.top_m, at.lanes) {
        partners[first + i] = (plan.top_m / (rank_among(&row_keys, first, i, plan.top_m) + 1)) as u32;
        ranks[first + i] = rank_among(&column_keys, first, i, plan.top_m) as u32;
    }
    sync_cube();
    for a in range_stepped(at.lane, plan.top_m, at.lanes) {
        let mut out = at.row * plan.pairs;
        for before in 0..a {
            out += partners[first + before] as usize;
        }
        for b in 0..plan.top_m {
            if ranks[first + b] < partners[first + a] {
                undominated[out] = (a * plan.top_m + b) as u32;
                out += 1;
            }
        }
    }
}

/// How many of the `count` order keys from `first` on come before key `i`, equal ones by position.
#[cube]
fn rank_among(keys: &SharedMemory<u32>, first: usize, i: usize, #[comptime] count: usize) -> usize {
    let own = keys[first + i];
    let mut rank = 0u32;
    for other in 0..count {
        let key = keys[first + other];
        rank += u32::cast_from(key < own || (key == own && other < i));
    }
    rank as usize
}

/// `exp(total_i) / Σ exp(total)` over the `count` totals behind the order keys from `first` on, against the largest for range.
#[cube]
fn softmax_weight(keys: &SharedMemory<u32>, first: usize, i: usize, #[comptime] count: usize) -> f32 {
    let mut best = keys[first];
    for other in 1..count {
        best = min(best, keys[first + other]);
    }
    let largest = score_of(best);
    let mut sum = 0.0f32;
    for other in 0..count {
        sum += f32::exp(score_of(keys[first + other]) - largest);
    }
    f32::exp(score_of(keys[first + i]) - largest) / sum
}
