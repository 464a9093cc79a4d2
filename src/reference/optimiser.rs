//! Optimiser: sparse updates of a table on the CPU, from the formulas on the page of [`ultramem_kernels::optimiser`], in f64.

use std::collections::BTreeMap;

use ultramem_kernels::optimiser::Rule;

/// A rule, and its state row by row: a row that was never used has none.
#[derive(Debug, Clone, PartialEq)]
pub struct Optimiser {
    rule: Rule,
    steps: u32,
    first: BTreeMap<usize, Vec<f64>>,
    second: BTreeMap<usize, Vec<f64>>,
}

impl Optimiser {
    /// A rule before its first step.
    pub fn new(rule: Rule) -> Self {
        Self { rule, steps: 0, first: BTreeMap::new(), second: BTreeMap::new() }
    }

    /// Updates the rows of `table` that `gradients`, each multiplied with `scale`, lists and `may_change` lets through.
    pub fn step(
        &mut self,
        table: &mut BTreeMap<usize, Vec<f64>>,
        gradients: &BTreeMap<usize, Vec<f64>>,
        learning_rate: f64,
        scale: f64,
        may_change: impl Fn(usize) -> bool,
    ) {
        self.steps += 1;
        for (&row, gradient) in gradients.iter().filter(|(row, _)| may_change(**row)) {
            let gradient: Vec<f64> = gradient.iter().map(|g| g * scale).collect();
            if let Some(weights) = table.get_mut(&row) {
                self.update(row, weights, &gradient, learning_rate);
            }
        }
    }

    fn update(&mut self, row: usize, weights: &mut [f64], gradient: &[f64], learning_rate: f64) {
        let zeros = || vec![0.0; gradient.len()];
        let first = self.first.entry(row).or_insert_with(zeros);
        let second = self.second.entry(row).or_insert_with(zeros);
        let mean_square = gradient.iter().map(|g| g * g).sum::<f64>() / gradient.len() as f64;
        for (at, weight) in weights.iter_mut().enumerate() {
            let g = gradient[at];
            *weight -= match self.rule {
                Rule::Sgd { momentum } => {
                    first[at] = f64::from(momentum) * first[at] + g;
                    learning_rate * first[at]
                }
                Rule::Adagrad { eps } => {
                    second[at] += mean_square;
                    learning_rate * g / (second[at].sqrt() + f64::from(eps))
                }
                Rule::Adam { beta1, beta2, eps, weight_decay, decoupled } => {
                    let (beta1, beta2, decay) = (f64::from(beta1), f64::from(beta2), f64::from(weight_decay) * *weight);
                    let g = if decoupled { g } else { g + decay };
                    first[at] = beta1 * first[at] + (1.0 - beta1) * g;
                    second[at] = beta2 * second[at] + (1.0 - beta2) * g * g;
                    let mean = first[at] / (1.0 - beta1.powf(self.steps.into()));
                    let square = second[at] / (1.0 - beta2.powf(self.steps.into()));
                    let pull = if decoupled { decay } else { 0.0 };
                    learning_rate * (mean / (square.sqrt() + f64::from(eps)) + pull)
                }
            };
        }
    }
}
