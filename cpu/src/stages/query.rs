//! Query: `q = norm(W_q x + b_q)`, each half of a pair normalised over `key_dim`, and rounded to the keys' type.
//!
//! `input` `[tokens, hidden_size]` gives `[tokens, query_pairs, 2, key_dim]`.

use rayon::prelude::*;

use crate::linear::{Linear, Matrix, add_product};
use crate::norm::{normalise, normalise_backward};
use crate::numbers::{round, vectorised};
use crate::stages::given::Given;
use crate::{Layer, Result};

/// Vectors that a task normalises: sums over them are taken chunk by chunk.
const CHUNK: usize = 64;

/// The queries before their norm.
///
/// # Errors
/// As [all stages](super).
pub fn forward(layer: &Layer<'_>, input: &[f32]) -> Result<Vec<f32>> {
    Given::input(&layer.shape, input)?;
    Ok(layer.weights.query.apply(input, layer.shape.hidden_size, layer.invariant))
}

/// Queries as they are multiplied with keys, from those before their norm.
///
/// # Errors
/// As [all stages](super).
pub fn normalised(layer: &Layer<'_>, mut queries: Vec<f32>) -> Result<Vec<f32>> {
    Given::rows(&layer.shape, "numbers of the queries", queries.len(), "a token's", layer.shape.query_width())?;
    let (width, dtype) = (layer.shape.key_dim, layer.weights.keys.dtype());
    queries.par_chunks_mut(CHUNK * width).for_each(|queries| {
        if let Some(norm) = layer.shape.query_norm {
            let weight = &layer.weights.query_norm;
            vectorised!({
                for query in queries.chunks_exact_mut(width) {
                    normalise(norm, weight, query);
                }
            });
        }
        round(dtype, queries);
    });
    Ok(queries)
}

/// Through the norm: from the gradient of the queries, in place, to that of `raw`, the queries before it; returns the norm's weight's.
pub(crate) fn norm_backward(layer: &Layer<'_>, raw: &[f32], grad: &mut [f32]) -> Vec<f32> {
    let Some(norm) = layer.shape.query_norm else { return Vec::new() };
    through_norm(norm, &layer.weights.query_norm, &mut raw.to_vec(), grad)
}

/// As [`norm_backward`], for vectors `x` of any kind, which are lost.
pub(crate) fn through_norm(
    norm: (ultramem_kernels::Norm, f32),
    weight: &[f32],
    x: &mut [f32],
    grad: &mut [f32],
) -> Vec<f32> {
    let width = weight.len();
    let chunks = x.par_chunks_mut(CHUNK * width).zip(grad.par_chunks_mut(CHUNK * width));
    let sums: Vec<_> = chunks
        .map(|(x, grad)| {
            let mut sum = vec![0.0; width];
            vectorised!({
                for (x, grad) in x.chunks_exact_mut(width).zip(grad.chunks_exact_mut(width)) {
                    normalise_backward(norm, weight, x, grad, &mut sum);
                }
            });
            sum
        })
        .collect();
    sum_of(width, &sums)
}

/// The sum of vectors, one after the other.
pub(crate) fn sum_of(width: usize, all: &[Vec<f32>]) -> Vec<f32> {
    let mut sum = vec![0.0; width];
    all.iter().for_each(|one| sum.iter_mut().zip(one).for_each(|(sum, x)| *sum += x));
    sum
}

/// The gradients of a map of the input.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MapGradients {
    /// `[outputs, hidden_size]`.
    pub weight: Vec<f32>,
    /// `[outputs]`; empty where the map has no bias.
    pub bias: Vec<f32>,
}

/// The gradients of what the input was mapped to, each empty where the layer has no such map.
#[derive(Debug, Clone, Copy)]
pub struct OfMaps<'a> {
    /// Of the queries before their norm, `[tokens, query_pairs · 2 · key_dim]`.
    pub query: &'a [f32],
    /// Of `z`, `[tokens, pre_dim]`.
    pub z: &'a [f32],
    /// Of the gate before its silu, `[tokens, value_dim]`.
    pub gate: &'a [f32],
    /// Of the output gate before its sigmoid, `[tokens]`.
    pub output_gate: &'a [f32],
}

/// What comes through the maps of the input.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct InputGradients {
    /// `[tokens, hidden_size]`.
    pub input: Vec<f32>,
    /// Of `W_q` and its bias.
    pub query: MapGradients,
    /// Of `W_p`.
    pub pre_projection: MapGradients,
    /// Of `W_g` and its bias.
    pub gate: MapGradients,
    /// Of the output gate's `w` and its bias.
    pub output_gate: MapGradients,
}

/// From what the `input` was mapped to, to the input and to the maps.
///
/// # Errors
/// As [all stages](super).
pub fn backward(layer: &Layer<'_>, input: &[f32], grads: &OfMaps<'_>) -> Result<InputGradients> {
    let given = Given::input(&layer.shape, input)?;
    given.numbers("numbers of the queries' gradient", grads.query.len(), layer.shape.query_width())?;
    let pre_dim = if layer.shape.activation.is_some() { layer.shape.pre_dim } else { 0 };
    given.numbers("numbers of the gradient of z", grads.z.len(), pre_dim)?;
    let gate = if layer.weights.gate.is_some() { layer.shape.pooled_dim() } else { 0 };
    given.numbers("numbers of the gate's gradient", grads.gate.len(), gate)?;
    let output_gate = usize::from(layer.weights.output_gate.is_some());
    given.numbers("numbers of the output gate's gradient", grads.output_gate.len(), output_gate)?;
    let (weights, inputs) = (&layer.weights, layer.shape.hidden_size);
    let mut found = InputGradients { input: vec![0.0; input.len()], ..InputGradients::default() };
    if weights.pre_projection.is_none() {
        found.input.iter_mut().zip(grads.z).for_each(|(input, z)| *input += z);
    }
    for (map, grad, out) in [
        (Some(&weights.query), grads.query, &mut found.query),
        (weights.pre_projection.as_ref(), grads.z, &mut found.pre_projection),
        (weights.gate.as_ref(), grads.gate, &mut found.gate),
        (weights.output_gate.as_ref(), grads.output_gate, &mut found.output_gate),
    ] {
        map.into_iter().for_each(|map| *out = map_backward(map, inputs, input, grad, &mut found.input));
    }
    Ok(found)
}

/// From the gradient of a map's output `[tokens, outputs]`: adds the input's to `grad_input`.
fn map_backward(map: &Linear<'_>, inputs: usize, input: &[f32], grad: &[f32], grad_input: &mut [f32]) -> MapGradients {
    let outputs = map.weight.len() / inputs;
    let grad_of = Matrix::new(grad, outputs);
    add_product(grad_input, grad_of, Matrix::new(&map.weight, inputs));
    let mut weight = vec![0.0; map.weight.len()];
    add_product(&mut weight, grad_of.transposed(), Matrix::new(input, inputs));
    MapGradients { weight, bias: map.bias.as_ref().map_or_else(Vec::new, |_| column_sum(grad, outputs)) }
}

/// The sum of rows of `width` numbers.
pub(crate) fn column_sum(rows: &[f32], width: usize) -> Vec<f32> {
    let chunks: Vec<_> = rows
        .par_chunks(CHUNK * width)
        .map(|rows| {
            let mut sum = vec![0.0; width];
            rows.chunks_exact(width).for_each(|row| sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x));
            sum
        })
        .collect();
    sum_of(width, &chunks)
}
