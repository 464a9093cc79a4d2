//! The small matrix product inside the stages: a tile of rows, in shared or global memory, times a weight in global memory.
//!
//! A unit keeps a block of `tile` rows by `columns` vectors of sums in registers, so that a weight vector that is read serves every
//! row of the tile, and a vector of the rows serves every column of the unit.
//!
//! Few rows leave too few columns for a whole GPU. Then a cube takes few columns, and its units share out the depth: `lanes` of
//! them stand side by side on the columns, in each of `slices` of the depth, and the slices' sums are added up through shared memory.

#![expect(missing_docs, reason = "CubeCL's macros document nothing of what they make of a public type or function")]

use cubecl::prelude::*;

use crate::launch::device::Device;
use crate::launch::lesser::lesser;

/// How the units of a cube share a product out, `lanes · slices` of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sharing {
    /// Units side by side on columns.
    pub lanes: usize,
    /// Parts of the depth, a power of two.
    pub slices: usize,
    /// Column vectors of a unit.
    pub block: usize,
}

/// A product as far as its sharing hangs on it.
#[derive(Debug, Clone, Copy)]
pub struct Product {
    /// Vectors of an output row.
    pub columns: usize,
    /// Vectors of an input row.
    pub depth: usize,
    /// Rows of a tile.
    pub tile: usize,
    /// Bytes of a vector of the weight.
    pub bytes: usize,
    /// Numbers of such a vector.
    pub width: usize,
}

impl Sharing {
    /// `units` units on `units / lanes` slices of the depth, with as few lanes as share the columns out among at most `cubes` cubes and leave
    /// no sector of the weight half read. The sums of the slices take at most `shared` bytes.
    pub(crate) fn sliced(units: usize, product: &Product, cubes: usize, shared: usize) -> Self {
        let least = (SECTOR / product.bytes).max(product.columns.div_ceil(cubes.max(1)));
        let lanes = least.min(units).next_power_of_two();
        let mut slices = (units / lanes).min(product.depth.min(units).next_power_of_two());
        while slices > 1 && (Self { lanes, slices, block: 1 }).shared_bytes(product) > shared {
            slices /= 2;
        }
        Self { lanes, slices, block: 1 }
    }

    /// Whole cubes of columns where they reach every processor, else as many cubes as do, their units on slices of the depth. Not on
    /// planes of a CPU, where a barrier costs more than it gains, nor where a sum has to be `whole`: then a cube is a plane. `tiles` cubes stand
    /// beside each other already.
    pub fn choose(device: &Device, product: &Product, tiles: usize, whole: bool) -> Self {
        let block = (product.columns / device.plane_size).clamp(1, device.block);
        let wide = Self { lanes: device.units(product.columns.div_ceil(block)), slices: 1, block };
        if device.on_cpu {
            return if tiles >= MANY_TILES { wide.widened(device, product) } else { wide };
        }
        if tiles.saturating_mul(wide.cubes(product.columns)) >= device.processors {
            return wide;
        }
        if whole {
            return Self { lanes: device.units(1), ..wide };
        }
        let units = device.units(usize::MAX);
        Self::sliced(units, product, device.processors.div_ceil(tiles), device.shared_bytes)
    }

    /// As many columns a unit as a tile of few rows leaves sums for, shared out evenly: rows of the weight are read in longer runs, which
    /// memory serves faster.
    fn widened(self, device: &Device, product: &Product) -> Self {
        let most = (device.block * device.tile / product.tile).min(WIDEST);
        let groups = product.columns.div_ceil(self.lanes * most.max(self.block));
        Self { block: product.columns.div_ceil(self.lanes * groups), ..self }
    }

    /// Units of a cube.
    pub fn units(&self) -> usize {
        self.lanes * self.slices
    }

    /// Cubes that one tile of rows is shared out among.
    pub fn cubes(&self, columns: usize) -> usize {
        columns.div_ceil(self.lanes * self.block)
    }

    /// Shared memory of the slices' sums.
    pub(crate) fn shared_bytes(&self, product: &Product) -> usize {
        if self.slices == 1 { 0 } else { 4 * self.units() * product.tile * product.width }
    }
}

/// Bytes of a sector, the least that a GPU moves.
const SECTOR: usize = 32;
/// Tiles that keep a CPU's processors busy, whatever the columns of a cube.
const MANY_TILES: usize = 4;
/// The most column vectors of a unit.
const WIDEST: usize = 16;

/// The columns of a weight that a unit works on: `first`, `first + stride`, …, those past `last` standing for the last.
#[derive(CubeType, Clone, Copy)]
pub struct Columns {
    /// The unit's first column.
    pub first: usize,
    /// The last of all columns.
    pub last: usize,
    /// From one of the unit's columns to its next.
    #[cube(comptime)]
    pub stride: usize,
    /// Columns of the unit.
    #[cube(comptime)]
    pub count: usize,
}

#[cube]
impl Columns {
    /// The column `index` of this unit.
    pub(crate) fn at(&self, #[comptime] index: usize) -> usize {
        lesser(self.first + comptime!(index * self.stride), self.last)
    }

    /// Whether column `index` is one of its own and not a stand-in.
    pub(crate) fn holds(&self, #[comptime] index: usize) -> bool {
        self.first + comptime!(index * self.stride) <= self.last
    }
}

/// The rows of a tile: `first`, `first + 1`, …, those past `last` standing for the last; each is `pitch` vectors long.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Rows {
    pub first: usize,
    pub last: usize,
    pub pitch: usize,
    #[cube(comptime)]
    pub count: usize,
}

#[cube]
impl Rows {
    /// The `count` rows of a tile that lies in shared memory, each `pitch` vectors long.
    pub fn of_tile(#[comptime] pitch: usize, #[comptime] count: usize) -> Rows {
        Rows { first: 0usize.runtime(), last: comptime!(count - 1).runtime(), pitch: pitch.runtime(), count }
    }

    /// Where each of them begins.
    pub fn places(&self) -> Places {
        let mut starts = Array::<usize>::new(self.count);
        #[unroll]
        for t in 0..self.count {
            starts[t] = lesser(self.first + t, self.last) * self.pitch;
        }
        Places { starts, depth: self.pitch, count: self.count }
    }
}

/// Where the rows of a tile begin, wherever they lie: `depth` vectors from each of `starts`.
#[derive(CubeType)]
pub struct Places {
    /// The first vector of each row.
    pub starts: Array<usize>,
    /// Vectors of a row.
    pub depth: usize,
    /// Rows of the tile.
    #[cube(comptime)]
    pub count: usize,
}

/// Which rows of the output a tile's rows are: `first`, `first + 1`, … below `end`.
#[derive(CubeType, Clone, Copy)]
pub struct Outputs {
    /// The output's row of the tile's first row.
    pub first: usize,
    /// The row after the last that is written.
    pub end: usize,
}

/// `output[outputs.first + t, columns] = Σ_k input[row t, k] · weight[base + k, columns]`, the depth shared out among `slices` slices of
/// units, of which `columns.stride` stand side by side; `columns.last` is the last of all columns, `base` the weight's first vector.
///
/// With several slices, all units of the cube come here together, and there is a barrier at the end.
#[cube]
pub fn multiply<I: Float, E: Float, O: Float, N: Size, W: Size>(
    input: &Slice<Vector<I, W>>,
    rows: &Places,
    weight: &Array<Vector<E, N>>,
    base: usize,
    output: &mut Array<Vector<O, N>>,
    outputs: Outputs,
    columns: Columns,
    #[comptime] slices: usize,
) {
    let count = comptime!(rows.count * columns.count);
    let mut sums = zero_sums::<N>(count);
    let width = columns.last + 1;
    if comptime!(slices > 1) {
        let slice = UNIT_POS as usize / columns.stride;
        accumulate_slice::<I, E, N, W>(input, rows, weight, &mut sums, base, columns, width, slice, slices);
        add_slices::<N>(&mut sums, columns.stride, slices, count);
        if slice == 0 {
            store::<O, N>(&sums, output, outputs, columns, rows.count);
        }
    } else if columns.first <= columns.last {
        accumulate::<I, E, N, W>(input, rows, weight, &mut sums, base, columns, width);
        store::<O, N>(&sums, output, outputs, columns, rows.count);
    }
}

/// Writes a unit's sums, those of its own columns and of rows below `outputs.end`.
#[cube]
fn store<O: Float, N: Size>(
    sums: &Array<Vector<f32, N>>,
    output: &mut Array<Vector<O, N>>,
    outputs: Outputs,
    columns: Columns,
    #[comptime] tile: usize,
) {
    #[unroll]
    for c in 0..columns.count {
        #[unroll]
        for t in 0..tile {
            if columns.holds(c) && outputs.first + t < outputs.end {
                let place = (outputs.first + t) * (columns.last + 1) + columns.at(c);
                output[place] = Vector::cast_from(sums[c * tile + t]);
            }
        }
    }
}

/// Adds up the sums of a cube's slices, halving their number from step to step, always in the same order; the first slice's
/// units end up with the totals. Begins and ends with a barrier.
#[cube]
fn add_slices<N: Size>(
    sums: &mut Array<Vector<f32, N>>,
    #[comptime] lanes: usize,
    #[comptime] slices: usize,
    #[comptime] count: usize,
) {
    let own = UNIT_POS as usize;
    let units = comptime!(lanes * slices);
    let mut shared = SharedMemory::<Vector<f32, N>>::new(comptime!(units * count));
    sync_cube();
    #[unroll]
    for i in 0..count {
        shared[i * units + own] = sums[i];
    }
    sync_cube();
    #[unroll]
    for step in 0..comptime!(slices.ilog2() as usize) {
        let half = comptime!(units >> (step + 1));
        if own < half {
            #[unroll]
            for i in 0..count {
                let sum = shared[i * units + own] + shared[i * units + half + own];
                shared[i * units + own] = sum;
            }
        }
        sync_cube();
    }
    #[unroll]
    for i in 0..count {
        sums[i] = shared[i * units + own];
    }
}

/// `sums[c · rows.count + t] += Σ_k input[row t, k] · weight[base + k · step + columns.at(c)]` for all k of a row.
#[cube]
pub(crate) fn accumulate<I: Float, E: Float, N: Size, W: Size>(
    input: &Slice<Vector<I, W>>,
    rows: &Places,
    weight: &Array<Vector<E, N>>,
    sums: &mut Array<Vector<f32, N>>,
    base: usize,
    columns: Columns,
    step: usize,
) {
    accumulate_slice::<I, E, N, W>(input, rows, weight, sums, base, columns, step, 0usize, 1usize);
}

/// [`accumulate`] for one of `slices` slices of the depth: the vectors `slice`, `slice + slices`, … of a row.
#[cube]
fn accumulate_slice<I: Float, E: Float, N: Size, W: Size>(
    input: &Slice<Vector<I, W>>,
    rows: &Places,
    weight: &Array<Vector<E, N>>,
    sums: &mut Array<Vector<f32, N>>,
    base: usize,
    columns: Columns,
    step: usize,
    slice: usize,
    #[comptime] slices: usize,
) {
    let width = W::value();
    for k in range_stepped(slice, rows.depth, slices) {
        let mut row = Array::<Vector<f32, W>>::new(rows.count);
        #[unroll]
        for t in 0..rows.count {
            row[t] = Vector::cast_from(input[rows.starts[t] + k]);
        }
        #[unroll]
        for c in 0..columns.count {
            let mut lines = Array::<Vector<f32, N>>::new(width);
            #[unroll]
            for w in 0..width {
                lines[w] = Vector::cast_from(weight[base + (k * width + w) * step + columns.at(c)]);
            }
            // All of a sum's terms in a row: one reading and one writing of a sum that does not fit a register.
            #[unroll]
            for t in 0..rows.count {
                let mut sum = sums[c * rows.count + t];
                #[unroll]
                for w in 0..width {
                    sum = fma(lines[w], Vector::new(row[t][w]), sum);
                }
                sums[c * rows.count + t] = sum;
            }
        }
    }
}

/// A unit's block of sums, all zero.
#[cube]
pub(crate) fn zero_sums<N: Size>(#[comptime] count: usize) -> Array<Vector<f32, N>> {
    let mut sums = Array::<Vector<f32, N>>::new(count);
    #[unroll]
    for i in 0..count {
        sums[i] = Vector::new(0.0);
    }
    sums
}

/// Sum of a vector's components.
#[cube]
pub fn component_sum<N: Size>(vector: Vector<f32, N>) -> f32 {
    let mut sum = 0.0f32;
    #[unroll]
    for n in 0..N::value() {
        sum += vector[n];
    }
    sum
}
