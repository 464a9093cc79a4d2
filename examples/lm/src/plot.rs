//! `lm plot`: the losses of all runs in a folder, smoothed, and their validation losses, as SVG.

use std::{fs, path::Path};

use plotters::prelude::*;

use crate::{Result, run::Line, run::Run};

/// Steps over which the training loss is averaged.
const WINDOW: usize = 25;
const SIZE: (u32, u32) = (900, 560);
/// Those of the other pictures, which everyone can tell apart and read on white: black, orange, blue, sky, vermilion, green, purple.
const COLOURS: [RGBColor; 7] = [
    BLACK,
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0x56, 0xb4, 0xe9),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
];

struct Curve {
    name: String,
    training: Vec<(f64, f64)>,
    validation: Vec<(f64, f64)>,
}

/// Plots every run found in `runs` to `output`.
pub fn plot(runs: &Path, output: &Path) -> Result<()> {
    let entries = fs::read_dir(runs).map_err(|error| format!("{}: {error}", runs.display()))?;
    let mut folders = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    folders.retain(|folder| folder.join("log.jsonl").exists());
    folders.sort();
    let curves = folders.iter().map(|folder| curve(folder)).collect::<Result<Vec<_>>>()?;
    let points = || curves.iter().flat_map(|curve| curve.training.iter().chain(&curve.validation));
    let steps = points().map(|point| point.0).fold(1.0, f64::max);
    let low = points().map(|point| point.1).fold(f64::INFINITY, f64::min);
    if !low.is_finite() {
        return Err(format!("{} holds no run with a log", runs.display()).into());
    }
    draw(output, &curves, steps, low).map_err(|error| format!("{}: {error}", output.display()).into())
}

fn curve(folder: &Path) -> Result<Curve> {
    let log = Run::log(folder)?;
    let losses: Vec<_> = log.iter().filter_map(|line| point(line, line.loss)).collect();
    let smooth = |part: &[(f64, f64)]| {
        let mean = part.iter().map(|point| point.1).sum::<f64>() / part.len() as f64;
        (part[part.len() - 1].0, mean)
    };
    Ok(Curve {
        name: folder.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        training: losses.windows(WINDOW.min(losses.len().max(1))).map(smooth).collect(),
        validation: log.iter().filter_map(|line| point(line, line.validation)).collect(),
    })
}

fn point(line: &Line, loss: Option<f32>) -> Option<(f64, f64)> {
    Some((line.step as f64, f64::from(loss?)))
}

fn draw(output: &Path, curves: &[Curve], steps: f64, low: f64) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::new(output, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .caption("Loss in nats per byte; lines: training, dots: validation", ("sans-serif", 18))
        .build_cartesian_2d(0.0..steps, low - 0.1..low + 1.6)?;
    let whole = |step: &f64| format!("{step:.0}");
    chart.configure_mesh().x_desc("step").y_desc("loss").x_label_formatter(&whole).light_line_style(WHITE).draw()?;
    for (at, curve) in curves.iter().enumerate() {
        let colour = COLOURS[at % COLOURS.len()];
        let last = curve.validation.last().map_or(String::new(), |(step, loss)| format!(": {loss:.3} at {step}"));
        chart
            .draw_series(LineSeries::new(curve.training.iter().copied(), colour.stroke_width(1)))?
            .label(format!("{}{last}", curve.name))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        chart.draw_series(curve.validation.iter().map(|&at| Circle::new(at, 4, colour.filled())))?;
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
    Ok(area.present()?)
}
