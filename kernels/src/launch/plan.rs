//! A launch before it is made: its cubes, what each of them takes of a multiprocessor, and what its busiest unit goes through.

use cubecl::prelude::*;

use super::device::Device;
use super::loops::{check_loops, fits_loops, within_loops};
use crate::Result;

/// One launch of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Launch {
    /// The kernel's function.
    pub kernel: &'static str,
    /// Cubes that have work. Where one dimension of the device's grid does not hold them all, a few more are launched and leave at once.
    pub cubes: usize,
    /// Units of a cube.
    pub units: usize,
    /// Bytes of shared memory of a cube, all arrays together; a compiler aligns them, and leaves out what a variant does not touch.
    pub shared_bytes: usize,
    /// Loop iterations of the busiest unit, all loops together, at most.
    pub loops: usize,
}

impl Launch {
    /// A launch of a unit for each of `items`, of `loops` iterations; no cubes for no items.
    pub(crate) fn flat(device: &Device, kernel: &'static str, items: usize, loops: usize) -> Self {
        let units = device.flat(items);
        Self { kernel, cubes: items.div_ceil(units), units, shared_bytes: 0, loops }
    }

    /// Whether a cube fits `device`, and no unit goes through too many iterations.
    pub(crate) fn fits(&self, device: &Device) -> bool {
        self.shared_bytes <= device.shared_bytes && fits_loops(self.loops)
    }

    /// Checks a launch of `stage` against what `device` has.
    ///
    /// # Errors
    /// [`SharedMemory`](crate::Error::SharedMemory), [`Loops`](crate::Error::Loops), or [`Exceeds`](crate::Error::Exceeds) for more cubes than a
    /// grid has.
    pub(crate) fn check(&self, stage: &'static str, device: &Device) -> Result<()> {
        device.fits_shared(stage, self.shared_bytes)?;
        within_loops(self.kernel, self.loops)?;
        device.grid(self.cubes.max(1)).map(drop)
    }

    /// The grid and the cube, as CubeCL takes them, of a launch that is made now.
    pub(crate) fn start(&self, device: &Device) -> Result<(CubeCount, CubeDim)> {
        check_loops(self.kernel, self.loops)?;
        Ok((device.grid(self.cubes)?, CubeDim::new_1d(self.units as u32)))
    }
}

/// Checks all launches of `stage` against what `device` has.
///
/// # Errors
/// As [`Launch::check`].
pub(crate) fn check_all(stage: &'static str, device: &Device, launches: &[Launch]) -> Result<()> {
    launches.iter().try_for_each(|launch| launch.check(stage, device))
}

/// What is fixed when a kernel is compiled, and one launch of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Planned<P> {
    /// What the kernel is compiled for.
    pub plan: P,
    /// How it is launched.
    pub launch: Launch,
}

impl<P> Planned<P> {
    /// The plan, once its launch of `stage` has been checked against `device`.
    pub(crate) fn checked(self, stage: &'static str, device: &Device) -> Result<Self> {
        self.launch.check(stage, device)?;
        Ok(self)
    }
}
