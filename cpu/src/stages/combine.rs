//! Combine: of the `top_m²` pairs of kept keys of a head the `top_m` with the largest total, largest first.
//!
//! Tucker: `s_k = S_row[i]ᵀ · C_k · S_col[j]`, judged by their sum, `S_row[i]ᵀ · (Σ_k C_k) · S_col[j]`. Additive: `S_row[i] + S_col[j]`, and a softmax over
//! the chosen. The slot of a pair is `i · side_keys + j`; of equal totals the smaller slot comes first.
//!
//! A task takes rows of one token and head each. Scratch: 4 bytes a pair, and what selection takes.

use rayon::prelude::*;

use crate::numbers::vectorised;
use crate::select::{Selection, order_key};
use crate::stages::given::Given;
use crate::stages::query::sum_of;
use crate::stages::score::{Kept, KeptGradients};
use crate::{Layer, Result};

/// The slots that each head chooses.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Chosen {
    /// Before the shuffle, largest total first: `[tokens, heads, top_m]`.
    pub slots: Vec<u32>,
    /// `[tokens, heads, top_m, cores]`; for additive scores after the softmax.
    pub scores: Vec<f32>,
}

/// The `top_m` best pairs of kept keys for each token and head.
///
/// # Errors
/// As [all stages](super).
pub fn forward(layer: &Layer<'_>, kept: &Kept) -> Result<Chosen> {
    let shape = &layer.shape;
    Given::rows(shape, "kept keys", kept.keys.len(), "a token's", 2 * shape.entries())?
        .kept(&kept.keys, &kept.scores)?;
    let (m, rank, cores) = (shape.top_m, shape.tucker_rank, shape.cores);
    let rows = kept.keys.len() / (2 * m);
    let mut chosen = Chosen { slots: vec![0; rows * m], scores: vec![0.0; rows * m * cores] };
    let sides = kept.keys.par_chunks_exact(2 * m).zip(kept.scores.par_chunks_exact(2 * m * rank));
    let out = chosen.slots.par_chunks_exact_mut(m).zip(chosen.scores.par_chunks_exact_mut(m * cores));
    sides.zip(out).enumerate().for_each_init(Scratch::default, |scratch, (row, ((keys, sides), (slots, scores)))| {
        let grid = Grid { layer, head: row % shape.heads, keys, sides };
        vectorised!(grid.choose(scratch, slots, scores));
    });
    Ok(chosen)
}

#[derive(Default)]
struct Scratch {
    selection: Selection,
    /// A row of totals, and the order of all.
    totals: Vec<f32>,
    order: Vec<u32>,
    /// The columns' scores, rank by rank.
    columns: Vec<f32>,
    best: Vec<u32>,
    sorted: Vec<u64>,
    /// The chosen pairs' scores on both sides, `[2, tucker_rank, top_m]`, and their score of one core.
    pairs: Vec<f32>,
    sums: Vec<f32>,
}

/// The kept keys of one token and head.
struct Grid<'a> {
    layer: &'a Layer<'a>,
    head: usize,
    /// `[2, top_m]`.
    keys: &'a [u32],
    /// `[2, top_m, tucker_rank]`.
    sides: &'a [f32],
}

impl Grid<'_> {
    #[inline(always)]
    fn choose(&self, scratch: &mut Scratch, slots: &mut [u32], scores: &mut [f32]) {
        let m = self.layer.shape.top_m;
        self.order(scratch);
        scratch.best.resize(m, 0);
        scratch.selection.best(&scratch.order, &mut scratch.best);
        // The largest first, of equal ones the smaller slot.
        let sortable = |&pair: &u32| u64::from(!scratch.order[pair as usize]) << 32 | u64::from(pair);
        scratch.sorted.clear();
        scratch.sorted.extend(scratch.best.iter().map(sortable));
        scratch.sorted.sort_unstable();
        self.gather(scratch, slots);
        if self.layer.shape.tucker {
            self.score(scratch, scores);
        } else {
            let (rows, columns) = scratch.pairs.split_at(m);
            for ((score, row), column) in scores.iter_mut().zip(rows).zip(columns) {
                *score = row + column;
            }
            softmax(scores);
        }
    }

    /// The slots of the sorted pairs, and their scores on both sides, rank by rank.
    #[inline(always)]
    fn gather(&self, scratch: &mut Scratch, slots: &mut [u32]) {
        let (m, rank) = (self.layer.shape.top_m, self.layer.shape.tucker_rank);
        scratch.pairs.resize(2 * rank * m, 0.0);
        for (at, (&pair, slot)) in scratch.sorted.iter().zip(slots).enumerate() {
            let (i, j) = (pair as u32 / m as u32, pair as u32 % m as u32);
            let (i, j) = (i as usize, m + j as usize);
            *slot = self.keys[i] * self.layer.shape.side_keys as u32 + self.keys[j];
            for r in 0..rank {
                scratch.pairs[r * m + at] = self.sides[i * rank + r];
                scratch.pairs[(rank + r) * m + at] = self.sides[j * rank + r];
            }
        }
    }

    /// The totals of all pairs, as they are selected.
    #[inline(always)]
    fn order(&self, scratch: &mut Scratch) {
        let (m, rank) = (self.layer.shape.top_m, self.layer.shape.tucker_rank);
        let core = self.layer.total_core(self.head);
        let (rows, columns) = self.sides.split_at(m * rank);
        scratch.order.resize(m * m, 0);
        scratch.totals.resize(m, 0.0);
        scratch.columns.resize(m * rank, 0.0);
        for (r, by_rank) in scratch.columns.chunks_exact_mut(m).enumerate() {
            by_rank.iter_mut().zip(columns[r..].iter().step_by(rank)).for_each(|(out, x)| *out = *x);
        }
        for (row, order) in rows.chunks_exact(rank).zip(scratch.order.chunks_exact_mut(m)) {
            if core.is_empty() {
                scratch.totals.iter_mut().zip(&scratch.columns).for_each(|(total, column)| *total = row[0] + column);
            } else {
                for (b, column) in scratch.columns.chunks_exact(m).enumerate() {
                    let factor: f32 = row.iter().enumerate().map(|(a, row)| row * core[a * rank + b]).sum();
                    add_or_set(b > 0, &mut scratch.totals, factor, column);
                }
            }
            order.iter_mut().zip(&scratch.totals).for_each(|(order, &total)| *order = order_key(total));
        }
    }

    /// `S_row[i]ᵀ · C_k · S_col[j]` of the gathered pairs into `[top_m, cores]`, pairs side by side in vectors.
    #[inline(always)]
    fn score(&self, scratch: &mut Scratch, out: &mut [f32]) {
        let (m, rank, cores) = (self.layer.shape.top_m, self.layer.shape.tucker_rank, self.layer.shape.cores);
        let (rows, columns) = scratch.pairs.split_at(rank * m);
        scratch.sums.resize(m, 0.0);
        for core in 0..cores {
            let matrix = self.layer.core(core, self.head);
            for (a, row) in rows.chunks_exact(m).enumerate() {
                for (b, column) in columns.chunks_exact(m).enumerate() {
                    add_or_set(b > 0, &mut scratch.totals, matrix[a * rank + b], column);
                }
                for ((sum, row), total) in scratch.sums.iter_mut().zip(row).zip(&scratch.totals) {
                    *sum = if a > 0 { *sum + row * total } else { row * total };
                }
            }
            for (out, sum) in out[core..].iter_mut().step_by(cores).zip(&scratch.sums) {
                *out = *sum;
            }
        }
    }
}

/// `sums += factor · numbers`, or `sums = factor · numbers`.
#[inline(always)]
fn add_or_set(add: bool, sums: &mut [f32], factor: f32, numbers: &[f32]) {
    if add {
        for (sum, x) in sums.iter_mut().zip(numbers) {
            *sum += factor * x;
        }
    } else {
        for (sum, x) in sums.iter_mut().zip(numbers) {
            *sum = factor * x;
        }
    }
}

/// In place; the first is the largest.
#[inline(always)]
fn softmax(totals: &mut [f32]) {
    let largest = totals[0];
    totals.iter_mut().for_each(|total| *total = (*total - largest).exp());
    let sum: f32 = totals.iter().sum();
    totals.iter_mut().for_each(|total| *total /= sum);
}

/// What comes back through combine.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct CombineGradients {
    /// Of the kept keys' scores.
    pub kept: KeptGradients,
    /// `[cores, heads, tucker_rank, tucker_rank]`; empty for additive scores.
    pub cores: Vec<f32>,
}

/// Rows of a token and a head whose shares of the cores' gradient are summed in one task; a multiple of the heads is taken.
const CHUNK: usize = 64;

/// From the slots' scores `[tokens, heads, top_m, cores]` to the kept keys' and the cores.
///
/// # Errors
/// As [all stages](super), and slots that are no pairs of kept keys.
pub fn backward(layer: &Layer<'_>, kept: &Kept, chosen: &Chosen, grad_scores: &[f32]) -> Result<CombineGradients> {
    let shape = &layer.shape;
    let given = Given::rows(shape, "kept keys", kept.keys.len(), "a token's", 2 * shape.entries())?;
    given.kept(&kept.keys, &kept.scores)?;
    given.chosen(&chosen.slots, &chosen.scores)?;
    given.scores(grad_scores)?;
    given.slots_of_kept(&kept.keys, &chosen.slots)?;
    let (m, rank, cores) = (shape.top_m, shape.tucker_rank, shape.cores);
    let of_kept = KeptGradients { scores: vec![0.0; kept.scores.len()], used: vec![false; kept.keys.len()] };
    let mut out = CombineGradients { kept: of_kept, cores: Vec::new() };
    let rows = CHUNK * shape.heads;
    let chunks = out.kept.scores.par_chunks_mut(rows * 2 * m * rank).zip(out.kept.used.par_chunks_mut(rows * 2 * m));
    let sums: Vec<_> = chunks
        .enumerate()
        .map(|(chunk, (sides, used))| {
            let mut sum = vec![0.0; layer.weights.cores.len()];
            let of_rows = sides.chunks_exact_mut(2 * m * rank).zip(used.chunks_exact_mut(2 * m));
            for (at, (grad, used)) in of_rows.enumerate() {
                let row = chunk * rows + at;
                let (keys, sides) =
                    (&kept.keys[row * 2 * m..][..2 * m], &kept.scores[row * 2 * m * rank..][..2 * m * rank]);
                let grid = Grid { layer, head: row % shape.heads, keys, sides };
                let scores = &chosen.scores[row * m * cores..][..m * cores];
                let grads = &grad_scores[row * m * cores..][..m * cores];
                grid.backward(&chosen.slots[row * m..][..m], scores, grads, grad, used, &mut sum);
            }
            sum
        })
        .collect();
    out.cores = sum_of(layer.weights.cores.len(), &sums);
    Ok(out)
}

impl Grid<'_> {
    /// Adds to the gradients of the kept keys' scores, and to those of the cores.
    fn backward(
        &self,
        slots: &[u32],
        scores: &[f32],
        grad_scores: &[f32],
        grad: &mut [f32],
        used: &mut [bool],
        cores: &mut [f32],
    ) {
        let shape = &self.layer.shape;
        let (m, n, rank) = (shape.top_m, shape.side_keys as u32, shape.tucker_rank);
        let mean: f32 = scores.iter().zip(grad_scores).map(|(score, grad)| score * grad).sum();
        for (entry, &slot) in slots.iter().enumerate() {
            let i = self.place(&self.keys[..m], slot / n);
            let j = m + self.place(&self.keys[m..], slot % n);
            (used[i], used[j]) = (true, true);
            if !shape.tucker {
                let through = scores[entry] * (grad_scores[entry] - mean);
                grad[i] += through;
                grad[j] += through;
                continue;
            }
            for (core, &g) in grad_scores[entry * shape.cores..][..shape.cores].iter().enumerate() {
                let first = self.layer.core_at(core, self.head);
                for a in 0..rank {
                    for b in 0..rank {
                        let (row, column) = (self.sides[i * rank + a], self.sides[j * rank + b]);
                        let weight = self.layer.weights.cores[first + a * rank + b];
                        cores[first + a * rank + b] += g * row * column;
                        grad[i * rank + a] += g * weight * column;
                        grad[j * rank + b] += g * weight * row;
                    }
                }
            }
        }
    }

    /// Where a key is among the kept ones, which are ascending.
    fn place(&self, keys: &[u32], key: u32) -> usize {
        keys.partition_point(|&kept| kept < key)
    }
}
