//! Sums of entries by rows: the gradients of a table of which only some rows were used.
//!
//! `gradients[u, k, c] = Σ factors[e, k] · sources[source[e], k, c]` over the entries e of row u, in their own order, or, where all factors
//! share a source, `gradients[u, c, k] = Σ factors[e, k] · sources[source[e], c]`: one unit sums a few vectors of one row from first to
//! last entry, so that every run gives the same bits. Reads each entry's source once, writes each used row once, and never touches the table.
//!
//! A row may have all entries. One with more than a block of them is summed block by block, and then over its blocks. Sums are taken of
//! [`CHUNK`] terms at a time and then of those sums, so that rounding doesn't grow with their number.

use cubecl::prelude::*;

use crate::Result;
use crate::launch::device::Device;
use crate::launch::loops::check_loops;
use crate::launch::tensor::{Tensor, arg, empty, f32_storage};
use crate::linear::interleave::{interleaved, load};
use crate::linear::tile::zero_sums;
use crate::table::group::Groups;
use crate::table::row_gradients::RowGradients;

/// What belongs to the entries that are summed.
pub(crate) struct Terms<'a, R: Runtime> {
    /// u32 `[entries]`: which row of `sources` each entry reads.
    pub source: &'a Tensor<R>,
    /// f32 `[entries, factors]`.
    pub factors: &'a Tensor<R>,
    /// f32, rows of `factors · slice` numbers, or of `slice` where `shared`.
    pub sources: &'a Tensor<R>,
    /// Factors of an entry.
    pub count: usize,
    /// Numbers that one factor goes with.
    pub slice: usize,
    /// Whether every factor goes with the same numbers; a row has the factors' sums interleaved then.
    pub shared: bool,
}

/// What is fixed when the kernels are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct SumPlan {
    factors: usize,
    /// Vectors that one factor goes with.
    slice: usize,
    /// Factors of a unit: one, or, where they share a source, all.
    strands: usize,
    /// Vectors of a source that a unit reads; divides `slice`.
    block: usize,
    units: usize,
    /// Whether rows of more than a block of entries are left to others.
    split: bool,
}

impl SumPlan {
    /// Vectors of a source.
    fn pitch(&self) -> usize {
        self.factors / self.strands * self.slice
    }

    /// Units that share out a row.
    fn pieces(&self) -> usize {
        self.pitch() / self.block
    }

    /// Vectors of a row's gradient.
    fn width(&self) -> usize {
        self.pitch() * self.strands
    }
}

/// Terms that are added up one after the other.
const CHUNK: usize = 64;

/// Loop iterations of a unit that adds up `terms`.
fn sum_loops(terms: usize) -> usize {
    terms + terms.div_ceil(CHUNK)
}

/// Factors that share a source, of which a unit still takes several vectors.
const FEW_STRANDS: usize = 4;

/// Sums the entries of each group into the gradient of its row, `[capacity, factors · slice]`, of a table of `table_rows` rows.
pub(crate) fn sum_rows<R: Runtime>(
    client: &ComputeClient<R>,
    groups: Groups<R>,
    entries: &Terms<'_, R>,
    table_rows: usize,
) -> Result<RowGradients<R>> {
    let shape = [groups.capacity, entries.count * entries.slice];
    let gradients = empty(client, "row gradients", &shape, f32_storage())?;
    let sum = Sum::of(client, &groups, entries);
    sum.short_rows(&gradients)?;
    if sum.plan.split {
        let parts = sum.parts_of_blocks()?;
        sum.long_rows(&parts, &gradients)?;
    }
    Ok(RowGradients { rows: groups.keys, count: groups.count, gradients, table_rows })
}

/// A sum of entries by rows.
struct Sum<'a, R: Runtime> {
    client: &'a ComputeClient<R>,
    device: Device,
    groups: &'a Groups<R>,
    entries: &'a Terms<'a, R>,
    /// Numbers of a vector.
    vector: usize,
    /// Blocks of entries.
    blocks: usize,
    plan: SumPlan,
}

impl<'a, R: Runtime> Sum<'a, R> {
    fn of(client: &'a ComputeClient<R>, groups: &'a Groups<R>, entries: &'a Terms<'a, R>) -> Self {
        let device = Device::of(client);
        let vector = device.width(4, &[entries.slice]);
        let slice = entries.slice / vector;
        let strands = if entries.shared { entries.count } else { 1 };
        let block = if strands > FEW_STRANDS { 1 } else { device.run(slice) };
        let blocks = groups.order.shape()[0].div_ceil(groups.block);
        let plan = SumPlan { factors: entries.count, slice, strands, block, units: 0, split: blocks > 1 };
        Self { client, device, groups, entries, vector, blocks, plan }
    }

    /// A unit for each of `items`.
    fn spread(&self, items: usize) -> Result<(CubeCount, CubeDim, SumPlan)> {
        let units = self.device.flat(items);
        let grid = self.device.grid(items.div_ceil(units))?;
        Ok((grid, CubeDim::new_1d(units as u32), SumPlan { units, ..self.plan }))
    }

    /// The gradients of rows of no more than a block of entries.
    fn short_rows(&self, gradients: &Tensor<R>) -> Result<()> {
        let (groups, entries) = (self.groups, self.entries);
        let (grid, cube_dim, plan) = self.spread(groups.capacity * self.plan.pieces())?;
        check_loops("sum_rows_kernel", sum_loops(groups.block))?;
        // SAFETY: groups are of these entries; a unit writes its own vectors of a row below `count`, which is at most `capacity`.
        unsafe {
            sum_rows_kernel::launch_unchecked::<R>(
                self.client,
                grid,
                cube_dim,
                gradients.required_address_type(),
                self.vector,
                arg(&groups.order, 1),
                arg(&groups.starts, 1),
                arg(&groups.count, 1),
                arg(entries.source, 1),
                arg(entries.factors, 1),
                arg(entries.sources, self.vector),
                arg(gradients, self.vector),
                groups.block as u32,
                plan,
            );
        }
        Ok(())
    }

    /// Of each block what it has of the long rows that it begins and ends in, f32 `[blocks, 2, width]`; the rest is undefined.
    fn parts_of_blocks(&self) -> Result<Tensor<R>> {
        let (groups, entries) = (self.groups, self.entries);
        let shape = [self.blocks, 2, self.plan.width() * self.vector];
        let parts = empty(self.client, "parts of row gradients", &shape, f32_storage())?;
        let (grid, cube_dim, plan) = self.spread(self.blocks * self.plan.pieces())?;
        check_loops("sum_blocks_kernel", sum_loops(groups.block) + 3)?;
        // SAFETY: groups are of these entries; a unit writes its own vectors of a block's two parts.
        unsafe {
            sum_blocks_kernel::launch_unchecked::<R>(
                self.client,
                grid,
                cube_dim,
                parts.required_address_type(),
                self.vector,
                arg(&groups.order, 1),
                arg(&groups.starts, 1),
                arg(&groups.blocks, 1),
                arg(entries.source, 1),
                arg(entries.factors, 1),
                arg(entries.sources, self.vector),
                arg(&parts, self.vector),
                groups.block as u32,
                plan,
            );
        }
        Ok(parts)
    }

    /// The gradients of long rows from their parts.
    fn long_rows(&self, parts: &Tensor<R>, gradients: &Tensor<R>) -> Result<()> {
        let groups = self.groups;
        let (grid, cube_dim, plan) = self.spread((self.blocks - 1) * self.plan.width())?;
        check_loops("sum_parts_kernel", sum_loops(self.blocks))?;
        // SAFETY: a row's parts are those of its blocks, all below `blocks`; a unit writes its own vector of a row.
        unsafe {
            sum_parts_kernel::launch_unchecked::<R>(
                self.client,
                grid,
                cube_dim,
                gradients.required_address_type(),
                self.vector,
                arg(&groups.starts, 1),
                arg(&groups.blocks, 1),
                arg(parts, self.vector),
                arg(gradients, self.vector),
                groups.block as u32,
                plan,
            );
        }
        Ok(())
    }
}

/// A unit's piece of a row: its first vector of a source, and the factor that goes with it.
#[derive(CubeType, Clone, Copy)]
struct Piece {
    first: usize,
    factor: usize,
}

#[cube]
fn piece_of(item: usize, #[comptime] plan: SumPlan) -> Piece {
    let first = item % comptime!(plan.pieces()) * plan.block;
    Piece { first, factor: first / plan.slice }
}

/// The sums of a unit's piece over the entries at `first..last` of `order`, `[block, strands]`.
#[cube]
fn sum_entries<N: Size>(
    order: &Array<u32>,
    source: &Array<u32>,
    factors: &Array<f32>,
    sources: &Array<Vector<f32, N>>,
    piece: Piece,
    first: usize,
    last: usize,
    #[comptime] plan: SumPlan,
) -> Array<Vector<f32, N>> {
    let count = comptime!(plan.block * plan.strands);
    let mut sums = zero_sums::<N>(count);
    for start in range_stepped(first, last, CHUNK) {
        let mut chunk = zero_sums::<N>(count);
        for place in start..min(start + CHUNK, last) {
            let entry = order[place] as usize;
            let lines = load::<f32, N>(sources, source[entry] as usize * plan.pitch() + piece.first, plan.block);
            #[unroll]
            for k in 0..plan.strands {
                let scale = Vector::new(factors[entry * plan.factors + piece.factor + k]);
                #[unroll]
                for b in 0..plan.block {
                    chunk[b * plan.strands + k] += scale * lines[b];
                }
            }
        }
        #[unroll]
        for i in 0..count {
            sums[i] += chunk[i];
        }
    }
    sums
}

/// Writes a unit's sums to row `row` of `gradients`.
#[cube]
fn write_sums<N: Size>(
    sums: &Array<Vector<f32, N>>,
    gradients: &mut Array<Vector<f32, N>>,
    row: usize,
    piece: Piece,
    #[comptime] plan: SumPlan,
) {
    #[unroll]
    for b in 0..plan.block {
        #[unroll]
        for v in 0..plan.strands {
            gradients[(row * plan.pitch() + piece.first + b) * plan.strands + v] =
                interleaved::<N>(sums, comptime!(b * plan.strands), v, plan.strands);
        }
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn sum_rows_kernel<N: Size>(
    order: &Array<u32>,
    starts: &Array<u32>,
    count: &Array<u32>,
    source: &Array<u32>,
    factors: &Array<f32>,
    sources: &Array<Vector<f32, N>>,
    gradients: &mut Array<Vector<f32, N>>,
    block: u32,
    #[comptime] plan: SumPlan,
) {
    let item = CUBE_POS * plan.units + UNIT_POS as usize;
    let row = item / comptime!(plan.pieces());
    if row >= count[0] as usize {
        terminate!();
    }
    let (first, last) = (starts[row], starts[row + 1]);
    if last - first <= block {
        let piece = piece_of(item, plan);
        let sums = sum_entries::<N>(order, source, factors, sources, piece, first as usize, last as usize, plan);
        write_sums::<N>(&sums, gradients, row, piece, plan);
    }
}

/// `parts[b, 0]` is what block b has of the row that it begins in, `parts[b, 1]` of the one that it ends in, if that is another; of rows of
/// more than a block of entries alone, all others being whole in `sum_rows_kernel`.
#[cube(launch_unchecked, address_type = "dynamic")]
fn sum_blocks_kernel<N: Size>(
    order: &Array<u32>,
    starts: &Array<u32>,
    blocks: &Array<u32>,
    source: &Array<u32>,
    factors: &Array<f32>,
    sources: &Array<Vector<f32, N>>,
    parts: &mut Array<Vector<f32, N>>,
    block: u32,
    #[comptime] plan: SumPlan,
) {
    let item = CUBE_POS * plan.units + UNIT_POS as usize;
    let own = item / comptime!(plan.pieces());
    if own + 1 >= blocks.len() {
        terminate!();
    }
    let piece = piece_of(item, plan);
    let begin = own as u32 * block;
    let end = min(begin + block, order.len() as u32);
    let head = blocks[own];
    // The row of the block's last entry.
    let mut tail = blocks[own + 1];
    if starts[tail as usize] >= end {
        tail -= 1;
    }
    for side in 0..2usize {
        let row = select(side == 0, head, tail) as usize;
        let (first, last) = (starts[row], starts[row + 1]);
        if last - first > block && (side == 0 || tail != head) {
            let (first, last) = (max(first, begin) as usize, min(last, end) as usize);
            let sums = sum_entries::<N>(order, source, factors, sources, piece, first, last, plan);
            write_sums::<N>(&sums, parts, own * 2 + side, piece, plan);
        }
    }
}

/// The unit of the block that a long row begins in adds up the row's parts.
#[cube(launch_unchecked, address_type = "dynamic")]
fn sum_parts_kernel<N: Size>(
    starts: &Array<u32>,
    blocks: &Array<u32>,
    parts: &Array<Vector<f32, N>>,
    gradients: &mut Array<Vector<f32, N>>,
    block: u32,
    #[comptime] plan: SumPlan,
) {
    let width = comptime!(plan.width());
    let item = CUBE_POS * plan.units + UNIT_POS as usize;
    let (own, vector) = (item / width, item % width);
    if own + 2 >= blocks.len() {
        terminate!();
    }
    // Rows that go on in the next block: one at most.
    let row = blocks[own + 1];
    let (first, last) = (starts[row as usize], starts[row as usize + 1]);
    if last - first > block && first / block == own as u32 {
        let side = usize::cast_from(row != blocks[own]);
        let mut sum = parts[(own * 2 + side) * width + vector];
        let end = (last - 1) as usize / block as usize + 1;
        for start in range_stepped(own + 1, end, CHUNK) {
            let mut chunk = Vector::<f32, N>::new(0.0);
            for other in start..min(start + CHUNK, end) {
                chunk += parts[other * 2 * width + vector];
            }
            sum += chunk;
        }
        gradients[row as usize * width + vector] = sum;
    }
}
