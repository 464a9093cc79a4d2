//! `ultramem import`: a whole model with some of its layers replaced by those of files.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use ultramem::checkpoint::{Layer, Model};
use ultramem::{Checkpoint, Weights};

use crate::export::LAYER;
use crate::failure::{Failure, Result};
use crate::load;
use crate::report::Report;
use crate::source::SettingsArgs;

/// Arguments of `import`.
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// Safetensors files that hold a layer each, as `export` writes them
    #[arg(required = true, value_name = "LAYER")]
    files: Vec<PathBuf>,
    /// The whole model: a file or folder as training left it
    #[arg(long, value_name = "PATH")]
    into: PathBuf,
    /// Where the new model goes, a safetensors file
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// The layer that a file replaces, once for each file in their order; without it, the one that the file comes from
    #[arg(long, value_name = "N")]
    layer: Vec<String>,
    #[command(flatten)]
    settings: SettingsArgs,
}

/// Runs the verb.
pub fn run(args: &ImportArgs) -> Result<Report> {
    let (given, files) = (args.layer.len(), args.files.len());
    if given != 0 && given != files {
        return Err(Failure::new(format!("--layer is there {given} times, expected once for each of {files} files")));
    }
    let model = args.settings.open(&args.into)?;
    spare_model(&model, &args.output)?;
    let files = args.files.iter().map(|path| load::checkpoint(path)).collect::<Result<Vec<_>>>()?;
    let mut weights: Vec<Weights<'_>> = Vec::new();
    for (path, file) in args.files.iter().zip(&files) {
        load::differs(path, &args.output)?;
        weights.push(file.weights().map_err(|error| Failure::in_file(path, error))?);
    }
    let layer = |at| layer(args, &model, at, &files[at]);
    let layers = (0..files.len()).map(layer).collect::<Result<Vec<_>>>()?;
    let new = layers.iter().zip(files.iter().zip(&weights));
    let new: Vec<_> = new.map(|(&layer, (file, weights))| (layer, file.config(), weights)).collect();
    model.replace(&new, &args.output)?;
    let numbers: Vec<usize> = layers.iter().map(|layer| layer.number()).collect();
    let listed = numbers.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    let (from, to) = (args.into.display().to_string(), args.output.display().to_string());
    let text = format!("{from} with layers replaced: {listed} → {to}\n");
    Ok(Report { text, json: json!({ "model": from, "layers": numbers, "output": to }), passed: true })
}

/// The layer that the file at place `at` replaces.
fn layer<'a>(args: &ImportArgs, model: &'a Model, at: usize, file: &Checkpoint) -> Result<&'a Layer> {
    match args.layer.get(at).or_else(|| file.metadata().get(LAYER)) {
        Some(layer) => Ok(model.layer(layer)?),
        None => {
            let text = format!("does not say which layer it is (metadata entry {LAYER:?}); name it with --layer");
            Err(Failure::new(text).of_file(&args.files[at]))
        }
    }
}

/// Refuses to write over a file that is in the model's folder, which may be one of the model's.
fn spare_model(model: &Model, output: &Path) -> Result<()> {
    let folder = |path: &Path| path.canonicalize().ok().and_then(|path| path.parent().map(Path::to_path_buf));
    load::differs(model.tensors().path(), output)?;
    if folder(output).is_some_and(|own| folder(model.tensors().path()) == Some(own)) {
        return Err(Failure::new("the output would replace a file in the model's folder").of_file(output));
    }
    Ok(())
}
