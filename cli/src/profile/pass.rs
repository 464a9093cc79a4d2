//! The passes that can be counted, and what was counted of one.

use clap::{Args, ValueEnum, value_parser};
use serde_json::{Value, json};
use ultramem::kernels::optimiser::Rule;
use ultramem_offline::profile::passes::{Popularity, Staged, Subject, Versus};
use ultramem_versus::Scale;

use super::plot::Bar;
use crate::bench::Model;
use crate::failure::{Failure, Result};
use crate::numbers::grouped;

/// Which passes are counted, and how.
#[derive(Debug, Args)]
pub struct Passes {
    /// What is counted, a list
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',', default_value = "forward")]
    pass: Vec<Which>,
    /// How the tables are updated: adam if it is not given
    #[arg(long, value_enum)]
    optimiser: Option<OptimiserName>,
    /// The model whose block versus looks at; without it, one as wide as the layer
    #[arg(long, value_enum)]
    scale: Option<Model>,
    /// Positions in each sequence's cache, of versus: 128 if it is not given
    #[arg(long, value_parser = value_parser!(u32).range(1..=1 << 20))]
    cached: Option<u32>,
}

/// What can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Which {
    /// The forward pass
    Forward,
    /// The backward pass, to all gradients
    Backward,
    /// An update of the tables by the gradients of the rows that were read
    Update,
    /// What the layer is compared with at equal budgets: a dense FFN and experts, and attention, one new token a sequence
    Versus,
    /// All of these
    All,
}

/// A pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// See [`Which`].
    Forward,
    /// See [`Which`].
    Backward,
    /// See [`Which`].
    Update,
    /// See [`Which`].
    Versus,
}

impl Pass {
    /// What tables, pictures and JSON call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Backward => "backward",
            Self::Update => "update",
            Self::Versus => "versus",
        }
    }
}

/// How a table is updated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OptimiserName {
    /// Lazy Adam
    Adam,
    /// Lazy Adam with decoupled weight decay
    Adamw,
    /// Adagrad with one accumulator a row
    Adagrad,
    /// Gradient descent with momentum
    Momentum,
    /// Gradient descent
    Sgd,
}

impl OptimiserName {
    fn rule(self) -> Rule {
        let adam = |weight_decay| Rule::Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay, decoupled: true };
        match self {
            Self::Adam => adam(0.0),
            Self::Adamw => adam(0.1),
            Self::Adagrad => Rule::Adagrad { eps: 1e-8 },
            Self::Momentum => Rule::Sgd { momentum: 0.9 },
            Self::Sgd => Rule::Sgd { momentum: 0.0 },
        }
    }
}

/// What was counted of a pass.
#[derive(Debug)]
pub struct Counted {
    /// The pass.
    pub pass: Pass,
    /// The pass with what it was asked for.
    pub title: String,
    /// Its launches.
    pub staged: Vec<Staged>,
    /// What its tokens chose, where that matters.
    pub popularity: Option<Popularity>,
}

impl Counted {
    /// Microseconds of all launches.
    pub fn predicted(&self) -> f64 {
        self.staged.iter().map(|it| it.profile.predicted).sum()
    }

    /// Launches and allocations.
    pub fn tasks(&self) -> usize {
        self.staged.iter().map(|it| it.profile.tasks).sum()
    }

    /// Microseconds that the host takes for them.
    pub fn host(&self) -> f64 {
        self.staged.iter().map(|it| it.profile.host).sum()
    }

    /// What `--json` says of it.
    pub fn json(&self, gather: f64) -> Value {
        json!({
            "pass": self.pass.name(),
            "title": self.title,
            "launches": self.staged.len(),
            "counted": self.staged.iter().map(|it| it.profile.counted).sum::<usize>(),
            "cubes": self.staged.iter().map(|it| it.profile.cubes).sum::<u64>(),
            "choices": self.popularity,
            "predicted_us": self.predicted(),
            "host_tasks": self.tasks(),
            "host_us": self.host(),
            "over_gather": self.predicted() / gather,
        })
    }

    /// A bar for the pass; of what the layer is compared with, one for each.
    pub fn bars(&self) -> Vec<Bar> {
        let bar = |name: &str, staged: &[Staged]| {
            Bar::new(name, staged.iter().map(|it| (it.stage, it.profile.binds(), it.profile.predicted)))
        };
        match self.pass {
            Pass::Versus => {
                self.staged.chunk_by(|a, b| a.stage == b.stage).map(|part| bar(part[0].stage, part)).collect()
            }
            _ => vec![bar(self.pass.name(), &self.staged)],
        }
    }
}

impl Passes {
    /// Counts the passes, in their own order.
    pub fn count(&self, subject: &Subject<'_>) -> Result<Vec<Counted>> {
        let asked = |which| self.pass.contains(&which) || self.pass.contains(&Which::All);
        for (given, name, which, pass) in [
            (self.optimiser.is_some(), "--optimiser", Which::Update, "update"),
            (self.scale.is_some(), "--scale", Which::Versus, "versus"),
            (self.cached.is_some(), "--cached", Which::Versus, "versus"),
        ] {
            if given && !asked(which) {
                return Err(Failure::new(format!("{name} is for --pass {pass}")));
            }
        }
        let mut found = Vec::new();
        if asked(Which::Forward) {
            found.push(counted(Pass::Forward, "Forward".into(), subject.forward()?, None));
        }
        if asked(Which::Backward) || asked(Which::Update) {
            let choices = subject.choices()?;
            let popularity = Some(choices.popularity());
            if asked(Which::Backward) {
                found.push(counted(Pass::Backward, "Backward".into(), subject.backward(&choices)?, popularity));
            }
            if asked(Which::Update) {
                let rule = self.optimiser.unwrap_or(OptimiserName::Adam).rule();
                let staged = subject.update(&choices, rule)?;
                found.push(counted(Pass::Update, format!("Update by {}", rule.name()), staged, popularity));
            }
        }
        if asked(Which::Versus) {
            found.push(self.versus(subject)?);
        }
        Ok(found)
    }

    fn versus(&self, subject: &Subject<'_>) -> Result<Counted> {
        let scale = self.scale.map_or_else(|| Scale::block(subject.config.hidden_size), |model| model.scale());
        let (tokens, cached) = (subject.tokens()?, self.cached.unwrap_or(CACHED) as usize);
        let versus = Versus { scale, tokens, cached, dtype: subject.dtype, gpu: subject.gpu, rates: subject.rates };
        let [ffn, experts] = versus.plans()?;
        let title = format!(
            "Versus, a block of width {}: {ffn}; {experts}; {} heads of attention over {} positions a token",
            grouped(scale.hidden_size),
            scale.attention_heads,
            grouped(cached),
        );
        Ok(counted(Pass::Versus, title, versus.step()?, None))
    }
}

/// Positions of a cache, where no number is given.
const CACHED: u32 = 128;

fn counted(pass: Pass, title: String, staged: Vec<Staged>, popularity: Option<Popularity>) -> Counted {
    Counted { pass, title, staged, popularity }
}
