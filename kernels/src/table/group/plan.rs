//! How entries are sorted and grouped, from their number, the largest key and a device alone.

use crate::launch::device::Device;
use crate::launch::loops::strided;
use crate::launch::plan::{Launch, Planned};

/// What is fixed when the kernels that walk along the entries are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SortPlan {
    /// Bits of a digit.
    pub bits: u32,
    /// Units of a cube.
    pub units: usize,
    /// Entries of a unit.
    pub chunk: usize,
}

impl SortPlan {
    /// How keys below `limit` are sorted. Few units, as planes of a CPU have them, take long chunks and large digits: fewer passes. All
    /// digits are of one size, and no larger than that many of them need.
    fn of(device: &Device, limit: usize) -> Self {
        let (most, chunk) = if device.on_cpu { (8, 256) } else { (4, 16) };
        let bits = key_bits(limit).div_ceil(key_bits(limit).div_ceil(most));
        Self { bits, units: device.units(usize::MAX), chunk }
    }

    /// Digits that there are.
    pub(super) fn bins(&self) -> usize {
        1 << self.bits
    }
}

/// Bits of the largest key below `limit`.
fn key_bits(limit: usize) -> u32 {
    (limit.max(2) - 1).ilog2() + 1
}

/// The launches that sort entries by their keys, digit by digit, and find where each key begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SortPlans {
    /// What their kernels are compiled for.
    pub plan: SortPlan,
    /// Passes over all entries, one a digit.
    pub passes: u32,
    /// Counts the digits of a pass.
    pub count: Launch,
    /// Brings a pass's entries to their places.
    pub scatter: Launch,
    /// Counts the keys that begin in a cube's entries.
    pub count_heads: Launch,
    /// Writes where each key begins.
    pub mark_heads: Launch,
}

impl SortPlans {
    /// Plans the sort of `entries` entries by keys below `limit`. Each launch is checked when it is made.
    pub fn of(device: &Device, entries: usize, limit: usize) -> Self {
        let plan = SortPlan::of(device, limit);
        let SortPlan { units, chunk, .. } = plan;
        let (cubes, bins) = (entries.div_ceil(units * chunk), plan.bins());
        let launch = |kernel, words, loops| Launch { kernel, cubes, units, shared_bytes: 4 * words, loops };
        let (counted, headed) = (bins + chunk + strided(bins, units) * (1 + units), chunk + units);
        Self {
            plan,
            passes: key_bits(limit).div_ceil(plan.bits),
            count: launch("count_kernel", bins * units, counted),
            scatter: launch("scatter_kernel", bins * units, counted + chunk),
            count_heads: launch("count_heads_kernel", units, headed),
            mark_heads: launch("mark_heads_kernel", units, headed + chunk),
        }
    }

    /// Digit counts of a pass.
    pub fn counts(&self) -> usize {
        self.count.cubes.saturating_mul(self.plan.bins())
    }

    /// The launches in their order; none for no entries.
    pub fn launches(&self) -> Vec<Launch> {
        if self.count.cubes == 0 {
            return Vec::new();
        }
        let scans = |size| ScanPlan::launches(self.plan.units, size);
        let pass = [vec![self.count], scans(self.counts()), vec![self.scatter]].concat();
        let heads = [vec![self.count_heads], scans(self.count.cubes), vec![self.mark_heads]].concat();
        [pass.repeat(self.passes as usize), heads].concat()
    }
}

/// How counts are scanned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ScanPlan {
    pub units: usize,
    /// Whether one cube scans all of them.
    pub whole: bool,
}

impl ScanPlan {
    /// The scan of `size` counts: by one cube where its units have no more than [`SHARE`] counts each.
    pub fn of(units: usize, size: usize) -> Planned<Self> {
        let cubes = size.div_ceil(units * SHARE).max(1);
        let loops = 2 * SHARE + units;
        let launch = Launch { kernel: "scan_kernel", cubes, units, shared_bytes: 4 * units, loops };
        Planned { plan: Self { units, whole: cubes == 1 }, launch }
    }

    /// The launch that adds up each cube's counts first, where there are several cubes.
    pub fn adding(scan: Launch) -> Launch {
        Launch { kernel: "sum_counts_kernel", ..scan }
    }

    /// The launches of a scan in their order.
    fn launches(units: usize, size: usize) -> Vec<Launch> {
        let Planned { plan, launch } = Self::of(units, size);
        match plan.whole {
            true => vec![launch],
            false => [vec![Self::adding(launch)], Self::launches(units, launch.cubes), vec![launch]].concat(),
        }
    }
}

/// Counts of a unit: each level of a scan is so many times, and those of a cube's other units, shorter than the one before.
pub(super) const SHARE: usize = 256;
