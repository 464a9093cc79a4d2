//! Sorts pairs of a key and an item in shared memory: ascending by key, equal keys by item.
//!
//! A bitonic network in which every comparison puts the smaller pair first: what is missing up to a power of two stands for largest
//! pairs, which never move, so any number of pairs will do. The lanes of a row share out each of its `log²(count) / 2` steps of `count / 2`
//! comparisons, with a barrier after each where there are several; control flow is the same whatever the pairs are. A plane that sorts a few
//! pairs counts instead, for each of its own, how many come before it.

use cubecl::prelude::*;

use crate::launch::loops::strided;
use crate::select::Lane;

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
    if plane_sum(sum) != comptime!((count * (count - 1) / 2) as u32) {
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
