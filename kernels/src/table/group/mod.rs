//! Group: entries of equal keys side by side, so that what belongs to one row can be summed by one unit in a fixed order.
//!
//! A stable radix sort of `(key, entry)` by the digits that the largest key has, then how many distinct keys begin before each run of entries. No
//! atomics, so the result is the same in every run, and no launch that only scans: a cube counts the digits of its entries, and another
//! launch's cube adds up what all have counted to find its places. A pass reads keys and entries twice and writes them once; the number of distinct keys
//! stays on the device.

mod forward;
mod plan;

use cubecl::prelude::*;

pub(crate) use self::forward::{One, Runs, Two, count_digits, first_of, heads_before, is_head, step_of};
use self::forward::{count_heads_kernel, count_kernel, scatter_kernel};
pub use self::plan::{HeadPlans, SortPlan, SortPlans, block_of};
use crate::launch::device::Device;
use crate::launch::tensor::{Tensor, arg, empty, u32_storage};
use crate::{Error, Result};

/// Entries by key.
pub(crate) struct Groups<R: Runtime> {
    /// u32 `[entries, 2]`: by ascending key, the key and the entry, those of one key in their own order.
    pub pairs: Tensor<R>,
    /// u32 `[runs + cubes]`: how many distinct keys begin before each run of `pairs` in its cube's entries, and in each cube's.
    pub heads: Tensor<R>,
    /// How they were sorted and counted.
    pub plans: SortPlans,
}

impl<R: Runtime> Clone for Groups<R> {
    fn clone(&self) -> Self {
        Self { pairs: self.pairs.clone(), heads: self.heads.clone(), plans: self.plans }
    }
}

/// Keys that are to be sorted, all below a limit.
pub(crate) struct Listed<R: Runtime> {
    /// u32 `[entries]`.
    pub keys: Tensor<R>,
    /// u32 `[cubes, bins]`: how many of each first digit each cube of the sort has, as [`count_digits`] counts them.
    pub counts: Tensor<R>,
    /// How they are sorted.
    pub plans: SortPlans,
}

impl<R: Runtime> Listed<R> {
    /// Room for `entries` keys below `limit` and for the counts of their first digits.
    ///
    /// # Errors
    /// More entries than a u32 counts, or than one binding holds.
    pub fn empty(client: &ComputeClient<R>, entries: usize, limit: usize) -> Result<Self> {
        let keys = empty(client, "keys", &[entries], u32_storage())?;
        Self::of(client, keys, limit)
    }

    fn of(client: &ComputeClient<R>, keys: Tensor<R>, limit: usize) -> Result<Self> {
        let entries = keys.shape()[0];
        // The last cube may count on beyond the last entry.
        if entries > i32::MAX as usize {
            let (value, limit) = (entries as u64, i32::MAX as u64);
            return Err(Error::Exceeds { what: "entries", value, limit_name: "the largest index", limit });
        }
        let plans = SortPlans::of(&Device::of(client), entries, limit);
        let counts = empty(client, "digit counts", &[plans.counts()], u32_storage())?;
        Ok(Self { keys, counts, plans })
    }

    /// Keys that are there already, their first digits counted by a launch of its own.
    ///
    /// # Errors
    /// As [`Listed::empty`].
    pub fn counted(client: &ComputeClient<R>, keys: Tensor<R>, limit: usize) -> Result<Self> {
        let listed = Self::of(client, keys, limit)?;
        let sort = Sort { client, device: Device::of(client), plans: listed.plans };
        sort.count(&listed.keys, 1, &listed.counts, 0)?;
        Ok(listed)
    }
}

/// Groups the entries of listed keys.
///
/// # Errors
/// More entries than one binding holds as pairs.
pub(crate) fn group<R: Runtime>(client: &ComputeClient<R>, listed: &Listed<R>) -> Result<Groups<R>> {
    let plans = listed.plans;
    let sort = Sort { client, device: Device::of(client), plans };
    let pairs = sort.by_digits(listed)?;
    let heads = sort.count_heads(&pairs)?;
    Ok(Groups { pairs, heads, plans })
}

struct Sort<'a, R: Runtime> {
    client: &'a ComputeClient<R>,
    device: Device,
    plans: SortPlans,
}

impl<R: Runtime> Sort<'_, R> {
    /// Sorts by one digit after the other, the lowest first.
    fn by_digits(&self, listed: &Listed<R>) -> Result<Tensor<R>> {
        let SortPlans { plan, passes, entries, .. } = self.plans;
        let mut sorted = listed.keys.clone();
        for pass in 0..passes {
            let (shift, width) = (pass * plan.bits, if pass == 0 { 1 } else { 2 });
            if pass > 0 {
                self.count(&sorted, width, &listed.counts, shift)?;
            }
            let pairs = empty(self.client, "sorted entries", &[entries, 2], u32_storage())?;
            self.scatter(&sorted, width, &listed.counts, &pairs, shift)?;
            sorted = pairs;
        }
        Ok(sorted)
    }

    /// Counts the digits of `keys`, of `width` words an entry.
    fn count(&self, keys: &Tensor<R>, width: usize, counts: &Tensor<R>, shift: u32) -> Result<()> {
        let SortPlans { plan, count, entries, chunk, .. } = self.plans;
        let (grid, cube_dim) = count.start(&self.device)?;
        // SAFETY: a unit reads its own entries, all below `entries`, and a cube writes its own counts.
        unsafe {
            count_kernel::launch_unchecked::<R>(
                self.client,
                grid,
                cube_dim,
                width,
                arg(keys, width),
                arg(counts, 1),
                entries as u32,
                chunk as u32,
                shift,
                count.cubes as u32,
                plan,
            );
        }
        Ok(())
    }

    /// Brings the entries of `keys` to their places in `pairs`.
    fn scatter(&self, keys: &Tensor<R>, width: usize, counts: &Tensor<R>, pairs: &Tensor<R>, shift: u32) -> Result<()> {
        let SortPlans { plan, scatter, entries, chunk, .. } = self.plans;
        let (grid, cube_dim) = scatter.start(&self.device)?;
        // SAFETY: a unit reads its own entries, all below `entries`, and writes each of them to a place of its own; the counts are those of
        // these keys, so that places are below `entries`.
        unsafe {
            scatter_kernel::launch_unchecked::<R>(
                self.client,
                grid,
                cube_dim,
                width,
                arg(keys, width),
                arg(counts, 1),
                arg(pairs, 2),
                entries as u32,
                chunk as u32,
                shift,
                scatter.cubes as u32,
                plan,
            );
        }
        Ok(())
    }

    /// Counts the distinct keys that begin before each run.
    fn count_heads(&self, pairs: &Tensor<R>) -> Result<Tensor<R>> {
        let SortPlans { entries, heads: HeadPlans { run, own, count, .. }, .. } = self.plans;
        let heads = empty(self.client, "heads", &[self.plans.heads.words()], u32_storage())?;
        let (grid, cube_dim) = count.start(&self.device)?;
        // SAFETY: a unit reads its own entries and the one before, and writes its own runs; a cube writes its own count.
        unsafe {
            count_heads_kernel::launch_unchecked::<R>(
                self.client,
                grid,
                cube_dim,
                arg(pairs, 2),
                arg(&heads, 1),
                entries as u32,
                run as u32,
                own as u32,
                count.cubes as u32,
                count.units,
            );
        }
        Ok(heads)
    }
}
