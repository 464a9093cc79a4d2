//! The approximate score of every key, the best `top_m` of them, and the kept keys' score vectors, without a score in
//! global memory.
//!
//! A cube takes a tile of tokens, one side of one head and a range of keys (all of them, or one of the splits). It
//! normalises the tile's queries, streams the projected keys past them into a `[tile, range]` block of shared memory, as order keys, and
//! selects. Reads the projected keys once per tile of tokens, `top_m · rank` normalised keys per token, and writes what it keeps.

use cubecl::prelude::*;

use crate::norm::{Norm, scale_of};
use crate::product::{accumulate, zero_sums};
use crate::select::{Lane, Scratch, Stored, lane_of, order_key, score_of, select};

/// What is fixed when the kernels are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ScorePlan {
    pub heads: usize,
    pub query_heads: usize,
    pub side_keys: usize,
    pub key_dim: usize,
    pub rank: usize,
    pub top_m: usize,
    pub norm: Norm,
    /// Whether the approximate score is the score (product keys: rank 1, factor 1).
    pub direct: bool,
    /// Keys of a split, whole vectors.
    pub range: usize,
    pub splits: usize,
    /// Candidates that a split hands on: `min(top_m, range)`.
    pub keep: usize,
    /// Tokens of a cube.
    pub tile: usize,
    pub units: usize,
}

/// The side of one head that a cube works on, and its tokens.
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
pub(crate) fn score_kernel<N: Size, D: Size>(
    query: &Array<f32>,
    query_norm: &Array<f32>,
    projected: &Array<Vector<f32, N>>,
    normalised: &Array<Vector<f32, D>>,
    kept_keys: &mut Array<u32>,
    kept_scores: &mut Array<f32>,
    eps: f32,
    tokens: u32,
    cubes: u32,
    #[comptime] plan: ScorePlan,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let split = CUBE_POS % plan.splits;
    let sides = comptime!(plan.heads * 2);
    let place = Place {
        token: CUBE_POS / plan.splits / sides * plan.tile,
        side: CUBE_POS / plan.splits % sides,
        tokens: tokens as usize,
    };
    let first_key = split * plan.range;
    let count = min(plan.range, plan.side_keys - first_key);
    let at = lane_of(plan.tile, plan.units);

    let mut queries = SharedMemory::<f32>::new(comptime!(plan.tile * plan.key_dim));
    let mut order = SharedMemory::<u32>::new(comptime!(plan.tile * plan.range));
    let mut kept = SharedMemory::<u32>::new(comptime!(plan.tile * plan.keep));
    let mut scratch = Scratch::new(plan.tile, comptime!(plan.units / plan.tile));

    normalise_queries(query, query_norm, &mut queries, place, at, eps, plan);
    approximate_scores::<N>(&queries, projected, &mut order, place.side, first_key, plan);
    // A split past the last key still holds `keep` positions: the ones beyond `count` lose to all others.
    for t in 0..plan.tile {
        for i in range_stepped(count + UNIT_POS as usize, plan.range, plan.units) {
            order[t * plan.range + i] = u32::MAX;
        }
    }
    sync_cube();
    let candidates = Stored { keys: order, first: at.row * plan.range };
    select::<Stored>(&candidates, plan.range, at, &mut kept, &mut scratch, plan.keep);

    let token = place.token + at.row;
    if token < place.tokens {
        let out = ((token * sides + place.side) * plan.splits + split) * plan.keep;
        for i in range_stepped(at.lane, plan.keep, at.lanes) {
            let position = kept[at.row * plan.keep + i] as usize;
            kept_keys[out + i] = (first_key + position) as u32;
            if comptime!(plan.splits > 1 || plan.direct) {
                kept_scores[out + i] = score_of(candidates.keys[at.row * plan.range + position]);
            }
        }
    }
    if comptime!(plan.splits == 1 && !plan.direct) {
        score_kept::<D>(&queries, normalised, &kept, kept_scores, place, plan);
    }
}

/// Selects among the candidates of all splits and scores what is kept.
///
/// `candidate_keys` and `candidate_scores` are `[tokens, heads, 2, splits · keep]`; `CUBE_POS` runs over sides, then tiles.
#[cube(launch_unchecked)]
pub(crate) fn merge_kernel<D: Size>(
    query: &Array<f32>,
    query_norm: &Array<f32>,
    candidate_keys: &Array<u32>,
    candidate_scores: &Array<f32>,
    normalised: &Array<Vector<f32, D>>,
    kept_keys: &mut Array<u32>,
    kept_scores: &mut Array<f32>,
    eps: f32,
    tokens: u32,
    cubes: u32,
    #[comptime] plan: ScorePlan,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let sides = comptime!(plan.heads * 2);
    let count = comptime!(plan.splits * plan.keep);
    let place = Place { token: CUBE_POS / sides * plan.tile, side: CUBE_POS % sides, tokens: tokens as usize };
    let at = lane_of(plan.tile, plan.units);
    let token = place.token + at.row;
    let list = (token * sides + place.side) * count;

    let mut queries = SharedMemory::<f32>::new(comptime!(plan.tile * plan.key_dim));
    let mut order = SharedMemory::<u32>::new(comptime!(plan.tile * count));
    let mut kept = SharedMemory::<u32>::new(comptime!(plan.tile * plan.top_m));
    let mut scratch = Scratch::new(plan.tile, comptime!(plan.units / plan.tile));

    normalise_queries(query, query_norm, &mut queries, place, at, eps, plan);
    for i in range_stepped(at.lane, count, at.lanes) {
        let mut key = u32::MAX.runtime();
        if token < place.tokens {
            key = order_key(candidate_scores[list + i]);
        }
        order[at.row * count + i] = key;
    }
    sync_cube();
    let candidates = Stored { keys: order, first: at.row * count };
    select::<Stored>(&candidates, count, at, &mut kept, &mut scratch, plan.top_m);

    // From positions in the list to keys.
    if token < place.tokens {
        let out = (token * sides + place.side) * plan.top_m;
        for i in range_stepped(at.lane, plan.top_m, at.lanes) {
            let position = kept[at.row * plan.top_m + i] as usize;
            let key = min(candidate_keys[list + position], comptime!(plan.side_keys as u32 - 1));
            kept[at.row * plan.top_m + i] = key;
            kept_keys[out + i] = key;
            if plan.direct {
                kept_scores[out + i] = score_of(candidates.keys[at.row * count + position]);
            }
        }
    }
    sync_cube();
    if comptime!(!plan.direct) {
        score_kept::<D>(&queries, normalised, &kept, kept_scores, place, plan);
    }
}

/// Normalises one side's queries of the tile into `queries[t · key_dim + d]`; zeros past the last token. Ends with a
/// barrier.
#[cube]
fn normalise_queries(
    query: &Array<f32>,
    query_norm: &Array<f32>,
    queries: &mut SharedMemory<f32>,
    place: Place,
    at: Lane,
    eps: f32,
    #[comptime] plan: ScorePlan,
) {
    let head = comptime!(if plan.query_heads == 1 { 0 } else { 1 }) * (place.side / 2);
    let token = place.token + at.row;
    let first = ((token * plan.query_heads + head) * 2 + place.side % 2) * plan.key_dim;
    let row = at.row * plan.key_dim;
    let mut partial = SharedMemory::<f32>::new(plan.units);
    for d in range_stepped(at.lane, plan.key_dim, at.lanes) {
        let mut value = 0.0f32;
        if token < place.tokens {
            value = query[first + d];
        }
        queries[row + d] = value;
    }
    let mut mean = 0.0f32;
    if comptime!(plan.norm == Norm::Layer) {
        mean = row_sum(queries, &mut partial, row, 0.0, at, plan.key_dim, false) / comptime!(plan.key_dim as f32);
    }
    let squares = row_sum(queries, &mut partial, row, mean, at, plan.key_dim, true);
    let scale = scale_of(squares, eps, plan.key_dim);
    for d in range_stepped(at.lane, plan.key_dim, at.lanes) {
        queries[row + d] = (queries[row + d] - mean) * scale * query_norm[d];
    }
    sync_cube();
}

/// Sum of a row's numbers less `mean`, or of their squares, in an order that does not depend on the device's timing. Each
/// lane sums what it wrote itself, then all lanes sum the lanes.
#[cube]
fn row_sum(
    rows: &SharedMemory<f32>,
    partial: &mut SharedMemory<f32>,
    first: usize,
    mean: f32,
    at: Lane,
    #[comptime] size: usize,
    #[comptime] squares: bool,
) -> f32 {
    let mut own = 0.0f32;
    for d in range_stepped(at.lane, size, at.lanes) {
        let centred = rows[first + d] - mean;
        own += if squares { centred * centred } else { centred };
    }
    partial[UNIT_POS as usize] = own;
    sync_cube();
    let mut sum = 0.0f32;
    for lane in 0..at.lanes {
        sum += partial[at.row * at.lanes + lane];
    }
    sync_cube();
    sum
}

/// The order keys of `Σ_d queries[t, d] · projected[side, d, first_key + i]` for a range of keys, `[tile, range]`.
#[cube]
fn approximate_scores<N: Size>(
    queries: &SharedMemory<f32>,
    projected: &Array<Vector<f32, N>>,
    order: &mut SharedMemory<u32>,
    side: usize,
    first_key: usize,
    #[comptime] plan: ScorePlan,
) {
    let width = N::value();
    let padded = comptime!(plan.side_keys.div_ceil(width));
    let vectors = comptime!(plan.range / width);
    for column in range_stepped(UNIT_POS as usize, vectors, plan.units) {
        let mut sums = zero_sums::<N>(plan.tile);
        if first_key / width + column < padded {
            let first = side * plan.key_dim * padded + first_key / width + column;
            accumulate::<f32, N>(queries, projected, &mut sums, first, padded, plan.key_dim, plan.key_dim, plan.tile);
        }
        #[unroll]
        for t in 0..plan.tile {
            #[unroll]
            for n in 0..width {
                order[t * plan.range + column * width + n] = order_key(sums[t][n]);
            }
        }
    }
    sync_cube();
}

/// `kept_scores[t, side, i, ρ] = queries[t] · normalised[side, kept[t, i], ρ]`.
#[cube]
fn score_kept<D: Size>(
    queries: &SharedMemory<f32>,
    normalised: &Array<Vector<f32, D>>,
    kept: &SharedMemory<u32>,
    kept_scores: &mut Array<f32>,
    place: Place,
    #[comptime] plan: ScorePlan,
) {
    let width = D::value();
    let vectors = comptime!(plan.key_dim / width);
    let per_row = comptime!(plan.top_m * plan.rank);
    for item in range_stepped(UNIT_POS as usize, comptime!(plan.tile * per_row), plan.units) {
        let row = item / per_row;
        let entry = item % per_row;
        if place.token + row < place.tokens {
            let key = kept[row * plan.top_m + entry / plan.rank] as usize;
            let first = ((place.side * plan.side_keys + key) * plan.rank + entry % plan.rank) * vectors;
            let mut sum = Vector::<f32, D>::new(0.0);
            for d in 0..vectors {
                let mut part = Vector::<f32, D>::empty();
                #[unroll]
                for n in 0..width {
                    part[n] = queries[row * plan.key_dim + d * width + n];
                }
                sum += part * normalised[first + d];
            }
            let mut total = 0.0f32;
            #[unroll]
            for n in 0..width {
                total += sum[n];
            }
            let sides = comptime!(plan.heads * 2);
            kept_scores[((place.token + row) * sides + place.side) * per_row + entry] = total;
        }
    }
}
