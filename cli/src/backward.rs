//! `ultramem backward`: runs the layer of a file forward and backward and writes the gradients.

use std::{collections::BTreeMap, path::PathBuf};

use clap::Args;
use serde_json::json;
use ultramem::checkpoint::{FileTensor, save};

use crate::Common;
use crate::failure::Result;
use crate::numbers::counted;
use crate::report::{Report, device_json, device_line, object};
use crate::source::{InputArgs, ModelLayer};

/// Arguments of `backward`.
#[derive(Debug, Args)]
pub struct BackwardArgs {
    /// A safetensors file that holds a layer, and `input` and `grad_output` [tokens, hidden_size], or a whole model
    file: PathBuf,
    #[command(flatten)]
    layer: ModelLayer,
    #[command(flatten)]
    input: InputArgs,
    /// A file with the gradient of the output, and the tensor's name where it is not `grad_output`; without it, it is where the input is
    #[arg(long, value_name = "FILE[:NAME]")]
    grad_output: Option<String>,
    /// Where `grad_input` and a `grad.<name>` for each weight go, dense and in f32
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
}

/// Runs the verb.
pub fn run(args: &BackwardArgs, common: &Common) -> Result<Report> {
    let source = args.layer.open(&args.file)?;
    source.differs(&args.output)?;
    let input = args.input.input(&source)?;
    let tokens = input.len() / source.config().hidden_size;
    let grad_output = args.input.grad_output(args.grad_output.as_deref(), &source, tokens)?;
    let weights = source.weights()?;
    let adapter = common.find()?;
    let engine = adapter.engine(source.config(), &weights, common.dtype, common.invariant)?;
    let (_, gradients) = engine.backward(&input, &grad_output)?;
    let named = gradients.named(source.config())?;
    let named: Vec<_> = named.into_iter().map(|(name, tensor)| (name, FileTensor::Floats(tensor))).collect();
    let tensors: Vec<_> = named.iter().map(|(name, tensor)| (name.as_str(), tensor.clone())).collect();
    save(&args.output, &tensors, &BTreeMap::new())?;
    let (from, to) = (args.file.display(), args.output.display());
    let (rows, all) = (gradients.values.len(), source.config().rows());
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
