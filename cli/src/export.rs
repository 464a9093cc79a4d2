//! `ultramem export`: a layer of a whole model as a file of its own, which every other verb reads.

use std::{collections::BTreeMap, path::PathBuf};

use clap::Args;
use serde_json::json;
use ultramem::Checkpoint;
use ultramem::checkpoint::{FileTensor, Tensors};

use crate::failure::Result;
use crate::report::{Report, dimensions_json};
use crate::source::ModelLayer;

/// Arguments of `export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// A whole model: a file or folder as training left it
    file: PathBuf,
    #[command(flatten)]
    layer: ModelLayer,
    /// Where the layer goes, a safetensors file
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// A file with N.input and, perhaps, N.output for layer N, to go along as `input` and `expected.output`
    #[arg(long, value_name = "FILE")]
    expected: Option<PathBuf>,
}

/// The metadata entry with the layer's number.
pub const LAYER: &str = "layer";

/// Runs the verb.
pub fn run(args: &ExportArgs) -> Result<Report> {
    let source = args.layer.open(&args.file)?;
    source.differs(&args.output)?;
    let (layer, weights) = (source.layer(), source.weights()?);
    let number = layer.number();
    let expected = args.expected.as_ref().map(Tensors::open).transpose()?;
    let mut extra = Vec::new();
    if let Some(expected) = &expected {
        let (input, output) = (format!("{number}.input"), format!("{number}.output"));
        extra.push(("input", FileTensor::Floats(expected.floats(&input)?)));
        if expected.has(&output) {
            extra.push(("expected.output", FileTensor::Floats(expected.floats(&output)?)));
        }
    }
    let metadata = BTreeMap::from([(LAYER.to_string(), number.to_string())]);
    Checkpoint::write(&args.output, layer.config(), &weights, &extra, &metadata)?;
    let (from, to) = (args.file.display().to_string(), args.output.display().to_string());
    let text = format!("{from}, layer {number} ({}) → {to}\n", layer.name());
    let json = json!({ "model": from, "layer": number, "output": to, "config": dimensions_json(layer.config()) });
    Ok(Report { text, json, passed: true })
}
