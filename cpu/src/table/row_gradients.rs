//! Gradients of the used rows of a table: entries sorted by the row that they name, and summed row by row in their order.

use rayon::prelude::*;

use crate::Result;
use crate::numbers::{add_scaled, vectorised};
use crate::shape::number;

/// The gradient of a table's used rows; all others' is zero.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RowGradients {
    /// Used rows, ascending, each once.
    pub rows: Vec<u32>,
    /// `[rows, width]`.
    pub numbers: Vec<f32>,
    /// Width of a row.
    pub width: usize,
}

/// Entries by the row that they name.
pub(crate) struct Grouped {
    /// Used rows, ascending.
    pub rows: Vec<u32>,
    /// Where each row's entries begin, and where the last one's end.
    starts: Vec<u32>,
    /// Entries, row by row, those of a row ascending.
    entries: Vec<u32>,
}

/// An entry, and the row that it names.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Named {
    pub row: u32,
    pub entry: u32,
}

/// Groups entries, ascending, by row: a radix sort, which leaves those of a row in their order.
pub(crate) fn group(named: Vec<Named>) -> Grouped {
    let sorted = sort(named);
    let mut grouped = Grouped { rows: Vec::new(), starts: Vec::new(), entries: Vec::with_capacity(sorted.len()) };
    for (at, Named { row, entry }) in sorted.into_iter().enumerate() {
        if grouped.rows.last() != Some(&row) {
            grouped.rows.push(row);
            grouped.starts.push(at as u32);
        }
        grouped.entries.push(entry);
    }
    grouped.starts.push(grouped.entries.len() as u32);
    grouped
}

/// Bits of a digit: its counts fit the first cache.
const DIGIT: u32 = 11;

/// By row, from its last digit to the first that some row has.
fn sort(mut named: Vec<Named>) -> Vec<Named> {
    let largest = named.iter().map(|named| named.row).max().unwrap_or(0);
    let mut sorted = vec![Named::default(); named.len()];
    for shift in (0..u32::BITS - largest.leading_zeros()).step_by(DIGIT as usize) {
        let digit = |named: &Named| (named.row >> shift) as usize % (1 << DIGIT);
        let mut places = [0u32; 1 << DIGIT];
        named.iter().for_each(|named| places[digit(named)] += 1);
        let mut sum = 0;
        for place in &mut places {
            (*place, sum) = (sum, sum + *place);
        }
        for named in &named {
            let place = &mut places[digit(named)];
            sorted[*place as usize] = *named;
            *place += 1;
        }
        std::mem::swap(&mut named, &mut sorted);
    }
    named
}

impl Grouped {
    /// The sum of what `add`, which must be inlined, adds to a row for each of its entries.
    pub fn sum(self, width: usize, add: impl Fn(u32, &mut [f32]) + Sync) -> RowGradients {
        let mut numbers = vec![0.0; self.rows.len() * width];
        numbers.par_chunks_exact_mut(width).zip(self.starts.par_windows(2)).with_min_len(64).for_each(|(sum, ends)| {
            vectorised!({
                for &entry in &self.entries[ends[0] as usize..ends[1] as usize] {
                    add(entry, sum);
                }
            });
        });
        RowGradients { rows: self.rows, numbers, width }
    }
}

impl RowGradients {
    /// Each used row with its gradient.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &[f32])> {
        self.rows.iter().copied().zip(self.numbers.chunks_exact(self.width.max(1)))
    }

    /// The sum of the gradients that several layers, or several passes, have for one table.
    ///
    /// # Errors
    /// Gradients of rows of several widths.
    pub fn sum(all: &[&Self]) -> Result<Self> {
        let width = all.first().map_or(0, |first| first.width);
        all.iter().try_for_each(|one| number("width of row gradients", one.width, width))?;
        let places: Vec<(usize, usize)> =
            all.iter().enumerate().flat_map(|(at, one)| (0..one.rows.len()).map(move |row| (at, row))).collect();
        let named =
            |(entry, &(at, row)): (usize, &(usize, usize))| Named { row: all[at].rows[row], entry: entry as u32 };
        let grouped = group(places.iter().enumerate().map(named).collect());
        Ok(grouped.sum(
            width,
            #[inline(always)]
            |entry, sum| {
                let (at, row) = places[entry as usize];
                add_scaled(sum, 1.0, &all[at].numbers[row * width..][..width]);
            },
        ))
    }
}
