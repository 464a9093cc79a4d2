//! One way to run and to time a layer, whoever computes it: a device or the oracle.

use std::time::Instant;

use cubecl::{Runtime, client::ComputeClient, future::block_on};
use indicatif::ProgressBar;
use serde::Serialize;
use ultramem::reference::{self, Gradients};
use ultramem::{ElementType, HostTensor, MemoryConfig, MemoryLayer, Weights};

use crate::copy::copy_gb_s;
use crate::failure::{Failure, Result};
use crate::product::matrix_flop_ms;

/// What one forward pass gives.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// `[tokens, hidden_size]`.
    pub output: Vec<f32>,
    /// The chosen slots before the shuffle: `[tokens, heads · top_m]`.
    pub slots: Vec<u32>,
    /// `[tokens, heads · top_m, cores]`.
    pub scores: Vec<f32>,
}

/// Milliseconds of several samples.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Times {
    /// The middle one.
    pub median: f64,
    /// The shortest.
    pub min: f64,
    /// The longest.
    pub max: f64,
}

/// What a measurement finds.
#[derive(Debug, Clone)]
pub struct Measured {
    /// The whole forward pass.
    pub forward: Times,
    /// Each stage alone, and the device's copy bandwidth in GB/s; only for a device.
    pub device: Option<([Times; 4], f64)>,
    /// Operations per millisecond of a large product on the device; 0 for the oracle.
    pub matrix_flop_ms: f64,
}

/// A layer that is ready to run.
pub trait Engine {
    /// One forward pass over `[tokens, hidden_size]`, results brought to the host.
    fn forward(&self, input: &[f32]) -> Result<Outcome>;

    /// The gradients of `Σ output · grad_output`, and the slots of the forward pass that they are for. Both `[tokens, hidden_size]`.
    fn backward(&self, input: &[f32], grad_output: &[f32]) -> Result<(Vec<u32>, Gradients)>;

    /// Times `samples` forward passes, with the input and the results left where they are. Run one first: it compiles the
    /// kernels.
    fn measure(&self, input: &[f32], samples: usize) -> Result<Measured>;

    /// How the stages are computed for `tokens` tokens; None for the oracle.
    fn strategies(&self, tokens: usize) -> Option<String>;
}

impl<R: Runtime> Engine for MemoryLayer<R> {
    fn forward(&self, input: &[f32]) -> Result<Outcome> {
        let forward = Self::forward(self, &self.upload(input)?)?;
        Ok(Outcome {
            output: self.read(&forward.output)?,
            slots: self.read_slots(&forward.chosen)?,
            scores: self.read(&forward.chosen.scores)?,
        })
    }

    fn backward(&self, input: &[f32], grad_output: &[f32]) -> Result<(Vec<u32>, Gradients)> {
        let (input, grad_output) = (self.upload(input)?, self.upload(grad_output)?);
        let (forward, saved) = self.forward_saving(&input)?;
        let gradients = Self::backward(self, &input, &saved, &grad_output)?;
        Ok((self.read_slots(&forward.chosen)?, self.read_gradients(&gradients)?))
    }

    fn measure(&self, input: &[f32], samples: usize) -> Result<Measured> {
        let strategies = MemoryLayer::strategies(self, input.len() / self.config().hidden_size);
        let input = self.upload(input)?;
        let query = self.query(&input, strategies.query)?;
        let kept = self.score(&query, strategies.score)?;
        let chosen = self.combine(&kept)?;
        let runs: [&dyn Fn() -> Result<()>; 5] = [
            &|| self.forward_with(&input, strategies).map(drop).map_err(Failure::from),
            &|| self.query(&input, strategies.query).map(drop).map_err(Failure::from),
            &|| self.score(&query, strategies.score).map(drop).map_err(Failure::from),
            &|| self.combine(&kept).map(drop).map_err(Failure::from),
            &|| self.expand(&input, &chosen, strategies).map(drop).map_err(Failure::from),
        ];
        let [forward, query, score, combine, expand] = interleaved(self.client(), &runs, samples)?;
        let copy = copy_gb_s(self.client(), samples)?;
        let matrix_flop_ms = matrix_flop_ms(self.client(), self.dtype())?;
        Ok(Measured { forward, device: Some(([query, score, combine, expand], copy)), matrix_flop_ms })
    }

    fn strategies(&self, tokens: usize) -> Option<String> {
        Some(format!("{:?}", MemoryLayer::strategies(self, tokens)))
    }
}

/// Samples of each of `runs`, taken in turn so that a device that slows down slows all of them. A sample is as many
/// launches back to back as last [`SHORTEST`], divided by their number.
fn interleaved<R: Runtime>(
    client: &ComputeClient<R>,
    runs: &[&dyn Fn() -> Result<()>; 5],
    samples: usize,
) -> Result<[Times; 5]> {
    let mut launches = [1; 5];
    for (launches, run) in launches.iter_mut().zip(runs) {
        let once = timed(client, run, 1)?;
        *launches = (SHORTEST / once).ceil().clamp(1.0, MOST_LAUNCHES) as usize;
    }
    let mut found = [const { Vec::new() }; 5];
    let bar = ProgressBar::new(samples as u64).with_message("measuring");
    for _ in 0..samples {
        for ((found, run), &launches) in found.iter_mut().zip(runs).zip(&launches) {
            found.push(timed(client, run, launches)?);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(found.map(times))
}

/// Milliseconds.
const SHORTEST: f64 = 1.0;
const MOST_LAUNCHES: f64 = 64.0;

/// Milliseconds of one of `launches` launches, the wait for the device included.
pub fn timed<R: Runtime>(client: &ComputeClient<R>, run: &dyn Fn() -> Result<()>, launches: usize) -> Result<f64> {
    let start = Instant::now();
    for _ in 0..launches {
        run()?;
    }
    block_on(client.sync())?;
    Ok(milliseconds(start) / launches as f64)
}

/// Milliseconds since `start`.
pub fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

/// The summary of at least one sample.
pub fn times(mut samples: Vec<f64>) -> Times {
    samples.sort_by(f64::total_cmp);
    let at = |index: usize| samples.get(index).copied().unwrap_or(f64::NAN);
    Times { median: at(samples.len() / 2), min: at(0), max: at(samples.len().saturating_sub(1)) }
}

/// The oracle as an engine. For f16 and bf16 it takes the same rounded weights and input as a device would, and rounds no
/// further.
pub struct Oracle<'a> {
    config: MemoryConfig,
    weights: Weights<'a>,
    dtype: ElementType,
}

impl<'a> Oracle<'a> {
    /// The oracle on `weights` rounded to `dtype`.
    pub fn new(config: &MemoryConfig, weights: &'a Weights<'_>, dtype: ElementType) -> Self {
        let weights = Weights {
            query_proj: weights.query_proj.cast(dtype),
            query_norm: weights.query_norm.cast(weights.query_norm.dtype()),
            keys: weights.keys.cast(dtype),
            keys_norm: weights.keys_norm.cast(weights.keys_norm.dtype()),
            cores: weights.cores.clone(),
            core_u: weights.core_u.clone(),
            core_v: weights.core_v.clone(),
            shuffle_index: weights.shuffle_index.clone(),
            values: weights.values.cast(dtype),
            values_proj: weights.values_proj.cast(dtype),
            gate_proj: weights.gate_proj.as_ref().map(|gate| gate.cast(dtype)),
        };
        Self { config: config.clone(), weights, dtype }
    }

    fn run(&self, input: &[f32]) -> Result<reference::Forward> {
        Ok(reference::forward(&self.config, &self.weights, &self.rounded(input)?)?)
    }

    /// The gradients for `slots` that a device chose.
    pub fn backward_for(&self, slots: &[u32], input: &[f32], grad_output: &[f32]) -> Result<Gradients> {
        let (input, grad_output) = (self.rounded(input)?, self.rounded(grad_output)?);
        Ok(reference::backward(&self.config, &self.weights, &input, slots, &grad_output)?)
    }

    fn rounded(&self, numbers: &[f32]) -> Result<Vec<f32>> {
        Ok(HostTensor::from_f32([numbers.len()], numbers)?.cast(self.dtype).to_f32())
    }
}

impl Engine for Oracle<'_> {
    fn forward(&self, input: &[f32]) -> Result<Outcome> {
        let forward = self.run(input)?;
        let narrow = |numbers: Vec<f64>| numbers.into_iter().map(|x| x as f32).collect();
        Ok(Outcome { output: narrow(forward.output), slots: forward.slots, scores: narrow(forward.scores) })
    }

    fn backward(&self, input: &[f32], grad_output: &[f32]) -> Result<(Vec<u32>, Gradients)> {
        let slots = self.run(input)?.slots;
        let gradients = self.backward_for(&slots, input, grad_output)?;
        Ok((slots, gradients))
    }

    fn measure(&self, input: &[f32], samples: usize) -> Result<Measured> {
        let mut found = Vec::new();
        for _ in 0..samples {
            let start = Instant::now();
            self.run(input)?;
            found.push(milliseconds(start));
        }
        Ok(Measured { forward: times(found), device: None, matrix_flop_ms: 0.0 })
    }

    fn strategies(&self, _tokens: usize) -> Option<String> {
        None
    }
}
