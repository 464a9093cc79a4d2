//! Exact top-m of a row of scores, in the defined order: larger score first, equal scores by smaller position, NaN never
//! before a number.
//!
//! A radix select over 32-bit order keys that never sorts the row. Eight passes over 4-bit digits find the order key of the
//! m-th best candidate and how many candidates equal to it are kept; one more pass writes the kept positions in ascending
//! order. A lane counts a pass's digits in registers, packed four to a word, and adds them to the row's histogram once.
//! The passes and barriers are the same whatever the scores are, so control flow stays uniform, as WebGPU asks.
//!
//! Rows are worked on side by side: a cube of `rows · lanes` units gives each row `lanes` of them.

use cubecl::prelude::{select as select_value, *};

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
pub(crate) fn order_key(score: f32) -> u32 {
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

/// Shared memory of [`select`].
#[derive(CubeType)]
pub(crate) struct Scratch {
    /// `[rows, PASSES, BINS]`.
    bins: SharedMemory<Atomic<u32>>,
    /// `[rows, lanes]`: a lane's candidates before the threshold, and at it.
    better: SharedMemory<u32>,
    equal: SharedMemory<u32>,
}

/// Bytes of [`Scratch`].
pub(crate) fn scratch_bytes(rows: usize, lanes: usize) -> usize {
    4 * rows * (PASSES * BINS + 2 * lanes)
}

#[cube]
impl Scratch {
    pub fn new(#[comptime] rows: usize, #[comptime] lanes: usize) -> Scratch {
        Scratch {
            bins: SharedMemory::new(comptime!(rows * PASSES * BINS)),
            better: SharedMemory::new(comptime!(rows * lanes)),
            equal: SharedMemory::new(comptime!(rows * lanes)),
        }
    }
}

/// Writes the positions of the best `keep` of each row's candidates, given in `vectors` vectors, to `kept[row · keep ..]`, ascending.
///
/// There are at least `keep` candidates. Uniform over the cube; ends with a barrier.
#[cube]
pub(crate) fn select<C: Candidates>(
    candidates: &C,
    vectors: usize,
    at: Lane,
    kept: &mut SharedMemory<u32>,
    scratch: &mut Scratch,
    #[comptime] keep: usize,
) {
    let histograms = at.row * comptime!(PASSES * BINS);
    for bin in range_stepped(at.lane, comptime!(PASSES * BINS), at.lanes) {
        scratch.bins[histograms + bin].store(0u32);
    }
    sync_cube();
    let mut threshold = 0u32;
    let mut remaining = comptime!(keep as u32).runtime();
    for pass in 0..PASSES {
        let bins = histograms + pass * BINS;
        let shift = (comptime!(32 - DIGIT as usize) - comptime!(DIGIT as usize) * pass) as u32;
        count_digits::<C>(candidates, vectors, at, threshold, shift, bins, scratch);
        sync_cube();
        let mut before = 0u32;
        let mut digit = 0u32;
        let mut rest = 0u32;
        for bin in 0..BINS {
            let after = before + scratch.bins[bins + bin].load();
            if before < remaining && remaining <= after {
                digit = bin as u32;
                rest = remaining - before;
            }
            before = after;
        }
        threshold = (threshold << DIGIT) | digit;
        remaining = rest;
    }
    gather::<C>(candidates, vectors, at, threshold, remaining, kept, scratch, keep);
}

/// Adds a lane's candidates whose higher digits are the threshold's to the histogram of their next digit.
#[cube]
fn count_digits<C: Candidates>(
    candidates: &C,
    vectors: usize,
    at: Lane,
    threshold: u32,
    shift: u32,
    bins: usize,
    scratch: &mut Scratch,
) {
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
        for word in 0..WORDS {
            #[unroll]
            for byte in 0..PACKED {
                let bin = comptime!(word * PACKED as usize + byte as usize);
                scratch.bins[bins + bin].fetch_add((words[word] >> comptime!(8 * byte)) & 255);
            }
        }
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
    let mut better = 0u32;
    let mut equal = 0u32;
    for vector in first..last {
        let keys = candidates.keys(vector);
        #[unroll]
        for n in 0..FOUR {
            better += u32::cast_from(keys[n] < threshold);
            equal += u32::cast_from(keys[n] == threshold);
        }
    }
    scratch.better[at.row * at.lanes + at.lane] = better;
    scratch.equal[at.row * at.lanes + at.lane] = equal;
    sync_cube();
    let mut better_before = sum_before(&scratch.better, at);
    let mut equal_before = sum_before(&scratch.equal, at);
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

/// Sum of what the row's lanes before this one have written.
#[cube]
fn sum_before(sums: &SharedMemory<u32>, at: Lane) -> u32 {
    let mut sum = 0u32;
    for lane in 0..at.lane {
        sum += sums[at.row * at.lanes + lane];
    }
    sum
}
