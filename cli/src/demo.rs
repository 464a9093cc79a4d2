//! `ultramem demo`: a trained layer on the hidden states of real text, held against the oracle and against the results stored with
//! it, timed, and shown at work: which slots fire for which text.

use std::{collections::BTreeSet, path::PathBuf, time::Instant};

use clap::Args;
use serde_json::{Value, json};
use ultramem::{Checkpoint, ElementType, MemoryConfig, Weights};

use crate::Common;
use crate::compare::{Comparison, F32_BOUND, HALF_BOUND, relative_l2};
use crate::engine::{Engine, Oracle, Outcome};
use crate::failure::{Failure, Result};
use crate::load;
use crate::numbers::{counted, grouped, percent};
use crate::report::{Report, Table, device_json, device_line, forward_table, measured_json, object};
use crate::sampling::{Effort, FEWEST, milliseconds};
use crate::themes::{Firing, Text, Theme, clearest, firings, printable};

/// A layer of a byte-level language model with 1,024 of its hidden states and the text that they came from.
static LAYER: &[u8] = include_bytes!("../data/kjv_layer.safetensors");

/// Arguments of `demo`.
#[derive(Debug, Default, Args)]
pub struct DemoArgs {
    /// Another layer than the bundled one, as `lm export` writes it: with its input, the results that it expects, if it has them, and, in the
    /// metadata, the text that the input comes from
    file: Option<PathBuf>,
}

impl DemoArgs {
    fn checkpoint(&self) -> Result<Checkpoint> {
        match &self.file {
            Some(path) => load::checkpoint(path),
            None => Ok(Checkpoint::from_bytes(LAYER.to_vec())?),
        }
    }

    /// Who computed the results that are stored with the layer.
    fn author(&self) -> &'static str {
        if self.file.is_some() { "the file" } else { "PyTorch" }
    }

    fn source(&self) -> String {
        match &self.file {
            Some(path) => path.display().to_string(),
            None => "a byte-level language model that reads the King James Bible".into(),
        }
    }
}

/// Milliseconds that the measurement may take, more or less.
const MEASURE: f64 = 2000.0;
const SAMPLES: usize = 15;
/// Slots shown for each length of their theme.
const THEMES: usize = 2;
const CONTEXTS: usize = 4;

/// Runs the verb.
pub fn run(args: &DemoArgs, common: &Common) -> Result<Report> {
    let checkpoint = args.checkpoint()?;
    let in_file = |failure: Failure| match &args.file {
        Some(path) => failure.of_file(path),
        None => failure,
    };
    let (config, weights) = (checkpoint.config(), checkpoint.weights().map_err(|error| in_file(error.into()))?);
    let input = load::hidden_states(&checkpoint, "input", None).map_err(in_file)?;
    let tokens = input.len() / config.hidden_size;
    if tokens == 0 {
        return Err(in_file(Failure::new("tensor \"input\" has no tokens to show")));
    }
    let stored = Stored::find(&checkpoint, args.author(), tokens).map_err(in_file)?;
    let text = text(&checkpoint, tokens).map_err(in_file)?;
    let adapter = common.find_timed("demo")?;
    let engine = adapter.engine(config, &weights, common.dtype, common.invariant)?;
    let outcome = engine.forward(&input)?;
    let measured = engine.measure(&input, effort(engine.as_ref(), &input)?, engine.rates()?)?;
    let agreement = Agreement::new(&checkpoint, &weights, common.dtype, &input, &outcome, stored)?;
    let usage = Usage::new(config, &weights, &outcome);
    let entries = config.heads * config.top_m;
    let firings = firings(&outcome.slots, &totals(&outcome.scores, config.cores), entries);
    let themes = clearest(&firings, &text, THEMES);
    let cost = config.cost(tokens, common.dtype);

    let (rows, slots) = (grouped(config.rows()), grouped(config.slots()));
    let states = counted(tokens, "hidden state");
    let mut out = format!("A trained memory layer with {rows} value rows behind {slots} slots, on {states}.\n");
    out += &format!("It comes from {}.\n", args.source());
    out += &format!("\nDevice: {}", device_line(&adapter, common.dtype));
    out += &format!("\nTime for {}\n{}", counted(tokens, "token"), forward_table(&measured, &cost));
    out += &format!("\nAgreement\n{}", agreement.text());
    out += &format!("\nUse: each token reads {entries} slots\n{}", usage.text());
    out += "\nWhat a slot is for: some busy slots, the text around the [byte] where each is read, its score\n";
    out += &themes.iter().map(|theme| theme_text(theme, &text, config.side_keys)).collect::<String>();

    let mut json = device_json(&adapter, common.dtype);
    json.push(("tokens", json!(tokens)));
    json.extend(measured_json(&measured, &cost));
    json.extend([("agreement", agreement.json()), ("usage", usage.json())]);
    json.push(("slots", themes.iter().map(|theme| theme_json(theme, &text)).collect()));
    Ok(Report { text: out, json: object(json), passed: agreement.passed() })
}

/// As many samples as fit, each of them the whole forward pass and its stages one by one. Kernels are compiled by now.
fn effort(engine: &dyn Engine, input: &[f32]) -> Result<Effort> {
    let start = Instant::now();
    engine.forward(input)?;
    let affordable = (MEASURE / (2.0 * milliseconds(start))) as usize;
    Ok(Effort { samples: affordable.clamp(FEWEST, SAMPLES), budget_ms: MEASURE })
}

/// The metadata's `text`, which has a byte for every row of the input.
fn text(checkpoint: &Checkpoint, tokens: usize) -> Result<Text<'_>> {
    let metadata = checkpoint.metadata();
    let bytes = metadata.get("text").map(String::as_bytes).filter(|bytes| bytes.len() == tokens);
    let sequence = metadata.get("sequence_length").and_then(|length| length.parse().ok()).unwrap_or(tokens);
    match bytes {
        Some(bytes) if sequence > 0 => Ok(Text { bytes, sequence }),
        _ => Err(Failure::new(format!(
            "the metadata's \"text\" must have a byte for each of the input's {tokens} rows, in sequences of \"sequence_length\""
        ))),
    }
}

/// Total scores `[tokens, heads · top_m]`.
fn totals(scores: &[f32], cores: usize) -> Vec<f32> {
    scores.chunks_exact(cores).map(|scores| scores.iter().sum()).collect()
}

/// Results that were stored with the layer.
struct Stored {
    author: &'static str,
    output: Vec<f32>,
    slots: Vec<i64>,
}

impl Stored {
    /// None of a layer that was stored without results.
    fn find(checkpoint: &Checkpoint, author: &'static str, tokens: usize) -> Result<Option<Self>> {
        if !checkpoint.has("expected.output") || !checkpoint.has("expected.indices") {
            return Ok(None);
        }
        let config = checkpoint.config();
        let output = load::hidden_states(checkpoint, "expected.output", Some(tokens))?;
        let slots = checkpoint.integers("expected.indices")?;
        let expected = [tokens, config.heads * config.top_m];
        if slots.shape != expected {
            let found = slots.shape;
            return Err(Failure::new(format!(
                "tensor \"expected.indices\" has shape {found:?}, expected {expected:?}"
            )));
        }
        Ok(Some(Self { author, output, slots: slots.numbers }))
    }
}

/// How far the output is from the oracle's, and from the stored one where there is one.
struct Agreement {
    oracle: f64,
    oracle_bound: f64,
    stored: Option<StoredAgreement>,
}

/// How far the results are from those that were stored with the layer.
struct StoredAgreement {
    author: &'static str,
    output: f64,
    /// None in f16 and bf16, where rounded weights may choose other slots than were stored for f32.
    bound: Option<f64>,
    equal_slots: usize,
    /// Slots whose totals are the stored ones' but for rounding.
    swapped: usize,
    all_slots: usize,
}

impl StoredAgreement {
    fn new(
        checkpoint: &Checkpoint,
        weights: &Weights<'_>,
        dtype: ElementType,
        input: &[f32],
        outcome: &Outcome,
        stored: Stored,
    ) -> Result<Self> {
        let Stored { author, output, slots } = stored;
        let all_slots = slots.len();
        if dtype != ElementType::F32 {
            let equal = outcome.slots.iter().zip(&slots).filter(|&(&found, &slot)| i64::from(found) == slot).count();
            let output = relative_l2(&outcome.output, &output);
            return Ok(Self { author, output, bound: None, equal_slots: equal, swapped: 0, all_slots });
        }
        let config = checkpoint.config();
        let found = Comparison::new(config, weights, input, outcome, &slots, (Some(output), None))?;
        let output = relative_l2(&outcome.output, &found.output.unwrap_or_default());
        let (equal_slots, swapped) = (found.judged.equal, found.judged.swapped);
        Ok(Self { author, output, bound: Some(F32_BOUND), equal_slots, swapped, all_slots })
    }

    fn slots_passed(&self) -> bool {
        self.bound.is_none() || self.equal_slots + self.swapped == self.all_slots
    }

    fn output_passed(&self) -> bool {
        self.bound.is_none_or(|bound| self.output <= bound)
    }

    fn lines(&self, table: &mut Table) {
        let (number, author) = (distance(self.output), self.author);
        let swapped = if self.swapped > 0 { format!(", {} swapped by rounding", self.swapped) } else { String::new() };
        let equal = format!("{} of {}{swapped}", grouped(self.equal_slots), grouped(self.all_slots));
        let slots = format!("slots that are {author}'s");
        match self.bound {
            Some(bound) => {
                let limit = format!("at most {bound:.0e}");
                table.line([&format!("with {author}'s stored output"), &number, &limit, word(self.output_passed())]);
                table.line([&slots, &equal, "all", word(self.slots_passed())]);
            }
            None => {
                table.line([&format!("with {author}'s f32 output"), &number, "no bound", ""]);
                table.line([&slots, &equal, "no bound", ""]);
            }
        }
    }
}

fn word(passed: bool) -> &'static str {
    if passed { "ok" } else { "MISSED" }
}

fn distance(relative_l2: f64) -> String {
    format!("relative L2 {relative_l2:.1e}")
}

impl Agreement {
    fn new(
        checkpoint: &Checkpoint,
        weights: &Weights<'_>,
        dtype: ElementType,
        input: &[f32],
        outcome: &Outcome,
        stored: Option<Stored>,
    ) -> Result<Self> {
        let oracle = Oracle::new(checkpoint.config(), weights, dtype).forward(input)?;
        let stored = stored.map(|it| StoredAgreement::new(checkpoint, weights, dtype, input, outcome, it));
        Ok(Self {
            oracle: relative_l2(&outcome.output, &oracle.output),
            oracle_bound: if dtype == ElementType::F32 { F32_BOUND } else { HALF_BOUND },
            stored: stored.transpose()?,
        })
    }

    fn passed(&self) -> bool {
        let stored = self.stored.as_ref().is_none_or(|it| it.slots_passed() && it.output_passed());
        stored && self.oracle <= self.oracle_bound
    }

    fn text(&self) -> String {
        let mut table = Table::default();
        let (oracle, bound) = (distance(self.oracle), format!("at most {:.0e}", self.oracle_bound));
        table.line(["with the oracle (CPU, f64 sums)", &oracle, &bound, word(self.oracle <= self.oracle_bound)]);
        if let Some(stored) = &self.stored {
            stored.lines(&mut table);
        }
        table.text()
    }

    fn json(&self) -> Value {
        let mut json = json!({
            "passed": self.passed(),
            "oracle_relative_l2": self.oracle,
            "oracle_bound": self.oracle_bound,
        });
        if let Some(stored) = &self.stored {
            json["stored_relative_l2"] = json!(stored.output);
            json["stored_bound"] = json!(stored.bound);
            json["equal_slots"] = json!(stored.equal_slots);
            json["swapped_slots"] = json!(stored.swapped);
            json["all_slots"] = json!(stored.all_slots);
        }
        json
    }
}

/// How much of the memory the tokens read.
struct Usage {
    used_slots: usize,
    slots: usize,
    used_rows: usize,
    rows: usize,
}

impl Usage {
    fn new(config: &MemoryConfig, weights: &Weights<'_>, outcome: &Outcome) -> Self {
        let used: BTreeSet<u32> = outcome.slots.iter().copied().collect();
        let address = |&slot: &u32| match &weights.shuffle_index {
            Some(shuffle) => shuffle.get(slot as usize).copied().unwrap_or(slot),
            None => slot,
        };
        let rows: BTreeSet<usize> = used.iter().map(|slot| config.place(address(slot) as usize).1).collect();
        Self { used_slots: used.len(), slots: config.slots(), used_rows: rows.len(), rows: config.rows() }
    }

    fn text(&self) -> String {
        let mut table = Table::default();
        for (name, used, all) in [("slots", self.used_slots, self.slots), ("value rows", self.used_rows, self.rows)] {
            let counts = format!("{} of {}", grouped(used), grouped(all));
            table.line([&format!("{name} read at least once"), &counts, &percent(used as f64 / all as f64)]);
        }
        table.text()
    }

    fn json(&self) -> Value {
        json!({
            "used_slots": self.used_slots,
            "slots": self.slots,
            "used_rows": self.used_rows,
            "rows": self.rows,
        })
    }
}

const BEFORE: usize = 32;
const AFTER: usize = 32;

fn theme_text(theme: &Theme, text: &Text<'_>, side_keys: usize) -> String {
    let slot = theme.slot as usize;
    let mut out = format!(
        "  slot {slot} (row key {}, column key {}): {}, mean score {:.2}\n  {} of them end in \"{}\", as {} of the text \
         does\n",
        slot / side_keys,
        slot % side_keys,
        counted(theme.firings.len(), "position"),
        theme.mean_score(),
        theme.matching,
        printable(&theme.ending),
        percent(theme.chance),
    );
    for firing in contexts(theme, text) {
        let before = text.before(firing.position, BEFORE);
        let (last, before) = before.split_last().map_or((0, before), |(&last, before)| (last, before));
        let (before, after) = (printable(before), printable(text.after(firing.position, AFTER)));
        let line = format!("    {before:>BEFORE$}[{}]{after:<AFTER$}  {:>5.2}", printable(&[last]), firing.score);
        out += &(line + "\n");
    }
    out
}

/// The strongest firings in different places and surroundings.
fn contexts(theme: &Theme, text: &Text<'_>) -> Vec<Firing> {
    let mut seen = BTreeSet::new();
    let mut chosen: Vec<Firing> = Vec::new();
    for firing in &theme.firings {
        let apart = |other: &Firing| other.position.abs_diff(firing.position) > BEFORE;
        if chosen.len() < CONTEXTS && chosen.iter().all(apart) && seen.insert(text.before(firing.position, BEFORE / 2))
        {
            chosen.push(*firing);
        }
    }
    chosen
}

fn theme_json(theme: &Theme, text: &Text<'_>) -> Value {
    let contexts = contexts(theme, text).into_iter().map(|firing| {
        let before = String::from_utf8_lossy(text.before(firing.position, BEFORE)).into_owned();
        json!({ "position": firing.position, "score": firing.score, "text": before })
    });
    json!({
        "slot": theme.slot,
        "positions": theme.firings.len(),
        "mean_score": theme.mean_score(),
        "ending": String::from_utf8_lossy(&theme.ending),
        "matching": theme.matching,
        "chance": theme.chance,
        "contexts": contexts.collect::<Vec<_>>(),
    })
}
