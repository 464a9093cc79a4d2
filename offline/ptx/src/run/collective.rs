//! What lanes of a warp do together: shuffles (section 9.7.9.6), votes, matches, reductions and waiting (section 9.7.13).

use super::context::Context;
use super::observe::{At, Observer};
use super::warp::Warp;
use crate::error::Stop;
use crate::lanes::{Long, Mask, WARP, Word, lanes, those};
use crate::program::{Collective, CollectiveKind as Kind};

impl Warp {
    /// Executes one. Lanes that name others each do it for themselves, as tiles of a warp do.
    pub(super) fn collect<O: Observer>(
        &mut self,
        at: &At,
        mask: Mask,
        collective: &Collective,
        context: &mut Context<'_, '_, O>,
    ) -> Result<(), Stop> {
        let Some(named) = &collective.members else {
            return self.collect_together(at, (mask, mask), collective, context);
        };
        let named = self.word(named, context);
        let mut rest = mask;
        while rest != 0 {
            let members = named[rest.trailing_zeros() as usize];
            let group = rest & those(|lane| named[lane] == members);
            self.collect_together(at, (group, members & self.running), collective, context)?;
            rest &= !group;
        }
        Ok(())
    }

    fn collect_together<O: Observer>(
        &mut self,
        at: &At,
        (mask, members): (Mask, Mask),
        collective: &Collective,
        context: &mut Context<'_, '_, O>,
    ) -> Result<(), Stop> {
        let Collective { kind, target, predicate, sources, .. } = collective;
        // Lanes that are named and don't come, or come and are not named.
        if members != mask {
            let missing = if members & !mask != 0 { members & !mask } else { mask & !members };
            return Err(Stop::DivergentWarp { at: at.site(mask), missing });
        }
        if members == self.existing && *kind != Kind::ActiveMask {
            self.step += 1;
        }
        let value = self.long(&sources[0], context);
        let (found, agreed): (Option<Long>, Mask) = match kind {
            Kind::Wait => (None, 0),
            Kind::ShuffleUp | Kind::ShuffleDown | Kind::ShuffleXor | Kind::ShuffleIndex => {
                let (distance, limits) = (self.word(&sources[1], context), self.word(&sources[2], context));
                let (numbers, agreed) = shuffle(*kind, &value, &distance, &limits, members);
                (Some(numbers), agreed)
            }
            Kind::VoteAll | Kind::VoteAny | Kind::VoteUniform | Kind::VoteBallot => {
                let votes = self.predicate(&sources[0]) & members;
                let holds = match kind {
                    Kind::VoteAll => votes == members,
                    Kind::VoteAny => votes != 0,
                    Kind::VoteUniform => votes == members || votes == 0,
                    _ => false,
                };
                let numbers = if *kind == Kind::VoteBallot { u64::from(votes) } else { u64::from(holds) };
                (Some([numbers; WARP]), 0)
            }
            Kind::MatchAny | Kind::MatchAll => matched(*kind, &value, members),
            Kind::ActiveMask => (Some([u64::from(mask); WARP]), 0),
            Kind::Elect => {
                let leader = members.trailing_zeros();
                (Some([u64::from(leader); WARP]), 1 << leader)
            }
            kind => (Some([reduced(*kind, &value, members); WARP]), 0),
        };
        if let (Some(target), Some(found)) = (target, found) {
            self.set(*target, &found, mask);
        }
        if let Some(predicate) = predicate {
            self.set_predicate(*predicate, agreed, mask);
        }
        Ok(())
    }
}

/// The numbers that lanes get, and which of them got another lane's, or their own for being the one asked for. A lane that does not
/// take part gives zero.
fn shuffle(kind: Kind, value: &Long, distance: &Word, limits: &Word, members: Mask) -> (Long, Mask) {
    let (mut found, mut within): (Long, Mask) = ([0; WARP], 0);
    for lane in lanes(members) {
        let (own, distance) = (lane as i32, (distance[lane] & 31) as i32);
        let (clamp, segment) = ((limits[lane] & 31) as i32, (limits[lane] >> 8 & 31) as i32);
        let (first, last) = (own & segment, own & segment | clamp & !segment & 31);
        let (from, good) = match kind {
            Kind::ShuffleUp => (own - distance, own - distance >= last),
            Kind::ShuffleDown => (own + distance, own + distance <= last),
            Kind::ShuffleXor => (own ^ distance, own ^ distance <= last),
            _ => {
                let from = first | distance & !segment;
                (from, from <= last)
            }
        };
        let from = if good { from as usize } else { lane };
        found[lane] = if members >> from & 1 == 1 { value[from] } else { 0 };
        within |= u32::from(good) << lane;
    }
    (found, within)
}

/// Of each lane the lanes that have its number; or all of them, and that they agree, where they do.
fn matched(kind: Kind, value: &Long, members: Mask) -> (Option<Long>, Mask) {
    let mut found: Long = [0; WARP];
    for lane in lanes(members) {
        found[lane] = u64::from(members & those(|other| value[other] == value[lane]));
    }
    if kind == Kind::MatchAny {
        return (Some(found), 0);
    }
    let agreed = lanes(members).all(|lane| found[lane] == u64::from(members));
    (Some([if agreed { u64::from(members) } else { 0 }; WARP]), if agreed { members } else { 0 })
}

fn reduced(kind: Kind, value: &Long, members: Mask) -> u64 {
    let numbers = lanes(members).map(|lane| value[lane] as u32);
    let signed = || lanes(members).map(|lane| value[lane] as u32 as i32);
    let found = match kind {
        Kind::ReduceAdd => numbers.fold(0, u32::wrapping_add),
        Kind::ReduceAnd => numbers.fold(u32::MAX, |all, it| all & it),
        Kind::ReduceOr => numbers.fold(0, |all, it| all | it),
        Kind::ReduceXor => numbers.fold(0, |all, it| all ^ it),
        Kind::ReduceMinUnsigned => numbers.fold(u32::MAX, u32::min),
        Kind::ReduceMaxUnsigned => numbers.fold(0, u32::max),
        Kind::ReduceMinSigned => signed().fold(i32::MAX, i32::min) as u32,
        Kind::ReduceMaxSigned => signed().fold(i32::MIN, i32::max) as u32,
        _ => unreachable!("the other kinds are no reductions"),
    };
    u64::from(found)
}

#[cfg(test)]
mod tests {
    use crate::testing;

    /// Halves of a warp that name only themselves.
    #[test]
    fn tiles_of_a_warp_each_for_themselves() {
        let body = "mov.u32 %r0, %tid.x;\nand.b32 %r1, %r0, 16;\nmov.u32 %r2, 65535;\nshl.b32 %r2, %r2, %r1;\nmov.u32 %r3, %r0;\n\
            shfl.sync.bfly.b32 %r3|%p0, %r3, 1, 4127, %r2;\nvote.sync.ballot.b32 %r4, %p0, %r2;\nadd.u32 %r3, %r3, %r4;\n\
            mad.wide.u32 %rd0, %r0, 4, %a0;\nst.global.u32 [%rd0], %r3;\nshl.b32 %r5, 1, %r0;\nbar.warp.sync %r5;\n";
        let mut buffers = [vec![0; 128]];
        testing::run(body, &mut buffers).unwrap();
        let found = testing::numbers(&buffers[0], u32::from_le_bytes);
        (0..32u32).for_each(|lane| assert_eq!(found[lane as usize], (lane ^ 1) + (0xffff << (lane & 16))));
    }
}
