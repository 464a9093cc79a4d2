//! Models of several designs on one device, each step of each timed in turn with the others': what `versus` and `decode` share,
//! from the measurement to its tables, its picture and its JSON.

use cubecl::prelude::*;
use serde_json::{Map, Value, json};
use ultramem::ElementType;
use ultramem_versus::{Cache, Decoder, Design, Plan};

use super::chart::{Chart, Line, Panel, Point, Role, look};
use crate::backend::Job;
use crate::failure::Result;
use crate::numbers::grouped;
use crate::rates::Rates;
use crate::report::Table;
use crate::sampling::{Effort, Ratio, Run, Times, interleaved, progress, waiting};

/// What to measure.
pub struct Contest<'a> {
    /// The contestants.
    pub plans: &'a [Plan],
    /// Batch sizes.
    pub batches: &'a [usize],
    /// Element type of weights and activations.
    pub dtype: ElementType,
    /// Positions that attention reads; None without attention.
    pub cached: Option<usize>,
    /// For each batch size.
    pub effort: Effort,
}

/// A step of one design.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The contestant.
    pub design: Design,
    /// A step.
    pub ms: Times,
    /// What it must take.
    pub least: Least,
}

/// The least that a step can do with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Least {
    /// Bytes that it must move.
    pub bytes: u64,
    /// Operations that it must do.
    pub flops: u64,
    /// The sum of its parts' floors, in milliseconds.
    pub floor_ms: f64,
}

impl Least {
    /// What a step of a plan must take, its parts one after the other.
    pub fn of(plan: &Plan, batch: usize, dtype: ElementType, cached: Option<usize>, rates: &Rates) -> Self {
        let parts = plan.cost(batch, dtype, cached);
        parts.iter().fold(Self { bytes: 0, flops: 0, floor_ms: 0.0 }, |sum, (_, part)| Self {
            bytes: sum.bytes + part.bytes,
            flops: sum.flops + part.flops,
            floor_ms: sum.floor_ms + rates.floor_ms(part.bytes, part.flops),
        })
    }
}

impl Entry {
    /// Time over the floor.
    pub fn over_floor(&self) -> f64 {
        self.ms.median / self.least.floor_ms
    }

    /// What `--json` says of it.
    pub fn json(&self) -> Value {
        json!({
            "ms": self.ms,
            "bytes": self.least.bytes,
            "flops": self.least.flops,
            "floor_ms": self.least.floor_ms,
            "over_floor": self.over_floor(),
        })
    }
}

/// All designs at one batch size.
#[derive(Debug, Clone)]
pub struct Row {
    /// Sequences.
    pub batch: usize,
    /// In the order of the plans.
    pub entries: Vec<Entry>,
}

impl Row {
    /// A design's entry.
    pub fn of(&self, design: Design) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.design == design)
    }

    /// A design's time over UltraMem's.
    fn ratio(&self, design: Design) -> Option<Ratio> {
        Some(self.of(design)?.ms.over(&self.of(Design::UltraMem)?.ms))
    }

    /// How many times longer than UltraMem's a design's step takes; None inside the noise.
    pub fn over_ultramem(&self, design: Design) -> Option<f64> {
        self.ratio(design)?.sure()
    }
}

/// The contest's result.
#[derive(Debug)]
pub struct Outcome {
    /// In the order of the batches.
    pub rows: Vec<Row>,
    /// What the device gives at best.
    pub rates: Rates,
}

impl Job for Contest<'_> {
    type Output = Outcome;

    fn run<R: Runtime>(self, client: &ComputeClient<R>) -> Result<Outcome> {
        let rates = Rates::measure(client, self.dtype)?;
        let decoders = decoders(client, self.plans.iter(), self.dtype)?;
        let rows = self.batches.iter().map(|&batch| self.row(client, &decoders, batch, &rates));
        Ok(Outcome { rows: rows.collect::<Result<_>>()?, rates })
    }
}

/// The models of `plans`.
pub fn decoders<'a, R: Runtime>(
    client: &ComputeClient<R>,
    plans: impl ExactSizeIterator<Item = &'a Plan>,
    dtype: ElementType,
) -> Result<Vec<Decoder<R>>> {
    let bar = progress(plans.len(), "making weights");
    let decoders = plans.map(|plan| {
        let decoder = Decoder::new(client, plan, dtype)?;
        bar.inc(1);
        Ok(decoder)
    });
    let decoders = decoders.collect();
    bar.finish_and_clear();
    decoders
}

impl Contest<'_> {
    fn row<R: Runtime>(
        &self,
        client: &ComputeClient<R>,
        decoders: &[Decoder<R>],
        batch: usize,
        rates: &Rates,
    ) -> Result<Row> {
        let cache = match (self.cached, self.plans.first()) {
            (Some(cached), Some(plan)) => Some(Cache::new(client, &plan.scale, batch, cached, self.dtype)?),
            _ => None,
        };
        let streams = decoders.iter().map(|decoder| decoder.stream(batch)).collect::<ultramem::Result<Vec<_>>>()?;
        let steps = decoders.iter().zip(&streams);
        let steps = steps.map(|(decoder, stream)| || Ok(decoder.step(stream, cache.as_ref()).map(drop)?));
        let steps: Vec<_> = steps.collect();
        let runs: Vec<Run<'_>> = steps.iter().map(|step| step as Run<'_>).collect();
        let times = interleaved(&waiting(client), &runs, self.effort, &format!("batch {}", grouped(batch)))?;
        let entry = |(plan, ms): (&Plan, Times)| Entry {
            design: plan.design,
            ms,
            least: Least::of(plan, batch, self.dtype, self.cached, rates),
        };
        Ok(Row { batch, entries: self.plans.iter().zip(times).map(entry).collect() })
    }
}

/// The budget of each contestant: what it is made of, and that all spend the same.
pub fn budget_table(plans: &[Plan]) -> String {
    let mut table = Table::default();
    table.line(["design", "activated", "sparse", "of the budget"]);
    for plan in plans {
        let share = |found: u64, wanted: u64| format!("{:.1} %", found as f64 / wanted as f64 * 100.0);
        let sparse = match plan.sparse() {
            0 => "none".to_string(),
            sparse => share(sparse, plan.scale.sparse),
        };
        table.line([
            &format!("{}: {plan}", plan.design.name()),
            &grouped(plan.activated() as usize),
            &grouped(plan.sparse() as usize),
            &format!("{}, {sparse}", share(plan.activated(), plan.scale.activated)),
        ]);
    }
    table.text()
}

/// What `--json` says of the budgets.
pub fn budget_json(plans: &[Plan]) -> Value {
    let budgets = plans.iter().map(|plan| {
        json!({
            "design": plan.design.name(),
            "made_of": plan.to_string(),
            "activated": plan.activated(),
            "sparse": plan.sparse(),
        })
    });
    budgets.collect()
}

/// A table with a column a design and a line a batch.
pub fn table(rows: &[Row], cell: impl Fn(&Row, &Entry) -> String) -> String {
    let mut table = Table::default();
    let names = rows.first().map(|row| row.entries.iter().map(|entry| entry.design.name().to_string()));
    table.row(["batch".to_string()].into_iter().chain(names.into_iter().flatten()));
    for row in rows {
        let cells = row.entries.iter().map(|entry| cell(row, entry));
        table.row([grouped(row.batch)].into_iter().chain(cells));
    }
    table.text()
}

/// A time and its spread in one cell.
pub fn time_cell(ms: &Times) -> String {
    let digits = if ms.median < 10.0 { 2 } else { 1 };
    format!("{:.digits$} ±{:.0} %", ms.median, ms.spread() * 100.0)
}

/// A ratio, unless it may be noise.
pub fn ratio_cell(ratio: Option<f64>) -> String {
    ratio.map_or_else(|| "≈ 1".to_string(), |ratio| format!("{ratio:.2}"))
}

/// Latency, time over floor and time over UltraMem's, batch by batch.
pub fn tables(rows: &[Row]) -> String {
    let ratio = |row: &Row, entry: &Entry| match entry.design {
        Design::UltraMem => "1".to_string(),
        design => ratio_cell(row.over_ultramem(design)),
    };
    [
        "\nOne step in ms: the median, ± half the spread of the middle half of the samples\n".to_string(),
        table(rows, |_, entry| time_cell(&entry.ms)),
        "\nTime over UltraMem's, round by round: above 1, UltraMem is ahead; ≈ 1 is within noise\n".to_string(),
        table(rows, ratio),
        "\nTime over the design's own floor, the least that its bytes and operations take here\n".to_string(),
        table(rows, |_, entry| format!("{:.1}", entry.over_floor())),
    ]
    .concat()
}

/// What `--json` says of the rows.
pub fn rows_json(rows: &[Row]) -> Value {
    let row = |row: &Row| {
        let designs = row.entries.iter().map(|entry| {
            let mut json = entry.json();
            json["over_ultramem"] = json!(row.ratio(entry.design).map(|ratio| ratio.json()));
            (entry.design.name().to_string(), json)
        });
        json!({ "batch": row.batch, "designs": designs.collect::<Map<_, _>>() })
    };
    rows.iter().map(row).collect()
}

/// Latency with its floor, and bytes, over batch.
pub fn chart(rows: &[Row], title: String, device: &str) -> Chart {
    let ticks = rows.iter().map(|row| (row.batch as f64, grouped(row.batch))).collect();
    let points = rows.iter().map(|row| (row.batch as f64, row.entries.as_slice()));
    Chart {
        title,
        device: device.trim().into(),
        x_title: "batch (sequences)".into(),
        ticks,
        panels: panels(points.collect()),
    }
}

/// Two panels, of latency and of bytes, over places with the same designs.
pub fn panels(places: Vec<(f64, &[Entry])>) -> Vec<Panel> {
    let (mut floors, mut times, mut moved) = (Vec::new(), Vec::new(), Vec::new());
    let largest = places.iter().flat_map(|(_, entries)| entries.iter()).map(|entry| entry.least.bytes).max();
    let (unit, scale) = if largest.unwrap_or(0) < 10_000_000_000 { ("MB", 1e6) } else { ("GB", 1e9) };
    let designs: Vec<Design> =
        places.first().map_or_else(Vec::new, |(_, entries)| entries.iter().map(|it| it.design).collect());
    for (at, design) in designs.into_iter().enumerate() {
        let line = |role, point: &dyn Fn(f64, &Entry) -> Point| {
            let mut line = Line::new(design.name(), look::of(design), role);
            line.points = places.iter().filter_map(|(x, entries)| Some(point(*x, entries.get(at)?))).collect();
            line
        };
        floors.push(line(Role::Floor, &|x, entry| Point::at(x, entry.least.floor_ms)));
        times.push(line(Role::Measured, &|x, entry| Point::of(x, &entry.ms)));
        moved.push(line(Role::Measured, &|x, entry| Point::at(x, entry.least.bytes as f64 / scale)));
    }
    vec![
        Panel { y_title: "latency of a step (ms)".into(), lines: floors.into_iter().chain(times).collect() },
        Panel { y_title: format!("bytes moved per step ({unit})"), lines: moved },
    ]
}
