//! Scores on matrix units, approximate ones and those of all ranks: a tile of tokens against a range of the lines of a side of a head, 128 at a time.
//!
//! A cube rounds its tokens' queries to the keys' type and keeps them in shared memory. Eight planes multiply a group of 16 lines each with all
//! tokens, or of the largest tiles two groups with half of the tokens, sums in f32, and write them. Reads the lines once per tile of tokens, from
//! cache.

use cubecl::cmma::MmaDefinition;
use cubecl::prelude::*;

use super::GROUP;
use super::forward::query_of;
use super::plan::{MATRIX_KEYS, ScorePlan};
use crate::launch::planes::sum_of;
use crate::linear::tile::component_sum;
use crate::select::{FOUR, Four};
use crate::stages::norm::{Norm, scale_of};

/// Numbers of the depth that a lane's load of 8 takes part in: four lanes share a row.
const STEP: usize = 32;
/// Steps of the depth whose keys are on their way at once, where a plane has registers for them.
const AHEAD: usize = 6;
/// Numbers of a load.
pub(super) const EIGHT: usize = 8;

pub(super) type Two = Const<2>;

/// Where a unit stands: its plane of the cube, and its place in it.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Plane {
    pub index: usize,
    pub lane: usize,
}

#[cube]
impl Plane {
    pub fn of_unit(#[comptime] units: usize) -> Plane {
        Plane { index: UNIT_POS as usize / units, lane: UNIT_POS as usize % units }
    }
}

/// As [`approximate_kernel`](super::forward::approximate_kernel), on matrix units, of `lines` `[heads, 2, pitch, key_dim]`.
#[cube(launch_unchecked)]
pub(crate) fn approximate_matrix_kernel<E: Float>(
    query: &Array<Vector<f32, Four>>,
    query_norm: &Array<Vector<f32, Four>>,
    lines: &Array<Vector<u32, Four>>,
    scores: &mut Array<Vector<f32, Two>>,
    eps: f32,
    first: u32,
    end: u32,
    range: u32,
    splits: u32,
    cubes: u32,
    #[comptime] plan: ScorePlan,
    #[define(E)] _dtype: StorageType,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let sides = comptime!(plan.heads * 2);
    let (range, splits) = (range as usize, splits as usize);
    let side = CUBE_POS / splits % sides;
    let tile = CUBE_POS / splits / sides * plan.tile;
    let (first, end) = (first as usize, end as usize);
    let first_line = CUBE_POS % splits * range;
    let plane = Plane::of_unit(plan.plane);

    let mut queries = SharedMemory::<Vector<u32, Four>>::new(comptime!(plan.tile * plan.key_dim / EIGHT));
    normalise_tile::<E>(query, query_norm, &mut queries, first + tile, end, side, plane, eps, plan);
    sync_cube();

    let (shares, span) = comptime!(plan.matrix_shares());
    let part = plane.index % shares * comptime!(plan.tile / shares);
    let lines_of_plane = comptime!(span * GROUP);
    let last = min(first_line + range, comptime!(plan.pitch()));
    for line in range_stepped(first_line + plane.index / shares * lines_of_plane, last, MATRIX_KEYS) {
        let mut sums = Sequence::<Array<Vector<f32, Two>>>::new();
        let weight = (side * comptime!(plan.pitch()) + line) * plan.key_dim;
        // Of the last lines of a range one group may be left.
        let groups = (last - line) / GROUP;
        multiply::<E>(&queries, lines, &mut sums, weight, part, groups, plane.lane, AHEAD, plan);
        #[unroll]
        for g in 0..comptime!(plan.tile / shares / GROUP) {
            #[unroll]
            for half in 0..2usize {
                let row = tile + part + comptime!(g * GROUP + half * EIGHT) + plane.lane / FOUR;
                let out = (row * sides + side) * comptime!(plan.pitch() / 2) + line / 2 + plane.lane % FOUR;
                #[unroll]
                for n in 0..2 * span {
                    if first + row < end && comptime!(n / 2) < groups {
                        scores[out + comptime!(n * FOUR)] = sums.index(comptime!(2 * span * g + n))[half];
                    }
                }
            }
        }
    }
}

/// Normalises the queries of a tile's tokens, from `first` on, and rounds them; zeros from token `end` on. They lie as a lane's parts of the products of 16
/// by 8 by 16 follow each other: of 16 rows and 16 numbers, a load for each lane.
#[cube]
pub(super) fn normalise_tile<E: Float>(
    query: &Array<Vector<f32, Four>>,
    query_norm: &Array<Vector<f32, Four>>,
    queries: &mut SharedMemory<Vector<u32, Four>>,
    first: usize,
    end: usize,
    side: usize,
    plane: Plane,
    eps: f32,
    #[comptime] plan: ScorePlan,
) {
    let planes = comptime!(plan.units / plan.plane);
    let (eights, steps) = comptime!((plan.key_dim / EIGHT, plan.key_dim / STEP));
    #[unroll]
    for pair in 0..comptime!(plan.tile / 2 / planes) {
        let row = plane.index + pair * planes;
        let token = first + row / EIGHT * GROUP + row % EIGHT;
        let upper = normalised_row::<E>(query, query_norm, token, end, side, plane, eps, plan);
        let lower = normalised_row::<E>(query, query_norm, token + EIGHT, end, side, plane, eps, plan);
        #[unroll]
        for i in 0..comptime!(eights.div_ceil(plan.plane)) {
            let at = comptime!(i * plan.plane) + plane.lane;
            if at < eights {
                let fragment = (row / EIGHT * steps + at / FOUR) * comptime!(2 * plan.plane);
                let place = fragment + row % EIGHT * FOUR + at % FOUR;
                #[unroll]
                for half in 0..2usize {
                    let mut words = Vector::<u32, Four>::new(upper[i][2 * half]);
                    words[1] = lower[i][2 * half];
                    words[2] = upper[i][2 * half + 1];
                    words[3] = lower[i][2 * half + 1];
                    queries[place + comptime!(half * plan.plane)] = words;
                }
            }
        }
    }
}

/// A token's query, normalised and rounded, eight numbers a lane and step.
#[cube]
fn normalised_row<E: Float>(
    query: &Array<Vector<f32, Four>>,
    query_norm: &Array<Vector<f32, Four>>,
    token: usize,
    end: usize,
    side: usize,
    plane: Plane,
    eps: f32,
    #[comptime] plan: ScorePlan,
) -> Array<Vector<u32, Four>> {
    let eights = comptime!(plan.key_dim / EIGHT);
    let steps = comptime!(eights.div_ceil(plan.plane));
    let first = query_of(min(token, end - 1), side, plan) * comptime!(plan.key_dim / FOUR);
    let mut own = Array::<Vector<f32, Four>>::new(2 * steps);
    let mut sum = Vector::<f32, Four>::new(0.0);
    #[unroll]
    for i in 0..2 * steps {
        let at = comptime!(i / 2 * plan.plane) + plane.lane;
        own[i] = Vector::new(0.0);
        if at < eights && token < end {
            own[i] = query[first + 2 * at + comptime!(i % 2)];
        }
        sum += own[i];
    }
    let mut mean = 0.0f32;
    let mut scale = 1.0f32;
    if comptime!(plan.norm.is_some()) {
        if comptime!(plan.norm == Some(Norm::Layer)) {
            mean = sum_of(component_sum::<Four>(sum), plan.plane) / comptime!(plan.key_dim as f32);
        }
        let mut squares = Vector::<f32, Four>::new(0.0);
        #[unroll]
        for i in 0..2 * steps {
            if comptime!(i / 2 * plan.plane) + plane.lane < eights {
                let centred = own[i] - Vector::new(mean);
                squares += centred * centred;
            }
        }
        scale = scale_of(sum_of(component_sum::<Four>(squares), plan.plane), eps, plan.key_dim);
    }
    let mut rounded = Array::<Vector<u32, Four>>::new(steps);
    #[unroll]
    for step in 0..steps {
        let at = comptime!(step * plan.plane) + plane.lane;
        let mut words = Vector::<u32, Four>::new(0u32);
        if at < eights {
            #[unroll]
            for half in 0..2usize {
                let mut value = own[comptime!(2 * step + half)];
                if comptime!(plan.norm.is_some()) {
                    value = (value - Vector::new(mean)) * Vector::new(scale) * query_norm[2 * at + half];
                }
                words[2 * half] = pair_of::<E>(value[0], value[1]);
                words[2 * half + 1] = pair_of::<E>(value[2], value[3]);
            }
        }
        rounded[step] = words;
    }
    rounded
}

/// Two numbers, rounded, as a word.
#[cube]
fn pair_of<E: Float>(first: f32, second: f32) -> u32 {
    let mut pair = Vector::<E, Two>::new(E::cast_from(first));
    pair[1] = E::cast_from(second);
    u32::reinterpret(pair)
}

/// `sums` of `queries[part + row] · lines[i]` for a plane's rows and its groups of 16 lines, the first of which begins at number `first` of `weight`: for
/// each 16 rows and 8 lines a lane's numbers of rows `lane / 4`, and 8 further. Where fewer `groups` are left, the last stands for the others.
///
/// A matrix unit sums over its 16 columns of both factors in any order, so that a lane takes eight numbers in a row of each, of which four words are
/// its part of two products of 16 by 8 by 16. The keys of `ahead` steps are on their way at once, of half as many for two groups.
#[cube]
pub(super) fn multiply<E: Float>(
    queries: &SharedMemory<Vector<u32, Four>>,
    weight: &Array<Vector<u32, Four>>,
    sums: &mut Sequence<Array<Vector<f32, Two>>>,
    first: usize,
    part: usize,
    groups: usize,
    lane: usize,
    #[comptime] ahead: usize,
    #[comptime] plan: ScorePlan,
) {
    let (row, column) = (lane / FOUR, lane % FOUR);
    let (shares, span) = comptime!(plan.matrix_shares());
    let depth = comptime!(plan.key_dim / EIGHT);
    let of_rows = comptime!(plan.tile / shares / GROUP);
    #[unroll]
    for _ in 0..2 * span * of_rows {
        let mut sum = Array::<Vector<f32, Two>>::new(2usize);
        sum[0] = Vector::new(0.0);
        sum[1] = Vector::new(0.0);
        sums.push(sum);
    }
    let (steps, ahead) = comptime!((plan.key_dim / STEP, ahead / span));
    let line = first / EIGHT + row * depth + column;
    let query = part / GROUP * comptime!(2 * steps * plan.plane) + lane;
    #[unroll]
    for chunk in 0..comptime!(steps.div_ceil(ahead)) {
        let (start, end) = comptime!((chunk * ahead, ((chunk + 1) * ahead).min(steps)));
        let mut loaded = Array::<Vector<u32, Four>>::new(comptime!(2 * span * (end - start)));
        #[unroll]
        for s in start..end {
            #[unroll]
            for n in 0..2 * span {
                let group = min(comptime!(n / 2).runtime(), groups - 1);
                let at = line + (group * GROUP + comptime!(n % 2 * EIGHT)) * depth + comptime!(s * FOUR);
                loaded[comptime!(2 * span * (s - start) + n)] = weight[at];
            }
        }
        #[unroll]
        for s in start..end {
            #[unroll]
            for g in 0..of_rows {
                let at = query + comptime!(2 * (g * steps + s) * plan.plane);
                let (first, second) = (queries[at], queries[at + plan.plane]);
                // One after the other, products of a sum would wait for each other.
                #[unroll]
                for n in 0..2 * span {
                    let keys = loaded[comptime!(2 * span * (s - start) + n)];
                    multiply_words::<E>(first, keys[0], keys[1], sums.index_mut(comptime!(2 * span * g + n)));
                }
                #[unroll]
                for n in 0..2 * span {
                    let keys = loaded[comptime!(2 * span * (s - start) + n)];
                    multiply_words::<E>(second, keys[2], keys[3], sums.index_mut(comptime!(2 * span * g + n)));
                }
            }
        }
    }
}

/// Adds a product of 16 rows by 8 keys, 16 numbers deep, to `sums`; the words are the lane's parts of both.
#[cube]
fn multiply_words<E: Float>(row_words: Vector<u32, Four>, key: u32, key_next: u32, sums: &mut Array<Vector<f32, Two>>) {
    let definition = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let mut rows = Array::<Vector<E, Two>>::new(4usize);
    #[unroll]
    for i in 0..FOUR {
        rows[i] = Vector::reinterpret(row_words[i]);
    }
    let mut keys = Array::<Vector<E, Two>>::new(2usize);
    keys[0] = Vector::reinterpret(key);
    keys[1] = Vector::reinterpret(key_next);
    definition.execute_inplace(&rows, &keys, sums);
}
