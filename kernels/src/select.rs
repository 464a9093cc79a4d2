//! Exact top-m of a row of scores, in the defined order: larger score first, equal scores by smaller position, NaN never
//! before a number.
//!
//! A radix select over 32-bit order keys that never sorts the row. Four passes of a 256-bin histogram find the order key
//! of the m-th best candidate and how many candidates equal to it are kept; one more pass writes the kept positions in
//! ascending order. Nothing is stored per candidate, so a candidate may be computed anew in each pass. The passes and
//! barriers are the same whatever the scores are, so control flow stays uniform, as WebGPU asks.
//!
//! Rows are worked on side by side: a cube of `rows · lanes` units gives each row `lanes` of them.

use cubecl::prelude::*;

const BINS: usize = 256;
/// Lanes that walk a histogram; each walks `BINS / SCANNERS` bins or more.
const SCANNERS: usize = 16;

/// Maps a score to a key whose ascending order is the order of selection: larger scores have smaller keys, both zeros
/// have one key, every NaN has the last.
#[cube]
pub(crate) fn order_key(score: f32) -> u32 {
    let bits = u32::reinterpret(score);
    let magnitude = bits & 0x7fff_ffffu32;
    let mut key = 0x7fff_ffffu32 - magnitude;
    if bits > 0x8000_0000u32 {
        key = bits;
    }
    if magnitude > 0x7f80_0000u32 {
        key = u32::MAX;
    }
    key
}

/// A row of candidates, addressed by position.
#[cube]
pub(crate) trait Candidates {
    /// The order key of the candidate at `position`. Must give the same bits each time.
    fn key(&self, position: usize) -> u32;
}

/// Where a unit stands: its row in the cube and its place among the row's lanes.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Lane {
    pub row: usize,
    pub lane: usize,
    #[cube(comptime)]
    pub lanes: usize,
}

/// The unit's row and lane in a cube of `units` that gives `units / rows` lanes to each row.
#[cube]
pub(crate) fn lane_of(#[comptime] rows: usize, #[comptime] units: usize) -> Lane {
    let lanes = comptime!(units / rows);
    Lane { row: UNIT_POS as usize / lanes, lane: UNIT_POS as usize % lanes, lanes }
}

/// Shared memory of [`select`].
#[derive(CubeType)]
pub(crate) struct Scratch {
    bins: SharedMemory<Atomic<u32>>,
    sums: SharedMemory<u32>,
    ties: SharedMemory<u32>,
    found: SharedMemory<u32>,
}

/// Bytes of [`Scratch`].
pub(crate) fn scratch_bytes(rows: usize, lanes: usize) -> usize {
    4 * rows * (BINS + 2 * lanes + 2)
}

#[cube]
impl Scratch {
    pub fn new(#[comptime] rows: usize, #[comptime] lanes: usize) -> Scratch {
        Scratch {
            bins: SharedMemory::new(comptime!(rows * BINS)),
            sums: SharedMemory::new(comptime!(rows * lanes)),
            ties: SharedMemory::new(comptime!(rows * lanes)),
            found: SharedMemory::new(comptime!(rows * 2)),
        }
    }
}

/// Writes the positions of the best `keep` of `count` candidates of each row to `kept[row · keep ..]`, ascending.
///
/// `count` is at least `keep`. Uniform over the cube; ends with a barrier.
#[cube]
pub(crate) fn select<C: Candidates>(
    candidates: &C,
    count: usize,
    at: Lane,
    kept: &mut SharedMemory<u32>,
    scratch: &mut Scratch,
    #[comptime] keep: usize,
) {
    let mut threshold = 0u32;
    let mut remaining = comptime!(keep as u32).runtime();
    for pass in 0..4u32 {
        let shift = 24 - 8 * pass;
        histogram::<C>(candidates, count, at, threshold, scratch, shift);
        find_bin(at, remaining, scratch);
        threshold = (threshold << 8) | scratch.found[at.row * 2];
        remaining = scratch.found[at.row * 2 + 1];
    }
    gather::<C>(candidates, count, at, threshold, remaining, kept, scratch, keep);
}

/// Counts, by their next 8 bits, the candidates whose higher bits are the threshold's.
#[cube]
fn histogram<C: Candidates>(candidates: &C, count: usize, at: Lane, threshold: u32, scratch: &mut Scratch, shift: u32) {
    let lanes = at.lanes;
    let bins = at.row * BINS;
    for bin in range_stepped(at.lane, BINS, lanes) {
        scratch.bins[bins + bin].store(0u32);
    }
    sync_cube();
    for position in range_stepped(at.lane, count, lanes) {
        let key = candidates.key(position);
        let prefix = key >> shift;
        if prefix >> 8 == threshold {
            scratch.bins[bins + (prefix & 255) as usize].fetch_add(1u32);
        }
    }
    sync_cube();
}

/// Finds the bin that holds the `remaining`-th candidate and what remains of it there.
#[cube]
fn find_bin(at: Lane, remaining: u32, scratch: &mut Scratch) {
    let scanners = comptime!(if at.lanes < SCANNERS { at.lanes } else { SCANNERS });
    let run = comptime!(BINS / scanners);
    let bins = at.row * BINS + at.lane * run;
    if at.lane < scanners {
        let mut sum = 0u32;
        for bin in 0..run {
            sum += scratch.bins[bins + bin].load();
        }
        scratch.sums[at.row * at.lanes + at.lane] = sum;
    }
    sync_cube();
    if at.lane < scanners {
        let mut before = sum_before(&scratch.sums, at);
        for bin in 0..run {
            let after = before + scratch.bins[bins + bin].load();
            if before < remaining && remaining <= after {
                scratch.found[at.row * 2] = (at.lane * run + bin) as u32;
                scratch.found[at.row * 2 + 1] = remaining - before;
            }
            before = after;
        }
    }
    sync_cube();
}

/// Writes the positions of the candidates before the threshold and of the first `ties` at it, in ascending order.
#[cube]
fn gather<C: Candidates>(
    candidates: &C,
    count: usize,
    at: Lane,
    threshold: u32,
    ties: u32,
    kept: &mut SharedMemory<u32>,
    scratch: &mut Scratch,
    #[comptime] keep: usize,
) {
    let chunk = count.div_ceil(at.lanes);
    let first = at.lane * chunk;
    let last = min(first + chunk, count);
    let mut better = 0u32;
    let mut equal = 0u32;
    for position in first..last {
        let key = candidates.key(position);
        better += u32::cast_from(key < threshold);
        equal += u32::cast_from(key == threshold);
    }
    scratch.sums[at.row * at.lanes + at.lane] = better;
    scratch.ties[at.row * at.lanes + at.lane] = equal;
    sync_cube();
    let mut better_before = sum_before(&scratch.sums, at);
    let mut equal_before = sum_before(&scratch.ties, at);
    for position in first..last {
        let key = candidates.key(position);
        let tied = key == threshold;
        if key < threshold || (tied && equal_before < ties) {
            kept[at.row * keep + (better_before + min(equal_before, ties)) as usize] = position as u32;
        }
        better_before += u32::cast_from(key < threshold);
        equal_before += u32::cast_from(tied);
    }
    sync_cube();
}

/// Sum of what the row's lanes before this one have written.
#[cube]
fn sum_before(sums: &SharedMemory<u32>, at: Lane) -> u32 {
    let mut sum = 0u32;
    for lane in 0..at.lane {
        sum += sums[at.row * at.lanes + lane];
    }
    sum
}
