//! One way to run and to time a layer, whoever computes it: a device, the processor or the oracle.

use std::cell::RefCell;
use std::ops::Range;
use std::time::Instant;

use cubecl::Runtime;
use ultramem::kernels::RetrievePlans;
use ultramem::kernels::optimiser::{Rule, Step};
use ultramem::reference::{self, Gradients};
use ultramem::{ElementType, HostTensor, MapGradients, MemoryConfig, MemoryLayer, Weights};

use crate::failure::{Failure, Result};
use crate::numbers::counted;
use crate::rates::Rates;
use crate::sampling::{Effort, Run, Times, interleaved, milliseconds, waiting};

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
    pub stages: Vec<Times>,
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
        let weighed = self.weigh(&input, &chosen, strategies.query)?;
        let weighs = weighed.is_some();
        let weighed = weighed.map_or_else(|| chosen.clone(), |(_, weighed)| weighed.chosen);
        let forward: Run<'_> = &|| Ok(self.forward_with(&input, strategies).map(drop)?);
        let query_run: Run<'_> = &|| Ok(self.query(&input, strategies.query).map(drop)?);
        let retrieve: Run<'_> = &|| Ok(self.retrieve(&query, strategies.score).map(drop)?);
        let score: Run<'_> = &|| Ok(self.score(&query, strategies.score).map(drop)?);
        let combine: Run<'_> = &|| Ok(self.combine(&kept).map(drop)?);
        let weigh: Run<'_> = &|| Ok(self.weigh(&input, &chosen, strategies.query).map(drop)?);
        let expand: Run<'_> = &|| Ok(self.expand(&input, &weighed, strategies).map(drop)?);
        let mut stages = vec![("query", 0..1, query_run)];
        match self.plans(tokens, strategies)?.retrieve {
            RetrievePlans::Together { .. } => stages.push(("score and combine", 1..3, retrieve)),
            RetrievePlans::Apart { .. } => stages.extend([("score", 1..2, score), ("combine", 2..3, combine)]),
        }
        if weighs {
            stages.push(("weigh", 3..4, weigh));
        }
        let last = 3 + usize::from(weighs);
        stages.push(("expand", last..last + 1, expand));
        let runs: Vec<_> = std::iter::once(forward).chain(stages.iter().map(|(.., run)| *run)).collect();
        let mut times = interleaved(&waiting(self.client()), &runs, effort, &counted(tokens, "token"))?.into_iter();
        let forward = times.next().ok_or_else(|| Failure::new("a run has no times"))?;
        let of_stage = |((name, stages, _), times)| StageTimes { name, stages, times };
        let stages = stages.into_iter().zip(times).map(of_stage).collect();
        Ok(Measured { forward, device: rates.map(|rates| (stages, rates)) })
    }

    fn measure_training(&mut self, input: &[f32], rule: Rule, effort: Effort) -> Result<Option<Trained>> {
        let tokens = input.len() / self.config().hidden_size;
        let client = self.client().clone();
        let (input, grad_output) = (self.upload(input)?, self.upload(input)?);
        let (_, saved) = self.forward_saving(&input)?;
        let expand = self.expand_backward(&saved, &grad_output)?;
        let weigh = self.weigh_backward(&saved, &expand)?;
        let grad_scores = weigh.as_ref().map_or(&expand.scores, |weigh| &weigh.scores);
        let combine = self.combine_backward(&saved, grad_scores)?;
        let score = self.score_backward(&saved, &combine.sides)?;
        let maps = MapGradients {
            gate: expand.gate.clone(),
            output_gate: expand.output_gate.clone(),
            z: weigh.as_ref().map(|weigh| weigh.z.clone()),
        };
        let optimiser = RefCell::new(self.value_optimiser(rule)?);
        let layer = RefCell::new(self);
        // A step of no length: every run finds the same table.
        let step = Step::new(0.0);
        let forward: Run<'_> = &|| Ok(layer.borrow().forward_saving(&input).map(drop)?);
        let backward: Run<'_> = &|| Ok(MemoryLayer::backward(*layer.borrow(), &input, &saved, &grad_output).map(drop)?);
        let update: Run<'_> =
            &|| Ok(layer.borrow_mut().update_values(&mut optimiser.borrow_mut(), &expand.values, &step)?);
        let of_query: Run<'_> = &|| Ok(layer.borrow().query_backward(&input, &score.query, &maps).map(drop)?);
        let of_score: Run<'_> = &|| Ok(layer.borrow().score_backward(&saved, &combine.sides).map(drop)?);
        let of_combine: Run<'_> = &|| Ok(layer.borrow().combine_backward(&saved, grad_scores).map(drop)?);
        let of_weigh: Run<'_> = &|| Ok(layer.borrow().weigh_backward(&saved, &expand).map(drop)?);
        let of_expand: Run<'_> = &|| Ok(layer.borrow().expand_backward(&saved, &grad_output).map(drop)?);
        let mut runs = vec![forward, backward, update, of_query, of_score, of_combine];
        runs.extend(weigh.is_some().then_some(of_weigh));
        runs.push(of_expand);
        let mut times = interleaved(&waiting(&client), &runs, effort, &counted(tokens, "token"))?.into_iter();
        let (Some(forward), Some(backward), Some(update)) = (times.next(), times.next(), times.next()) else {
            return Err(Failure::new("a run has no times"));
        };
        let rows = layer.borrow().used_rows(&expand.values)?;
        Ok(Some(Trained { forward, backward, stages: times.collect(), update, rows }))
    }

    fn strategies(&self, tokens: usize) -> Option<String> {
        Some(format!("{:?}", MemoryLayer::strategies(self, tokens)))
    }
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
