//! What a verb has to say, for people and for programs, and the tables it is said in.

use serde::Serialize;
use serde_json::{Value, json};
use ultramem::{Cost, ElementType, Kind, MemoryConfig, StageCost};

use crate::backend::Adapter;
use crate::engine::{Measured, StageTimes};
use crate::numbers::{bytes, flops, ms, percent};
use crate::rates::Rates;
use crate::sampling::Times;

/// The result of a verb that ran to its end.
pub struct Report {
    /// For people: lines of at most 100 columns.
    pub text: String,
    /// For `--json`.
    pub json: Value,
    /// False if a check failed.
    pub passed: bool,
}

/// Lines of cells in aligned columns: the first one to the left, the others to the right.
#[derive(Default)]
pub struct Table(Vec<Vec<String>>);

impl Table {
    /// Adds a line.
    pub fn line<const N: usize>(&mut self, cells: [&str; N]) {
        self.row(cells.iter().map(|cell| cell.to_string()));
    }

    /// Adds a line of as many cells as there are.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.0.push(cells.into_iter().collect());
    }

    /// The lines, indented by two.
    pub fn text(&self) -> String {
        let columns = self.0.iter().map(Vec::len).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(|column| self.width(column)).collect();
        let line = |cells: &Vec<String>| {
            let cells = cells.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| match column {
                0 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            });
            format!("  {}", cells.collect::<Vec<_>>().join("  ")).trim_end().to_string() + "\n"
        };
        self.0.iter().map(line).collect()
    }

    fn width(&self, column: usize) -> usize {
        self.0.iter().filter_map(|cells| cells.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    }
}

/// How fast a stage ran, beside what it must cost.
#[derive(Debug, Clone, Serialize)]
pub struct StageReport {
    /// Milliseconds.
    pub ms: Times,
    /// Bytes that the stage must move.
    pub bytes: u64,
    /// Operations that it must do.
    pub flops: u64,
    /// `bytes` over the median time.
    pub bandwidth_gb_s: f64,
    /// That bandwidth as a share of the device's copy bandwidth.
    pub share_of_copy: f64,
    /// The least milliseconds: `bytes` at the copy bandwidth, or `flops` at the rate of a large product if that is longer.
    pub floor_ms: f64,
    /// The median time over that.
    pub over_floor: f64,
}

impl StageReport {
    /// A stage's times against its cost.
    pub fn new(ms: &Times, cost: StageCost, rates: &Rates) -> Self {
        let StageCost { bytes, flops } = cost;
        let bandwidth_gb_s = bytes as f64 / ms.median / 1e6;
        let (share_of_copy, floor_ms) = (bandwidth_gb_s / rates.copy_gb_s, rates.floor_ms(bytes, flops));
        let over_floor = ms.median / floor_ms;
        Self { ms: ms.clone(), bytes, flops, bandwidth_gb_s, share_of_copy, floor_ms, over_floor }
    }
}

/// A table of `stages` and, below, of times that have no floor.
pub fn stage_table(stages: &[(&'static str, StageReport)], rates: Option<&Rates>, rest: &[(&str, &Times)]) -> String {
    let mut table = Table::default();
    match rates {
        Some(_) => table.line(["stage", "median", "min", "max", "must move", "must do", "of a copy", "over floor"]),
        None => table.line(["", "median", "min", "max"]),
    }
    for (name, stage) in stages {
        table.line([
            name,
            &ms(stage.ms.median),
            &ms(stage.ms.min),
            &ms(stage.ms.max),
            &bytes(stage.bytes),
            &flops(stage.flops),
            &percent(stage.share_of_copy),
            &format!("{:.1}", stage.over_floor),
        ]);
    }
    for (name, Times { median, min, max, .. }) in rest {
        table.line([name, &ms(*median), &ms(*min), &ms(*max)]);
    }
    table.text() + &rates.map_or_else(String::new, Rates::text)
}

/// What `--json` says of stages.
pub fn stages_json(stages: Vec<(&'static str, StageReport)>) -> Value {
    Value::Object(stages.into_iter().map(|(name, stage)| (name.to_string(), json!(stage))).collect())
}

/// The stages of a measurement with their names; none for the oracle.
pub fn stages(measured: &Measured, cost: &Cost) -> Vec<(&'static str, StageReport)> {
    let Some((times, rates)) = &measured.device else { return Vec::new() };
    times.iter().map(|it| (it.name, StageReport::new(&it.times, cost_of(it, cost), rates))).collect()
}

/// What the stages that were timed together cost.
pub fn cost_of(timed: &StageTimes, cost: &Cost) -> StageCost {
    let add = |sum: StageCost, (_, cost): &(&str, StageCost)| StageCost {
        bytes: sum.bytes + cost.bytes,
        flops: sum.flops + cost.flops,
    };
    cost.stages()[timed.stages.clone()].iter().fold(StageCost { bytes: 0, flops: 0 }, add)
}

/// Times of a forward pass as a table: a line a stage and one for the whole.
pub fn forward_table(measured: &Measured, cost: &Cost) -> String {
    let rates = measured.device.as_ref().map(|(_, rates)| rates);
    stage_table(&stages(measured, cost), rates, &[("forward", &measured.forward)])
}

/// What `--json` says of a measurement.
pub fn measured_json(measured: &Measured, cost: &Cost) -> Vec<(&'static str, Value)> {
    let mut entries = vec![("forward_ms", json!(measured.forward))];
    if let Some((_, rates)) = &measured.device {
        entries.push(("stages", stages_json(stages(measured, cost))));
        entries.extend(rates.json());
    }
    entries
}

/// What `--json` says of the device in every report.
pub fn device_json(adapter: &Adapter, dtype: ElementType) -> Vec<(&'static str, Value)> {
    vec![
        ("backend", json!(adapter.backend)),
        ("device", json!(adapter.name)),
        ("driver", json!(adapter.driver)),
        ("dtype", json!(dtype.to_string())),
    ]
}

/// The line about the device in every report.
pub fn device_line(adapter: &Adapter, dtype: ElementType) -> String {
    format!("{}; {}, {}; {dtype}\n", adapter.name, adapter.backend, adapter.driver)
}

/// The dimensions by their names.
pub fn dimensions_json(config: &MemoryConfig) -> Value {
    json!({
        "kind": config.kind().map(Kind::name),
        "hidden_size": config.hidden_size,
        "heads": config.heads,
        "side_keys": config.side_keys,
        "key_dim": config.key_dim,
        "tucker_rank": config.tucker_rank,
        "top_m": config.top_m,
        "cores": config.cores,
        "expansion": config.expansion,
        "value_dim": config.value_dim,
        "norm": format!("{:?}", config.norm),
        "norm_eps": decimal(config.norm_eps),
    })
}

/// The f64 that reads like the f32.
fn decimal(number: f32) -> f64 {
    number.to_string().parse().unwrap_or(f64::from(number))
}

/// An object of `entries`.
pub fn object(entries: Vec<(&'static str, Value)>) -> Value {
    Value::Object(entries.into_iter().map(|(key, value)| (key.to_string(), value)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::default();
        table.line(["a", "1"]);
        table.line(["bcd", "20"]);
        assert_eq!(table.text(), "  a     1\n  bcd  20\n");
    }
}
