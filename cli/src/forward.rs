//! `ultramem forward`: runs the layer of a file on its input and writes what comes out.

use std::{collections::BTreeMap, path::PathBuf};

use clap::Args;
use serde_json::json;
use ultramem::checkpoint::{FileTensor, Integers, save};
use ultramem::{HostTensor, MemoryConfig};

use crate::Common;
use crate::engine::Outcome;
use crate::failure::Result;
use crate::numbers::counted;
use crate::report::{Report, device_json, device_line, object};
use crate::source::{InputArgs, ModelLayer};

/// Arguments of `forward`.
#[derive(Debug, Args)]
pub struct ForwardArgs {
    /// A safetensors file that holds a layer and `input` [tokens, hidden_size], or a whole model
    file: PathBuf,
    #[command(flatten)]
    layer: ModelLayer,
    #[command(flatten)]
    input: InputArgs,
    /// Where `output`, `indices` and `scores` go
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
}

/// Runs the verb.
pub fn run(args: &ForwardArgs, common: &Common) -> Result<Report> {
    let source = args.layer.open(&args.file)?;
    source.differs(&args.output)?;
    let (input, weights) = (args.input.input(&source)?, source.weights()?);
    let adapter = common.find()?;
    let engine = adapter.engine(source.config(), &weights, common.dtype, common.invariant)?;
    let outcome = engine.forward(&input)?;
    write(args, source.config(), &outcome)?;
    let tokens = input.len() / source.config().hidden_size;
    let (from, to) = (args.file.display(), args.output.display());
    let text = format!("{from} → {to}: {} on {}", counted(tokens, "token"), device_line(&adapter, common.dtype));
    let mut entries = device_json(&adapter, common.dtype);
    entries.extend([("output", json!(to.to_string())), ("tokens", json!(tokens))]);
    Ok(Report { text, json: object(entries), passed: true })
}

fn write(args: &ForwardArgs, config: &MemoryConfig, outcome: &Outcome) -> Result<()> {
    let (tokens, entries) = (outcome.output.len() / config.hidden_size, config.heads * config.top_m);
    let numbers = outcome.slots.iter().map(|&slot| i64::from(slot)).collect();
    let tensors = [
        ("output", FileTensor::Floats(HostTensor::from_f32([tokens, config.hidden_size], &outcome.output)?)),
        ("indices", FileTensor::Integers(Integers { shape: vec![tokens, entries], numbers })),
        ("scores", FileTensor::Floats(HostTensor::from_f32([tokens, entries, config.cores], &outcome.scores)?)),
    ];
    Ok(save(&args.output, &tensors, &BTreeMap::new())?)
}
