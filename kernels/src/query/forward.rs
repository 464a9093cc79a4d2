//! `query[t, o] = Σ_k input[t, k] · weight[k, o]`, a tile of tokens by a tile of columns in each cube.
//!
//! A unit reads the input rows of its tile and its own columns of the weight straight from global memory: units of a cube read the
//! same rows at the same time, which caches serve, and there is no barrier to wait at. Moves the input once per column tile,
//! the weight once per token tile (from cache where it fits: tiles of tokens run next to each other) and the query once. At few
//! tokens a cube takes few columns and its units share out the depth.

use cubecl::prelude::*;

use crate::product::{Columns, Outputs, Rows, Sharing, multiply};

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ProjectPlan {
    pub sharing: Sharing,
    /// Tokens of a cube.
    pub tile: usize,
}

/// `depth` is the vectors of an input row, `width` those of a weight row. They are known only when the kernel runs, so that every
/// product of a layer is one kernel, compiled once.
///
/// One cube computes `tile` tokens by `lanes · block` column vectors; `CUBE_POS` runs over token tiles first.
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
    let sharing = comptime!(plan.sharing);
    let first = CUBE_POS / token_tiles * comptime!(sharing.lanes * sharing.block);
    let columns = Columns {
        first: first + UNIT_POS as usize % sharing.lanes,
        last: width as usize - 1,
        stride: sharing.lanes,
        count: sharing.block,
    };
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let token = CUBE_POS % token_tiles * plan.tile;
    let rows = Rows { first: token, last: tokens as usize - 1, pitch: depth as usize, count: plan.tile };
    let outputs = Outputs { first: token, end: tokens as usize };
    multiply::<I, E, O, N, W>(
        &input.to_slice(),
        &rows.places(),
        weight,
        0usize,
        output,
        outputs,
        columns,
        sharing.slices,
    );
}
