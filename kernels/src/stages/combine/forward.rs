//! The best `top_m` of a head's `top_m²` pairs of kept keys, with one score per core.
//!
//! One cube takes a tile of rows, a row being one head of one token. It brings the row side through the summed core into shared
//! memory, selects among the totals of the pairs, and sorts what is kept. The grid of totals stays in shared memory, or is computed
//! anew in each pass of the selection where it does not fit or would leave room for too few rows. Of additive totals only about
//! `top_m · ln(top_m)` are looked at, found by sorting both sides. Reads `2 · top_m` keys and score vectors, writes `top_m` slots and
//! `top_m · cores` scores.

use cubecl::prelude::*;

use super::plan::CombinePlan;
use crate::select::sort::sort_pairs;
use crate::select::{
    Candidates, CandidatesExpand, FOUR, Four, Lane, NOTHING, Scratch, Stored, lanes_before, no_score, order_key,
    score_of, select_lane, select_sorted,
};

/// Pairs of kept keys by row key; the total of `(a, b)` is `left[a] · right[b]`, in the order of slots, or `left[a] + columns[b]`, the
/// pairs of a row key from its best column on.
#[derive(CubeType)]
struct Pairs {
    /// Row side, `[tile, top_m, rank]`, through the summed core.
    left: SharedMemory<f32>,
    /// Column side, `[tile, rank, top_m]`, each ρ filled up to whole vectors.
    right: SharedMemory<Vector<f32, Four>>,
    /// Product keys: the column side's order keys, ascending, and where each of them is among the kept, `[tile, top_m]`.
    columns: SharedMemory<u32>,
    places: SharedMemory<u32>,
    /// Product keys: the vectors of pairs that are looked at, `[tile, vectors]`, as `a · top_m + first rank of b`.
    listed: SharedMemory<u32>,
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
            let first = self.listed[self.row * self.plan.vectors + position / FOUR] as usize;
            let rank = first % self.plan.top_m + position % FOUR;
            let b = self.places[self.row * self.plan.top_m + rank] as usize;
            pair = first / self.plan.top_m * self.plan.top_m + b;
        }
        pair
    }

    /// Sums of the sides of four listed pairs; NaN past a row key's last partner.
    fn additive_totals(&self, vector: usize) -> Vector<f32, Four> {
        let listed = self.listed[self.row * self.plan.vectors + vector] as usize;
        let score = self.left[self.row * self.plan.top_m + listed / self.plan.top_m];
        let mut totals = Vector::<f32, Four>::new(no_score());
        #[unroll]
        for n in 0..FOUR {
            let rank = listed % self.plan.top_m + n;
            if rank < self.plan.top_m {
                totals[n] = score + score_of(self.columns[self.row * self.plan.top_m + rank]);
            }
        }
        totals
    }

    /// Whether there is a pair at `4 · vector + n`: rows of the grid, and of lists, are filled up to whole vectors.
    fn is_pair(&self, vector: usize, #[comptime] n: usize) -> bool {
        let line = comptime!(self.plan.top_m.div_ceil(FOUR));
        let mut rank = vector % line * FOUR + n;
        if comptime!(self.plan.additive) {
            rank = self.listed[self.row * self.plan.vectors + vector] as usize % self.plan.top_m + n;
        }
        rank < self.plan.top_m
    }

    /// Bilinear totals of four neighbours in a row of the grid. A product and fused multiply-adds in one fixed order: the same
    /// bits wherever they are computed.
    fn bilinear_totals(&self, vector: usize) -> Vector<f32, Four> {
        let line = comptime!(self.plan.top_m.div_ceil(FOUR));
        let a = (self.row * self.plan.top_m + vector / line) * self.plan.rank;
        let b = self.row * comptime!(self.plan.rank * line) + vector % line;
        let mut totals = Vector::<f32, Four>::new(self.left[a]) * self.right[b];
        #[unroll]
        for rho in 1..self.plan.rank {
            totals = fma(Vector::new(self.left[a + rho]), self.right[b + rho * line], totals);
        }
        if comptime!(!self.plan.top_m.is_multiple_of(FOUR)) {
            #[unroll]
            for n in 0..FOUR {
                if !self.is_pair(vector, n) {
                    totals[n] = no_score();
                }
            }
        }
        totals
    }
}

#[cube]
impl Candidates for Pairs {
    fn keys(&self, vector: usize) -> Vector<u32, Four> {
        let totals = self.scores(vector);
        let mut keys = Vector::<u32, Four>::new(NOTHING);
        #[unroll]
        for n in 0..FOUR {
            if self.is_pair(vector, n) {
                keys[n] = order_key(totals[n]);
            }
        }
        keys
    }

    fn scores(&self, vector: usize) -> Vector<f32, Four> {
        if comptime!(self.plan.additive) { self.additive_totals(vector) } else { self.bilinear_totals(vector) }
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
    let at = select_lane(comptime!(plan.select()));
    let row = CUBE_POS * plan.tile + at.row;
    // A row past the last one computes the last one again and writes nothing.
    let source = min(row, rows as usize - 1);
    let place = HeadRow { source, out: row, rows: rows as usize, head: source % plan.heads };
    choose_pairs(&kept_keys.to_slice(), &kept_scores.to_slice(), core, slots, scores, place, at, plan);
}

/// A row of pairs: where its sides lie among the kept, and where its result goes.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct HeadRow {
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
    row: HeadRow,
    at: Lane,
    #[comptime] plan: CombinePlan,
) {
    let mut kept = SharedMemory::<u32>::new(comptime!(plan.tile * plan.top_m));
    let mut chosen = SharedMemory::<u32>::new(comptime!(plan.tile * plan.top_m));
    let mut scratch = Scratch::new(comptime!(plan.select()));
    let mut pairs = load_pairs(kept_scores, core, row, at, &mut chosen, &mut kept, &mut scratch, plan);
    if comptime!(plan.stored) {
        let mut keys = SharedMemory::<Vector<u32, Four>>::new(comptime!(plan.tile * plan.vectors));
        for vector in range_stepped(at.lane, plan.vectors, at.lanes) {
            keys[at.row * plan.vectors + vector] = pairs.keys(vector);
        }
        sync_cube();
        let grid = Stored { keys, first: at.row * plan.vectors };
        select_sorted::<Stored>(&grid, plan.vectors, at, &mut chosen, &mut kept, &mut scratch);
    } else {
        select_sorted::<Pairs>(&pairs, plan.vectors, at, &mut chosen, &mut kept, &mut scratch);
    }

    let first = at.row * plan.top_m;
    let mut sum = 1.0f32;
    if comptime!(plan.additive) {
        // The sides' scores have been looked at.
        sum = softmax_sum(&chosen, &mut pairs.left, first, at, plan);
    }
    if row.out < row.rows {
        for i in range_stepped(at.lane, plan.top_m, at.lanes) {
            let pair = pairs.pair(kept[first + i] as usize);
            let a = row.source * 2 * plan.top_m + pair / plan.top_m;
            let b = (row.source * 2 + 1) * plan.top_m + pair % plan.top_m;
            let place = row.out * plan.top_m + i;
            slots[place] = kept_keys[a] * comptime!(plan.side_keys as u32) + kept_keys[b];
            if comptime!(plan.additive) {
                scores[place] = f32::exp(score_of(chosen[first + i]) - score_of(chosen[first])) / sum;
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

/// Brings a row's score vectors into shared memory. Ends with a barrier; `keys` and `items` are free again then.
#[cube]
fn load_pairs(
    kept_scores: &Slice<f32>,
    core: &Array<f32>,
    row: HeadRow,
    at: Lane,
    keys: &mut SharedMemory<u32>,
    items: &mut SharedMemory<u32>,
    scratch: &mut Scratch,
    #[comptime] plan: CombinePlan,
) -> Pairs {
    let line = comptime!(plan.top_m.div_ceil(FOUR));
    let (bilinear, listing) = comptime!(if plan.additive { (0, plan.tile) } else { (plan.tile, 0) });
    let mut left = SharedMemory::<f32>::new(comptime!(plan.tile * plan.top_m * plan.rank));
    let mut right = SharedMemory::<Vector<f32, Four>>::new(comptime!((bilinear * plan.rank * line).max(1)));
    let mut columns = SharedMemory::<u32>::new(comptime!((listing * plan.top_m).max(1)));
    let mut places = SharedMemory::<u32>::new(comptime!((listing * plan.top_m).max(1)));
    let mut listed = SharedMemory::<u32>::new(comptime!((listing * plan.vectors).max(1)));
    let row_side = row.source * 2 * comptime!(plan.top_m * plan.rank);
    let column_side = row_side + comptime!(plan.top_m * plan.rank);
    if comptime!(plan.additive) {
        let first = at.row * plan.top_m;
        for i in range_stepped(at.lane, plan.top_m, at.lanes) {
            let score = kept_scores[row_side + i];
            left[first + i] = score;
            keys[first + i] = order_key(score);
            items[first + i] = i as u32;
            columns[first + i] = order_key(kept_scores[column_side + i]);
            places[first + i] = i as u32;
        }
        sync_cube();
        sort_pairs(keys, items, first, at, plan.top_m);
        sort_pairs(&mut columns, &mut places, first, at, plan.top_m);
        list_pairs(keys, items, &mut listed, at, scratch, plan);
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
    Pairs { left, right, columns, places, listed, row: at.row, plan }
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

/// Lists the vectors of pairs that are looked at, by row key and then by rank of the column key. `ranked` has the row
/// side's keys from the best on; `counts` is overwritten.
#[cube]
fn list_pairs(
    counts: &mut SharedMemory<u32>,
    ranked: &SharedMemory<u32>,
    listed: &mut SharedMemory<u32>,
    at: Lane,
    scratch: &mut Scratch,
    #[comptime] plan: CombinePlan,
) {
    let first = at.row * plan.top_m;
    for rank in range_stepped(at.lane, plan.top_m, at.lanes) {
        let partners = plan.top_m / (rank + 1);
        let a = ranked[first + rank] as usize;
        counts[first + a] = partners.div_ceil(FOUR) as u32;
    }
    sync_cube();
    let share = comptime!(plan.top_m.div_ceil(at.lanes));
    let start = min(at.lane * share, plan.top_m);
    let end = min(start + share, plan.top_m);
    let mut own = 0u32;
    for a in start..end {
        own += counts[first + a];
    }
    let mut out = at.row * plan.vectors + lanes_before(own, scratch, at) as usize;
    for a in start..end {
        for vector in 0..counts[first + a] as usize {
            listed[out] = (a * plan.top_m + vector * FOUR) as u32;
            out += 1;
        }
    }
}

/// `Σ exp(total - largest)` over the totals behind the row's ascending order keys from `first` on: the same for all lanes of a row, and however many
/// there are; its `terms` are written from there on. Ends with a barrier.
#[cube]
fn softmax_sum(
    keys: &SharedMemory<u32>,
    terms: &mut SharedMemory<f32>,
    first: usize,
    at: Lane,
    #[comptime] plan: CombinePlan,
) -> f32 {
    let largest = score_of(keys[first]);
    for i in range_stepped(at.lane, plan.top_m, at.lanes) {
        terms[first + i] = f32::exp(score_of(keys[first + i]) - largest);
    }
    sync_cube();
    let mut sum = 0.0f32;
    for i in 0..plan.top_m {
        sum += terms[first + i];
    }
    sync_cube();
    sum
}
