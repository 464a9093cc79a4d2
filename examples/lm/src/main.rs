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

use burn::backend::Flex;
use clap::{Parser, Subcommand, ValueEnum};
use ultramem::burn::MemoryBackend;

use crate::{run::Settings, sample::Sampling};

/// Without fusion, whatever another crate of the same build asks of Burn.
type Wgpu = burn::backend::wgpu::CubeBackend<burn::backend::wgpu::WgpuRuntime, f32, i32, u32>;
type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

#[derive(Debug, Parser)]
#[command(name = "lm", version, about = "A byte-level language model with a memory layer")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
    /// Where the model runs; a run can go on on another one
    #[arg(long, global = true, value_enum, default_value_t = Device::Wgpu)]
    backend: Device,
}

/// Where the model runs.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Device {
    /// A GPU: Vulkan, Metal or WebGPU
    Wgpu,
    /// The processor
    Cpu,
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
    let cli = Cli::parse();
    let done = match cli.backend {
        Device::Wgpu => run::<Wgpu>(cli.verb),
        Device::Cpu => run::<Flex>(cli.verb),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lm: {error}");
            ExitCode::from(2)
        }
    }
}

fn run<B: MemoryBackend>(verb: Verb) -> Result<()> {
    match verb {
        Verb::Train { run, settings } => train::train::<B>(&run, settings),
        Verb::Sample { run, sampling } => sample::sample::<B>(&run, &sampling),
        Verb::Plot { runs, output } => plot::plot(&runs, &output),
        Verb::Export { run, output, windows } => export::export::<B>(&run, &output, windows),
    }
}
