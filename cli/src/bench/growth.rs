//! `ultramem bench growth`: a decoding step while the sparse parameters grow, at one batch size: the figure that memory layers exist
//! for. Steps at all sizes of all designs are timed in turn, so that a size can be held against another.

use clap::{Args, value_parser};
use cubecl::prelude::*;
use serde_json::{Map, Value, json};
use ultramem::kernels::Tensor;
use ultramem_versus::{Cache, Decoder, Design, Plan, Scale};

use super::chart::{Chart, Line, Panel, Point, Role, look};
use super::contest::{Entry, Least, budget_json, budget_table, decoders, panels, ratio_cell, time_cell};
use super::fit::{Limits, Size, Step, growing};
use super::picture::Picture;
use super::{Model, Series, count, paragraph};
use crate::Common;
use crate::backend::Job;
use crate::failure::{Failure, Result};
use crate::numbers::grouped;
use crate::rates::Rates;
use crate::report::{Report, Table, device_json, device_line, object};
use crate::sampling::{Effort, Ratio, Run, Times, interleaved, waiting};

/// Arguments of `bench growth`.
#[derive(Debug, Args)]
pub struct GrowthArgs {
    /// Sequences that are decoded together
    #[arg(long, default_value = "8", value_parser = count)]
    batch: usize,
    /// The size of the models
    #[arg(long, value_enum, default_value = "small")]
    scale: Model,
    /// How many times the sparse parameters of the first size, a list
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = factor, default_value = "1,2,4,8,16,32")]
    factors: Vec<usize>,
    /// Positions in each sequence's cache: few, as the model is small
    #[arg(long, default_value_t = 256, value_parser = value_parser!(u32).range(1..=1 << 20))]
    cached: u32,
    #[command(flatten)]
    series: Series,
}

fn factor(text: &str) -> std::result::Result<usize, String> {
    match text.parse() {
        Ok(factor @ 1..=MOST_GROWTH) => Ok(factor),
        _ => Err(format!("expected a whole number from 1 to {MOST_GROWTH}")),
    }
}

const MOST_GROWTH: usize = 1024;
/// Milliseconds for all samples.
const BUDGET_MS: f64 = 60_000.0;

/// The designs that grow. The dense model has nothing to grow and is measured once.
const GROWING: [Design; 4] = [Design::Moe, Design::ProductKey, Design::MemoryPlus, Design::UltraMem];

/// Runs the verb.
pub fn run(args: &GrowthArgs, common: &Common) -> Result<Report> {
    let picture = args.series.plot.as_deref().map(Picture::at).transpose()?;
    let adapter = common.find_gpu("bench growth")?;
    let step = Step { batch: args.batch, dtype: common.dtype, cached: Some(args.cached as usize) };
    let factors = super::ordered(&args.factors);
    let limits = Limits::of(&adapter)?;
    let of_idle = |idle| growing(sizes(args.scale.scale(), idle, &factors)?, step, limits);
    // Half the parameters where that leaves fewer sizes out.
    let (wide, narrow) = (of_idle(IDLE)?, of_idle(IDLE / 2));
    let (sizes, notes) = match narrow {
        Ok((sizes, mut notes)) if sizes.len() > wide.0.len() => {
            notes.insert(0, FEWER_IDLE.to_string());
            (sizes, notes)
        }
        _ => wide,
    };
    let effort = Effort { samples: args.series.samples as usize, budget_ms: BUDGET_MS };
    let grown = adapter.with_client(Growth { sizes: &sizes, step, effort })?;
    let device = device_line(&adapter, common.dtype);
    let mut text = device.clone() + &head(args, &sizes, &notes);
    text += &grown.tables();
    text += &grown.rates.text();
    text += &grown.verdict();
    if let Some(picture) = picture {
        picture.write(&grown.chart(args.batch, &device).svg()?)?;
        text += &picture.line();
    }
    let mut json = device_json(&adapter, common.dtype);
    json.extend(grown.rates.json());
    json.extend([
        ("batch", json!(args.batch)),
        ("cached", json!(args.cached)),
        ("sizes", grown.json(&sizes)),
        ("notes", json!(notes)),
    ]);
    Ok(Report { text, json: object(json), passed: true })
}

/// Experts of a block that a token does not use, at ×1.
const IDLE: usize = 2;
const FEWER_IDLE: &str =
    "Scaled down to this device: at ×1 a mixture has one idle expert a block, not two, so that more sizes fit.";

/// The sizes, with `idle` experts a block at ×1 that a token does not use.
fn sizes(scale: Scale, idle: usize, factors: &[usize]) -> Result<Vec<Size>> {
    let unit = unit(scale, idle)?;
    let size = |&factor: &usize| {
        let scale = scale.with_sparse(unit * factor as u64);
        let designs = [Design::Dense].into_iter().chain(GROWING);
        let plans = designs.map(|design| Plan::new(design, &scale)).collect::<ultramem::Result<_>>()?;
        Ok(Size { factor, plans })
    };
    factors.iter().map(size).collect()
}

/// Parameters of `idle` experts in each block. The fewer experts, the fewer weights the router takes and the wider each is; so the width is
/// looked for from that of a full model on.
fn unit(scale: Scale, idle: usize) -> Result<u64> {
    let full = Plan::new(Design::Moe, &scale)?;
    let units = (0..8).map(|at| (2 * idle * scale.hidden_size * (full.expert_inner + 8 * at) * scale.blocks) as u64);
    let of_idle = |unit: &u64| {
        Plan::new(Design::Moe, &scale.with_sparse(*unit)).is_ok_and(|plan| plan.experts == plan.top_k + idle)
    };
    units
        .into_iter()
        .find(of_idle)
        .ok_or_else(|| Failure::new(format!("no mixture with {idle} idle experts a block spends this budget")))
}

fn head(args: &GrowthArgs, sizes: &[Size], notes: &[String]) -> String {
    let Some((first, last)) = sizes.first().zip(sizes.last()) else { return String::new() };
    let Some(Scale { blocks, hidden_size, .. }) = first.plans.first().map(|plan| plan.scale) else {
        return String::new();
    };
    let (width, cached) = (grouped(hidden_size), grouped(args.cached as usize));
    let mut text = format!(
        "\nOne decoding step at batch {}: {blocks} blocks of width {width}, attention over {cached} positions included.\n",
        grouped(args.batch)
    );
    text += &notes.iter().map(|note| paragraph(note)).collect::<String>();
    for size in [first, last] {
        text += &format!("\nBudgets at ×{}\n{}", size.factor, budget_table(&size.plans));
    }
    text
}

/// The measurement.
struct Growth<'a> {
    sizes: &'a [Size],
    step: Step,
    effort: Effort,
}

/// What it finds.
struct Grown {
    places: Vec<Place>,
    rates: Rates,
}

/// All designs at one size.
struct Place {
    factor: usize,
    entries: Vec<Entry>,
    /// The score stages of UltraMem's memory layers alone.
    score: Times,
}

impl Job for Growth<'_> {
    type Output = Grown;

    fn run<R: Runtime>(self, client: &ComputeClient<R>) -> Result<Grown> {
        let Step { batch, dtype, cached } = self.step;
        let rates = Rates::measure(client, dtype)?;
        let Some(dense) = self.sizes.first().and_then(|size| size.plans.first()) else {
            return Ok(Grown { places: Vec::new(), rates });
        };
        let growing =
            || self.sizes.iter().flat_map(|size| size.plans.iter().filter(|plan| plan.design != Design::Dense));
        let plans: Vec<&Plan> = [dense].into_iter().chain(growing()).collect();
        let decoders = decoders(client, plans.iter().copied(), dtype)?;
        let cache = cached.map(|cached| Cache::new(client, &dense.scale, batch, cached, dtype)).transpose()?;
        let stream = decoders.iter().map(|decoder| decoder.stream(batch)).next().transpose()?;
        let stream = stream.ok_or_else(|| Failure::new("no model to measure"))?;
        let steps = decoders.iter().map(|decoder| {
            let (stream, cache) = (&stream, cache.as_ref());
            Box::new(move || Ok(decoder.step(stream, cache).map(drop)?)) as Boxed<'_>
        });
        let of_ultramem = decoders.iter().zip(&plans).filter(|(_, plan)| plan.design == Design::UltraMem);
        let scores = of_ultramem.map(|(decoder, _)| score(decoder, &stream)).collect::<Result<Vec<_>>>()?;
        let steps: Vec<Boxed<'_>> = steps.chain(scores).collect();
        let runs: Vec<Run<'_>> = steps.iter().map(|step| step.as_ref() as Run<'_>).collect();
        let times = interleaved(&waiting(client), &runs, self.effort, "all sizes")?;
        Ok(Grown { places: self.places(&plans, &times, &rates), rates })
    }
}

/// Work to time.
type Boxed<'a> = Box<dyn Fn() -> Result<()> + 'a>;

/// The score stage of a model's first memory layer.
fn score<'a, R: Runtime>(decoder: &'a Decoder<R>, stream: &Tensor<R>) -> Result<Boxed<'a>> {
    let layer = decoder.memory().ok_or_else(|| Failure::new("UltraMem has no memory layer"))?;
    let strategies = layer.strategies(stream.shape().first().copied().unwrap_or(0));
    let query = layer.query(stream, strategies.query)?;
    Ok(Box::new(move || Ok(layer.score(&query, strategies.score).map(drop)?)))
}

impl Growth<'_> {
    /// Times in the order of the runs, sorted into sizes: the dense model's at each.
    fn places(&self, plans: &[&Plan], times: &[Times], rates: &Rates) -> Vec<Place> {
        let Step { batch, dtype, cached } = self.step;
        let entry = |plan: &Plan, ms: Times| {
            let least = Least::of(plan, batch, dtype, cached, rates);
            Entry { design: plan.design, ms, least }
        };
        let (steps, scores) = times.split_at(plans.len().min(times.len()));
        let entries: Vec<Entry> = plans.iter().zip(steps).map(|(plan, ms)| entry(plan, ms.clone())).collect();
        let Some((dense, grown)) = entries.split_first() else { return Vec::new() };
        let places = self.sizes.iter().zip(grown.chunks(GROWING.len())).zip(scores);
        let place = |((size, grown), score): ((&Size, &[Entry]), &Times)| Place {
            factor: size.factor,
            entries: [std::slice::from_ref(dense), grown].concat(),
            score: score.clone(),
        };
        places.map(place).collect()
    }
}

/// The growth that the project's goal is about, and what it may be.
const GOAL_FACTOR: usize = 16;
const GOAL: f64 = 1.15;

impl Grown {
    /// A design's time at a size over its time at the first.
    fn over_first(&self, place: &Place, design: Design) -> Option<Ratio> {
        let of =
            |entries: &'_ [Entry]| entries.iter().find(|entry| entry.design == design).map(|entry| entry.ms.clone());
        Some(of(&place.entries)?.over(&of(&self.places.first()?.entries)?))
    }

    /// The score stage's time at a size over its time at the first.
    fn score_over_first(&self, place: &Place) -> Option<Ratio> {
        Some(place.score.over(&self.places.first()?.score))
    }

    fn tables(&self) -> String {
        let times = self.table(|_, entry| time_cell(&entry.ms), |place| time_cell(&place.score));
        let over_first = self.table(
            |place, entry| match entry.design {
                Design::Dense => "1".to_string(),
                design => self.growth_cell(place, self.over_first(place, design)),
            },
            |place| self.growth_cell(place, self.score_over_first(place)),
        );
        let over_floor = self.table(|_, entry| format!("{:.1}", entry.over_floor()), |_| "-".to_string());
        [
            "\nOne step in ms: the median, ± half the spread of the middle half of the samples; in the last\ncolumn the score \
             stage of one of UltraMem's memory layers, alone\n",
            &times,
            "\nTime over the first size's, round by round: 1 is a model that grows for nothing\n",
            &over_first,
            "\nTime over the design's own floor, the least that its bytes and operations take here\n",
            &over_floor,
        ]
        .concat()
    }

    fn growth_cell(&self, place: &Place, ratio: Option<Ratio>) -> String {
        let first = self.places.first().is_some_and(|first| first.factor == place.factor);
        if first { "1".to_string() } else { ratio_cell(ratio.and_then(|ratio| ratio.sure())) }
    }

    fn table(&self, cell: impl Fn(&Place, &Entry) -> String, score: impl Fn(&Place) -> String) -> String {
        let mut table = Table::default();
        let names = self.places.first().map(|place| place.entries.iter().map(|entry| entry.design.name().to_string()));
        let head = ["sparse".to_string()].into_iter().chain(names.into_iter().flatten());
        table.row(head.chain(["score".to_string()]));
        for place in &self.places {
            let cells = place.entries.iter().map(|entry| cell(place, entry));
            table.row([format!("×{}", place.factor)].into_iter().chain(cells).chain([score(place)]));
        }
        table.text()
    }

    /// The size that the goal is about, or the last below it.
    fn goal(&self) -> Option<&Place> {
        self.places.iter().rfind(|place| place.factor <= GOAL_FACTOR)
    }

    fn verdict(&self) -> String {
        let Some((first, place)) = self.places.first().zip(self.goal()) else { return String::new() };
        if place.factor == first.factor {
            return String::new();
        }
        let grows =
            |design: Design| self.over_first(place, design).map_or_else(String::new, |ratio| growth_words(&ratio));
        let ratio = self.over_first(place, Design::UltraMem);
        let text = format!(
            "From ×{} to ×{} sparse parameters a step of UltraMem takes {}, a step of MoE {}. The project's goal for UltraMem, at most \
             {GOAL} times as long at ×{GOAL_FACTOR}, is {}.",
            first.factor,
            place.factor,
            grows(Design::UltraMem),
            grows(Design::Moe),
            ratio.map_or("not judged", |ratio| judged(&ratio)),
        );
        format!("\nIn short\n{}{}", paragraph(&text), paragraph(WHY))
    }

    fn json(&self, sizes: &[Size]) -> Value {
        let place = |(place, size): (&Place, &Size)| {
            let designs = place.entries.iter().map(|entry| {
                let mut json = entry.json();
                json["over_first"] = json!(self.over_first(place, entry.design).map(|ratio| ratio.json()));
                (entry.design.name().to_string(), json)
            });
            json!({
                "factor": place.factor,
                "designs": designs.collect::<Map<_, _>>(),
                "ultramem_score_ms": place.score,
                "ultramem_score_over_first": self.score_over_first(place).map(|ratio| ratio.json()),
                "budgets": budget_json(&size.plans),
            })
        };
        self.places.iter().zip(sizes).map(place).collect()
    }

    /// Latency with its floor, and bytes, over the sparse parameters.
    fn chart(&self, batch: usize, device: &str) -> Chart {
        let x = |place: &Place| place.factor as f64;
        let mut panels = panels(self.places.iter().map(|place| (x(place), place.entries.as_slice())).collect());
        panels.insert(1, Panel { y_title: "time over that of the first size".into(), lines: self.growth_lines() });
        Chart {
            title: format!("One decoding step at batch {} while sparse parameters grow", grouped(batch)),
            device: device.trim().into(),
            x_title: "sparse parameters".into(),
            ticks: self.places.iter().map(|place| (x(place), format!("×{}", place.factor))).collect(),
            panels,
        }
    }

    /// Each design's growth, and that of the score stage alone.
    fn growth_lines(&self) -> Vec<Line> {
        let line = |name: &str, look, role, ratio: &dyn Fn(&Place) -> Option<Ratio>| {
            let mut line = Line::new(name, look, role);
            let points = self.places.iter().filter_map(|place| Some((place.factor as f64, ratio(place)?)));
            line.points = points.map(|(x, ratio)| Point::of_ratio(x, &ratio)).collect();
            line
        };
        let score = line("UltraMem's score stage", look::SCORE, Role::Part, &|place| self.score_over_first(place));
        let designs = [Design::Dense].into_iter().chain(GROWING);
        let design = |it: Design| line(it.name(), look::of(it), Role::Measured, &|place| self.over_first(place, it));
        [score].into_iter().chain(designs.map(design)).collect()
    }
}

/// "1.07 times as long".
fn growth_words(ratio: &Ratio) -> String {
    match ratio.sure() {
        Some(ratio) => format!("{ratio:.2} times as long"),
        None => format!("as long, within noise ({:.2} to {:.2} times)", ratio.interval.0, ratio.interval.1),
    }
}

/// Whether the goal is reached, as far as the noise lets that be told.
fn judged(ratio: &Ratio) -> &'static str {
    match ratio.interval {
        (_, most) if most <= GOAL => "reached",
        (least, _) if least > GOAL => "missed",
        _ => "reached or missed, which this noise does not tell",
    }
}

const WHY: &str = "A mixture reads the experts that the batch touches, more of them the more there are. A memory layer reads as many rows \
                   as before, whatever the table holds; only its keys grow, with the square root of the table, which is what the score \
                   stage shows.";
