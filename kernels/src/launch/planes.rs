//! Sums and extremes over a plane, by exchanges between its units: unrolled, where CubeCL's own are loops.

use cubecl::prelude::*;

/// What the units of a plane of `units` have together, for all of them.
#[cube]
pub(crate) fn total(own: u32, #[comptime] units: usize) -> u32 {
    let mut sum = own;
    #[unroll]
    for step in 0..comptime!(units.ilog2()) {
        sum += plane_shuffle_xor(sum, comptime!(1u32 << step));
    }
    sum
}

/// The smallest of what `units` units of a plane have, for all of them.
#[cube]
pub(crate) fn smallest(own: u32, #[comptime] units: usize) -> u32 {
    let mut least = own;
    #[unroll]
    for step in 0..comptime!(units.ilog2()) {
        least = min(least, plane_shuffle_xor(least, comptime!(1u32 << step)));
    }
    least
}

/// The sum over `units` neighbours in a plane, a power of two, in one order for all of them.
#[cube]
pub(crate) fn sum_of(own: f32, #[comptime] units: usize) -> f32 {
    let mut sum = own;
    #[unroll]
    for step in 0..comptime!(units.ilog2()) {
        sum += plane_shuffle_xor(sum, comptime!(1u32 << step));
    }
    sum
}
