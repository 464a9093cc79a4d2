//! Outer products summed over tokens, `outer[m, n] = Σ_t left[t, m] · right[t, n]`: the gradient of a linear map's weight.
//!
//! A unit keeps a tile of left columns by a block of right vectors in registers and runs over the tokens, four at a time, so a
//! vector that is read serves a whole row or column of its sums. Where that leaves the device idle, or there are very many tokens, these
//! are cut into splits, each summed apart, and the splits are added in their order: the same bits in every run. Within a split the
//! registers are added to the sums after each chunk of tokens, so that rounding grows with the chunks and not with the tokens.

use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;

use crate::launch::device::Device;
use crate::launch::plan::{Launch, Planned};
use crate::launch::tensor::{Tensor, arg, check, empty, f32_storage, float_type, sizes, zeros};
use crate::linear::ProjectStrategy;
use crate::linear::column_sum::{ColumnSumPlans, column_sum};
use crate::linear::matrix::launch_matrix;
use crate::linear::matrix_plan::{MatrixPlans, MatrixSizes};
use crate::linear::project::launch_cubek;
use crate::linear::tile::{Columns, zero_sums};
use crate::{ElementType, Result};

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct OuterPlan {
    /// Left vectors of a unit.
    pub tile: usize,
    /// Right vectors of a unit.
    pub block: usize,
    /// Units of a cube.
    pub units: usize,
    /// Numbers of a load of a left row.
    pub left_width: usize,
    /// Numbers of a load of a right row.
    pub right_width: usize,
}

/// Tokens that a unit takes at a time.
const STEP: usize = 4;
/// Fewer tokens than this are not worth a split.
const MIN_SHARE: usize = 64;
/// Tokens that are added up in registers.
const CHUNK: usize = 512;
/// The most tokens of a split.
const MAX_SHARE: usize = 128 * CHUNK;

/// `outer` f32 `[m, n]` of `left` `[tokens, m]` and `right` `[tokens, n]`, each f32, f16 or bf16; sums in f32. Matrix units round both to `dtype`.
pub(crate) fn outer<R: Runtime>(
    client: &ComputeClient<R>,
    left: &Tensor<R>,
    right: &Tensor<R>,
    dtype: ElementType,
    strategy: ProjectStrategy,
) -> Result<Tensor<R>> {
    float_type(client, left, "left")?;
    float_type(client, right, "right")?;
    let ([tokens, m], [_, n]) = (sizes(left, "left")?, sizes(right, "right")?);
    check(client, left, "left", &[tokens, m], left.dtype)?;
    check(client, right, "right", &[tokens, n], right.dtype)?;
    if tokens * m * n == 0 {
        return zeros(client, "outer product", &[m, n]);
    }
    let outer = || empty(client, "outer product", &[m, n], f32_storage());
    match strategy.of_numbers(dtype, [m, n]) {
        ProjectStrategy::Tile | ProjectStrategy::InvariantTile => launch_tile(client, left, right),
        ProjectStrategy::Matrix | ProjectStrategy::InvariantMatrix => {
            let outer = outer()?;
            launch_matrix(client, left, right, &outer, dtype.storage(), &on_units(&Device::of(client), tokens, m, n))?;
            Ok(outer)
        }
        ProjectStrategy::Cubek => {
            let outer = outer()?;
            let left = Tensor::new(client, TensorHandle::new(left.handle.clone(), [m, tokens], [1, m], left.dtype));
            launch_cubek(client, &left, right, &outer)?;
            Ok(outer)
        }
    }
}

/// The product on matrix units. It sums over tokens: none of its sums is one token's.
fn on_units(device: &Device, tokens: usize, m: usize, n: usize) -> MatrixPlans {
    MatrixPlans::of(device, &MatrixSizes { rows: m, columns: n, depth: tokens, turned: true, whole: false })
}

/// How [`ProjectStrategy::Tile`] cuts the gradient of a weight `[m, n]` over so many tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightTiles {
    /// Tiles of rows, each of which reads all of the right factor.
    pub rows: usize,
    /// Tiles of columns, each of which reads all of the left factor.
    pub columns: usize,
    /// Parts of the tokens that are summed apart.
    pub splits: usize,
    /// Tokens of a part.
    pub share: usize,
    /// Sums the parts; what adds them up is a column sum.
    pub outer: Planned<OuterPlan>,
}

impl WeightTiles {
    /// Plans the gradient of a weight; a size of 0 counts as 1. The launch is checked when it is made.
    pub fn of(device: &Device, tokens: usize, m: usize, n: usize) -> Self {
        let [tokens, m, n] = [tokens, m, n].map(|size| size.max(1));
        let (left_width, right_width) = (device.width(4, &[m]), device.width(4, &[n]));
        let (left, right) = (m / left_width, n / right_width);
        let block = (right / device.plane_size).clamp(1, device.block);
        let units = device.units(right.div_ceil(block));
        let tile = (device.tile / left_width).clamp(1, left.next_power_of_two());
        let (rows, columns) = (left.div_ceil(tile), right.div_ceil(units * block));
        let splits = device.busy_cubes / (rows * columns);
        let splits = splits.clamp(1, tokens.div_ceil(MIN_SHARE)).max(tokens.div_ceil(MAX_SHARE));
        let share = tokens.div_ceil(splits);
        let splits = tokens.div_ceil(share);
        let launch = Launch {
            kernel: "outer_kernel",
            cubes: (rows * columns).saturating_mul(splits),
            units,
            shared_bytes: 0,
            loops: share.div_ceil(STEP) + share.div_ceil(CHUNK) + STEP,
        };
        let plan = OuterPlan { tile, block, units, left_width, right_width };
        Self { rows, columns, splits, share, outer: Planned { plan, launch } }
    }

    /// Chunks of a part, each added to the sums of those before it.
    pub fn chunks(&self) -> usize {
        self.share.div_ceil(CHUNK)
    }
}

/// The sizes of the gradient of a weight `[m, n]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OuterSizes {
    /// Tokens that are summed over.
    pub tokens: usize,
    /// Columns of the left factor.
    pub m: usize,
    /// Columns of the right factor.
    pub n: usize,
    /// What matrix units multiply.
    pub dtype: ElementType,
}

/// The launches of a weight's gradient.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OuterPlans {
    /// By [`ProjectStrategy::Tile`].
    Tile {
        /// Sums the parts.
        tiles: WeightTiles,
        /// Adds up the parts, where there are several.
        sum: Option<ColumnSumPlans>,
    },
    /// By [`ProjectStrategy::Matrix`].
    Matrix(MatrixPlans),
}

impl OuterPlans {
    /// Plans the gradient of a weight. None where a size is 0, and for cubek, which plans its own.
    pub fn of(device: &Device, sizes: &OuterSizes, strategy: ProjectStrategy) -> Option<Self> {
        let OuterSizes { tokens, m, n, dtype } = *sizes;
        if [tokens, m, n].contains(&0) {
            return None;
        }
        match strategy.of_numbers(dtype, [m, n]) {
            ProjectStrategy::Tile | ProjectStrategy::InvariantTile => {
                let tiles = WeightTiles::of(device, tokens, m, n);
                let sum = (tiles.splits > 1).then(|| ColumnSumPlans::of(device, &[tiles.splits], m.saturating_mul(n)));
                Some(Self::Tile { tiles, sum })
            }
            ProjectStrategy::Matrix | ProjectStrategy::InvariantMatrix => {
                Some(Self::Matrix(on_units(device, tokens, m, n)))
            }
            ProjectStrategy::Cubek => None,
        }
    }

    /// The launches in their order.
    pub fn launches(&self) -> Vec<Launch> {
        match self {
            Self::Tile { tiles, sum } => {
                let sums = sum.iter().flat_map(ColumnSumPlans::launches);
                core::iter::once(tiles.outer.launch).chain(sums).collect()
            }
            Self::Matrix(plans) => plans.launches(),
        }
    }
}

fn launch_tile<R: Runtime>(client: &ComputeClient<R>, left: &Tensor<R>, right: &Tensor<R>) -> Result<Tensor<R>> {
    let device = Device::of(client);
    let (tokens, m, n) = (left.shape()[0], left.shape()[1], right.shape()[1]);
    let WeightTiles { splits, share, outer: Planned { plan, launch }, .. } = WeightTiles::of(&device, tokens, m, n);
    let sums = empty(client, "outer product", &[splits, m * n], f32_storage())?;
    let (grid, cube_dim) = launch.start(&device)?;
    // SAFETY: shapes are checked; a unit reads below `tokens` and writes its own rows and columns.
    unsafe {
        outer_kernel::launch_unchecked::<R>(
            client,
            grid,
            cube_dim,
            plan.right_width,
            plan.left_width,
            arg(left, plan.left_width),
            arg(right, plan.right_width),
            arg(&sums, plan.right_width),
            (m / plan.left_width) as u32,
            (n / plan.right_width) as u32,
            tokens as u32,
            share as u32,
            launch.cubes as u32,
            plan,
            left.dtype,
            right.dtype,
        );
    }
    let outer = if splits == 1 { sums } else { column_sum(client, &sums)? };
    Ok(outer.reshaped(vec![m, n]))
}

/// `rows` are the vectors of a left row, `columns` those of a right one; `sums` is `[splits, rows · width, columns]`.
///
/// `CUBE_POS` runs over tiles of rows, then of columns, then over splits.
#[cube(launch_unchecked)]
fn outer_kernel<I: Float, E: Float, N: Size, W: Size>(
    left: &Array<Vector<I, W>>,
    right: &Array<Vector<E, N>>,
    sums: &mut Array<Vector<f32, N>>,
    rows: u32,
    columns: u32,
    tokens: u32,
    share: u32,
    cubes: u32,
    #[comptime] plan: OuterPlan,
    #[define(I)] _left_type: StorageType,
    #[define(E)] _right_type: StorageType,
) {
    let width = W::value();
    let row_tiles = rows.div_ceil(plan.tile as u32) as usize;
    let column_tiles = columns.div_ceil(comptime!((plan.units * plan.block) as u32)) as usize;
    let own = Columns {
        first: CUBE_POS / row_tiles % column_tiles * comptime!(plan.units * plan.block) + UNIT_POS as usize,
        last: columns as usize - 1,
        stride: plan.units,
        count: plan.block,
    };
    if CUBE_POS >= cubes as usize || own.first > own.last {
        terminate!();
    }
    let row = CUBE_POS % row_tiles * plan.tile;
    let split = CUBE_POS / row_tiles / column_tiles;
    let first = split * share as usize;
    let last = min(first + share as usize, tokens as usize);
    let lines = split * rows as usize * width;
    for start in range_stepped(first, last, CHUNK) {
        let end = min(start + CHUNK, last);
        let whole = start + (end - start) / STEP * STEP;
        let mut block = zero_sums::<N>(comptime!(plan.tile * plan.block * width));
        for token in range_stepped(start, whole, STEP) {
            add_tokens::<I, E, N, W>(left, right, &mut block, token, row, rows as usize, own, STEP, plan);
        }
        for token in whole..end {
            add_tokens::<I, E, N, W>(left, right, &mut block, token, row, rows as usize, own, 1usize, plan);
        }
        #[unroll]
        for c in 0..plan.block {
            #[unroll]
            for r in 0..comptime!(plan.tile * width) {
                let line = row * width + r;
                if own.holds(c) && line < rows as usize * width {
                    let place = (lines + line) * columns as usize + own.at(c);
                    let mut sum = block[c * comptime!(plan.tile * width) + r];
                    if start > first {
                        sum += sums[place];
                    }
                    sums[place] = sum;
                }
            }
        }
    }
}

/// Adds the products of `count` tokens from `token` on to a unit's block of sums, `[block, tile · width]`.
#[cube]
fn add_tokens<I: Float, E: Float, N: Size, W: Size>(
    left: &Array<Vector<I, W>>,
    right: &Array<Vector<E, N>>,
    block: &mut Array<Vector<f32, N>>,
    token: usize,
    row: usize,
    rows: usize,
    own: Columns,
    #[comptime] count: usize,
    #[comptime] plan: OuterPlan,
) {
    let width = W::value();
    let mut factors = Array::<Vector<f32, W>>::new(comptime!(count * plan.tile));
    #[unroll]
    for t in 0..count {
        #[unroll]
        for r in 0..plan.tile {
            factors[t * plan.tile + r] = Vector::cast_from(left[(token + t) * rows + min(row + r, rows - 1)]);
        }
    }
    #[unroll]
    for c in 0..plan.block {
        let mut lines = Array::<Vector<f32, N>>::new(count);
        #[unroll]
        for t in 0..count {
            lines[t] = Vector::cast_from(right[(token + t) * (own.last + 1) + own.at(c)]);
        }
        // All of a sum's terms in a row, as in `accumulate`.
        #[unroll]
        for r in 0..plan.tile {
            #[unroll]
            for w in 0..width {
                let mut sum = block[(c * plan.tile + r) * width + w];
                #[unroll]
                for t in 0..count {
                    sum = fma(lines[t], Vector::new(factors[t * plan.tile + r][w]), sum);
                }
                block[(c * plan.tile + r) * width + w] = sum;
            }
        }
    }
}
