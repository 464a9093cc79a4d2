//! A register of a warp: one number for each of its 32 lanes.

/// Lanes of a warp.
pub const WARP: usize = 32;

/// A register of up to 32 bits; a number of 16 bits lies in the lower half, the upper half is zero.
pub type Word = [u32; WARP];
/// A register of 64 bits.
pub type Long = [u64; WARP];
/// A predicate, or a choice of lanes: bit `i` is lane `i`.
pub type Mask = u32;

/// All lanes.
pub const ALL: Mask = u32::MAX;

/// The lanes of a mask, in ascending order.
pub fn lanes(mask: Mask) -> impl Iterator<Item = usize> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        let lane = rest.trailing_zeros();
        (lane < WARP as u32).then(|| {
            rest &= rest - 1;
            lane as usize
        })
    })
}

/// The lanes in which something holds.
pub fn those(holds: impl Fn(usize) -> bool) -> Mask {
    (0..WARP).fold(0, |those, lane| those | u32::from(holds(lane)) << lane)
}

/// Copies the lanes of `mask`.
pub fn blend<T: Copy>(target: &mut [T; WARP], source: &[T; WARP], mask: Mask) {
    if mask == ALL {
        *target = *source;
        return;
    }
    for lane in 0..WARP {
        target[lane] = if mask >> lane & 1 == 1 { source[lane] } else { target[lane] };
    }
}
