//! Exact top-m of a row of scores, in the defined order: larger score first, equal scores by smaller position, NaN never
//! before a number.
//!
//! A radix select over 32-bit order keys that never sorts the row. At most eight passes over 4-bit digits find the order key of the
//! m-th best candidate and how many candidates equal to it are kept; one more pass writes the kept positions in ascending
//! order. A lane counts a pass's digits in registers, packed four to a word, and the lanes of a row add up what they counted.
//!
//! Rows are worked on side by side: a cube of `rows · lanes` units gives each row `lanes` of them. With several lanes the passes and
//! barriers are the same whatever the scores are, so control flow stays uniform, as WebGPU asks. A lane alone needs no
//! barrier, and stops as soon as what is left is all kept.

#![expect(missing_docs, reason = "CubeCL's macros document nothing of what they make of a public function")]

pub(crate) mod sort;

use cubecl::prelude::{select as select_value, *};

use crate::launch::device::Device;
use crate::launch::loops::strided;

/// Bits of a digit.
const DIGIT: u32 = 4;
const BINS: usize = 1 << DIGIT;
const PASSES: usize = 32 / DIGIT as usize;
/// Counters of one byte in a word.
const PACKED: u32 = 4;
const WORDS: usize = BINS / PACKED as usize;
/// Candidates that a lane may count before a byte could overflow.
const BYTE: usize = 255;

/// Order keys that are read at a time.
pub(crate) type Four = Const<4>;
pub(crate) const FOUR: usize = 4;
/// The order key of no candidate at all, which fills up a row's last vector. A NaN's is one less.
pub(crate) const NOTHING: u32 = u32::MAX;
const NAN_KEY: u32 = u32::MAX - 1;

/// Maps a score to a key whose ascending order is the order of selection: larger scores have smaller keys, both zeros
/// have one key, every NaN has the last.
#[cube]
pub fn order_key(score: f32) -> u32 {
    let bits = u32::reinterpret(score);
    let magnitude = bits & 0x7fff_ffffu32;
    let mut key = 0x7fff_ffffu32 - magnitude;
    if bits > 0x8000_0000u32 {
        key = bits;
    }
    if magnitude > 0x7f80_0000u32 {
        key = NAN_KEY.runtime();
    }
    key
}

/// The score behind an order key: a zero without its sign, a NaN without its payload.
#[cube]
pub(crate) fn score_of(key: u32) -> f32 {
    let mut bits = 0x7fff_ffffu32 - key;
    if key > 0x7fff_ffffu32 {
        bits = key;
    }
    f32::reinterpret(bits)
}

/// A row of candidates, addressed by position, four at a time.
#[cube]
pub(crate) trait Candidates {
    /// The order keys of the candidates at `4 · vector` and after; [`NOTHING`] past the last. Must give the same bits each time.
    fn keys(&self, vector: usize) -> Vector<u32, Four>;
}

/// The order key of one candidate.
#[cube]
pub(crate) fn key_at<C: Candidates>(candidates: &C, position: usize) -> u32 {
    let keys = candidates.keys(position / FOUR);
    let mut key = keys[0];
    #[unroll]
    for n in 1..FOUR {
        if position % FOUR == n {
            key = keys[n];
        }
    }
    key
}

/// Candidates whose order keys lie in shared memory, from vector `first` on.
#[derive(CubeType)]
pub(crate) struct Stored {
    pub keys: SharedMemory<Vector<u32, Four>>,
    pub first: usize,
}

#[cube]
impl Candidates for Stored {
    fn keys(&self, vector: usize) -> Vector<u32, Four> {
        self.keys[self.first + vector]
    }
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

/// Lanes that share a row of `vectors` vectors: whole sectors in a few loads side by side.
pub(crate) fn row_lanes(device: &Device, vectors: usize) -> usize {
    if device.on_cpu { 1 } else { vectors.min(ROW_LANES).next_power_of_two() }
}

const ROW_LANES: usize = 8;

/// The sum of what a row's lanes have each, the same for all of them. With several lanes all units of the cube come here together, with
/// `partial` of a number for each.
#[cube]
pub(crate) fn lane_sum(own: f32, partial: &mut SharedMemory<f32>, at: Lane) -> f32 {
    let mut sum = own;
    if comptime!(at.lanes > 1) {
        partial[UNIT_POS as usize] = own;
        sync_cube();
        sum = 0.0;
        for lane in 0..at.lanes {
            sum += partial[at.row * at.lanes + lane];
        }
        sync_cube();
    }
    sum
}

/// Shared memory of [`select`], for rows of several lanes.
#[derive(CubeType)]
pub(crate) struct Scratch {
    /// `[rows, PASSES, BINS]`.
    bins: SharedMemory<Atomic<u32>>,
    /// `[rows, lanes]`: a lane's candidates before the threshold, and at it.
    better: SharedMemory<u32>,
    equal: SharedMemory<u32>,
}

/// Words of [`Scratch`]: bins, and twice one a lane.
fn scratch_words(rows: usize, lanes: usize) -> (usize, usize) {
    if lanes == 1 { (1, 1) } else { (rows * PASSES * BINS, rows * lanes) }
}

/// Bytes of [`Scratch`].
pub(crate) fn scratch_bytes(rows: usize, lanes: usize) -> usize {
    let (bins, sums) = scratch_words(rows, lanes);
    4 * (bins + 2 * sums)
}

#[cube]
impl Scratch {
    pub fn new(#[comptime] rows: usize, #[comptime] lanes: usize) -> Scratch {
        Scratch {
            bins: SharedMemory::new(comptime!(scratch_words(rows, lanes).0)),
            better: SharedMemory::new(comptime!(scratch_words(rows, lanes).1)),
            equal: SharedMemory::new(comptime!(scratch_words(rows, lanes).1)),
        }
    }
}

/// Loop iterations of a lane in [`select`], among candidates in `vectors` vectors.
pub(crate) fn select_loops(vectors: usize, lanes: usize) -> usize {
    let own = vectors.div_ceil(lanes);
    let count = strided(vectors, BYTE / FOUR * lanes) + own;
    // Of several lanes each clears its bins, counts twice before it gathers, and adds up what the lanes before it counted.
    let shared = if lanes > 1 { strided(PASSES * BINS, lanes) + own + 2 * lanes } else { 0 };
    1 + PASSES * (1 + count) + own + shared
}

/// Writes the positions of the best `keep` of each row's candidates, given in `vectors` vectors, to `kept[row · keep ..]`, ascending.
///
/// There are at least `keep` candidates. Uniform over the cube where rows have several lanes; ends with a barrier.
#[cube]
pub(crate) fn select<C: Candidates>(
    candidates: &C,
    vectors: usize,
    at: Lane,
    kept: &mut SharedMemory<u32>,
    scratch: &mut Scratch,
    #[comptime] keep: usize,
) {
    let shared = comptime!(at.lanes > 1);
    if shared {
        for bin in range_stepped(at.lane, comptime!(PASSES * BINS), at.lanes) {
            scratch.bins[at.row * comptime!(PASSES * BINS) + bin].store(0u32);
        }
        sync_cube();
    }
    let mut threshold = 0u32;
    let mut remaining = comptime!(keep as u32).runtime();
    let mut shift = 32u32;
    let mut settled = false;
    while shift > 0 && !settled {
        shift -= DIGIT;
        let mut counts = count_digits::<C>(candidates, vectors, at, threshold, shift);
        if shared {
            let bins = (at.row * PASSES + (shift / DIGIT) as usize) * BINS;
            add_up(&mut counts, scratch, bins);
        }
        let mut before = 0u32;
        let mut digit = 0u32;
        let mut rest = 0u32;
        let mut inside = 0u32;
        #[unroll]
        for bin in 0..BINS {
            let after = before + counts[bin];
            if before < remaining && remaining <= after {
                digit = comptime!(bin as u32).runtime();
                rest = remaining - before;
                inside = counts[bin];
            }
            before = after;
        }
        threshold = (threshold << DIGIT) | digit;
        remaining = rest;
        if !shared {
            settled = inside == rest;
        }
    }
    // Everything with a settled threshold's digits is kept: none of it comes after the largest such key.
    threshold = (threshold << shift) | ((1u32 << shift) - 1);
    gather::<C>(candidates, vectors, at, threshold, remaining, kept, scratch, keep);
}

/// How many of a lane's candidates have each next digit, of those whose higher digits are the threshold's.
#[cube]
fn count_digits<C: Candidates>(candidates: &C, vectors: usize, at: Lane, threshold: u32, shift: u32) -> Array<u32> {
    let mut counts = Array::<u32>::new(BINS);
    #[unroll]
    for bin in 0..BINS {
        counts[bin] = 0u32;
    }
    let block = comptime!(BYTE / FOUR * at.lanes);
    for start in range_stepped(0usize, vectors, block) {
        let mut words = Array::<u32>::new(WORDS);
        #[unroll]
        for word in 0..WORDS {
            words[word] = 0u32;
        }
        for vector in range_stepped(start + at.lane, min(start + block, vectors), at.lanes) {
            let keys = candidates.keys(vector);
            #[unroll]
            for n in 0..FOUR {
                let prefix = keys[n] >> shift;
                let digit = prefix % comptime!(1 << DIGIT);
                let one = u32::cast_from(prefix >> DIGIT == threshold) << (digit % PACKED * 8);
                #[unroll]
                for word in 0..WORDS {
                    words[word] += select_value(digit / PACKED == comptime!(word as u32), one, 0u32);
                }
            }
        }
        #[unroll]
        for bin in 0..BINS {
            counts[bin] += (words[bin / PACKED as usize] >> comptime!(8 * (bin as u32 % PACKED))) & 255;
        }
    }
    counts
}

/// Turns a lane's counts into its row's, through `bins`. Holds a barrier.
#[cube]
fn add_up(counts: &mut Array<u32>, scratch: &mut Scratch, bins: usize) {
    #[unroll]
    for bin in 0..BINS {
        scratch.bins[bins + bin].fetch_add(counts[bin]);
    }
    sync_cube();
    #[unroll]
    for bin in 0..BINS {
        counts[bin] = scratch.bins[bins + bin].load();
    }
}

/// Writes the positions of the candidates before the threshold and of the first `ties` at it, in ascending order.
#[cube]
fn gather<C: Candidates>(
    candidates: &C,
    vectors: usize,
    at: Lane,
    threshold: u32,
    ties: u32,
    kept: &mut SharedMemory<u32>,
    scratch: &mut Scratch,
    #[comptime] keep: usize,
) {
    let chunk = vectors.div_ceil(at.lanes);
    let first = at.lane * chunk;
    let last = min(first + chunk, vectors);
    let mut better_before = 0u32;
    let mut equal_before = 0u32;
    if comptime!(at.lanes > 1) {
        for vector in first..last {
            let keys = candidates.keys(vector);
            #[unroll]
            for n in 0..FOUR {
                better_before += u32::cast_from(keys[n] < threshold);
                equal_before += u32::cast_from(keys[n] == threshold);
            }
        }
        scratch.better[at.row * at.lanes + at.lane] = better_before;
        scratch.equal[at.row * at.lanes + at.lane] = equal_before;
        sync_cube();
        better_before = sum_before(&scratch.better, at);
        equal_before = sum_before(&scratch.equal, at);
    }
    for vector in first..last {
        let keys = candidates.keys(vector);
        #[unroll]
        for n in 0..FOUR {
            let tied = keys[n] == threshold;
            if keys[n] < threshold || (tied && equal_before < ties) {
                let place = better_before + min(equal_before, ties);
                kept[at.row * keep + place as usize] = (vector * FOUR + n) as u32;
            }
            better_before += u32::cast_from(keys[n] < threshold);
            equal_before += u32::cast_from(tied);
        }
    }
    sync_cube();
}

/// The sum of what the row's lanes before this one have. With several lanes all units of the cube come here together.
#[cube]
pub(crate) fn lanes_before(own: u32, scratch: &mut Scratch, at: Lane) -> u32 {
    let mut before = 0u32;
    if comptime!(at.lanes > 1) {
        scratch.better[at.row * at.lanes + at.lane] = own;
        sync_cube();
        before = sum_before(&scratch.better, at);
    }
    before
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
