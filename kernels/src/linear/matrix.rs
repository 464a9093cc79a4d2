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
//! once. For few tokens tiles are small, and a cube's planes share out the depth of a stage, slice by slice. Where the tiles of a weight's
//! gradient leave multiprocessors idle, the depth is cut into parts; these are written in f32 and added up in their order by a
//! second launch: the same bits in every run.

use cubecl::cmma::MmaDefinition;
use cubecl::ir::{MatrixIdent, StorageType};
use cubecl::prelude::*;

use super::matrix_plan::{BUFFERS, MatrixPlan, MatrixPlans, MatrixSizes, PLANE, Panel, SIXTEEN};
use crate::launch::device::{Device, has_units};
use crate::launch::plan::{Launch, Planned};
use crate::launch::tensor::{Tensor, arg, empty, f32_storage, index, u32_storage};
use crate::{Error, Result};

/// Numbers that a unit has side by side in a fragment.
type Pair = Const<2>;

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
struct Loads {
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

/// Where a cube, and a plane of it, stand in the product.
#[derive(CubeType, Clone, Copy)]
struct Place {
    /// The cube's first row and column.
    row: usize,
    column: usize,
    /// The plane's, of the cube's.
    plane_row: usize,
    plane_column: usize,
    /// Where the plane's slice of a stage begins.
    slice: usize,
    /// The cube's part of the depth, and its numbers, from the first to behind the last.
    split: usize,
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
    let place = place_of(rows as usize, columns as usize, depth as usize, share as usize, plan);
    let (of_left, of_right) = comptime!((plan.left(), plan.right()));
    let (left_words, right_words) = (WA::value(), WB::value());
    let (left_numbers, right_numbers) = comptime!((2 * left_words, 2 * right_words));
    let left_lines = if comptime!(plan.turned) { depth } else { rows };
    let left_run = if comptime!(plan.turned) { rows } else { depth };
    let left_extent = Extent { lines: left_lines as usize, vectors: left_run as usize / left_numbers };
    let right_extent = Extent { lines: depth as usize, vectors: columns as usize / right_numbers };
    let mut left_stage =
        SharedMemory::<Vector<u32, WA>>::new_aligned(comptime!(BUFFERS * of_left.buffer() / left_numbers), 16usize);
    let mut right_stage =
        SharedMemory::<Vector<u32, WB>>::new_aligned(comptime!(BUFFERS * of_right.buffer() / right_numbers), 16usize);
    let mut left_next = Array::<Vector<A, VA>>::new(comptime!(of_left.loads(left_numbers)));
    let mut right_next = Array::<Vector<B, VB>>::new(comptime!(of_right.loads(right_numbers)));
    let mut sums = no_sums(comptime!(plan.pairs() / 2));

    fetch::<A, VA>(left, &mut left_next, left_extent, place.row, place.first, left_numbers, of_left);
    fetch::<B, VB>(right, &mut right_next, right_extent, place.column, place.first, right_numbers, of_right);
    keep::<A, E, VA, WA>(&left_next, &mut left_stage, 0usize, place.first, place.end, of_left);
    keep::<B, E, VB, WB>(&right_next, &mut right_stage, 0usize, place.first, place.end, of_right);
    let second = place.first + plan.stage;
    fetch::<A, VA>(left, &mut left_next, left_extent, place.row, second, left_numbers, of_left);
    fetch::<B, VB>(right, &mut right_next, right_extent, place.column, second, right_numbers, of_right);
    sync_cube();
    let stages = (place.end - place.first).div_ceil(plan.stage);
    for stage in 0..stages {
        let next = place.first + (stage + 1) * plan.stage;
        let (buffer, other) = (stage % BUFFERS, (stage + 1) % BUFFERS);
        multiply_stage::<E, WA, WB>(&left_stage, &right_stage, &mut sums, buffer, place, plan);
        keep::<A, E, VA, WA>(&left_next, &mut left_stage, other, next, place.end, of_left);
        keep::<B, E, VB, WB>(&right_next, &mut right_stage, other, next, place.end, of_right);
        // Read here, kept by the next iteration: a compiler would put off what is read and used in one.
        let behind = next + plan.stage;
        fetch::<A, VA>(left, &mut left_next, left_extent, place.row, behind, left_numbers, of_left);
        fetch::<B, VB>(right, &mut right_next, right_extent, place.column, behind, right_numbers, of_right);
        sync_cube();
    }
    if comptime!(plan.slices > 1) {
        add_slices(&mut sums, plan);
    }
    if place.slice == 0 {
        store::<O>(&mut sums, output, rows as usize, columns as usize, place, plan);
    }
}

/// The place of a plane in a product of such sizes, whose parts have `share` numbers of the depth.
#[cube]
fn place_of(rows: usize, columns: usize, depth: usize, share: usize, #[comptime] plan: MatrixPlan) -> Place {
    let (row_tiles, column_tiles) =
        (rows.div_ceil(comptime!(plan.rows())), columns.div_ceil(comptime!(plan.columns())));
    let split = CUBE_POS / (row_tiles * column_tiles);
    let plane = UNIT_POS as usize / PLANE % comptime!(plan.planes[0] * plan.planes[1]);
    let slice = UNIT_POS as usize / comptime!(plan.units() / plan.slices);
    Place {
        row: CUBE_POS % row_tiles * comptime!(plan.rows()),
        column: CUBE_POS / row_tiles % column_tiles * comptime!(plan.columns()),
        plane_row: plane / comptime!(plan.planes[1]) * comptime!(plan.tiles[0] * SIXTEEN),
        plane_column: plane % comptime!(plan.planes[1]) * comptime!(plan.tiles[1] * SIXTEEN),
        slice: slice * comptime!(plan.stage / plan.slices),
        split,
        first: split * share,
        end: min((split + 1) * share, depth),
    }
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

/// Reads a unit's vectors, of `numbers` numbers, of the stage that begins at `depth`. Places behind the factor's end are read as its last;
/// sums of theirs are not written, or they are not kept.
#[cube]
fn fetch<A: Numeric, V: Size>(
    factor: &Array<Vector<A, V>>,
    next: &mut Array<Vector<A, V>>,
    extent: Extent,
    first: usize,
    depth: usize,
    #[comptime] numbers: usize,
    #[comptime] panel: Panel,
) {
    let per_line = comptime!(panel.run / numbers);
    let (first_line, first_number) = if comptime!(panel.across) { (depth, first) } else { (first, depth) };
    let first_vector = first_number / numbers;
    #[unroll]
    for i in 0..comptime!(panel.loads(numbers)) {
        let item = UNIT_POS as usize + comptime!(i * panel.units);
        let line = min(first_line + item / per_line, extent.lines - 1);
        let vector = min(first_vector + item % per_line, extent.vectors - 1);
        next[i] = factor[line * extent.vectors + vector];
    }
}

/// Writes a unit's vectors of the stage that begins at `depth` into a buffer, zeros for those of `end` and behind.
#[cube]
fn keep<A: Numeric, E: Float, V: Size, W: Size>(
    next: &Array<Vector<A, V>>,
    stage: &mut SharedMemory<Vector<u32, W>>,
    buffer: usize,
    depth: usize,
    end: usize,
    #[comptime] panel: Panel,
) {
    let words = W::value();
    let numbers = comptime!(2 * words);
    let (per_line, loads) = comptime!((panel.run / numbers, panel.loads(numbers)));
    let first = buffer * comptime!(panel.buffer() / numbers);
    let whole = depth + comptime!(panel.depth()) <= end;
    #[unroll]
    for i in 0..loads {
        let item = UNIT_POS as usize + comptime!(i * panel.units);
        let (line, vector) = (item / per_line, item % per_line);
        let at = if comptime!(panel.across) { line } else { vector * numbers };
        let held = whole || depth + at < end;
        let pairs = in_pairs::<A, E, V, W>(next[i]);
        stage[first + line * comptime!(panel.pitch() / numbers) + vector] =
            select(held, pairs, Vector::<u32, W>::new(0u32));
    }
}

/// Numbers in pairs of the units' type: words are such pairs already.
#[cube]
fn in_pairs<A: Numeric, E: Float, V: Size, W: Size>(numbers: Vector<A, V>) -> Vector<u32, W> {
    let (width, words) = (V::value(), W::value());
    if comptime!(width == words) {
        Vector::<u32, W>::reinterpret(numbers)
    } else {
        Vector::<u32, W>::reinterpret(Vector::<E, V>::cast_from(numbers))
    }
}

/// Adds a stage's products to the sums of a plane.
#[cube]
fn multiply_stage<E: Float, WA: Size, WB: Size>(
    left: &SharedMemory<Vector<u32, WA>>,
    right: &SharedMemory<Vector<u32, WB>>,
    sums: &mut Sequence<Array<Vector<f32, Pair>>>,
    buffer: usize,
    place: Place,
    #[comptime] plan: MatrixPlan,
) {
    let (of_left, of_right) = comptime!((plan.left(), plan.right()));
    let (rows, columns) = comptime!((plan.tiles[0], plan.tiles[1]));
    let units = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let left_first = first_of::<WA>(buffer, place.plane_row, place.slice, of_left, comptime!(plan.turned));
    let right_first = first_of::<WB>(buffer, place.plane_column, place.slice, of_right, false);
    #[unroll]
    for k in 0..comptime!(plan.stage / SIXTEEN / plan.slices) {
        let mut lefts = Sequence::<Array<Vector<E, Pair>>>::new();
        #[unroll]
        for i in 0..rows {
            lefts.push(fragment::<E, WA>(left, left_first, i, k, of_left));
        }
        #[unroll]
        for j in 0..columns {
            let both = fragment::<E, WB>(right, right_first, j, k, of_right);
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
fn first_of<W: Size>(
    buffer: usize,
    plane: usize,
    slice: usize,
    #[comptime] panel: Panel,
    #[comptime] turned: bool,
) -> usize {
    let words = W::value();
    let width = comptime!(2 * words);
    let lane = UNIT_POS as usize % PLANE;
    let (down, along) = (lane / 8 % 2 * 8, lane / 16 * 8);
    let (lines, numbers) = if comptime!(turned) { (along, down) } else { (down, along) };
    let (first_line, first_number) = if comptime!(panel.across) { (slice, plane) } else { (plane, slice) };
    let (line, number) = (first_line + lines + lane % 8, first_number + numbers);
    buffer * comptime!(panel.buffer() / width) + line * comptime!(panel.pitch() / width) + number / width
}

/// Four matrices of 8 by 8: of the plane's 16 rows or columns number `tile`, and of the stage's 16 numbers of the depth number `k`.
#[cube]
fn fragment<E: Float, W: Size>(
    stage: &SharedMemory<Vector<u32, W>>,
    first: usize,
    #[comptime] tile: usize,
    #[comptime] k: usize,
    #[comptime] panel: Panel,
) -> Array<Vector<E, Pair>> {
    let words = W::value();
    let width = comptime!(2 * words);
    let (line, number) = comptime!(if panel.across { (k, tile) } else { (tile, k) });
    let start = first + comptime!((line * panel.pitch() + number) * SIXTEEN / width);
    let ident = comptime!(if panel.across { MatrixIdent::B } else { MatrixIdent::A });
    let units = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
    let row = stage.slice(start, start + comptime!(8 / width));
    // SAFETY: a line of a matrix is read by its address; the words are pairs of such numbers.
    let line = unsafe { row.downcast_unchecked::<Vector<E, Pair>>() };
    units.load_matrix::<Vector<E, Pair>, Pair>(&line, ident, 4usize, panel.across)
}

/// Adds up what the slices of the stages have summed, in their order; the first slice's planes end up with the totals.
#[cube]
fn add_slices(sums: &mut Sequence<Array<Vector<f32, Pair>>>, #[comptime] plan: MatrixPlan) {
    let (units, count) = comptime!((plan.units() / plan.slices, plan.pairs()));
    let mut others = SharedMemory::<Vector<f32, Pair>>::new(comptime!((plan.slices - 1) * units * count));
    let (slice, own) = (UNIT_POS as usize / units, UNIT_POS as usize % units);
    if slice > 0 {
        #[unroll]
        for i in 0..count {
            let sum = sums.index(comptime!(i / 2));
            others[((slice - 1) * count + i) * units + own] = sum[comptime!(i % 2)];
        }
    }
    sync_cube();
    if slice == 0 {
        #[unroll]
        for i in 0..count {
            let sum = sums.index_mut(comptime!(i / 2));
            let mut total = sum[comptime!(i % 2)];
            #[unroll]
            for other in 0..comptime!(plan.slices - 1) {
                total += others[comptime!((other * count + i) * units) + own];
            }
            sum[comptime!(i % 2)] = total;
        }
    }
}

/// Writes the sums of a plane: a lane has two columns of a row, and those of the row eight below.
#[cube]
fn store<O: Float>(
    sums: &mut Sequence<Array<Vector<f32, Pair>>>,
    output: &mut Array<Vector<O, Pair>>,
    rows: usize,
    columns: usize,
    place: Place,
    #[comptime] plan: MatrixPlan,
) {
    let lane = UNIT_POS as usize % PLANE;
    let (row, column) = (place.row + place.plane_row + lane / 4, place.column + place.plane_column + lane % 4 * 2);
    #[unroll]
    for i in 0..plan.tiles[0] {
        #[unroll]
        for half in 0..2usize {
            let line = row + comptime!(i * SIXTEEN + half * 8);
            let start = (place.split * rows + line) * columns + column;
            #[unroll]
            for j in 0..comptime!(2 * plan.tiles[1]) {
                let sum = sums.index(comptime!(i * 2 * plan.tiles[1] + j));
                if line < rows && column + comptime!(j * 8) < columns {
                    output[start / 2 + comptime!(j * 4)] = Vector::cast_from(sum[half]);
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
