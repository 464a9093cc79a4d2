//! What a training step costs while the table grows: 4 Ki to 518 Ki rows of 32 numbers, hidden states of 768, at 64 tokens, which read
//! 2,048 slots: fewer than the smallest table has rows, as in any model.
//!
//! `cargo run --release -p ultramem-benches --example growth [PICTURE.svg]`. A step is forward, backward and the table's update by lazy
//! Adam. The score stage's forward, which grows with the root of the table by design, is measured apart. Each size runs in a
//! process of its own whose allocator gives every buffer a page of its own, so that what it has reserved beyond weights and optimiser
//! state is the most that a step had in use. The gradients of the chosen keys are told apart: keys are as many as the root of the table,
//! so the chosen ones become more until each slot has its own.

use std::error::Error;
use std::process::Command;
use std::time::Instant;

use cubecl::Runtime;
use cubecl::future::block_on;
use cubecl::prelude::ComputeClient;
use cubecl::wgpu::{
    AutoGraphicsApi, MemoryConfiguration, RuntimeOptions, WgpuDevice, WgpuRuntime, init_device, init_setup,
};
use plotters::coord::Shift;
use plotters::prelude::*;
use serde::{Deserialize, Serialize};
use ultramem::kernels::optimiser::{Rule, Step};
use ultramem::{Dimensions, ElementType, MemoryConfig, MemoryLayer, Weights};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Keys on each side; a quarter of their square are rows.
const SIDES: [usize; 5] = [128, 256, 512, 1024, 1456];
const TOKENS: usize = 64;
/// Steps of each size in each round, and rounds over all sizes, so that a slow while slows every size.
const STEPS: usize = 8;
const ROUNDS: usize = 8;

/// What one size costs.
#[derive(Debug, Serialize, Deserialize)]
struct Figures {
    rows: usize,
    /// Milliseconds of each step, and of the score stage's forward within one.
    steps: Vec<f64>,
    scores: Vec<f64>,
    /// Bytes that were reserved beyond weights and optimiser state.
    beyond: u64,
    /// Bytes of the chosen keys' gradients among them.
    keys: u64,
}

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.as_slice() {
        [size, number] if size == "size" => {
            println!("{}", serde_json::to_string(&measure(number.parse()?)?)?);
            Ok(())
        }
        [picture] => report(&measure_all()?, Some(picture)),
        [] => report(&measure_all()?, None),
        _ => Err("usage: growth [PICTURE.svg]".into()),
    }
}

fn measure_all() -> Outcome<Vec<Figures>> {
    let mut all: Vec<Figures> = Vec::new();
    for _ in 0..ROUNDS {
        for (at, side) in SIDES.iter().enumerate() {
            let output = Command::new(std::env::current_exe()?).args(["size", &side.to_string()]).output()?;
            if !output.status.success() {
                return Err(format!("side_keys {side}: {}", String::from_utf8_lossy(&output.stderr)).into());
            }
            let figures: Figures = serde_json::from_slice(&output.stdout)?;
            match all.get_mut(at) {
                Some(known) => {
                    known.steps.extend(figures.steps);
                    known.scores.extend(figures.scores);
                }
                None => all.push(figures),
            }
        }
    }
    Ok(all)
}

fn measure(side_keys: usize) -> Outcome<Figures> {
    let dims = Dimensions { hidden_size: 768, side_keys, value_dim: 32, ..Dimensions::default() };
    let config = MemoryConfig::new(dims)?;
    let weights = Weights::random(&config, 1);
    let setup = init_setup::<AutoGraphicsApi>(&WgpuDevice::default(), RuntimeOptions::default());
    let options = RuntimeOptions { memory_config: MemoryConfiguration::ExclusivePages, ..Default::default() };
    let client = WgpuRuntime::client(&init_device(setup, options));
    let mut layer = MemoryLayer::new(&client, config.clone(), &weights, ElementType::F32)?;
    let rule = Rule::Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, decoupled: true };
    let mut optimiser = layer.value_optimiser(rule)?;
    let input: Vec<f32> = (0..TOKENS * config.hidden_size).map(|at| (at as f32 * 0.37).sin()).collect();
    let input = layer.upload(&input)?;
    let strategies = layer.strategies(TOKENS);
    let query = layer.query(&input, strategies.query)?;
    sync(&client)?;
    let before = reserved(&client)?;
    let mut figures = Figures { rows: config.rows(), steps: Vec::new(), scores: Vec::new(), beyond: 0, keys: 0 };
    for step in 0..=STEPS {
        let start = Instant::now();
        let (forward, saved) = layer.forward_saving(&input)?;
        let gradients = layer.backward(&input, &saved, &forward.output)?;
        layer.update_values(&mut optimiser, &gradients.values, &Step::new(1e-9))?;
        figures.keys = gradients.keys.gradients().shape().iter().product::<usize>() as u64 * 4;
        sync(&client)?;
        let whole = start.elapsed().as_secs_f64() * 1e3;
        let start = Instant::now();
        drop(layer.score(&query, strategies.score)?);
        sync(&client)?;
        let score = start.elapsed().as_secs_f64() * 1e3;
        // The first step compiles.
        if step > 0 {
            figures.steps.push(whole);
            figures.scores.push(score);
        }
    }
    figures.beyond = reserved(&client)?.saturating_sub(before);
    Ok(figures)
}

fn sync(client: &ComputeClient<WgpuRuntime>) -> Outcome<()> {
    block_on(client.sync()).map_err(|error| format!("{error:?}").into())
}

fn reserved(client: &ComputeClient<WgpuRuntime>) -> Outcome<u64> {
    Ok(client.memory_usage().map_err(|error| format!("{error:?}"))?.bytes_reserved)
}

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// The middle one.
fn median(times: &[f64]) -> f64 {
    let mut times = times.to_vec();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn report(all: &[Figures], picture: Option<&String>) -> Outcome<()> {
    println!(
        "{:>8} {:>10} {:>14} {:>14} {:>16} {:>11} {:>13}",
        "rows", "step, ms", "of it score", "without score", "beyond table, MB", "of it keys", "without keys"
    );
    for figures in all {
        let (step, score) = (median(&figures.steps), median(&figures.scores));
        let (beyond, keys) = (megabytes(figures.beyond), megabytes(figures.keys));
        println!(
            "{:8} {step:10.2} {score:14.2} {:14.2} {beyond:16.2} {keys:11.2} {:13.2}",
            figures.rows,
            step - score,
            beyond - keys
        );
    }
    let rest = |figures: &Figures| median(&figures.steps) - median(&figures.scores);
    if let [first, .., last] = all {
        println!("without score, the largest table takes {:.2} times the smallest", rest(last) / rest(first));
    }
    picture.map_or(Ok(()), |path| plot(all, path))
}

type Series<'a> = (&'a str, RGBColor, &'a dyn Fn(&Figures) -> f64);

// Colours that differ for every kind of colour vision (Okabe and Ito).
const BLUE: RGBColor = RGBColor(0, 114, 178);
const RED: RGBColor = RGBColor(213, 94, 0);
const GREEN: RGBColor = RGBColor(0, 158, 115);

/// Times above, memory below, over the rows.
fn plot(all: &[Figures], path: &str) -> Outcome<()> {
    let root = SVGBackend::new(path, (720, 720)).into_drawing_area();
    root.fill(&WHITE)?;
    let (times, memory) = root.split_vertically(400);
    let step = |figures: &Figures| median(&figures.steps);
    let score = |figures: &Figures| median(&figures.scores);
    let rest = |figures: &Figures| step(figures) - score(figures);
    let of_times: [Series<'_>; 3] = [
        ("step", BLUE, &step),
        ("step without the score stage's forward", RED, &rest),
        ("the score stage's forward", GREEN, &score),
    ];
    draw(&times, all, &format!("A training step while the table grows, {TOKENS} tokens"), "milliseconds", &of_times)?;
    let beyond = |figures: &Figures| megabytes(figures.beyond);
    let others = |figures: &Figures| megabytes(figures.beyond - figures.keys);
    let of_memory: [Series<'_>; 2] =
        [("beyond weights and optimiser state", BLUE, &beyond), ("without the chosen keys' gradients", RED, &others)];
    draw(&memory, all, "Memory of a step", "MB", &of_memory)?;
    root.present()?;
    Ok(())
}

/// Lines over the rows, the rows by powers.
fn draw(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    all: &[Figures],
    caption: &str,
    unit: &str,
    series: &[Series<'_>],
) -> Outcome<()> {
    let most = series.iter().flat_map(|(_, _, of)| all.iter().map(of)).fold(0.0, f64::max);
    let rows = (all[0].rows as f64 * 0.8)..(all[all.len() - 1].rows as f64 * 1.25);
    let mut chart = ChartBuilder::on(area)
        .caption(caption, ("sans-serif", 20))
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(64)
        .build_cartesian_2d(rows.log_scale().base(4.0), 0.0..most * 1.5)?;
    chart
        .configure_mesh()
        .x_desc("rows of the value table (32 numbers each)")
        .y_desc(unit)
        .x_label_formatter(&|rows| format!("{:.0} Ki", rows / 1024.0))
        .label_style(("sans-serif", 14))
        .draw()?;
    for &(name, colour, of) in series {
        let points: Vec<(f64, f64)> = all.iter().map(|figures| (figures.rows as f64, of(figures))).collect();
        chart.draw_series(points.iter().map(|&point| Circle::new(point, 4, colour.filled())))?;
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .label_font(("sans-serif", 14))
        .draw()?;
    Ok(())
}
