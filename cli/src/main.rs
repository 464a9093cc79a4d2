//! The command `ultramem`: run, check and measure memory layers.
//!
//! Every verb gives a [`Report`], which is printed here, as text or as JSON. Exit status: 0 done, 1 a check failed, 2 bad usage,
//! a bad file or a device that failed, with one line on stderr.

mod backend;
mod backward;
mod bench;
mod check;
mod compare;
mod constants;
mod demo;
mod devices;
mod engine;
mod export;
mod failure;
mod forward;
mod import;
mod info;
mod kernels;
mod load;
mod numbers;
mod processor;
mod profile;
mod rates;
mod report;
mod sampling;
mod source;
mod themes;

use std::{
    io::{self, ErrorKind, IsTerminal, Write},
    process::ExitCode,
};

use clap::{Args, Parser, Subcommand, error::ErrorKind as Usage};
use tracing_subscriber::EnvFilter;
use ultramem::ElementType;
use ultramem_offline::Gpu;

use crate::backend::{Adapter, Backend, Limits};
use crate::failure::{Failure, Result, guard, keep_panics};
use crate::report::Report;

/// Memory layers as GPU kernels: run, check and measure them. Without a verb: the demo.
#[derive(Debug, Parser)]
#[command(name = "ultramem", version)]
struct Cli {
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    common: Common,
}

/// What every verb takes.
#[derive(Debug, Args)]
#[command(next_help_heading = "Options of every verb")]
struct Common {
    /// What computes
    #[arg(long, global = true, value_enum, default_value = "auto")]
    backend: Backend,
    /// What of an adapter is used, on the wgpu backend
    #[arg(long, global = true, value_enum, default_value = "adapter")]
    limits: Limits,
    /// The GPU that is stood in for where there is none, by kernels and on the offline backend: a100, h100, h200, b200 or rtx4090
    #[arg(long, global = true, default_value = "h100")]
    device: Gpu,
    /// Element type of weights and activations: f32, f16 or bf16
    #[arg(long, global = true, default_value = "f32")]
    dtype: ElementType,
    /// Give a token the same bits in a call of any number of tokens: where a layer runs alone, not in comparisons of models
    #[arg(long, global = true)]
    invariant: bool,
    /// Print the report as JSON
    #[arg(long, global = true)]
    json: bool,
}

impl Common {
    /// The device to use, within its limits.
    fn find(&self) -> Result<Adapter> {
        self.backend.within(self.limits)?.find(self.device)?.within(self.limits)
    }

    /// The device to use for a verb that measures time.
    fn find_timed(&self, verb: &str) -> Result<Adapter> {
        self.backend.can_be_timed(verb)?;
        self.find()
    }

    /// The device for a verb that means nothing on the reference.
    fn find_device(&self, verb: &str) -> Result<Adapter> {
        self.backend.within(self.limits)?.find_device(verb)?.within(self.limits)
    }

    /// The device for a verb that measures what only GPUs have kernels for.
    fn find_gpu(&self, verb: &str) -> Result<Adapter> {
        self.backend.within(self.limits)?.find_gpu(verb)?.within(self.limits)
    }
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run a trained layer, a bundled one or a file's, on real text, check it, time it and show what its slots are for
    Demo(demo::DemoArgs),
    /// Run the layer of a file, or one of a whole model, and write the results
    Forward(forward::ForwardArgs),
    /// Run the layer of a file, or one of a whole model, forward and backward and write the gradients
    Backward(backward::BackwardArgs),
    /// Run the layer of a file, or each of a whole model, and compare with the results that a file expects
    Check(check::CheckArgs),
    /// Show what a layer is made of and what it costs, or the memory layers of a whole model
    Info(info::InfoArgs),
    /// Write a layer of a whole model to a file of its own
    Export(export::ExportArgs),
    /// Write a whole model with some of its layers replaced by those of files
    Import(import::ImportArgs),
    /// Write the kernels that a layer launches, as source or binary, with a manifest; needs no GPU
    Kernels(kernels::KernelsArgs),
    /// Count what each kernel of a pass would cost a GPU, pipe by pipe and line by line; needs no GPU
    Profile(profile::ProfileArgs),
    /// Measure what `profile` assumes of a GPU, kernel by kernel
    Constants(constants::ConstantsArgs),
    /// List the adapters and what each supports
    Devices,
    /// Measure what a layer costs on this device
    #[command(subcommand, arg_required_else_help = false)]
    Bench(bench::Bench),
}

fn main() -> ExitCode {
    if std::env::var_os("RUST_LOG").is_some() {
        let filter = EnvFilter::from_default_env();
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).init();
    }
    keep_panics();
    quieten_vulkan();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let report = guard(|| run(&cli)).and_then(|report| print(&report, cli.common.json).map(|()| report.passed));
    match report {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(failure) => fail(&failure),
    }
}

/// Mesa's layer that picks the GPU of the desktop prints errors where there is no desktop. It has nothing to do there.
fn quieten_vulkan() {
    let set = |name| std::env::var_os(name).is_some();
    if !set("XDG_RUNTIME_DIR") && !set("MESA_VK_DEVICE_SELECT") {
        // SAFETY: no other thread runs yet that could read the environment.
        unsafe { std::env::set_var("NODEVICE_SELECT", "1") };
    }
}

fn run(cli: &Cli) -> Result<Report> {
    let idle = matches!(
        cli.verb,
        Some(
            Verb::Info(_)
                | Verb::Export(_)
                | Verb::Import(_)
                | Verb::Kernels(_)
                | Verb::Profile(_)
                | Verb::Constants(_)
                | Verb::Devices
        )
    );
    if idle && cli.common.limits != Limits::Adapter {
        return Err(Failure::new(
            "--limits webgpu is for verbs that run a layer: demo, forward, backward, check, bench",
        ));
    }
    match &cli.verb {
        None => demo::run(&demo::DemoArgs::default(), &cli.common),
        Some(Verb::Demo(args)) => demo::run(args, &cli.common),
        Some(Verb::Forward(args)) => forward::run(args, &cli.common),
        Some(Verb::Backward(args)) => backward::run(args, &cli.common),
        Some(Verb::Check(args)) => check::run(args, &cli.common),
        Some(Verb::Info(args)) => info::run(args),
        Some(Verb::Export(args)) => export::run(args),
        Some(Verb::Import(args)) => import::run(args),
        Some(Verb::Kernels(args)) => kernels::run(args, &cli.common),
        Some(Verb::Profile(args)) => profile::run(args, &cli.common),
        Some(Verb::Constants(args)) => constants::run(args, &cli.common),
        Some(Verb::Devices) => devices::run(cli.common.backend),
        Some(Verb::Bench(bench)) => bench::run(bench, &cli.common),
    }
}

/// Whoever reads stdout may stop reading; that is no failure.
fn print(report: &Report, json: bool) -> Result<()> {
    let text = if json { format!("{:#}\n", report.json) } else { report.text.clone() };
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Failure::new(format!("stdout: {error}"))),
        _ => Ok(()),
    }
}

/// Help and version are answers; everything else is one line.
fn usage(error: &clap::Error) -> ExitCode {
    if matches!(error.kind(), Usage::DisplayHelp | Usage::DisplayVersion) {
        let text = error.render();
        let text = if io::stdout().is_terminal() { text.ansi().to_string() } else { text.to_string() };
        // Nobody is left to tell if stdout is closed.
        let _ = io::stdout().write_all(text.as_bytes());
        return ExitCode::SUCCESS;
    }
    let text = error.render().to_string();
    let (reason, _) = text.split_once("\n\n").unwrap_or((&text, ""));
    fail(&Failure::new(format!("{}; see ultramem --help", reason.trim().trim_start_matches("error: "))))
}

fn fail(failure: &Failure) -> ExitCode {
    eprintln!("error: {failure}");
    ExitCode::from(2)
}
