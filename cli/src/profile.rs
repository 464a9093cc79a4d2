//! `ultramem profile`: what each kernel of a pass would cost a GPU, counted without one. Each pipe's time, the caches' and the memory's, and
//! what it is predicted to take; with `--backend cuda` also what its stages take.

mod lines;
mod measured;
mod pass;
mod plot;
mod table;

use std::path::PathBuf;

use clap::{Args, value_parser};
use serde_json::{Value, json};
use ultramem::{MemoryConfig, Weights};
use ultramem_offline::profile::Rates;
use ultramem_offline::profile::passes::{Subject, hidden_states};

use self::pass::{Counted, Pass, Passes};
use crate::Common;
use crate::bench::layer::{SEED, Shape};
use crate::bench::picture::Picture;
use crate::failure::{Failure, Result};
use crate::numbers::{counted, grouped};
use crate::report::{Report, dimensions_json};
use crate::source;

/// Arguments of `profile`.
#[derive(Debug, Args)]
pub struct ProfileArgs {
    /// A safetensors file that holds a layer, or a whole model, in place of dimensions
    #[arg(conflicts_with = "Shape")]
    file: Option<PathBuf>,
    #[command(flatten)]
    layer: source::ModelLayer,
    #[command(flatten)]
    passes: Passes,
    /// Rows of the input
    #[arg(long, default_value_t = 4096, value_parser = value_parser!(u32).range(1..=1 << 20))]
    tokens: u32,
    #[command(flatten)]
    shape: Shape,
    /// Also print the lines of each kernel's source that cost most, 5 or as many as given
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "5", value_parser = value_parser!(u32).range(1..=10_000))]
    lines: Option<u32>,
    /// Also draw a picture: a file that ends in .svg or .png
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Rates of the GPU as JSON, in place of the built-in ones: any of the names that --json prints
    #[arg(long, value_name = "FILE")]
    constants: Option<PathBuf>,
}

/// Runs the verb.
pub fn run(args: &ProfileArgs, common: &Common) -> Result<Report> {
    let picture = args.plot.as_deref().map(Picture::at).transpose()?;
    let rates = rates(args, common)?;
    let source = args.file.as_ref().map(|path| args.layer.open(path)).transpose()?;
    let config = match &source {
        Some(source) => source.config().clone(),
        None => MemoryConfig::new(args.shape.dimensions()?)?,
    };
    let weights = match &source {
        Some(source) => source.weights()?,
        None => Weights::random_without_tables(&config, SEED),
    };
    let tokens = args.tokens as usize;
    let input = hidden_states(config.hidden_size, tokens, SEED);
    let (dtype, gpu) = (common.dtype, common.device);
    let (invariant, rates) = (common.invariant, &rates);
    let subject =
        Subject { config: &config, weights: &weights, input: &input, dtype, invariant, gpu, adapter: None, rates };
    let found = args.passes.count(&subject)?;
    let gather = config.bytes_read_per_token(dtype) as f64 * tokens as f64 / rates.memory / 1000.0;
    let head = format!("{gpu} for {}, {dtype}", counted(tokens, "token"));
    let mut text = format!("{head}; times in µs, each as if nothing else took any, and predicted\n");
    for counted in &found {
        text += &passage(counted, gather, args.lines);
    }
    let forward = found.iter().find(|counted| counted.pass == Pass::Forward).map(|it| &it.staged[..]);
    let measured = match forward {
        Some(staged) => measured::measure(common, &config, &weights, &input, staged)?,
        None => None,
    };
    if let Some((device, stages)) = &measured {
        text += &measured::table(device, stages);
    }
    if let Some(picture) = picture {
        let bars = found.iter().flat_map(Counted::bars).collect();
        let title = "A memory layer by count: stages by what binds their kernels".to_string();
        picture.write(&plot::Bars { title, device: head, bars, floor: gather }.svg()?)?;
        text += &picture.line();
    }
    let launches = found.iter().flat_map(|counted| counted.staged.iter().map(|staged| launch_json(counted, staged)));
    let json = json!({
        "device": gpu.to_string(),
        "dtype": dtype.to_string(),
        "tokens": tokens,
        "dimensions": dimensions_json(&config),
        "rates": rates,
        "passes": found.iter().map(|counted| counted.json(gather)).collect::<Vec<_>>(),
        "launches": launches.collect::<Vec<_>>(),
        "predicted_us": found.iter().map(Counted::predicted).sum::<f64>(),
        "gather_us": gather,
        "measured": measured.map(|(device, stages)| measured::json(&device, &stages)),
    });
    Ok(Report { text, json, passed: true })
}

/// A launch with the pass that it is of.
fn launch_json(counted: &Counted, staged: &ultramem_offline::profile::passes::Staged) -> Value {
    let mut json = json!(staged);
    json["pass"] = json!(counted.pass.name());
    json["binds"] = json!(staged.profile.binds());
    json
}

/// A pass in words and as a table, and its dearest lines.
fn passage(counted: &Counted, gather: f64, lines: Option<u32>) -> String {
    let blocks = |of: fn(&ultramem_offline::profile::Profile) -> u64| {
        grouped(counted.staged.iter().map(|it| of(&it.profile)).sum::<u64>() as usize)
    };
    let mut text =
        format!("\n{}, {} of {} blocks run", counted.title, blocks(|it| it.counted as u64), blocks(|it| it.cubes));
    if let Some(it) = counted.popularity {
        let (entries, slots) = (grouped(it.entries), grouped(it.slots));
        text += &format!("; {entries} choices of {slots} slots, one of them {} times", grouped(it.most));
    }
    text += &format!("\n{}", table::table(&counted.staged));
    let sum = counted.predicted();
    text += &format!("  {sum:.0} µs in all, {:.1} times the gather's {} µs\n", sum / gather, microseconds(gather));
    text += &format!("  The host: {}, {:.0} µs\n", of_tasks(counted.tasks()), counted.host());
    for staged in counted.staged.iter().filter(|_| lines.is_some()) {
        let (kernel, predicted) = (&staged.profile.kernel, microseconds(staged.profile.predicted));
        text += &format!("\n{}: {kernel}, {predicted} µs\n", staged.stage);
        text += &lines::table(&staged.profile, lines.unwrap_or(0) as usize);
    }
    text
}

fn of_tasks(tasks: usize) -> String {
    counted(tasks, "task")
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
