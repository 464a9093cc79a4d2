//! The approximate score of every key, the best `top_m` of them, and the kept keys' score vectors, without a score in
//! global memory.
//!
//! A cube takes a tile of tokens, one side of one head and a range of keys (all of them, or one of the splits). It
//! normalises the tile's queries, streams the projected keys past them into a `[tile, range]` block of shared memory, as order keys, and
//! selects. Reads the projected keys once per tile of tokens, `top_m · rank` normalised keys per token, and writes what it keeps.

use cubecl::prelude::*;

use super::padded;
use super::plan::ScorePlan;
use crate::linear::tile::{Columns, Rows, accumulate, component_sum, zero_sums};
use crate::select::top_m::Scores;
use crate::select::{
    Candidates, CandidatesExpand, FOUR, Four, Lane, NOTHING, Scratch, Stored, key_at, order_key, score_of, select,
    select_lane,
};
use crate::stages::norm::{Norm, scale_of};

/// The token that a unit's row is of, and its side of one head.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Place {
    pub token: usize,
    /// `head · 2 + side`.
    pub side: usize,
    pub tokens: usize,
}

/// Scores one range of keys; where the range is all of them, writes the result of the stage, else the split's candidates.
///
/// `CUBE_POS` runs over splits, then sides, then tiles of tokens.
#[cube(launch_unchecked)]
pub(crate) fn score_kernel<E: Float, D: Size>(
    query: &Array<Vector<f32, D>>,
    query_norm: &Array<Vector<f32, D>>,
    projected: &Array<Vector<E, Four>>,
    normalised: &Array<Vector<E, D>>,
    kept_keys: &mut Array<u32>,
    kept_scores: &mut Array<f32>,
    eps: f32,
    tokens: u32,
    cubes: u32,
    #[comptime] plan: ScorePlan,
    #[define(E)] _dtype: StorageType,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let split = CUBE_POS % plan.splits;
    let sides = comptime!(plan.heads * 2);
    let at = select_lane(comptime!(plan.select()));
    let place = Place {
        token: CUBE_POS / plan.splits / sides * plan.tile + at.row,
        side: CUBE_POS / plan.splits % sides,
        tokens: tokens as usize,
    };
    let first_key = split * plan.range;
    let count = min(plan.range, plan.side_keys - first_key);

    let width = D::value();
    let depth = comptime!(plan.key_dim / width);
    let mut queries = SharedMemory::<Vector<f32, D>>::new(comptime!(plan.tile * depth));
    let mut order = SharedMemory::<Vector<u32, Four>>::new(comptime!(plan.tile * plan.range / FOUR));
    let mut kept = SharedMemory::<u32>::new(comptime!(plan.tile * plan.keep));
    let mut scratch = Scratch::new(comptime!(plan.select()));

    normalise_queries::<E, D>(query, query_norm, &mut queries, place, at, eps, plan);
    approximate_scores::<E, D>(&queries, projected, &mut order, place.side, first_key, count, plan);
    let vectors = comptime!(plan.range / FOUR);
    let candidates = Stored { keys: order, first: at.row * vectors };
    select::<Stored>(&candidates, vectors, at, &mut kept, &mut scratch);

    let list = (place.token * sides + place.side) * plan.splits + split;
    if place.token < place.tokens {
        let out = list * plan.keep;
        for i in range_stepped(at.lane, plan.keep, at.lanes) {
            let position = kept[at.row * plan.keep + i] as usize;
            kept_keys[out + i] = (first_key + position) as u32;
            if comptime!(plan.splits > 1 || plan.direct) {
                kept_scores[out + i] = score_of(key_at::<Stored>(&candidates, position));
            }
        }
    }
    if comptime!(plan.splits == 1 && !plan.direct) {
        let out = list * comptime!(plan.top_m * plan.rank);
        score_kept::<E, D>(&queries, normalised, &kept, &mut kept_scores.to_slice_mut(), out, place, at, plan);
    }
}

/// Selects among the candidates of all splits and scores what is kept.
///
/// `candidate_keys` and `candidate_scores`, as bits, are `[tokens, heads, 2, splits · keep]`; `CUBE_POS` runs over sides, then tiles.
#[cube(launch_unchecked)]
pub(crate) fn merge_kernel<E: Float, D: Size>(
    query: &Array<Vector<f32, D>>,
    query_norm: &Array<Vector<f32, D>>,
    candidate_keys: &Array<u32>,
    candidate_scores: &Array<u32>,
    normalised: &Array<Vector<E, D>>,
    kept_keys: &mut Array<u32>,
    kept_scores: &mut Array<f32>,
    eps: f32,
    tokens: u32,
    cubes: u32,
    #[comptime] plan: ScorePlan,
    #[define(E)] _dtype: StorageType,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let sides = comptime!(plan.heads * 2);
    let at = select_lane(comptime!(plan.select_merged()));
    let token = CUBE_POS / sides * plan.tile + at.row;
    let place = Place { token, side: CUBE_POS % sides, tokens: tokens as usize };
    let out = (place.token * sides + place.side) * plan.top_m;
    let scores = &mut kept_scores.to_slice_mut();
    let first = out * plan.rank;
    let kept = merge::<E, D>(
        query,
        query_norm,
        &candidate_keys.to_slice(),
        &candidate_scores.to_slice(),
        normalised,
        scores,
        first,
        place,
        at,
        eps,
        plan,
    );
    write_keys(&kept, &mut kept_keys.to_slice_mut(), place, at, plan);
}

/// The best `top_m` of each row's candidates, `[tile, top_m]`, ascending; their score vectors go to `scores` from `first` on. Ends with a
/// barrier.
#[cube]
#[allow(clippy::collapsible_if, reason = "the outer one is decided when the kernel is compiled")]
pub(crate) fn merge<E: Float, D: Size>(
    query: &Array<Vector<f32, D>>,
    query_norm: &Array<Vector<f32, D>>,
    candidate_keys: &Slice<u32>,
    candidate_scores: &Slice<u32>,
    normalised: &Array<Vector<E, D>>,
    scores: &mut SliceMut<f32>,
    first: usize,
    place: Place,
    at: Lane,
    eps: f32,
    #[comptime] plan: ScorePlan,
) -> SharedMemory<u32> {
    let count = comptime!(plan.splits * plan.keep);
    // A row past the last token computes the last one again and writes nothing.
    let token = min(place.token, place.tokens - 1);
    let list = (token * comptime!(plan.heads * 2) + place.side) * count;
    let width = D::value();
    let depth = comptime!(plan.key_dim / width);
    let mut queries = SharedMemory::<Vector<f32, D>>::new(comptime!(plan.tile * depth));
    let vectors = comptime!(count.div_ceil(FOUR));
    let mut keys = SharedMemory::<u32>::new(comptime!(plan.tile * plan.top_m));
    let mut scratch = Scratch::new(comptime!(plan.select_merged()));

    normalise_queries::<E, D>(query, query_norm, &mut queries, place, at, eps, plan);
    let listed = Scores { bits: *candidate_scores, first: list, count };
    if comptime!(plan.stored) {
        let mut order = SharedMemory::<Vector<u32, Four>>::new(comptime!(plan.tile * vectors));
        for vector in range_stepped(at.lane, vectors, at.lanes) {
            order[at.row * vectors + vector] = listed.keys(vector);
        }
        sync_cube();
        let stored = Stored { keys: order, first: at.row * vectors };
        select::<Stored>(&stored, vectors, at, &mut keys, &mut scratch);
    } else {
        select::<Scores>(&listed, vectors, at, &mut keys, &mut scratch);
    }

    // From positions in the list to keys.
    let row = at.row * plan.top_m;
    for i in range_stepped(at.lane, plan.top_m, at.lanes) {
        let position = keys[row + i] as usize;
        keys[row + i] = min(candidate_keys[list + position], comptime!(plan.side_keys as u32 - 1));
        if comptime!(plan.direct) {
            if place.token < place.tokens {
                scores[first + i] = score_of(key_at::<Scores>(&listed, position));
            }
        }
    }
    sync_cube();
    if comptime!(!plan.direct) {
        score_kept::<E, D>(&queries, normalised, &keys, scores, first, place, at, plan);
        sync_cube();
    }
    keys
}

/// Writes the keys that a row keeps.
#[cube]
pub(crate) fn write_keys(
    kept: &SharedMemory<u32>,
    kept_keys: &mut SliceMut<u32>,
    place: Place,
    at: Lane,
    #[comptime] plan: ScorePlan,
) {
    if place.token < place.tokens {
        let first = at.row * plan.top_m;
        let out = (place.token * comptime!(plan.heads * 2) + place.side) * plan.top_m;
        for i in range_stepped(at.lane, plan.top_m, at.lanes) {
            kept_keys[out + i] = kept[first + i];
        }
    }
}

/// The query of a side of a token, of all tokens' queries.
#[cube]
pub(super) fn query_of(token: usize, side: usize, #[comptime] plan: ScorePlan) -> usize {
    let mut pair = 0usize.runtime();
    if comptime!(plan.heads_per_pair < plan.heads) {
        pair = side / comptime!(2 * plan.heads_per_pair);
    }
    (token * plan.query_pairs + pair) * 2 + side % 2
}

/// Normalises each row's query into `[tile, key_dim]` and rounds it to the keys' type; zeros past the last token. Ends with a barrier.
#[cube]
fn normalise_queries<E: Float, D: Size>(
    query: &Array<Vector<f32, D>>,
    query_norm: &Array<Vector<f32, D>>,
    queries: &mut SharedMemory<Vector<f32, D>>,
    place: Place,
    at: Lane,
    eps: f32,
    #[comptime] plan: ScorePlan,
) {
    let width = D::value();
    let depth = comptime!(plan.key_dim / width);
    let first = query_of(place.token, place.side, plan) * depth;
    let row = at.row * depth;
    let mut partial = SharedMemory::<f32>::new(plan.units);
    for d in range_stepped(at.lane, depth, at.lanes) {
        let mut value = Vector::<f32, D>::new(0.0);
        if place.token < place.tokens {
            value = query[first + d];
        }
        queries[row + d] = value;
    }
    if comptime!(plan.norm.is_some()) {
        let mut mean = 0.0f32;
        if comptime!(plan.norm == Some(Norm::Layer)) {
            mean = row_sum::<D>(queries, &mut partial, 0.0, at, depth, false) / comptime!(plan.key_dim as f32);
        }
        let squares = row_sum::<D>(queries, &mut partial, mean, at, depth, true);
        let scale = scale_of(squares, eps, plan.key_dim);
        for d in range_stepped(at.lane, depth, at.lanes) {
            queries[row + d] = (queries[row + d] - Vector::new(mean)) * Vector::new(scale) * query_norm[d];
        }
    }
    for d in range_stepped(at.lane, depth, at.lanes) {
        queries[row + d] = Vector::cast_from(Vector::<E, D>::cast_from(queries[row + d]));
    }
    sync_cube();
}

/// Sum of a row's numbers less `mean`, or of their squares, in an order that does not depend on the device's timing. Each
/// lane sums what it wrote itself, then all lanes sum the lanes.
#[cube]
fn row_sum<D: Size>(
    rows: &SharedMemory<Vector<f32, D>>,
    partial: &mut SharedMemory<f32>,
    mean: f32,
    at: Lane,
    #[comptime] depth: usize,
    #[comptime] squares: bool,
) -> f32 {
    let mut own = Vector::<f32, D>::new(0.0);
    for d in range_stepped(at.lane, depth, at.lanes) {
        let centred = rows[at.row * depth + d] - Vector::new(mean);
        own += if squares { centred * centred } else { centred };
    }
    partial[UNIT_POS as usize] = component_sum::<D>(own);
    sync_cube();
    let mut sum = 0.0f32;
    for lane in 0..at.lanes {
        sum += partial[at.row * at.lanes + lane];
    }
    sync_cube();
    sum
}

/// The order keys of `Σ_d queries[t, d] · projected[side, d, first_key + i]` for the `count` keys of a range, `[tile, range]`; nothing past
/// the last. Ends with a barrier.
#[cube]
fn approximate_scores<E: Float, D: Size>(
    queries: &SharedMemory<Vector<f32, D>>,
    projected: &Array<Vector<E, Four>>,
    order: &mut SharedMemory<Vector<u32, Four>>,
    side: usize,
    first_key: usize,
    count: usize,
    #[comptime] plan: ScorePlan,
) {
    let width = D::value();
    let depth = comptime!(plan.key_dim / width);
    let padded = comptime!(padded(plan.side_keys) / FOUR);
    let vectors = comptime!(plan.range / FOUR);
    let base = side * plan.key_dim * padded + first_key / FOUR;
    let rows = Rows::of_tile(depth, plan.tile).places();
    for first in range_stepped(UNIT_POS as usize, vectors, comptime!(plan.units * plan.block)) {
        let last = min(vectors, padded - first_key / FOUR) - 1;
        let columns = Columns { first, last, stride: plan.units, count: plan.block };
        let mut sums = zero_sums::<Four>(comptime!(plan.tile * plan.block));
        accumulate::<f32, E, Four, D>(&queries.to_slice(), &rows, projected, &mut sums, base, columns, padded);
        #[unroll]
        for c in 0..plan.block {
            let column = first + comptime!(c * plan.units);
            #[unroll]
            for t in 0..plan.tile {
                let mut keys = Vector::<u32, Four>::new(NOTHING);
                #[unroll]
                for n in 0..FOUR {
                    if column * FOUR + n < count {
                        keys[n] = order_key(sums[c * plan.tile + t][n]);
                    }
                }
                if column < vectors {
                    order[t * vectors + column] = keys;
                }
            }
        }
    }
    sync_cube();
}

/// `scores[first + i · rank + ρ] = queries[row] · normalised[side, kept[row, i], ρ]`. A unit takes all ρ of one key of its row.
#[cube]
fn score_kept<E: Float, D: Size>(
    queries: &SharedMemory<Vector<f32, D>>,
    normalised: &Array<Vector<E, D>>,
    kept: &SharedMemory<u32>,
    scores: &mut SliceMut<f32>,
    first: usize,
    place: Place,
    at: Lane,
    #[comptime] plan: ScorePlan,
) {
    let width = D::value();
    let depth = comptime!(plan.key_dim / width);
    if place.token < place.tokens {
        for i in range_stepped(at.lane, plan.top_m, at.lanes) {
            let key = place.side * plan.side_keys + kept[at.row * plan.top_m + i] as usize;
            let vectors = key * comptime!(plan.rank * depth);
            let mut sums = zero_sums::<D>(plan.rank);
            for d in 0..depth {
                let query = queries[at.row * depth + d];
                #[unroll]
                for rho in 0..plan.rank {
                    sums[rho] += query * Vector::cast_from(normalised[vectors + rho * depth + d]);
                }
            }
            #[unroll]
            for rho in 0..plan.rank {
                scores[first + i * plan.rank + rho] = component_sum::<D>(sums[rho]);
            }
        }
    }
}
