//! What wakes a slot: the text before each position that reads it, and what those texts have in common.
//!
//! A slot's theme is the ending (one to five bytes) that its positions share more often than chance would have it: the one
//! with the largest `n · ln(share among the slot's positions / share in the text)`, `n` being the slot's positions with it.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

/// A slot read at a position of the text.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Firing {
    /// The position: a row of the input, a byte of the text.
    pub position: usize,
    /// The slot's total score there.
    pub score: f32,
}

/// A slot and what its positions have in common.
#[derive(Debug, Clone)]
pub struct Theme {
    /// The slot, before the shuffle.
    pub slot: u32,
    /// Where it is read, highest score first.
    pub firings: Vec<Firing>,
    /// The ending that is typical of it.
    pub ending: Vec<u8>,
    /// How many of its positions have that ending.
    pub matching: usize,
    /// The share of all positions that have it.
    pub chance: f64,
    gain: f64,
}

impl Theme {
    /// Mean of the total scores.
    pub fn mean_score(&self) -> f64 {
        self.firings.iter().map(|firing| f64::from(firing.score)).sum::<f64>() / self.firings.len() as f64
    }
}

/// The text that the rows of an input came from, a byte a row, in independent sequences.
#[derive(Debug, Clone, Copy)]
pub struct Text<'a> {
    /// The bytes.
    pub bytes: &'a [u8],
    /// Bytes per sequence: no row knows of bytes before its own.
    pub sequence: usize,
}

impl<'a> Text<'a> {
    /// Up to `count` bytes that end with the one at `position`, all of its sequence.
    pub fn before(&self, position: usize, count: usize) -> &'a [u8] {
        let start = position / self.sequence * self.sequence;
        let end = (position + 1).min(self.bytes.len());
        &self.bytes[start.max(end.saturating_sub(count)).min(end)..end]
    }

    /// Up to `count` bytes after `position`, all of its sequence.
    pub fn after(&self, position: usize, count: usize) -> &'a [u8] {
        let last = ((position / self.sequence + 1) * self.sequence).min(self.bytes.len());
        let start = (position + 1).min(last);
        &self.bytes[start..last.min(start + count)]
    }

    fn endings(&self, position: usize) -> impl Iterator<Item = &'a [u8]> {
        let longest = self.before(position, LONGEST);
        (1..=longest.len()).map(|length| &longest[longest.len() - length..])
    }
}

const LONGEST: usize = 5;
/// Positions that a slot needs before one may speak of a theme, and the share of them that it must cover.
const FEWEST: usize = 8;
const PURE: f64 = 0.8;

/// Every slot that is read, with the positions that read it; one firing a position, whichever head it is.
pub fn firings(slots: &[u32], totals: &[f32], entries: usize) -> BTreeMap<u32, Vec<Firing>> {
    let mut found: BTreeMap<u32, Vec<Firing>> = BTreeMap::new();
    for (at, (&slot, &score)) in slots.iter().zip(totals).enumerate() {
        let position = at / entries;
        let firings = found.entry(slot).or_default();
        if firings.last().is_none_or(|last| last.position != position) {
            firings.push(Firing { position, score });
        }
    }
    found
}

/// The slots with the clearest themes, `each` with an ending of one byte, of two and of more, no two with the same one.
/// Busy slots come first, for a large gain takes many positions.
pub fn clearest(firings: &BTreeMap<u32, Vec<Firing>>, text: &Text<'_>, each: usize) -> Vec<Theme> {
    let mut common: HashMap<&[u8], usize> = HashMap::new();
    for ending in (0..text.bytes.len()).flat_map(|position| text.endings(position)) {
        *common.entry(ending).or_default() += 1;
    }
    let busy = firings.iter().filter(|(_, firings)| firings.len() >= FEWEST);
    let mut themes: Vec<Theme> = busy.filter_map(|(&slot, firings)| theme(slot, firings, text, &common)).collect();
    themes.retain(|theme| theme.matching as f64 >= PURE * theme.firings.len() as f64);
    themes.sort_by(|a, b| b.gain.total_cmp(&a.gain).then(a.slot.cmp(&b.slot)));
    let mut chosen: Vec<Theme> = Vec::new();
    for theme in themes {
        let alike = chosen.iter().filter(|other| length_class(other) == length_class(&theme)).count();
        if alike < each && chosen.iter().all(|other| other.ending != theme.ending) {
            chosen.push(theme);
        }
    }
    chosen
}

fn length_class(theme: &Theme) -> usize {
    theme.ending.len().min(3)
}

fn theme(slot: u32, firings: &[Firing], text: &Text<'_>, common: &HashMap<&[u8], usize>) -> Option<Theme> {
    let mut here: BTreeMap<&[u8], usize> = BTreeMap::new();
    for ending in firings.iter().flat_map(|firing| text.endings(firing.position)) {
        *here.entry(ending).or_default() += 1;
    }
    let chance = |ending: &[u8]| common.get(ending).map_or(1.0, |&count| count as f64 / text.bytes.len() as f64);
    let gain = |ending: &[u8], matching: usize| {
        matching as f64 * (matching as f64 / firings.len() as f64 / chance(ending)).ln()
    };
    let gains = here.into_iter().map(|(ending, matching)| (gain(ending, matching), ending, matching));
    let (gain, ending, matching) = gains.max_by(|a, b| a.0.total_cmp(&b.0))?;
    let mut firings = firings.to_vec();
    firings.sort_by(|a, b| b.score.total_cmp(&a.score).then(a.position.cmp(&b.position)));
    Some(Theme { slot, firings, ending: ending.to_vec(), matching, chance: chance(ending), gain })
}

/// The bytes as one printable character each.
pub fn printable(bytes: &[u8]) -> String {
    let printable = |&byte: &u8| match byte {
        b'\n' => '⏎',
        b' '..=b'~' => char::from(byte),
        _ => '·',
    };
    bytes.iter().map(printable).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_stays_in_its_sequence() {
        let text = Text { bytes: b"abcdefgh", sequence: 4 };
        assert_eq!((text.before(5, 3), text.after(5, 9)), (&b"ef"[..], &b"gh"[..]));
        assert_eq!((text.before(3, 9), text.after(3, 9)), (&b"abcd"[..], &b""[..]));
    }

    #[test]
    fn the_theme_is_the_typical_ending() {
        let bytes = b"xa".repeat(8).into_iter().chain(b"ya".repeat(8)).chain(b"qb".repeat(8)).collect::<Vec<_>>();
        let text = Text { bytes: &bytes, sequence: bytes.len() };
        let slots: Vec<u32> =
            (0..bytes.len()).map(|at| if bytes[..=at].ends_with(b"ya") { 7 } else { at as u32 + 100 }).collect();
        let found = firings(&slots, &vec![1.0; slots.len()], 1);
        let themes = clearest(&found, &text, 3);
        assert_eq!(themes.len(), 1);
        assert_eq!((themes[0].slot, themes[0].firings.len(), themes[0].matching), (7, 8, 8));
        assert_eq!(themes[0].ending, b"ya");
    }

    #[test]
    fn two_heads_at_one_position_count_once() {
        let found = firings(&[3, 3, 4, 3], &[2.0, 1.0, 1.0, 1.0], 2);
        assert_eq!((found[&3].len(), found[&4].len()), (2, 1));
    }
}
