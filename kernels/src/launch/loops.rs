//! Loop iterations of one unit: how many a launch may take at most.
//!
//! Some software drivers (llvmpipe) end all loops of an invocation after 65,535 iterations in total and say nothing: the numbers are
//! simply wrong. Every plan counts what its kernel's busiest unit goes through, and a launch that would take more is split over
//! more units or refused. The limit holds on every device: a unit that runs longer is a tail that a GPU waits for.

use crate::{Error, Result};

/// The most iterations of all loops of a unit together.
pub const MAX_LOOPS: usize = 65_535;

/// The target of the event that tells each launch's count, with the fields `kernel` and `loops`.
pub const LOOPS_TARGET: &str = "ultramem::loops";

/// Whether a unit may take `loops` iterations.
pub(crate) fn fits_loops(loops: usize) -> bool {
    loops <= MAX_LOOPS
}

/// Checks what the busiest unit of a launch of `kernel` takes, and tells it to whoever listens to [`LOOPS_TARGET`].
///
/// # Errors
/// [`Error::Loops`] for more than [`MAX_LOOPS`].
pub fn check_loops(kernel: &'static str, loops: usize) -> Result<()> {
    tracing::trace!(target: LOOPS_TARGET, kernel, loops = loops as u64);
    within_loops(kernel, loops)
}

/// The same of a launch that nobody makes yet.
pub(crate) fn within_loops(kernel: &'static str, loops: usize) -> Result<()> {
    if fits_loops(loops) {
        return Ok(());
    }
    Err(Error::Loops { kernel, loops: loops as u64, limit: MAX_LOOPS as u64 })
}

/// Iterations of a loop over `items`, `stride` apart.
pub fn strided(items: usize, stride: usize) -> usize {
    items.div_ceil(stride.max(1))
}
