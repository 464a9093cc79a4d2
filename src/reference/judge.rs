//! Judging chosen slots by their scores: where two totals are equal but for rounding, two right implementations may swap their slots, or
//! keep one of them and not the other.

use super::backward::score_slots;
use super::length;
use crate::{MemoryConfig, Result, Weights};

/// How chosen slots compare with expected ones, place by place.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Judged {
    /// Places with the expected slot.
    pub equal: usize,
    /// Places with another slot whose total is the expected one's but for rounding.
    pub swapped: usize,
    /// Places with a slot of another total, with one that there is not, or with one that its head has chosen already.
    pub wrong: usize,
    /// The tokens of which some slot is not the expected one, ascending.
    pub tokens: Vec<usize>,
}

impl Judged {
    /// Whether no place is wrong.
    pub fn right(&self) -> bool {
        self.wrong == 0
    }
}

/// Judges `found` against `expected`, both `[tokens, heads, top_m]`, for `input` `[tokens, hidden_size]`: totals may differ by `near` times the
/// largest of their head.
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
    let (entries, width) = (config.heads * config.top_m, config.hidden_size);
    let other = |&token: &usize| found[token * entries..][..entries] != expected[token * entries..][..entries];
    let tokens: Vec<usize> = (0..expected.len() / entries).filter(other).collect();
    let of = |slots: &[u32]| -> Vec<u32> {
        tokens.iter().flat_map(|token| &slots[token * entries..][..entries]).copied().collect()
    };
    let rows: Vec<f32> = tokens.iter().flat_map(|token| &input[token * width..][..width]).copied().collect();
    let (found, expected_slots) = (of(found), of(expected));
    // A slot that there is not has no total; it is wrong wherever it is.
    let last = (config.slots() - 1) as u32;
    let clamped: Vec<u32> = found.iter().map(|&slot| slot.min(last)).collect();
    let totals = score_slots(config, weights, &rows, &clamped)?.totals;
    let best = score_slots(config, weights, &rows, &expected_slots)?.totals;
    let mut judged = Judged { equal: expected.len() - expected_slots.len(), tokens, ..Judged::default() };
    for head in 0..found.len() / config.top_m {
        let places = head * config.top_m..(head + 1) * config.top_m;
        let scale = best[places.clone()].iter().fold(0.0, |scale: f64, total| scale.max(total.abs()));
        for place in places.clone() {
            let again = found[places.start..place].contains(&found[place]);
            let close = found[place] <= last && (totals[place] - best[place]).abs() <= near * scale;
            match (found[place] == expected_slots[place], close && !again) {
                (true, _) => judged.equal += 1,
                (false, true) => judged.swapped += 1,
                (false, false) => judged.wrong += 1,
            }
        }
    }
    Ok(judged)
}
