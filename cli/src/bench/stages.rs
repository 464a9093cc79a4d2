//! `ultramem bench stages`: each stage of a layer, from one token to many: its time, its bytes and its floor.

use clap::Args;
use serde_json::json;
use ultramem::{MemoryConfig, StageCost, Weights};

use super::chart::{Chart, Line, Panel, Point, Role, look};
use super::layer::{SEED, Shape, fits_host, numbers, shape_line};
use super::picture::Picture;
use super::{Series, count, ordered};
use crate::Common;
use crate::engine::Measured;
use crate::failure::{Failure, Result};
use crate::numbers::{bytes, grouped, ms};
use crate::rates::Rates;
use crate::report::{Report, Table, cost_of, device_json, device_line, dimensions_json, object, stages, stages_json};
use crate::sampling::Effort;

/// Arguments of `bench stages`.
#[derive(Debug, Args)]
pub struct StagesArgs {
    /// Rows of the input, a list
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = count, default_value = "1,16,256,1024")]
    tokens: Vec<usize>,
    #[command(flatten)]
    shape: Shape,
    #[command(flatten)]
    series: Series,
}

/// Milliseconds for one number of tokens, where so many samples fit.
const BUDGET_MS: f64 = 10_000.0;

/// A number of tokens and what was found there.
type Found = (usize, Measured);

/// Runs the verb.
pub fn run(args: &StagesArgs, common: &Common) -> Result<Report> {
    let picture = args.series.plot.as_deref().map(Picture::at).transpose()?;
    let config = MemoryConfig::new(args.shape.dimensions()?)?;
    let tokens = ordered(&args.tokens);
    fits_host(&config, tokens.last().copied().unwrap_or(0))?;
    let adapter = common.find_device("bench stages")?;
    let weights = Weights::random(&config, SEED);
    let engine = adapter.engine(&config, &weights, common.dtype, common.invariant)?;
    let rates = engine.rates()?.ok_or_else(|| Failure::new("bench stages needs a device"))?;
    let effort = Effort { samples: args.series.samples as usize, budget_ms: BUDGET_MS };
    let measure = |&tokens: &usize| {
        let measured = engine.measure(&numbers(tokens * config.hidden_size), effort, Some(rates))?;
        Ok((tokens, measured))
    };
    let found = tokens.iter().map(measure).collect::<Result<Vec<Found>>>()?;
    let device = device_line(&adapter, common.dtype);
    let mut text = format!("{device}{}", shape_line(&config, "One layer"));
    text += &table(&found, &config, common);
    text += &rates.text();
    if let Some(picture) = picture {
        picture.write(&chart(&found, &config, &rates, common, &device).svg()?)?;
        text += &picture.line();
    }
    let points = found.iter().map(|(tokens, measured)| {
        json!({
            "tokens": tokens,
            "forward_ms": measured.forward,
            "stages": stages_json(stages(measured, &config.cost(*tokens, common.dtype))),
            "strategies": engine.strategies(*tokens),
        })
    });
    let mut json = device_json(&adapter, common.dtype);
    json.push(("dimensions", dimensions_json(&config)));
    json.push(("tokens", points.collect()));
    json.extend(rates.json());
    Ok(Report { text, json: object(json), passed: true })
}

fn table(found: &[Found], config: &MemoryConfig, common: &Common) -> String {
    let mut table = Table::default();
    table.line(["tokens", "stage", "median", "min", "max", "must move", "floor", "over floor"]);
    for (tokens, measured) in found {
        let forward = &measured.forward;
        for (name, stage) in stages(measured, &config.cost(*tokens, common.dtype)) {
            table.line([
                &grouped(*tokens),
                name,
                &ms(stage.ms.median),
                &ms(stage.ms.min),
                &ms(stage.ms.max),
                &bytes(stage.bytes),
                &ms(stage.floor_ms),
                &format!("{:.1}", stage.over_floor),
            ]);
        }
        table.line([&grouped(*tokens), "forward", &ms(forward.median), &ms(forward.min), &ms(forward.max)]);
    }
    table.text()
}

/// Latency and bytes of each stage over tokens.
fn chart(found: &[Found], config: &MemoryConfig, rates: &Rates, common: &Common, device: &str) -> Chart {
    let mut latency = vec![Line::new("forward", look::FORWARD, Role::Measured)];
    let mut moved = vec![Line::new("forward", look::FORWARD, Role::Measured)];
    let floor = |cost: StageCost| rates.floor_ms(cost.bytes, cost.flops);
    let timed =
        |measured: &'_ Measured| measured.device.iter().flat_map(|(stages, _)| stages.clone()).collect::<Vec<_>>();
    let mut names: Vec<(&'static str, usize)> =
        found.iter().flat_map(|(_, measured)| timed(measured)).map(|it| (it.name, it.stages.start)).collect();
    names.sort_by_key(|&(name, first)| (first, name));
    names.dedup();
    for (name, first) in names {
        let line = |role| Line::new(name, look::STAGES[first], role);
        let (mut times, mut floors, mut sizes) = (line(Role::Measured), line(Role::Floor), line(Role::Measured));
        for (tokens, measured) in found {
            let Some(stage) = timed(measured).into_iter().find(|it| it.name == name) else { continue };
            let (x, cost) = (*tokens as f64, cost_of(&stage, &config.cost(*tokens, common.dtype)));
            times.points.push(Point::of(x, &stage.times));
            floors.points.push(Point::at(x, floor(cost)));
            sizes.points.push(Point::at(x, cost.bytes as f64 / 1e6));
        }
        latency.extend([floors, times]);
        moved.push(sizes);
    }
    for (tokens, measured) in found {
        let total = config.cost(*tokens, common.dtype).total();
        latency[0].points.push(Point::of(*tokens as f64, &measured.forward));
        moved[0].points.push(Point::at(*tokens as f64, total.bytes as f64 / 1e6));
    }
    Chart {
        title: "Stages of a memory layer".into(),
        device: device.trim().into(),
        x_title: "tokens".into(),
        ticks: found.iter().map(|(tokens, _)| (*tokens as f64, grouped(*tokens))).collect(),
        panels: vec![
            Panel { y_title: "latency (ms)".into(), lines: latency },
            Panel { y_title: "bytes moved (MB)".into(), lines: moved },
        ],
    }
}
