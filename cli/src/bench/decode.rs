//! `ultramem bench decode`: one decoding step of a whole model of the paper, attention over a cache included for every design.

use clap::{Args, value_parser};

use super::versus::Verb;
use super::{Model, Series, count};
use crate::Common;
use crate::failure::Result;
use crate::report::Report;

/// Arguments of `bench decode`.
#[derive(Debug, Args)]
pub struct DecodeArgs {
    /// The size of the models
    #[arg(long, value_enum, default_value = "151m")]
    model: Model,
    /// Sequences that are decoded together, a list
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = count, default_value = "1,8,64")]
    batch: Vec<usize>,
    /// Positions in each sequence's cache
    #[arg(long, default_value_t = 2048, value_parser = value_parser!(u32).range(1..=1 << 20))]
    cached: u32,
    #[command(flatten)]
    series: Series,
}

/// Milliseconds for each batch size: the models are large.
const BUDGET_MS: f64 = 20_000.0;

/// Runs the verb.
pub fn run(args: &DecodeArgs, common: &Common) -> Result<Report> {
    let verb = Verb {
        name: "bench decode",
        title: "One decoding step of a whole model, at equal budgets",
        what: "One decoding step of a whole model, attention included",
        scale: args.model.scale(),
        cached: Some(args.cached as usize),
        budget_ms: BUDGET_MS,
    };
    verb.run(&args.batch, &args.series, common)
}
