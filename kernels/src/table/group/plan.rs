//! How entries are sorted and grouped, from their number, the largest key and a device alone.

use crate::launch::device::Device;
use crate::launch::loops::strided;
use crate::launch::plan::Launch;

/// What is fixed when the kernels that sort are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SortPlan {
    /// Bits of a digit.
    pub bits: u32,
    /// Units of a cube.
    pub units: usize,
    /// Units of a plane that ranks its entries together; 0 where each unit ranks its own.
    pub plane: usize,
    /// Entries that a unit loads before it looks at the first.
    pub flight: usize,
}

impl SortPlan {
    /// How keys below `limit` are sorted: by the fewest digits whose tallies fit the device, all of one size, and no larger than that many of
    /// them need.
    fn of(device: &Device, limit: usize) -> Self {
        let (plane, usual) = (device.exchange, device.units(usize::MAX));
        // Planes keep few tallies. Their cubes are as large as can be: of more cubes, each would have more counts to add up.
        let (bits, units, flight) = match (plane, device.on_cpu) {
            (0, false) => (4, usual, 4),
            (0, true) => (8, usual, 1),
            _ => (10, 1 << device.most_matrix_units().ilog2(), 2),
        };
        let mut plan = Self { bits, units, plane, flight };
        let crowded = |plan: &Self| 4 * plan.shared_words() > device.shared_bytes;
        while plan.units > usual && crowded(&plan) {
            plan.units /= 2;
        }
        while plan.bits > 4 && crowded(&plan) {
            plan.bits -= 1;
        }
        while plan.units > plane.max(1) && crowded(&plan) {
            plan.units /= 2;
        }
        Self { bits: key_bits(limit).div_ceil(key_bits(limit).div_ceil(plan.bits)), ..plan }
    }

    /// Digits that there are.
    pub(super) fn bins(&self) -> usize {
        1 << self.bits
    }

    /// Tallies of each digit: a plane's, or a unit's.
    pub(super) fn tallies(&self) -> usize {
        self.units / self.plane.max(1)
    }

    /// Units side by side on digits when the cubes' counts are added up.
    pub(super) fn lanes(&self) -> usize {
        self.bins().min(self.units)
    }

    /// Shares of the cubes whose counts are added up apart.
    pub(super) fn slices(&self) -> usize {
        self.units / self.lanes()
    }

    /// Counts that a unit loads at once when it adds up those of the cubes.
    pub(super) fn counts_in_flight(&self) -> usize {
        if self.flight == 1 { 1 } else { 8 }
    }

    /// Words of shared memory of a cube that brings entries to their places.
    fn shared_words(&self) -> usize {
        self.bins() * self.tallies() + 2 * self.slices() * self.bins() + before_words(self.units)
    }
}

/// Bits of the largest key below `limit`.
fn key_bits(limit: usize) -> u32 {
    (limit.max(2) - 1).ilog2() + 1
}

/// Units whose numbers are added up in one go by [`cube_before`](super::forward::cube_before).
pub(super) const FEW: usize = 16;

/// Words of shared memory of [`cube_before`](super::forward::cube_before).
fn before_words(units: usize) -> usize {
    units + units.div_ceil(FEW)
}

/// The launches that sort entries by their keys, digit by digit, and count the keys that begin. Whoever lists the keys counts the first digit's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SortPlans {
    /// What their kernels are compiled for.
    pub plan: SortPlan,
    /// Entries.
    pub entries: usize,
    /// Entries of a unit.
    pub chunk: usize,
    /// Passes over all entries, one a digit.
    pub passes: u32,
    /// Counts the digits of a pass.
    pub count: Launch,
    /// Brings a pass's entries to their places.
    pub scatter: Launch,
    /// The most distinct keys there can be: `min(entries, limit)`.
    pub capacity: usize,
    /// How distinct keys are counted.
    pub heads: HeadPlans,
}

impl SortPlans {
    /// Plans the sort of `entries` entries by keys below `limit`. Each launch is checked when it is made.
    pub fn of(device: &Device, entries: usize, limit: usize) -> Self {
        let plan = SortPlan::of(device, limit);
        // A cube adds up what all others have counted: no more of them than processors, each with a longer chunk then.
        let most = if device.on_cpu { CPU_CUBES } else { device.processors };
        let wanted = entries.div_ceil(most * plan.units).max(if device.on_cpu { 16 } else { 1 });
        let chunk = wanted.next_multiple_of(plan.flight).min(MOST_OF_UNIT);
        let cubes = entries.div_ceil(plan.units * chunk);
        let (bins, tallies, unrolled) = (plan.bins(), plan.tallies(), plan.flight);
        let launch = |kernel, words, loops| Launch { kernel, cubes, units: plan.units, shared_bytes: 4 * words, loops };
        let tally = strided(bins, plan.plane.max(1)) + chunk / unrolled;
        let own = strided(bins, plan.lanes());
        let counted = tally + strided(bins, plan.units) * (1 + tallies);
        let of_cubes = own * (1 + strided(cubes, plan.slices() * plan.counts_in_flight()));
        let places = of_cubes + 3 * FEW + own * (2 + 2 * plan.slices() + tallies);
        let capacity = entries.min(limit);
        Self {
            plan,
            entries,
            chunk,
            passes: key_bits(limit).div_ceil(plan.bits),
            count: launch("count_kernel", bins * tallies, counted),
            scatter: launch("scatter_kernel", plan.shared_words(), tally + places + chunk / unrolled),
            capacity,
            heads: HeadPlans::of(device, entries, block_of(entries, capacity)),
        }
    }

    /// Digit counts of a pass.
    pub fn counts(&self) -> usize {
        self.count.cubes.saturating_mul(self.plan.bins())
    }

    /// The launch of `kernel`, which lists the keys and counts their first digits.
    pub(crate) fn listing(&self, kernel: &'static str) -> Launch {
        Launch { kernel, loops: self.count.loops.saturating_add(self.chunk), ..self.count }
    }

    /// The launches once keys are listed, in their order; none for no entries.
    pub fn launches(&self) -> Vec<Launch> {
        if self.count.cubes == 0 {
            return Vec::new();
        }
        let more = [self.count, self.scatter].repeat(self.passes as usize - 1);
        [vec![self.scatter], more, vec![self.heads.count]].concat()
    }
}

/// How the distinct keys of sorted entries are counted: those that begin in each *run* of entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadPlans {
    /// Entries of a block, of which a unit sums some numbers: so many runs.
    pub block: usize,
    /// Entries of a run.
    pub run: usize,
    /// Runs of all entries.
    pub runs: usize,
    /// Runs of a unit.
    pub own: usize,
    /// Counts them.
    pub count: Launch,
}

impl HeadPlans {
    fn of(device: &Device, entries: usize, block: usize) -> Self {
        let (most, run) = match (device.exchange, device.on_cpu) {
            (_, true) => (CPU_CUBES, MIN_BLOCK),
            (0, false) => (FEW_CUBES, RUN),
            _ => (device.processors, RUN),
        };
        let (units, runs) = (device.units(usize::MAX), entries.div_ceil(run));
        let own = runs.div_ceil(units * most).max(1);
        let loops = (run + 1).saturating_mul(2).saturating_mul(own).saturating_add(3 * FEW);
        let (cubes, shared_bytes) = (runs.div_ceil(units * own), 4 * before_words(units));
        let count = Launch { kernel: "count_heads_kernel", cubes, units, shared_bytes, loops };
        Self { block, run, runs, own, count }
    }

    /// Blocks of all entries.
    pub fn blocks(&self) -> usize {
        self.runs.saturating_mul(self.run).div_ceil(self.block)
    }

    /// Runs of a cube that counts them.
    pub(crate) fn of_cube(&self) -> usize {
        self.count.units * self.own
    }

    /// Words that tell how many keys begin before each run among those of its cube, and how many in each cube.
    pub fn words(&self) -> usize {
        self.runs.saturating_add(self.count.cubes)
    }

    /// Loop iterations of a unit that asks how many keys begin before a run.
    pub(crate) fn loops(&self) -> usize {
        // Where a plane adds up, its lanes' sums, too.
        self.count.cubes + 8
    }
}

/// Entries of a block of `entries` that belong to at most `rows` rows: about those of a row, few enough that blocks keep a device busy, and that a unit
/// can go through as many numbers as there are blocks.
pub fn block_of(entries: usize, rows: usize) -> usize {
    let of_row = entries.div_ceil(rows.max(1)).min(MAX_BLOCK).next_power_of_two().max(MIN_BLOCK);
    (entries / MOST_BLOCKS).next_power_of_two().max(of_row)
}

const MIN_BLOCK: usize = 64;
const MAX_BLOCK: usize = 256;
const MOST_BLOCKS: usize = 1 << 15;
/// Entries of a run on a GPU.
const RUN: usize = 16;
/// Cubes whose numbers a unit adds up by itself.
const FEW_CUBES: usize = 32;
/// Cubes that share out a sort on planes of a CPU.
const CPU_CUBES: usize = 16;
/// Entries that a unit goes through at most.
const MOST_OF_UNIT: usize = 1 << 14;
