//! The passes of a stable radix sort, and the heads of its runs.
//!
//! A cube takes `units · chunk` entries, each unit a chunk of its own. `counts` `[bins, cubes]` lists how many entries of each digit
//! each cube has; once scanned, where they go.

use cubecl::prelude::*;

use super::plan::{SHARE, ScanPlan, SortPlan};

/// Units of a cube whose tallies of a digit are added up in one go.
const FEW: usize = 8;

/// The entries of a unit: `first..last`.
#[derive(CubeType, Clone, Copy)]
struct Chunk {
    first: usize,
    last: usize,
}

#[cube]
fn own_chunk(entries: u32, #[comptime] plan: SortPlan) -> Chunk {
    let first = (CUBE_POS * plan.units + UNIT_POS as usize) * plan.chunk;
    Chunk { first: min(first, entries as usize), last: min(first + plan.chunk, entries as usize) }
}

/// The digit of a key.
#[cube]
fn digit_of(key: u32, shift: u32, #[comptime] plan: SortPlan) -> usize {
    ((key >> shift) % comptime!(1u32 << plan.bits)) as usize
}

/// How often each digit is among the unit's own entries: `[bins, units]`. Ends with a barrier.
#[cube]
fn tally(keys: &Array<u32>, own: Chunk, shift: u32, #[comptime] plan: SortPlan) -> SharedMemory<u32> {
    let bins = comptime!(1usize << plan.bits);
    let mut tallies = SharedMemory::<u32>::new(comptime!(bins * plan.units));
    for bin in 0..bins {
        tallies[bin * plan.units + UNIT_POS as usize] = 0u32;
    }
    for i in own.first..own.last {
        let digit = digit_of(keys[i], shift, plan);
        tallies[digit * plan.units + UNIT_POS as usize] += 1u32;
    }
    sync_cube();
    tallies
}

/// `counts[digit, cube]`: a cube's entries of each digit.
#[cube(launch_unchecked)]
pub(crate) fn count_kernel(
    keys: &Array<u32>,
    counts: &mut Array<u32>,
    entries: u32,
    shift: u32,
    cubes: u32,
    #[comptime] plan: SortPlan,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let tallies = tally(keys, own_chunk(entries, plan), shift, plan);
    for bin in range_stepped(UNIT_POS as usize, comptime!(1usize << plan.bits), plan.units) {
        let mut sum = 0u32;
        #[unroll(plan.units <= FEW)]
        for unit in 0..plan.units {
            sum += tallies[bin * plan.units + unit];
        }
        counts[bin * cubes as usize + CUBE_POS] = sum;
    }
}

/// The counts of a unit.
#[cube]
fn own_share(size: u32, #[comptime] plan: ScanPlan) -> Chunk {
    let mut share = SHARE.runtime();
    if comptime!(plan.whole) {
        share = size.div_ceil(plan.units as u32) as usize;
    }
    let first = min((CUBE_POS * plan.units + UNIT_POS as usize) * share, size as usize);
    Chunk { first, last: min(first + share, size as usize) }
}

/// What each unit's own counts add up to. Ends with a barrier.
#[cube]
fn own_sum(counts: &Array<u32>, own: Chunk, #[comptime] units: usize) -> SharedMemory<u32> {
    let mut sums = SharedMemory::<u32>::new(units);
    let mut sum = 0u32;
    for i in own.first..own.last {
        sum += counts[i];
    }
    sums[UNIT_POS as usize] = sum;
    sync_cube();
    sums
}

/// `sums[cube]`: the sum of a cube's counts.
#[cube(launch_unchecked)]
pub(crate) fn sum_counts_kernel(
    counts: &Array<u32>,
    sums: &mut Array<u32>,
    size: u32,
    cubes: u32,
    #[comptime] plan: ScanPlan,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let of_units = own_sum(counts, own_share(size, plan), plan.units);
    if UNIT_POS == comptime!(plan.units as u32 - 1) {
        sums[CUBE_POS] = before_unit(&of_units) + of_units[UNIT_POS as usize];
    }
}

/// Replaces each of `size` counts by the sum of those before it. One cube leaves the sum of all in `sums[0]`; of several each begins at
/// `sums[cube]`.
#[cube(launch_unchecked)]
#[allow(clippy::collapsible_if, reason = "the outer one is decided when the kernel is compiled")]
pub(crate) fn scan_kernel(
    counts: &mut Array<u32>,
    sums: &mut Array<u32>,
    size: u32,
    cubes: u32,
    #[comptime] plan: ScanPlan,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let own = own_share(size, plan);
    let of_units = own_sum(counts, own, plan.units);
    let mut before = before_unit(&of_units);
    if comptime!(!plan.whole) {
        before += sums[CUBE_POS];
    }
    for i in own.first..own.last {
        let count = counts[i];
        counts[i] = before;
        before += count;
    }
    if comptime!(plan.whole) {
        if UNIT_POS == comptime!(plan.units as u32 - 1) {
            sums[0] = before;
        }
    }
}

/// The sum of what the units before this one have written.
#[cube]
fn before_unit(sums: &SharedMemory<u32>) -> u32 {
    let mut before = 0u32;
    for unit in 0..UNIT_POS as usize {
        before += sums[unit];
    }
    before
}

/// Brings every entry to its place by this digit. On the first pass an entry is its own position.
#[cube(launch_unchecked)]
pub(crate) fn scatter_kernel(
    keys: &Array<u32>,
    order: &Array<u32>,
    counts: &Array<u32>,
    sorted: &mut Array<u32>,
    placed: &mut Array<u32>,
    entries: u32,
    shift: u32,
    cubes: u32,
    #[comptime] first_pass: bool,
    #[comptime] plan: SortPlan,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let own = own_chunk(entries, plan);
    let mut places = tally(keys, own, shift, plan);
    for bin in range_stepped(UNIT_POS as usize, comptime!(1usize << plan.bits), plan.units) {
        let mut place = counts[bin * cubes as usize + CUBE_POS];
        #[unroll(plan.units <= FEW)]
        for unit in 0..plan.units {
            let count = places[bin * plan.units + unit];
            places[bin * plan.units + unit] = place;
            place += count;
        }
    }
    sync_cube();
    for i in own.first..own.last {
        let key = keys[i];
        let at = digit_of(key, shift, plan) * plan.units + UNIT_POS as usize;
        let place = places[at] as usize;
        places[at] += 1u32;
        sorted[place] = key;
        if first_pass {
            placed[place] = i as u32;
        } else {
            placed[place] = order[i];
        }
    }
}

/// Whether a sorted key is the first of its kind.
#[cube]
fn is_head(sorted: &Array<u32>, i: usize) -> bool {
    i == 0 || sorted[i] != sorted[max(i, 1) - 1]
}

/// How many of the unit's own entries are heads.
#[cube]
fn own_heads(sorted: &Array<u32>, own: Chunk) -> u32 {
    let mut heads = 0u32;
    for i in own.first..own.last {
        heads += u32::cast_from(is_head(sorted, i));
    }
    heads
}

/// `counts[cube]`: how many distinct keys start in a cube's entries.
#[cube(launch_unchecked)]
pub(crate) fn count_heads_kernel(
    sorted: &Array<u32>,
    counts: &mut Array<u32>,
    entries: u32,
    cubes: u32,
    #[comptime] plan: SortPlan,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let mut sums = SharedMemory::<u32>::new(plan.units);
    sums[UNIT_POS as usize] = own_heads(sorted, own_chunk(entries, plan));
    sync_cube();
    if UNIT_POS == comptime!(plan.units as u32 - 1) {
        counts[CUBE_POS] = before_unit(&sums) + sums[UNIT_POS as usize];
    }
}

/// Writes the distinct keys, where each one's entries start, and which of them each block of entries begins in; the last entry's unit
/// writes the ends.
#[cube(launch_unchecked)]
pub(crate) fn mark_heads_kernel(
    sorted: &Array<u32>,
    counts: &Array<u32>,
    keys: &mut Array<u32>,
    starts: &mut Array<u32>,
    blocks: &mut Array<u32>,
    block: u32,
    entries: u32,
    cubes: u32,
    #[comptime] plan: SortPlan,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let own = own_chunk(entries, plan);
    let mut sums = SharedMemory::<u32>::new(plan.units);
    sums[UNIT_POS as usize] = own_heads(sorted, own);
    sync_cube();
    let mut place = counts[CUBE_POS] + before_unit(&sums);
    for i in own.first..own.last {
        if is_head(sorted, i) {
            keys[place as usize] = sorted[i];
            starts[place as usize] = i as u32;
            place += 1u32;
        }
        if i % block as usize == 0 {
            blocks[i / block as usize] = place - 1;
        }
        if i + 1 == entries as usize {
            starts[place as usize] = entries;
            blocks[entries.div_ceil(block) as usize] = place - 1;
        }
    }
}
