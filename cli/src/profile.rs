//! `ultramem profile`: what each kernel of a forward pass would cost a GPU, counted without one. Each pipe's time, the caches' and the
//! memory's; the longest is what the kernel takes at least.

use std::path::PathBuf;

use clap::{Args, value_parser};
use serde_json::json;
use ultramem::MemoryConfig;
use ultramem_offline::profile::{Rates, layer};

use crate::Common;
use crate::bench::layer::Shape;
use crate::failure::{Failure, Result};
use crate::numbers::{bytes, counted};
use crate::report::{Report, Table, dimensions_json};

/// Arguments of `profile`.
#[derive(Debug, Args)]
pub struct ProfileArgs {
    /// Rows of the input
    #[arg(long, default_value_t = 4096, value_parser = value_parser!(u64).range(1..))]
    tokens: u64,
    #[command(flatten)]
    shape: Shape,
    /// Rates of the GPU as JSON, in place of the built-in ones: any of the names that --json prints
    #[arg(long, value_name = "FILE")]
    constants: Option<PathBuf>,
}

/// Columns of the table: a time by its name in the library, and a short name.
const TIMES: [(&str, &str); 10] = [
    ("memory", "memory"),
    ("cache", "L2"),
    ("shared and lines", "shared"),
    ("FMA", "FMA"),
    ("ALU", "ALU"),
    ("IMAD", "IMAD"),
    ("conversion", "conv"),
    ("special", "special"),
    ("matrix", "matrix"),
    ("issue", "issue"),
];

/// Runs the verb.
pub fn run(args: &ProfileArgs, common: &Common) -> Result<Report> {
    let config = MemoryConfig::new(args.shape.dimensions()?)?;
    let tokens = usize::try_from(args.tokens)?;
    let rates = rates(args, common)?;
    let staged = layer::forward(&config, tokens, common.dtype, common.device, &rates)?;
    let gather = config.bytes_read_per_token(common.dtype) as f64 * tokens as f64 / rates.memory / 1000.0;
    let sum: f64 = staged.iter().map(|it| it.profile.predicted).sum();
    let json = json!({
        "device": common.device.to_string(),
        "dtype": common.dtype.to_string(),
        "tokens": tokens,
        "dimensions": dimensions_json(&config),
        "rates": rates,
        "launches": staged,
        "predicted_us": sum,
        "gather_us": gather,
    });
    let mut table = Table::default();
    let head = ["stage", "kernel", "cubes", "units", "regs", "shared memory", "occupancy"];
    let head = head.into_iter().chain(TIMES.map(|it| it.1)).chain(["binds", "predicted"]);
    table.row(head.map(str::to_string));
    for it in &staged {
        let profile = &it.profile;
        let kernel: String = profile.kernel.chars().take(28).collect();
        let mut cells = vec![
            it.stage.to_string(),
            kernel,
            profile.cubes.to_string(),
            profile.units.to_string(),
            profile.registers.to_string(),
            bytes(profile.shared as u64),
            format!("{:.0} %", 100.0 * profile.occupancy),
        ];
        cells.extend(TIMES.map(|(name, _)| microseconds(profile.time(name))));
        cells.extend([profile.binds().to_string(), microseconds(profile.predicted)]);
        table.row(cells);
    }
    let text = format!(
        "{} for {}, {}, counted on {}; times in µs, each as if nothing else took any, and predicted\n{}\
         {sum:.0} µs in all, {:.1} times the gather's {gather:.0} µs\n",
        common.device,
        counted(tokens, "token"),
        common.dtype,
        counted(staged.iter().map(|it| it.profile.counted).sum(), "block"),
        table.text(),
        sum / gather,
    );
    Ok(Report { text, json, passed: true })
}

fn rates(args: &ProfileArgs, common: &Common) -> Result<Rates> {
    let Some(file) = &args.constants else { return Ok(Rates::of(common.device)) };
    let failed = |error: String| Failure::new(format!("{}: {error}", file.display()));
    let text = std::fs::read_to_string(file).map_err(|error| failed(error.to_string()))?;
    let mut rates = serde_json::to_value(Rates::of(common.device)).map_err(|error| failed(error.to_string()))?;
    let given: serde_json::Value = serde_json::from_str(&text).map_err(|error| failed(error.to_string()))?;
    let given = given.as_object().ok_or_else(|| failed("is no JSON object".to_string()))?;
    for (name, value) in given {
        if !value.as_f64().is_some_and(|rate| rate.is_finite() && rate > 0.0) {
            return Err(failed(format!("{name} is {value}, expected a number above 0")));
        }
        rates[name] = value.clone();
    }
    serde_json::from_value(rates).map_err(|error| failed(error.to_string()))
}

fn microseconds(time: f64) -> String {
    match time {
        time if time < 0.05 => "–".to_string(),
        time if time < 10.0 => format!("{time:.1}"),
        time => format!("{time:.0}"),
    }
}
