//! The exact best `m` of a row of scores, by threshold.
//!
//! Scores become integers in their order ([`order_key`]). The row is dealt out to a little more than `2 m` groups, whose largest are kept: the `m`-th
//! largest of those, or a little less, is a bound that at least `m` entries reach, and of random rows some `1.5 m` do. They are set apart, and bisected for
//! what exactly `m` reach; where a bound tells nothing, all entries are. Equal entries are taken from the front.
//!
//! Reads the row's keys twice. Scratch: 8 bytes an entry at most, and 4 a group.

/// The integer in whose order a score is selected: larger for a larger score, the same for both zeros, 0 for NaN alone.
#[inline(always)]
pub(crate) fn order_key(score: f32) -> u32 {
    let bits = (score + 0.0).to_bits();
    let key = bits ^ (((bits as i32 >> 31) as u32) | 0x8000_0000);
    if score.is_nan() { 0 } else { key }
}

/// Keys that are compared together.
const CHUNK: usize = 16;

/// What a selection works with, kept from row to row.
#[derive(Debug, Default)]
pub(crate) struct Selection {
    largest: Vec<u32>,
    keys: Vec<u32>,
    places: Vec<u32>,
    /// Entries that were set apart, the first of `keys` and `places`.
    count: usize,
}

impl Selection {
    /// The places of the `m` largest of `keys`, ascending, into `chosen`, which is `m` long; of equal ones the first.
    #[inline(always)]
    pub fn best(&mut self, keys: &[u32], chosen: &mut [u32]) {
        let m = chosen.len();
        let bound = self.bound(keys, m);
        self.set_apart(keys, bound);
        let (keys, places) = (&self.keys[..self.count], &self.places[..self.count]);
        let threshold = reached(keys, m, m, bound);
        let mut equal = m - count_from(keys, threshold.saturating_add(1)).min(m);
        let mut chosen = chosen.iter_mut();
        for (&key, &place) in keys.iter().zip(places) {
            let tie = key == threshold && equal > 0;
            equal -= usize::from(tie);
            if key > threshold || tie {
                chosen.next().into_iter().for_each(|chosen| *chosen = place);
            }
        }
    }

    /// A number that at least `m` keys reach.
    #[inline(always)]
    fn bound(&mut self, keys: &[u32], m: usize) -> u32 {
        // An odd number, so that a group of a row-by-row grid does not stay in one column.
        let groups = 2 * m + 1;
        if keys.len() < 2 * groups {
            return 0;
        }
        self.largest.clear();
        self.largest.resize(groups, 0);
        for row in keys.chunks(groups) {
            self.largest.iter_mut().zip(row).for_each(|(largest, &key)| *largest = (*largest).max(key));
        }
        reached(&self.largest, m, m + m / 8, 0)
    }

    /// The entries that reach `bound`.
    #[inline(always)]
    fn set_apart(&mut self, keys: &[u32], bound: u32) {
        if self.keys.len() < keys.len() {
            self.keys.resize(keys.len(), 0);
            self.places.resize(keys.len(), 0);
        }
        let mut count = 0;
        for (chunk, keys) in keys.chunks(CHUNK).enumerate() {
            // A byte an entry, so that a compiler makes one comparison of vectors of it.
            let mut reach = [0; CHUNK];
            reach.iter_mut().zip(keys).for_each(|(reach, &key)| *reach = u8::from(key >= bound));
            let mut reach = u128::from_le_bytes(reach);
            while reach != 0 {
                let at = (reach.trailing_zeros() / u8::BITS) as usize;
                self.keys[count] = keys[at];
                self.places[count] = (chunk * CHUNK + at) as u32;
                count += 1;
                reach &= reach - 1;
            }
        }
        self.count = count;
    }
}

/// A number that at least `n` and at most `most` of `keys` reach, by bisection; the `n`-th largest, where equal ones leave no such number. At least `n`
/// reach `low`.
#[inline(always)]
fn reached(keys: &[u32], n: usize, most: usize, low: u32) -> u32 {
    let (mut low, mut high) = (low, keys.iter().copied().fold(0, u32::max));
    while low < high {
        // The half that is rounded up: `middle` is above `low`.
        let middle = low + (high - low).div_ceil(2);
        let count = count_from(keys, middle);
        if count < n {
            high = middle - 1;
        } else {
            low = middle;
            if count <= most {
                break;
            }
        }
    }
    low
}

/// How many keys reach `bound`.
#[inline(always)]
fn count_from(keys: &[u32], bound: u32) -> usize {
    keys.iter().map(|&key| u32::from(key >= bound)).sum::<u32>() as usize
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// By sorting.
    fn expected(scores: &[f32], m: usize) -> Vec<u32> {
        let mut places: Vec<u32> = (0..scores.len() as u32).collect();
        places.sort_by(|&a, &b| {
            let (x, y) = (scores[a as usize], scores[b as usize]);
            y.partial_cmp(&x).unwrap_or_else(|| x.is_nan().cmp(&y.is_nan())).then(a.cmp(&b))
        });
        places.truncate(m);
        places.sort_unstable();
        places
    }

    fn best(scores: &[f32], m: usize) -> Vec<u32> {
        let keys: Vec<u32> = scores.iter().map(|&score| order_key(score)).collect();
        let mut chosen = vec![u32::MAX; m];
        Selection::default().best(&keys, &mut chosen);
        chosen
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn is_what_sorting_gives(
            scores in prop::collection::vec(prop_oneof![
                8 => -1e3f32..1e3,
                2 => (0..4u8).prop_map(f32::from),
                1 => prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1e-42, -1e38]),
            ], 1..700),
            part in 0.0..1.0f64,
        ) {
            let m = ((scores.len() as f64 * part) as usize).max(1);
            prop_assert_eq!(best(&scores, m), expected(&scores, m));
        }
    }

    #[test]
    fn rows_that_no_bound_helps() {
        for row in [
            vec![1.0; 600],
            vec![f32::NAN; 600],
            (0..600).map(|x| x as f32).collect::<Vec<_>>(),
            (0..600).rev().map(|x| x as f32).collect(),
            (0..600).map(|x| if x < 590 { f32::NAN } else { 1.0 }).collect(),
            (0..600).map(|x| if x % 2 == 0 { 0.0 } else { -0.0 }).collect(),
        ] {
            for m in [1, 16, 100, 600] {
                assert_eq!(best(&row, m), expected(&row, m));
            }
        }
    }
}
