//! What the interpreter itself does, instruction by instruction: moves, memory, atomic operations, control flow, barriers, and what lanes
//! do together; and that no text makes it panic. Each against the manual's definition.

mod atomics;
mod barriers;
mod control;
mod fuzz;
mod memory;
mod moves;
mod predicates;
mod shuffles;
mod stops;
mod texts;
mod together;
mod variables;

use crate::testing::{WARP, longs};

/// A body, and what it leaves in `%rd0` of each lane.
type Row<'a> = (&'a str, &'a dyn Fn(u64) -> u64);

/// Checks rows in one warp each.
fn check(rows: &[Row<'_>]) {
    for (body, expected) in rows {
        let found = longs(WARP, body);
        let wanted: Vec<u64> = (0..32).map(expected).collect();
        assert_eq!(found, wanted, "{body}\nfound {found:x?}\nnot   {wanted:x?}");
    }
}

/// The lane's number in `%r1` and `%rd1`, and 64 bits of the lane that are all different in `%rd2`: [`pattern`].
const LANE: &str = "mov.u32 %r1, %laneid;\ncvt.u64.u32 %rd1, %r1;\nmul.lo.u64 %rd2, %rd1, 0x0123456789abcdef;\n\
    xor.b64 %rd2, %rd2, 0x8091a2b3c4d5e6f7;\n";

/// See [`LANE`].
fn pattern(lane: u64) -> u64 {
    lane.wrapping_mul(0x0123_4567_89ab_cdef) ^ 0x8091_a2b3_c4d5_e6f7
}
