//! The processor as an engine: the library's native layer, forwards and backwards, and its stages one by one.

use std::cell::RefCell;
use std::hint::black_box;

use ultramem::kernels::optimiser::Rule;
use ultramem::processor::stages::{combine, expand, query, score, weigh};
use ultramem::processor::table::optimiser::{Optimiser, Step};
use ultramem::processor::{Layer, NumbersMut, Place, RowGradients};
use ultramem::reference::Gradients;
use ultramem::{CpuLayer, ElementType, HostTensor, MemoryConfig, Weight, Weights};

use crate::engine::{Engine, Measured, Outcome, StageTimes, Trained};
use crate::failure::{Failure, Result};
use crate::numbers::counted;
use crate::rates::Rates;
use crate::sampling::{Effort, Run, done, interleaved};

/// A layer on the processor. Weights and inputs are rounded to the element type; arithmetic is f32.
pub struct Processor<'a> {
    config: MemoryConfig,
    weights: Weights<'a>,
    dtype: ElementType,
    invariant: bool,
}

impl<'a> Processor<'a> {
    /// A layer of `weights` in `dtype`, in place where they have it already.
    pub fn new(config: &MemoryConfig, weights: &'a Weights<'_>, dtype: ElementType, invariant: bool) -> Result<Self> {
        weights.check(config)?;
        Ok(Self { config: config.clone(), weights: weights.cast(dtype), dtype, invariant })
    }

    fn layer(&self) -> Result<CpuLayer<'_>> {
        Ok(CpuLayer::new(self.config.clone(), &self.weights)?.with_invariance(self.invariant))
    }

    fn rounded(&self, numbers: &[f32]) -> Result<Vec<f32>> {
        Ok(HostTensor::from_f32([numbers.len()], numbers)?.cast(self.dtype).to_f32())
    }
}

/// Keeps a result from being left out because nobody reads it.
fn run<T>(result: T) -> Result<()> {
    black_box(result);
    Ok(())
}

impl Engine for Processor<'_> {
    fn forward(&self, input: &[f32]) -> Result<Outcome> {
        let forward = self.layer()?.forward(&self.rounded(input)?)?;
        Ok(Outcome { output: forward.output, slots: forward.chosen.slots, scores: forward.chosen.scores })
    }

    fn backward(&self, input: &[f32], grad_output: &[f32]) -> Result<(Vec<u32>, Gradients)> {
        let (layer, input, grad_output) = (self.layer()?, self.rounded(input)?, self.rounded(grad_output)?);
        let (forward, saved) = layer.forward_saving(&input)?;
        let gradients = layer.backward(&input, &saved, &grad_output)?;
        Ok((forward.chosen.slots, layer.named(&gradients)))
    }

    fn rates(&self) -> Result<Option<Rates>> {
        Ok(Some(Rates::of_processor()?))
    }

    fn measure(&self, input: &[f32], effort: Effort, rates: Option<Rates>) -> Result<Measured> {
        let (whole, input) = (self.layer()?.prepared(), self.rounded(input)?);
        let (layer, input) = (whole.layer(), input.as_slice());
        let queries = query::normalised(layer, query::forward(layer, input)?)?;
        let kept = score::forward(layer, &queries)?;
        let chosen = combine::forward(layer, &kept)?;
        let places = expand::places(layer, &chosen.slots)?;
        let weighed = weigh::forward(layer, input, &chosen, &places)?;
        let scores = weighed.as_ref().map_or(&chosen.scores, |weighed| &weighed.scores);
        let forward: Run<'_> = &|| run(whole.forward(input)?);
        let of_query: Run<'_> = &|| run(query::normalised(layer, query::forward(layer, input)?)?);
        let of_score: Run<'_> = &|| run(score::forward(layer, &queries)?);
        let of_combine: Run<'_> = &|| run(combine::forward(layer, &kept)?);
        let of_weigh: Run<'_> = &|| run(weigh::forward(layer, input, &chosen, &places)?);
        let of_expand: Run<'_> =
            &|| run(expand::forward(layer, input, &expand::places(layer, &chosen.slots)?, scores)?);
        let mut stages = vec![("query", of_query), ("score", of_score), ("combine", of_combine)];
        stages.extend(weighed.is_some().then_some(("weigh", of_weigh)));
        stages.push(("expand", of_expand));
        let runs: Vec<_> = std::iter::once(forward).chain(stages.iter().map(|(_, run)| *run)).collect();
        let tokens = input.len() / self.config.hidden_size;
        let mut times = interleaved(&done, &runs, effort, &counted(tokens, "token"))?.into_iter();
        let forward = times.next().ok_or_else(|| Failure::new("a run has no times"))?;
        let of_stage = |(at, ((name, _), times))| StageTimes { name, stages: at..at + 1, times };
        let stages = stages.into_iter().zip(times).enumerate().map(of_stage).collect();
        Ok(Measured { forward, device: rates.map(|rates| (stages, rates)) })
    }

    fn measure_training(&mut self, input: &[f32], rule: Rule, effort: Effort) -> Result<Option<Trained>> {
        let mut table = self.weights[Weight::Values].bytes().to_vec();
        let (whole, input) = (self.layer()?, self.rounded(input)?);
        let (layer, input) = (whole.layer(), input.as_slice());
        let steps = Steps::new(layer, input)?;
        let (_, saved) = whole.forward_saving(input)?;
        let optimiser = RefCell::new(Optimiser::new(rule, self.config.table_rows(), self.config.value_dim)?);
        let rows = steps.expanded.rows.clone();
        let table = RefCell::new(table.as_mut_slice());
        let forward: Run<'_> = &|| run(whole.forward_saving(input)?);
        let backward: Run<'_> = &|| run(whole.backward(input, &saved, input)?);
        let update: Run<'_> = &|| step(&mut optimiser.borrow_mut(), &mut table.borrow_mut(), self.dtype, &rows);
        let of_query: Run<'_> = &|| run(steps.query(layer, input)?);
        let of_score: Run<'_> = &|| run(steps.score(layer)?);
        let of_combine: Run<'_> = &|| run(steps.combine(layer)?);
        let of_weigh: Run<'_> = &|| run(steps.weigh(layer, input)?);
        let of_expand: Run<'_> = &|| run(steps.expand(layer, input)?);
        let mut runs = vec![forward, backward, update, of_query, of_score, of_combine];
        runs.extend(steps.weighed.is_some().then_some(of_weigh));
        runs.push(of_expand);
        let tokens = input.len() / self.config.hidden_size;
        let mut times = interleaved(&done, &runs, effort, &counted(tokens, "token"))?.into_iter();
        let (Some(forward), Some(backward), Some(update)) = (times.next(), times.next(), times.next()) else {
            return Err(Failure::new("a run has no times"));
        };
        let used = rows.rows.len();
        Ok(Some(Trained { forward, backward, stages: times.collect(), update, rows: used }))
    }

    fn strategies(&self, _tokens: usize) -> Option<String> {
        None
    }
}

/// What each stage of a backward pass is given.
struct Steps {
    raw: Vec<f32>,
    queries: Vec<f32>,
    kept: score::Kept,
    chosen: combine::Chosen,
    places: Vec<Place>,
    weighed: Option<weigh::Weighed>,
    pooled: expand::Expanded,
    expanded: expand::ExpandGradients,
    weighs: Option<weigh::WeighGradients>,
    combined: combine::CombineGradients,
    scored: score::ScoreGradients,
}

impl Steps {
    /// The output's gradient is the input itself.
    fn new(layer: &Layer<'_>, input: &[f32]) -> Result<Self> {
        let raw = query::forward(layer, input)?;
        let queries = query::normalised(layer, raw.clone())?;
        let kept = score::forward(layer, &queries)?;
        let chosen = combine::forward(layer, &kept)?;
        let places = expand::places(layer, &chosen.slots)?;
        let weighed = weigh::forward(layer, input, &chosen, &places)?;
        let scores = weighed.as_ref().map_or(&chosen.scores, |weighed| &weighed.scores);
        let (_, pooled) = expand::forward(layer, input, &places, scores)?;
        let expanded = expand::backward(layer, &places, scores, &pooled, input)?;
        let weighs = match &weighed {
            Some(weighed) => weigh::backward(layer, input, &chosen, &places, weighed, &expanded.scores)?,
            None => None,
        };
        let grad_scores = weighs.as_ref().map_or(&expanded.scores, |it| &it.scores);
        let combined = combine::backward(layer, &kept, &chosen, grad_scores)?;
        let scored = score::backward(layer, &raw, &queries, &kept, &combined.kept)?;
        Ok(Self { raw, queries, kept, chosen, places, weighed, pooled, expanded, weighs, combined, scored })
    }

    fn scores(&self) -> &[f32] {
        self.weighed.as_ref().map_or(&self.chosen.scores, |weighed| &weighed.scores)
    }

    fn expand(&self, layer: &Layer<'_>, input: &[f32]) -> Result<expand::ExpandGradients> {
        Ok(expand::backward(layer, &self.places, self.scores(), &self.pooled, input)?)
    }

    fn weigh(&self, layer: &Layer<'_>, input: &[f32]) -> Result<Option<weigh::WeighGradients>> {
        let Some(weighed) = &self.weighed else { return Ok(None) };
        Ok(weigh::backward(layer, input, &self.chosen, &self.places, weighed, &self.expanded.scores)?)
    }

    fn combine(&self, layer: &Layer<'_>) -> Result<combine::CombineGradients> {
        let grad_scores = self.weighs.as_ref().map_or(&self.expanded.scores, |it| &it.scores);
        Ok(combine::backward(layer, &self.kept, &self.chosen, grad_scores)?)
    }

    fn score(&self, layer: &Layer<'_>) -> Result<score::ScoreGradients> {
        Ok(score::backward(layer, &self.raw, &self.queries, &self.kept, &self.combined.kept)?)
    }

    fn query(&self, layer: &Layer<'_>, input: &[f32]) -> Result<query::InputGradients> {
        let z = self.weighs.as_ref().map_or(&[][..], |it| &it.z);
        let grads = query::OfMaps {
            query: &self.scored.query,
            z,
            gate: &self.expanded.gate,
            output_gate: &self.expanded.output_gate,
        };
        Ok(query::backward(layer, input, &grads)?)
    }
}

/// A step of no length: every run finds the same table.
fn step(optimiser: &mut Optimiser, table: &mut [u8], dtype: ElementType, rows: &RowGradients) -> Result<()> {
    Ok(optimiser.step(NumbersMut::of_bytes(dtype, table)?, rows, &Step::new(0.0))?)
}
