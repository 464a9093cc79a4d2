//! Copies that go on while the thread does: `cp.async` and its groups, `cp.async.bulk`, and the barriers in shared memory that wait for
//! them, `mbarrier` (sections 9.7.9.25 and 9.7.13.15).
//!
//! A copy's bytes are read where it begins and arrive as late as they may: when somebody waits for them. What reads them sooner finds
//! what was there before, and what nobody waits for never arrives.

mod barrier;
mod copy;
pub mod state;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_barrier;

use crate::error::Stop;
use crate::lanes::{Mask, WARP};
use crate::program::transfer::{Group, Transfer};
use crate::run::context::Context;
use crate::run::observe::{At, Observer};
use crate::run::warp::Warp;

impl Warp {
    /// Executes one. A test of a barrier that fails lets other warps go on.
    pub(in crate::run) fn transfer<O: Observer>(
        &mut self,
        at: &At,
        mask: Mask,
        transfer: &Transfer,
        context: &mut Context<'_, '_, O>,
    ) -> Result<(), Stop> {
        match transfer {
            Transfer::Copy(form) => self.begin_copy(at, mask, form, context)?,
            Transfer::Bulk(form) => self.begin_bulk(at, mask, form, context)?,
            Transfer::Commit(group) => {
                let closed = self.copies.closed(*group);
                (0..WARP).for_each(|lane| closed[lane] += mask >> lane & 1);
            }
            Transfer::Wait(group, left) => self.wait_group(mask, *group, Some(*left), context)?,
            Transfer::WaitAll => self.wait_group(mask, Group::Small, None, context)?,
            Transfer::ArriveAfter(place, counted) => self.arrive_after(at, mask, (place, *counted), context)?,
            Transfer::Init(place, count) => self.init_barrier(at, mask, place, count, context)?,
            Transfer::Invalidate(place) => self.invalidate_barrier(at, mask, place, context)?,
            Transfer::Arrive(arrival) => self.arrive_at(at, mask, arrival, context)?,
            Transfer::Bytes(place, bytes, sign) => self.count_bytes(at, mask, place, (bytes, *sign), context)?,
            Transfer::Test { target, place, phase, parity } => {
                // Copies that the barrier waits for arrive first.
                let barriers = self.barriers(place, context);
                self.deliver_to_barriers(mask, &barriers, context)?;
                self.test_barriers(at, mask, (&barriers, phase, *parity), *target, context)?;
            }
            Transfer::Pending(target, state) => {
                let states = self.long(state, context);
                self.set_word(*target, &states.map(barrier::pending), mask);
            }
        }
        Ok(())
    }
}
