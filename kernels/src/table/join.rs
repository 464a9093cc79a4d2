//! Sums of lists of rows: what several gradients of a table add up to.
//!
//! A list may name a row again, in any order, and rows that the table lacks: its entries are grouped by row and summed in the list's order,
//! what is unlisted or beyond the table being a row past the last, which is dropped. Moves each list once in and out, and once more in.

use cubecl::prelude::*;

use crate::launch::device::Device;
use crate::launch::plan::Launch;
use crate::launch::tensor::{Tensor, arg, check, empty, f32_storage, index, positive, u32_storage};
use crate::table::group::{Listed, SortPlans, group};
use crate::table::row_gradients::RowGradients;
use crate::table::segment_sum::{SumPlans, SumSizes, Terms, sum_rows};
use crate::{Error, Result};

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
            [only] => only.check(client).map(|_| only.clone()),
            parts => join(client, &parts.iter().collect::<Vec<_>>(), rows),
        }
    }
}

/// The launches that join lists of rows: of [`RowGradients::new`] of one list, of [`RowGradients::sum`] of several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinPlans {
    /// Puts each list behind the one before it.
    pub parts: Vec<Launch>,
    /// Groups the entries by row.
    pub sort: SortPlans,
    /// Sums the entries of a row.
    pub sums: SumPlans,
    /// Drops what is unlisted or beyond the table.
    pub drop: Launch,
}

impl JoinPlans {
    /// Plans the sum of lists of `capacities` rows each, of a table `[rows, width]`. Each launch is checked when it is made.
    pub fn of(device: &Device, capacities: &[usize], rows: usize, width: usize) -> Self {
        let entries = capacities.iter().fold(0, |total: usize, &capacity| total.saturating_add(capacity));
        let limit = rows.saturating_add(1);
        let parts = capacities.iter().map(|&capacity| join_launch(device, capacity, width)).collect();
        let sort = SortPlans::of(device, entries, limit);
        let sums = SumPlans::of(device, &sort, &SumSizes { factors: 1, slice: width, shared: false });
        Self { parts, sort, sums, drop: DROP }
    }

    /// The launches in their order; none for no entries.
    pub fn launches(&self) -> Vec<Launch> {
        let sort = self.sort.launches();
        if sort.is_empty() {
            return Vec::new();
        }
        let parts = self.parts.iter().copied().filter(|launch| launch.cubes > 0);
        parts.chain([self.sort.count]).chain(sort).chain(self.sums.launches()).chain([self.drop]).collect()
    }
}

const DROP: Launch = Launch { kernel: "drop_unlisted_kernel", cubes: 1, units: 1, shared_bytes: 0, loops: 0 };

fn join_launch(device: &Device, capacity: usize, width: usize) -> Launch {
    let vectors = width / device.width(4, &[width]);
    Launch::flat(device, "join_rows_kernel", capacity.saturating_mul(vectors), 0)
}

/// Sums lists of rows by their rows, for a table of `rows` rows. Several lists may name a row, and one list may name it again.
fn join<R: Runtime>(client: &ComputeClient<R>, parts: &[&RowGradients<R>], rows: usize) -> Result<RowGradients<R>> {
    positive(&[("rows of a table", rows)])?;
    // What is unlisted, or beyond the table, goes to one row past the last.
    index("rows of a table", rows + 1)?;
    let (mut total, mut width) = (0, 0);
    for (at, part) in parts.iter().enumerate() {
        let (capacity, own) = part.check(client)?;
        width = if at == 0 { own } else { width };
        check(client, &part.gradients, "row gradients", &[capacity, width], f32_storage())?;
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
    let groups = group(client, &Listed::counted(client, keys, rows + 1)?)?;
    let entries =
        Terms { source: &source, per: 1, factors: &factors, sources: &sources, count: 1, slice: width, shared: false };
    let summed = sum_rows(client, &groups, &entries, rows)?;
    let (grid, cube_dim) = DROP.start(&Device::of(client))?;
    // SAFETY: the count is at most the number of keys.
    unsafe {
        drop_unlisted_kernel::launch_unchecked::<R>(
            client,
            grid,
            cube_dim,
            arg(&summed.rows, 1),
            arg(&summed.count, 1),
            rows as u32,
        );
    }
    Ok(summed)
}

/// Takes the row past the table, the largest there can be, from the list again.
#[cube(launch_unchecked)]
fn drop_unlisted_kernel(keys: &Array<u32>, count: &mut Array<u32>, rows: u32) {
    let listed = count[0];
    let last = max(listed, 1);
    count[0] = last - u32::cast_from(keys[last as usize - 1] >= rows);
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
        let (capacity, width) = part.check(client)?;
        let vector = device.width(4, &[width]);
        let vectors = width / vector;
        let launch = join_launch(&device, capacity, width);
        let (grid, cube_dim) = launch.start(&device)?;
        // SAFETY: shapes are checked, and the joined tensors have room for all parts; a unit writes its own vector and entry.
        unsafe {
            join_rows_kernel::launch_unchecked::<R>(
                client,
                grid,
                cube_dim,
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
                JoinPlan { vectors, units: launch.units },
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
