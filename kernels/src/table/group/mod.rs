//! Group: entries of equal keys side by side, so that what belongs to one row can be summed by one unit in a fixed order.
//!
//! A stable radix sort of `(key, entry)` by the digits that the largest key has, then the positions where a key begins. No
//! atomics: every unit counts a chunk of its own, so the result is the same in every run. A pass reads the keys twice and writes
//! keys and entries once; the number of distinct keys stays on the device.
//!
//! One key may have all entries. So that no unit need sum them all, the entries are also cut into blocks of equal length, and the group
//! that each block begins in is noted.

mod forward;
mod plan;

use cubecl::prelude::*;

use self::forward::{
    count_heads_kernel, count_kernel, mark_heads_kernel, scan_kernel, scatter_kernel, sum_counts_kernel,
};
use self::plan::ScanPlan;
pub use self::plan::{SortPlan, SortPlans};
use crate::launch::device::Device;
use crate::launch::plan::Planned;
use crate::launch::tensor::{Tensor, arg, empty, u32_storage};
use crate::{Error, Result};

/// Entries by key.
pub(crate) struct Groups<R: Runtime> {
    /// u32 `[entries]`: entries by ascending key, those of one key in their own order.
    pub order: Tensor<R>,
    /// u32 `[capacity]`: the distinct keys, ascending; the first `count` are set.
    pub keys: Tensor<R>,
    /// u32 `[capacity + 1]`: where in `order` each distinct key's entries start, and `entries` after the last.
    pub starts: Tensor<R>,
    /// u32 `[1]`: how many distinct keys there are.
    pub count: Tensor<R>,
    /// The most distinct keys there can be: `min(entries, limit)`.
    pub capacity: usize,
    /// Entries of a block.
    pub block: usize,
    /// u32 `[blocks + 1]`: the group that each block of `order` begins in, and the last entry's.
    pub blocks: Tensor<R>,
}

impl<R: Runtime> Clone for Groups<R> {
    fn clone(&self) -> Self {
        Self {
            order: self.order.clone(),
            keys: self.keys.clone(),
            starts: self.starts.clone(),
            count: self.count.clone(),
            blocks: self.blocks.clone(),
            ..*self
        }
    }
}

/// Entries of a block of `entries`: few enough that a unit can go through one of them, or through as many numbers as there are blocks.
pub fn block_of(entries: usize) -> usize {
    (entries / MOST_BLOCKS).next_power_of_two().max(MIN_BLOCK)
}

const MIN_BLOCK: usize = 64;
const MOST_BLOCKS: usize = 1 << 15;

/// Groups the entries of `keys` u32 `[entries]`, all of them below `limit`.
///
/// # Errors
/// More entries than a u32 counts, or than one binding holds.
pub(crate) fn group<R: Runtime>(client: &ComputeClient<R>, keys: &Tensor<R>, limit: usize) -> Result<Groups<R>> {
    let entries = keys.shape()[0];
    if entries > u32::MAX as usize {
        let (value, limit) = (entries as u64, u64::from(u32::MAX));
        return Err(Error::Exceeds { what: "entries", value, limit_name: "the largest index", limit });
    }
    let device = Device::of(client);
    let plans = SortPlans::of(&device, entries, limit);
    let sort = Sort { client, device, plans, entries };
    let capacity = entries.min(limit);
    let block = block_of(entries);
    let groups = Groups {
        order: sort.empty("order", entries)?,
        keys: sort.empty("distinct keys", capacity)?,
        starts: sort.empty("starts", capacity + 1)?,
        count: sort.empty("count", 1)?,
        capacity,
        block,
        blocks: sort.empty("groups of blocks", entries.div_ceil(block) + 1)?,
    };
    let sorted = sort.by_digits(keys, &groups)?;
    sort.mark_heads(&sorted, &groups)?;
    Ok(groups)
}

struct Sort<'a, R: Runtime> {
    client: &'a ComputeClient<R>,
    device: Device,
    plans: SortPlans,
    entries: usize,
}

impl<R: Runtime> Sort<'_, R> {
    fn empty(&self, name: &'static str, count: usize) -> Result<Tensor<R>> {
        empty(self.client, name, &[count], u32_storage())
    }

    /// Sorts by one digit after the other, the lowest first. Returns the keys; the last pass leaves the order in `groups`.
    fn by_digits(&self, keys: &Tensor<R>, groups: &Groups<R>) -> Result<Tensor<R>> {
        let SortPlans { plan, passes, count, scatter, .. } = self.plans;
        let counts = self.empty("digit counts", self.plans.counts())?;
        let (mut keys, mut order) = (keys.clone(), keys.clone());
        for pass in 0..passes {
            let shift = pass * plan.bits;
            let sorted = self.empty("sorted keys", self.entries)?;
            let placed = if pass + 1 == passes { groups.order.clone() } else { self.empty("order", self.entries)? };
            let counting = count.start(&self.device)?;
            // SAFETY: a unit reads its own entries, all below `entries`, and a cube writes its own counts.
            unsafe {
                count_kernel::launch_unchecked::<R>(
                    self.client,
                    counting.0,
                    counting.1,
                    arg(&keys, 1),
                    arg(&counts, 1),
                    self.entries as u32,
                    shift,
                    count.cubes as u32,
                    plan,
                );
            }
            self.scan(&counts, &groups.count)?;
            let scattering = scatter.start(&self.device)?;
            // SAFETY: a unit reads its own entries, all below `entries`, and writes each of them to a place of its own.
            unsafe {
                scatter_kernel::launch_unchecked::<R>(
                    self.client,
                    scattering.0,
                    scattering.1,
                    arg(&keys, 1),
                    arg(&order, 1),
                    arg(&counts, 1),
                    arg(&sorted, 1),
                    arg(&placed, 1),
                    self.entries as u32,
                    shift,
                    scatter.cubes as u32,
                    pass == 0,
                    plan,
                );
            }
            (keys, order) = (sorted, placed);
        }
        Ok(keys)
    }

    /// Turns counts into how many come before each, and leaves their sum in `total`.
    fn scan(&self, counts: &Tensor<R>, total: &Tensor<R>) -> Result<()> {
        let size = counts.shape()[0];
        let planned = ScanPlan::of(self.plans.plan.units, size);
        let Planned { plan, launch } = planned;
        if plan.whole {
            return self.launch_scan(counts, total, planned);
        }
        let sums = self.empty("sums of counts", launch.cubes)?;
        let (grid, cube_dim) = ScanPlan::adding(launch).start(&self.device)?;
        // SAFETY: a unit reads its own share of `counts`; a cube writes its own sum.
        unsafe {
            sum_counts_kernel::launch_unchecked::<R>(
                self.client,
                grid,
                cube_dim,
                arg(counts, 1),
                arg(&sums, 1),
                size as u32,
                launch.cubes as u32,
                plan,
            );
        }
        self.scan(&sums, total)?;
        self.launch_scan(counts, &sums, planned)
    }

    fn launch_scan(&self, counts: &Tensor<R>, sums: &Tensor<R>, planned: Planned<ScanPlan>) -> Result<()> {
        let Planned { plan, launch } = planned;
        let (grid, cube_dim) = launch.start(&self.device)?;
        // SAFETY: units read and write shares of `counts` that don't overlap; there is a sum for each cube.
        unsafe {
            scan_kernel::launch_unchecked::<R>(
                self.client,
                grid,
                cube_dim,
                arg(counts, 1),
                arg(sums, 1),
                counts.shape()[0] as u32,
                launch.cubes as u32,
                plan,
            );
        }
        Ok(())
    }

    /// Finds where each distinct key of `sorted` starts.
    fn mark_heads(&self, sorted: &Tensor<R>, groups: &Groups<R>) -> Result<()> {
        let SortPlans { plan, count_heads, mark_heads, .. } = self.plans;
        let counts = self.empty("head counts", count_heads.cubes)?;
        let counting = count_heads.start(&self.device)?;
        // SAFETY: a unit reads its own entries and the one before; a cube writes its own count.
        unsafe {
            count_heads_kernel::launch_unchecked::<R>(
                self.client,
                counting.0,
                counting.1,
                arg(sorted, 1),
                arg(&counts, 1),
                self.entries as u32,
                count_heads.cubes as u32,
                plan,
            );
        }
        self.scan(&counts, &groups.count)?;
        let marking = mark_heads.start(&self.device)?;
        // SAFETY: a unit reads its own entries and the one before, and writes a place for each distinct key, of which there
        // are at most `capacity`, and for each block that begins in its entries.
        unsafe {
            mark_heads_kernel::launch_unchecked::<R>(
                self.client,
                marking.0,
                marking.1,
                arg(sorted, 1),
                arg(&counts, 1),
                arg(&groups.keys, 1),
                arg(&groups.starts, 1),
                arg(&groups.blocks, 1),
                groups.block as u32,
                self.entries as u32,
                mark_heads.cubes as u32,
                plan,
            );
        }
        Ok(())
    }
}
