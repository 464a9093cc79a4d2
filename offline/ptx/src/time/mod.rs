//! How long a multiprocessor takes for the blocks that it is given: a replay of their [traces](crate::count::Trace), in order.
//!
//! Four quarters each issue from their own warps, one machine instruction a cycle. A warp's instructions go in the order that a compiler
//! gives them ([`schedule`]); each waits for the registers that it reads (a scoreboard), for its pipe, and, where registers for more
//! are lacking, for loads that are under way. What the quarters share takes its turns: the unit of shared memory and first-level lines,
//! the way to the second-level cache, and that to device memory, of which the multiprocessor has its part. Blocks that don't fit
//! begin as others end.

mod machine;
mod multiprocessor;
pub mod schedule;
#[cfg(test)]
mod tests;
mod unit;
mod warp;

pub use machine::{Cost, Machine, PIPES};
pub use multiprocessor::{Blocks, Timed, replay};
