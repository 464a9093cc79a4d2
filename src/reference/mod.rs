//! The oracle: the layer on the CPU in plain loops with f64 sums, one file a stage, for kernels to be held against.
//!
//! | stage | gives |
//! |---|---|
//! | [`query`] | normalised queries `[tokens, query_pairs, 2, key_dim]` |
//! | [`score`] | [`Kept`]: the `top_m` keys of each side and their scores |
//! | [`combine`] | [`Chosen`]: the `top_m` pairs of each head and their scores |
//! | [`weigh`] | [`Weighed`]: the scores times what the pre-values make of the input, where the layer has them |
//! | [`expand`] | the output `[tokens, hidden_size]` |
//!
//! [`forward`] runs them in turn. Weights of any element type are widened to f64 as they are, so an f16 layer is judged on its rounded
//! weights. Where its keys are f16 or bf16, the queries and keys that are multiplied are rounded to that type (DESIGN §2, half precision); of an
//! f32 layer nothing is rounded. All cores share the tokens, to the same bits. No token sees another one: a NaN or an infinity in one input row spoils that row
//! alone.
//!
//! An oracle of other stages checks its slices with [`whole_rows`] and [`length`], and counts with [`to_f64`], [`dot`] and
//! [`selection_order`].

mod backward;
mod combine;
mod expand;
mod judge;
mod optimiser;
mod query;
mod score;
mod weigh;

use std::cmp::Ordering;

pub use backward::{Gradients, backward, score_slots};
pub use combine::{Chosen, combine};
pub use expand::expand;
pub use judge::{Judged, judge, judge_chosen};
pub use optimiser::Optimiser;
pub use query::query;
pub use score::{Kept, score};
pub use weigh::{Weighed, weigh};

use crate::{ElementType, Error, HostTensor, MemoryConfig, Norm, Result, Weight, Weights};

/// What one forward pass gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Forward {
    /// `[tokens, hidden_size]`.
    pub output: Vec<f64>,
    /// The chosen slots before the shuffle, largest total first: `[tokens, heads, top_m]`.
    pub slots: Vec<u32>,
    /// The chosen slots' scores, before they are weighed: `[tokens, heads, top_m, cores]`.
    pub scores: Vec<f64>,
}

/// One forward pass (arXiv 2411.12364 section 3; 2508.18756; 1907.05242 section 3; 2412.09764 section 3; 2407.04153) over `input`
/// `[tokens, hidden_size]`.
///
/// # Errors
/// [`Error::Tensor`] or [`Error::Length`] if `weights` do not fit `config` or `input` is not whole rows.
pub fn forward(config: &MemoryConfig, weights: &Weights<'_>, input: &[f32]) -> Result<Forward> {
    let query = query(config, weights, input)?;
    let kept = score(config, weights, &query)?;
    let chosen = combine(config, weights, &kept)?;
    let weighed = weigh(config, weights, input, &chosen)?;
    let output = expand(config, weights, input, &chosen.slots, &weighed.scores)?;
    Ok(Forward { output, slots: chosen.slots, scores: chosen.scores })
}

/// How many rows of `width` numbers `name` holds, of `numbers` in all.
///
/// # Errors
/// [`Error::Tensor`] where they are not whole rows.
pub fn whole_rows(name: &str, numbers: usize, width_name: &str, width: usize) -> Result<usize> {
    if numbers.checked_rem(width) != Some(0) {
        let problem = format!("holds {numbers} numbers, not a multiple of {width_name} {width}");
        return Err(Error::Tensor { name: name.into(), problem });
    }
    Ok(numbers / width)
}

/// Checks that `name` holds as many numbers as its shape calls for.
///
/// # Errors
/// [`Error::Length`] with both numbers.
pub fn length(name: &str, found: usize, expected: usize) -> Result<()> {
    if found != expected {
        return Err(Error::Length { tensor: name.into(), found, expected });
    }
    Ok(())
}

/// Checks that every index in `name` is below `limit`.
fn below(name: &str, indices: &[u32], limit: usize) -> Result<()> {
    match indices.iter().position(|&index| index as usize >= limit) {
        Some(at) => {
            let problem = format!("entry {at} is {}, expected less than {limit}", indices[at]);
            Err(Error::Tensor { name: name.into(), problem })
        }
        None => Ok(()),
    }
}

/// The numbers of a weight; none if the layer does not have it.
fn numbers(weights: &Weights<'_>, weight: Weight) -> Vec<f64> {
    to_f64(&weights.numbers(weight))
}

/// The same numbers, wider.
pub fn to_f64(numbers: &[f32]) -> Vec<f64> {
    numbers.iter().map(|&x| f64::from(x)).collect()
}

/// The dot product of two vectors of one length, in four sums, which a processor adds side by side.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    let (a, b) = (a.chunks_exact(4), b.chunks_exact(4));
    let rest: f64 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    let mut sums = [0.0; 4];
    for (a, b) in a.zip(b) {
        for lane in 0..4 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum::<f64>() + rest
}

/// `W x` with `matrix` `[out, x.len()]`.
fn linear(matrix: &[f64], x: &[f64]) -> Vec<f64> {
    matrix.chunks_exact(x.len()).map(|row| dot(row, x)).collect()
}

/// `W x + b`; an empty `bias` adds nothing.
fn affine(matrix: &[f64], bias: &[f64], x: &[f64]) -> Vec<f64> {
    let mut product = linear(matrix, x);
    product.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
    product
}

/// Rounds what is scored, queries and keys, as a layer of these weights does: to the type of its keys, but for f32.
fn round(weights: &Weights<'_>, numbers: &mut [f64]) {
    let dtype = weights.get(Weight::Keys).map_or(ElementType::F32, HostTensor::dtype);
    let round: fn(f64) -> f64 = match dtype {
        ElementType::F32 => return,
        ElementType::F16 => |x| half::f16::from_f64(x).to_f64(),
        ElementType::BF16 => |x| half::bf16::from_f64(x).to_f64(),
    };
    numbers.iter_mut().for_each(|x| *x = round(*x));
}

/// RMSNorm or LayerNorm without bias, in place.
fn normalise(config: &MemoryConfig, weight: &[f64], vector: &mut [f64]) {
    let count = vector.len() as f64;
    if config.norm == Norm::Layer {
        let mean = vector.iter().sum::<f64>() / count;
        vector.iter_mut().for_each(|x| *x -= mean);
    }
    let scale = (dot(vector, vector) / count + f64::from(config.norm_eps)).sqrt();
    for (x, weight) in vector.iter_mut().zip(weight) {
        *x = *x / scale * weight;
    }
}

/// The order in which numbers are selected: larger first, NaN after every number.
pub fn selection_order(a: f64, b: f64) -> Ordering {
    b.partial_cmp(&a).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
}
