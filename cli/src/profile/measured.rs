//! What was measured of the forward pass on a device that is there, stage by stage, beside what is predicted for them.

use serde_json::{Value, json};
use ultramem::{MemoryConfig, Weights};
use ultramem_offline::profile::passes::Staged;

use super::microseconds;
use crate::Common;
use crate::backend::Backend;
use crate::bench::layer::fits_host;
use crate::engine::Measured;
use crate::failure::{Failure, Result};
use crate::report::Table;
use crate::sampling::Effort;

/// Samples, and milliseconds for all of them.
const EFFORT: Effort = Effort { samples: 21, budget_ms: 20_000.0 };

/// A stage, or several that are launched as one. Times are microseconds.
#[derive(Debug)]
pub struct Beside {
    stage: &'static str,
    predicted: f64,
    measured: f64,
}

/// The device's name and its stages, where a backend of devices was asked for by its name; `staged` is the counted forward pass.
pub fn measure(
    common: &Common,
    config: &MemoryConfig,
    weights: &Weights<'_>,
    input: &[f32],
    staged: &[Staged],
) -> Result<Option<(String, Vec<Beside>)>> {
    if !matches!(common.backend, Backend::Cuda | Backend::Wgpu) {
        return Ok(None);
    }
    fits_host(config, input.len() / config.hidden_size)?;
    let adapter = common.find_gpu("profile")?;
    let engine = adapter.engine(config, weights, common.dtype, common.invariant)?;
    let rates = engine.rates()?;
    let measured = engine.measure(input, EFFORT, rates)?;
    Ok(Some((adapter.name.clone(), beside(&measured, staged)?)))
}

fn beside(measured: &Measured, staged: &[Staged]) -> Result<Vec<Beside>> {
    let (stages, _) = measured.device.as_ref().ok_or_else(|| Failure::new("profile needs a device"))?;
    let predicted = |name: &str| {
        let parts: Vec<&str> = name.split(" and ").collect();
        staged.iter().filter(|it| parts.contains(&it.stage)).map(|it| it.profile.predicted).sum()
    };
    let stage = |it: &crate::engine::StageTimes| Beside {
        stage: it.name,
        predicted: predicted(it.name),
        measured: 1000.0 * it.times.median,
    };
    Ok(stages.iter().map(stage).collect())
}

/// The stages as a table.
pub fn table(device: &str, stages: &[Beside]) -> String {
    let mut table = Table::default();
    table.line(["stage", "predicted", "measured", "measured over predicted"]);
    for it in stages {
        let over = format!("{:.2}", it.measured / it.predicted);
        table.line([it.stage, &microseconds(it.predicted), &microseconds(it.measured), &over]);
    }
    format!("\nForward, measured on {device}, medians in µs, launches and waiting included\n{}", table.text())
}

/// The stages for `--json`.
pub fn json(device: &str, stages: &[Beside]) -> Value {
    let stage = |it: &Beside| json!({ "stage": it.stage, "predicted_us": it.predicted, "measured_us": it.measured });
    json!({ "device": device, "stages": stages.iter().map(stage).collect::<Vec<_>>() })
}
