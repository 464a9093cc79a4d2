//! The approximate score of every key, the best `top_m` of them, and the kept keys' score vectors.
//!
//! A cube takes a tile of tokens, one side of one head and a range of keys. It normalises the tile's queries and streams the projected keys past
//! them into a `[tile, range]` block of shared memory. Where the range is all keys it selects there, without a score in global memory
//! ([`score_kernel`]). Where keys are split, it writes the scores ([`approximate_kernel`]), and another launch selects among those of all ranges
//! ([`select_keys_kernel`]). Reads the projected keys once per tile of tokens, `top_m · rank` normalised keys per token, and writes what it keeps.

use cubecl::prelude::*;

use super::padded;
use super::plan::ScorePlan;
use crate::launch::planes::sum_of;
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
    /// The first token of the launch, and where its last one ends.
    pub first: usize,
    pub end: usize,
}

#[cube]
impl Place {
    /// The row of approximate scores; past the last token the last one's.
    fn row(&self, #[comptime] heads: usize) -> usize {
        (min(self.token, self.end - 1) - self.first) * comptime!(heads * 2) + self.side
    }
}

/// Scores all keys of a side and keeps the best. `CUBE_POS` runs over sides, then tiles of tokens.
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
    let sides = comptime!(plan.heads * 2);
    let at = select_lane(comptime!(plan.select()));
    let place = Place {
        token: CUBE_POS / sides * plan.tile + at.row,
        side: CUBE_POS % sides,
        first: 0usize.runtime(),
        end: tokens as usize,
    };
    let depth = comptime!(plan.key_dim / plan.width);
    let vectors = comptime!(plan.range / FOUR);
    let mut queries = SharedMemory::<Vector<f32, D>>::new(comptime!(plan.tile * depth));
    let mut order = SharedMemory::<Vector<u32, Four>>::new(comptime!(plan.tile * vectors));
    let mut kept = SharedMemory::<u32>::new(comptime!(plan.tile * plan.top_m));
    let mut scratch = Scratch::new(comptime!(plan.select()));

    normalise_queries::<E, D>(query, query_norm, &mut queries, place, at, eps, plan);
    approximate_scores::<E, D>(&queries, projected, &mut order, place.side, 0usize, plan.side_keys, plan);
    let candidates = Stored { keys: order, first: at.row * vectors };
    select::<Stored>(&candidates, vectors, at, &mut kept, &mut scratch);

    write_keys(&kept, &mut kept_keys.to_slice_mut(), place, at, plan);
    let out = (place.token * sides + place.side) * comptime!(plan.top_m * plan.rank);
    if comptime!(plan.direct) {
        if place.token < place.end {
            for i in range_stepped(at.lane, plan.top_m, at.lanes) {
                let position = kept[at.row * plan.top_m + i] as usize;
                kept_scores[out + i] = score_of(key_at::<Stored>(&candidates, position));
            }
        }
    } else {
        score_kept::<E, D>(&queries, normalised, &kept, &mut kept_scores.to_slice_mut(), out, place, at, plan);
    }
}

/// Writes the approximate scores of one range of keys for tokens from `first` to `end`, to `[end - first, heads, 2, pitch]`.
///
/// `CUBE_POS` runs over ranges, then sides, then tiles of tokens.
#[cube(launch_unchecked)]
pub(crate) fn approximate_kernel<E: Float, D: Size>(
    query: &Array<Vector<f32, D>>,
    query_norm: &Array<Vector<f32, D>>,
    projected: &Array<Vector<E, Four>>,
    scores: &mut Array<f32>,
    eps: f32,
    first: u32,
    end: u32,
    cubes: u32,
    #[comptime] plan: ScorePlan,
    #[define(E)] _dtype: StorageType,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let sides = comptime!(plan.heads * 2);
    let at = select_lane(comptime!(plan.select()));
    let place = Place {
        token: first as usize + CUBE_POS / plan.splits / sides * plan.tile + at.row,
        side: CUBE_POS / plan.splits % sides,
        first: first as usize,
        end: end as usize,
    };
    let first_key = CUBE_POS % plan.splits * plan.range;
    let count = min(plan.range, plan.side_keys - first_key);
    let vectors = comptime!(plan.range / FOUR);
    let mut queries = SharedMemory::<Vector<f32, D>>::new(comptime!(plan.tile * (plan.key_dim / plan.width)));
    let mut order = SharedMemory::<Vector<u32, Four>>::new(comptime!(plan.tile * vectors));

    normalise_queries::<E, D>(query, query_norm, &mut queries, place, at, eps, plan);
    approximate_scores::<E, D>(&queries, projected, &mut order, place.side, first_key, count, plan);
    if place.token < place.end {
        let out = place.row(plan.heads) * comptime!(plan.pitch()) + first_key;
        for i in range_stepped(at.lane, count, at.lanes) {
            scores[out + i] = score_of(order[at.row * vectors + i / FOUR][i % FOUR]);
        }
    }
}

/// Selects among the approximate scores of all keys, given as bits, and scores what is kept. `CUBE_POS` runs over sides, then tiles of tokens
/// from `first` to `end`.
#[cube(launch_unchecked)]
pub(crate) fn select_keys_kernel<E: Float, D: Size>(
    query: &Array<Vector<f32, D>>,
    query_norm: &Array<Vector<f32, D>>,
    approximate: &Array<u32>,
    normalised: &Array<Vector<E, D>>,
    kept_keys: &mut Array<u32>,
    kept_scores: &mut Array<f32>,
    eps: f32,
    first: u32,
    end: u32,
    cubes: u32,
    #[comptime] plan: ScorePlan,
    #[define(E)] _dtype: StorageType,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let sides = comptime!(plan.heads * 2);
    let at = select_lane(comptime!(plan.select()));
    let place = Place {
        token: first as usize + CUBE_POS / sides * plan.tile + at.row,
        side: CUBE_POS % sides,
        first: first as usize,
        end: end as usize,
    };
    let scores = &mut kept_scores.to_slice_mut();
    let out = (place.token * sides + place.side) * comptime!(plan.top_m * plan.rank);
    let approximate = &approximate.to_slice();
    let kept = select_keys::<E, D>(query, query_norm, approximate, normalised, scores, out, place, at, eps, plan);
    write_keys(&kept, &mut kept_keys.to_slice_mut(), place, at, plan);
}

/// The best `top_m` of each row's keys, `[tile, top_m]`, ascending; their score vectors go to `scores` from `out` on: copied where matrix units have
/// scored all ranks, else computed. Ends with a barrier.
#[cube]
pub(crate) fn select_keys<E: Float, D: Size>(
    query: &Array<Vector<f32, D>>,
    query_norm: &Array<Vector<f32, D>>,
    approximate: &Slice<u32>,
    normalised: &Array<Vector<E, D>>,
    scores: &mut SliceMut<f32>,
    out: usize,
    place: Place,
    at: Lane,
    eps: f32,
    #[comptime] plan: ScorePlan,
) -> SharedMemory<u32> {
    let vectors = comptime!(plan.side_keys.div_ceil(FOUR)).runtime();
    let mut keys = SharedMemory::<u32>::new(comptime!(plan.tile * plan.top_m));
    let mut scratch = Scratch::new(comptime!(plan.select()));
    let first = place.row(plan.heads) * comptime!(plan.pitch());
    let listed = Scores { bits: *approximate, first, count: plan.side_keys };
    if comptime!(plan.stored) {
        let of_row = comptime!(plan.side_keys.div_ceil(FOUR));
        let mut order = SharedMemory::<Vector<u32, Four>>::new(comptime!(plan.tile * of_row));
        for vector in range_stepped(at.lane, of_row, at.lanes) {
            order[at.row * of_row + vector] = listed.keys(vector);
        }
        sync_cube();
        let stored = Stored { keys: order, first: at.row * of_row };
        select::<Stored>(&stored, vectors, at, &mut keys, &mut scratch);
    } else {
        select::<Scores>(&listed, vectors, at, &mut keys, &mut scratch);
    }

    if comptime!(plan.direct || plan.matrix) {
        // A lone rank's scores are the approximate ones.
        let of_ranks = comptime!(if plan.direct { 0 } else { padded(plan.side_keys) });
        if place.token < place.end {
            for i in range_stepped(at.lane, comptime!(plan.top_m * plan.rank), at.lanes) {
                let key = keys[at.row * plan.top_m + i / plan.rank] as usize;
                let bits = approximate[first + of_ranks + key * plan.rank + i % plan.rank];
                scores[out + i] = f32::reinterpret(bits);
            }
        }
    } else {
        let mut queries = SharedMemory::<Vector<f32, D>>::new(comptime!(plan.tile * (plan.key_dim / plan.width)));
        normalise_queries::<E, D>(query, query_norm, &mut queries, place, at, eps, plan);
        score_kept::<E, D>(&queries, normalised, &keys, scores, out, place, at, plan);
    }
    sync_cube();
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
    if place.token < place.end {
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
    let depth = comptime!(plan.key_dim / plan.width);
    let first = query_of(place.token, place.side, plan) * depth;
    let row = at.row * depth;
    for d in range_stepped(at.lane, depth, at.lanes) {
        let mut value = Vector::<f32, D>::new(0.0);
        if place.token < place.end {
            value = query[first + d];
        }
        queries[row + d] = value;
    }
    if comptime!(plan.norm.is_some()) {
        sync_cube();
        let mut mean = 0.0f32;
        if comptime!(plan.norm == Some(Norm::Layer)) {
            mean = row_sum::<D>(queries, 0.0, at, depth, false) / comptime!(plan.key_dim as f32);
        }
        let squares = row_sum::<D>(queries, mean, at, depth, true);
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

/// Sum of a row's numbers less `mean`, or of their squares, in one order however many lanes a row has: planes that exchange go through the whole
/// row each, elsewhere each lane does. Ends with a barrier.
#[cube]
fn row_sum<D: Size>(
    rows: &SharedMemory<Vector<f32, D>>,
    mean: f32,
    at: Lane,
    #[comptime] depth: usize,
    #[comptime] squares: bool,
) -> f32 {
    let lanes = comptime!(at.plane.max(1));
    let mut own = Vector::<f32, D>::new(0.0);
    for d in range_stepped(at.lane % lanes, depth, lanes) {
        let centred = rows[at.row * depth + d] - Vector::new(mean);
        own += if squares { centred * centred } else { centred };
    }
    let sum = sum_of(component_sum::<D>(own), lanes);
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
    let depth = comptime!(plan.key_dim / plan.width);
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

/// `scores[first + i · rank + ρ] = queries[row] · normalised[side, kept[row, i], ρ]`. A unit takes all ρ of one key of its row, or a few units that
/// exchange do.
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
    let depth = comptime!(plan.key_dim / plan.width);
    let share = comptime!(plan.key_lanes());
    if place.token < place.end {
        for start in range_stepped(0usize, plan.top_m, comptime!(at.lanes / share)) {
            let (i, lane) = (start + at.lane / share, at.lane % share);
            let listed = kept[at.row * plan.top_m + min(i, comptime!(plan.top_m - 1))] as usize;
            let vectors = (place.side * plan.side_keys + listed) * comptime!(plan.rank * depth);
            let mut sums = zero_sums::<D>(plan.rank);
            for d in range_stepped(lane, depth, share) {
                let query = queries[at.row * depth + d];
                #[unroll]
                for rho in 0..plan.rank {
                    sums[rho] += query * Vector::cast_from(normalised[vectors + rho * depth + d]);
                }
            }
            #[unroll]
            for rho in 0..plan.rank {
                let sum = sum_of(component_sum::<D>(sums[rho]), share);
                if lane == 0 && i < plan.top_m {
                    scores[first + i * plan.rank + rho] = sum;
                }
            }
        }
    }
}
