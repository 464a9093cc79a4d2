//! Gradients of a table of which only some rows were used: those rows, and a gradient for each.
//!
//! `gradients[u, k, c] = Σ factors[e, k] · sources[source[e], k, c]` over the entries e of row u, in their own order, or, where all factors
//! share a source, `gradients[u, c, k] = Σ factors[e, k] · sources[source[e], c]`: one unit sums a few vectors of one row from first to
//! last entry, so that every run gives the same bits. Reads each entry's source once, writes each used row once, and never touches the table.

use cubecl::prelude::*;

use crate::device::Device;
use crate::group::{Groups, group};
use crate::interleave::{interleaved, load};
use crate::product::zero_sums;
use crate::tensor::{Tensor, arg, check, empty, f32_storage, sizes, u32_storage, zeros};
use crate::{Error, Result};

/// The gradient of a table `[rows, width]`, of which only the used rows are listed.
pub struct RowGradients<R: Runtime> {
    /// u32 `[capacity]`: the used rows, ascending; the first `count` are set.
    pub rows: Tensor<R>,
    /// u32 `[1]`: how many rows are listed. It stays on the device: nobody waits for it.
    pub count: Tensor<R>,
    /// f32 `[capacity, width]`: a gradient for each listed row; the others are undefined.
    pub gradients: Tensor<R>,
}

impl<R: Runtime> Clone for RowGradients<R> {
    fn clone(&self) -> Self {
        Self { rows: self.rows.clone(), count: self.count.clone(), gradients: self.gradients.clone() }
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
}

/// Factors that share a source, of which a unit still takes several vectors.
const FEW_STRANDS: usize = 4;

/// Sums the entries of each group into the gradient of its row, `[capacity, factors · slice]`.
pub(crate) fn sum_rows<R: Runtime>(
    client: &ComputeClient<R>,
    groups: Groups<R>,
    entries: &Entries<'_, R>,
) -> Result<RowGradients<R>> {
    let device = Device::of(client);
    let width = device.width(4, &[entries.slice]);
    let slice = entries.slice / width;
    let strands = if entries.shared { entries.count } else { 1 };
    let block = if strands > FEW_STRANDS { 1 } else { device.run(slice) };
    let items = groups.capacity * (entries.count / strands) * (slice / block);
    let units = device.flat(items);
    let plan = SumPlan { factors: entries.count, slice, strands, block, units };
    let shape = [groups.capacity, entries.count * entries.slice];
    let gradients = empty(client, "row gradients", &shape, f32_storage())?;
    let cubes = items.div_ceil(units);
    // SAFETY: groups are of these entries; a unit writes its own vectors of a row below `count`, which is at most `capacity`.
    unsafe {
        sum_rows_kernel::launch_unchecked::<R>(
            client,
            device.grid(cubes)?,
            CubeDim::new_1d(plan.units as u32),
            gradients.required_address_type(),
            width,
            arg(&groups.order, 1),
            arg(&groups.starts, 1),
            arg(&groups.count, 1),
            arg(entries.source, 1),
            arg(entries.factors, 1),
            arg(entries.sources, width),
            arg(&gradients, width),
            plan,
        );
    }
    Ok(RowGradients { rows: groups.keys, count: groups.count, gradients })
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
    #[comptime] plan: SumPlan,
) {
    let pitch = comptime!(plan.factors / plan.strands * plan.slice);
    let pieces = comptime!(pitch / plan.block);
    let item = CUBE_POS * plan.units + UNIT_POS as usize;
    let row = item / pieces;
    if row >= count[0] as usize {
        terminate!();
    }
    let first = item % pieces * plan.block;
    let factor = first / plan.slice;
    let mut sums = zero_sums::<N>(comptime!(plan.block * plan.strands));
    for place in starts[row]..starts[row + 1] {
        let entry = order[place as usize] as usize;
        let lines = load::<f32, N>(sources, source[entry] as usize * pitch + first, plan.block);
        #[unroll]
        for k in 0..plan.strands {
            let scale = Vector::new(factors[entry * plan.factors + factor + k]);
            #[unroll]
            for b in 0..plan.block {
                sums[b * plan.strands + k] += scale * lines[b];
            }
        }
    }
    #[unroll]
    for b in 0..plan.block {
        #[unroll]
        for v in 0..plan.strands {
            gradients[(row * pitch + first + b) * plan.strands + v] =
                interleaved::<N>(&sums, comptime!(b * plan.strands), v, plan.strands);
        }
    }
}

impl<R: Runtime> RowGradients<R> {
    /// The gradient of the whole table, f32 `[rows, width]`: zero where a row was not used. For comparison, and for optimisers
    /// that know no sparse gradient; costs the whole table.
    ///
    /// # Errors
    /// Tensors that don't fit each other, or a table larger than one binding.
    pub fn dense(&self, client: &ComputeClient<R>, rows: usize) -> Result<Tensor<R>> {
        let (capacity, width) = self.check()?;
        let dense = zeros(client, "dense gradient", &[rows, width])?;
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
    /// No part, no rows, parts of different widths, tensors that don't fit each other, or more entries than a u32 counts or than one binding
    /// holds.
    pub fn sum(client: &ComputeClient<R>, parts: &[Self], rows: usize) -> Result<Self> {
        let [first, others @ ..] = parts else { return Err(Error::Zero { what: "gradients to add up" }) };
        let (mut total, width) = first.check()?;
        if rows == 0 || parts.iter().any(|part| part.rows.shape()[0] == 0) {
            return Err(Error::Zero { what: "rows of a table or of its gradients" });
        }
        for part in others {
            let (capacity, _) = part.check()?;
            check(&part.gradients, "row gradients", &[capacity, width], f32_storage())?;
            total += capacity;
        }
        if others.is_empty() {
            return Ok(first.clone());
        }
        let joined = Joined::empty(client, total, width)?;
        let mut base = 0;
        for part in parts {
            joined.put(client, part, base, rows)?;
            base += part.rows.shape()[0];
        }
        let Joined { keys, source, factors, sources } = joined;
        let groups = group(client, &keys, rows)?;
        let entries =
            Entries { source: &source, factors: &factors, sources: &sources, count: 1, slice: width, shared: false };
        sum_rows(client, groups, &entries)
    }

    /// Checks the three tensors against each other and returns `(capacity, width)`.
    pub(crate) fn check(&self) -> Result<(usize, usize)> {
        let [capacity, width] = sizes(&self.gradients, "row gradients")?;
        check(&self.gradients, "row gradients", &[capacity, width], f32_storage())?;
        check(&self.rows, "rows", &[capacity], u32_storage())?;
        check(&self.count, "count", &[1], u32_storage())?;
        Ok((capacity, width))
    }
}

/// The rows of several gradients one after the other, as entries to be summed by their rows. What a part has not set is zero, shared out
/// among the rows that it lists; so is what it lists beyond the table.
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
                rows.min(u32::MAX as usize) as u32,
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
        let row = rows[entry % max(listed, 1)];
        if entry < listed && row < table_rows {
            gradient = gradients[item];
        }
        sources[base as usize * plan.vectors + item] = gradient;
        if vector == 0 {
            let at = base as usize + entry;
            keys[at] = min(row, table_rows - 1);
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
