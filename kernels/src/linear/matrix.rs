//! Products on matrix units: `output[i, j] = Σ_k left[i, k] · right[k, j]`, numbers of 16 bits, summed in f32.
//!
//! Shapes: left `[rows, depth]`, or `[depth, rows]` where it is turned, as the gradient of a weight has it, which sums over tokens; right
//! `[depth, columns]`, output `[rows, columns]`. Factors of another type are rounded to that of the units on their way into shared memory.
//!
//! A cube computes a tile of rows by columns, its planes a part of that each, in registers. The depth goes by in stages, through two buffers
//! of shared memory: while one is multiplied, the numbers of the next are under way from global memory into registers, so a stage has one
//! barrier. Lines of a buffer are 16 bytes longer than what they hold, and the eight that a load of a fragment reads lie in different banks.
//!
//! Reads left once per tile of columns and right once per tile of rows, from the second-level cache where they fit, and writes the output
//! once. Where tiles leave multiprocessors idle, the depth is cut into parts; these are written in f32 and added up in their order by a
//! second launch: the same bits in every run.

use cubecl::cmma::MmaDefinition;
use cubecl::ir::{MatrixIdent, StorageType};
use cubecl::prelude::*;

use super::matrix_plan::{BUFFERS, MatrixPlan, MatrixPlans, MatrixSizes, PLANE, Panel, SIXTEEN};
use crate::launch::device::Device;
use crate::launch::plan::Planned;
use crate::launch::tensor::{Tensor, arg, empty, f32_storage, index};
use crate::{Error, Result};

/// Numbers that a unit has side by side in a fragment.
type Pair = Const<2>;

/// Whether the device multiplies numbers of this type as [`matrix_kernel`] does.
pub(crate) fn has_units<R: Runtime>(client: &ComputeClient<R>, dtype: StorageType) -> bool {
    let (features, hardware) = (&client.features().matmul, &client.properties().hardware);
    let multiplies = features.mma.iter().any(|unit| {
        let types = [unit.a_type, unit.b_type] == [dtype; 2] && unit.cd_type == f32_storage();
        types && [unit.m, unit.n, unit.k] == [16, 8, 16]
    });
    // Which lane has which numbers of a fragment is known of planes of 32.
    let planes = [hardware.plane_size_min, hardware.plane_size_max] == [PLANE as u32; 2];
    multiplies && planes && features.ldmatrix.contains(&dtype)
}

/// A product by the plans of its sizes. `dtype` is what the units multiply; shapes are checked.
pub(crate) fn launch_matrix<R: Runtime>(
    client: &ComputeClient<R>,
    left: &Tensor<R>,
    right: &Tensor<R>,
    output: &Tensor<R>,
    dtype: StorageType,
    turned: bool,
) -> Result<()> {
    let device = Device::of(client);
    let ([depth, columns], rows) = ([right.shape()[0], right.shape()[1]], output.shape()[0]);
    if !has_units(client, dtype) {
        let reason = format!("the device has no matrix units for {dtype}");
        return Err(Error::Matmul { m: rows, k: depth, n: columns, reason });
    }
    let plans = MatrixPlans::of(&device, &MatrixSizes { rows, columns, depth, turned });
    index("numbers of a factor", depth.saturating_mul(rows.max(columns)))?;
    let area = index("numbers of a product", rows.saturating_mul(columns).saturating_mul(plans.splits))?;
    let parts = match plans.sum {
        Some(_) => empty(client, "parts of a product", &[plans.splits, rows, columns], f32_storage())?,
        None => output.clone(),
    };
    let Planned { plan, launch } = plans.product;
    let (left_width, right_width) = (width(&device, left), width(&device, right));
    let pair = device.width(4, &[columns]).min(2);
    let (grid, cube_dim) = launch.start(&device)?;
    // SAFETY: shapes are checked; a unit reads places below the factors' sizes and writes below those of the output or of its part.
    unsafe {
        matrix_kernel::launch_unchecked::<R>(
            client,
            grid,
            cube_dim,
            left_width,
            right_width,
            pair,
            arg(left, left_width),
            arg(right, right_width),
            arg(&parts, pair),
            rows as u32,
            columns as u32,
            depth as u32,
            plans.share as u32,
            launch.cubes as u32,
            plan,
            left.dtype,
            right.dtype,
            dtype,
            parts.dtype,
        );
    }
    let Some(sum) = plans.sum else { return Ok(()) };
    let width = device.width(4, &[rows * columns]);
    let (grid, cube_dim) = sum.start(&device)?;
    // SAFETY: the parts have the output's shape each, and a unit touches its own vector below their number.
    unsafe {
        add_parts_kernel::launch_unchecked::<R>(
            client,
            grid,
            cube_dim,
            width,
            arg(&parts, width),
            arg(output, width),
            area / (plans.splits * width) as u32,
            plans.splits,
            sum.units,
            output.dtype,
        );
    }
    Ok(())
}

/// Numbers of a load of a factor's lines.
fn width<R: Runtime>(device: &Device, factor: &Tensor<R>) -> usize {
    device.width(factor.dtype.size(), &[factor.shape()[1]])
}

/// Where a cube, and a plane of it, stand in the product.
#[derive(CubeType, Clone, Copy)]
struct Place {
    /// The cube's first row and column.
    row: usize,
    column: usize,
    /// The plane's, of the cube's.
    plane_row: usize,
    plane_column: usize,
    /// The depth of the cube's part, from its first number to behind its last.
    first: usize,
    end: usize,
}

/// A factor as it lies in global memory: how many lines, and vectors of each.
#[derive(CubeType, Clone, Copy)]
struct Extent {
    lines: usize,
    vectors: usize,
}

/// `CUBE_POS` runs over tiles of rows, then of columns, then over parts of the depth.
#[cube(launch_unchecked)]
pub(crate) fn matrix_kernel<A: Float, B: Float, E: Float, O: Float, W: Size, N: Size, V: Size>(
    left: &Array<Vector<A, W>>,
    right: &Array<Vector<B, N>>,
    output: &mut Array<Vector<O, V>>,
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
    let row_tiles = rows.div_ceil(comptime!(plan.rows() as u32)) as usize;
    let column_tiles = columns.div_ceil(comptime!(plan.columns() as u32)) as usize;
    let split = CUBE_POS / (row_tiles * column_tiles);
    let plane = UNIT_POS as usize / PLANE;
    let place = Place {
        row: CUBE_POS % row_tiles * comptime!(plan.rows()),
        column: CUBE_POS / row_tiles % column_tiles * comptime!(plan.columns()),
        plane_row: plane / comptime!(plan.planes[1]) * comptime!(plan.tiles[0] * SIXTEEN),
        plane_column: plane % comptime!(plan.planes[1]) * comptime!(plan.tiles[1] * SIXTEEN),
        first: split * share as usize,
        end: min((split + 1) * share as usize, depth as usize),
    };
    let (of_left, of_right) = comptime!((plan.left(), plan.right()));
    let (left_width, right_width) = (W::value(), N::value());
    let left_lines = if comptime!(plan.turned) { depth } else { rows };
    let left_run = if comptime!(plan.turned) { rows } else { depth };
    let left_extent = Extent { lines: left_lines as usize, vectors: left_run as usize / left_width };
    let right_extent = Extent { lines: depth as usize, vectors: columns as usize / right_width };
    let mut left_stage =
        SharedMemory::<Vector<E, W>>::new_aligned(comptime!(BUFFERS * of_left.buffer() / left_width), 16usize);
    let mut right_stage =
        SharedMemory::<Vector<E, N>>::new_aligned(comptime!(BUFFERS * of_right.buffer() / right_width), 16usize);
    let mut left_next = Array::<Vector<A, W>>::new(comptime!(of_left.loads(left_width)));
    let mut right_next = Array::<Vector<B, N>>::new(comptime!(of_right.loads(right_width)));
    let mut sums = no_sums(comptime!(plan.tiles[0] * plan.tiles[1] * 2));

    fetch::<A, W>(left, &mut left_next, left_extent, place.row, place.first, of_left);
    fetch::<B, N>(right, &mut right_next, right_extent, place.column, place.first, of_right);
    keep::<A, E, W>(&left_next, &mut left_stage, 0usize, place.first, place.end, of_left);
    keep::<B, E, N>(&right_next, &mut right_stage, 0usize, place.first, place.end, of_right);
    sync_cube();
    let stages = (place.end - place.first).div_ceil(plan.stage);
    for stage in 0..stages {
        let next = place.first + (stage + 1) * plan.stage;
        let (buffer, other) = (stage % BUFFERS, (stage + 1) % BUFFERS);
        // Behind the last stage comes one that is read again and never multiplied.
        fetch::<A, W>(left, &mut left_next, left_extent, place.row, next, of_left);
        fetch::<B, N>(right, &mut right_next, right_extent, place.column, next, of_right);
        multiply_stage::<E, W, N>(&left_stage, &right_stage, &mut sums, buffer, place, plan);
        keep::<A, E, W>(&left_next, &mut left_stage, other, next, place.end, of_left);
        keep::<B, E, N>(&right_next, &mut right_stage, other, next, place.end, of_right);
        sync_cube();
    }
    store::<O, V>(&mut sums, output, split, rows as usize, columns as usize, place, plan);
}

/// The plane's sums of 16 rows by 8 columns each, all zero.
#[cube]
fn no_sums(#[comptime] count: usize) -> Sequence<Array<Vector<f32, Pair>>> {
    let mut sums = Sequence::<Array<Vector<f32, Pair>>>::new();
    #[unroll]
    for _i in 0..count {
        let mut sum = Array::<Vector<f32, Pair>>::new(2usize);
        sum[0] = Vector::new(0.0);
        sum[1] = Vector::new(0.0);
        sums.push(sum);
    }
    sums
}

/// Reads a unit's vectors of the stage that begins at `depth`. Places behind the factor's end are read as its last; sums of theirs are not
/// written, or they are not kept.
#[cube]
fn fetch<A: Float, W: Size>(
    factor: &Array<Vector<A, W>>,
    next: &mut Array<Vector<A, W>>,
    extent: Extent,
    first: usize,
    depth: usize,
    #[comptime] panel: Panel,
) {
    let width = W::value();
    let per_line = comptime!(panel.run / width);
    let (first_line, first_number) = if comptime!(panel.across) { (depth, first) } else { (first, depth) };
    let first_vector = first_number / width;
    #[unroll]
    for i in 0..comptime!(panel.loads(width)) {
        let item = UNIT_POS as usize + comptime!(i * panel.units);
        let line = min(first_line + item / per_line, extent.lines - 1);
        let vector = min(first_vector + item % per_line, extent.vectors - 1);
        next[i] = factor[line * extent.vectors + vector];
    }
}

/// Writes a unit's vectors of the stage that begins at `depth` into a buffer, zeros for those of `end` and behind.
#[cube]
fn keep<A: Float, E: Float, W: Size>(
    next: &Array<Vector<A, W>>,
    stage: &mut SharedMemory<Vector<E, W>>,
    buffer: usize,
    depth: usize,
    end: usize,
    #[comptime] panel: Panel,
) {
    let width = W::value();
    let per_line = comptime!(panel.run / width);
    let across = comptime!(if panel.across { panel.lines } else { panel.run });
    let whole = depth + across <= end;
    #[unroll]
    for i in 0..comptime!(panel.loads(width)) {
        let item = UNIT_POS as usize + comptime!(i * panel.units);
        let (line, vector) = (item / per_line, item % per_line);
        let place = buffer * comptime!(panel.buffer() / width) + line * comptime!(panel.pitch() / width) + vector;
        let mut numbers = Vector::<E, W>::cast_from(next[i]);
        if !whole {
            let at = if comptime!(panel.across) { line } else { vector * width };
            if depth + at >= end {
                numbers = Vector::new(E::from_int(0));
            }
        }
        stage[place] = numbers;
    }
}

/// Adds a stage's products to the sums of a plane.
#[cube]
fn multiply_stage<E: Float, W: Size, N: Size>(
    left: &SharedMemory<Vector<E, W>>,
    right: &SharedMemory<Vector<E, N>>,
    sums: &mut Sequence<Array<Vector<f32, Pair>>>,
    buffer: usize,
    place: Place,
    #[comptime] plan: MatrixPlan,
) {
    let (of_left, of_right) = comptime!((plan.left(), plan.right()));
    let (rows, columns) = comptime!((plan.tiles[0], plan.tiles[1]));
    let units = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let left_first = first_of::<W>(buffer, place.plane_row, of_left, comptime!(plan.turned));
    let right_first = first_of::<N>(buffer, place.plane_column, of_right, false);
    #[unroll]
    for k in 0..comptime!(plan.stage / SIXTEEN) {
        let mut lefts = Sequence::<Array<Vector<E, Pair>>>::new();
        #[unroll]
        for i in 0..rows {
            lefts.push(fragment::<E, W>(left, left_first, i, k, of_left));
        }
        #[unroll]
        for j in 0..columns {
            let both = fragment::<E, N>(right, right_first, j, k, of_right);
            #[unroll]
            for half in 0..2usize {
                let mut one = Array::<Vector<E, Pair>>::new(2usize);
                one[0] = both[comptime!(2 * half)];
                one[1] = both[comptime!(2 * half + 1)];
                #[unroll]
                for i in 0..rows {
                    let sum = sums.index_mut(comptime!((i * columns + j) * 2 + half));
                    let added = units.execute(lefts.index(i), &one, sum);
                    sum[0] = added[0];
                    sum[1] = added[1];
                }
            }
        }
    }
}

/// Where a lane's line of a plane's first fragment begins, in vectors: it names one of the eight lines of one of four matrices of 8 by 8.
/// These follow each other down the lines, then along them; where the left factor is turned, the other way about.
#[cube]
fn first_of<W: Size>(buffer: usize, plane: usize, #[comptime] panel: Panel, #[comptime] turned: bool) -> usize {
    let width = W::value();
    let lane = UNIT_POS as usize % PLANE;
    let (down, along) = (lane / 8 % 2 * 8, lane / 16 * 8);
    let (lines, numbers) = if comptime!(turned) { (along, down) } else { (down, along) };
    let (line, number) =
        if comptime!(panel.across) { (lines + lane % 8, numbers + plane) } else { (lines + lane % 8 + plane, numbers) };
    buffer * comptime!(panel.buffer() / width) + line * comptime!(panel.pitch() / width) + number / width
}

/// Four matrices of 8 by 8: of the plane's 16 rows or columns number `tile`, and of the stage's 16 numbers of the depth number `k`.
#[cube]
fn fragment<E: Float, W: Size>(
    stage: &SharedMemory<Vector<E, W>>,
    first: usize,
    #[comptime] tile: usize,
    #[comptime] k: usize,
    #[comptime] panel: Panel,
) -> Array<Vector<E, Pair>> {
    let width = W::value();
    let (line, number) = comptime!(if panel.across { (k, tile) } else { (tile, k) });
    let start = first + comptime!((line * panel.pitch() + number) * SIXTEEN / width);
    let ident = comptime!(if panel.across { MatrixIdent::B } else { MatrixIdent::A });
    let units = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let lines = stage.slice(start, start + comptime!(8 / width));
    units.load_matrix::<Vector<E, W>, Pair>(&lines, ident, 4usize, panel.across)
}

/// Writes the sums of a plane: a lane has two columns of a row, and those of the row eight below.
#[cube]
fn store<O: Float, V: Size>(
    sums: &mut Sequence<Array<Vector<f32, Pair>>>,
    output: &mut Array<Vector<O, V>>,
    split: usize,
    rows: usize,
    columns: usize,
    place: Place,
    #[comptime] plan: MatrixPlan,
) {
    let width = V::value();
    let lane = UNIT_POS as usize % PLANE;
    let (row, column) = (place.row + place.plane_row + lane / 4, place.column + place.plane_column + lane % 4 * 2);
    #[unroll]
    for i in 0..plan.tiles[0] {
        #[unroll]
        for j in 0..comptime!(2 * plan.tiles[1]) {
            let sum = sums.index(comptime!(i * 2 * plan.tiles[1] + j));
            #[unroll]
            for half in 0..2usize {
                let line = row + comptime!(i * SIXTEEN + half * 8);
                #[unroll]
                for c in 0..comptime!(2 / width) {
                    let at = column + comptime!(j * 8 + c * width);
                    let mut numbers = Vector::<O, V>::empty();
                    #[unroll]
                    for v in 0..width {
                        numbers[v] = O::cast_from(sum[half][comptime!(c * width + v)]);
                    }
                    if line < rows && at < columns {
                        output[((split * rows + line) * columns + at) / width] = numbers;
                    }
                }
            }
        }
    }
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
