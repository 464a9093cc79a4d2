//! The oracle of [`kernels`](crate::kernels), as plain loops with f64 sums: a dense FFN, a mixture of experts, decoding attention and the
//! residual stream's norm.
//!
//! Matrices are `[in, out]`, as the kernels take them. No token sees another one.

use ultramem::reference::{dot, length, selection_order, to_f64, whole_rows};
use ultramem::{Error, Result};

use crate::kernels::Activation;

/// What a router chose.
#[derive(Debug, Clone, PartialEq)]
pub struct Routed {
    /// `[tokens, top_k]`: largest logit first, equal logits by expert.
    pub experts: Vec<u32>,
    /// `[tokens, top_k]`: the softmax over the kept logits.
    pub weights: Vec<f64>,
}

/// The weights of a mixture.
#[derive(Debug, Clone, Copy)]
pub struct Experts<'a> {
    /// `[hidden, experts]`.
    pub router: &'a [f32],
    /// `[experts, hidden, inner]`, or `[experts, hidden, 2 · inner]` for SwiGLU.
    pub up: &'a [f32],
    /// `[experts, inner, hidden]`.
    pub down: &'a [f32],
    /// How many experts there are.
    pub count: usize,
    /// What an expert does between its two matrices.
    pub activation: Activation,
    /// Experts that a token uses.
    pub top_k: usize,
}

/// A dense FFN, `act(x · up) · down`: `input` `[tokens, hidden]`, `up` `[hidden, inner]` or, for SwiGLU, `[hidden, 2 · inner]`, `down`
/// `[inner, hidden]`; returns `[tokens, hidden]`.
///
/// # Errors
/// [`Error::Length`] or [`Error::Tensor`] where the slices fit no such shapes.
pub fn dense(hidden: usize, input: &[f32], up: &[f32], down: &[f32], activation: Activation) -> Result<Vec<f64>> {
    whole_rows("input", input.len(), "hidden", hidden)?;
    let inner = whole_rows("down", down.len(), "hidden", hidden)?;
    length("up", up.len(), hidden * inner * activation.columns())?;
    Ok(input.chunks_exact(hidden).flat_map(|x| ffn(&to_f64(x), up, down, activation)).collect())
}

/// The router's choice among `logits` `[tokens, experts]`.
///
/// # Errors
/// [`Error::Tensor`] for logits that are not whole rows, [`Error::Config`] for more experts kept than there are.
pub fn route(experts: usize, logits: &[f64], top_k: usize) -> Result<Routed> {
    whole_rows("logits", logits.len(), "experts", experts)?;
    if top_k == 0 || top_k > experts {
        return Err(Error::Config { what: "top_k", value: top_k.to_string(), expected: "one expert to all of them" });
    }
    let mut routed = Routed { experts: Vec::new(), weights: Vec::new() };
    for logits in logits.chunks_exact(experts) {
        let mut order: Vec<usize> = (0..experts).collect();
        order.sort_by(|&a, &b| selection_order(logits[a], logits[b]));
        let kept = &order[..top_k];
        let powers: Vec<f64> = kept.iter().map(|&e| (logits[e] - logits[kept[0]]).exp()).collect();
        let sum: f64 = powers.iter().sum();
        routed.experts.extend(kept.iter().map(|&e| e as u32));
        routed.weights.extend(powers.iter().map(|power| power / sum));
    }
    Ok(routed)
}

/// A mixture of experts over `input` `[tokens, hidden]`: the output `[tokens, hidden]`, for the experts that `routed` holds.
///
/// # Errors
/// [`Error::Length`] or [`Error::Tensor`] where the slices fit no such shapes.
pub fn moe(hidden: usize, input: &[f32], experts: &Experts<'_>, routed: &Routed) -> Result<Vec<f64>> {
    let tokens = whole_rows("input", input.len(), "hidden", hidden)?;
    let down_size = whole_rows("down", experts.down.len(), "experts", experts.count)?;
    let inner = whole_rows("down", down_size, "hidden", hidden)?;
    let up_size = hidden * inner * experts.activation.columns();
    length("up", experts.up.len(), experts.count * up_size)?;
    length("experts", routed.experts.len(), tokens * experts.top_k)?;
    let chosen = routed.experts.chunks_exact(experts.top_k).zip(routed.weights.chunks_exact(experts.top_k));
    let mixed = input.chunks_exact(hidden).zip(chosen).map(|(x, (chosen, weights))| {
        let x = to_f64(x);
        let mut output = vec![0.0; hidden];
        for (&expert, weight) in chosen.iter().zip(weights) {
            let up = &experts.up[expert as usize * up_size..][..up_size];
            let down = &experts.down[expert as usize * down_size..][..down_size];
            let given = ffn(&x, up, down, experts.activation);
            output.iter_mut().zip(given).for_each(|(sum, y)| *sum += weight * y);
        }
        output
    });
    Ok(mixed.flatten().collect())
}

/// The router's logits `[tokens, experts]` of `input` `[tokens, hidden]`.
///
/// # Errors
/// As [`moe`].
pub fn logits(hidden: usize, input: &[f32], experts: &Experts<'_>) -> Result<Vec<f64>> {
    whole_rows("input", input.len(), "hidden", hidden)?;
    length("router", experts.router.len(), hidden * experts.count)?;
    Ok(input.chunks_exact(hidden).flat_map(|x| product(&to_f64(x), experts.router)).collect())
}

/// Decoding attention: the last position of each sequence against the cached ones and itself. `projected` `[batch, 3 · heads ·
/// head_dim]` holds its query, key and value, `keys` and `values` `[batch, heads, cached, head_dim]`; returns `[batch, heads · head_dim]`.
///
/// # Errors
/// [`Error::Length`] or [`Error::Tensor`] where the slices fit no such shapes.
pub fn attention(heads: usize, head_dim: usize, projected: &[f32], keys: &[f32], values: &[f32]) -> Result<Vec<f64>> {
    let width = heads * head_dim;
    let batch = whole_rows("projected", projected.len(), "3 · heads · head_dim", 3 * width)?;
    let positions = whole_rows("keys", keys.len(), "batch · heads · head_dim", batch * width)?;
    length("values", values.len(), keys.len())?;
    let mut output = Vec::new();
    for sequence in 0..batch {
        let of = |part: usize, head: usize| {
            to_f64(&projected[(sequence * 3 + part) * width + head * head_dim..][..head_dim])
        };
        for head in 0..heads {
            let cache = |numbers: &[f32]| -> Vec<Vec<f64>> {
                let first = (sequence * heads + head) * positions * head_dim;
                numbers[first..][..positions * head_dim].chunks_exact(head_dim).map(to_f64).collect()
            };
            let query = of(0, head);
            let rows = |mut rows: Vec<Vec<f64>>, own| {
                rows.push(own);
                rows
            };
            let (keys, values) = (rows(cache(keys), of(1, head)), rows(cache(values), of(2, head)));
            let scale = (head_dim as f64).sqrt();
            let scores: Vec<f64> = keys.iter().map(|key| dot(key, &query) / scale).collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let powers: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
            let sum: f64 = powers.iter().sum();
            output.extend((0..head_dim).map(|column| {
                values.iter().zip(&powers).map(|(value, power)| value[column] * power / sum).sum::<f64>()
            }));
        }
    }
    Ok(output)
}

/// `sum = stream + update` and `RMSNorm(sum) · weight`, over rows as long as `weight`.
///
/// # Errors
/// [`Error::Length`] or [`Error::Tensor`] where the slices fit no such shapes.
pub fn residual(stream: &[f32], update: &[f32], weight: &[f32], eps: f32) -> Result<(Vec<f64>, Vec<f64>)> {
    whole_rows("stream", stream.len(), "width", weight.len())?;
    length("update", update.len(), stream.len())?;
    let sum: Vec<f64> = to_f64(stream).iter().zip(to_f64(update)).map(|(s, u)| s + u).collect();
    let normed = sum.chunks_exact(weight.len()).flat_map(|row| {
        let root = (dot(row, row) / row.len() as f64 + f64::from(eps)).sqrt();
        row.iter().zip(weight).map(move |(x, &w)| x / root * f64::from(w))
    });
    let normed = normed.collect();
    Ok((sum, normed))
}

/// One token through one FFN.
fn ffn(x: &[f64], up: &[f32], down: &[f32], activation: Activation) -> Vec<f64> {
    let raised = product(x, up);
    let activated: Vec<f64> = match activation {
        Activation::Gelu => raised.iter().map(|&x| gelu(x)).collect(),
        Activation::SwiGlu => {
            let (gate, rest) = raised.split_at(raised.len() / 2);
            gate.iter().zip(rest).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
        }
    };
    product(&activated, down)
}

/// The form with tanh.
fn gelu(x: f64) -> f64 {
    let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
    0.5 * x * (1.0 + inner.tanh())
}

/// `x · matrix`, `matrix` `[x.len(), out]`.
fn product(x: &[f64], matrix: &[f32]) -> Vec<f64> {
    let mut output = vec![0.0; matrix.len() / x.len()];
    for (x, row) in x.iter().zip(matrix.chunks_exact(output.len())) {
        output.iter_mut().zip(row).for_each(|(sum, &weight)| *sum += x * f64::from(weight));
    }
    output
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_activations_are_the_published_ones() {
        // gelu(1) by its tanh form, and silu(1) · 2.
        let near = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-6, "{found}, not {expected}");
        near(gelu(1.0), 0.841_192);
        near(gelu(-30.0), 0.0);
        near(dense(1, &[1.0], &[1.0, 2.0], &[1.0], Activation::SwiGlu).unwrap()[0], 2.0 * 0.731_058_6);
    }

    #[test]
    fn a_router_keeps_the_best_and_a_number_before_nan() {
        let routed = route(4, &[1.0, 3.0, f64::NAN, 3.0], 2).unwrap();
        assert_eq!((routed.experts, routed.weights), (vec![1, 3], vec![0.5, 0.5]));
        let routed = route(3, &[f64::NAN, f64::NEG_INFINITY, f64::NAN], 2).unwrap();
        assert_eq!(routed.experts, [1, 0]);
        assert!(route(3, &[0.0; 3], 4).unwrap_err().to_string().contains("top_k is 4"));
    }

    #[test]
    fn a_single_position_attends_to_itself() {
        let output = attention(1, 2, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[], &[]).unwrap();
        assert_eq!(output, [5.0, 6.0]);
    }

    #[test]
    fn slices_that_fit_no_shape_are_errors() {
        assert!(dense(3, &[0.0; 4], &[], &[], Activation::Gelu).is_err());
        assert!(dense(2, &[0.0; 4], &[0.0; 5], &[0.0; 4], Activation::Gelu).is_err());
        assert!(attention(1, 2, &[0.0; 6], &[0.0; 2], &[0.0; 4]).is_err());
        assert!(residual(&[0.0; 4], &[0.0; 3], &[1.0; 2], 0.0).is_err());
    }
}
