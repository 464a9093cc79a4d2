//! Products on matrix units: `output[i, j] = Σ_k left[i, k] · right[k, j]`, numbers of 16 bits, summed in f32.
//!
//! Shapes: left `[rows, depth]`, or `[depth, rows]` where it is turned, as the gradient of a weight has it, which sums over tokens; right
//! `[depth, columns]`, output `[rows, columns]`. Factors of another type are rounded to that of the units on their way into shared memory.
//!
//! A cube computes a tile of rows by columns ([`matrix_tile`](super::matrix_tile)).
//!
//! Reads left once per tile of columns and right once per tile of rows, from the second-level cache where they fit, and writes the output
//! once. For few tokens tiles are small, and a cube's planes share out the depth of a stage, slice by slice. Where the tiles of a weight's
//! gradient leave multiprocessors idle, the depth is cut into parts; these are written in f32 and added up in their order by a
//! second launch: the same bits in every run.

use cubecl::ir::StorageType;
use cubecl::prelude::*;

use super::matrix_plan::{MatrixPlan, MatrixPlans};
use super::matrix_tile::{Extent, InOrder, Pair, Place, multiply_tile};
use crate::launch::device::{Device, has_units};
use crate::launch::plan::{Launch, Planned};
use crate::launch::tensor::{Tensor, arg, empty, f32_storage, index, u32_storage};
use crate::{Error, Result};

/// A product as `plans` say. `dtype` is what the units multiply; shapes are checked.
pub(crate) fn launch_matrix<R: Runtime>(
    client: &ComputeClient<R>,
    left: &Tensor<R>,
    right: &Tensor<R>,
    output: &Tensor<R>,
    dtype: StorageType,
    plans: &MatrixPlans,
) -> Result<()> {
    let device = Device::of(client);
    let ([depth, columns], rows) = ([right.shape()[0], right.shape()[1]], output.shape()[0]);
    if !has_units(client, dtype) {
        let reason = format!("the device has no matrix units for {dtype}");
        return Err(Error::Matmul { m: rows, k: depth, n: columns, reason });
    }
    index("numbers of a factor", depth.saturating_mul(rows.max(columns)))?;
    index("numbers of a product", plans.area.saturating_mul(plans.splits))?;
    let parts = match plans.sum {
        Some(_) => empty(client, "parts of a product", &[plans.splits, rows, columns], f32_storage())?,
        None => output.clone(),
    };
    let Planned { plan, launch } = plans.product;
    let (of_left, of_right) = (Loads::of(&device, left, dtype), Loads::of(&device, right, dtype));
    let (grid, cube_dim) = launch.start(&device)?;
    // SAFETY: shapes are checked; a unit reads places below the factors' sizes and writes below those of the output or of its part.
    unsafe {
        matrix_kernel::launch_unchecked::<R>(
            client,
            grid,
            cube_dim,
            of_left.width,
            of_left.words,
            of_right.width,
            of_right.words,
            arg(left, 2 * of_left.words),
            arg(right, 2 * of_right.words),
            arg(&parts, 2),
            rows as u32,
            columns as u32,
            depth as u32,
            plans.share as u32,
            launch.cubes as u32,
            plan,
            of_left.dtype,
            of_right.dtype,
            dtype,
            parts.dtype,
        );
    }
    match plans.sum {
        Some(sum) => add_parts(client, &parts, output, sum),
        None => Ok(()),
    }
}

/// `output = Σ_s parts[s]`, of f32 `[splits, rows, columns]`.
fn add_parts<R: Runtime>(
    client: &ComputeClient<R>,
    parts: &Tensor<R>,
    output: &Tensor<R>,
    launch: Launch,
) -> Result<()> {
    let device = Device::of(client);
    let (splits, area) = (parts.shape()[0], output.shape().iter().product::<usize>());
    let width = device.width(4, &[area]);
    let (grid, cube_dim) = launch.start(&device)?;
    // SAFETY: the parts have the output's shape each, and a unit touches its own vector below their number.
    unsafe {
        add_parts_kernel::launch_unchecked::<R>(
            client,
            grid,
            cube_dim,
            width,
            arg(parts, width),
            arg(output, width),
            (area / width) as u32,
            splits,
            launch.units,
            output.dtype,
        );
    }
    Ok(())
}

/// How a factor is read: numbers of the units' type in pairs, as words of 32 bits, others as they are.
pub(crate) struct Loads {
    dtype: StorageType,
    /// Numbers or words of a load.
    width: usize,
    /// Words that become of them.
    words: usize,
}

impl Loads {
    fn of<R: Runtime>(device: &Device, factor: &Tensor<R>, dtype: StorageType) -> Self {
        let numbers = device.width(factor.dtype.size(), &[factor.shape()[1]]);
        let words = numbers / 2;
        match factor.dtype == dtype {
            true => Self { dtype: u32_storage(), width: words, words },
            false => Self { dtype: factor.dtype, width: numbers, words },
        }
    }
}

/// `CUBE_POS` runs over tiles of rows, then of columns, then over parts of the depth.
#[cube(launch_unchecked)]
pub(crate) fn matrix_kernel<A: Numeric, B: Numeric, E: Float, O: Float, VA: Size, WA: Size, VB: Size, WB: Size>(
    left: &Array<Vector<A, VA>>,
    right: &Array<Vector<B, VB>>,
    output: &mut Array<Vector<O, Pair>>,
    rows: u32,
    columns: u32,
    depth: u32,
    share: u32,
    cubes: u32,
    #[comptime] plan: MatrixPlan,
    #[define(A)] _left_type: StorageType,
    #[define(B)] _right_type: StorageType,
    #[define(E)] _unit_type: StorageType,
    #[define(O)] _output_type: StorageType,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let extent =
        Extent { rows: rows as usize, columns: columns as usize, depth: depth as usize, base: 0usize.runtime() };
    let place = place_of(extent, share as usize, plan);
    let lines = InOrder { lines: extent.rows };
    multiply_tile::<A, B, E, O, VA, WA, VB, WB, InOrder>(left, right, output, &lines, extent, place, plan);
}

/// The place of a plane in a product whose parts have `share` numbers of the depth.
#[cube]
fn place_of(extent: Extent, share: usize, #[comptime] plan: MatrixPlan) -> Place {
    let row_tiles = extent.rows.div_ceil(comptime!(plan.rows()));
    let column_tiles = extent.columns.div_ceil(comptime!(plan.columns()));
    let split = CUBE_POS / (row_tiles * column_tiles);
    Place::new(
        CUBE_POS % row_tiles * comptime!(plan.rows()),
        CUBE_POS / row_tiles % column_tiles * comptime!(plan.columns()),
        split,
        split * share,
        min((split + 1) * share, extent.depth),
        plan,
    )
}

/// `output[i] = Σ_s parts[s, i]`, in the order of the parts.
#[cube(launch_unchecked)]
fn add_parts_kernel<O: Float, N: Size>(
    parts: &Array<Vector<f32, N>>,
    output: &mut Array<Vector<O, N>>,
    vectors: u32,
    #[comptime] splits: usize,
    #[comptime] units: usize,
    #[define(O)] _output_type: StorageType,
) {
    let item = CUBE_POS * units + UNIT_POS as usize;
    if item < vectors as usize {
        let mut sum = parts[item];
        #[unroll]
        for split in 1..splits {
            sum += parts[split * vectors as usize + item];
        }
        output[item] = Vector::cast_from(sum);
    }
}
