//! A radix select over 32-bit order keys that never sorts the row.
//!
//! At most eight passes over 4-bit digits find the order key of the
//! m-th best candidate and how many candidates equal to it are kept; one more pass writes the kept positions in ascending
//! order. A lane counts a pass's digits in registers, packed four to a word, and the lanes of a row add up what they counted.
//!
//! With several lanes the passes and barriers are the same whatever the scores are, so control flow stays uniform, as WebGPU asks. A lane
//! alone needs no barrier, and stops as soon as what is left is all kept.

use cubecl::prelude::{select as select_value, *};

use super::{Candidates, CandidatesExpand, FOUR, Lane, Scratch, SelectPlan, sum_before};
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

/// Words of the bins.
pub(super) fn bins(plan: &SelectPlan) -> usize {
    if plan.lanes == 1 || plan.plane > 0 { 1 } else { plan.rows * PASSES * BINS }
}

/// Loop iterations of a lane in [`select`], among candidates in `vectors` vectors.
pub(super) fn loops(vectors: usize, lanes: usize) -> usize {
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
pub(super) fn select<C: Candidates>(
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
