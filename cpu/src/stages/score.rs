//! Score: the `top_m` keys of each side by approximate score, and all ranks of what is kept.
//!
//! `S_side[head, i, ρ] = q[side] · K̂[head, side, i, :, ρ]`, judged by `p_side[i] = q[side] · Σ_ρ w_side[head, ρ] · K̂[head, side, i, :, ρ]`. Both forms
//! of a key are rounded to the keys' type, as they are multiplied.
//!
//! A task takes a tile of tokens and one side of a head: a product with all its keys, then a selection a row. No score but those of the tile's is in
//! memory. Reads the projected keys once per tile, and `top_m · rank` keys a token.

use rayon::prelude::*;

use crate::norm::normalise;
use crate::numbers::{AHEAD, Aligned, Element, add_scaled, dots, prefetch, round, row_of, vectorised, with_slice};
use crate::panels::Panels;
use crate::select::{Selection, order_key};
use crate::shape::number;
use crate::stages::given::Given;
use crate::stages::query::{self, through_norm};
use crate::table::{Named, RowGradients, group};
use crate::{Layer, Result, Shape, Weights};

/// Tokens of a task.
const TILE: usize = 64;

/// Keys as the layer reads them: once for every change of the weights.
#[derive(Debug, Clone, Default)]
pub struct PreparedKeys {
    /// As they are scored, `[heads, 2, side_keys, tucker_rank, key_dim]`.
    scored: Aligned,
    /// As they are judged, `[side_keys, key_dim]` for each side of a head.
    judged: Vec<Panels>,
}

impl PreparedKeys {
    /// Normalises, projects and rounds the keys.
    pub fn new(shape: &Shape, weights: &Weights<'_>) -> Self {
        let (rank, width) = (shape.tucker_rank, shape.key_dim);
        let mut scored = keys_by_rank(shape, weights);
        if let Some(norm) = shape.keys_norm {
            scored.par_chunks_mut(64 * width).for_each(|keys| {
                vectorised!({
                    for key in keys.chunks_exact_mut(width) {
                        normalise(norm, &weights.keys_norm, key);
                    }
                });
            });
        }
        let of_sides = scored.par_chunks(shape.side_keys * rank * width);
        let judged = of_sides.enumerate().map(|(side, keys)| judged(shape, weights, side, keys)).collect();
        round(weights.keys.dtype(), &mut scored);
        Self { scored, judged }
    }

    /// All ranks of a key, `[tucker_rank, key_dim]`; `key` counts over heads and sides.
    fn ranks(&self, shape: &Shape, key: usize) -> &[f32] {
        let width = shape.tucker_rank * shape.key_dim;
        &self.scored[key * width..][..width]
    }
}

/// `Σ_ρ w_side[head, ρ] · K̂[.., ρ]` of the keys of one side; of additive scores the keys themselves.
fn judged(shape: &Shape, weights: &Weights<'_>, side: usize, keys: &[f32]) -> Panels {
    let (rank, width) = (shape.tucker_rank, shape.key_dim);
    let vectors = if side.is_multiple_of(2) { &weights.core_u } else { &weights.core_v };
    let vector = if shape.tucker { &vectors[side / 2 * rank..][..rank] } else { &[1.0] };
    let mut judged = vec![0.0; shape.side_keys * width];
    vectorised!({
        for (judged, key) in judged.chunks_exact_mut(width).zip(keys.chunks_exact(rank * width)) {
            for (key, &w) in key.chunks_exact(width).zip(vector) {
                add_scaled(judged, w, key);
            }
        }
    });
    round(weights.keys.dtype(), &mut judged);
    Panels::new(&judged, width)
}

/// `[heads, 2, side_keys, key_dim, tucker_rank]` with the last two swapped.
fn keys_by_rank(shape: &Shape, weights: &Weights<'_>) -> Aligned {
    let all: Vec<u32> = (0..shape.all_keys() as u32).collect();
    rows_by_rank(shape, weights, &all)
}

/// Some keys with their last two dimensions swapped, `[rows, tucker_rank, key_dim]`.
fn rows_by_rank(shape: &Shape, weights: &Weights<'_>, rows: &[u32]) -> Aligned {
    let (rank, width) = (shape.tucker_rank, shape.key_dim);
    let mut by_rank = Aligned::zeros(rows.len() * rank * width);
    by_rank.par_chunks_exact_mut(rank * width).zip(rows).with_min_len(64).for_each(|(out, &row)| {
        with_slice!(&weights.keys, Numbers, keys => {
            let key = &keys[row as usize * rank * width..][..rank * width];
            for (r, out) in out.chunks_exact_mut(width).enumerate() {
                out.iter_mut().zip(key[r..].iter().step_by(rank)).for_each(|(out, x)| *out = x.widen());
            }
        });
    });
    by_rank
}

/// The keys that each token keeps.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Kept {
    /// `[tokens, heads, 2, top_m]`, ascending.
    pub keys: Vec<u32>,
    /// `S`, `[tokens, heads, 2, top_m, tucker_rank]`.
    pub scores: Vec<f32>,
}

/// What comes back to the kept keys' scores.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct KeptGradients {
    /// `[tokens, heads, 2, top_m, tucker_rank]`.
    pub scores: Vec<f32>,
    /// Which kept keys a chosen slot has, `[tokens, heads, 2, top_m]`: no other has a gradient.
    pub used: Vec<bool>,
}

/// Keeps the best keys of every side for `queries` `[tokens, query_pairs, 2, key_dim]`, normalised.
///
/// # Errors
/// As [all stages](super).
pub fn forward(layer: &Layer<'_>, queries: &[f32]) -> Result<Kept> {
    let shape = &layer.shape;
    Given::rows(shape, "numbers of the queries", queries.len(), "a token's", shape.query_width())?;
    let (tokens, sides) = (queries.len() / shape.query_width(), shape.heads * 2);
    let tiles = tokens.div_ceil(TILE);
    let parts: Vec<Kept> = (0..tiles * sides)
        .into_par_iter()
        .map(|task| {
            let first = task / sides * TILE;
            let queries = &queries[first * shape.query_width()..];
            keep(layer, task % sides, queries, TILE.min(tokens - first))
        })
        .collect();
    Ok(gather(shape, tokens, &parts))
}

/// One side's keys for a tile of tokens.
fn keep(layer: &Layer<'_>, side: usize, queries: &[f32], tokens: usize) -> Kept {
    let (shape, keys) = (&layer.shape, &layer.keys);
    let (width, n, m, rank) = (shape.key_dim, shape.side_keys, shape.top_m, shape.tucker_rank);
    let rows = queries.chunks_exact(shape.query_width()).take(tokens);
    let mut tile = Vec::with_capacity(tokens * width);
    rows.for_each(|query| tile.extend_from_slice(&query[shape.query_of(side)..][..width]));
    let mut scores = vec![0.0; tokens * n];
    keys.judged[side].product_here(&mut scores, &tile);
    let mut kept = Kept { keys: vec![0; tokens * m], scores: vec![0.0; tokens * m * rank] };
    let (mut selection, mut order, mut by_rank) = (Selection::default(), vec![0; n], Aligned::zeros(rank * width));
    vectorised!({
        let out = kept.keys.chunks_exact_mut(m).zip(kept.scores.chunks_exact_mut(m * rank));
        for ((query, scores), (kept, out)) in tile.chunks_exact(width).zip(scores.chunks_exact(n)).zip(out) {
            order.iter_mut().zip(scores).for_each(|(order, &score)| *order = order_key(score));
            selection.best(&order, kept);
            if shape.tucker {
                by_rank.chunks_exact_mut(width).for_each(|copy| copy.copy_from_slice(query));
                let first = (side * n) as u32;
                dots(
                    rank,
                    #[inline(always)]
                    |at| {
                        prefetch(row_of(&keys.scored, rank * width, first + kept[(at + AHEAD).min(m - 1)]));
                        (&by_rank, row_of(&keys.scored, rank * width, first + kept[at]))
                    },
                    out,
                );
            } else {
                out.iter_mut().zip(&*kept).for_each(|(out, &key)| *out = scores[key as usize]);
            }
        }
    });
    kept
}

/// The parts, each a tile's of one side, token by token.
fn gather(shape: &Shape, tokens: usize, parts: &[Kept]) -> Kept {
    let (sides, m, rank) = (shape.heads * 2, shape.top_m, shape.tucker_rank);
    let mut kept = Kept { keys: vec![0; tokens * sides * m], scores: vec![0.0; tokens * sides * m * rank] };
    let out = kept.keys.par_chunks_exact_mut(m).zip(kept.scores.par_chunks_exact_mut(m * rank));
    out.enumerate().with_min_len(64).for_each(|(at, (keys, scores))| {
        let (token, side) = (at / sides, at % sides);
        let (part, row) = (&parts[token / TILE * sides + side], token % TILE);
        keys.copy_from_slice(&part.keys[row * m..][..m]);
        scores.copy_from_slice(&part.scores[row * m * rank..][..m * rank]);
    });
    kept
}

/// What comes back through score.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ScoreGradients {
    /// Of the queries before their norm, `[tokens, query_pairs · 2 · key_dim]`.
    pub query: Vec<f32>,
    /// `[key_dim]`; empty where queries are not normalised.
    pub query_norm: Vec<f32>,
    /// Of the keys as a table `[heads · 2 · side_keys, key_dim · tucker_rank]`: those of chosen slots.
    pub keys: RowGradients,
    /// `[key_dim]`; empty where keys are not normalised.
    pub keys_norm: Vec<f32>,
}

/// From the kept keys' scores to the queries and the keys. `raw`: the queries before their norm.
///
/// # Errors
/// As [all stages](super).
pub fn backward(
    layer: &Layer<'_>,
    raw: &[f32],
    queries: &[f32],
    kept: &Kept,
    grad: &KeptGradients,
) -> Result<ScoreGradients> {
    let shape = &layer.shape;
    let given = Given::rows(shape, "numbers of the queries", queries.len(), "a token's", shape.query_width())?;
    given.numbers("numbers of the queries before their norm", raw.len(), shape.query_width())?;
    given.kept(&kept.keys, &kept.scores)?;
    number("gradients of kept keys' scores", grad.scores.len(), kept.scores.len())?;
    number("marks of used keys", grad.used.len(), kept.keys.len())?;
    let of_queries = || {
        let mut query = queries_backward(layer, kept, grad);
        let norm = query::norm_backward(layer, raw, &mut query);
        (query, norm)
    };
    // Side by side, for the keys' entries are sorted on one core.
    let ((query, query_norm), (keys, keys_norm)) =
        rayon::join(of_queries, || keys_backward(layer, queries, kept, grad));
    Ok(ScoreGradients { query, query_norm, keys, keys_norm })
}

/// `∂q = Σ ∂S · K̂` over the used keys.
fn queries_backward(layer: &Layer<'_>, kept: &Kept, grads: &KeptGradients) -> Vec<f32> {
    let shape = &layer.shape;
    let (width, m, rank, sides) = (shape.key_dim, shape.top_m, shape.tucker_rank, shape.heads * 2);
    let tokens = kept.keys.len() / (sides * m);
    let mut grad = vec![0.0; tokens * shape.query_width()];
    grad.par_chunks_exact_mut(shape.query_width()).enumerate().for_each(|(token, grad)| {
        vectorised!({
            for entry in 0..sides * m {
                let (side, at) = (entry / m, token * sides * m + entry);
                if grads.used[at] {
                    let key = layer.keys.ranks(shape, side * shape.side_keys + kept.keys[at] as usize);
                    let grad = &mut grad[shape.query_of(side)..][..width];
                    let grads = &grads.scores[at * rank..][..rank];
                    for (key, &g) in key.chunks_exact(width).zip(grads) {
                        add_scaled(grad, g, key);
                    }
                }
            }
        });
    });
    grad
}

/// `∂K̂ = Σ ∂S · q`, then back through the norm; the keys' as rows, and the norm's weight's.
fn keys_backward(layer: &Layer<'_>, queries: &[f32], kept: &Kept, grads: &KeptGradients) -> (RowGradients, Vec<f32>) {
    let shape = &layer.shape;
    let (width, m, rank, sides) = (shape.key_dim, shape.top_m, shape.tucker_rank, shape.heads * 2);
    let row = |at: usize| at / m % sides * shape.side_keys + kept.keys[at] as usize;
    let used = (0..kept.keys.len()).filter(|&at| grads.used[at]);
    let named = used.map(|at| Named { row: row(at) as u32, entry: at as u32 }).collect();
    let mut grad = group(named).sum(
        rank * width,
        #[inline(always)]
        |at, sum| {
            let (row, at) = (at as usize / m, at as usize);
            let query = &queries[row / sides * shape.query_width() + shape.query_of(row % sides)..][..width];
            for (sum, &g) in sum.chunks_exact_mut(width).zip(&grads.scores[at * rank..][..rank]) {
                add_scaled(sum, g, query);
            }
        },
    );
    let norm = shape.keys_norm.map_or_else(Vec::new, |norm| {
        let mut raw = rows_by_rank(shape, &layer.weights, &grad.rows);
        through_norm(norm, &layer.weights.keys_norm, &mut raw, &mut grad.numbers)
    });
    grad.numbers.par_chunks_exact_mut(rank * width).with_min_len(64).for_each(|row| {
        let by_rank = row.to_vec();
        for (at, out) in row.chunks_exact_mut(rank).enumerate() {
            out.iter_mut().zip(by_rank[at..].iter().step_by(width)).for_each(|(out, x)| *out = *x);
        }
    });
    (grad, norm)
}
