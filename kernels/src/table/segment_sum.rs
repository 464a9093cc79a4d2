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
use crate::launch::plan::Launch;
use crate::launch::tensor::{Tensor, arg, empty, f32_storage};
use crate::linear::interleave::{interleaved, load};
use crate::linear::tile::zero_sums;
use crate::table::group::{Groups, block_of};
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

/// The sizes of sums of entries by rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SumSizes {
    /// Entries.
    pub entries: usize,
    /// The most rows that entries can have.
    pub rows: usize,
    /// Factors of an entry.
    pub factors: usize,
    /// Numbers that one factor goes with.
    pub slice: usize,
    /// Whether every factor goes with the same numbers.
    pub shared: bool,
}

/// The launches that sum entries by rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SumPlans {
    plan: SumPlan,
    /// Numbers of a vector.
    vector: usize,
    /// Blocks of entries.
    blocks: usize,
    /// Sums the entries of rows of no more than a block of them.
    pub rows: Launch,
    /// Sums the entries of longer rows block by block, then over the blocks; None where there is one block.
    pub long: Option<[Launch; 2]>,
}

impl SumPlans {
    /// Plans sums of entries; no factors count as one. Each launch is checked when it is made.
    pub fn of(device: &Device, sizes: &SumSizes) -> Self {
        let SumSizes { entries, rows, slice, shared, .. } = *sizes;
        let factors = sizes.factors.max(1);
        let vector = device.width(4, &[slice]);
        let (slice, strands) = (slice / vector, if shared { factors } else { 1 });
        let run = if strands > FEW_STRANDS { 1 } else { device.run(slice) };
        let block = block_of(entries);
        let blocks = entries.div_ceil(block);
        let plan = SumPlan { factors, slice, strands, block: run, units: 0, split: blocks > 1 };
        let launch =
            |kernel, pieces: usize, of: usize, loops| Launch::flat(device, kernel, pieces.saturating_mul(of), loops);
        let in_blocks = launch("sum_blocks_kernel", blocks, plan.pieces(), sum_loops(block) + 3);
        let of_parts = launch("sum_parts_kernel", blocks.saturating_sub(1), plan.width(), sum_loops(blocks));
        Self {
            plan,
            vector,
            blocks,
            rows: launch("sum_rows_kernel", rows, plan.pieces(), sum_loops(block)),
            long: plan.split.then_some([in_blocks, of_parts]),
        }
    }

    /// The launches in their order.
    pub fn launches(&self) -> Vec<Launch> {
        core::iter::once(self.rows).chain(self.long.into_iter().flatten()).collect()
    }

    /// What the kernel of `launch` is compiled for.
    fn compiled(&self, launch: Launch) -> SumPlan {
        SumPlan { units: launch.units, ..self.plan }
    }
}

impl SumPlan {
    /// Vectors of a source.
    fn pitch(&self) -> usize {
        (self.factors / self.strands).saturating_mul(self.slice)
    }

    /// Units that share out a row.
    fn pieces(&self) -> usize {
        self.pitch() / self.block
    }

    /// Vectors of a row's gradient.
    fn width(&self) -> usize {
        self.pitch().saturating_mul(self.strands)
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
    if let Some([of_blocks, of_parts]) = sum.plans.long {
        let parts = sum.parts_of_blocks(of_blocks)?;
        sum.long_rows(of_parts, &parts, &gradients)?;
    }
    Ok(RowGradients { rows: groups.keys, count: groups.count, gradients, table_rows })
}

/// A sum of entries by rows.
struct Sum<'a, R: Runtime> {
    client: &'a ComputeClient<R>,
    device: Device,
    groups: &'a Groups<R>,
    entries: &'a Terms<'a, R>,
    plans: SumPlans,
}

impl<'a, R: Runtime> Sum<'a, R> {
    fn of(client: &'a ComputeClient<R>, groups: &'a Groups<R>, entries: &'a Terms<'a, R>) -> Self {
        let device = Device::of(client);
        let Terms { count: factors, slice, shared, .. } = *entries;
        let sizes = SumSizes { entries: groups.order.shape()[0], rows: groups.capacity, factors, slice, shared };
        let plans = SumPlans::of(&device, &sizes);
        Self { client, device, groups, entries, plans }
    }

    /// The gradients of rows of no more than a block of entries.
    fn short_rows(&self, gradients: &Tensor<R>) -> Result<()> {
        let (groups, entries) = (self.groups, self.entries);
        let SumPlans { vector, rows: launch, .. } = self.plans;
        let (grid, cube_dim) = launch.start(&self.device)?;
        // SAFETY: groups are of these entries; a unit writes its own vectors of a row below `count`, which is at most `capacity`.
        unsafe {
            sum_rows_kernel::launch_unchecked::<R>(
                self.client,
                grid,
                cube_dim,
                gradients.required_address_type(),
                vector,
                arg(&groups.order, 1),
                arg(&groups.starts, 1),
                arg(&groups.count, 1),
                arg(entries.source, 1),
                arg(entries.factors, 1),
                arg(entries.sources, vector),
                arg(gradients, vector),
                groups.block as u32,
                self.plans.compiled(launch),
            );
        }
        Ok(())
    }

    /// Of each block what it has of the long rows that it begins and ends in, f32 `[blocks, 2, width]`; the rest is undefined.
    fn parts_of_blocks(&self, launch: Launch) -> Result<Tensor<R>> {
        let (groups, entries) = (self.groups, self.entries);
        let SumPlans { vector, blocks, plan, .. } = self.plans;
        let shape = [blocks, 2, plan.width() * vector];
        let parts = empty(self.client, "parts of row gradients", &shape, f32_storage())?;
        let (grid, cube_dim) = launch.start(&self.device)?;
        // SAFETY: groups are of these entries; a unit writes its own vectors of a block's two parts.
        unsafe {
            sum_blocks_kernel::launch_unchecked::<R>(
                self.client,
                grid,
                cube_dim,
                parts.required_address_type(),
                vector,
                arg(&groups.order, 1),
                arg(&groups.starts, 1),
                arg(&groups.blocks, 1),
                arg(entries.source, 1),
                arg(entries.factors, 1),
                arg(entries.sources, vector),
                arg(&parts, vector),
                groups.block as u32,
                self.plans.compiled(launch),
            );
        }
        Ok(parts)
    }

    /// The gradients of long rows from their parts.
    fn long_rows(&self, launch: Launch, parts: &Tensor<R>, gradients: &Tensor<R>) -> Result<()> {
        let (groups, vector) = (self.groups, self.plans.vector);
        let (grid, cube_dim) = launch.start(&self.device)?;
        // SAFETY: a row's parts are those of its blocks, all below `blocks`; a unit writes its own vector of a row.
        unsafe {
            sum_parts_kernel::launch_unchecked::<R>(
                self.client,
                grid,
                cube_dim,
                gradients.required_address_type(),
                vector,
                arg(&groups.starts, 1),
                arg(&groups.blocks, 1),
                arg(parts, vector),
                arg(gradients, vector),
                groups.block as u32,
                self.plans.compiled(launch),
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
