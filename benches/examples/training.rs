//! A training step: our forward, our forward with backward and the table's update, and the forward and backward of the composition in
//! stock Burn operations through autodiff, which updates nothing.
//!
//! `cargo run --release -p ultramem-benches --features composition --example training` runs the three in turn, each
//! synchronised, for each case.

use std::error::Error;
use std::time::Instant;

use burn::backend::wgpu::{WgpuDevice, WgpuRuntime};
use burn::backend::{Autodiff, Wgpu};
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use cubecl::Runtime;
use cubecl::future::block_on;
use ultramem::kernels::optimiser::{Rule, Step};
use ultramem::{ElementType, MemoryLayer};
use ultramem_benches::{Case, Composition};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Steps of each.
const STEPS: usize = 30;

/// Something to run and wait for, and the milliseconds that it took each time.
struct Run {
    name: &'static str,
    run: Box<dyn FnMut() -> Outcome<()>>,
    times: Vec<f64>,
}

fn main() -> Outcome<()> {
    for case in Case::all() {
        let (forward, step, composition) = (forward(&case)?, step(&case)?, composition(&case)?);
        let mut runs = [
            Run { name: "forward", run: Box::new(forward), times: Vec::new() },
            Run { name: "forward, backward and update", run: Box::new(step), times: Vec::new() },
            Run { name: "composition, forward and backward", run: Box::new(composition), times: Vec::new() },
        ];
        for _ in 0..STEPS {
            for Run { run, times, .. } in &mut runs {
                let start = Instant::now();
                run()?;
                times.push(start.elapsed().as_secs_f64() * 1e3);
            }
        }
        let mut medians = Vec::new();
        for Run { name, times, .. } in &mut runs {
            times.sort_by(f64::total_cmp);
            println!("{:6} {name:34} median {:7.2} ms (least {:7.2})", case.name, times[STEPS / 2], times[0]);
            medians.push((times[STEPS / 2], times[0]));
        }
        let [(forward, least_forward), (step, least_step), (composition, least_composition)] = medians[..] else {
            return Err("three were measured".into());
        };
        println!(
            "{:6} backward and update take {:.2} times the forward ({:.2} by the least); the composition takes {:.2} times our step \
             ({:.2})",
            case.name,
            (step - forward) / forward,
            (least_step - least_forward) / least_forward,
            composition / step,
            least_composition / least_step
        );
    }
    Ok(())
}

/// Our layer's forward pass, warm, as something to run and wait for.
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
    run()?;
    Ok(run)
}

/// Our layer's forward and backward pass and a step of lazy Adam.
fn step(case: &Case) -> Outcome<impl FnMut() -> Outcome<()> + use<>> {
    let (config, weights, input) = case.random()?;
    let client = WgpuRuntime::client(&WgpuDevice::default());
    let layer = MemoryLayer::new(&client, config, &weights, ElementType::F32)?;
    let rule = Rule::Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, decoupled: true };
    let mut optimiser = layer.value_optimiser(rule)?;
    let input = layer.upload(&input)?;
    let mut run = move || {
        let (forward, saved) = layer.forward_saving(&input)?;
        // The output stands for its gradient: of its shape, and there already.
        let gradients = layer.backward(&input, &saved, &forward.output)?;
        layer.update_values(&mut optimiser, &gradients.values, &Step::new(1e-9))?;
        block_on(client.sync()).map_err(|error| format!("{error:?}"))?;
        drop(gradients);
        Ok(())
    };
    run()?;
    Ok(run)
}

/// The composition's forward and backward pass.
fn composition(case: &Case) -> Outcome<impl FnMut() -> Outcome<()> + use<>> {
    let (config, weights, input) = case.random()?;
    let device = WgpuDevice::default();
    let input = TensorData::new(input, [case.tokens, config.hidden_size]);
    let layer = Composition::<Autodiff<Wgpu>>::new(config, &weights, &device).require_grad();
    let input = Tensor::<Autodiff<Wgpu>, 2>::from_data(input, &device).require_grad();
    let run = move || {
        let output = layer.forward(input.clone());
        let gradients = (output.clone() * output.detach()).sum().backward();
        <Wgpu as Backend>::sync(&device)?;
        drop(gradients);
        Ok(())
    };
    run()?;
    Ok(run)
}
