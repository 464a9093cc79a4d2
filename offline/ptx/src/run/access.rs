//! Loads and stores (sections 9.7.9.8 and 9.7.9.11): each lane's elements between memory and registers.

use super::context::Context;
use super::memory::{Access, Kind, Place, read, write};
use super::observe::{At, Observer};
use super::warp::Warp;
use crate::error::Stop;
use crate::lanes::{ALL, Long, Mask, WARP, Word, lanes};
use crate::operand::{Address, Element, Register, Source, Space, Vector};

impl Warp {
    /// The addresses of an operand.
    pub(super) fn addresses<O>(&self, address: &Address, context: &Context<'_, '_, O>) -> Long {
        let offset = address.offset as u64;
        match address.base {
            Some(base) => self.long(&Source::Register(base), context).map(|base| base.wrapping_add(offset)),
            None => [offset; WARP],
        }
    }

    /// Checks the addresses of an access and has `visit` take the lanes of each place, with that place's bytes and each lane's offset
    /// among them. Who looks on is told first.
    pub(super) fn reach<O: Observer>(
        &mut self,
        at: &At,
        mask: Mask,
        (space, size, kind): (Space, usize, Kind),
        addresses: &Long,
        context: &mut Context<'_, '_, O>,
        mut visit: impl FnMut(&mut Self, &mut [u8], &Long, Mask),
    ) -> Result<(), Stop> {
        aligned(at, mask, addresses, size)?;
        // What NVVM loads besides may be nobody's.
        let used = context.program.code[at.instruction].used;
        let needed = if used == u32::MAX { size } else { size.min(32 - used.leading_zeros() as usize) };
        let mut parts: [Option<(Place, Long, Mask)>; 4] = [None; 4];
        let mut more = Vec::new();
        let mut count = 0;
        let found = context.memory.by_place((space, needed), addresses, mask, |place, offsets, mask| {
            match parts.get_mut(count) {
                Some(part) => *part = Some((place, *offsets, mask)),
                None => more.push((place, *offsets, mask)),
            }
            count += 1;
        });
        if let Err(lane) = found {
            let (at, address, store) = (at.site(1 << lane), addresses[lane], kind != Kind::Load);
            return Err(Stop::OutOfBounds { at, space, address, size, store });
        }
        for (place, mut offsets, mask) in parts.into_iter().flatten().chain(more) {
            let access = Access { place, offsets: &offsets, mask, size, used, kind };
            context.observer.accessed(at, &access);
            if place == Place::Local {
                let own = context.memory.local as u64;
                (0..WARP).for_each(|lane| offsets[lane] = offsets[lane].wrapping_add(lane as u64 * own));
            }
            let mut local = std::mem::take(&mut self.local);
            visit(self, context.memory.bytes(place, &mut local), &offsets, mask);
            self.local = local;
        }
        Ok(())
    }

    pub(super) fn load<O: Observer>(
        &mut self,
        at: &At,
        mask: Mask,
        (space, element): (Space, Element),
        targets: &Vector,
        address: &Address,
        context: &mut Context<'_, '_, O>,
    ) -> Result<(), Stop> {
        let addresses = self.addresses(address, context);
        let (size, used) = (usize::from(element.size) * targets.len(), context.program.code[at.instruction].used);
        self.reach(at, mask, (space, size, Kind::Load), &addresses, context, |warp, bytes, offsets, mask| {
            for (number, target) in targets.iter().enumerate() {
                let skip = number * usize::from(element.size);
                let matters = used >> skip & ((1 << element.size) - 1) != 0;
                if let Some(target) = target.filter(|_| matters) {
                    warp.take(bytes, offsets, skip, element, target, mask);
                }
            }
        })
    }

    /// Reads an element of each lane, `skip` bytes behind its offset, into a register.
    fn take(&mut self, bytes: &[u8], offsets: &Long, skip: usize, element: Element, target: Register, mask: Mask) {
        if element.size == 4 && !element.signed {
            let mut words: Word = [0; WARP];
            if mask == ALL {
                for lane in 0..WARP {
                    words[lane] = read(bytes, offsets[lane] as usize + skip, 4) as u32;
                }
            } else {
                lanes(mask).for_each(|lane| words[lane] = read(bytes, offsets[lane] as usize + skip, 4) as u32);
            }
            return self.set_word(target, &words, mask);
        }
        let (size, mut longs) = (usize::from(element.size), [0; WARP]);
        let unused = 64 - 8 * size as u32;
        for lane in lanes(mask) {
            let number = read(bytes, offsets[lane] as usize + skip, size);
            longs[lane] = if element.signed { ((number << unused) as i64 >> unused) as u64 } else { number };
        }
        self.set(target, &longs, mask);
    }

    pub(super) fn store<O: Observer>(
        &mut self,
        at: &At,
        mask: Mask,
        (space, element): (Space, Element),
        sources: &[Source],
        address: &Address,
        context: &mut Context<'_, '_, O>,
    ) -> Result<(), Stop> {
        let addresses = self.addresses(address, context);
        let size = usize::from(element.size);
        let mut values = [[0; WARP]; 8];
        for (value, source) in values.iter_mut().zip(sources) {
            *value = self.long(source, context);
        }
        let access = (space, size * sources.len(), Kind::Store);
        self.reach(at, mask, access, &addresses, context, |_, bytes, offsets, mask| {
            for (number, value) in values[..sources.len()].iter().enumerate() {
                for lane in lanes(mask) {
                    write(bytes, offsets[lane] as usize + number * size, size, value[lane]);
                }
            }
        })
    }
}

/// Whether what each lane accesses lies at a multiple of its size.
pub fn aligned(at: &At, mask: Mask, addresses: &Long, size: usize) -> Result<(), Stop> {
    match lanes(mask).find(|&lane| !addresses[lane].is_multiple_of(size as u64)) {
        Some(lane) => Err(Stop::Misaligned { at: at.site(1 << lane), address: addresses[lane], size }),
        None => Ok(()),
    }
}
