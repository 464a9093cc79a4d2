//! `lm sample`: text from the trained model, a byte at a time.

use std::{
    io::{self, Write},
    path::Path,
};

use burn::prelude::*;
use clap::Args;
use rand::{Rng, SeedableRng, rngs::StdRng};
use ultramem::burn::MemoryBackend;

use crate::{Result, model::Model, run, train};

/// How to sample.
#[derive(Debug, Args)]
pub struct Sampling {
    /// The text that is continued
    #[arg(long, default_value = "Ge1:1 In the beginning")]
    prompt: String,
    /// Bytes to write
    #[arg(long, default_value_t = 500)]
    bytes: usize,
    /// Below 1: likelier bytes; above 1: wilder ones
    #[arg(long, default_value_t = 0.8)]
    temperature: f32,
    /// Another seed, another text
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Continues the prompt on stdout.
pub fn sample<B: MemoryBackend>(folder: &Path, sampling: &Sampling) -> Result<()> {
    if sampling.prompt.is_empty() || sampling.temperature.is_nan() || sampling.temperature <= 0.0 {
        return Err("a sample needs a prompt of at least one byte and a temperature above 0".into());
    }
    let device = Default::default();
    let (settings, model) = train::open::<B>(folder, &device)?;
    let mut text = sampling.prompt.clone().into_bytes();
    let mut rng = StdRng::seed_from_u64(sampling.seed);
    let mut out = io::stdout().lock();
    out.write_all(&text)?;
    for _ in 0..sampling.bytes {
        let logits =
            next_logits(&model, &text[text.len().saturating_sub(settings.sizes.context)..], &settings, &device)?;
        let byte = draw(&logits, sampling.temperature, &mut rng);
        text.push(byte);
        out.write_all(&[byte])?;
        out.flush()?;
    }
    Ok(writeln!(out)?)
}

/// The logits of the byte that follows `seen`. The model always runs on a whole context, so that its kernels are compiled once;
/// it can't see what follows.
fn next_logits<B: MemoryBackend>(
    model: &Model<B>,
    seen: &[u8],
    settings: &run::Settings,
    device: &B::Device,
) -> Result<Vec<f32>> {
    let context = settings.sizes.context;
    let mut bytes: Vec<i32> = seen.iter().map(|&byte| i32::from(byte)).collect();
    bytes.resize(context, 0);
    let bytes = Tensor::<B, 2, Int>::from_data(TensorData::new(bytes, [1, context]), device);
    let logits = model.forward(bytes).narrow(0, seen.len() - 1, 1);
    logits.into_data().into_vec().map_err(|error| format!("logits: {error:?}").into())
}

/// A byte by its probability.
fn draw(logits: &[f32], temperature: f32, rng: &mut StdRng) -> u8 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f32> = logits.iter().map(|logit| ((logit - largest) / temperature).exp()).collect();
    let mut left = rng.random::<f32>() * weights.iter().sum::<f32>();
    let at = weights.iter().position(|weight| {
        left -= weight;
        left < 0.0
    });
    at.unwrap_or(weights.len() - 1) as u8
}
