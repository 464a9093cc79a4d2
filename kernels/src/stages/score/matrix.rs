//! The stage on matrix units: a tile of tokens against the keys of a side of a head, 128 at a time.
//!
//! A cube rounds its tokens' queries to the keys' type and keeps them in shared memory. For each 128 keys, planes multiply groups of 16 keys
//! with 32 tokens each, sums in f32, into a `[tile, 128]` block of shared memory; then each plane goes on selecting rows of its own
//! ([`threshold`](crate::select::threshold)). When all keys of the range have been seen, the same is done with the normalised keys, rank by rank, and
//! each row takes the scores of the keys that it keeps. Reads the projected and the normalised keys once per tile of tokens, from cache, and
//! writes what it keeps.

use cubecl::cmma::{Matrix, MatrixIdent, MatrixLayout, execute, fill, load, store};
use cubecl::prelude::*;

use super::forward::query_of;
use super::plan::{MATRIX_KEYS, MATRIX_PLANES, MATRIX_ROWS, PADDING, ScorePlan};
use super::{GROUP, padded};
use crate::linear::tile::component_sum;
use crate::select::sort::sort_pairs;
use crate::select::threshold::{Listed, first_of, leave_best, list};
use crate::select::{FOUR, Four, Lane, NOTHING, Scratch, order_key, score_of};
use crate::stages::norm::{Norm, scale_of};

/// What the units of a plane know of their place: the rows that the plane selects are `first_row` and after.
#[derive(CubeType, Clone, Copy)]
struct Plane {
    /// Among the cube's.
    index: usize,
    lane: usize,
    first_row: usize,
}

/// Where a group of 16 keys lies among all numbers of a form of keys: number `d` of key `i` at `first + d · of_number + i · of_key`, one of the
/// two steps being 1.
#[derive(CubeType, Clone, Copy)]
struct Keys {
    first: usize,
    of_number: usize,
    of_key: usize,
    #[cube(comptime)]
    by_key: bool,
}

/// As [`score_kernel`](super::forward::score_kernel), on matrix units. `CUBE_POS` runs over splits, then sides, then tiles of tokens.
#[cube(launch_unchecked)]
pub(crate) fn score_matrix_kernel<E: Float, D: Size>(
    query: &Array<Vector<f32, D>>,
    query_norm: &Array<Vector<f32, D>>,
    projected: &Array<E>,
    normalised: &Array<E>,
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

    let width = D::value();
    let mut queries =
        SharedMemory::<Vector<E, D>>::new_aligned(comptime!(plan.tile * (plan.key_dim + PADDING) / width), 128usize);
    let mut scores =
        SharedMemory::<Vector<f32, Four>>::new_aligned(comptime!(plan.tile * (MATRIX_KEYS + PADDING) / FOUR), 128usize);
    let mut scratch = Scratch::new(comptime!(plan.select()));
    for r in 0..rows {
        let row = plane.first_row + r;
        normalise_row::<E, D>(query, query_norm, &mut queries, row, first_token + row, tokens, side, plane, eps, plan);
        scratch.better[row * plan.plane + plane.lane] = 0u32;
        scratch.equal[row * plan.plane + plane.lane] = NOTHING;
    }
    sync_cube();

    for tile in range_stepped(0usize, count, MATRIX_KEYS) {
        let key = first_key + tile + plane.index % MATRIX_PLANES * GROUP;
        let of_number = comptime!(padded(plan.side_keys));
        if key < of_number {
            let first = side * comptime!(plan.key_dim * of_number) + key;
            let keys = Keys { first, of_number: of_number.runtime(), of_key: 1usize.runtime(), by_key: false };
            multiply::<E, D>(&queries, projected, &mut scores, keys, plane, plan);
        }
        sync_cube();
        for r in 0..rows {
            list_row(&scores, &mut scratch, plane.first_row + r, plane.lane, tile, count, plan);
        }
        sync_cube();
    }

    let listed = comptime!(plan.splits > 1 || plan.direct);
    for r in 0..rows {
        let row = plane.first_row + r;
        let token = first_token + row;
        let out = ((token * sides + side) * plan.splits + split) * plan.keep;
        let first = keep_row(&mut scratch, row, plane.lane, plan);
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
            for r in 0..rows {
                scratch.better[(plane.first_row + r) * plan.plane + plane.lane] = 0u32;
            }
            for tile in range_stepped(0usize, plan.side_keys, MATRIX_KEYS) {
                let key = tile + plane.index % MATRIX_PLANES * GROUP;
                if key < plan.side_keys {
                    let key = side * plan.side_keys + whole_group(key, plan);
                    let of_key = comptime!(plan.rank * plan.key_dim);
                    let first = key * of_key + rho * plan.key_dim;
                    let keys = Keys { first, of_number: 1usize.runtime(), of_key: of_key.runtime(), by_key: true };
                    multiply::<E, D>(&queries, normalised, &mut scores, keys, plane, plan);
                }
                sync_cube();
                for r in 0..rows {
                    let row = plane.first_row + r;
                    let list = (first_token + row) * sides + side;
                    let out = list * comptime!(plan.top_m * plan.rank) + rho;
                    let writes = first_token + row < tokens;
                    take_scores(&scores, &mut scratch, kept_scores, row, plane.lane, tile, out, writes, plan);
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

/// Normalises a row's query and rounds it; zeros past the last token.
#[cube]
fn normalise_row<E: Float, D: Size>(
    query: &Array<Vector<f32, D>>,
    query_norm: &Array<Vector<f32, D>>,
    queries: &mut SharedMemory<Vector<E, D>>,
    row: usize,
    token: usize,
    tokens: usize,
    side: usize,
    plane: Plane,
    eps: f32,
    #[comptime] plan: ScorePlan,
) {
    let width = D::value();
    let depth = comptime!(plan.key_dim / width);
    let pitch = comptime!((plan.key_dim + PADDING) / width);
    let first = query_of(min(token, tokens - 1), side, plan) * depth;
    let mut mean = 0.0f32;
    let mut scale = 1.0f32;
    if comptime!(plan.norm.is_some()) {
        if comptime!(plan.norm == Some(Norm::Layer)) {
            let mut own = Vector::<f32, D>::new(0.0);
            for d in range_stepped(plane.lane, depth, plan.plane) {
                own += query[first + d];
            }
            mean = plane_sum(component_sum::<D>(own)) / comptime!(plan.key_dim as f32);
        }
        let mut own = Vector::<f32, D>::new(0.0);
        for d in range_stepped(plane.lane, depth, plan.plane) {
            let centred = query[first + d] - Vector::new(mean);
            own += centred * centred;
        }
        scale = scale_of(plane_sum(component_sum::<D>(own)), eps, plan.key_dim);
    }
    for d in range_stepped(plane.lane, depth, plan.plane) {
        let mut value = query[first + d];
        if comptime!(plan.norm.is_some()) {
            value = (value - Vector::new(mean)) * Vector::new(scale) * query_norm[d];
        }
        if token >= tokens {
            value = Vector::new(0.0);
        }
        queries[row * pitch + d] = Vector::cast_from(value);
    }
}

/// `scores[row, group · 16 + i] = queries[row] · keys[i]` for the plane's 32 rows and its group of 16 keys.
#[cube]
fn multiply<E: Float, D: Size>(
    queries: &SharedMemory<Vector<E, D>>,
    weight: &Array<E>,
    scores: &mut SharedMemory<Vector<f32, Four>>,
    keys: Keys,
    plane: Plane,
    #[comptime] plan: ScorePlan,
) {
    let width = D::value();
    let pitch = comptime!((plan.key_dim + PADDING) / width);
    let score_pitch = comptime!((MATRIX_KEYS + PADDING) / FOUR);
    let layout = comptime!(if keys.by_key { MatrixLayout::ColMajor } else { MatrixLayout::RowMajor });
    let first_row = plane.index / MATRIX_PLANES * MATRIX_ROWS;
    // SAFETY: filled, or loaded before they are multiplied.
    let (upper, lower, group, upper_sums, lower_sums) = unsafe {
        (
            Matrix::<E>::uninitialized(MatrixIdent::A, GROUP, GROUP, GROUP, MatrixLayout::RowMajor),
            Matrix::<E>::uninitialized(MatrixIdent::A, GROUP, GROUP, GROUP, MatrixLayout::RowMajor),
            Matrix::<E>::uninitialized(MatrixIdent::B, GROUP, GROUP, GROUP, layout),
            Matrix::<f32>::uninitialized(MatrixIdent::Accumulator, GROUP, GROUP, GROUP, MatrixLayout::Undefined),
            Matrix::<f32>::uninitialized(MatrixIdent::Accumulator, GROUP, GROUP, GROUP, MatrixLayout::Undefined),
        )
    };
    fill::<f32>(&upper_sums, 0.0f32);
    fill::<f32>(&lower_sums, 0.0f32);
    let step = keys.of_number * keys.of_key;
    #[unroll]
    for d in 0..comptime!(plan.key_dim / GROUP) {
        let number = keys.first + comptime!(d * GROUP) * keys.of_number;
        load::<E, E>(&group, &weight.slice(number, number + 1), step as u32);
        let at = first_row * pitch + comptime!(d * GROUP / width);
        load::<E, Vector<E, D>>(&upper, &queries.slice(at, at + 1), comptime!((plan.key_dim + PADDING) as u32));
        let at = at + comptime!(GROUP * pitch);
        load::<E, Vector<E, D>>(&lower, &queries.slice(at, at + 1), comptime!((plan.key_dim + PADDING) as u32));
        execute::<E, E, f32, f32>(&upper, &group, &upper_sums, &upper_sums);
        execute::<E, E, f32, f32>(&lower, &group, &lower_sums, &lower_sums);
    }
    let at = first_row * score_pitch + plane.index % MATRIX_PLANES * comptime!(GROUP / FOUR);
    let step = comptime!((MATRIX_KEYS + PADDING) as u32);
    store::<f32, Vector<f32, Four>>(&mut scores.slice_mut(at, at + 1), &upper_sums, step, MatrixLayout::RowMajor);
    let at = at + comptime!(GROUP * score_pitch);
    store::<f32, Vector<f32, Four>>(&mut scores.slice_mut(at, at + 1), &lower_sums, step, MatrixLayout::RowMajor);
}

/// Goes on selecting a row, among the keys of a tile from `tile` on, of `count` in all.
#[cube]
fn list_row(
    scores: &SharedMemory<Vector<f32, Four>>,
    scratch: &mut Scratch,
    row: usize,
    lane: usize,
    tile: usize,
    count: usize,
    #[comptime] plan: ScorePlan,
) {
    let mut keys = Vector::<u32, Four>::new(NOTHING);
    let position = tile + lane * FOUR;
    if position < count {
        let found = scores[row * comptime!((MATRIX_KEYS + PADDING) / FOUR) + lane];
        #[unroll]
        for n in 0..FOUR {
            if position + n < count {
                keys[n] = order_key(found[n]);
            }
        }
    }
    let own = row * plan.plane + lane;
    let so_far = Listed { count: scratch.better[own], bound: scratch.equal[own] };
    let listed = list(scratch, first_of(row, comptime!(plan.select())), lane, so_far, keys, position as u32);
    scratch.better[own] = listed.count;
    scratch.equal[own] = listed.bound;
}

/// Leaves a row's best, in ascending order of their positions, from the returned place of the lists on.
#[cube]
fn keep_row(scratch: &mut Scratch, row: usize, lane: usize, #[comptime] plan: ScorePlan) -> usize {
    let own = row * plan.plane + lane;
    let first = first_of(row, comptime!(plan.select()));
    leave_best(scratch, first, lane, Listed { count: scratch.better[own], bound: scratch.equal[own] });
    let at = Lane { row, lane, lanes: plan.plane, plane: plan.plane };
    sort_pairs(&mut scratch.positions, &mut scratch.keys, first, at, plan.keep);
    first
}

/// Writes the scores that a row keeps of the keys of a tile, those from the first that has not been written on.
#[cube]
fn take_scores(
    scores: &SharedMemory<Vector<f32, Four>>,
    scratch: &mut Scratch,
    kept_scores: &mut Array<f32>,
    row: usize,
    lane: usize,
    tile: usize,
    out: usize,
    writes: bool,
    #[comptime] plan: ScorePlan,
) {
    let first = first_of(row, comptime!(plan.select()));
    let pitch = comptime!((MATRIX_KEYS + PADDING) / FOUR);
    let mut taken = scratch.better[row * plan.plane + lane];
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
                let score = scores[row * pitch + column / FOUR];
                let mut of_key = score[0];
                #[unroll]
                for n in 1..FOUR {
                    if column % FOUR == n {
                        of_key = score[n];
                    }
                }
                kept_scores[out + i as usize * plan.rank] = of_key;
            }
        }
        found = plane_ballot(here)[0].count_ones();
        taken += found;
    }
    scratch.better[row * plan.plane + lane] = taken;
}
