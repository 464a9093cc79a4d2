//! `query[t, o] = Σ_k input[t, k] · weight[k, o]`, a tile of tokens by a tile of columns in each cube.
//!
//! A unit reads the input rows of its tile and its own columns of the weight straight from global memory: units of a cube read the
//! same rows at the same time, which caches serve, and there is no barrier to wait at. Moves the input once per column tile,
//! the weight once per token tile (from cache where it fits: tiles of tokens run next to each other) and the query once.

use cubecl::prelude::*;

use crate::product::{Columns, Rows, accumulate, zero_sums};

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ProjectPlan {
    pub units: usize,
    /// Tokens of a cube.
    pub tile: usize,
    /// Column vectors of a unit.
    pub block: usize,
}

/// `depth` is the vectors of an input row, `width` those of a weight row. They are known only when the kernel runs, so that every
/// product of a layer is one kernel, compiled once.
///
/// One cube computes `tile` tokens by `units · block` column vectors; `CUBE_POS` runs over token tiles first.
#[cube(launch_unchecked)]
pub(crate) fn project_kernel<I: Float, E: Float, O: Float, N: Size, W: Size>(
    input: &Array<Vector<I, W>>,
    weight: &Array<Vector<E, N>>,
    output: &mut Array<Vector<O, N>>,
    depth: u32,
    width: u32,
    tokens: u32,
    cubes: u32,
    #[comptime] plan: ProjectPlan,
    #[define(I)] _input_type: StorageType,
    #[define(E)] _weight_type: StorageType,
    #[define(O)] _output_type: StorageType,
) {
    let token_tiles = tokens.div_ceil(plan.tile as u32) as usize;
    let columns = Columns {
        first: CUBE_POS / token_tiles * comptime!(plan.units * plan.block) + UNIT_POS as usize,
        last: width as usize - 1,
        stride: plan.units,
        count: plan.block,
    };
    if CUBE_POS >= cubes as usize || columns.first > columns.last {
        terminate!();
    }
    let token = CUBE_POS % token_tiles * plan.tile;
    let rows = Rows { first: token, last: tokens as usize - 1, pitch: depth as usize, count: plan.tile };
    let mut sums = zero_sums::<N>(comptime!(plan.tile * plan.block));
    accumulate::<I, E, N, W>(&input.to_slice(), rows, weight, &mut sums, 0usize, columns, width as usize);
    #[unroll]
    for c in 0..plan.block {
        #[unroll]
        for t in 0..plan.tile {
            if columns.holds(c) && token + t < tokens as usize {
                output[(token + t) * width as usize + columns.at(c)] = Vector::cast_from(sums[c * plan.tile + t]);
            }
        }
    }
}
