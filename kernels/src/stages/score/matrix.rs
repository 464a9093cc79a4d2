//! The stage on matrix units: a tile of tokens against the keys of a side of a head, 128 at a time.
//!
//! A cube rounds its tokens' queries to the keys' type and keeps them in shared memory. For each 128 keys, eight planes multiply a group of 16
//! keys each with all tokens, sums in f32, into a `[tile, 128]` block of shared memory; then each plane goes on selecting rows of its own
//! ([`threshold`](crate::select::threshold)). When all keys of the range have been seen, the same is done with the normalised keys, rank by rank, and
//! each row takes the scores of the keys that it keeps. Reads the projected and the normalised keys once per tile of tokens, from cache, and
//! writes what it keeps.

use cubecl::cmma::MmaDefinition;
use cubecl::prelude::*;

use super::forward::query_of;
use super::plan::{MATRIX_KEYS, MATRIX_PLANES, SCORE_PITCH, ScorePlan, query_pitch};
use super::{GROUP, padded};
use crate::linear::tile::component_sum;
use crate::select::sort::sort_pairs;
use crate::select::threshold::{Listing, first_of};
use crate::select::{FOUR, Four, Lane, NOTHING, Scratch, order_key, score_of};
use crate::stages::norm::{Norm, scale_of};

/// Numbers of the depth that a lane's load of 8 takes part in: four lanes share a row.
const STEP: usize = 32;
/// Steps of the depth whose keys are on their way at once.
const AHEAD: usize = 4;
/// Numbers of a load.
const EIGHT: usize = 8;

type Two = Const<2>;

/// What the units of a plane know of their place: the rows that the plane selects are `first_row` and after.
#[derive(CubeType, Clone, Copy)]
struct Plane {
    /// Among the cube's.
    index: usize,
    lane: usize,
    first_row: usize,
}

/// As [`score_kernel`](super::forward::score_kernel), on matrix units, the projected keys `[heads, 2, padded, key_dim]`. `CUBE_POS` runs over splits, then sides, then tiles of tokens.
#[cube(launch_unchecked)]
pub(crate) fn score_matrix_kernel<E: Float>(
    query: &Array<Vector<f32, Four>>,
    query_norm: &Array<Vector<f32, Four>>,
    projected: &Array<Vector<u32, Four>>,
    normalised: &Array<Vector<u32, Four>>,
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
    let side = CUBE_POS / plan.splits % sides;
    let first_token = CUBE_POS / plan.splits / sides * plan.tile;
    let tokens = tokens as usize;
    let first_key = split * plan.range;
    let count = min(plan.range, plan.side_keys - first_key);
    let rows = comptime!(plan.tile / (plan.units / plan.plane));
    let index = UNIT_POS as usize / plan.plane;
    let plane = Plane { index, lane: UNIT_POS as usize % plan.plane, first_row: index * rows };

    let mut queries = SharedMemory::<Vector<u32, Four>>::new(comptime!(plan.tile * query_pitch(plan.key_dim)));
    let mut scores = SharedMemory::<Vector<f32, Two>>::new(comptime!(plan.tile * SCORE_PITCH));
    let mut scratch = Scratch::new(comptime!(plan.select()));
    for r in 0..rows {
        let row = plane.first_row + r;
        normalise_row::<E>(query, query_norm, &mut queries, row, first_token + row, tokens, side, plane, eps, plan);
    }
    sync_cube();

    let select = comptime!(plan.select());
    let mut listing = Listing::new(plane.first_row, plane.lane, rows, select);

    for tile in range_stepped(0usize, count, MATRIX_KEYS) {
        let key = first_key + tile + plane.index * GROUP;
        let all = comptime!(padded(plan.side_keys));
        if plane.index < MATRIX_PLANES && key < all {
            let first = (side * all + key) * plan.key_dim;
            multiply::<E>(&queries, projected, &mut scores, first, plan.key_dim, plane, plan);
        }
        sync_cube();
        let keys = row_keys(&scores, plane, tile, count, rows);
        listing.list(&mut scratch, &keys, (tile + plane.lane * FOUR) as u32);
        sync_cube();
    }
    listing.leave_best(&mut scratch, plan.range);

    let listed = comptime!(plan.splits > 1 || plan.direct);
    for r in 0..rows {
        let row = plane.first_row + r;
        let token = first_token + row;
        let out = ((token * sides + side) * plan.splits + split) * plan.keep;
        let first = first_of(row, select);
        let at = Lane { row, lane: plane.lane, lanes: plan.plane, plane: plan.plane };
        sort_pairs(&mut scratch.positions, &mut scratch.keys, first, at, plan.keep);
        if token < tokens {
            for i in range_stepped(plane.lane, plan.keep, plan.plane) {
                kept_keys[out + i] = first_key as u32 + scratch.positions[first + i];
                if listed {
                    kept_scores[out + i] = score_of(scratch.keys[first + i]);
                }
            }
        }
    }
    if !listed {
        for rho in 0..plan.rank {
            let mut taken = Array::<u32>::new(rows);
            #[unroll]
            for r in 0..rows {
                taken[r] = 0u32;
            }
            for tile in range_stepped(0usize, plan.side_keys, MATRIX_KEYS) {
                let key = tile + plane.index * GROUP;
                if plane.index < MATRIX_PLANES && key < plan.side_keys {
                    let key = side * plan.side_keys + whole_group(key, plan);
                    let of_key = comptime!(plan.rank * plan.key_dim);
                    let first = key * of_key + rho * plan.key_dim;
                    multiply::<E>(&queries, normalised, &mut scores, first, of_key, plane, plan);
                }
                sync_cube();
                #[unroll]
                for r in 0..rows {
                    let row = plane.first_row + r;
                    let list = (first_token + row) * sides + side;
                    let out = list * comptime!(plan.top_m * plan.rank) + rho;
                    let writes = first_token + row < tokens;
                    let so_far = taken[r];
                    taken[r] =
                        take_scores(&scores, &scratch, kept_scores, so_far, row, plane.lane, tile, out, writes, plan);
                }
                sync_cube();
            }
        }
    }
}

/// Where the 16 keys of a group begin: earlier than `key`, where less than 16 are left from there on.
#[cube]
fn whole_group(key: usize, #[comptime] plan: ScorePlan) -> usize {
    min(key, comptime!(plan.side_keys - GROUP))
}

/// Normalises a row's query and rounds it, eight numbers a lane; zeros past the last token.
#[cube]
fn normalise_row<E: Float>(
    query: &Array<Vector<f32, Four>>,
    query_norm: &Array<Vector<f32, Four>>,
    queries: &mut SharedMemory<Vector<u32, Four>>,
    row: usize,
    token: usize,
    tokens: usize,
    side: usize,
    plane: Plane,
    eps: f32,
    #[comptime] plan: ScorePlan,
) {
    let depth = comptime!(plan.key_dim / FOUR);
    let first = query_of(min(token, tokens - 1), side, plan) * depth;
    let mut mean = 0.0f32;
    let mut scale = 1.0f32;
    if comptime!(plan.norm.is_some()) {
        if comptime!(plan.norm == Some(Norm::Layer)) {
            let mut own = Vector::<f32, Four>::new(0.0);
            for d in range_stepped(plane.lane, depth, plan.plane) {
                own += query[first + d];
            }
            mean = plane_sum(component_sum::<Four>(own)) / comptime!(plan.key_dim as f32);
        }
        let mut own = Vector::<f32, Four>::new(0.0);
        for d in range_stepped(plane.lane, depth, plan.plane) {
            let centred = query[first + d] - Vector::new(mean);
            own += centred * centred;
        }
        scale = scale_of(plane_sum(component_sum::<Four>(own)), eps, plan.key_dim);
    }
    for d in range_stepped(plane.lane, comptime!(plan.key_dim / EIGHT), plan.plane) {
        let mut words = Vector::<u32, Four>::new(0u32);
        #[unroll]
        for half in 0..2usize {
            let mut value = query[first + 2 * d + half];
            if comptime!(plan.norm.is_some()) {
                value = (value - Vector::new(mean)) * Vector::new(scale) * query_norm[2 * d + half];
            }
            if token >= tokens {
                value = Vector::new(0.0);
            }
            words[2 * half] = pair_of::<E>(value[0], value[1]);
            words[2 * half + 1] = pair_of::<E>(value[2], value[3]);
        }
        queries[row * comptime!(query_pitch(plan.key_dim)) + d] = words;
    }
}

/// Two numbers, rounded, as a word.
#[cube]
fn pair_of<E: Float>(first: f32, second: f32) -> u32 {
    let mut pair = Vector::<E, Two>::new(E::cast_from(first));
    pair[1] = E::cast_from(second);
    u32::reinterpret(pair)
}

/// `scores[row, plane · 16 + i] = queries[row] · keys[i]` for all rows and the plane's group of 16 keys, `keys[i]` beginning at number
/// `first + i · of_key` of `weight`.
///
/// A matrix unit sums over its 16 columns of both factors in any order, so that a lane takes eight numbers in a row of each, of which four words are
/// its part of two products of 16 by 8 by 16.
#[cube]
fn multiply<E: Float>(
    queries: &SharedMemory<Vector<u32, Four>>,
    weight: &Array<Vector<u32, Four>>,
    scores: &mut SharedMemory<Vector<f32, Two>>,
    first: usize,
    #[comptime] of_key: usize,
    plane: Plane,
    #[comptime] plan: ScorePlan,
) {
    let (row, column) = (plane.lane / FOUR, plane.lane % FOUR);
    let pitch = comptime!(query_pitch(plan.key_dim));
    let groups = comptime!(plan.tile / GROUP);
    let mut sums = Sequence::<Array<Vector<f32, Two>>>::new();
    #[unroll]
    for _ in 0..2 * groups {
        let mut sum = Array::<Vector<f32, Two>>::new(2usize);
        sum[0] = Vector::new(0.0);
        sum[1] = Vector::new(0.0);
        sums.push(sum);
    }
    let steps = comptime!(plan.key_dim / STEP);
    let key = first / EIGHT + row * comptime!(of_key / EIGHT) + column;
    #[unroll]
    for chunk in 0..comptime!(steps.div_ceil(AHEAD)) {
        let (start, end) = comptime!((chunk * AHEAD, ((chunk + 1) * AHEAD).min(steps)));
        let mut ahead = Array::<Vector<u32, Four>>::new(comptime!(2 * (end - start)));
        #[unroll]
        for s in start..end {
            let at = key + comptime!(s * FOUR);
            ahead[comptime!(2 * (s - start))] = weight[at];
            ahead[comptime!(2 * (s - start) + 1)] = weight[at + comptime!(EIGHT * of_key / EIGHT)];
        }
        #[unroll]
        for s in start..end {
            #[unroll]
            for g in 0..groups {
                let at = row * pitch + column + comptime!(g * GROUP * pitch + s * FOUR);
                let (upper, lower) = (queries[at], queries[at + comptime!(EIGHT * pitch)]);
                #[unroll]
                for n in 0..2usize {
                    let keys = ahead[comptime!(2 * (s - start) + n)];
                    let sum = sums.index_mut(comptime!(2 * g + n));
                    multiply_words::<E>(upper[0], lower[0], upper[1], lower[1], keys[0], keys[1], sum);
                    multiply_words::<E>(upper[2], lower[2], upper[3], lower[3], keys[2], keys[3], sum);
                }
            }
        }
    }
    #[unroll]
    for g in 0..groups {
        #[unroll]
        for n in 0..2usize {
            let at = (row + comptime!(g * GROUP)) * SCORE_PITCH + plane.index * EIGHT + comptime!(n * FOUR) + column;
            let sum = sums.index(comptime!(2 * g + n));
            scores[at] = sum[0];
            scores[at + comptime!(EIGHT * SCORE_PITCH)] = sum[1];
        }
    }
}

/// Adds a product of 16 rows by 8 keys, 16 numbers deep, to `sums`; the words are the lane's parts of both.
#[cube]
fn multiply_words<E: Float>(
    upper: u32,
    lower: u32,
    upper_next: u32,
    lower_next: u32,
    key: u32,
    key_next: u32,
    sums: &mut Array<Vector<f32, Two>>,
) {
    let definition = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let mut rows = Array::<Vector<E, Two>>::new(4usize);
    rows[0] = Vector::reinterpret(upper);
    rows[1] = Vector::reinterpret(lower);
    rows[2] = Vector::reinterpret(upper_next);
    rows[3] = Vector::reinterpret(lower_next);
    let mut keys = Array::<Vector<E, Two>>::new(2usize);
    keys[0] = Vector::reinterpret(key);
    keys[1] = Vector::reinterpret(key_next);
    definition.execute_inplace(&rows, &keys, sums);
}

/// The order keys of a lane's four scores in each of the plane's rows, of a tile that begins at key `tile` of `count`.
#[cube]
fn row_keys(
    scores: &SharedMemory<Vector<f32, Two>>,
    plane: Plane,
    tile: usize,
    count: usize,
    #[comptime] rows: usize,
) -> Array<Vector<u32, Four>> {
    let mut all = Array::<Vector<u32, Four>>::new(rows);
    let position = tile + plane.lane * FOUR;
    #[unroll]
    for r in 0..rows {
        let mut keys = Vector::<u32, Four>::new(NOTHING);
        if position < count {
            let at = (plane.first_row + r) * SCORE_PITCH + plane.lane * 2;
            let (found, next) = (scores[at], scores[at + 1]);
            #[unroll]
            for n in 0..2usize {
                if position + n < count {
                    keys[n] = order_key(found[n]);
                }
                if position + n + 2 < count {
                    keys[n + 2] = order_key(next[n]);
                }
            }
        }
        all[r] = keys;
    }
    all
}

/// Writes the scores that a row keeps of the keys of a tile; `so_far` have been written. Returns how many have then.
#[cube]
fn take_scores(
    scores: &SharedMemory<Vector<f32, Two>>,
    scratch: &Scratch,
    kept_scores: &mut Array<f32>,
    so_far: u32,
    row: usize,
    lane: usize,
    tile: usize,
    out: usize,
    writes: bool,
    #[comptime] plan: ScorePlan,
) -> u32 {
    let first = first_of(row, comptime!(plan.select()));
    let mut taken = so_far;
    let most = comptime!(plan.plane as u32);
    let mut found = most.runtime();
    while found == most {
        let i = taken + lane as u32;
        let mut here = false;
        if i < comptime!(plan.top_m as u32) {
            let key = scratch.positions[first + i as usize] as usize;
            here = key < tile + MATRIX_KEYS;
            if here && writes {
                let group = (key - tile) / GROUP * GROUP;
                let column = group + key - whole_group(tile + group, plan);
                let pair = scores[row * SCORE_PITCH + column / 2];
                let mut of_key = pair[0];
                if column % 2 == 1 {
                    of_key = pair[1];
                }
                kept_scores[out + i as usize * plan.rank] = of_key;
            }
        }
        found = plane_ballot(here)[0].count_ones();
        taken += found;
    }
    taken
}
