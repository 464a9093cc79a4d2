//! Sorts pairs of a key and an item in shared memory: ascending by key, equal keys by item.
//!
//! A bitonic network in which every comparison puts the smaller pair first: what is missing up to a power of two stands for largest
//! pairs, which never move, so any number of pairs will do. The lanes of a row share out each of its `log²(count) / 2` steps of `count / 2`
//! comparisons, with a barrier after each where there are several; control flow is the same whatever the pairs are.

use cubecl::prelude::*;

use crate::launch::loops::strided;
use crate::select::Lane;

/// Merges of sorted runs of 1, 2, 4, … pairs.
fn merges(count: usize) -> u32 {
    count.next_power_of_two().ilog2()
}

/// Loop iterations of a lane in [`sort_pairs`].
pub(crate) fn sort_loops(count: usize, lanes: usize) -> usize {
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
            if comptime!(at.lanes > 1) {
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
        if key_b < key_a || (key_b == key_a && item_b < item_a) {
            keys[a] = key_b;
            keys[b] = key_a;
            items[a] = item_b;
            items[b] = item_a;
        }
    }
}
