//! `query[t, o] = Σ_k input[t, k] · weight[k, o]`, the projection of a tile of tokens in one cube.
//!
//! Moves the input once per column tile, the weight once per token tile (from cache where it fits) and the query once.

use cubecl::prelude::*;

use crate::product::{Columns, accumulate, zero_sums};

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ProjectPlan {
    /// Vectors of an input row.
    pub depth: usize,
    /// Vectors of a weight row.
    pub columns: usize,
    pub units: usize,
    /// Tokens of a cube.
    pub tile: usize,
    /// Column vectors of a unit.
    pub block: usize,
    /// Vectors of an input row that a cube holds at a time.
    pub slice: usize,
}

/// One cube computes `tile` tokens by `units · block` column vectors; `CUBE_POS` runs over column tiles first.
#[cube(launch_unchecked)]
pub(crate) fn project_kernel<I: Float, E: Float, O: Float, N: Size, W: Size>(
    input: &Array<Vector<I, W>>,
    weight: &Array<Vector<E, N>>,
    output: &mut Array<Vector<O, N>>,
    tokens: u32,
    cubes: u32,
    #[comptime] plan: ProjectPlan,
    #[define(I)] _input_type: StorageType,
    #[define(E)] _weight_type: StorageType,
    #[define(O)] _output_type: StorageType,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let column_tiles = comptime!(plan.columns.div_ceil(plan.units * plan.block));
    let token = CUBE_POS / column_tiles * plan.tile;
    let columns = Columns {
        first: CUBE_POS % column_tiles * comptime!(plan.units * plan.block) + UNIT_POS as usize,
        last: comptime!(plan.columns - 1).runtime(),
        stride: plan.units,
        count: plan.block,
    };
    let mut rows = SharedMemory::<Vector<f32, W>>::new(comptime!(plan.tile * plan.slice));
    let mut sums = zero_sums::<N>(comptime!(plan.tile * plan.block));
    for part in 0..comptime!(plan.depth.div_ceil(plan.slice)) {
        let start = part * plan.slice;
        let depth = min(plan.slice, plan.depth - start);
        load_rows::<I, W>(input, &mut rows, token, tokens as usize, start, depth, plan);
        sync_cube();
        let base = start * W::value() * plan.columns;
        accumulate::<E, N, W>(&rows, weight, &mut sums, base, columns, plan.columns, depth, plan.slice, plan.tile);
        sync_cube();
    }
    #[unroll]
    for c in 0..plan.block {
        #[unroll]
        for t in 0..plan.tile {
            if columns.holds(c) && token + t < tokens as usize {
                output[(token + t) * plan.columns + columns.at(c)] = Vector::cast_from(sums[c * plan.tile + t]);
            }
        }
    }
}

/// Brings `depth` vectors of each of the tile's rows into shared memory, zeros where the tile passes the last token.
#[cube]
fn load_rows<I: Float, W: Size>(
    input: &Array<Vector<I, W>>,
    rows: &mut SharedMemory<Vector<f32, W>>,
    token: usize,
    tokens: usize,
    start: usize,
    depth: usize,
    #[comptime] plan: ProjectPlan,
) {
    for item in range_stepped(UNIT_POS as usize, plan.tile * depth, plan.units) {
        let t = item / depth;
        let k = item % depth;
        let mut value = Vector::<f32, W>::new(0.0);
        if token + t < tokens {
            value = Vector::cast_from(input[(token + t) * plan.depth + start + k]);
        }
        rows[t * plan.slice + k] = value;
    }
}
