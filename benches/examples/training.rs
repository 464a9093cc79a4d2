//! A training step: our forward, our forward with backward and the table's update by lazy Adam, and the forward of the composition in
//! stock Burn operations, its forward and backward through autodiff, and these with the table's update by Burn's Adam.
//!
//! `cargo run --release -p ultramem-benches --features composition --example training` runs the five in turn for each case, each in a
//! process of its own, as each would run in a program of its own: in one process they would share an allocator and its pages. A backward
//! pass takes what a step takes beyond the forward alone.

use std::error::Error;
use std::process::Command;
use std::time::Instant;

use burn::backend::wgpu::{WgpuDevice, WgpuRuntime};
use burn::backend::{Autodiff, Wgpu};
use burn::module::{Module, Param};
use burn::optim::{AdamConfig, GradientsParams, Optimizer};
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use cubecl::Runtime;
use cubecl::future::block_on;
use ultramem::kernels::optimiser::{Rule, Step};
use ultramem::{ElementType, MemoryLayer};
use ultramem_benches::{Case, Composition};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// What is run.
const RUNS: [&str; 5] = [
    "forward",
    "forward, backward and update",
    "composition, forward",
    "composition, forward and backward",
    "composition, forward, backward and update",
];
/// Steps of each in each round, after those that compile and fill the allocator's pages, and rounds over all five.
const STEPS: usize = 10;
const WARM: usize = 3;
const ROUNDS: usize = 4;

fn main() -> Outcome<()> {
    match std::env::args().skip(1).collect::<Vec<_>>().as_slice() {
        [] => Case::all().iter().try_for_each(compare),
        [case, run] => {
            let case = Case::named(case).ok_or("no such case")?;
            println!("{}", serde_json::to_string(&measure(&case, run)?)?);
            Ok(())
        }
        _ => Err("usage: training".into()),
    }
}

/// Milliseconds of each step.
fn measure(case: &Case, run: &str) -> Outcome<Vec<f64>> {
    let mut step: Box<dyn FnMut() -> Outcome<()>> = match run {
        "forward" => Box::new(forward(case)?),
        "forward, backward and update" => Box::new(step(case)?),
        "composition, forward" => Box::new(composition(case, false)?),
        "composition, forward and backward" => Box::new(composition(case, true)?),
        "composition, forward, backward and update" => Box::new(composition_step(case)?),
        _ => return Err("no such run".into()),
    };
    let mut times = Vec::new();
    for at in 0..WARM + STEPS {
        let start = Instant::now();
        step()?;
        if at >= WARM {
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    Ok(times)
}

fn compare(case: &Case) -> Outcome<()> {
    let mut all = [const { Vec::new() }; RUNS.len()];
    for _ in 0..ROUNDS {
        for (run, times) in RUNS.into_iter().zip(&mut all) {
            let output = Command::new(std::env::current_exe()?).args([case.name, run]).output()?;
            if !output.status.success() {
                return Err(format!("{} {run}: {}", case.name, String::from_utf8_lossy(&output.stderr)).into());
            }
            times.extend(serde_json::from_slice::<Vec<f64>>(&output.stdout)?);
        }
    }
    for (run, times) in RUNS.into_iter().zip(&mut all) {
        times.sort_by(f64::total_cmp);
        println!("{:6} {run:41} median {:7.2} ms (least {:7.2})", case.name, times[times.len() / 2], times[0]);
    }
    for (what, at) in [("medians", STEPS * ROUNDS / 2), ("least", 0)] {
        let [forward, step, other_forward, other_backward, other_step] = all.each_ref().map(|times| times[at]);
        let (backward, other) = (step - forward, other_backward - other_forward);
        println!(
            "{:6} by {what}: backward and update take {:.2} times the forward; the composition's backward takes {:.2} times our \
             backward and update, with its update {:.2} times; its forward and backward take {:.2} times our step, its step {:.2} times",
            case.name,
            backward / forward,
            other / backward,
            (other_step - other_forward) / backward,
            other_backward / step,
            other_step / step
        );
    }
    Ok(())
}

/// Our layer's forward pass, as something to run and wait for.
fn forward(case: &Case) -> Outcome<impl FnMut() -> Outcome<()> + use<>> {
    let (config, weights, input) = case.random()?;
    let client = WgpuRuntime::client(&WgpuDevice::default());
    let layer = MemoryLayer::new(&client, config, &weights, ElementType::F32)?;
    let input = layer.upload(&input)?;
    let run = move || {
        let output = layer.forward(&input)?;
        block_on(client.sync()).map_err(|error| format!("{error:?}"))?;
        drop(output);
        Ok(())
    };
    Ok(run)
}

/// Our layer's forward and backward pass and a step of lazy Adam.
fn step(case: &Case) -> Outcome<impl FnMut() -> Outcome<()> + use<>> {
    let (config, weights, input) = case.random()?;
    let client = WgpuRuntime::client(&WgpuDevice::default());
    let mut layer = MemoryLayer::new(&client, config, &weights, ElementType::F32)?;
    let rule = Rule::Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, decoupled: true };
    let mut optimiser = layer.value_optimiser(rule)?;
    let input = layer.upload(&input)?;
    let run = move || {
        let (forward, saved) = layer.forward_saving(&input)?;
        // The output stands for its gradient: of its shape, and there already.
        let gradients = layer.backward(&input, &saved, &forward.output)?;
        layer.update_values(&mut optimiser, &gradients.values, &Step::new(1e-9))?;
        block_on(client.sync()).map_err(|error| format!("{error:?}"))?;
        drop(gradients);
        Ok(())
    };
    Ok(run)
}

/// The composition's forward pass, and its backward pass if asked for.
fn composition(case: &Case, backward: bool) -> Outcome<impl FnMut() -> Outcome<()> + use<>> {
    let (config, weights, input) = case.random()?;
    let device = WgpuDevice::default();
    let input = TensorData::new(input, [case.tokens, config.hidden_size]);
    let layer = Composition::<Autodiff<Wgpu>>::new(config, &weights, &device).require_grad();
    let input = Tensor::<Autodiff<Wgpu>, 2>::from_data(input, &device).require_grad();
    let run = move || {
        let output = layer.forward(input.clone());
        let gradients = backward.then(|| (output.clone() * output.clone().detach()).sum().backward());
        <Wgpu as Backend>::sync(&device)?;
        drop((output, gradients));
        Ok(())
    };
    Ok(run)
}

/// The composition's table, as Burn's optimisers take it.
#[derive(Module, Debug)]
struct Table<B: Backend> {
    values: Param<Tensor<B, 2>>,
}

/// The composition's forward and backward pass and a step of Burn's Adam over its table.
fn composition_step(case: &Case) -> Outcome<impl FnMut() -> Outcome<()> + use<>> {
    let (config, weights, input) = case.random()?;
    let device = WgpuDevice::default();
    let input = TensorData::new(input, [case.tokens, config.hidden_size]);
    let layer = Composition::<Autodiff<Wgpu>>::new(config, &weights, &device).require_grad();
    let input = Tensor::<Autodiff<Wgpu>, 2>::from_data(input, &device).require_grad();
    let mut optimiser = AdamConfig::new().with_beta_1(0.9).with_beta_2(0.95).with_epsilon(1e-8).init();
    let table = Table { values: Param::from_tensor(layer.values().detach()) };
    let mut state = Some((layer, table));
    let run = move || {
        let (layer, table) = state.take().ok_or("the last step failed")?;
        let layer = layer.with_values(table.values.val());
        let output = layer.forward(input.clone());
        // The table is the module's alone again, so that the step can take its buffer.
        let layer = layer.with_values(Tensor::zeros([1, 1], &device));
        let gradients = (output.clone() * output.detach()).sum().backward();
        let gradients = GradientsParams::from_grads(gradients, &table);
        let table = optimiser.step(1e-9, table, gradients);
        <Wgpu as Backend>::sync(&device)?;
        state = Some((layer, table));
        Ok(())
    };
    Ok(run)
}
