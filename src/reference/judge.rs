//! Judging chosen slots by their scores: where two totals are equal but for rounding, two right implementations may swap their slots, or
//! keep one of them and not the other.

use super::{Chosen, backward::score_slots, length};
use crate::{MemoryConfig, Result, Weights};

/// How chosen slots compare with expected ones, place by place.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Judged {
    /// Places with the expected slot.
    pub equal: usize,
    /// Places with another slot whose total is the expected one's but for rounding.
    pub swapped: usize,
    /// The places with a slot of another total, with one that there is not, or with one that its head has chosen already; ascending.
    pub wrong: Vec<usize>,
    /// The tokens of which some slot is not the expected one, ascending.
    pub tokens: Vec<usize>,
}

impl Judged {
    /// Whether no place is wrong.
    pub fn right(&self) -> bool {
        self.wrong.is_empty()
    }
}

/// Judges `found` against `expected`, both with slots and totals `[tokens, heads, top_m]`: totals may differ by `near` times the largest of
/// their head.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) for lengths that are not each other's or not whole tokens.
pub fn judge_chosen(config: &MemoryConfig, found: &Chosen, expected: &Chosen, near: f64) -> Result<Judged> {
    let entries = config.heads * config.top_m;
    let places = expected.slots.len();
    length("expected slots", places, places.next_multiple_of(entries))?;
    length("slots", found.slots.len(), places)?;
    length("totals", found.totals.len(), places)?;
    length("expected totals", expected.totals.len(), places)?;
    let mut judged = Judged::default();
    for first in (0..places).step_by(config.top_m) {
        let head = first..first + config.top_m;
        let scale = expected.totals[head.clone()].iter().fold(0.0, |scale: f64, total| scale.max(total.abs()));
        for place in head.clone() {
            let (slot, total) = (found.slots[place], found.totals[place]);
            let again = found.slots[first..place].contains(&slot);
            let equal = slot == expected.slots[place];
            let close = (slot as usize) < config.slots() && (total - expected.totals[place]).abs() <= near * scale;
            match (equal, close) {
                (true, _) if !again => judged.equal += 1,
                (false, true) if !again => judged.swapped += 1,
                _ => judged.wrong.push(place),
            }
            if !equal && judged.tokens.last() != Some(&(place / entries)) {
                judged.tokens.push(place / entries);
            }
        }
    }
    Ok(judged)
}

/// Judges `found` against `expected`, both `[tokens, heads, top_m]`, by their totals for `input` `[tokens, hidden_size]`, as
/// [`judge_chosen`].
///
/// # Errors
/// [`Error::Tensor`](crate::Error::Tensor) or [`Error::Length`](crate::Error::Length) for weights that do not fit `config`, wrong lengths, or an
/// expected slot that is not below `side_keys²`.
pub fn judge(
    config: &MemoryConfig,
    weights: &Weights<'_>,
    input: &[f32],
    found: &[u32],
    expected: &[u32],
    near: f64,
) -> Result<Judged> {
    length("slots", found.len(), expected.len())?;
    let expected = score_slots(config, weights, input, expected)?;
    // A slot that there is not has no total; it is wrong wherever it is.
    let last = (config.slots() - 1) as u32;
    let clamped: Vec<u32> = found.iter().map(|&slot| slot.min(last)).collect();
    let totals = score_slots(config, weights, input, &clamped)?.totals;
    judge_chosen(config, &Chosen { slots: found.to_vec(), scores: Vec::new(), totals }, &expected, near)
}
