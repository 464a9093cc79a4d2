//! A byte-level language model on the King James Bible, with or without a memory layer: `lm train`, `lm sample`, `lm plot`,
//! `lm export`.
//!
//! A run is a folder: its settings, its log as JSON lines, and its last checkpoint. `lm train` on a folder that holds a
//! checkpoint continues it, and gives the same log as if it had never stopped.

mod data;
mod export;
mod model;
mod optimiser;
mod plot;
mod run;
mod sample;
mod train;

use std::{path::PathBuf, process::ExitCode};

use burn::backend::Autodiff;
use clap::{Parser, Subcommand};

use crate::{run::Settings, sample::Sampling};

type Device = burn::backend::wgpu::WgpuDevice;
type Inner = burn::backend::Wgpu;
type Training = Autodiff<Inner>;
type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

#[derive(Debug, Parser)]
#[command(name = "lm", version, about = "A byte-level language model with a memory layer")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Trains a model, or continues a run
    Train {
        /// Folder of the run
        run: PathBuf,
        #[command(flatten)]
        settings: Settings,
    },
    /// Writes text as the trained model would
    Sample {
        /// Folder of the run
        run: PathBuf,
        #[command(flatten)]
        sampling: Sampling,
    },
    /// Plots the losses of all runs in a folder
    Plot {
        /// Folder that holds the runs
        runs: PathBuf,
        /// The SVG file
        #[arg(short, long)]
        output: PathBuf,
    },
    /// Writes the trained memory layer as safetensors, with hidden states, for `ultramem check`
    Export {
        /// Folder of the run
        run: PathBuf,
        /// The safetensors file
        #[arg(short, long)]
        output: PathBuf,
        /// Windows of the validation text whose hidden states are written
        #[arg(long, default_value_t = 8)]
        windows: usize,
    },
}

fn main() -> ExitCode {
    let done = match Cli::parse().verb {
        Verb::Train { run, settings } => train::train(&run, settings),
        Verb::Sample { run, sampling } => sample::sample(&run, &sampling),
        Verb::Plot { runs, output } => plot::plot(&runs, &output),
        Verb::Export { run, output, windows } => export::export(&run, &output, windows),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lm: {error}");
            ExitCode::from(2)
        }
    }
}
