//! The bar: what the composition in stock Burn operations takes for each case, with and without kernel fusion.
//!
//! `cargo run --release -p ultramem-benches --example bar` measures every pair in a process of its own that finds no
//! cache, and prints a line for each: the time from host weights to the first output on the host, compilation and
//! autotune included, and the median and the least of 20 forwards after that, each synchronised.

use std::env;
use std::error::Error;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use burn::backend::Wgpu;
use burn::backend::wgpu::{CubeBackend, WgpuRuntime};
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use ultramem_benches::{Case, Composition};

const FORWARDS: usize = 20;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match arguments.as_slice() {
        [] => measure_all(),
        [case, backend] => {
            let case = Case::named(case).ok_or_else(|| format!("no case is called {case}"))?;
            match backend.as_str() {
                "fused" => measure::<Wgpu>(&case, backend),
                "unfused" => measure::<CubeBackend<WgpuRuntime, f32, i32, u32>>(&case, backend),
                _ => Err(format!("{backend} is neither fused nor unfused").into()),
            }
        }
        _ => Err("usage: bar [CASE fused|unfused]".into()),
    }
}

/// Runs this program once for each case and backend.
fn measure_all() -> Result<(), Box<dyn Error>> {
    for case in Case::all() {
        for backend in ["fused", "unfused"] {
            let folder = tempfile::tempdir()?;
            fs::write(folder.path().join("cubecl.toml"), "[autotune]\ncache = \"local\"\n")?;
            let status = Command::new(env::current_exe()?)
                .args([case.name, backend])
                .current_dir(folder.path())
                // Mesa keeps compiled shaders between processes, too.
                .env("MESA_SHADER_CACHE_DIR", folder.path())
                .status()?;
            if !status.success() {
                return Err(format!("{} {backend}: {status}", case.name).into());
            }
        }
    }
    Ok(())
}

fn measure<B: Backend>(case: &Case, backend: &str) -> Result<(), Box<dyn Error>> {
    let (config, weights, input) = case.random()?;
    let input = TensorData::new(input, [case.tokens, config.hidden_size]);
    let device = B::Device::default();
    let start = Instant::now();
    let layer = Composition::<B>::new(config, &weights, &device);
    let input = Tensor::from_data(input, &device);
    layer.forward(input.clone()).try_into_data()?;
    let first = start.elapsed();
    let mut times = Vec::new();
    for _ in 0..FORWARDS {
        let start = Instant::now();
        let output = layer.forward(input.clone());
        B::sync(&device)?;
        times.push(start.elapsed());
        drop(output);
    }
    times.sort();
    let (least, median) = (milliseconds(times[0]), milliseconds(times[FORWARDS / 2]));
    println!(
        "{:6} {backend:8} first {:8.0} ms  median {median:6.1} ms  least {least:6.1} ms",
        case.name,
        milliseconds(first)
    );
    Ok(())
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
