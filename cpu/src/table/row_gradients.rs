//! Gradients of the used rows of a table: entries sorted by the row that they name, and summed row by row in their order.

use rayon::prelude::*;

use crate::Result;
use crate::numbers::vectorised;
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

/// Sorts entries by row. `pairs`: each the row in the upper half, the entry in the lower one.
pub(crate) fn group(mut pairs: Vec<u64>) -> Grouped {
    pairs.par_sort_unstable();
    let mut grouped = Grouped { rows: Vec::new(), starts: Vec::new(), entries: Vec::with_capacity(pairs.len()) };
    for pair in pairs {
        let (row, entry) = ((pair >> 32) as u32, pair as u32);
        if grouped.rows.last() != Some(&row) {
            grouped.rows.push(row);
            grouped.starts.push(grouped.entries.len() as u32);
        }
        grouped.entries.push(entry);
    }
    grouped.starts.push(grouped.entries.len() as u32);
    grouped
}

impl Grouped {
    /// The sum of what `add` adds to a row for each of its entries.
    pub fn sum(self, width: usize, add: impl Fn(u32, &mut [f32]) + Sync) -> RowGradients {
        let mut numbers = vec![0.0; self.rows.len() * width];
        numbers.par_chunks_exact_mut(width).zip(self.starts.par_windows(2)).with_min_len(64).for_each(|(sum, ends)| {
            vectorised!(self.entries[ends[0] as usize..ends[1] as usize].iter().for_each(|&entry| add(entry, sum)));
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
    pub fn sum(all: &[Self]) -> Result<Self> {
        let width = all.first().map_or(0, |first| first.width);
        all.iter().try_for_each(|one| number("width of row gradients", one.width, width))?;
        let places: Vec<(usize, usize)> =
            all.iter().enumerate().flat_map(|(at, one)| (0..one.rows.len()).map(move |row| (at, row))).collect();
        let pair = |(entry, &(at, row)): (usize, &(usize, usize))| u64::from(all[at].rows[row]) << 32 | entry as u64;
        let grouped = group(places.iter().enumerate().map(pair).collect());
        Ok(grouped.sum(width, |entry, sum| {
            let (at, row) = places[entry as usize];
            sum.iter_mut().zip(&all[at].numbers[row * width..][..width]).for_each(|(sum, x)| *sum += x);
        }))
    }
}
