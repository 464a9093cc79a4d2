//! `ultramem constants`: what `ultramem profile` assumes of a GPU, measured on one. On the offline backend the same kernels are counted, and
//! what they are predicted to take gives the assumed constants back.

#[cfg(feature = "cuda")]
mod cuda;

use std::path::PathBuf;

use clap::Args;
use serde_json::{Map, Value, json};
use ultramem_offline::constants::{DOUBLE, PROBES, Probe, Runs};
use ultramem_offline::profile::Rates;

use crate::Common;
use crate::backend::Backend;
use crate::failure::{Failure, Result};
use crate::report::{Report, Table};

/// Arguments of `constants`.
#[derive(Debug, Args)]
pub struct ConstantsArgs {
    /// Where they go as JSON, for `profile --constants`
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Runs the verb.
pub fn run(args: &ConstantsArgs, common: &Common) -> Result<Report> {
    let (device, constants, failed) = match common.backend {
        Backend::Offline => predicted(common)?,
        Backend::Auto | Backend::Cuda => measured()?,
        _ => return Err(Failure::new("constants are measured on the cuda backend, or counted on the offline backend")),
    };
    if let Some(file) = &args.output {
        let text = format!("{:#}\n", Value::Object(constants.clone()));
        std::fs::write(file, text).map_err(|error| Failure::new(format!("{}: {error}", file.display())))?;
    }
    let assumed = serde_json::to_value(Rates::of(common.device))?;
    let mut table = Table::default();
    table.row(["constant", "here", "assumed"].map(str::to_string));
    for (name, value) in &constants {
        let number = |value: &Value| value.as_f64().map_or_else(|| "–".to_string(), |it| format!("{it:.2}"));
        table.row([name.clone(), number(value), number(&assumed[name.as_str()])]);
    }
    let notes: String = failed.iter().map(|it| format!("{it}\n")).collect();
    let text = format!("{device}; assumed of {}\n{}{notes}", common.device, table.text());
    let json = json!({ "device": device, "constants": constants, "failed": failed });
    Ok(Report { text, json, passed: failed.is_empty() })
}

/// A device's name, its constants by name, and what could not be had.
type Found = (String, Map<String, Value>, Vec<String>);

fn probes() -> impl Iterator<Item = Probe> {
    PROBES.into_iter().chain([DOUBLE])
}

/// By the time that is predicted for each kernel.
fn predicted(common: &Common) -> Result<Found> {
    let (gpu, rates) = (common.device, Rates::of(common.device));
    let mut constants = Map::new();
    for probe in probes() {
        let [short, long] = [1, 2].map(|times| probe.profile(gpu, &rates, times * probe.few()));
        let failed = |error: ultramem_offline::Error| Failure::new(format!("{}: {error}", probe.constant));
        let (short, long) = (short.map_err(failed)?.predicted, long.map_err(failed)?.predicted);
        let runs = Runs { rounds: probe.few(), short, long };
        let value = probe.value(runs, rates.clock, gpu.specification().multiprocessors);
        constants.insert(probe.constant.to_string(), json!(value));
    }
    Ok((format!("{gpu}, predicted"), constants, Vec::new()))
}

#[cfg(feature = "cuda")]
fn measured() -> Result<Found> {
    cuda::measured(probes())
}

#[cfg(not(feature = "cuda"))]
fn measured() -> Result<Found> {
    Err(Failure::new("this build has no CUDA: build it with --features cuda"))
}
