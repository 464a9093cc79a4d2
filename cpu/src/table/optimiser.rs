//! The optimisers' rules on the processor: the used rows of a table, updated in place with their state beside. The formulas are on the page of
//! [`ultramem_kernels::optimiser`], the chances of a rounding are those of the device.

use rayon::join;
use ultramem_kernels::Error;
use ultramem_kernels::launch::stir;
use ultramem_kernels::optimiser::{Rounding, Rule};

use crate::numbers::{Element, NumbersMut, dot, vectorised, with_slice};
use crate::shape::number;
use crate::{Result, RowGradients};

/// A rule with its state.
#[derive(Debug, Clone, PartialEq)]
pub struct Optimiser {
    rule: Rule,
    rounding: Rounding,
    steps: u64,
    rows: usize,
    width: usize,
    /// Momentum, the squares of rows or the first moment; empty where the rule keeps none.
    first: Vec<f32>,
    /// The second moment.
    second: Vec<f32>,
}

/// What differs from step to step.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// How far a step goes.
    pub learning_rate: f32,
    /// What gradients are multiplied with first; 1 for nothing.
    pub scale: f32,
    /// Bit `row mod 32` of word `row / 32` is set where a row may change. None: every row may.
    pub mask: Option<&'a [u32]>,
}

impl Step<'_> {
    /// A step of `learning_rate` over every used row.
    pub fn new(learning_rate: f32) -> Self {
        Self { learning_rate, scale: 1.0, mask: None }
    }
}

/// Rows of a table from `first_row` on, each with its state.
struct Part<'a, E> {
    first_row: usize,
    table: Rows<'a, E>,
    first: Rows<'a, f32>,
    second: Rows<'a, f32>,
}

/// Rows of `width` numbers; 0 where a rule keeps nothing.
struct Rows<'a, E> {
    numbers: &'a mut [E],
    width: usize,
}

impl<'a, E> Rows<'a, E> {
    fn of(rows: usize, numbers: &'a mut [E]) -> Self {
        Self { width: numbers.len() / rows, numbers }
    }

    fn split(self, at: usize) -> (Self, Self) {
        let width = self.width;
        let (left, right) = self.numbers.split_at_mut(at * width);
        (Self { numbers: left, width }, Self { numbers: right, width })
    }

    #[inline(always)]
    fn row(&mut self, at: usize) -> &mut [E] {
        &mut self.numbers[at * self.width..][..self.width]
    }
}

impl<'a, E> Part<'a, E> {
    /// What lies before row `row` of the table, and what from it on.
    fn split(self, row: usize) -> (Self, Self) {
        let at = row - self.first_row;
        let ((table, right_table), (first, right_first)) = (self.table.split(at), self.first.split(at));
        let (second, right_second) = self.second.split(at);
        let left = Self { first_row: self.first_row, table, first, second };
        (left, Self { first_row: row, table: right_table, first: right_first, second: right_second })
    }
}

/// Rows that one task updates.
const ROWS_OF_A_TASK: usize = 256;

impl Optimiser {
    /// A rule and its state of zeros for a table `[rows, width]`.
    ///
    /// # Errors
    /// A number of the rule that makes no sense, or a table without rows or columns.
    pub fn new(rule: Rule, rows: usize, width: usize) -> Result<Self> {
        rule.check()?;
        for (what, value) in [("rows of a table", rows), ("width of a table", width)] {
            if value == 0 {
                return Err(Error::Zero { what });
            }
        }
        let (first, second) = match rule {
            Rule::Sgd { momentum: 0.0 } => (0, 0),
            Rule::Sgd { .. } => (rows * width, 0),
            Rule::Adagrad { .. } => (rows, 0),
            Rule::Adam { .. } => (rows * width, rows * width),
        };
        let (first, second) = (vec![0.0; first], vec![0.0; second]);
        Ok(Self { rule, rounding: Rounding::default(), steps: 0, rows, width, first, second })
    }

    /// The same, whose updates of a table in half precision are rounded otherwise than stochastically with seed 0.
    pub fn with_rounding(self, rounding: Rounding) -> Self {
        Self { rounding, ..self }
    }

    /// The rule.
    pub fn rule(&self) -> Rule {
        self.rule
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The state by name, for saving: what a device's optimiser calls the same.
    pub fn state(&self) -> Vec<(&'static str, &[f32])> {
        match self.rule {
            Rule::Sgd { momentum: 0.0 } => Vec::new(),
            Rule::Sgd { .. } => vec![("momentum", &self.first)],
            Rule::Adagrad { .. } => vec![("squares", &self.first)],
            Rule::Adam { .. } => vec![("first_moment", &self.first), ("second_moment", &self.second)],
        }
    }

    /// Takes up a state that was saved after `steps` steps, in the order of [`state`](Self::state).
    ///
    /// # Errors
    /// Numbers that are not this rule's for this table; nothing is changed then.
    pub fn restore(&mut self, steps: u64, state: Vec<Vec<f32>>) -> Result<()> {
        let own = self.state();
        number("tensors of the optimiser's state", state.len(), own.len())?;
        for ((name, own), given) in own.iter().zip(&state) {
            number(name, given.len(), own.len())?;
        }
        let mut state = state.into_iter();
        self.first = state.next().unwrap_or_default();
        self.second = state.next().unwrap_or_default();
        self.steps = steps;
        Ok(())
    }

    /// Updates the used rows of `table` `[rows, width]`. A step of no used rows is counted.
    ///
    /// # Errors
    /// A table or gradients of another size, or a number that is not finite; nothing is changed then.
    pub fn step(&mut self, table: NumbersMut<'_>, gradients: &RowGradients, step: &Step<'_>) -> Result<()> {
        self.check(table.len(), gradients, step)?;
        self.steps = self.steps.saturating_add(1);
        let (rule, width, key) = (self.rule, self.width, self.rounding.key(self.steps));
        let update = Update { rule, width, key, step, biases: self.biases() };
        let (first, second) = (Rows::of(self.rows, &mut self.first), Rows::of(self.rows, &mut self.second));
        with_slice!(table, NumbersMut, numbers => {
            let part = Part { first_row: 0, table: Rows::of(self.rows, numbers), first, second };
            update.rows(part, &gradients.rows, &gradients.numbers);
        });
        Ok(())
    }

    /// Adam's `1 - β₁ᵗ` and `1 - β₂ᵗ`.
    fn biases(&self) -> (f32, f32) {
        let bias = |beta: f32| (1.0 - f64::from(beta).powf(self.steps as f64)) as f32;
        match self.rule {
            Rule::Adam { beta1, beta2, .. } => (bias(beta1), bias(beta2)),
            _ => (1.0, 1.0),
        }
    }

    /// Checks what [`step`](Self::step) of a table of `numbers` numbers checks: where this is `Ok`, so is the step.
    ///
    /// # Errors
    /// Those of [`step`](Self::step).
    pub fn check(&self, numbers: usize, gradients: &RowGradients, step: &Step<'_>) -> Result<()> {
        number("numbers of the table", numbers, self.rows * self.width)?;
        number("numbers of the gradients", gradients.numbers.len(), gradients.rows.len() * self.width)?;
        let ascending = gradients.rows.windows(2).all(|pair| pair[0] < pair[1]);
        let last = gradients.rows.last().map_or(0, |&row| row as usize);
        if !ascending || last >= self.rows {
            let value = format!("{} rows, the last {last}, of {}", gradients.rows.len(), self.rows);
            return Err(Error::Range { what: "rows of the gradients", value, expected: "ascending rows of the table" });
        }
        for (what, value) in [("learning_rate", step.learning_rate), ("scale", step.scale)] {
            if !value.is_finite() {
                return Err(Error::Range { what, value: value.to_string(), expected: "a finite number" });
            }
        }
        step.mask.map_or(Ok(()), |mask| number("words of the mask", mask.len(), self.rows.div_ceil(32)))
    }
}

/// One step.
struct Update<'a> {
    rule: Rule,
    width: usize,
    /// What the chances of the step's roundings are made of.
    key: Option<u32>,
    /// Adam's `1 - βᵗ`.
    biases: (f32, f32),
    step: &'a Step<'a>,
}

impl Update<'_> {
    /// Updates `rows`, ascending, of a part of the table: halves it until a task has few.
    fn rows<E: Element>(&self, mut part: Part<'_, E>, rows: &[u32], gradients: &[f32]) {
        if rows.len() > ROWS_OF_A_TASK {
            let middle = rows.len() / 2;
            let (left, right) = part.split(rows[middle] as usize);
            let (of_left, of_right) = gradients.split_at(middle * self.width);
            join(|| self.rows(left, &rows[..middle], of_left), || self.rows(right, &rows[middle..], of_right));
            return;
        }
        vectorised!({
            for (&row, gradient) in rows.iter().zip(gradients.chunks_exact(self.width)) {
                if self.step.mask.is_none_or(|mask| mask[row as usize / 32] >> (row % 32) & 1 == 1) {
                    let at = row as usize - part.first_row;
                    self.row(row, part.table.row(at), gradient, part.first.row(at), part.second.row(at));
                }
            }
        });
    }

    #[inline(always)]
    fn row<E: Element>(&self, row: u32, weights: &mut [E], gradient: &[f32], first: &mut [f32], second: &mut [f32]) {
        let rate = self.step.learning_rate;
        let numbers = weights.iter_mut().zip(gradient.iter().map(|g| g * self.step.scale)).enumerate();
        match self.rule {
            Rule::Sgd { momentum: 0.0 } => {
                numbers
                    .for_each(|(column, (weight, g))| *weight = self.rounded(weight.widen() - rate * g, row, column));
            }
            Rule::Sgd { momentum } => {
                for ((column, (weight, g)), state) in numbers.zip(first) {
                    *state = momentum * *state + g;
                    *weight = self.rounded(weight.widen() - rate * *state, row, column);
                }
            }
            Rule::Adagrad { eps } => {
                let scale = self.step.scale;
                first[0] += dot::<f32>(gradient, gradient) * scale * scale / self.width as f32;
                let rate = rate / (first[0].sqrt() + eps);
                numbers
                    .for_each(|(column, (weight, g))| *weight = self.rounded(weight.widen() - rate * g, row, column));
            }
            Rule::Adam { beta1, beta2, eps, weight_decay, decoupled } => {
                let (coupled, apart) = if decoupled { (0.0, weight_decay) } else { (weight_decay, 0.0) };
                let (of_first, of_second) = self.biases;
                for ((column, (weight, g)), (first, second)) in numbers.zip(first.iter_mut().zip(second)) {
                    let old = weight.widen();
                    let g = g + coupled * old;
                    *first = beta1 * *first + (1.0 - beta1) * g;
                    *second = beta2 * *second + (1.0 - beta2) * g * g;
                    let step = (*first / of_first) / ((*second / of_second).sqrt() + eps);
                    *weight = self.rounded(old - rate * (step + apart * old), row, column);
                }
            }
        }
    }

    /// A weight in the table's type: by chance, or to the nearest.
    #[inline(always)]
    fn rounded<E: Element>(&self, weight: f32, row: u32, column: usize) -> E {
        match self.key {
            Some(key) if E::DROPPED > 0 => {
                let chance = stir(stir(key.wrapping_add(row)).wrapping_add(column as u32));
                E::narrow(by_chance::<E>(weight, chance))
            }
            _ => E::narrow(weight),
        }
    }
}

/// The number of the type, as an f32, that `chance` takes `number` to: its magnitude and a part of the type's last place, cut off.
#[inline(always)]
fn by_chance<E: Element>(number: f32, chance: u32) -> f32 {
    let (bits, below) = (number.to_bits(), (1 << E::DROPPED) - 1);
    let magnitude = f32::from_bits(bits & 0x7fff_ffff);
    if magnitude >= E::LARGEST || number.is_nan() {
        return number;
    }
    if magnitude < E::NORMAL {
        // Below the smallest normal number the places are as far apart as there.
        let places = E::NORMAL.recip() * 2f32.powi(23 - E::DROPPED as i32);
        let part = (chance & below) as f32 / (below + 1) as f32;
        return ((magnitude * places + part).floor() / places).copysign(number);
    }
    f32::from_bits((bits + (chance & below)) & !below)
}
