//! Copies under way (sections 9.7.9.25.3 and 9.7.9.25.4): where they begin, and where they arrive.

use super::barrier::alone;
use super::state::{After, Bulk, Copy, PIECE, Until};
use crate::error::Stop;
use crate::lanes::{Long, Mask, WARP, lanes, those};
use crate::operand::{Register, Source, Space};
use crate::program::transfer::{BulkForm, CopyForm, Group, Place, Sign};
use crate::run::access::aligned;
use crate::run::context::Context;
use crate::run::memory::Kind;
use crate::run::observe::{At, Observer};
use crate::run::warp::Warp;

impl Warp {
    /// Reads what is copied and keeps it.
    pub(super) fn begin_copy<O: Observer>(
        &mut self,
        at: &At,
        mask: Mask,
        form: &CopyForm,
        context: &mut Context<'_, '_, O>,
    ) -> Result<(), Stop> {
        let size = form.size;
        let (from, to) = (self.addresses(&form.from.address, context), self.addresses(&form.to.address, context));
        aligned(at, mask, &from, size)?;
        writable(at, mask, (Space::Shared, size), &to, context)?;
        let read = self.read_sizes(form, context);
        let mut bytes = [[0; PIECE]; WARP];
        for wanted in 1..=size {
            let same = mask & those(|lane| read[lane] == wanted);
            if same == 0 {
                continue;
            }
            // What is no power of two is read in pieces.
            let piece = 1 << wanted.trailing_zeros();
            for start in (0..wanted).step_by(piece) {
                let addresses = from.map(|address| address.wrapping_add(start as u64));
                let access = (form.from.space, piece, Kind::Load);
                self.reach(at, same, access, &addresses, context, |_, memory, offsets, mask| {
                    for lane in lanes(mask) {
                        bytes[lane][start..][..piece].copy_from_slice(&memory[offsets[lane] as usize..][..piece]);
                    }
                })?;
            }
        }
        let groups = *self.copies.closed(Group::Small);
        let number = context.transfers.begun;
        context.transfers.begun += 1;
        context.transfers.copies.push(Copy { at: *at, number, mask, groups, to, size, bytes });
        Ok(())
    }

    /// How many bytes each lane reads.
    fn read_sizes<O>(&self, form: &CopyForm, context: &Context<'_, '_, O>) -> [usize; WARP] {
        match form.read {
            None => [form.size; WARP],
            Some(ignored @ (Source::Register(Register::Predicate(_)) | Source::Not(_))) => {
                let ignored = self.predicate(&ignored);
                std::array::from_fn(|lane| if ignored >> lane & 1 == 1 { 0 } else { form.size })
            }
            Some(read) => self.word(&read, context).map(|read| form.size.min(read as usize)),
        }
    }

    /// Reads what is copied and keeps it, a lane after the other.
    pub(super) fn begin_bulk<O: Observer>(
        &mut self,
        at: &At,
        mask: Mask,
        form: &BulkForm,
        context: &mut Context<'_, '_, O>,
    ) -> Result<(), Stop> {
        let (from, to) = (self.addresses(&form.from.address, context), self.addresses(&form.to.address, context));
        let sizes = self.word(&form.size, context);
        let barriers = form.barrier.map(|barrier| self.barriers(&barrier, context));
        for lane in lanes(mask) {
            // The number of bytes has to be a multiple of the same.
            for number in [from[lane], to[lane], sizes[lane].into()] {
                aligned(at, 1 << lane, &[number; WARP], PIECE)?;
            }
            for (_, mask, to) in pieces(to[lane], sizes[lane] as usize) {
                writable(at, mask, (form.to.space, PIECE), &to, context).map_err(|stop| named(stop, at, lane))?;
            }
            let mut bytes = vec![0; sizes[lane] as usize];
            let source = (form.from.space, from[lane]);
            self.reach_all(at, lane, (source, Kind::Load), &mut bytes, context)?;
            let until = match &barriers {
                Some(barriers) => Until::Barrier(barriers[lane]),
                None => Until::Group(self.copies.closed(Group::Bulk)[lane]),
            };
            context.transfers.bulks.push(Bulk { at: *at, lane, to: (form.to.space, to[lane]), bytes, until });
        }
        Ok(())
    }

    /// Reads or writes what a lane copies, as 32 lanes would that take pieces of 16 bytes one after the other.
    fn reach_all<O: Observer>(
        &mut self,
        at: &At,
        lane: usize,
        ((space, address), kind): ((Space, u64), Kind),
        bytes: &mut [u8],
        context: &mut Context<'_, '_, O>,
    ) -> Result<(), Stop> {
        for (start, mask, addresses) in pieces(address, bytes.len()) {
            self.reach(at, mask, (space, PIECE, kind), &addresses, context, |_, memory, offsets, mask| {
                for piece in lanes(mask) {
                    let (there, here) = (offsets[piece] as usize, start + piece * PIECE);
                    let (there, here) = (&mut memory[there..][..PIECE], &mut bytes[here..][..PIECE]);
                    if kind == Kind::Load { here.copy_from_slice(there) } else { there.copy_from_slice(here) }
                }
            })
            .map_err(|stop| named(stop, at, lane))?;
        }
        Ok(())
    }

    /// Has the copies of all groups but the last `left` arrive; None are all copies, in a group or not.
    pub(super) fn wait_group<O: Observer>(
        &mut self,
        mask: Mask,
        group: Group,
        left: Option<u32>,
        context: &mut Context<'_, '_, O>,
    ) -> Result<(), Stop> {
        let closed = *self.copies.closed(group);
        let over = |lane: usize, number: u32| left.is_none_or(|left| number < closed[lane].saturating_sub(left));
        let number = self.number;
        match group {
            Group::Small => self.deliver(context, |copy| {
                let own = if copy.at.warp == number { copy.mask & mask } else { 0 };
                own & those(|lane| over(lane, copy.groups[lane]))
            }),
            Group::Bulk => self.deliver_bulks(context, |bulk| {
                let own = bulk.at.warp == number && mask >> bulk.lane & 1 == 1;
                own && matches!(bulk.until, Until::Group(group) if over(bulk.lane, group))
            }),
        }
    }

    /// Lets lanes come to a barrier when their copies have arrived.
    pub(super) fn arrive_after<O: Observer>(
        &mut self,
        at: &At,
        mask: Mask,
        (place, counted): (&Place, bool),
        context: &mut Context<'_, '_, O>,
    ) -> Result<(), Stop> {
        let barriers = self.barriers(place, context);
        if !counted {
            self.await_one_more(at, mask, &barriers, context)?;
        }
        let number = context.transfers.begun;
        context.transfers.after.push(After { at: *at, number, mask, barriers });
        Ok(())
    }

    /// Has all arrive that these barriers wait for.
    pub(super) fn deliver_to_barriers<O: Observer>(
        &mut self,
        mask: Mask,
        barriers: &Long,
        context: &mut Context<'_, '_, O>,
    ) -> Result<(), Stop> {
        let waited = |barrier: u64| lanes(mask).any(|lane| barriers[lane] == barrier);
        self.deliver_bulks(context, |bulk| matches!(bulk.until, Until::Barrier(barrier) if waited(barrier)))?;
        for mut after in std::mem::take(&mut context.transfers.after) {
            let come = after.mask & those(|lane| waited(after.barriers[lane]));
            if come != 0 {
                self.deliver(context, |copy| {
                    let own = copy.at.warp == after.at.warp && copy.number < after.number;
                    if own { copy.mask & come } else { 0 }
                })?;
                let at = At { epoch: context.epoch, ..after.at };
                self.arrive_once(&at, come, &after.barriers, context)?;
            }
            after.mask &= !come;
            if after.mask != 0 {
                context.transfers.after.push(after);
            }
        }
        Ok(())
    }

    /// Has bytes of the lanes arrive that `which` picks.
    fn deliver<O: Observer>(
        &mut self,
        context: &mut Context<'_, '_, O>,
        which: impl Fn(&Copy) -> Mask,
    ) -> Result<(), Stop> {
        for mut copy in std::mem::take(&mut context.transfers.copies) {
            let arrived = which(&copy);
            if arrived != 0 {
                let at = At { epoch: context.epoch, ..copy.at };
                let access = (Space::Shared, copy.size, Kind::Store);
                self.reach(&at, arrived, access, &copy.to, context, |_, memory, offsets, mask| {
                    for lane in lanes(mask) {
                        let bytes = &copy.bytes[lane][..copy.size];
                        memory[offsets[lane] as usize..][..copy.size].copy_from_slice(bytes);
                    }
                })?;
            }
            copy.mask &= !arrived;
            if copy.mask != 0 {
                context.transfers.copies.push(copy);
            }
        }
        Ok(())
    }

    /// Has the long copies arrive that `which` picks.
    fn deliver_bulks<O: Observer>(
        &mut self,
        context: &mut Context<'_, '_, O>,
        which: impl Fn(&Bulk) -> bool,
    ) -> Result<(), Stop> {
        for mut bulk in std::mem::take(&mut context.transfers.bulks) {
            if !which(&bulk) {
                context.transfers.bulks.push(bulk);
                continue;
            }
            let at = At { epoch: context.epoch, ..bulk.at };
            self.reach_all(&at, bulk.lane, (bulk.to, Kind::Store), &mut bulk.bytes, context)?;
            if let Until::Barrier(barrier) = bulk.until {
                let (mask, barriers) = alone(bulk.lane, barrier);
                let come = [bulk.bytes.len() as i32; WARP];
                self.add_bytes(&at, mask, &barriers, (&come, Sign::Complete), context)?;
            }
        }
        Ok(())
    }
}

/// A lane's bytes as pieces that 32 lanes take: where they begin, the lanes, and their addresses.
fn pieces(address: u64, length: usize) -> impl Iterator<Item = (usize, Mask, Long)> {
    (0..length).step_by(PIECE * WARP).map(move |start| {
        let count = ((length - start) / PIECE).min(WARP);
        let addresses = std::array::from_fn(|lane| address.wrapping_add((start + lane * PIECE) as u64));
        (start, Mask::MAX >> (WARP - count), addresses)
    })
}

/// The same stop, of the lane that copies.
fn named(stop: Stop, at: &At, lane: usize) -> Stop {
    match stop {
        Stop::OutOfBounds { space, address, size, store, .. } => {
            Stop::OutOfBounds { at: at.site(1 << lane), space, address, size, store }
        }
        stop => stop,
    }
}

/// Whether bytes may arrive there, which is to be known where the copy begins.
fn writable<O>(
    at: &At,
    mask: Mask,
    (space, size): (Space, usize),
    addresses: &Long,
    context: &Context<'_, '_, O>,
) -> Result<(), Stop> {
    aligned(at, mask, addresses, size)?;
    context.memory.by_place((space, size), addresses, mask, |_, _, _| {}).map_err(|lane| Stop::OutOfBounds {
        at: at.site(1 << lane),
        space,
        address: addresses[lane],
        size,
        store: true,
    })
}
