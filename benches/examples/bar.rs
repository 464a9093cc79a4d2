//! The bar: our layer and the composition in stock Burn operations, for each case.
//!
//! `cargo run --release -p ultramem-benches --features composition --example bar` measures the first call of each implementation
//! in a process of its own that finds no cache (from host weights to the first output on the host, compilation and autotune
//! included), and then both in one process, forward by forward in turn, each synchronised.

use std::env;
use std::error::Error;
use std::fs;
use std::process::Command;
use std::time::Instant;

use burn::backend::Wgpu as Stock;
use burn::backend::wgpu::{WgpuDevice, WgpuRuntime};
use burn::tensor::{Tensor, TensorData};
use cubecl::Runtime;
use cubecl::future::block_on;
use ultramem::{ElementType, MemoryLayer};
use ultramem_benches::{Case, Composition};

/// Burn's wgpu backend, with fusion.
type Backend = Stock;
type Outcome<T> = Result<T, Box<dyn Error>>;

/// Forwards of each implementation.
const FORWARDS: usize = 30;

fn main() -> Outcome<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [case, what] = arguments.as_slice() else {
        return measure_all();
    };
    let case = Case::named(case).ok_or_else(|| format!("no case is called {case}"))?;
    match what.as_str() {
        "ultramem" => report_first(&case, what, || ours(&case).map(drop)),
        "composition" => report_first(&case, what, || composition(&case).map(drop)),
        "versus" => versus(&case),
        _ => Err(format!("{what} is not ultramem, composition or versus").into()),
    }
}

/// Runs this program once for each measurement, in a folder without caches.
fn measure_all() -> Outcome<()> {
    for case in Case::all() {
        for what in ["ultramem", "composition", "versus"] {
            let folder = tempfile::tempdir()?;
            fs::write(folder.path().join("cubecl.toml"), "[autotune]\ncache = \"local\"\n")?;
            let status = Command::new(env::current_exe()?)
                .args([case.name, what])
                .current_dir(folder.path())
                // Mesa keeps compiled shaders between processes, too.
                .env("MESA_SHADER_CACHE_DIR", folder.path())
                .status()?;
            if !status.success() {
                return Err(format!("{} {what}: {status}", case.name).into());
            }
        }
    }
    Ok(())
}

fn report_first(case: &Case, what: &str, first: impl FnOnce() -> Outcome<()>) -> Outcome<()> {
    let start = Instant::now();
    first()?;
    println!("{:6} {what:12} first call {:8.0} ms", case.name, milliseconds(start));
    Ok(())
}

/// Our layer, warm, as something to run and wait for.
fn ours(case: &Case) -> Outcome<impl Fn() -> Outcome<()>> {
    let (config, weights, input) = case.random()?;
    let client = WgpuRuntime::client(&WgpuDevice::default());
    let layer = MemoryLayer::new(&client, config, &weights, ElementType::F32)?;
    let input = layer.upload(&input)?;
    layer.read(&layer.forward(&input)?.output)?;
    Ok(move || {
        let output = layer.forward(&input)?;
        block_on(client.sync()).map_err(|error| format!("{error:?}"))?;
        drop(output);
        Ok(())
    })
}

/// The composition, warm, as something to run and wait for.
fn composition(case: &Case) -> Outcome<impl Fn() -> Outcome<()>> {
    let (config, weights, input) = case.random()?;
    let device = WgpuDevice::default();
    let input = TensorData::new(input, [case.tokens, config.hidden_size]);
    let layer = Composition::<Backend>::new(config, &weights, &device);
    let input = Tensor::from_data(input, &device);
    layer.forward(input.clone()).try_into_data()?;
    Ok(move || {
        let output = layer.forward(input.clone());
        <Backend as burn::tensor::backend::Backend>::sync(&device)?;
        drop(output);
        Ok(())
    })
}

/// Both in turn, A B A B.
fn versus(case: &Case) -> Outcome<()> {
    let (ours, composition) = (ours(case)?, composition(case)?);
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..FORWARDS {
        times[0].push(timed(&ours)?);
        times[1].push(timed(&composition)?);
    }
    times.iter_mut().for_each(|times| times.sort_by(f64::total_cmp));
    let [(our_median, our_least), (median, least)] = times.map(|times| (times[FORWARDS / 2], times[0]));
    println!(
        "{:6} ultramem median {our_median:6.2} ms (least {our_least:6.2}), composition median {median:6.2} ms (least {least:6.2}): \
         {:.2} times as fast by the median, {:.2} by the least",
        case.name,
        median / our_median,
        least / our_least
    );
    Ok(())
}

fn timed(run: &impl Fn() -> Outcome<()>) -> Outcome<f64> {
    let start = Instant::now();
    run()?;
    Ok(milliseconds(start))
}

fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}
