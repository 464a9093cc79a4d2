//! The tile of a product on matrix units: what `matrix` multiplies in each of its cubes, for others to launch on rows that
//! lie somewhere else.
//!
//! A cube computes a tile of rows by columns, its planes a part of that each, in registers. The depth goes by in stages, through two buffers
//! of shared memory: while one is multiplied, the numbers of the next are under way from global memory into registers, so a stage has one
//! barrier. Lines of a buffer are 16 bytes longer than what they hold, and the eight that a load of a fragment reads lie in different banks.
//!
//! Where the left factor's rows lie is asked of [`Lines`] once, before the first stage.

#![expect(missing_docs, reason = "CubeCL's macros document nothing of what they make of a public type or function")]

use cubecl::cmma::MmaDefinition;
use cubecl::ir::MatrixIdent;
use cubecl::prelude::*;

use super::matrix_plan::{BUFFERS, MatrixPlan, PLANE, Panel, SIXTEEN};

/// Numbers that a unit has side by side in a fragment.
pub type Pair = Const<2>;

/// Where a cube, and a plane of it, stand in the product.
#[derive(CubeType, Clone, Copy)]
pub struct Place {
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

#[cube]
impl Place {
    /// The place of the unit's plane in the tile that begins at `row` and `column`, and in part `split` of the depth, from number `first` to
    /// `end`, which is not of it.
    pub fn new(
        row: usize,
        column: usize,
        split: usize,
        first: usize,
        end: usize,
        #[comptime] plan: MatrixPlan,
    ) -> Place {
        let plane = UNIT_POS as usize / PLANE % comptime!(plan.planes[0] * plan.planes[1]);
        let slice = UNIT_POS as usize / comptime!(plan.units() / plan.slices);
        Place {
            row,
            column,
            plane_row: plane / comptime!(plan.planes[1]) * comptime!(plan.tiles[0] * SIXTEEN),
            plane_column: plane % comptime!(plan.planes[1]) * comptime!(plan.tiles[1] * SIXTEEN),
            slice: slice * comptime!(plan.stage / plan.slices),
            split,
            first,
            end,
        }
    }
}

/// A product's sizes.
#[derive(CubeType, Clone, Copy)]
pub struct Extent {
    /// Rows of the output: none is written from here on.
    pub rows: usize,
    /// Columns of the output.
    pub columns: usize,
    /// Products of a sum.
    pub depth: usize,
    /// Numbers that lie before the right factor.
    pub base: usize,
}

/// Which line of the left factor is multiplied for a row of the output. Rows from the last on are asked for too, and have any line.
#[cube]
pub trait Lines {
    fn line(&self, row: usize) -> usize;
}

/// Lines in the order of the rows.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct InOrder {
    pub lines: usize,
}

#[cube]
impl Lines for InOrder {
    fn line(&self, row: usize) -> usize {
        min(row, self.lines - 1)
    }
}

/// `output[row, column] = Σ_k left[lines.line(row), k] · right[k, column]` for the rows and columns of a tile, numbers of the depth of a
/// part. All units of the cube come here together.
#[cube]
pub fn multiply_tile<A: Numeric, B: Numeric, E: Float, O: Float, VA: Size, WA: Size, VB: Size, WB: Size, L: Lines>(
    left: &Array<Vector<A, VA>>,
    right: &Array<Vector<B, VB>>,
    output: &mut Array<Vector<O, Pair>>,
    lines: &L,
    extent: Extent,
    place: Place,
    #[comptime] plan: MatrixPlan,
) {
    let (of_left, of_right) = comptime!((plan.left(), plan.right()));
    let (left_words, right_words) = (WA::value(), WB::value());
    let (left_numbers, right_numbers) = comptime!((2 * left_words, 2 * right_words));
    let left_factor = left_factor::<L>(lines, extent, place, left_numbers, of_left);
    let right_factor = Factor {
        starts: Sequence::<usize>::new(),
        first: place.column / right_numbers,
        lines: extent.depth,
        vectors: extent.columns / right_numbers,
        base: extent.base / right_numbers,
    };
    let mut left_stage =
        SharedMemory::<Vector<u32, WA>>::new_aligned(comptime!(BUFFERS * of_left.buffer() / left_numbers), 16usize);
    let mut right_stage =
        SharedMemory::<Vector<u32, WB>>::new_aligned(comptime!(BUFFERS * of_right.buffer() / right_numbers), 16usize);
    let mut left_next = Array::<Vector<A, VA>>::new(comptime!(of_left.loads(left_numbers)));
    let mut right_next = Array::<Vector<B, VB>>::new(comptime!(of_right.loads(right_numbers)));
    let mut sums = no_sums(comptime!(plan.pairs() / 2));

    fetch::<A, VA>(left, &mut left_next, &left_factor, place.first, left_numbers, of_left);
    fetch::<B, VB>(right, &mut right_next, &right_factor, place.first, right_numbers, of_right);
    keep::<A, E, VA, WA>(&left_next, &mut left_stage, 0usize, place.first, place.end, of_left);
    keep::<B, E, VB, WB>(&right_next, &mut right_stage, 0usize, place.first, place.end, of_right);
    let second = place.first + plan.stage;
    fetch::<A, VA>(left, &mut left_next, &left_factor, second, left_numbers, of_left);
    fetch::<B, VB>(right, &mut right_next, &right_factor, second, right_numbers, of_right);
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
        fetch::<A, VA>(left, &mut left_next, &left_factor, behind, left_numbers, of_left);
        fetch::<B, VB>(right, &mut right_next, &right_factor, behind, right_numbers, of_right);
        sync_cube();
    }
    if comptime!(plan.slices > 1) {
        add_slices(&mut sums, plan);
    }
    if place.slice == 0 {
        store::<O>(&mut sums, output, extent.rows, extent.columns, place, plan);
    }
}

/// What a unit reads of a factor as it lies in global memory.
#[derive(CubeType)]
struct Factor {
    /// Where the lines of the unit's loads begin, in vectors, if the depth runs along them.
    starts: Sequence<usize>,
    /// The cube's first vector of a line, and how many lines there are, if it runs across.
    first: usize,
    lines: usize,
    /// Vectors of a line.
    vectors: usize,
    /// Vectors before the factor.
    base: usize,
}

/// The left factor: a cube's lines are asked for, unless they run across the depth.
#[cube]
fn left_factor<L: Lines>(
    lines: &L,
    extent: Extent,
    place: Place,
    #[comptime] numbers: usize,
    #[comptime] panel: Panel,
) -> Factor {
    let run = if comptime!(panel.across) { extent.rows } else { extent.depth };
    let (vectors, own) = (run / numbers, comptime!(if panel.across { 0 } else { panel.loads(numbers) }));
    let mut starts = Sequence::<usize>::new();
    #[unroll]
    for i in 0..own {
        let item = UNIT_POS as usize + comptime!(i * panel.units);
        starts.push(lines.line(place.row + item / comptime!(panel.run / numbers)) * vectors);
    }
    Factor { starts, first: place.row / numbers, lines: extent.depth, vectors, base: 0usize.runtime() }
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
    numbers_of: &Array<Vector<A, V>>,
    next: &mut Array<Vector<A, V>>,
    factor: &Factor,
    depth: usize,
    #[comptime] numbers: usize,
    #[comptime] panel: Panel,
) {
    let per_line = comptime!(panel.run / numbers);
    #[unroll]
    for i in 0..comptime!(panel.loads(numbers)) {
        let item = UNIT_POS as usize + comptime!(i * panel.units);
        if comptime!(panel.across) {
            let line = min(depth + item / per_line, factor.lines - 1);
            let vector = min(factor.first + item % per_line, factor.vectors - 1);
            next[i] = numbers_of[factor.base + line * factor.vectors + vector];
        } else {
            let vector = min(depth / numbers + item % per_line, factor.vectors - 1);
            next[i] = numbers_of[*factor.starts.index(i) + vector];
        }
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
