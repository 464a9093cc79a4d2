//! `ultramem bench versus`: every FFN and every sparse layer of a model, one step, design next to design at equal budgets.

use clap::Args;
use serde_json::json;
use ultramem_versus::{Design, Plan, Scale};

use super::contest::{self, Contest, Outcome};
use super::fit::{Limits, Step, batches, fitted};
use super::picture::Picture;
use super::verdict::verdict;
use super::{Model, Series, count, ordered, paragraph};
use crate::Common;
use crate::backend::Adapter;
use crate::failure::{Failure, Result};
use crate::numbers::grouped;
use crate::report::{Report, device_json, device_line, object};
use crate::sampling::Effort;

/// Arguments of `bench versus`.
#[derive(Debug, Args)]
pub struct VersusArgs {
    /// Sequences that make a step together, a list
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = count, default_value = "1,4,16,64,256,1024")]
    batch: Vec<usize>,
    /// The size of the models
    #[arg(long, value_enum, default_value = "small")]
    scale: Model,
    #[command(flatten)]
    series: Series,
}

/// Runs the verb.
pub fn run(args: &VersusArgs, common: &Common) -> Result<Report> {
    let verb = Verb {
        name: "bench versus",
        title: "One step of every FFN and sparse layer, at equal budgets",
        what: "One step through every FFN and sparse layer of a model, without attention",
        scale: args.scale.scale(),
        cached: None,
        budget_ms: BUDGET_MS,
    };
    verb.run(&args.batch, &args.series, common)
}

/// Milliseconds for each batch size: six of them stay below a minute, and compiling takes as long again.
const BUDGET_MS: f64 = 9_000.0;

/// What `versus` and `decode` differ in.
pub struct Verb {
    /// For errors.
    pub name: &'static str,
    /// Of the picture.
    pub title: &'static str,
    /// What a step is.
    pub what: &'static str,
    /// The models' size.
    pub scale: Scale,
    /// Positions that attention reads; None without attention.
    pub cached: Option<usize>,
    /// Milliseconds for each batch size.
    pub budget_ms: f64,
}

impl Verb {
    /// Fits, measures and reports.
    pub fn run(&self, wanted: &[usize], series: &Series, common: &Common) -> Result<Report> {
        let picture = series.plot.as_deref().map(Picture::at).transpose()?;
        let adapter = common.find_gpu(self.name)?;
        let wanted = ordered(wanted);
        let step = Step { batch: wanted.first().copied().unwrap_or(1), dtype: common.dtype, cached: self.cached };
        let limits = Limits::of(&adapter)?;
        let fitted = fitted(&Design::ALL, &self.scale, step, limits)?;
        let (batches, left_out) = batches(&fitted.plans, &wanted, step, limits);
        if batches.is_empty() {
            return Err(Failure::new(left_out.concat()));
        }
        let notes: Vec<String> = fitted.notes.into_iter().chain(left_out).collect();
        let effort = Effort { samples: series.samples as usize, budget_ms: self.budget_ms };
        let plans = &fitted.plans;
        let contest = Contest { plans, batches: &batches, dtype: common.dtype, cached: self.cached, effort };
        let outcome = adapter.with_client(contest)?;
        let device = device_line(&adapter, common.dtype);
        let mut text = device.clone() + &self.head(plans, &notes);
        text += &contest::tables(&outcome.rows);
        text += &outcome.rates.text();
        text += &verdict(&outcome);
        if let Some(picture) = picture {
            picture.write(&contest::chart(&outcome.rows, self.title.into(), &device).svg()?)?;
            text += &picture.line();
        }
        Ok(Report { text, json: self.json(&adapter, common, plans, &outcome, &notes), passed: true })
    }

    fn head(&self, plans: &[Plan], notes: &[String]) -> String {
        let scale = plans.first().map_or(self.scale, |plan| plan.scale);
        let mut text = format!("\n{}: {} blocks of width {}.\n", self.what, scale.blocks, grouped(scale.hidden_size));
        text += &notes.iter().map(|note| paragraph(note)).collect::<String>();
        text +=
            "\nEqual budgets: weights that a token is multiplied with (activated), and parameters beyond (sparse)\n";
        text + &contest::budget_table(plans)
    }

    fn json(
        &self,
        adapter: &Adapter,
        common: &Common,
        plans: &[Plan],
        outcome: &Outcome,
        notes: &[String],
    ) -> serde_json::Value {
        let scale = plans.first().map_or(self.scale, |plan| plan.scale);
        let mut json = device_json(adapter, common.dtype);
        json.extend(outcome.rates.json());
        json.extend([
            ("hidden_size", json!(scale.hidden_size)),
            ("blocks", json!(scale.blocks)),
            ("cached", json!(self.cached)),
            ("budgets", contest::budget_json(plans)),
            ("batches", contest::rows_json(&outcome.rows)),
            ("notes", json!(notes)),
        ]);
        object(json)
    }
}
