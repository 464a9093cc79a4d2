//! Weigh: the chosen slots' scores times what the pre-values make of the input: `s_k ·= act(z · P[row])`, `z = W_p x` or x itself.
//!
//! Reads each slot's pre-value row once, forwards and backwards.

use rayon::prelude::*;
use ultramem_kernels::weigh::Activation;

use crate::numbers::{AHEAD, add_scaled, dots, prefetch, row_of, vectorised, with_slice};
use crate::stages::combine::Chosen;
use crate::stages::expand::by_row;
use crate::stages::given::Given;
use crate::table::{RowGradients, group};
use crate::{Layer, Place, Result};

/// What weigh gives.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Weighed {
    /// `W_p x`, `[tokens, pre_dim]`; empty where the input itself is multiplied.
    pub z: Vec<f32>,
    /// `z · P[row]`, `[tokens, heads, top_m]`.
    pub products: Vec<f32>,
    /// `[tokens, heads, top_m, cores]`.
    pub scores: Vec<f32>,
}

impl Weighed {
    fn z<'a>(&'a self, input: &'a [f32]) -> &'a [f32] {
        if self.z.is_empty() { input } else { &self.z }
    }
}

/// Weighs the scores of `chosen`, whose slots are at `places`; None for a layer without pre-values.
///
/// # Errors
/// As [all stages](super).
pub fn forward(layer: &Layer<'_>, input: &[f32], chosen: &Chosen, places: &[Place]) -> Result<Option<Weighed>> {
    let Some((activation, table)) = layer.pre_values() else { return Ok(None) };
    let given = Given::input(&layer.shape, input)?;
    given.chosen(&chosen.slots, &chosen.scores)?;
    given.places(places)?;
    let (entries, width, cores) = (layer.shape.entries(), layer.shape.pre_dim, layer.shape.cores);
    let z = layer.weights.pre_projection.as_ref().map(|map| map.apply(input, layer.shape.hidden_size, layer.invariant));
    let mut weighed =
        Weighed { z: z.unwrap_or_default(), products: vec![0.0; places.len()], scores: chosen.scores.clone() };
    let z = if weighed.z.is_empty() { input } else { &weighed.z };
    let out = weighed.products.par_chunks_exact_mut(entries).zip(weighed.scores.par_chunks_exact_mut(entries * cores));
    let tokens = places.par_chunks_exact(entries).zip(z.par_chunks_exact(width));
    out.zip(tokens).for_each(|((products, scores), (places, z))| {
        with_slice!(table, Numbers, table => {
            dots(
                1,
                #[inline(always)]
                |at| {
                    prefetch(row_of(table, width, places[(at + AHEAD).min(entries - 1)].row));
                    (z, row_of(table, width, places[at].row))
                },
                products,
            );
        });
        for (scores, &d) in scores.chunks_exact_mut(cores).zip(&*products) {
            let factor = activate(d, activation);
            scores.iter_mut().for_each(|score| *score *= factor);
        }
    });
    Ok(Some(weighed))
}

/// What comes back through weigh.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct WeighGradients {
    /// Of the scores before they are weighed, `[tokens, heads, top_m, cores]`.
    pub scores: Vec<f32>,
    /// `[tokens, pre_dim]`.
    pub z: Vec<f32>,
    /// Of the pre-values.
    pub rows: RowGradients,
}

/// From the weighed scores' gradient to the scores', to `z` and to the pre-values; None for a layer without them.
///
/// # Errors
/// As [all stages](super).
pub fn backward(
    layer: &Layer<'_>,
    input: &[f32],
    chosen: &Chosen,
    places: &[Place],
    weighed: &Weighed,
    grad_weighed: &[f32],
) -> Result<Option<WeighGradients>> {
    let Some((activation, table)) = layer.pre_values() else { return Ok(None) };
    let (entries, width, cores) = (layer.shape.entries(), layer.shape.pre_dim, layer.shape.cores);
    let z = weighed.z(input);
    let given = Given::input(&layer.shape, input)?;
    given.chosen(&chosen.slots, &chosen.scores)?;
    given.places(places)?;
    given.scores(grad_weighed)?;
    given.numbers("numbers of z", z.len(), width)?;
    given.numbers("products with pre-values", weighed.products.len(), entries)?;
    let mut grad = grad_weighed.to_vec();
    let mut products = vec![0.0; places.len()];
    let slots = grad.par_chunks_exact_mut(cores).zip(chosen.scores.par_chunks_exact(cores)).zip(&weighed.products);
    slots.zip(&mut products).with_min_len(256).for_each(|(((grad, scores), &d), product)| {
        let along: f32 = grad.iter().zip(scores).map(|(grad, score)| grad * score).sum();
        *product = along * activate_backward(d, activation);
        let factor = activate(d, activation);
        grad.iter_mut().for_each(|grad| *grad *= factor);
    });
    let mut grad_z = vec![0.0; z.len()];
    let tokens = places.par_chunks_exact(entries).zip(products.par_chunks_exact(entries));
    grad_z.par_chunks_exact_mut(width).zip(tokens).for_each(|(grad, (places, products))| {
        with_slice!(table, Numbers, table => vectorised!({
            for (at, (place, &product)) in places.iter().zip(products).enumerate() {
                places.get(at + AHEAD).into_iter().for_each(|place| prefetch(row_of(table, width, place.row)));
                add_scaled(grad, product, row_of(table, width, place.row));
            }
        }));
    });
    let rows = group(by_row(places)).sum(
        width,
        #[inline(always)]
        |entry, sum| {
            let entry = entry as usize;
            add_scaled(sum, products[entry], &z[entry / entries * width..][..width]);
        },
    );
    Ok(Some(WeighGradients { scores: grad, z: grad_z, rows }))
}

fn activate(x: f32, activation: Activation) -> f32 {
    match activation {
        Activation::Identity => x,
        Activation::Gelu => x * cumulative(x),
    }
}

fn activate_backward(x: f32, activation: Activation) -> f32 {
    match activation {
        Activation::Identity => 1.0,
        Activation::Gelu => cumulative(x) + x * (-0.5 * x * x).exp() / (2.0 * std::f32::consts::PI).sqrt(),
    }
}

/// The normal distribution's.
fn cumulative(x: f32) -> f32 {
    0.5 * libm::erfcf(-x * std::f32::consts::FRAC_1_SQRT_2)
}
