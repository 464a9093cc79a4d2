//! The passes of a stable radix sort, and the heads of its runs.
//!
//! A cube takes `units · chunk` entries, a plane, or a unit where planes can't exchange, a part of them one behind the other. `counts`
//! `[cubes, bins]` lists how many entries of each digit each cube has. Entries are pairs of a key and the entry that had it at first; on
//! the first pass they are keys alone.

use cubecl::prelude::*;

use super::plan::{FEW, SortPlan};

/// A key alone, before anything is moved.
pub(crate) type One = Const<1>;
/// A key and its entry.
pub(crate) type Two = Const<2>;

/// The unit's first entry; the others follow [`step_of`] apart.
#[cube]
pub(crate) fn first_of(chunk: u32, #[comptime] plan: SortPlan) -> u32 {
    let unit = CUBE_POS as u32 * comptime!(plan.units as u32) + UNIT_POS;
    let mut first = unit * chunk;
    if comptime!(plan.plane > 0) {
        let lane = UNIT_POS % comptime!(plan.plane as u32);
        first = (unit - lane) * chunk + lane;
    }
    first
}

/// Entries between two of a unit.
pub(crate) fn step_of(plan: SortPlan) -> u32 {
    plan.plane.max(1) as u32
}

/// The digit of a key.
#[cube]
fn digit_of(key: u32, shift: u32, #[comptime] plan: SortPlan) -> u32 {
    (key >> shift) % comptime!(1u32 << plan.bits)
}

/// Where the tallies have digit `bin` of plane, or unit, `tally`.
#[cube]
fn place_of(bin: usize, tally: usize, #[comptime] plan: SortPlan) -> usize {
    let mut place = bin * plan.units + tally;
    if comptime!(plan.plane > 0) {
        place = tally * comptime!(plan.bins()) + bin;
    }
    place
}

/// The unit's place among the tallies of a digit.
#[cube]
fn own_tally(#[comptime] plan: SortPlan) -> usize {
    UNIT_POS as usize / comptime!(plan.plane.max(1))
}

/// The lanes of the plane before this one, a bit each.
#[cube]
fn lanes_before(#[comptime] plan: SortPlan) -> u32 {
    (1u32 << (UNIT_POS % comptime!(plan.plane as u32))) - 1
}

/// The lanes of the plane whose entries have this one's digit, a bit each. All lanes come here together.
#[cube]
fn alike(digit: u32, held: bool, #[comptime] plan: SortPlan) -> u32 {
    let mut lanes = plane_ballot(held)[0];
    #[unroll]
    for bit in 0..plan.bits {
        let own = (digit >> bit) % 2;
        let ballot = plane_ballot(own == 1)[0];
        // Those whose bit is this one's: the ballot, or all others.
        lanes &= ballot ^ (own - 1);
    }
    lanes
}

/// The unit's entries from its `start`th on, those that it loads at once; zeros behind the last.
#[cube]
fn load<N: Size>(
    keys: &Array<Vector<u32, N>>,
    first: u32,
    start: u32,
    entries: u32,
    #[comptime] plan: SortPlan,
) -> Array<Vector<u32, N>> {
    let mut held = Array::<Vector<u32, N>>::new(plan.flight);
    #[unroll]
    for n in 0..plan.flight {
        let i = first + (start + n as u32) * comptime!(step_of(plan));
        held[n] = Vector::new(0u32);
        if i < entries {
            held[n] = keys[i as usize];
        }
    }
    held
}

/// How often each digit is among the entries of each plane, or unit. Ends with a barrier.
#[cube]
fn tally<N: Size>(
    keys: &Array<Vector<u32, N>>,
    entries: u32,
    chunk: u32,
    shift: u32,
    #[comptime] plan: SortPlan,
) -> SharedMemory<u32> {
    let mut tallies = SharedMemory::<u32>::new(comptime!(plan.bins() * plan.tallies()));
    let (first, own) = (first_of(chunk, plan), own_tally(plan));
    let lanes = comptime!(plan.plane.max(1));
    for bin in range_stepped(UNIT_POS as usize % lanes, comptime!(plan.bins()), lanes) {
        tallies[place_of(bin, own, plan)] = 0u32;
    }
    if comptime!(plan.plane > 0) {
        sync_plane();
    }
    for start in range_stepped(0u32, chunk, comptime!(plan.flight as u32)) {
        let held = load::<N>(keys, first, start, entries, plan);
        #[unroll]
        for n in 0..plan.flight {
            let here = first + (start + n as u32) * comptime!(step_of(plan)) < entries;
            let digit = digit_of(held[n][0], shift, plan);
            let at = place_of(digit as usize, own, plan);
            if comptime!(plan.plane > 0) {
                let same = alike(digit, here, plan);
                if here && same & lanes_before(plan) == 0 {
                    tallies[at] += same.count_ones();
                }
                sync_plane();
            } else if here {
                tallies[at] += 1u32;
            }
        }
    }
    sync_cube();
    tallies
}

/// Counts the digits of the cube's own entries: `counts[cube, digit]`.
#[cube]
pub(crate) fn count_digits<N: Size>(
    keys: &Array<Vector<u32, N>>,
    counts: &mut Array<u32>,
    entries: u32,
    chunk: u32,
    shift: u32,
    #[comptime] plan: SortPlan,
) {
    let tallies = tally::<N>(keys, entries, chunk, shift, plan);
    for bin in range_stepped(UNIT_POS as usize, comptime!(plan.bins()), plan.units) {
        let mut sum = 0u32;
        #[unroll(plan.tallies() <= FEW)]
        for own in 0..comptime!(plan.tallies()) {
            sum += tallies[place_of(bin, own, plan)];
        }
        counts[CUBE_POS * comptime!(plan.bins()) + bin] = sum;
    }
}

#[cube(launch_unchecked)]
pub(crate) fn count_kernel<N: Size>(
    keys: &Array<Vector<u32, N>>,
    counts: &mut Array<u32>,
    entries: u32,
    chunk: u32,
    shift: u32,
    cubes: u32,
    #[comptime] plan: SortPlan,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    count_digits::<N>(keys, counts, entries, chunk, shift, plan);
}

/// The sum of what the cube's units before this one have. All units come here together; ends with a barrier of the cube behind it.
#[cube]
pub(crate) fn cube_before(own: u32, #[comptime] units: usize) -> u32 {
    let few = comptime!(FEW.min(units));
    let mut sums = SharedMemory::<u32>::new(units);
    let mut groups = SharedMemory::<u32>::new(comptime!(units / few));
    let unit = UNIT_POS as usize;
    sums[unit] = own;
    sync_cube();
    if unit < comptime!(units / few) {
        let mut sum = 0u32;
        for other in 0..few {
            sum += sums[unit * few + other];
        }
        groups[unit] = sum;
    }
    sync_cube();
    let mut before = 0u32;
    for group in 0..unit / few {
        before += groups[group];
    }
    for other in unit / few * few..unit {
        before += sums[other];
    }
    before
}

/// Turns tallies into places: behind all smaller digits, the cubes before this one, and the planes, or units, before. Reads the counts of all
/// cubes once, several at a time. Ends with a barrier.
#[cube]
fn place_digits(places: &mut SharedMemory<u32>, counts: &Array<u32>, cubes: u32, #[comptime] plan: SortPlan) {
    let bins = comptime!(plan.bins());
    let lanes = comptime!(plan.lanes());
    let slices = comptime!(plan.slices());
    let (lane, slice) = (UNIT_POS as usize % lanes, UNIT_POS as usize / lanes);
    let mut befores = SharedMemory::<u32>::new(comptime!(slices * bins));
    let mut totals = SharedMemory::<u32>::new(comptime!(slices * bins));
    let ahead = comptime!(plan.counts_in_flight());
    for bin in range_stepped(lane, bins, lanes) {
        let mut before = 0u32;
        let mut total = 0u32;
        for start in range_stepped(slice, cubes as usize, comptime!(slices * ahead)) {
            let mut held = Array::<u32>::new(ahead);
            #[unroll]
            for n in 0..ahead {
                let cube = start + n * slices;
                held[n] = 0u32;
                if cube < cubes as usize {
                    held[n] = counts[cube * bins + bin];
                }
            }
            #[unroll]
            for n in 0..ahead {
                total += held[n];
                if start + n * slices < CUBE_POS {
                    before += held[n];
                }
            }
        }
        befores[slice * bins + bin] = before;
        totals[slice * bins + bin] = total;
    }
    sync_cube();
    let own = comptime!(bins / lanes);
    let mut sum = 0u32;
    if slice == 0 {
        for at in 0..comptime!(own * slices) {
            sum += totals[at / own * bins + lane * own + at % own];
        }
    }
    let mut smaller = cube_before(sum, plan.units);
    if slice == 0 {
        for bin in lane * own..lane * own + own {
            let mut place = smaller;
            for other in 0..slices {
                place += befores[other * bins + bin];
                smaller += totals[other * bins + bin];
            }
            for tally in 0..comptime!(plan.tallies()) {
                let at = place_of(bin, tally, plan);
                let count = places[at];
                places[at] = place;
                place += count;
            }
        }
    }
    sync_cube();
}

/// Brings every entry to its place by this digit, with its key before it.
#[cube(launch_unchecked)]
pub(crate) fn scatter_kernel<N: Size>(
    keys: &Array<Vector<u32, N>>,
    counts: &Array<u32>,
    pairs: &mut Array<Vector<u32, Two>>,
    entries: u32,
    chunk: u32,
    shift: u32,
    cubes: u32,
    #[comptime] plan: SortPlan,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let mut places = tally::<N>(keys, entries, chunk, shift, plan);
    place_digits(&mut places, counts, cubes, plan);
    let (first, own) = (first_of(chunk, plan), own_tally(plan));
    let moved = N::value();
    for start in range_stepped(0u32, chunk, comptime!(plan.flight as u32)) {
        let held = load::<N>(keys, first, start, entries, plan);
        #[unroll]
        for n in 0..plan.flight {
            let i = first + (start + n as u32) * comptime!(step_of(plan));
            let here = i < entries;
            let key = held[n][0];
            let digit = digit_of(key, shift, plan);
            let at = place_of(digit as usize, own, plan);
            let mut place = places[at];
            if comptime!(plan.plane > 0) {
                let same = alike(digit, here, plan);
                let before = same & lanes_before(plan);
                place += before.count_ones();
                sync_plane();
                if here && before == 0 {
                    places[at] = place + same.count_ones();
                }
                sync_plane();
            } else if here {
                places[at] = place + 1;
            }
            if here {
                let mut pair = Vector::<u32, Two>::new(key);
                // One write of a part in a branch: CubeCL's SPIR-V takes two of the same part for the whole vector.
                if comptime!(moved > 1) {
                    pair[1] = held[n][1];
                } else {
                    pair[1] = i;
                }
                pairs[place as usize] = pair;
            }
        }
    }
}

/// Whether an entry is the first of its key.
#[cube]
pub(crate) fn is_head(pairs: &Array<Vector<u32, Two>>, i: u32) -> bool {
    i == 0 || pairs[i as usize][0] != pairs[max(i, 1) as usize - 1][0]
}

/// How many of `first..last` are heads.
#[cube]
fn heads_of(pairs: &Array<Vector<u32, Two>>, first: u32, last: u32) -> u32 {
    let mut heads = 0u32;
    for i in first..last {
        heads += u32::cast_from(is_head(pairs, i));
    }
    heads
}

/// `heads[run]`: how many distinct keys begin before a run in the entries of its cube; behind them, `heads[runs + cube]`: how many in a
/// cube's. A unit has `own` runs of `run` entries.
#[cube(launch_unchecked)]
pub(crate) fn count_heads_kernel(
    pairs: &Array<Vector<u32, Two>>,
    heads: &mut Array<u32>,
    entries: u32,
    run: u32,
    own: u32,
    cubes: u32,
    #[comptime] units: usize,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let runs = entries.div_ceil(run);
    let first = min((CUBE_POS as u32 * comptime!(units as u32) + UNIT_POS) * own, runs);
    let last = min(first + own, runs);
    let all = heads_of(pairs, first * run, min(last * run, entries));
    let mut before = cube_before(all, units);
    if UNIT_POS == comptime!(units as u32 - 1) {
        heads[runs as usize + CUBE_POS] = before + all;
    }
    for at in first..last {
        heads[at as usize] = before;
        if at + 1 < last {
            before += heads_of(pairs, at * run, at * run + run);
        }
    }
}

/// Where the heads of a sort are counted: the runs of all entries, and those of a cube.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Runs {
    /// Entries of a run.
    pub run: u32,
    pub runs: u32,
    pub of_cube: u32,
}

#[cube]
impl Runs {
    /// Those of `entries` entries.
    pub fn new(entries: u32, run: u32, of_cube: u32) -> Runs {
        Runs { run, runs: entries.div_ceil(run), of_cube }
    }
}

/// How many distinct keys begin before run `own`. Lanes of a plane of `plane` come here together, none with an earlier run than the first one's;
/// 0: each by itself.
#[cube]
pub(crate) fn heads_before(heads: &Array<u32>, own: u32, of: Runs, #[comptime] plane: usize) -> u32 {
    let cube = own / of.of_cube;
    let mut first = 0u32;
    let mut before = 0u32;
    if comptime!(plane > 0) {
        first = plane_broadcast(cube, 0u32);
        for other in range_stepped(UNIT_POS % comptime!(plane as u32), first, comptime!(plane as u32)) {
            before += heads[(of.runs + other) as usize];
        }
        before = plane_sum(before);
    }
    for other in first..cube {
        before += heads[(of.runs + other) as usize];
    }
    before + heads[own as usize]
}
