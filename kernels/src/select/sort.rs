//! Sorts pairs of a key and an item in shared memory: ascending by key, equal keys by item.
//!
//! A bitonic network in which every comparison puts the smaller pair first: what is missing up to a power of two stands for largest
//! pairs, which never move, so any number of pairs will do. The lanes of a row share out each of its `log²(count) / 2` steps of `count / 2`
//! comparisons, with a barrier after each where there are several; control flow is the same whatever the pairs are. A plane that sorts a few
//! pairs counts instead, for each of its own, how many come before it.

use cubecl::prelude::*;

use crate::launch::loops::strided;
use crate::launch::planes::total;
use crate::select::{Lane, SelectPlan};

/// Merges of sorted runs of 1, 2, 4, … pairs.
fn merges(count: usize) -> u32 {
    count.next_power_of_two().ilog2()
}

/// Pairs that a plane ranks by counting: more take fewer comparisons in the network.
const RANKED: usize = 128;

/// Whether the lanes of a row, a plane of `plane` units or none, rank `count` pairs by counting.
fn ranks(count: usize, lanes: usize, plane: usize) -> bool {
    lanes == plane && count <= RANKED
}

/// Loop iterations of a lane in [`sort_pairs`].
pub(super) fn loops(count: usize, lanes: usize, plane: usize) -> usize {
    if ranks(count, lanes, plane) {
        return 3 * strided(count, lanes) + 2 * count * (1 + strided(count, lanes));
    }
    let merges = merges(count) as usize;
    merges + merges * (merges + 1) / 2 * (1 + strided(count.next_power_of_two() / 2, lanes))
}

/// Sorts the `count` pairs of each row from `first` on. Begins after a barrier, and ends with one where rows have several lanes.
#[cube]
pub(crate) fn sort_pairs(
    keys: &mut SharedMemory<u32>,
    items: &mut SharedMemory<u32>,
    first: usize,
    at: Lane,
    #[comptime] count: usize,
) {
    if comptime!(ranks(count, at.lanes, at.plane)) {
        rank_pairs(keys, items, first, at, count);
    } else {
        merge_pairs(keys, items, first, at, count);
    }
}

/// Each lane takes some of the pairs to where as many others come before them. Keys alone are compared first: items count where keys are equal, and
/// then the ranks do not add up to those of `count` pairs.
#[cube]
fn rank_pairs(
    keys: &mut SharedMemory<u32>,
    items: &mut SharedMemory<u32>,
    first: usize,
    at: Lane,
    #[comptime] count: usize,
) {
    let share = comptime!(count.div_ceil(at.lanes));
    let mut own_keys = Array::<u32>::new(share);
    let mut own_items = Array::<u32>::new(share);
    let mut ranks = Array::<u32>::new(share);
    #[unroll]
    for i in 0..share {
        // Past the last pair the last again, which isn't written then.
        let pair = first + min(i * at.lanes + at.lane, count - 1);
        own_keys[i] = keys[pair];
        own_items[i] = items[pair];
        ranks[i] = 0u32;
    }
    for other in 0..count {
        let key = keys[first + other];
        #[unroll]
        for i in 0..share {
            ranks[i] += u32::cast_from(key < own_keys[i]);
        }
    }
    let mut sum = 0u32;
    #[unroll]
    for i in 0..share {
        if i * at.lanes + at.lane < count {
            sum += ranks[i];
        }
    }
    if total(sum, at.plane) != comptime!((count * (count - 1) / 2) as u32) {
        for other in 0..count {
            let (key, item) = (keys[first + other], items[first + other]);
            #[unroll]
            for i in 0..share {
                ranks[i] += u32::cast_from(key == own_keys[i] && item < own_items[i]);
            }
        }
    }
    sync_plane();
    #[unroll]
    for i in 0..share {
        if i * at.lanes + at.lane < count {
            keys[first + ranks[i] as usize] = own_keys[i];
            items[first + ranks[i] as usize] = own_items[i];
        }
    }
    sync_plane();
}

/// Words of a row's marks: a bit for each candidate, where a plane selects.
pub(super) fn marks(plan: &SelectPlan) -> usize {
    if plan.plane > 0 { plan.marked.div_ceil(BITS) } else { 0 }
}

/// Bits of a word.
const BITS: usize = 32;

/// Writes the `keep` positions from `first` on to `kept[row · keep ..]`, ascending: a plane marks each in a row of bits, counts, and reads the marks in
/// their order, each lane those of as many words.
#[cube]
pub(super) fn sort_positions(
    positions: &SharedMemory<u32>,
    bits: &SharedMemory<Atomic<u32>>,
    first: usize,
    kept: &mut SharedMemory<u32>,
    at: Lane,
    #[comptime] plan: SelectPlan,
) {
    let words = comptime!(marks(&plan));
    let row = at.row * words;
    for word in range_stepped(at.lane, words, at.lanes) {
        bits[row + word].store(0u32);
    }
    sync_plane();
    for i in range_stepped(at.lane, plan.keep, at.lanes) {
        let position = positions[first + i];
        // No two are the same: what is added is a bit that was not there.
        bits[row + position as usize / BITS].fetch_add(1u32 << (position % comptime!(BITS as u32)));
    }
    sync_plane();
    let share = comptime!(words.div_ceil(at.lanes));
    let start = min(at.lane * share, words);
    let end = min(start + share, words);
    let mut own = 0u32;
    for word in start..end {
        own += bits[row + word].load().count_ones();
    }
    let mut place = at.row * plan.keep + plane_exclusive_sum(own) as usize;
    for word in start..end {
        let mut left = bits[row + word].load();
        while left != 0 {
            kept[place] = word as u32 * comptime!(BITS as u32) + left.find_first_set() - 1;
            place += 1;
            left = left & (left - 1);
        }
    }
    sync_plane();
}

#[cube]
fn comes_before(key: u32, item: u32, other_key: u32, other_item: u32) -> bool {
    key < other_key || (key == other_key && item < other_item)
}

/// The network.
#[cube]
fn merge_pairs(
    keys: &mut SharedMemory<u32>,
    items: &mut SharedMemory<u32>,
    first: usize,
    at: Lane,
    #[comptime] count: usize,
) {
    let half = comptime!(count.next_power_of_two() / 2);
    for merge in 0..comptime!(merges(count)) {
        for step in 0..merge + 1 {
            let shift = merge - step;
            let gap = 1u32 << shift;
            for i in range_stepped(at.lane, half, at.lanes) {
                let within = i as u32 & (gap - 1);
                let block = (i as u32 >> shift) << (shift + 1);
                // The first step holds a run against the mirror image of the next.
                let mut other = block + within + gap;
                if step == 0 {
                    other = block + 2 * gap - 1 - within;
                }
                order_pair(keys, items, first, (block + within) as usize, other as usize, count);
            }
            if comptime!(at.lanes == at.plane) {
                sync_plane();
            } else if comptime!(at.lanes > 1) {
                sync_cube();
            }
        }
    }
}

/// Puts the smaller of pairs `low` and `high` first.
#[cube]
fn order_pair(
    keys: &mut SharedMemory<u32>,
    items: &mut SharedMemory<u32>,
    first: usize,
    low: usize,
    high: usize,
    #[comptime] count: usize,
) {
    if high < count {
        let (a, b) = (first + low, first + high);
        let (key_a, key_b, item_a, item_b) = (keys[a], keys[b], items[a], items[b]);
        if comes_before(key_b, item_b, key_a, item_a) {
            keys[a] = key_b;
            keys[b] = key_a;
            items[a] = item_b;
            items[b] = item_a;
        }
    }
}
