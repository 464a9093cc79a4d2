//! `query[t, o] = Σ_k input[t, k] · weight[k, o]`, the projection of a tile of tokens in one cube.
//!
//! Moves the input once per column tile, the weight once per token tile (from cache where it fits) and the query once.

use cubecl::prelude::*;

use crate::product::{accumulate, zero_sums};

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ProjectPlan {
    pub depth: usize,
    /// Vectors of a weight row.
    pub columns: usize,
    pub units: usize,
    /// Tokens of a cube.
    pub tile: usize,
    /// Depth of the slice of the input that a cube holds at a time.
    pub slice: usize,
}

/// One cube computes `tile` tokens by `units` column vectors; `CUBE_POS` runs over column tiles first.
#[cube(launch_unchecked)]
pub(crate) fn project_kernel<I: Float, E: Float, O: Float, N: Size>(
    input: &Array<I>,
    weight: &Array<Vector<E, N>>,
    output: &mut Array<Vector<O, N>>,
    tokens: u32,
    cubes: u32,
    #[comptime] plan: ProjectPlan,
    #[define(I)] _input: StorageType,
    #[define(E)] _weight: StorageType,
    #[define(O)] _output: StorageType,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let column_tiles = comptime!(plan.columns.div_ceil(plan.units));
    let token = CUBE_POS / column_tiles * plan.tile;
    let column = CUBE_POS % column_tiles * plan.units + UNIT_POS as usize;
    let mut rows = SharedMemory::<f32>::new(comptime!(plan.tile * plan.slice));
    let mut sums = zero_sums::<N>(plan.tile);
    for part in 0..comptime!(plan.depth.div_ceil(plan.slice)) {
        let start = part * plan.slice;
        let depth = min(plan.slice, plan.depth - start);
        load_rows::<I>(input, &mut rows, token, tokens as usize, start, depth, plan);
        sync_cube();
        if column < plan.columns {
            let first = start * plan.columns + column;
            accumulate::<E, N>(&rows, weight, &mut sums, first, plan.columns, depth, plan.slice, plan.tile);
        }
        sync_cube();
    }
    if column < plan.columns {
        #[unroll]
        for t in 0..plan.tile {
            if token + t < tokens as usize {
                output[(token + t) * plan.columns + column] = Vector::cast_from(sums[t]);
            }
        }
    }
}

/// Brings `depth` numbers of each of the tile's rows into shared memory, zeros where the tile passes the last token.
#[cube]
fn load_rows<I: Float>(
    input: &Array<I>,
    rows: &mut SharedMemory<f32>,
    token: usize,
    tokens: usize,
    start: usize,
    depth: usize,
    #[comptime] plan: ProjectPlan,
) {
    #[unroll]
    for t in 0..plan.tile {
        for k in range_stepped(UNIT_POS as usize, depth, plan.units) {
            let mut value = 0.0f32;
            if token + t < tokens {
                value = f32::cast_from(input[(token + t) * plan.depth + start + k]);
            }
            rows[t * plan.slice + k] = value;
        }
    }
}
