//! Backward: the gradients of `sum(output · grad_output)` for the input and for every weight.
//!
//! The selections are constants, and so are `u` and `v`, which only select: the chosen slots `[tokens, heads, top_m]` say all
//! that is needed, for a kept key that no slot uses has no gradient. Everything is computed slot by slot from the layer's
//! definition: `S_row[i]`, `S_col[j]` and the scores of the slot `i · side_keys + j`, in f64.

use std::collections::BTreeMap;

use super::expand::silu;
use super::score::scored_keys;
use super::{below, dot, length, linear, normalise, query, to_f64, whole_rows, widen};
use crate::checkpoint::core_name;
use crate::weights::{GATE_PROJ, KEYS_NORM, layout};
use crate::{HostTensor, Kind, MemoryConfig, Norm, Result, Weights};

/// Gradients of one backward pass, each in the shape of what it is the gradient of.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients {
    /// `[tokens, hidden_size]`.
    pub input: Vec<f64>,
    /// `[query_heads · 2 · key_dim, hidden_size]`.
    pub query_proj: Vec<f64>,
    /// `[key_dim]`.
    pub query_norm: Vec<f64>,
    /// `[heads, 2, side_keys, key_dim, tucker_rank]`.
    pub keys: Vec<f64>,
    /// `[key_dim]`; zeros where the keys are taken as they are.
    pub keys_norm: Vec<f64>,
    /// `[cores, heads, tucker_rank, tucker_rank]`; empty for product keys.
    pub cores: Vec<f64>,
    /// The chosen rows of the value table, each with its `[value_dim]`.
    pub values: BTreeMap<usize, Vec<f64>>,
    /// `[hidden_size, expansion · value_dim]`.
    pub values_proj: Vec<f64>,
    /// `[value_dim, hidden_size]`; empty without a gate.
    pub gate_proj: Vec<f64>,
}

impl Gradients {
    /// The gradients as a file holds them, dense and in f32: `grad_input`, and `grad.<name>` for each weight of the layer by its name in a
    /// checkpoint. Keys that are taken as they are have no gradient for their norm.
    ///
    /// # Errors
    /// [`Error::Length`](crate::Error::Length) for gradients that are not of a layer of this `config`.
    pub fn named(&self, config: &MemoryConfig) -> Result<Vec<(String, HostTensor<'static>)>> {
        let mut values = vec![0.0; config.rows() * config.value_dim];
        for (row, gradient) in &self.values {
            values[row * config.value_dim..][..config.value_dim].copy_from_slice(gradient);
        }
        let tensor = |shape: Vec<usize>, numbers: &[f64]| {
            let numbers: Vec<f32> = numbers.iter().map(|&x| x as f32).collect();
            HostTensor::from_f32(shape, &numbers)
        };
        let (heads, rank) = (config.heads, config.tucker_rank);
        let tokens = self.input.len() / config.hidden_size;
        let mut named = vec![("grad_input".to_string(), tensor(vec![tokens, config.hidden_size], &self.input)?)];
        let own = [
            &self.query_proj,
            &self.query_norm,
            &self.keys,
            &self.keys_norm,
            &values,
            &self.values_proj,
            &self.gate_proj,
        ];
        for ((name, shape), numbers) in layout(config).into_iter().zip(own) {
            let absent = (name == KEYS_NORM && !config.normalises_keys()) || (name == GATE_PROJ && !config.gated());
            if !absent {
                named.push((format!("grad.{name}"), tensor(shape, numbers)?));
            }
        }
        for (core, numbers) in self.cores.chunks_exact(heads * rank * rank).enumerate() {
            named.push((format!("grad.{}", core_name(core)), tensor(vec![heads, rank, rank], numbers)?));
        }
        Ok(named)
    }
}

/// The gradients for `input` and `grad_output`, both `[tokens, hidden_size]`, and the `slots` that the forward pass chose.
///
/// # Errors
/// [`Error::Tensor`](crate::Error::Tensor) or [`Error::Length`](crate::Error::Length) for weights that do not fit `config`,
/// wrong lengths, or a slot that is not below `side_keys²`.
pub fn backward(
    config: &MemoryConfig,
    weights: &Weights<'_>,
    input: &[f32],
    slots: &[u32],
    grad_output: &[f32],
) -> Result<Gradients> {
    weights.check(config)?;
    let (hidden, m, n) = (config.hidden_size, config.top_m, config.side_keys);
    let (r, kd, vd, pd) = (config.tucker_rank, config.key_dim, config.value_dim, config.pooled_dim());
    let tokens = whole_rows("input", input.len(), "hidden_size", hidden)?;
    length("slots", slots.len(), tokens * config.heads * m)?;
    length("grad_output", grad_output.len(), input.len())?;
    below("slots", slots, config.slots())?;
    let ultramem = config.kind == Kind::UltraMem;
    let queries = query(config, weights, input)?;
    let keys = scored_keys(config, weights);
    let cores = to_f64(&weights.cores);
    let (w_q, w_o) = (widen(&weights.query_proj), widen(&weights.values_proj));
    let gate = weights.gate_proj.as_ref().map(widen);
    let mut out = Gradients {
        input: vec![0.0; input.len()],
        query_proj: vec![0.0; w_q.len()],
        query_norm: vec![0.0; kd],
        keys: Vec::new(),
        keys_norm: vec![0.0; kd],
        cores: vec![0.0; cores.len()],
        values: BTreeMap::new(),
        values_proj: vec![0.0; w_o.len()],
        gate_proj: vec![0.0; gate.as_ref().map_or(0, Vec::len)],
    };
    let mut grad_keys = vec![0.0; keys.len()];
    let width = config.query_heads() * 2 * kd;
    for t in 0..tokens {
        let x = to_f64(&input[t * hidden..][..hidden]);
        let gy = to_f64(&grad_output[t * hidden..][..hidden]);
        let q = &queries[t * width..][..width];
        // Each entry: head, key offsets and query offsets of both sides, block, row, and its scores.
        let mut entries = Vec::new();
        for head in 0..config.heads {
            let pair = head % config.query_heads();
            let mut totals = Vec::new();
            for &slot in &slots[(t * config.heads + head) * m..][..m] {
                let at = [slot as usize / n, slot as usize % n];
                let key = [0, 1].map(|s| ((head * 2 + s) * n + at[s]) * r * kd);
                let from = [0, 1].map(|s| (pair * 2 + s) * kd);
                let side = [0, 1].map(|s| -> Vec<f64> {
                    (0..r).map(|rho| dot(&q[from[s]..][..kd], &keys[key[s] + rho * kd..][..kd])).collect()
                });
                let scores: Vec<f64> = match ultramem {
                    true => (0..config.cores)
                        .map(|k| {
                            let core = &cores[(k * config.heads + head) * r * r..][..r * r];
                            dot(&side[0], &linear(core, &side[1]))
                        })
                        .collect(),
                    false => vec![side[0][0] + side[1][0]],
                };
                let address = weights.shuffle_index.as_ref().map_or(slot, |index| index[slot as usize]) as usize;
                totals.push(scores[0]);
                entries.push((head, key, from, side, scores, address / config.rows(), address % config.rows()));
            }
            if !ultramem {
                let largest = totals.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = totals.iter().map(|total| (total - largest).exp()).sum();
                let first = entries.len() - m;
                for (entry, total) in entries[first..].iter_mut().zip(&totals) {
                    entry.4 = vec![(total - largest).exp() / sum];
                }
            }
        }
        let slice = vd / config.cores;
        let mut pooled = vec![0.0; pd];
        let rows: Vec<Vec<f64>> =
            entries.iter().map(|entry| to_f64(&weights.values.row(entry.6).unwrap_or_default())).collect();
        for (entry, row) in entries.iter().zip(&rows) {
            for (c, value) in row.iter().enumerate() {
                pooled[entry.5 * vd + c] += entry.4[c / slice] * value;
            }
        }
        let mut gp: Vec<f64> = (0..pd).map(|c| (0..hidden).map(|o| w_o[o * pd + c] * gy[o]).sum()).collect();
        if let Some(gate) = &gate {
            let g = linear(gate, &x);
            for c in 0..pd {
                let sigmoid = 1.0 / (1.0 + (-g[c]).exp());
                let gg = gp[c] * pooled[c] * sigmoid * (1.0 + g[c] * (1.0 - sigmoid));
                pooled[c] *= silu(g[c]);
                gp[c] *= silu(g[c]);
                for h in 0..hidden {
                    out.gate_proj[c * hidden + h] += gg * x[h];
                    out.input[t * hidden + h] += gg * gate[c * hidden + h];
                }
            }
        }
        for (line, gy) in out.values_proj.chunks_exact_mut(pd).zip(&gy) {
            line.iter_mut().zip(&pooled).for_each(|(out, pooled)| *out += gy * pooled);
        }
        let mut grads: Vec<Vec<f64>> = Vec::new();
        for (entry, row) in entries.iter().zip(&rows) {
            let mut gs = vec![0.0; config.cores];
            let gv = out.values.entry(entry.6).or_insert_with(|| vec![0.0; vd]);
            for c in 0..vd {
                gs[c / slice] += gp[entry.5 * vd + c] * row[c];
                gv[c] += gp[entry.5 * vd + c] * entry.4[c / slice];
            }
            grads.push(gs);
        }
        if !ultramem {
            for (grads, entries) in grads.chunks_mut(m).zip(entries.chunks(m)) {
                let mean: f64 = grads.iter().zip(entries).map(|(g, entry)| g[0] * entry.4[0]).sum();
                grads.iter_mut().zip(entries).for_each(|(g, entry)| g[0] = entry.4[0] * (g[0] - mean));
            }
        }
        let mut gq = vec![0.0; width];
        for ((head, key, from, side, ..), gs) in entries.iter().zip(&grads) {
            let mut g_side = [vec![0.0; r], vec![0.0; r]];
            if ultramem {
                for (k, g) in gs.iter().enumerate() {
                    for (a, b) in (0..r).flat_map(|a| (0..r).map(move |b| (a, b))) {
                        let core = ((k * config.heads + head) * r + a) * r + b;
                        out.cores[core] += g * side[0][a] * side[1][b];
                        g_side[0][a] += g * cores[core] * side[1][b];
                        g_side[1][b] += g * cores[core] * side[0][a];
                    }
                }
            } else {
                g_side = [vec![gs[0]], vec![gs[0]]];
            }
            for s in 0..2 {
                for (rho, d) in (0..r).flat_map(|rho| (0..kd).map(move |d| (rho, d))) {
                    gq[from[s] + d] += g_side[s][rho] * keys[key[s] + rho * kd + d];
                    grad_keys[key[s] + rho * kd + d] += g_side[s][rho] * q[from[s] + d];
                }
            }
        }
        let raw = linear(&w_q, &x);
        let norm = widen(&weights.query_norm);
        for first in (0..width).step_by(kd) {
            let g = normalise_backward(config, &norm, &raw[first..][..kd], &gq[first..][..kd], &mut out.query_norm);
            for (d, g) in g.iter().enumerate() {
                for h in 0..hidden {
                    out.query_proj[(first + d) * hidden + h] += g * x[h];
                    out.input[t * hidden + h] += g * w_q[(first + d) * hidden + h];
                }
            }
        }
    }
    out.keys = keys_backward(config, weights, &grad_keys, &mut out.keys_norm);
    Ok(out)
}

/// From the scored keys' gradient `[.., tucker_rank, key_dim]` to the keys' `[.., key_dim, tucker_rank]`.
fn keys_backward(config: &MemoryConfig, weights: &Weights<'_>, grad: &[f64], grad_norm: &mut [f64]) -> Vec<f64> {
    let (r, kd) = (config.tucker_rank, config.key_dim);
    let (keys, norm) = (widen(&weights.keys), widen(&weights.keys_norm));
    let mut out = vec![0.0; grad.len()];
    for (at, g) in grad.chunks_exact(kd).enumerate() {
        let place = |d: usize| (at / r * kd + d) * r + at % r;
        let raw: Vec<f64> = (0..kd).map(|d| keys[place(d)]).collect();
        let g = match config.normalises_keys() {
            true => normalise_backward(config, &norm, &raw, g, grad_norm),
            false => g.to_vec(),
        };
        g.iter().enumerate().for_each(|(d, g)| out[place(d)] = *g);
    }
    out
}

/// The gradient of a norm's input `x` from its output's gradient; adds the weight's to `grad_weight`.
fn normalise_backward(
    config: &MemoryConfig,
    weight: &[f64],
    x: &[f64],
    grad: &[f64],
    grad_weight: &mut [f64],
) -> Vec<f64> {
    let count = x.len() as f64;
    let mean = if config.norm == Norm::Layer { x.iter().sum::<f64>() / count } else { 0.0 };
    let scale = (x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / count + f64::from(config.norm_eps)).sqrt();
    let mut unit = x.to_vec();
    normalise(config, &vec![1.0; x.len()], &mut unit);
    let weighted: Vec<f64> = grad.iter().zip(weight).map(|(g, w)| g * w).collect();
    let along = dot(&weighted, &unit) / count;
    let across = if config.norm == Norm::Layer { weighted.iter().sum::<f64>() / count } else { 0.0 };
    grad_weight.iter_mut().zip(grad).zip(&unit).for_each(|((out, g), u)| *out += g * u);
    weighted.iter().zip(&unit).map(|(g, u)| (g - across - u * along) / scale).collect()
}
