//! `ultramem kernels`: the kernels that a layer launches on a GPU, written as files, with a manifest that says how each is launched.
//! Nothing runs, and no GPU is needed.

use std::path::PathBuf;

use clap::{Args, ValueEnum, value_parser};
use serde_json::{Value, json};
use ultramem::MemoryConfig;
use ultramem_offline::compile::{Architecture, compile_all};
use ultramem_offline::profile::predictions;
use ultramem_offline::trace::{Traced, Tracer, tracing_device};
use ultramem_offline::{Kernel, Target, table};

use crate::Common;
use crate::bench::layer::Shape;
use crate::failure::{Failure, Result};
use crate::numbers::{bytes, counted};
use crate::report::{Report, Table, dimensions_json};

/// Arguments of `kernels`.
#[derive(Debug, Args)]
pub struct KernelsArgs {
    /// What the kernels are written as
    #[arg(long, value_enum, default_value = "cuda")]
    target: Words,
    /// Rows of the input
    #[arg(long, default_value_t = 4096, value_parser = value_parser!(u64).range(1..))]
    tokens: u64,
    #[command(flatten)]
    shape: Shape,
    /// The folder for the files; it is made if it is not there
    #[arg(short, long, required_unless_present_any = ["table", "predictions"])]
    output: Option<PathBuf>,
    /// Print the tables of docs/kernels.md instead: registers, shared memory, occupancy, load widths and bytes moved on an H100
    #[arg(long, conflicts_with_all = ["output", "target", "tokens"])]
    table: bool,
    /// Print the last table of docs/kernels.md instead: what each kernel is predicted to take on an H100. Some two minutes
    #[arg(long, conflicts_with_all = ["output", "target", "tokens", "table"])]
    predictions: bool,
}

/// What kernels can be written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Words {
    /// CUDA C++, as NVRTC gets it.
    Cuda,
    /// NVIDIA's portable assembly, made by NVRTC.
    Ptx,
    /// WebGPU's language.
    #[cfg(feature = "wgpu")]
    Wgsl,
    /// Vulkan's binary.
    #[cfg(feature = "wgpu")]
    Spirv,
}

impl Words {
    fn target(self) -> Target {
        match self {
            Self::Cuda | Self::Ptx => Target::Cuda,
            #[cfg(feature = "wgpu")]
            Self::Wgsl => Target::Wgsl,
            #[cfg(feature = "wgpu")]
            Self::Spirv => Target::SpirV,
        }
    }

    fn ending(self) -> &'static str {
        match self {
            Self::Cuda => "cu",
            Self::Ptx => "ptx",
            #[cfg(feature = "wgpu")]
            Self::Wgsl => "wgsl",
            #[cfg(feature = "wgpu")]
            Self::Spirv => "spv",
        }
    }
}

/// Runs the verb.
pub fn run(args: &KernelsArgs, common: &Common) -> Result<Report> {
    if args.predictions {
        let predictions = predictions::table(&predictions::rows()?);
        return Ok(Report { json: json!({ "predictions": predictions }), text: predictions, passed: true });
    }
    let Some(folder) = &args.output else {
        let [kernels, stages] = table::tables().map_err(|error| Failure::new(error.to_string()))?;
        let text = format!("{kernels}\n{stages}");
        return Ok(Report { json: json!({ "kernels": kernels, "stages": stages }), text, passed: true });
    };
    let config = MemoryConfig::new(args.shape.dimensions()?)?;
    let device = tracing_device(common.device, args.target.target());
    let tracer = Tracer::new(&device, &config, common.dtype)?;
    let mut launches = tracer.prepare().to_vec();
    launches.extend(tracer.forward(usize::try_from(args.tokens)?, None)?);
    let files = files(args, common, &launches)?;
    std::fs::create_dir_all(folder).map_err(|error| Failure::new(format!("{}: {error}", folder.display())))?;
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        std::fs::write(&path, bytes).map_err(|error| Failure::new(format!("{}: {error}", path.display())))
    };
    for (name, bytes) in &files {
        write(name, bytes)?;
    }
    let json = json!({
        "target": args.target.ending(),
        "device": common.device.to_string(),
        "dtype": common.dtype.to_string(),
        "tokens": args.tokens,
        "dimensions": dimensions_json(&config),
        "launches": launches.iter().zip(&files).map(|(traced, (file, _))| launch_json(traced, file)).collect::<Vec<_>>(),
    });
    write("manifest.json", format!("{json:#}\n").as_bytes())?;
    Ok(Report { text: text(args, common, &launches, &files), json, passed: true })
}

/// A file for each launch, numbered in their order.
fn files(args: &KernelsArgs, common: &Common, launches: &[Traced]) -> Result<Vec<(String, Vec<u8>)>> {
    let kernels: Vec<&Kernel> = launches.iter().map(|traced| &*traced.launch.kernel).collect();
    let contents: Vec<Vec<u8>> = match args.target {
        Words::Ptx => {
            let pairs: Vec<_> = kernels.iter().map(|kernel| (*kernel, Architecture::of(common.device))).collect();
            compile_all(&pairs)?.into_iter().map(|compiled| compiled.ptx.into_bytes()).collect()
        }
        _ => kernels.iter().map(|kernel| contents(kernel)).collect(),
    };
    let name = |(at, traced): (usize, &Traced)| {
        let entry: String = traced.launch.kernel.entry.chars().take(80).collect();
        format!("{at:02}-{}-{entry}.{}", traced.stage, args.target.ending())
    };
    Ok(launches.iter().enumerate().map(name).zip(contents).collect())
}

fn contents(kernel: &Kernel) -> Vec<u8> {
    match &kernel.binary {
        Some(words) => words.iter().flat_map(|word| word.to_le_bytes()).collect(),
        None => kernel.source.clone().into_bytes(),
    }
}

fn launch_json(traced: &Traced, file: &str) -> Value {
    let (launch, kernel) = (&traced.launch, &traced.launch.kernel);
    let argument = |(argument, length): (&ultramem_offline::Argument, &u64)| json!({ "element": argument.element, "element_bytes": argument.size, "writable": argument.writable, "bytes": length });
    json!({
        "file": file,
        "stage": traced.stage,
        "entry_point": kernel.entry,
        "function": kernel.name,
        "cube_count": launch.count,
        "cube_dim": kernel.dim,
        "shared_memory_bytes": kernel.shared,
        "buffers": kernel.buffers.iter().zip(&launch.lengths).map(argument).collect::<Vec<_>>(),
        "info_words": launch.words,
    })
}

fn text(args: &KernelsArgs, common: &Common, launches: &[Traced], files: &[(String, Vec<u8>)]) -> String {
    let mut table = Table::default();
    table.line(["file", "cubes", "units", "shared memory"]);
    for (traced, (file, _)) in launches.iter().zip(files) {
        let product = |sizes: &[u32; 3]| sizes.iter().map(|&size| u64::from(size)).product::<u64>().to_string();
        let kernel = &traced.launch.kernel;
        table.line([file, &product(&traced.launch.count), &product(&kernel.dim), &bytes(kernel.shared as u64)]);
    }
    let place = args.output.as_deref().map(|it| it.display().to_string()).unwrap_or_default();
    format!(
        "{} for {} and manifest.json in {place}, for {}\n{}",
        counted(files.len(), "kernel"),
        common.device,
        counted(args.tokens as usize, "token"),
        table.text()
    )
}
