//! `ultramem bench`: what memory layers cost on this device, alone and next to what they compete with.
//!
//! | subcommand | measures |
//! |---|---|
//! | `layer` | one layer and each of its stages, at one number of tokens |
//! | `stages` | the same over many numbers of tokens, with a picture |
//! | `training` | the backward pass, its stages and an update of the value table, next to the forward pass |
//! | `versus` | dense, MoE, PKM, Memory+ and UltraMem at equal budgets, over batch sizes |
//! | `growth` | the same while the sparse parameters grow, at one batch size |
//! | `decode` | a decoding step of a whole model of the paper, attention included |

pub mod chart;
mod contest;
mod decode;
mod fit;
mod growth;
pub mod layer;
pub mod picture;
mod stages;
mod training;
mod verdict;
mod versus;

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum, value_parser};
use ultramem_versus::Scale;

use crate::Common;
use crate::failure::Result;
use crate::report::Report;
use crate::sampling::FEWEST;

/// What can be measured.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// The whole layer and each of its stages
    Layer(layer::LayerArgs),
    /// Each stage of a layer, from one token to many
    Stages(stages::StagesArgs),
    /// A layer's backward pass, each of its stages, and an update of the value table
    Training(training::TrainingArgs),
    /// UltraMem next to dense, MoE, PKM and Memory+ with equal budgets, from one sequence to many
    Versus(versus::VersusArgs),
    /// The same while the sparse parameters grow
    Growth(growth::GrowthArgs),
    /// One decoding step of a whole model at a paper's size, attention included
    Decode(decode::DecodeArgs),
}

/// Runs the verb.
pub fn run(bench: &Bench, common: &Common) -> Result<Report> {
    match bench {
        Bench::Layer(args) => layer::run(args, common),
        Bench::Stages(args) => stages::run(args, common),
        Bench::Training(args) => training::run(args, common),
        Bench::Versus(args) => versus::run(args, common),
        Bench::Growth(args) => growth::run(args, common),
        Bench::Decode(args) => decode::run(args, common),
    }
}

/// How a series is measured and drawn.
#[derive(Debug, Args)]
struct Series {
    /// The most samples of each time; fewer where a sample takes long
    #[arg(long, default_value_t = 15, value_parser = value_parser!(u32).range(FEWEST as i64..=100_000))]
    samples: u32,
    /// Also draw a picture: a file that ends in .svg or .png
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

/// A whole model whose sizes are known by name.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Model {
    /// 8 blocks of width 256, for software devices
    #[value(name = "small")]
    Small,
    /// The paper's model of 151 M activated parameters
    #[value(name = "151m")]
    Paper151m,
    /// The paper's model of 680 M activated parameters
    #[value(name = "680m")]
    Paper680m,
    /// The paper's model of 1.6 B activated parameters
    #[value(name = "1.6b")]
    Paper1_6b,
}

impl Model {
    /// Its sizes.
    pub fn scale(self) -> Scale {
        match self {
            Self::Small => Scale::small(),
            Self::Paper151m => Scale::paper_151m(),
            Self::Paper680m => Scale::paper_680m(),
            Self::Paper1_6b => Scale::paper_1_6b(),
        }
    }
}

/// A batch size or a number of tokens, at least one and no more than any device could take.
fn count(text: &str) -> std::result::Result<usize, String> {
    match text.parse() {
        Ok(count @ 1..=MOST) => Ok(count),
        _ => Err(format!("expected a whole number from 1 to {MOST}")),
    }
}

const MOST: usize = 1 << 20;

/// In order and each once.
fn ordered(counts: &[usize]) -> Vec<usize> {
    let mut counts = counts.to_vec();
    counts.sort_unstable();
    counts.dedup();
    counts
}

/// "1, 4 and 16".
fn listed(names: &[String]) -> String {
    match names {
        [] => String::new(),
        [only] => only.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

/// Text in lines of at most 98 columns, indented by two.
fn paragraph(text: &str) -> String {
    const WIDTH: usize = 96;
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.len() - 1;
        let taken = lines[line].chars().count();
        if taken > 0 && taken + 1 + word.chars().count() > WIDTH {
            lines.push(word.to_string());
        } else {
            let blank = if taken > 0 { " " } else { "" };
            lines[line] += &format!("{blank}{word}");
        }
    }
    lines.iter().map(|line| format!("  {line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_positive_and_in_order() {
        assert_eq!((count("1024"), count("0").is_err(), count("-1").is_err()), (Ok(1024), true, true));
        assert_eq!(ordered(&[16, 1, 16, 4]), [1, 4, 16]);
    }

    #[test]
    fn lists_and_paragraphs_read_well() {
        let names = ["1", "4", "16"].map(String::from);
        assert_eq!((listed(&names), listed(&names[..1])), ("1, 4 and 16".into(), "1".into()));
        let text = paragraph(&"word ".repeat(50));
        assert!(text.lines().all(|line| line.len() <= 98 && line.starts_with("  word")), "{text}");
        assert_eq!(text.split_whitespace().count(), 50);
    }
}
