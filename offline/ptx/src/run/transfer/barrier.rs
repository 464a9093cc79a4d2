//! Barriers in shared memory (section 9.7.13.15). All of a barrier is in its 64 bits, in an order that is not NVIDIA's: threads that are
//! still to come in this phase, threads of each phase, bytes that are still to come, the phase's parity.

use crate::error::Stop;
use crate::lanes::{Long, Mask, WARP, lanes};
use crate::operand::{Source, Space};
use crate::program::transfer::{Arrival, Place, Sign};
use crate::run::context::Context;
use crate::run::memory::{Kind, read, write};
use crate::run::observe::{At, Observer};
use crate::run::warp::{State, Warp};
use crate::windows::SHARED_WINDOW;

/// Bits of a count of threads.
const THREADS: u32 = 20;
/// Bits of the count of bytes, one of which is its sign.
const BYTES: u32 = 21;

/// A barrier, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Barrier {
    pending: u32,
    expected: u32,
    /// Below zero where bytes have come that are not expected yet.
    bytes: i32,
    odd: bool,
}

impl Barrier {
    fn new(expected: u32) -> Self {
        Self { pending: expected, expected, bytes: 0, odd: false }
    }

    fn of(bits: u64) -> Self {
        let field = |start: u32, length: u32| (bits >> start) as u32 & ((1 << length) - 1);
        let bytes = (field(2 * THREADS, BYTES) << (32 - BYTES)) as i32 >> (32 - BYTES);
        Self { pending: field(0, THREADS), expected: field(THREADS, THREADS), bytes, odd: bits >> 63 == 1 }
    }

    fn bits(self) -> u64 {
        let field = |number: u32, start: u32, length: u32| u64::from(number & ((1 << length) - 1)) << start;
        field(self.pending, 0, THREADS)
            | field(self.expected, THREADS, THREADS)
            | field(self.bytes as u32, 2 * THREADS, BYTES)
            | u64::from(self.odd) << 63
    }

    /// Lets threads come. More than are waited for are never all.
    fn arrive(&mut self, count: u32) {
        self.pending = self.pending.wrapping_sub(count);
    }

    /// Begins the next phase where all have come; whether they had.
    fn turn(&mut self) -> bool {
        let over = self.pending == 0 && self.bytes == 0;
        if over {
            (self.pending, self.odd) = (self.expected, !self.odd);
        }
        over
    }

    /// Whether a phase of this parity is over: the current one is not.
    fn over(self, odd: bool) -> bool {
        self.odd != odd
    }
}

/// Threads that a state waits for.
pub fn pending(state: u64) -> u32 {
    Barrier::of(state).pending
}

impl Warp {
    /// The barriers' addresses in shared memory; a generic address that is not there is beyond it.
    pub(super) fn barriers<O>(&self, place: &Place, context: &Context<'_, '_, O>) -> Long {
        let addresses = self.addresses(&place.address, context);
        match place.space {
            Space::Shared => addresses,
            _ => addresses.map(|address| address.wrapping_sub(SHARED_WINDOW)),
        }
    }

    /// Changes the barriers of lanes, one after the other; `change` returns what each lane gets. Where a phase is over, what was
    /// before is seen by all that comes after: an epoch ends.
    fn change<O: Observer>(
        &mut self,
        at: &At,
        mask: Mask,
        addresses: &Long,
        context: &mut Context<'_, '_, O>,
        mut change: impl FnMut(usize, &mut Barrier),
    ) -> Result<Long, Stop> {
        let (mut before, mut over) = ([0; WARP], 0);
        let access = (Space::Shared, 8, Kind::Atomic);
        self.reach(at, mask, access, addresses, context, |_, bytes, offsets, mask| {
            for lane in lanes(mask) {
                let found = read(bytes, offsets[lane] as usize, 8);
                let mut barrier = Barrier::of(found);
                change(lane, &mut barrier);
                over += u32::from(barrier.turn());
                before[lane] = found;
                write(bytes, offsets[lane] as usize, 8, barrier.bits());
            }
        })?;
        context.transfers.changes += 1;
        context.epoch += over;
        Ok(before)
    }

    pub(super) fn init_barrier<O: Observer>(
        &mut self,
        at: &At,
        mask: Mask,
        place: &Place,
        count: &Source,
        context: &mut Context<'_, '_, O>,
    ) -> Result<(), Stop> {
        let (addresses, counts) = (self.barriers(place, context), self.word(count, context));
        let bits: Long = counts.map(|count| Barrier::new(count).bits());
        self.write(at, mask, &addresses, &bits, context)
    }

    /// What is no barrier any more waits for nobody.
    pub(super) fn invalidate_barrier<O: Observer>(
        &mut self,
        at: &At,
        mask: Mask,
        place: &Place,
        context: &mut Context<'_, '_, O>,
    ) -> Result<(), Stop> {
        let addresses = self.barriers(place, context);
        self.write(at, mask, &addresses, &[0; WARP], context)
    }

    fn write<O: Observer>(
        &mut self,
        at: &At,
        mask: Mask,
        addresses: &Long,
        bits: &Long,
        context: &mut Context<'_, '_, O>,
    ) -> Result<(), Stop> {
        context.transfers.changes += 1;
        self.reach(at, mask, (Space::Shared, 8, Kind::Store), addresses, context, |_, bytes, offsets, mask| {
            for lane in lanes(mask) {
                write(bytes, offsets[lane] as usize, 8, bits[lane]);
            }
        })
    }

    pub(super) fn arrive_at<O: Observer>(
        &mut self,
        at: &At,
        mask: Mask,
        arrival: &Arrival,
        context: &mut Context<'_, '_, O>,
    ) -> Result<(), Stop> {
        let addresses = self.barriers(&arrival.place, context);
        let counts = self.word(&arrival.count.unwrap_or(Source::Constant(1)), context);
        let expected = self.word(&arrival.expected.unwrap_or(Source::Constant(0)), context);
        let states = self.change(at, mask, &addresses, context, |lane, barrier| {
            barrier.bytes = barrier.bytes.wrapping_add(expected[lane] as i32);
            if arrival.drops {
                barrier.expected = barrier.expected.wrapping_sub(counts[lane]);
            }
            barrier.arrive(counts[lane]);
        })?;
        if let Some(target) = arrival.target {
            self.set_long(target, &states, mask);
        }
        Ok(())
    }

    /// Lets one thread come to each lane's barrier.
    pub(super) fn arrive_once<O: Observer>(
        &mut self,
        at: &At,
        mask: Mask,
        addresses: &Long,
        context: &mut Context<'_, '_, O>,
    ) -> Result<(), Stop> {
        self.change(at, mask, addresses, context, |_, barrier| barrier.arrive(1)).map(drop)
    }

    /// Has each lane's barrier wait for one thread more in this phase.
    pub(super) fn await_one_more<O: Observer>(
        &mut self,
        at: &At,
        mask: Mask,
        addresses: &Long,
        context: &mut Context<'_, '_, O>,
    ) -> Result<(), Stop> {
        self.change(at, mask, addresses, context, |_, barrier| barrier.pending += 1).map(drop)
    }

    pub(super) fn count_bytes<O: Observer>(
        &mut self,
        at: &At,
        mask: Mask,
        place: &Place,
        (bytes, sign): (&Source, Sign),
        context: &mut Context<'_, '_, O>,
    ) -> Result<(), Stop> {
        let (addresses, bytes) = (self.barriers(place, context), self.word(bytes, context));
        self.add_bytes(at, mask, &addresses, (&bytes.map(|bytes| bytes as i32), sign), context)
    }

    /// Counts bytes that are expected, or have come.
    pub(super) fn add_bytes<O: Observer>(
        &mut self,
        at: &At,
        mask: Mask,
        addresses: &Long,
        (bytes, sign): (&[i32; WARP], Sign),
        context: &mut Context<'_, '_, O>,
    ) -> Result<(), Stop> {
        let sign = if sign == Sign::Expect { 1 } else { -1 };
        let added = |lane: usize, barrier: &mut Barrier| {
            barrier.bytes = barrier.bytes.wrapping_add(bytes[lane].wrapping_mul(sign));
        };
        self.change(at, mask, addresses, context, added).map(drop)
    }

    /// Whether phases are over. Where one is not, other warps have their turn.
    pub(super) fn test_barriers<O: Observer>(
        &mut self,
        at: &At,
        mask: Mask,
        (addresses, phase, parity): (&Long, &Source, bool),
        target: u32,
        context: &mut Context<'_, '_, O>,
    ) -> Result<(), Stop> {
        let phases = self.long(phase, context);
        let mut over = 0;
        let access = (Space::Shared, 8, Kind::Atomic);
        let at = At { epoch: context.epoch, ..*at };
        self.reach(&at, mask, access, addresses, context, |_, bytes, offsets, mask| {
            for lane in lanes(mask) {
                let barrier = Barrier::of(read(bytes, offsets[lane] as usize, 8));
                let odd = if parity { phases[lane] & 1 == 1 } else { Barrier::of(phases[lane]).odd };
                over |= u32::from(barrier.over(odd)) << lane;
            }
        })?;
        self.set_predicate(target, over, mask);
        if over & mask != mask {
            self.copies.tested = at.instruction;
            self.state = State::Polls;
        }
        Ok(())
    }
}

/// One lane alone, and an operand that is the same in all.
pub fn alone<T: Copy>(lane: usize, value: T) -> (Mask, [T; WARP]) {
    (1 << lane, [value; WARP])
}
