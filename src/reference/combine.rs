//! Combine: which pairs of a kept row and a kept column are chosen.
//!
//! UltraMem: `s_k = S_row[i]ᵀ · C_k · S_col[j]`, one score per core, judged by their sum. Product keys: `S_row[i] +
//! S_col[j]`, and a softmax over the chosen. Of the `top_m²` pairs of each head the `top_m` with the largest total are
//! chosen; the slot of a pair is `i · side_keys + j`.

use rayon::prelude::*;

use super::{below, length, numbers, selection_order, whole_rows};
use crate::{MemoryConfig, Result, Weight, Weights};

use super::Kept;

/// The slots that [`combine`] chooses, largest total first; of equal totals the smaller slot first, NaN last.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Chosen {
    /// Before the shuffle: `[tokens, heads, top_m]`.
    pub slots: Vec<u32>,
    /// `[tokens, heads, top_m, cores]`; for product keys after the softmax.
    pub scores: Vec<f64>,
    /// `[tokens, heads, top_m]`; for product keys before the softmax.
    pub totals: Vec<f64>,
}

/// Chooses the `top_m` best pairs of kept keys for every token and head (arXiv 2411.12364 section 3.1, with
/// multi-core scoring; arXiv 1907.05242 section 3.2).
///
/// # Errors
/// [`Error::Tensor`](crate::Error::Tensor) or [`Error::Length`](crate::Error::Length) if `weights` do not fit `config`,
/// or `kept` has other lengths than [`Kept`] says or a key that is not below `side_keys`.
pub fn combine(config: &MemoryConfig, weights: &Weights<'_>, kept: &Kept) -> Result<Chosen> {
    weights.check(config)?;
    let keys_width = 2 * config.top_m;
    let pairs =
        whole_rows("kept.keys", kept.keys.len(), "heads · 2 · top_m", config.heads * keys_width)? * config.heads;
    let scores_width = keys_width * config.tucker_rank;
    length("kept.scores", kept.scores.len(), pairs * scores_width)?;
    below("kept.keys", &kept.keys, config.side_keys)?;
    let cores = numbers(weights, Weight::Cores);
    let of_head = |(at, (keys, scores)): (usize, (_, _))| {
        choose(&Grid { config, cores: &cores, head: at % config.heads, keys, scores })
    };
    let grids = kept.keys.par_chunks_exact(keys_width).zip(kept.scores.par_chunks_exact(scores_width));
    let heads: Vec<_> = grids.enumerate().map(of_head).collect();
    let mut chosen = Chosen::default();
    for head in heads {
        chosen.slots.extend(head.slots);
        chosen.scores.extend(head.scores);
        chosen.totals.extend(head.totals);
    }
    Ok(chosen)
}

/// The kept keys of one token and head, both sides.
struct Grid<'a> {
    config: &'a MemoryConfig,
    /// `[cores, heads, tucker_rank, tucker_rank]`.
    cores: &'a [f64],
    head: usize,
    /// `[2, top_m]`.
    keys: &'a [u32],
    /// `[2, top_m, tucker_rank]`.
    scores: &'a [f64],
}

impl Grid<'_> {
    /// The slot of the pair of the kept row `i` and the kept column `j`.
    fn slot(&self, i: usize, j: usize) -> u32 {
        let (row, column) = (self.keys[i] as usize, self.keys[self.config.top_m + j] as usize);
        (row * self.config.side_keys + column) as u32
    }

    /// The scores of the pair, one a core; for product keys the sum of both sides.
    fn pair_scores(&self, i: usize, j: usize) -> Vec<f64> {
        let rank = self.config.tucker_rank;
        let row = &self.scores[i * rank..][..rank];
        let column = &self.scores[(self.config.top_m + j) * rank..][..rank];
        if !self.config.tucker() {
            return vec![row[0] + column[0]];
        }
        (0..self.config.cores).map(|core| self.bilinear(core, row, column)).collect()
    }

    /// `rowᵀ · C_core · column`.
    fn bilinear(&self, core: usize, row: &[f64], column: &[f64]) -> f64 {
        let rank = self.config.tucker_rank;
        let matrix = &self.cores[(core * self.config.heads + self.head) * rank * rank..][..rank * rank];
        let mut sum = 0.0;
        for (a, row) in row.iter().enumerate() {
            for (b, column) in column.iter().enumerate() {
                sum += row * matrix[a * rank + b] * column;
            }
        }
        sum
    }
}

/// The best `top_m` pairs of one grid.
fn choose(grid: &Grid<'_>) -> Chosen {
    let top_m = grid.config.top_m;
    let mut pairs = Vec::with_capacity(top_m * top_m);
    for i in 0..top_m {
        for j in 0..top_m {
            pairs.push((grid.pair_scores(i, j).iter().sum::<f64>(), grid.slot(i, j), i, j));
        }
    }
    pairs.sort_by(|a, b| selection_order(a.0, b.0).then(a.1.cmp(&b.1)));
    pairs.truncate(top_m);
    let scores = if grid.config.tucker() {
        pairs.iter().flat_map(|pair| grid.pair_scores(pair.2, pair.3)).collect()
    } else {
        softmax(pairs.iter().map(|pair| pair.0))
    };
    let totals = pairs.iter().map(|pair| pair.0).collect();
    Chosen { slots: pairs.iter().map(|pair| pair.1).collect(), scores, totals }
}

/// The softmax of `totals`, of which the first is the largest.
fn softmax(totals: impl Iterator<Item = f64> + Clone) -> Vec<f64> {
    let largest = totals.clone().next().unwrap_or(0.0);
    let powers: Vec<f64> = totals.map(|total| (total - largest).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.iter().map(|power| power / sum).collect()
}
