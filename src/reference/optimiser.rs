//! Optimiser: sparse updates of a table on the CPU, from the formulas on the page of [`ultramem_kernels::optimiser`], in f64.

use std::collections::BTreeMap;

use ultramem_kernels::ElementType;
use ultramem_kernels::optimiser::Rule;

/// A rule, and its state row by row: a row that was never used has none.
#[derive(Debug, Clone, PartialEq)]
pub struct Optimiser {
    rule: Rule,
    steps: u64,
    /// The seed of the chances and the table's type.
    rounded: Option<(u32, ElementType)>,
    first: BTreeMap<usize, Vec<f64>>,
    second: BTreeMap<usize, Vec<f64>>,
}

impl Optimiser {
    /// A rule before its first step.
    pub fn new(rule: Rule) -> Self {
        Self { rule, steps: 0, rounded: None, first: BTreeMap::new(), second: BTreeMap::new() }
    }

    /// The same, with each updated weight rounded stochastically to `dtype`.
    pub fn with_rounding(self, seed: u32, dtype: ElementType) -> Self {
        Self { rounded: Some((seed, dtype)), ..self }
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
                    let mean = first[at] / (1.0 - beta1.powf(self.steps as f64));
                    let square = second[at] / (1.0 - beta2.powf(self.steps as f64));
                    let pull = if decoupled { decay } else { 0.0 };
                    learning_rate * (mean / (square.sqrt() + f64::from(eps)) + pull)
                }
            };
            if let Some((seed, dtype)) = self.rounded {
                let step = stir(stir(seed ^ (self.steps >> 32) as u32).wrapping_add(self.steps as u32));
                let chance = stir(stir(step.wrapping_add(row as u32)).wrapping_add(at as u32));
                *weight = by_chance(*weight, chance, dtype);
            }
        }
    }
}

/// Stirs 32 bits.
fn stir(x: u32) -> u32 {
    let x = (x ^ (x >> 16)).wrapping_mul(0x21f0_aaad);
    let x = (x ^ (x >> 15)).wrapping_mul(0x735a_2d97);
    x ^ (x >> 15)
}

/// The number of `dtype` that `chance` takes `number` to: its magnitude is `⌊|number| / ulp + r⌋ · ulp`, with r from the last bits of `chance`, as
/// many as an f32's mantissa has more.
fn by_chance(number: f64, chance: u32, dtype: ElementType) -> f64 {
    let (digits, smallest, largest) = match dtype {
        ElementType::F32 => return number,
        ElementType::F16 => (10, -14, 65504.0),
        ElementType::BF16 => (7, -126, f64::from(f32::MAX)),
    };
    if !number.is_finite() || number.abs() >= largest {
        return number;
    }
    let dropped = 23 - digits;
    let exponent = (number.abs().log2().floor() as i32).max(smallest);
    let ulp = 2f64.powi(exponent - digits);
    let part = f64::from(chance % (1 << dropped)) / f64::from(1 << dropped);
    ((number.abs() / ulp + part).floor() * ulp).copysign(number)
}
