//! `ultramem backward`: runs the layer of a file forward and backward and writes the gradients.

use std::{collections::BTreeMap, path::PathBuf};

use clap::Args;
use serde_json::json;
use ultramem::checkpoint::{FileTensor, save};

use crate::Common;
use crate::failure::{Failure, Result};
use crate::load;
use crate::numbers::counted;
use crate::report::{Report, device_json, device_line, object};

/// Arguments of `backward`.
#[derive(Debug, Args)]
pub struct BackwardArgs {
    /// A safetensors file that holds a layer, and `input` and `grad_output` [tokens, hidden_size]
    file: PathBuf,
    /// Where `grad_input` and a `grad.<name>` for each weight go, dense and in f32
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
}

/// Runs the verb.
pub fn run(args: &BackwardArgs, common: &Common) -> Result<Report> {
    load::differs(&args.file, &args.output)?;
    let checkpoint = load::checkpoint(&args.file)?;
    let input = load::input(&args.file, &checkpoint)?;
    let tokens = input.len() / checkpoint.config().hidden_size;
    let grad_output = load::grad_output(&args.file, &checkpoint, tokens)?;
    let weights = checkpoint.weights().map_err(|error| Failure::in_file(&args.file, error))?;
    let adapter = common.find()?;
    let engine = adapter.engine(checkpoint.config(), &weights, common.dtype)?;
    let (_, gradients) = engine.backward(&input, &grad_output)?;
    let named = gradients.named(checkpoint.config())?;
    let named: Vec<_> = named.into_iter().map(|(name, tensor)| (name, FileTensor::Floats(tensor))).collect();
    let tensors: Vec<_> = named.iter().map(|(name, tensor)| (name.as_str(), tensor.clone())).collect();
    save(&args.output, &tensors, &BTreeMap::new())?;
    let (from, to) = (args.file.display(), args.output.display());
    let (rows, all) = (gradients.values.len(), checkpoint.config().rows());
    let text = format!(
        "{from} → {to}: {}, {rows} of {all} value rows used, on {}",
        counted(tokens, "token"),
        device_line(&adapter, common.dtype)
    );
    let mut entries = device_json(&adapter, common.dtype);
    entries.extend([
        ("output", json!(to.to_string())),
        ("tokens", json!(tokens)),
        ("used_rows", json!(rows)),
        ("rows", json!(all)),
    ]);
    Ok(Report { text, json: object(entries), passed: true })
}
