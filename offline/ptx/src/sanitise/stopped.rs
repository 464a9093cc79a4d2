//! What the sanitiser makes of a launch that does not go on.

use super::{Finding, Place, Space, Watch};
use crate::error::{Site, Stop};
use crate::operand::Space as Named;
use crate::run::memory::{Buffer, Memory};
use crate::windows::shared_offset;

impl Watch<'_> {
    /// Who is to blame and for what, or in words why the launch can't go on.
    pub(super) fn found(&self, stop: Stop, memory: &Memory<'_>) -> Result<(Site, Finding), String> {
        let divergent = |at: Site, thread| (at, Finding::Divergent { other: Place { block: at.block, thread } });
        match stop {
            Stop::OutOfBounds { at, space, address, size, store } => {
                let space = self.outside(space, address, memory)?;
                Ok((at, Finding::OutOfBounds { space, size, store }))
            }
            Stop::Misaligned { at, address, size } => Ok((at, Finding::Misaligned { address, size })),
            Stop::DivergentWarp { at, missing } => {
                Ok(divergent(at, at.thread / 32 * 32 + missing.trailing_zeros().min(31) as usize))
            }
            Stop::DivergentBlock { at, other } => Ok(divergent(at, other)),
            Stop::Trap { at } => Err(format!("thread {} of block {} stops it", at.thread, at.block)),
            Stop::Endless { at } => Err(format!("thread {} of block {} does not end", at.thread, at.block)),
        }
    }

    /// What an address that is out of bounds would be.
    fn outside(&self, space: Named, address: u64, memory: &Memory<'_>) -> Result<Space, String> {
        let (start, length) = (self.shared.0, self.shared.1);
        if let Some(offset) = shared_offset(space, address) {
            return Ok(Space::OutsideShared { byte: offset.wrapping_sub(start as u64) as usize, length });
        }
        if !matches!(space, Named::Global | Named::Generic) {
            return Err(format!("it accesses byte {address} of its memory of kind {space:?}, which has fewer"));
        }
        let distance = |buffer: &Buffer| address.wrapping_sub(buffer.address()) as i64;
        let gap = |buffer: &Buffer| match distance(buffer) {
            before if before < 0 => before.unsigned_abs(),
            behind => (behind as u64).saturating_sub(buffer.length as u64),
        };
        let arguments = &memory.buffers[..self.buffers.len()];
        let nearest = (0..arguments.len()).min_by_key(|&buffer| gap(&arguments[buffer]));
        let Some(buffer) = nearest else { return Err(format!("it accesses {address:#x}, and there are no buffers")) };
        let size = self.buffers[buffer].size;
        let element = distance(&arguments[buffer]).div_euclid(size as i64);
        Ok(Space::Outside { buffer, element, length: arguments[buffer].length / size })
    }
}
