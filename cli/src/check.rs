//! `ultramem check`: runs the layer of a file and compares with what the file expects, or each layer of a whole model.

mod model;

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use serde_json::json;
use ultramem::{Checkpoint, ElementType, MemoryConfig, Spectrum, Weight, Weights};

use crate::Common;
use crate::backend::Adapter;
use crate::compare::{Comparison, F32_BOUND, GRADIENT_BOUND, HALF_BOUND, relative_l2};
use crate::engine::{Engine, Oracle, Outcome};
use crate::failure::{Failure, Result};
use crate::load;
use crate::report::{Report, Table, device_json, device_line, object};
use crate::source::{SettingsArgs, is_one_layer};

/// Arguments of `check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// A safetensors file that holds a layer, `input` and `expected.*` tensors, or a whole model
    file: PathBuf,
    /// What the layers of a whole model must give: a file with N.input and N.output for layer N
    #[arg(long, value_name = "FILE")]
    expected: Option<PathBuf>,
    #[command(flatten)]
    settings: SettingsArgs,
}

/// What became of one expected tensor.
#[derive(Debug, Serialize)]
struct Line {
    name: String,
    status: Status,
    /// `relative_l2` or `equal_slots`, as a share.
    #[serde(skip_serializing_if = "Option::is_none")]
    measure: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bound: Option<f64>,
    /// Slots that are not the expected ones, but whose totals are those of the expected ones but for rounding.
    #[serde(skip_serializing_if = "Option::is_none")]
    swapped: Option<usize>,
    /// What the comparison was with, or why there was none.
    note: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Status {
    Passed,
    Missed,
    NotChecked,
}

/// Runs the verb.
pub fn run(args: &CheckArgs, common: &Common) -> Result<Report> {
    if let Some(expected) = &args.expected {
        return model::run(&args.settings.open(&args.file)?, &args.file, expected, common);
    }
    refuse_model(args)?;
    let checkpoint = load::checkpoint(&args.file)?;
    let input = load::input(&args.file, &checkpoint)?;
    let weights = checkpoint.weights().map_err(|error| Failure::in_file(&args.file, error))?;
    let expected = Expected::read(&args.file, &checkpoint, input.len() / checkpoint.config().hidden_size)?;
    let adapter = common.find()?;
    let engine = adapter.engine(checkpoint.config(), &weights, common.dtype, common.invariant)?;
    let outcome = engine.forward(&input)?;
    let mut lines = match common.dtype {
        ElementType::F32 => expected.against_file(checkpoint.config(), &weights, &input, &outcome)?,
        dtype => expected.against_oracle(&outcome, &oracle(checkpoint.config(), &weights, dtype, &input)?),
    };
    if !expected.gradients.is_empty() {
        let grad_output = load::grad_output(&args.file, &checkpoint, input.len() / checkpoint.config().hidden_size)?;
        lines.extend(expected.gradients(&checkpoint, &weights, engine.as_ref(), &input, &grad_output, common.dtype)?);
    }
    lines.extend(expected.tail_loss(checkpoint.config(), &weights)?);
    lines.extend(expected.others);
    Ok(report(&args.file, &adapter, common.dtype, lines))
}

/// Only a file of one layer tells by itself what is expected of it.
fn refuse_model(args: &CheckArgs) -> Result<()> {
    match args.settings.open(&args.file) {
        Ok(model) if !is_one_layer(&model) => {
            Err(in_file(&args.file, "a whole model; say with --expected FILE what its layers must give"))
        }
        Err(failure) if args.file.is_dir() => Err(failure),
        _ => Ok(()),
    }
}

fn report(file: &Path, adapter: &Adapter, dtype: ElementType, lines: Vec<Line>) -> Report {
    let count = |status| lines.iter().filter(|line| line.status == status).count();
    let (passed, missed, not_checked) = (count(Status::Passed), count(Status::Missed), count(Status::NotChecked));
    let summary = format!("{passed} passed, {missed} missed, {not_checked} not checked\n");
    let mut entries = device_json(adapter, dtype);
    entries.extend([
        ("file", json!(file.display().to_string())),
        ("tensors", json!(lines)),
        ("passed", json!(passed)),
        ("missed", json!(missed)),
        ("not_checked", json!(not_checked)),
    ]);
    let text = device_line(adapter, dtype) + &table(&lines) + &summary;
    Report { text, json: object(entries), passed: missed == 0 }
}

fn oracle(config: &MemoryConfig, weights: &Weights<'_>, dtype: ElementType, input: &[f32]) -> Result<Outcome> {
    Oracle::new(config, weights, dtype).forward(input)
}

fn table(lines: &[Line]) -> String {
    let mut table = Table::default();
    for line in lines {
        match (line.measure, line.value, line.bound) {
            (Some("equal_slots"), Some(share), _) => {
                let swapped = line.swapped.filter(|&swapped| swapped > 0);
                let swapped = swapped.map(|count| format!(", {count} swapped by rounding")).unwrap_or_default();
                let equal = format!("{:.2} % equal{swapped}", share * 100.0);
                table.line([&line.name, &equal, "all", word(line.status)]);
            }
            (_, Some(value), Some(bound)) => {
                let (value, bound) = (format!("relative L2 {value:.1e}"), format!("at most {bound:.0e}"));
                table.line([&line.name, &value, &bound, word(line.status)]);
            }
            _ => {}
        }
    }
    let not_checked = lines.iter().filter(|line| line.status == Status::NotChecked);
    table.text() + &not_checked.map(|line| format!("  {}: not checked, {}\n", line.name, line.note)).collect::<String>()
}

fn word(status: Status) -> &'static str {
    match status {
        Status::Passed => "ok",
        Status::Missed => "MISSED",
        Status::NotChecked => "not checked",
    }
}

/// What the file expects, shapes checked.
struct Expected {
    output: Option<Vec<f32>>,
    slots: Option<Vec<i64>>,
    scores: Option<Vec<f32>>,
    /// The names of expected gradients.
    gradients: Vec<String>,
    /// The auxiliary loss, of a layer that has a core.
    tail_loss: Option<Vec<f32>>,
    /// Expected tensors that this version does not compute.
    others: Vec<Line>,
}

const OUTPUT: &str = "expected.output";
const SLOTS: &str = "expected.indices";
const SCORES: &str = "expected.scores";
/// UltraMem's auxiliary loss, on the singular values of the summed core past the first.
const TAIL_LOSS: &str = "expected.core_singular_values_tail_loss";
/// What the names of gradients start with.
const GRADIENT: &str = "expected.grad";

impl Expected {
    fn read(path: &Path, checkpoint: &Checkpoint, tokens: usize) -> Result<Self> {
        let config = checkpoint.config();
        let entries = config.heads * config.top_m;
        let flat = vec![tokens, entries];
        let cored = vec![tokens, entries, config.cores];
        let score_shapes = if config.tucker() { vec![cored] } else { vec![flat.clone(), cored] };
        let floats = |name, shapes: &[Vec<usize>]| match checkpoint.has(name) {
            true => floats(checkpoint, name, shapes).map(Some).map_err(|failure| in_file(path, &failure)),
            false => Ok(None),
        };
        let expected = Self {
            output: floats(OUTPUT, &[vec![tokens, config.hidden_size]])?,
            slots: match checkpoint.has(SLOTS) {
                true => Some(integers(checkpoint, SLOTS, &flat).map_err(|failure| in_file(path, &failure))?),
                false => None,
            },
            scores: floats(SCORES, &score_shapes)?,
            gradients: names(checkpoint, |name| name.starts_with(GRADIENT)),
            tail_loss: if config.tucker() { floats(TAIL_LOSS, &[vec![1], vec![]])? } else { None },
            others: others(checkpoint),
        };
        let forward = expected.output.is_some() || expected.slots.is_some() || expected.scores.is_some();
        if !forward && expected.gradients.is_empty() {
            return Err(in_file(path, &format!("holds none of {OUTPUT}, {SLOTS}, {SCORES} and {GRADIENT}*")));
        }
        Ok(expected)
    }

    /// Slots are judged by their scores. Where some were swapped by rounding, their token's scores and output are held against the oracle's
    /// for the slots that it chose.
    fn against_file(
        &self,
        config: &MemoryConfig,
        weights: &Weights<'_>,
        input: &[f32],
        outcome: &Outcome,
    ) -> Result<Vec<Line>> {
        let note = "with the file";
        let (mut slots, mut results) = (None, (self.output.clone(), self.scores.clone()));
        if let Some(expected) = &self.slots {
            let Comparison { judged, output, scores } =
                Comparison::new(config, weights, input, outcome, expected, results)?;
            let status = if judged.right() { Status::Passed } else { Status::Missed };
            slots = Some(Line {
                name: SLOTS.into(),
                status,
                measure: Some("equal_slots"),
                value: Some(if expected.is_empty() { 1.0 } else { judged.equal as f64 / expected.len() as f64 }),
                bound: Some(1.0),
                swapped: Some(judged.swapped),
                note: note.to_string(),
            });
            results = (output, scores);
        }
        let output = results.0.map(|it| distance(OUTPUT, &outcome.output, &it, F32_BOUND, note));
        let scores = results.1.map(|it| distance(SCORES, &outcome.scores, &it, F32_BOUND, note));
        Ok([slots, scores, output].into_iter().flatten().collect())
    }

    /// In f16 and bf16 the rounding of the weights may change which slots are chosen, so that only the oracle's output on
    /// the same rounded numbers is a fair measure.
    fn against_oracle(&self, outcome: &Outcome, oracle: &Outcome) -> Vec<Line> {
        let note = "with the oracle on the same rounded inputs";
        let output = self.output.as_ref().map(|_| distance(OUTPUT, &outcome.output, &oracle.output, HALF_BOUND, note));
        let rounded = "f32 slots and scores, which rounded weights need not give";
        let slots = self.slots.as_ref().map(|_| not_checked(SLOTS, rounded));
        let scores = self.scores.as_ref().map(|_| not_checked(SCORES, rounded));
        [output, slots, scores].into_iter().flatten().collect()
    }
}

impl Expected {
    /// The auxiliary loss, whose core is f32 in every layer. PyTorch takes the singular values in f32, hence the gradients' bound.
    fn tail_loss(&self, config: &MemoryConfig, weights: &Weights<'_>) -> Result<Option<Line>> {
        let Some(expected) = &self.tail_loss else { return Ok(None) };
        let (loss, _) = Spectrum::new(config, &weights.numbers(Weight::Cores))?.auxiliary_loss(config);
        Ok(Some(distance(TAIL_LOSS, &[loss as f32], expected, GRADIENT_BOUND, "with the file")))
    }

    /// Every expected gradient: in f32 against the file, else against the oracle on the same rounded numbers and slots.
    fn gradients(
        &self,
        checkpoint: &Checkpoint,
        weights: &Weights<'_>,
        engine: &dyn Engine,
        input: &[f32],
        grad_output: &[f32],
        dtype: ElementType,
    ) -> Result<Vec<Line>> {
        let config = checkpoint.config();
        let (slots, found) = engine.backward(input, grad_output)?;
        let found = found.named(config)?;
        let oracle = match dtype {
            ElementType::F32 => Vec::new(),
            dtype => Oracle::new(config, weights, dtype).backward_for(&slots, input, grad_output)?.named(config)?,
        };
        let line = |name: &String| {
            let own = name.trim_start_matches("expected.");
            let Some((_, found)) = found.iter().find(|(other, _)| other == own) else {
                return Ok(not_checked(name, "no weight of this layer has this gradient"));
            };
            let expected = checkpoint.tensor(name)?;
            check_shape(name, found.shape(), &[expected.shape().to_vec()]).map_err(Failure::new)?;
            Ok(match oracle.iter().find(|(other, _)| other == own) {
                None => distance(name, &found.to_f32(), &expected.to_f32(), GRADIENT_BOUND, "with the file"),
                Some((_, oracle)) => {
                    let note = "with the oracle on the same rounded inputs";
                    distance(name, &found.to_f32(), &oracle.to_f32(), HALF_BOUND, note)
                }
            })
        };
        self.gradients.iter().map(line).collect()
    }
}

fn distance(name: &str, found: &[f32], expected: &[f32], bound: f64, note: &str) -> Line {
    let value = relative_l2(found, expected);
    let status = if value <= bound { Status::Passed } else { Status::Missed };
    let measure = Some("relative_l2");
    Line {
        name: name.into(),
        status,
        measure,
        value: Some(value),
        bound: Some(bound),
        swapped: None,
        note: note.into(),
    }
}

fn not_checked(name: &str, why: &str) -> Line {
    let status = Status::NotChecked;
    Line { name: name.into(), status, measure: None, value: None, bound: None, swapped: None, note: why.into() }
}

fn others(checkpoint: &Checkpoint) -> Vec<Line> {
    let cored = checkpoint.config().tucker();
    let known = |name: &str| {
        [OUTPUT, SLOTS, SCORES].contains(&name) || name.starts_with(GRADIENT) || (cored && name == TAIL_LOSS)
    };
    let others = names(checkpoint, |name| !known(name));
    others.iter().map(|name| not_checked(name, "this version does not compute it")).collect()
}

/// The names of the expected tensors that `pick` picks.
fn names(checkpoint: &Checkpoint, pick: impl Fn(&str) -> bool) -> Vec<String> {
    checkpoint.names().filter(|name| name.starts_with("expected.") && pick(name)).map(str::to_string).collect()
}

fn floats(checkpoint: &Checkpoint, name: &str, shapes: &[Vec<usize>]) -> std::result::Result<Vec<f32>, String> {
    let tensor = checkpoint.tensor(name).map_err(|error| error.to_string())?;
    check_shape(name, tensor.shape(), shapes)?;
    Ok(tensor.to_f32())
}

fn integers(checkpoint: &Checkpoint, name: &str, shape: &Vec<usize>) -> std::result::Result<Vec<i64>, String> {
    let tensor = checkpoint.integers(name).map_err(|error| error.to_string())?;
    check_shape(name, &tensor.shape, std::slice::from_ref(shape))?;
    Ok(tensor.numbers)
}

fn check_shape(name: &str, found: &[usize], expected: &[Vec<usize>]) -> std::result::Result<(), String> {
    if expected.iter().any(|shape| shape == found) {
        return Ok(());
    }
    Err(format!("tensor {name:?} has shape {found:?}, expected {:?}", expected[0]))
}

fn in_file(path: &Path, reason: &str) -> Failure {
    Failure::new(format!("{}: {reason}", path.display()))
}
