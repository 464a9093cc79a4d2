//! `ultramem bench layer`: what a layer costs on this device: one of any dimensions, with random weights, or one of a file.

use std::{path::PathBuf, time::Instant};

use clap::{Args, value_parser};
use serde_json::json;
use ultramem::{Dimensions, MemoryConfig, Weights};

use crate::Common;
use crate::backend::host_memory;
use crate::failure::{Failure, Result};
use crate::info::Preset;
use crate::numbers::{bytes, counted, ms};
use crate::report::{Report, device_json, device_line, dimensions_json, forward_table, measured_json, object};
use crate::sampling::{Effort, milliseconds};
use crate::source;

/// Arguments of `bench layer`.
#[derive(Debug, Args)]
pub struct LayerArgs {
    /// A safetensors file that holds a layer, or a whole model, in place of dimensions
    #[arg(conflicts_with = "Shape")]
    file: Option<PathBuf>,
    #[command(flatten)]
    layer: source::ModelLayer,
    /// Rows of the input
    #[arg(long, default_value_t = 256, value_parser = value_parser!(u64).range(1..))]
    tokens: u64,
    #[command(flatten)]
    shape: Shape,
    /// Samples of each stage
    #[arg(long, default_value_t = 15, value_parser = value_parser!(u32).range(1..=100_000))]
    samples: u32,
}

/// A layer's dimensions: a preset's, and what is given apart.
#[derive(Debug, Args)]
pub struct Shape {
    /// Where the dimensions that are not given come from; without it, a small layer
    #[arg(long)]
    preset: Option<Preset>,
    /// Width of input and output
    #[arg(long)]
    hidden_size: Option<usize>,
    /// Keys on each side
    #[arg(long)]
    side_keys: Option<usize>,
    /// Width of one key
    #[arg(long)]
    key_dim: Option<usize>,
    /// Width of one value row
    #[arg(long)]
    value_dim: Option<usize>,
    /// Slots kept per head
    #[arg(long)]
    top_m: Option<usize>,
    /// Independent retrievals per token
    #[arg(long)]
    heads: Option<usize>,
    /// Scores per slot
    #[arg(long)]
    cores: Option<usize>,
    /// Virtual blocks per physical table
    #[arg(long)]
    expansion: Option<usize>,
    /// Width of a side's score vector
    #[arg(long)]
    tucker_rank: Option<usize>,
}

impl Shape {
    /// The dimensions.
    pub fn dimensions(&self) -> Result<Dimensions> {
        let base = self.preset.map_or_else(|| Ok(Dimensions::default()), Preset::dimensions)?;
        Ok(Dimensions {
            hidden_size: self.hidden_size.unwrap_or(base.hidden_size),
            side_keys: self.side_keys.unwrap_or(base.side_keys),
            key_dim: self.key_dim.unwrap_or(base.key_dim),
            value_dim: self.value_dim.unwrap_or(base.value_dim),
            top_m: self.top_m.unwrap_or(base.top_m),
            heads: self.heads.unwrap_or(base.heads),
            cores: self.cores.unwrap_or(base.cores),
            expansion: self.expansion.unwrap_or(base.expansion),
            tucker_rank: self.tucker_rank.unwrap_or(base.tucker_rank),
            ..base
        })
    }
}

/// Runs the verb.
pub fn run(args: &LayerArgs, common: &Common) -> Result<Report> {
    let source = args.file.as_ref().map(|path| args.layer.open(path)).transpose()?;
    let config = match &source {
        Some(source) => source.config().clone(),
        None => MemoryConfig::new(args.shape.dimensions()?)?,
    };
    let tokens = usize::try_from(args.tokens)?;
    fits_host(&config, tokens)?;
    let adapter = common.find_timed("bench layer")?;
    let weights = match &source {
        Some(source) => source.weights()?,
        None => Weights::random(&config, SEED),
    };
    let input = numbers(tokens * config.hidden_size);
    let start = Instant::now();
    let engine = adapter.engine(&config, &weights, common.dtype, common.invariant)?;
    let load_ms = milliseconds(start);
    let start = Instant::now();
    engine.forward(&input)?;
    let first_call_ms = milliseconds(start);
    let effort = Effort { samples: args.samples as usize, budget_ms: f64::INFINITY };
    let measured = engine.measure(&input, effort, engine.rates()?)?;
    let cost = config.cost(tokens, common.dtype);
    let mut entries = device_json(&adapter, common.dtype);
    entries.extend([
        ("tokens", json!(tokens)),
        ("dimensions", dimensions_json(&config)),
        ("strategies", json!(engine.strategies(tokens))),
        ("samples", json!(args.samples)),
        ("load_ms", json!(load_ms)),
        ("first_call_ms", json!(first_call_ms)),
    ]);
    entries.extend(measured_json(&measured, &cost));
    let text = [
        device_line(&adapter, common.dtype),
        shape_line(&config, &counted(tokens, "token")),
        forward_table(&measured, &cost),
        format!("  Loading took {}, the first call after it {}", ms(load_ms), ms(first_call_ms)),
        if adapter.compiles() { ", kernels compiled in both.\n".to_string() } else { ".\n".into() },
        engine.strategies(tokens).map_or_else(String::new, |it| format!("  {it}\n")),
    ];
    Ok(Report { text: text.concat(), json: object(entries), passed: true })
}

/// Of weights and inputs.
pub const SEED: u64 = 1;

/// The dimensions in two lines, behind `what` runs through them.
pub fn shape_line(config: &MemoryConfig, what: &str) -> String {
    format!(
        "{what}: hidden_size {}, side_keys {}, key_dim {}, value_dim {}, top_m {}, heads {}, cores {},\n  expansion {}, \
         tucker_rank {}\n",
        config.hidden_size,
        config.side_keys,
        config.key_dim,
        config.value_dim,
        config.top_m,
        config.heads,
        config.cores,
        config.expansion,
        config.tucker_rank,
    )
}

/// Refuses dimensions whose weights and activations this machine could not hold. Loading copies weights up to twice.
pub fn fits_host(config: &MemoryConfig, tokens: usize) -> Result<()> {
    let wide = |size: usize| size as u128;
    let keys = wide(config.heads * 2 * config.side_keys) * wide(config.key_dim * config.tucker_rank);
    let dense = wide(config.hidden_size) * wide(config.query_pairs() * 2 * config.key_dim + config.pooled_dim());
    let weights = wide(config.rows()) * wide(config.value_dim) + wide(config.slots()) + keys + dense;
    let per_token = 2 * wide(config.hidden_size) + wide(config.heads * config.top_m) * wide(1 + config.cores);
    let needed = 4 * (3 * weights + 2 * wide(tokens) * per_token);
    match host_memory() {
        Some(available) if needed > u128::from(available) => Err(Failure::new(format!(
            "these dimensions need about {} of host memory, {} are available",
            bytes(u64::try_from(needed).unwrap_or(u64::MAX)),
            bytes(available)
        ))),
        _ => Ok(()),
    }
}

/// `count` numbers in [-1, 1), the same ones every time (splitmix64).
pub fn numbers(count: usize) -> Vec<f32> {
    let mut state = SEED;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}
