//! Grouped products, the two matrices of a mixture: `output[place, n] = Σ_k input[row, k] · weight[expert, k, n]` for every entry, in the
//! order of the groups.
//!
//! Shapes: input `[tokens, depth]` or `[entries, depth]`, weight `[experts, depth, columns]`, output `[entries, columns]`. A cube takes a tile of
//! one expert's entries against a block of its columns, tiles of one expert next to each other, so that each touched expert's
//! weights come from memory once a call and from cache for the expert's further tiles. On matrix units where the device has them for the type and
//! rows are whole pairs, as the products of the layers are; else each unit reads its rows and columns straight through the caches.
//!
//! Moves the touched experts' weights once, and a row of `depth` and one of `columns` numbers an entry.

use cubecl::ir::StorageType;
use cubecl::prelude::*;
use ultramem_kernels::launch::{Device, arg, check_loops};
use ultramem_kernels::linear::matrix_tile::{Extent, Lines, LinesExpand, Pair, Place, multiply_tile};
use ultramem_kernels::linear::tile::{Columns, Outputs, Places, Product, Sharing, multiply};
use ultramem_kernels::linear::{GroupSizes, MatrixPlan};
use ultramem_kernels::{ElementType, Result, Tensor, empty};

use super::route::Grouped;

/// A mixture, as far as its tiles hang on it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MixtureSizes {
    pub tokens: usize,
    pub experts: usize,
    pub top_k: usize,
    pub hidden: usize,
    /// Columns of the first matrix, and rows of the second.
    pub inner: [usize; 2],
    pub dtype: ElementType,
}

/// Experts of `experts` that tokens touch which use `top_k` each, choosing evenly and apart from each other.
pub(crate) fn touched(experts: usize, top_k: usize, tokens: usize) -> f64 {
    let spared = 1.0 - top_k as f64 / experts.max(1) as f64;
    experts as f64 * (1.0 - spared.powf(tokens as f64))
}

impl MixtureSizes {
    /// Experts that are touched, and entries that each has.
    fn groups(&self) -> (f64, f64) {
        let touched = touched(self.experts, self.top_k.min(self.experts), self.tokens).max(1.0);
        (touched, (self.tokens * self.top_k) as f64 / touched)
    }
}

/// How entries are cut into tiles, and what multiplies them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tiling {
    /// Tiles of so many entries, through the caches: any device, any type.
    Caches(usize),
    /// Matrix units.
    Units(MatrixPlan),
}

impl Tiling {
    /// Matrix units where they multiply the mixture's numbers.
    pub fn choose(device: &Device, sizes: &MixtureSizes) -> Self {
        let (groups, rows) = sizes.groups();
        let pairs = [sizes.hidden, sizes.inner[0], sizes.inner[1]].iter().all(|row| row.is_multiple_of(2));
        if pairs && device.multiplies(sizes.dtype) {
            let product = |columns, depth| GroupSizes { groups, rows, columns, depth };
            let both = [product(sizes.inner[0], sizes.hidden), product(sizes.hidden, sizes.inner[1])];
            return Self::Units(MatrixPlan::of_groups(device, &both));
        }
        // Twice as many as an expert has on average. A larger tile would compute rows that are not there, a smaller one read weights again.
        Self::Caches((2 << rows.log2().round().max(0.0) as u32).min(device.tile))
    }

    /// Entries of a tile.
    pub fn rows(self) -> usize {
        match self {
            Self::Caches(rows) => rows,
            Self::Units(plan) => plan.rows(),
        }
    }
}

/// Which rows of its input a grouped product takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum InputRows {
    /// Those of the tokens that the entries belong to, so many entries a token.
    Tokens(usize),
    /// A row an entry, in the order of the groups.
    Grouped,
}

/// Launches a grouped product, its output stored as `output`; shapes are checked.
pub(crate) fn grouped_product<R: Runtime>(
    client: &ComputeClient<R>,
    input: &Tensor<R>,
    weight: &Tensor<R>,
    output: StorageType,
    grouped: &Grouped<R>,
    tiling: Tiling,
    rows: InputRows,
) -> Result<Tensor<R>> {
    let (entries, columns) = (grouped.order.shape()[0], weight.shape()[2]);
    let output = empty(client, "expert output", &[entries, columns], output)?;
    match tiling {
        Tiling::Caches(tile) => launch_tiles(client, input, weight, &output, grouped, tile, rows)?,
        Tiling::Units(plan) => launch_units(client, input, weight, &output, grouped, UnitsPlan { plan, rows })?,
    }
    Ok(output)
}

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct UnitsPlan {
    plan: MatrixPlan,
    rows: InputRows,
}

fn launch_units<R: Runtime>(
    client: &ComputeClient<R>,
    input: &Tensor<R>,
    weight: &Tensor<R>,
    output: &Tensor<R>,
    grouped: &Grouped<R>,
    plan: UnitsPlan,
) -> Result<()> {
    let device = Device::of(client);
    let (depth, columns) = (weight.shape()[1], weight.shape()[2]);
    // Numbers are read in pairs, as words of 32 bits.
    let words = |run| device.width(weight.dtype.size(), &[run]) / 2;
    let (input_words, weight_words) = (words(depth), words(columns));
    let cubes = grouped.tile_count * columns.div_ceil(plan.plan.columns());
    device.fits_shared("grouped product", plan.plan.shared_bytes())?;
    check_loops("grouped_matrix_kernel", depth.div_ceil(plan.plan.stage))?;
    // SAFETY: shapes are checked; tiles hold experts below their number and places below `entries`, entries belong to tokens of
    // the input, and a unit writes its own columns of its tile's places.
    unsafe {
        grouped_matrix_kernel::launch_unchecked::<R>(
            client,
            device.grid(cubes)?,
            CubeDim::new_1d(plan.plan.units() as u32),
            weight.required_address_type(),
            input_words,
            weight_words,
            arg(input, 2 * input_words),
            arg(weight, 2 * weight_words),
            arg(&grouped.order, 1),
            arg(&grouped.tiles, 1),
            arg(output, 2),
            depth as u32,
            columns as u32,
            grouped.tile_count as u32,
            cubes as u32,
            plan,
            weight.dtype,
            output.dtype,
        );
    }
    Ok(())
}

/// The tile that a cube takes. `CUBE_POS` runs over tiles first.
#[derive(CubeType, Clone, Copy)]
struct Tile {
    expert: usize,
    /// Its places in the order of the groups, the last not included; none where they are equal.
    first: usize,
    end: usize,
}

#[cube]
fn tile_at(tiles: &Array<u32>, tile_count: u32) -> Tile {
    let at = CUBE_POS % tile_count as usize * 3;
    Tile { expert: tiles[at] as usize, first: tiles[at + 1] as usize, end: tiles[at + 2] as usize }
}

/// The rows of the input that a tile's entries take.
#[derive(CubeType)]
struct Entries {
    order: Slice<u32>,
    last: usize,
    #[cube(comptime)]
    rows: InputRows,
}

#[cube]
impl Lines for Entries {
    fn line(&self, row: usize) -> usize {
        input_row(&self.order, min(row, self.last), self.rows)
    }
}

/// The input's row of the entry at a place in the order of the groups.
#[cube]
fn input_row(order: &Slice<u32>, place: usize, #[comptime] rows: InputRows) -> usize {
    match rows {
        InputRows::Tokens(top_k) => order[place] as usize / top_k,
        InputRows::Grouped => place,
    }
}

/// `input` and `weight` in pairs of numbers.
#[cube(launch_unchecked, address_type = "dynamic")]
fn grouped_matrix_kernel<E: Float, O: Float, WA: Size, WB: Size>(
    input: &Array<Vector<u32, WA>>,
    weight: &Array<Vector<u32, WB>>,
    order: &Array<u32>,
    tiles: &Array<u32>,
    output: &mut Array<Vector<O, Pair>>,
    depth: u32,
    columns: u32,
    tile_count: u32,
    cubes: u32,
    #[comptime] plan: UnitsPlan,
    #[define(E)] _unit_type: StorageType,
    #[define(O)] _output_type: StorageType,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let tile = tile_at(tiles, tile_count);
    if tile.first == tile.end {
        terminate!();
    }
    let (depth, columns) = (depth as usize, columns as usize);
    let extent = Extent { rows: tile.end, columns, depth, base: tile.expert * depth * columns };
    let column = CUBE_POS / tile_count as usize * comptime!(plan.plan.columns());
    let place = Place::new(tile.first, column, 0usize, 0usize, depth, plan.plan);
    let entries = Entries { order: order.to_slice(), last: tile.end - 1, rows: plan.rows };
    multiply_tile::<u32, u32, E, O, WA, WA, WB, WB, Entries>(input, weight, output, &entries, extent, place, plan.plan);
}

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct TilesPlan {
    sharing: Sharing,
    /// Entries of a cube.
    tile: usize,
    rows: InputRows,
}

fn launch_tiles<R: Runtime>(
    client: &ComputeClient<R>,
    input: &Tensor<R>,
    weight: &Tensor<R>,
    output: &Tensor<R>,
    grouped: &Grouped<R>,
    tile: usize,
    rows: InputRows,
) -> Result<()> {
    let device = Device::of(client);
    let (depth, out) = (weight.shape()[1], weight.shape()[2]);
    let (width, row_width) = (device.width(weight.dtype.size(), &[out]), device.width(4, &[depth]));
    let (columns, bytes, depth) = (out / width, width * weight.dtype.size(), depth / row_width);
    let product = Product { columns, depth, tile, bytes, width };
    let sharing = Sharing::choose(&device, &product, grouped.tile_count, false);
    let plan = TilesPlan { sharing, tile, rows };
    let cubes = grouped.tile_count * sharing.cubes(columns);
    check_loops("grouped_product_kernel", depth.div_ceil(sharing.slices))?;
    // SAFETY: shapes are checked; tiles hold experts below their number and places below `entries`, entries belong to tokens of
    // the input, and a unit writes its own columns of its tile's places.
    unsafe {
        grouped_product_kernel::launch_unchecked::<R>(
            client,
            device.grid(cubes)?,
            CubeDim::new_1d(sharing.units() as u32),
            weight.required_address_type(),
            width,
            row_width,
            arg(input, row_width),
            arg(weight, width),
            arg(&grouped.order, 1),
            arg(&grouped.tiles, 1),
            arg(output, width),
            depth as u32,
            columns as u32,
            grouped.tile_count as u32,
            cubes as u32,
            plan,
            input.dtype,
            weight.dtype,
            output.dtype,
        );
    }
    Ok(())
}

/// One cube computes a tile of entries by `lanes · block` column vectors. `depth` is the vectors of an input row, `width` those of an output
/// row.
#[cube(launch_unchecked, address_type = "dynamic")]
fn grouped_product_kernel<I: Float, E: Float, O: Float, N: Size, W: Size>(
    input: &Array<Vector<I, W>>,
    weight: &Array<Vector<E, N>>,
    order: &Array<u32>,
    tiles: &Array<u32>,
    output: &mut Array<Vector<O, N>>,
    depth: u32,
    width: u32,
    tile_count: u32,
    cubes: u32,
    #[comptime] plan: TilesPlan,
    #[define(I)] _input_type: StorageType,
    #[define(E)] _weight_type: StorageType,
    #[define(O)] _output_type: StorageType,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let row_width = W::value();
    let sharing = comptime!(plan.sharing);
    let tile = tile_at(tiles, tile_count);
    // Where units share out the depth they meet at barriers, and one that has nothing to do must be there too.
    if comptime!(sharing.slices == 1) && tile.first == tile.end {
        terminate!();
    }
    let group = comptime!(sharing.lanes * sharing.block);
    let columns = Columns {
        first: CUBE_POS / tile_count as usize * group + UNIT_POS as usize % sharing.lanes,
        last: width as usize - 1,
        stride: sharing.lanes,
        count: sharing.block,
    };
    let base = tile.expert * depth as usize * row_width * width as usize;
    let outputs = Outputs { first: tile.first, end: tile.end };
    // Most experts' last tiles are not full: half a tile's rows are computed where that is enough.
    let half = comptime!(plan.tile / 2);
    if comptime!(sharing.slices == 1 && half > 0) && tile.end - tile.first <= half {
        let rows = places_of(order, tile, depth as usize, half, plan.rows);
        multiply::<I, E, O, N, W>(&input.to_slice(), &rows, weight, base, output, outputs, columns, 1usize);
    } else {
        let rows = places_of(order, tile, depth as usize, plan.tile, plan.rows);
        multiply::<I, E, O, N, W>(&input.to_slice(), &rows, weight, base, output, outputs, columns, sharing.slices);
    }
}

/// Where the input rows of a tile's entries begin; those past the end stand for the last. No numbers where there are no entries.
#[cube]
fn places_of(
    order: &Array<u32>,
    tile: Tile,
    depth: usize,
    #[comptime] count: usize,
    #[comptime] rows: InputRows,
) -> Places {
    let entries = Entries { order: order.to_slice(), last: max(tile.end, 1usize) - 1, rows };
    let mut starts = Array::<usize>::new(count);
    #[unroll]
    for t in 0..count {
        starts[t] = entries.line(tile.first + t) * depth;
    }
    Places { starts, depth: select(tile.first < tile.end, depth, 0usize), count }
}
