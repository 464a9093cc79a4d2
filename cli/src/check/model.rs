//! `ultramem check PATH --expected FILE`: each layer of a whole model, held against what a file expects of it.

use std::path::Path;

use ultramem::ElementType;
use ultramem::checkpoint::{Layer, Model, Tensors};

use super::{Line, distance, not_checked, oracle, report};
use crate::Common;
use crate::backend::Adapter;
use crate::compare::{F32_BOUND, HALF_BOUND};
use crate::failure::{Failure, Result};
use crate::load;
use crate::report::Report;

/// Runs every layer of `model`, which is at `path`.
pub fn run(model: &Model, path: &Path, expected: &Path, common: &Common) -> Result<Report> {
    let check = Check { model, tensors: &Tensors::open(expected)?, expected };
    let has = |layer: &Layer| check.tensors.has(&name(layer.number(), "input"));
    if !model.layers().iter().any(has) {
        let first = model.layers()[0].number();
        return Err(
            Failure::new(format!("holds an input for no layer of the model, such as {first}.input")).of_file(expected)
        );
    }
    let adapter = common.find()?;
    let line = |layer| check.layer(layer, &adapter, common);
    let mut lines = model.layers().iter().map(line).collect::<Result<Vec<_>>>()?;
    lines.extend(check.strangers());
    Ok(report(path, &adapter, common.dtype, lines))
}

struct Check<'a> {
    model: &'a Model,
    /// What is expected, and its file.
    tensors: &'a Tensors,
    expected: &'a Path,
}

impl Check<'_> {
    /// A layer's output: in f32 against the file, else against the oracle on the same rounded numbers.
    fn layer(&self, layer: &Layer, adapter: &Adapter, common: &Common) -> Result<Line> {
        let (number, config, dtype) = (layer.number(), layer.config(), common.dtype);
        let [input, output] = ["input", "output"].map(|what| name(number, what));
        let what = format!("layer {number}");
        if let Some(missing) = [&input, &output].into_iter().find(|name| !self.tensors.has(name)) {
            return Ok(not_checked(&what, &format!("{} has no {missing}", self.expected.display())));
        }
        let input = self.numbers(&input, config.hidden_size, None)?;
        let output = self.numbers(&output, config.hidden_size, Some(input.len() / config.hidden_size))?;
        let weights = self.model.weights(layer)?;
        let outcome = adapter.engine(config, &weights, dtype, common.invariant)?.forward(&input)?;
        Ok(match dtype {
            ElementType::F32 => distance(&what, &outcome.output, &output, F32_BOUND, "with the file"),
            dtype => {
                let oracle = oracle(config, &weights, dtype, &input)?;
                let note = "with the oracle on the same rounded inputs";
                distance(&what, &outcome.output, &oracle.output, HALF_BOUND, note)
            }
        })
    }

    fn numbers(&self, name: &str, hidden_size: usize, tokens: Option<usize>) -> Result<Vec<f32>> {
        let numbers = || load::shaped(&self.tensors.floats(name)?, name, hidden_size, tokens);
        numbers().map_err(|failure: Failure| failure.of_file(self.expected))
    }

    /// What the file holds for layers that the model does not have.
    fn strangers(&self) -> Vec<Line> {
        let ours = |text: &str| {
            text.parse().is_ok_and(|number: usize| self.model.layers().iter().any(|it| it.number() == number))
        };
        let numbers =
            self.tensors.names().filter_map(|name| name.strip_suffix(".input")).filter(|number| !ours(number));
        numbers.map(|number| not_checked(&format!("{number}.input"), "the model has no such layer")).collect()
    }
}

/// What the file calls `what` of layer `number`.
fn name(number: usize, what: &str) -> String {
    format!("{number}.{what}")
}
