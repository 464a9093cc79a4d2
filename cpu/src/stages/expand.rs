//! Expand: the selected rows times their scores, pooled by virtual block, and projected.
//!
//! `pooled[block, slice k] += s_k · V[row, slice k]`, then the gate, `W_o`, and the output gate where the layer has them.
//!
//! A task takes tokens; a token's rows are asked for some rows ahead of their use, for each is a miss of every cache. Reads each selected row once,
//! forwards; backwards once for the scores' gradient, and the gradient of the pooled values once per entry of a row.

use rayon::prelude::*;

use crate::linear::{Matrix, add_product};
use crate::numbers::{AHEAD, Element, add_scaled, dot, dots, prefetch, row_of, vectorised, with_slice};
use crate::stages::given::Given;
use crate::stages::query::{MapGradients, column_sum};
use crate::table::{Grouped, Named, RowGradients, group};
use crate::{Layer, Place, Result, Shape};

/// Where the chosen `slots` are in the table, through the shuffle.
///
/// # Errors
/// As [all stages](super).
pub fn places(layer: &Layer<'_>, slots: &[u32]) -> Result<Vec<Place>> {
    let shape = &layer.shape;
    Given::rows(shape, "chosen slots", slots.len(), "a token's", shape.entries())?.slots(slots)?;
    let place = |&slot: &u32| match &layer.weights.shuffle {
        Some(shuffle) => shape.place(shuffle[slot as usize] as usize),
        None => shape.place(slot as usize),
    };
    Ok(slots.par_iter().with_min_len(1024).map(place).collect())
}

/// What expand leaves for its backward pass, and its output.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Expanded {
    /// `[tokens, pooled_blocks · value_dim]`, before the gate.
    pub pooled: Vec<f32>,
    /// `W_g x + b_g`, `[tokens, value_dim]`; empty without a gate.
    pub gate: Vec<f32>,
    /// `w · x + b`, `[tokens]`; empty without an output gate.
    pub output_gate: Vec<f32>,
    /// Before the output gate; empty without one.
    pub projected: Vec<f32>,
}

/// The output `[tokens, hidden_size]` from slots at `places` with `scores` `[tokens, heads, top_m, cores]`.
///
/// # Errors
/// As [all stages](super).
pub fn forward(layer: &Layer<'_>, input: &[f32], places: &[Place], scores: &[f32]) -> Result<(Vec<f32>, Expanded)> {
    let hidden = layer.shape.hidden_size;
    Given::input(&layer.shape, input)?.places(places)?;
    let apply =
        |map: Option<&crate::Linear<'_>>| map.map_or_else(Vec::new, |map| map.apply(input, hidden, layer.invariant));
    let mut expanded = Expanded {
        pooled: pool(layer, places, scores)?,
        gate: apply(layer.weights.gate.as_ref()),
        output_gate: apply(layer.weights.output_gate.as_ref()),
        projected: Vec::new(),
    };
    let mut output = match &layer.weights.projection {
        Some(map) if expanded.gate.is_empty() => map.apply(&expanded.pooled, layer.shape.pooled_dim(), layer.invariant),
        Some(map) => map.apply(&expanded.gated(), layer.shape.pooled_dim(), layer.invariant),
        None => expanded.pooled.clone(),
    };
    if !expanded.output_gate.is_empty() {
        expanded.projected = output.clone();
        let rows = output.chunks_exact_mut(hidden).zip(&expanded.output_gate);
        rows.for_each(|(row, &gate)| row.iter_mut().for_each(|x| *x *= sigmoid(gate)));
    }
    Ok((output, expanded))
}

impl Expanded {
    /// The pooled values times their gate.
    fn gated(&self) -> Vec<f32> {
        self.pooled.iter().zip(&self.gate).map(|(pooled, &gate)| pooled * gate * sigmoid(gate)).collect()
    }
}

/// Pools the rows at `places`, each times its scores, for every token: `[tokens, pooled_blocks · value_dim]`.
///
/// # Errors
/// As [all stages](super).
pub fn pool(layer: &Layer<'_>, places: &[Place], scores: &[f32]) -> Result<Vec<f32>> {
    let (shape, table) = (&layer.shape, &layer.weights.values);
    let given = Given::rows(shape, "places of slots", places.len(), "a token's", shape.entries())?;
    given.places(places)?;
    given.scores(scores)?;
    let entries = shape.entries();
    let mut pooled = vec![0.0; places.len() / entries * shape.pooled_dim()];
    let tokens = places.par_chunks_exact(entries).zip(scores.par_chunks_exact(entries * shape.cores));
    pooled.par_chunks_exact_mut(shape.pooled_dim()).zip(tokens).for_each(|(pooled, (places, scores))| {
        with_slice!(table, Numbers, table => vectorised!(pool_token(shape, table, places, scores, pooled)));
    });
    Ok(pooled)
}

#[inline(always)]
fn pool_token<E: Element>(shape: &Shape, table: &[E], places: &[Place], scores: &[f32], pooled: &mut [f32]) {
    let (width, slice) = (shape.value_dim, shape.value_dim / shape.cores);
    places.iter().take(AHEAD).for_each(|place| prefetch(row_of(table, width, place.row)));
    for (at, (place, scores)) in places.iter().zip(scores.chunks_exact(shape.cores)).enumerate() {
        places.get(at + AHEAD).into_iter().for_each(|place| prefetch(row_of(table, width, place.row)));
        let block = &mut pooled[place.block as usize * width..][..width];
        let slices = block.chunks_exact_mut(slice).zip(row_of(table, width, place.row).chunks_exact(slice));
        for ((sum, row), &score) in slices.zip(scores) {
            add_scaled(sum, score, row);
        }
    }
}

/// What comes back through expand; parts that the layer has no use for are empty.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ExpandGradients {
    /// Of the scores that expand was given, `[tokens, heads, top_m, cores]`.
    pub scores: Vec<f32>,
    /// Of the value table.
    pub rows: RowGradients,
    /// Of `W_o` and its bias.
    pub projection: MapGradients,
    /// Of `W_g x + b_g`.
    pub gate: Vec<f32>,
    /// Of `w · x + b`.
    pub output_gate: Vec<f32>,
}

/// From `grad_output` `[tokens, hidden_size]` to the scores, the rows, `W_o` and the gates.
///
/// # Errors
/// As [all stages](super).
pub fn backward(
    layer: &Layer<'_>,
    places: &[Place],
    scores: &[f32],
    expanded: &Expanded,
    grad_output: &[f32],
) -> Result<ExpandGradients> {
    let (shape, weights) = (&layer.shape, &layer.weights);
    let hidden = ("hidden_size", shape.hidden_size);
    let given = Given::rows(shape, "numbers of the output's gradient", grad_output.len(), hidden.0, hidden.1)?;
    given.places(places)?;
    given.scores(scores)?;
    given.numbers("pooled values", expanded.pooled.len(), shape.pooled_dim())?;
    let gate = if weights.gate.is_some() { shape.pooled_dim() } else { 0 };
    given.numbers("numbers of the gate", expanded.gate.len(), gate)?;
    let (output_gate, projected) = if weights.output_gate.is_some() { (1, shape.hidden_size) } else { (0, 0) };
    given.numbers("numbers of the output gate", expanded.output_gate.len(), output_gate)?;
    given.numbers("projected values", expanded.projected.len(), projected)?;
    // Side by side, for entries are sorted on one core.
    let (by_row, (grad_pooled, mut out)) =
        rayon::join(|| group(by_row(places)), || pooled_backward(layer, expanded, grad_output));
    (out.scores, out.rows) = rayon::join(
        || scores_backward(layer, places, &grad_pooled),
        || rows_backward(&layer.shape, by_row, places, scores, &grad_pooled),
    );
    Ok(out)
}

/// From `grad_output` to the gradient of the pooled values, and to `W_o` and the gates.
fn pooled_backward(layer: &Layer<'_>, expanded: &Expanded, grad_output: &[f32]) -> (Vec<f32>, ExpandGradients) {
    let hidden = layer.shape.hidden_size;
    let (mut out, mut grad) = (ExpandGradients::default(), grad_output.to_vec());
    if !expanded.output_gate.is_empty() {
        let rows = grad.chunks_exact_mut(hidden).zip(expanded.projected.chunks_exact(hidden));
        for ((grad, projected), &gate) in rows.zip(&expanded.output_gate) {
            let open = sigmoid(gate);
            out.output_gate.push(vectorised!(dot::<f32>(grad, projected)) * open * (1.0 - open));
            grad.iter_mut().for_each(|grad| *grad *= open);
        }
    }
    let mut grad_pooled = project_backward(layer, expanded, grad, &mut out.projection);
    if !expanded.gate.is_empty() {
        let of_gate = grad_pooled.iter().zip(&expanded.pooled).zip(&expanded.gate).map(|((grad, pooled), &gate)| {
            let open = sigmoid(gate);
            grad * pooled * open * (1.0 + gate * (1.0 - open))
        });
        out.gate = of_gate.collect();
        grad_pooled.iter_mut().zip(&expanded.gate).for_each(|(grad, &gate)| *grad *= gate * sigmoid(gate));
    }
    (grad_pooled, out)
}

/// Through `W_o`, where there is one: to the pooled values as they were projected.
fn project_backward(layer: &Layer<'_>, expanded: &Expanded, grad: Vec<f32>, out: &mut MapGradients) -> Vec<f32> {
    let (hidden, pooled_dim) = (layer.shape.hidden_size, layer.shape.pooled_dim());
    let Some(map) = &layer.weights.projection else { return grad };
    if map.bias.is_some() {
        out.bias = column_sum(&grad, hidden);
    }
    let gated;
    let pooled = match expanded.gate.is_empty() {
        true => &expanded.pooled,
        false => {
            gated = expanded.gated();
            &gated
        }
    };
    out.weight = vec![0.0; map.weight.len()];
    let grad = Matrix::new(&grad, hidden);
    add_product(&mut out.weight, grad.transposed(), Matrix::new(pooled, pooled_dim));
    let mut grad_pooled = vec![0.0; pooled.len()];
    add_product(&mut grad_pooled, grad, Matrix::new(&map.weight, pooled_dim));
    grad_pooled
}

/// `∂s_k = ∂pooled[block, slice k] · V[row, slice k]`.
fn scores_backward(layer: &Layer<'_>, places: &[Place], grad_pooled: &[f32]) -> Vec<f32> {
    let (shape, table) = (&layer.shape, &layer.weights.values);
    let (entries, width) = (shape.entries(), shape.value_dim);
    let mut grad = vec![0.0; places.len() * shape.cores];
    let tokens = places.par_chunks_exact(entries).zip(grad_pooled.par_chunks_exact(shape.pooled_dim()));
    grad.par_chunks_exact_mut(entries * shape.cores).zip(tokens).for_each(|(grad, (places, grad_pooled))| {
        with_slice!(table, Numbers, table => {
            dots(
                shape.cores,
                #[inline(always)]
                |at| {
                    prefetch(row_of(table, width, places[(at + AHEAD).min(entries - 1)].row));
                    (&grad_pooled[places[at].block as usize * width..][..width], row_of(table, width, places[at].row))
                },
                grad,
            );
        });
    });
    grad
}

/// What row each entry names.
pub(crate) fn by_row(places: &[Place]) -> Vec<Named> {
    places.iter().enumerate().map(|(entry, place)| Named { row: place.row, entry: entry as u32 }).collect()
}

/// `∂V[row, slice k] = Σ s_k · ∂pooled[block, slice k]`.
fn rows_backward(
    shape: &Shape,
    by_row: Grouped,
    places: &[Place],
    scores: &[f32],
    grad_pooled: &[f32],
) -> RowGradients {
    let (entries, cores, width) = (shape.entries(), shape.cores, shape.value_dim);
    by_row.sum(
        width,
        #[inline(always)]
        |entry, sum| {
            let entry = entry as usize;
            let first = entry / entries * shape.pooled_dim() + places[entry].block as usize * width;
            let slice = width / cores;
            let slices = sum.chunks_exact_mut(slice).zip(grad_pooled[first..][..width].chunks_exact(slice));
            for ((sum, grad), &score) in slices.zip(&scores[entry * cores..][..cores]) {
                add_scaled(sum, score, grad);
            }
        },
    )
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}
