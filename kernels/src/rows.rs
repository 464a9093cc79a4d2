//! Gradients of a table of which only some rows were used: those rows, and a gradient for each.
//!
//! `gradients[u, k, c] = Σ factors[e, k] · sources[source[e], k, c]` over the entries e of row u, in their own order, or, where all factors
//! share a source, `gradients[u, c, k] = Σ factors[e, k] · sources[source[e], c]`: one unit sums a few vectors of one row from first to
//! last entry, so that every run gives the same bits. Reads each entry's source once, writes each used row once, and never touches the table.
//!
//! A row may have all entries. One with more than a block of them is summed block by block, and then over its blocks. Sums are taken of
//! [`CHUNK`] terms at a time and then of those sums, so that rounding doesn't grow with their number.

use cubecl::prelude::*;

use crate::device::Device;
use crate::group::{Groups, group};
use crate::interleave::{interleaved, load};
use crate::loops::check_loops;
use crate::product::zero_sums;
use crate::tensor::{Tensor, arg, check, empty, f32_storage, from_u32, index, positive, sizes, u32_storage, zeros};
use crate::{Error, Result};

/// The gradient of a table `[rows, width]`, of which only the used rows are listed: each once, ascending, all of them of the table. Only
/// backward passes and [`RowGradients::new`] make one, so that whoever holds one need not check again.
pub struct RowGradients<R: Runtime> {
    pub(crate) rows: Tensor<R>,
    pub(crate) count: Tensor<R>,
    pub(crate) gradients: Tensor<R>,
    pub(crate) table_rows: usize,
}

impl<R: Runtime> Clone for RowGradients<R> {
    fn clone(&self) -> Self {
        Self {
            rows: self.rows.clone(),
            count: self.count.clone(),
            gradients: self.gradients.clone(),
            table_rows: self.table_rows,
        }
    }
}

/// What belongs to the entries that are summed.
pub(crate) struct Entries<'a, R: Runtime> {
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
    entries: &Entries<'_, R>,
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
    entries: &'a Entries<'a, R>,
    /// Numbers of a vector.
    vector: usize,
    /// Blocks of entries.
    blocks: usize,
    plan: SumPlan,
}

impl<'a, R: Runtime> Sum<'a, R> {
    fn of(client: &'a ComputeClient<R>, groups: &'a Groups<R>, entries: &'a Entries<'a, R>) -> Self {
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

impl<R: Runtime> RowGradients<R> {
    /// The gradient that lists of rows and gradients make, for a table of `table_rows` rows: a row that is listed again is added up in the
    /// list's order, one beyond the table has no part in it.
    ///
    /// - `rows` u32 `[capacity]` in any order, of which the first `count` are set
    /// - `count` u32 `[1]`
    /// - `gradients` f32 `[capacity, width]`: a gradient for each listed row; the others may be anything
    ///
    /// # Errors
    /// Tensors that don't fit each other, no rows of a table, or more entries than a u32 counts or than one binding holds.
    pub fn new(
        client: &ComputeClient<R>,
        rows: &Tensor<R>,
        count: &Tensor<R>,
        gradients: &Tensor<R>,
        table_rows: usize,
    ) -> Result<Self> {
        let listed = Self { rows: rows.clone(), count: count.clone(), gradients: gradients.clone(), table_rows };
        join(client, &[&listed], table_rows)
    }

    /// The gradient of no used rows.
    pub(crate) fn none(client: &ComputeClient<R>, table_rows: usize, width: usize) -> Result<Self> {
        Ok(Self {
            rows: empty(client, "rows", &[0], u32_storage())?,
            count: from_u32(client, &[1], &[0])?,
            gradients: empty(client, "row gradients", &[0, width], f32_storage())?,
            table_rows,
        })
    }

    /// u32 `[capacity]`: the used rows, ascending; the first `count` are set.
    pub fn rows(&self) -> &Tensor<R> {
        &self.rows
    }

    /// u32 `[1]`: how many rows are listed. It stays on the device: nobody waits for it.
    pub fn count(&self) -> &Tensor<R> {
        &self.count
    }

    /// f32 `[capacity, width]`: a gradient for each listed row; the others are undefined.
    pub fn gradients(&self) -> &Tensor<R> {
        &self.gradients
    }

    /// Rows of the table.
    pub fn table_rows(&self) -> usize {
        self.table_rows
    }

    /// Checks that the gradient is of a table of `rows` rows.
    pub(crate) fn check_table(&self, rows: usize) -> Result<()> {
        let (value, expected) = (self.table_rows as u64, rows as u64);
        if value == expected {
            Ok(())
        } else {
            Err(Error::Number { what: "rows of a gradient's table", value, expected })
        }
    }

    /// The gradient of the whole table, f32 `[rows, width]`: zero where a row was not used. For comparison, and for optimisers
    /// that know no sparse gradient; costs the whole table.
    ///
    /// # Errors
    /// Another number of rows than the table has, or a table larger than one binding.
    pub fn dense(&self, client: &ComputeClient<R>, rows: usize) -> Result<Tensor<R>> {
        let (capacity, width) = self.check()?;
        self.check_table(rows)?;
        let dense = zeros(client, "dense gradient", &[rows, width])?;
        if capacity == 0 {
            return Ok(dense);
        }
        let device = Device::of(client);
        let vector = device.width(4, &[width]);
        let plan = ScatterPlan { rows, vectors: width / vector, units: device.flat(capacity * (width / vector)) };
        let cubes = (capacity * plan.vectors).div_ceil(plan.units);
        // SAFETY: shapes are checked; a row is written below `rows` only.
        unsafe {
            scatter_rows_kernel::launch_unchecked::<R>(
                client,
                device.grid(cubes)?,
                CubeDim::new_1d(plan.units as u32),
                dense.required_address_type(),
                vector,
                arg(&self.rows, 1),
                arg(&self.count, 1),
                arg(&self.gradients, vector),
                arg(&dense, vector),
                plan,
            );
        }
        Ok(dense)
    }

    /// The sum of several gradients of one table of `rows` rows, as several backward passes give them: of each row those of `parts` in
    /// their order. Moves every part once in and out, and once more in; waits for nothing.
    ///
    /// # Errors
    /// No part, parts of different widths or of another table, or more entries than a u32 counts or than one binding holds.
    pub fn sum(client: &ComputeClient<R>, parts: &[Self], rows: usize) -> Result<Self> {
        for part in parts {
            part.check_table(rows)?;
        }
        match parts {
            [] => Err(Error::Zero { what: "gradients to add up" }),
            [only] => only.check().map(|_| only.clone()),
            parts => join(client, &parts.iter().collect::<Vec<_>>(), rows),
        }
    }

    /// Checks the three tensors against each other and returns `(capacity, width)`.
    pub(crate) fn check(&self) -> Result<(usize, usize)> {
        let [capacity, width] = sizes(&self.gradients, "row gradients")?;
        positive(&[("width of the row gradients", width)])?;
        check(&self.gradients, "row gradients", &[capacity, width], f32_storage())?;
        check(&self.rows, "rows", &[capacity], u32_storage())?;
        check(&self.count, "count", &[1], u32_storage())?;
        Ok((capacity, width))
    }
}

/// Sums lists of rows by their rows, for a table of `rows` rows. Several lists may name a row, and one list may name it again.
fn join<R: Runtime>(client: &ComputeClient<R>, parts: &[&RowGradients<R>], rows: usize) -> Result<RowGradients<R>> {
    positive(&[("rows of a table", rows)])?;
    // What is unlisted, or beyond the table, goes to one row past the last.
    index("rows of a table", rows + 1)?;
    let (mut total, mut width) = (0, 0);
    for (at, part) in parts.iter().enumerate() {
        let (capacity, own) = part.check()?;
        width = if at == 0 { own } else { width };
        check(&part.gradients, "row gradients", &[capacity, width], f32_storage())?;
        total += capacity;
    }
    index("listed rows", total)?;
    if total == 0 {
        return RowGradients::none(client, rows, width);
    }
    let joined = Joined::empty(client, total, width)?;
    let mut base = 0;
    for part in parts.iter().filter(|part| part.rows.shape()[0] > 0) {
        joined.put(client, part, base, rows)?;
        base += part.rows.shape()[0];
    }
    let Joined { keys, source, factors, sources } = joined;
    let groups = group(client, &keys, rows + 1)?;
    // SAFETY: the count is at most the number of keys.
    unsafe {
        drop_unlisted_kernel::launch_unchecked::<R>(
            client,
            CubeCount::Static(1, 1, 1),
            CubeDim::new_1d(1),
            arg(&groups.keys, 1),
            arg(&groups.count, 1),
            rows as u32,
        );
    }
    let entries =
        Entries { source: &source, factors: &factors, sources: &sources, count: 1, slice: width, shared: false };
    sum_rows(client, groups, &entries, rows)
}

/// Takes the row past the table, the largest there can be, from the list again.
#[cube(launch_unchecked)]
fn drop_unlisted_kernel(keys: &Array<u32>, count: &mut Array<u32>, rows: u32) {
    let listed = count[0];
    if listed > 0 && keys[max(listed, 1) as usize - 1] >= rows {
        count[0] = listed - 1;
    }
}

/// The rows of several gradients one after the other, as entries to be summed by their rows. What a part has not set, and what it lists
/// beyond the table, belongs to the row past the table's last.
struct Joined<R: Runtime> {
    /// u32 `[total]`: the row of each entry.
    keys: Tensor<R>,
    /// u32 `[total]`: each entry itself.
    source: Tensor<R>,
    /// f32 `[total]`: ones.
    factors: Tensor<R>,
    /// f32 `[total, width]`.
    sources: Tensor<R>,
}

impl<R: Runtime> Joined<R> {
    fn empty(client: &ComputeClient<R>, total: usize, width: usize) -> Result<Self> {
        Ok(Self {
            keys: empty(client, "rows", &[total], u32_storage())?,
            source: empty(client, "sources", &[total], u32_storage())?,
            factors: empty(client, "factors", &[total], f32_storage())?,
            sources: empty(client, "joined row gradients", &[total, width], f32_storage())?,
        })
    }

    /// Writes the entries from `base` on.
    fn put(&self, client: &ComputeClient<R>, part: &RowGradients<R>, base: usize, rows: usize) -> Result<()> {
        let device = Device::of(client);
        let (capacity, width) = part.check()?;
        let vector = device.width(4, &[width]);
        let vectors = width / vector;
        let units = device.flat(capacity * vectors);
        // SAFETY: shapes are checked, and the joined tensors have room for all parts; a unit writes its own vector and entry.
        unsafe {
            join_rows_kernel::launch_unchecked::<R>(
                client,
                device.grid((capacity * vectors).div_ceil(units))?,
                CubeDim::new_1d(units as u32),
                self.sources.required_address_type(),
                vector,
                arg(&part.rows, 1),
                arg(&part.count, 1),
                arg(&part.gradients, vector),
                arg(&self.keys, 1),
                arg(&self.source, 1),
                arg(&self.factors, 1),
                arg(&self.sources, vector),
                base as u32,
                rows as u32,
                JoinPlan { vectors, units },
            );
        }
        Ok(())
    }
}

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct JoinPlan {
    vectors: usize,
    units: usize,
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn join_rows_kernel<N: Size>(
    rows: &Array<u32>,
    count: &Array<u32>,
    gradients: &Array<Vector<f32, N>>,
    keys: &mut Array<u32>,
    source: &mut Array<u32>,
    factors: &mut Array<f32>,
    sources: &mut Array<Vector<f32, N>>,
    base: u32,
    table_rows: u32,
    #[comptime] plan: JoinPlan,
) {
    let item = CUBE_POS * plan.units + UNIT_POS as usize;
    let (entry, vector) = (item / plan.vectors, item % plan.vectors);
    if entry < rows.len() {
        let listed = min(count[0] as usize, rows.len());
        let mut gradient = Vector::<f32, N>::new(0.0);
        let mut row = table_rows;
        if entry < listed {
            row = min(rows[entry], table_rows);
        }
        if row < table_rows {
            gradient = gradients[item];
        }
        sources[base as usize * plan.vectors + item] = gradient;
        if vector == 0 {
            let at = base as usize + entry;
            keys[at] = row;
            source[at] = at as u32;
            factors[at] = 1.0;
        }
    }
}

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct ScatterPlan {
    rows: usize,
    vectors: usize,
    units: usize,
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn scatter_rows_kernel<N: Size>(
    rows: &Array<u32>,
    count: &Array<u32>,
    gradients: &Array<Vector<f32, N>>,
    dense: &mut Array<Vector<f32, N>>,
    #[comptime] plan: ScatterPlan,
) {
    let item = CUBE_POS * plan.units + UNIT_POS as usize;
    let listed = min(count[0] as usize, rows.len());
    if item / plan.vectors < listed {
        let row = rows[item / plan.vectors] as usize;
        if row < plan.rows {
            dense[row * plan.vectors + item % plan.vectors] = gradients[item];
        }
    }
}
