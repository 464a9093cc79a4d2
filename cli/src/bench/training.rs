//! `ultramem bench training`: what a training step of a layer costs on this device: the forward pass that keeps what the backward pass
//! needs, the backward pass and each of its stages, and an update of the used rows of the value table by lazy Adam.

use clap::{Args, value_parser};
use serde_json::json;
use ultramem::kernels::optimiser::Rule;
use ultramem::{MemoryConfig, Weights};

use super::layer::{SEED, Shape, fits_host, numbers, shape_line};
use crate::Common;
use crate::failure::{Failure, Result};
use crate::numbers::{counted, grouped};
use crate::report::{Report, StageReport, device_json, device_line, dimensions_json, object, stage_table, stages_json};
use crate::sampling::Effort;

/// Arguments of `bench training`.
#[derive(Debug, Args)]
pub struct TrainingArgs {
    /// Rows of the input
    #[arg(long, default_value_t = 256, value_parser = value_parser!(u64).range(1..))]
    tokens: u64,
    #[command(flatten)]
    shape: Shape,
    /// Samples of each time
    #[arg(long, default_value_t = 15, value_parser = value_parser!(u32).range(1..=100_000))]
    samples: u32,
}

const RULE: Rule = Rule::Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, decoupled: true };

/// Runs the verb.
pub fn run(args: &TrainingArgs, common: &Common) -> Result<Report> {
    let config = MemoryConfig::new(args.shape.dimensions()?)?;
    let tokens = usize::try_from(args.tokens)?;
    fits_host(&config, tokens)?;
    let adapter = common.find_device("bench training")?;
    let weights = Weights::random(&config, SEED);
    let mut engine = adapter.engine(&config, &weights, common.dtype, common.invariant)?;
    let rates = engine.rates()?;
    let effort = Effort { samples: args.samples as usize, budget_ms: f64::INFINITY };
    let measured = engine.measure_training(&numbers(tokens * config.hidden_size), RULE, effort)?;
    let (Some(measured), Some(rates)) = (measured, rates) else {
        return Err(Failure::new("bench training needs a device"));
    };
    let cost = config.backward_cost(tokens, common.dtype);
    let of_stages = measured.stages.iter().zip(cost.stages());
    let mut stages: Vec<_> = of_stages.map(|(ms, (name, cost))| (name, StageReport::new(ms, cost, &rates))).collect();
    stages.push(("backward", StageReport::new(&measured.backward, cost.total(), &rates)));
    let of_update = config.update_cost(measured.rows, common.dtype, RULE);
    stages.push(("update", StageReport::new(&measured.update, of_update, &rates)));
    let over_forward = (measured.backward.median + measured.update.median) / measured.forward.median;
    let text = [
        device_line(&adapter, common.dtype),
        shape_line(&config, &format!("Training, {}", counted(tokens, "token"))),
        stage_table(&stages, Some(&rates), &[("forward", &measured.forward)]),
        format!(
            "  Backward and update take {over_forward:.1} times the forward pass; {} of {} rows are updated.\n",
            grouped(measured.rows),
            grouped(config.rows())
        ),
    ];
    let mut json = device_json(&adapter, common.dtype);
    json.extend([
        ("tokens", json!(tokens)),
        ("dimensions", dimensions_json(&config)),
        ("samples", json!(args.samples)),
        ("rows", json!(measured.rows)),
        ("forward_ms", json!(measured.forward)),
        ("stages", stages_json(stages)),
        ("over_forward", json!(over_forward)),
    ]);
    json.extend(rates.json());
    Ok(Report { text: text.concat(), json: object(json), passed: true })
}
