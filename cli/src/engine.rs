//! One way to run and to time a layer, whoever computes it: a device or the oracle.

use std::cell::RefCell;
use std::ops::Range;
use std::time::Instant;

use cubecl::Runtime;
use ultramem::kernels::optimiser::{Rule, Step};
use ultramem::reference::{self, Gradients};
use ultramem::{ElementType, HostTensor, MemoryConfig, MemoryLayer, Weights};

use crate::failure::Result;
use crate::numbers::counted;
use crate::rates::Rates;
use crate::sampling::{Effort, Run, Times, interleaved, milliseconds};

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

/// What a measurement finds.
#[derive(Debug, Clone)]
pub struct Measured {
    /// The whole forward pass.
    pub forward: Times,
    /// Each stage alone as the forward pass launches it, and what the device gives at best; only for a device.
    pub device: Option<(Vec<StageTimes>, Rates)>,
}

/// The times of a stage, or of several that the forward pass launches as one.
#[derive(Debug, Clone)]
pub struct StageTimes {
    /// The stages' names.
    pub name: &'static str,
    /// Which of the layer's four stages they are.
    pub stages: Range<usize>,
    /// Their times.
    pub times: Times,
}

/// What a measurement of training finds.
#[derive(Debug, Clone)]
pub struct Trained {
    /// The forward pass that keeps what the backward pass needs.
    pub forward: Times,
    /// The whole backward pass.
    pub backward: Times,
    /// Its stages, in the forward pass's order.
    pub stages: [Times; 4],
    /// An update of the value table.
    pub update: Times,
    /// The value rows that it changes.
    pub rows: usize,
}

/// A layer that is ready to run.
pub trait Engine {
    /// One forward pass over `[tokens, hidden_size]`, results brought to the host.
    fn forward(&self, input: &[f32]) -> Result<Outcome>;

    /// The gradients of `Σ output · grad_output`, and the slots of the forward pass that they are for. Both `[tokens, hidden_size]`.
    fn backward(&self, input: &[f32], grad_output: &[f32]) -> Result<(Vec<u32>, Gradients)>;

    /// What the device gives at best; None for the oracle.
    fn rates(&self) -> Result<Option<Rates>>;

    /// Times forward passes, and each stage where there are `rates` to hold it against. Input and results stay where they are.
    fn measure(&self, input: &[f32], effort: Effort, rates: Option<Rates>) -> Result<Measured>;

    /// Times backward passes, their stages and updates of the value table by `rule`; None for the oracle.
    fn measure_training(&mut self, input: &[f32], rule: Rule, effort: Effort) -> Result<Option<Trained>>;

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

    fn rates(&self) -> Result<Option<Rates>> {
        Ok(Some(Rates::measure(self.client(), self.dtype())?))
    }

    fn measure(&self, input: &[f32], effort: Effort, rates: Option<Rates>) -> Result<Measured> {
        let tokens = input.len() / self.config().hidden_size;
        let strategies = MemoryLayer::strategies(self, tokens);
        let input = self.upload(input)?;
        let query = self.query(&input, strategies.query)?;
        let kept = self.score(&query, strategies.score)?;
        let chosen = self.combine(&kept)?;
        let (forward, first, last): (Run<'_>, Run<'_>, Run<'_>) = (
            &|| Ok(self.forward_with(&input, strategies).map(drop)?),
            &|| Ok(self.query(&input, strategies.query).map(drop)?),
            &|| Ok(self.expand(&input, &chosen, strategies).map(drop)?),
        );
        let text = counted(tokens, "token");
        let (forward, stages) = if self.retrieves_at_once(&query, strategies.score)? {
            let retrieve: Run<'_> = &|| Ok(self.retrieve(&query, strategies.score).map(drop)?);
            let [forward, times @ ..] = interleaved(self.client(), [forward, first, retrieve, last], effort, &text)?;
            (forward, named([("query", 0..1), ("score and combine", 1..3), ("expand", 3..4)], times))
        } else {
            let (score, combine): (Run<'_>, Run<'_>) =
                (&|| Ok(self.score(&query, strategies.score).map(drop)?), &|| Ok(self.combine(&kept).map(drop)?));
            let [forward, times @ ..] =
                interleaved(self.client(), [forward, first, score, combine, last], effort, &text)?;
            let names = [("query", 0..1), ("score", 1..2), ("combine", 2..3), ("expand", 3..4)];
            (forward, named(names, times))
        };
        Ok(Measured { forward, device: rates.map(|rates| (stages, rates)) })
    }

    fn measure_training(&mut self, input: &[f32], rule: Rule, effort: Effort) -> Result<Option<Trained>> {
        let tokens = input.len() / self.config().hidden_size;
        let client = self.client().clone();
        let (input, grad_output) = (self.upload(input)?, self.upload(input)?);
        let (_, saved) = self.forward_saving(&input)?;
        let expand = self.expand_backward(&saved, &grad_output)?;
        let combine = self.combine_backward(&saved, &expand.scores)?;
        let score = self.score_backward(&saved, &combine.sides)?;
        let gate = expand.gate.as_ref();
        let optimiser = RefCell::new(self.value_optimiser(rule)?);
        let layer = RefCell::new(self);
        // A step of no length: every run finds the same table.
        let step = Step::new(0.0);
        let runs: [Run<'_>; 7] = [
            &|| Ok(layer.borrow().forward_saving(&input).map(drop)?),
            &|| Ok(MemoryLayer::backward(*layer.borrow(), &input, &saved, &grad_output).map(drop)?),
            &|| Ok(layer.borrow_mut().update_values(&mut optimiser.borrow_mut(), &expand.values, &step)?),
            &|| Ok(layer.borrow().query_backward(&input, &score.query, gate).map(drop)?),
            &|| Ok(layer.borrow().score_backward(&saved, &combine.sides).map(drop)?),
            &|| Ok(layer.borrow().combine_backward(&saved, &expand.scores).map(drop)?),
            &|| Ok(layer.borrow().expand_backward(&saved, &grad_output).map(drop)?),
        ];
        let [forward, backward, update, stages @ ..] = interleaved(&client, runs, effort, &counted(tokens, "token"))?;
        let rows = layer.borrow().used_rows(&expand.values)?;
        Ok(Some(Trained { forward, backward, stages, update, rows }))
    }

    fn strategies(&self, tokens: usize) -> Option<String> {
        Some(format!("{:?}", MemoryLayer::strategies(self, tokens)))
    }
}

fn named<const N: usize>(names: [(&'static str, Range<usize>); N], times: [Times; N]) -> Vec<StageTimes> {
    names.into_iter().zip(times).map(|((name, stages), times)| StageTimes { name, stages, times }).collect()
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
        let weights = weights.rounded(dtype);
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

    fn rates(&self) -> Result<Option<Rates>> {
        Ok(None)
    }

    fn measure(&self, input: &[f32], effort: Effort, _rates: Option<Rates>) -> Result<Measured> {
        let mut found = Vec::new();
        for _ in 0..effort.samples {
            let start = Instant::now();
            self.run(input)?;
            found.push(milliseconds(start));
        }
        Ok(Measured { forward: Times::of(found), device: None })
    }

    fn measure_training(&mut self, _input: &[f32], _rule: Rule, _effort: Effort) -> Result<Option<Trained>> {
        Ok(None)
    }

    fn strategies(&self, _tokens: usize) -> Option<String> {
        None
    }
}
