//! Random calls of every launch of what memory layers are compared with. A call gives what it documents or an error; it never panics.

use cubecl::prelude::*;
use rand::Rng;
use ultramem::kernels::Error;
use ultramem_versus::kernels::{Activation, Experts, attention, dense, moe, residual, route};

use super::draw::{Draw, shaped};

/// Draws a call from `seed` and makes it on `client`; now and then a tensor is of `other`, of another device. Returns the call's name and whether
/// it was accepted.
pub fn call<R: Runtime>(client: &ComputeClient<R>, other: &ComputeClient<R>, seed: u64) -> (&'static str, bool) {
    let draw = &mut Draw::new(client, other, seed);
    let (name, result) = match draw.rng.random_range(0..2) {
        0 => ("blocks", blocks(draw)),
        _ => ("mixture", mixture(draw)),
    };
    (name, result.is_ok())
}

/// What a block has but for a mixture: attention, the residual, a dense FFN.
fn blocks<R: Runtime>(draw: &mut Draw<'_, R>) -> Result<(), Error> {
    let ([batch, heads, cached, head_dim], dtype) =
        ([draw.size(), draw.some().min(4), draw.some(), draw.some()], draw.element());
    let (keys, values) =
        (draw.tensor(&[batch, heads, cached, head_dim], dtype), draw.tensor(&[batch, heads, cached, head_dim], dtype));
    let projected = draw.tensor(&[batch, 3 * heads * head_dim], dtype);
    if let Ok(output) = attention(draw.client, &projected, &keys, &values) {
        // Other caches or another stream than were meant may fit each other, too.
        shaped("attention", &output, &[keys.shape()[0], keys.shape()[1] * keys.shape()[3]]);
    }
    let [tokens, hidden, inner] = [draw.size(), draw.some(), draw.some()];
    let (stream, update) = (draw.tensor(&[tokens, hidden], dtype), draw.tensor(&[tokens, hidden], dtype));
    let weight = draw.float(&[hidden]);
    if let Ok((sum, normed)) = residual(draw.client, &stream, &update, &weight, 1e-5) {
        shaped("sum", &sum, stream.shape());
        shaped("normed", &normed, stream.shape());
    }
    let (activation, columns) =
        if draw.one_in(2) { (Activation::Gelu, inner) } else { (Activation::SwiGlu, 2 * inner) };
    let (up, down) = (draw.tensor(&[hidden, columns], dtype), draw.tensor(&[inner, hidden], dtype));
    let strategy = draw.product();
    let output = dense(draw.client, &stream, &up, &down, activation, strategy)?;
    shaped("dense", &output, &stream.shape().to_vec());
    Ok(())
}

fn mixture<R: Runtime>(draw: &mut Draw<'_, R>) -> Result<(), Error> {
    let ([tokens, count, inner, hidden], dtype) =
        ([draw.size(), draw.some(), draw.some(), draw.some()], draw.element());
    let top_k = if draw.hostile { draw.size().min(6) } else { draw.some().min(count).min(6) };
    let logits = draw.float(&[tokens, count]);
    if let Ok(routed) = route(draw.client, &logits, top_k) {
        shaped("experts", &routed.experts, &[logits.shape()[0], top_k]);
    }
    let (input, router) = (draw.tensor(&[tokens, hidden], dtype), draw.tensor(&[hidden, count], dtype));
    let (activation, columns) =
        if draw.one_in(2) { (Activation::Gelu, inner) } else { (Activation::SwiGlu, 2 * inner) };
    let (up, down) = (draw.tensor(&[count, hidden, columns], dtype), draw.tensor(&[count, inner, hidden], dtype));
    let experts = Experts { router: &router, up: &up, down: &down, activation, top_k };
    let found = moe(draw.client, &input, &experts)?;
    shaped("mixture", &found.output, &input.shape().to_vec());
    Ok(())
}
