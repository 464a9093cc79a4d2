//! The best of candidates whose order keys a plane's lanes hold in registers, a few each: by bisection, as [`threshold`](super::threshold) does it.

use cubecl::prelude::{select as select_value, *};

use super::NOTHING;
use super::threshold::{BITS, Bound, CUTS, Search};
use crate::launch::planes::{smallest, total};

/// An order key, and how many have it or are better.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Reached {
    pub key: u32,
    pub held: u32,
}

/// An order key that at least `keep` of a plane's `count` candidates have or are better than, and no more than `most` if few are equal; the last of all
/// if they are no more than that. A lane has `slots` of them; what is none is [`NOTHING`].
#[cube]
pub(crate) fn reach(
    own: &Array<u32>,
    count: u32,
    #[comptime] slots: usize,
    #[comptime] keep: usize,
    #[comptime] most: usize,
    #[comptime] plane: usize,
) -> Reached {
    let cuts = comptime!(if slots * plane < 1 << BITS { CUTS } else { 1 });
    let mut least = NOTHING.runtime();
    let mut worst = NOTHING.runtime();
    #[unroll]
    for slot in 0..slots {
        least = min(least, own[slot]);
        worst = min(worst, select_value(own[slot] == NOTHING, NOTHING, NOTHING - own[slot]));
    }
    let (low, high) = (smallest(least, plane), NOTHING - smallest(worst, plane));
    let search = Search::new(low, high, count, comptime!(keep as u32), cuts);
    let mut halve = false;
    while search.goes_on(comptime!(most as u32)) {
        let middles = search.middles(halve, comptime!((keep + most + 1) as f32 / 2.0));
        halve = !halve;
        let mut within = 0u32;
        #[unroll]
        for slot in 0..slots {
            #[unroll]
            for cut in 0..cuts {
                within += select_value(own[slot] <= middles[cut], comptime!(1u32 << (BITS * cut as u32)), 0u32);
            }
        }
        search.narrow(&middles, total(within, plane));
    }
    Reached { key: search.high.read(), held: search.held.read() }
}

/// What holds exactly `keep` of a plane's candidates, which are so many at least: equal ones by position.
#[cube]
pub(crate) fn bound_of(
    own: &Array<u32>,
    positions: &Array<u32>,
    count: u32,
    #[comptime] slots: usize,
    #[comptime] keep: usize,
    #[comptime] plane: usize,
) -> Bound {
    let reached = reach(own, count, slots, keep, keep, plane);
    let mut last = NOTHING.runtime();
    if reached.held > comptime!(keep as u32) {
        let mut low = 0u32.runtime();
        while low < last {
            let middle = low + (last - low) / 2;
            let bound = Bound { key: reached.key, last: middle };
            let mut within = 0u32;
            #[unroll]
            for slot in 0..slots {
                within += u32::cast_from(bound.holds(own[slot], positions[slot]));
            }
            if total(within, plane) >= comptime!(keep as u32) {
                last = middle;
            } else {
                low = middle + 1;
            }
        }
    }
    Bound { key: reached.key, last }
}
