//! Optimiser: updates of a table by the gradients of its used rows, in place. No other row is read or written, so a step costs what
//! its tokens read, however large the table is.
//!
//! | rule | update of a used row | state |
//! |---|---|---|
//! | [`Rule::Sgd`] | `b ← momentum · b + g`, `w ← w - lr · b` | b `[rows, width]`, none without momentum |
//! | [`Rule::Adagrad`] | `s ← s + mean(g²)`, `w ← w - lr · g / (√s + eps)` | s `[rows]` |
//! | [`Rule::Adam`] | `m ← β₁ m + (1-β₁) g`, `v ← β₂ v + (1-β₂) g²`, `w ← w - lr · m̂ / (√v̂ + eps)` | m, v `[rows, width]` |
//!
//! Lazy: the state of a row that is not used stands still, without decay; Adam's `m̂ = m / (1 - β₁ᵗ)` and `v̂ = v / (1 - β₂ᵗ)` count all
//! steps t. Adam's weight decay is added to the gradient, or, decoupled (AdamW), taken from the weight as `lr · weight_decay · w`; of used
//! rows alone. State and arithmetic are f32; the row is rounded to the table's element type. Where a row is masked out, neither
//! it nor its state changes.
//!
//! Moves, per used row, its gradient once, and the row and its state once in and once out; Adagrad reads the gradient and the
//! accumulator once more.

mod adagrad;
mod adam;
mod sgd;

use cubecl::prelude::*;

use crate::device::Device;
use crate::rows::RowGradients;
use crate::tensor::{Tensor, arg, check, f32_storage, float_type, u32_storage, zeros};
use crate::{Error, Result};

/// How a used row is updated; the formulas stand at the head of this module.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// Gradient descent.
    Sgd {
        /// 0 for none.
        momentum: f32,
    },
    /// Adagrad with one accumulator per row.
    Adagrad {
        /// Added to the root.
        eps: f32,
    },
    /// Lazy Adam, or AdamW.
    Adam {
        /// Decay of the first moment.
        beta1: f32,
        /// Decay of the second moment.
        beta2: f32,
        /// Added to the root.
        eps: f32,
        /// 0 for none.
        weight_decay: f32,
        /// Whether weight decay is decoupled from the gradient, as AdamW has it.
        decoupled: bool,
    },
}

impl Rule {
    /// The rule's numbers by name, each with whether it may be what it is.
    fn check(&self) -> Result<()> {
        let unit = |what, value: f32| in_range(what, value, (0.0..1.0).contains(&value), "0 or more and less than 1");
        let positive = |what, value: f32| in_range(what, value, value >= 0.0 && value.is_finite(), "finite, 0 or more");
        match *self {
            Self::Sgd { momentum } => unit("momentum", momentum),
            Self::Adagrad { eps } => positive("eps", eps),
            Self::Adam { beta1, beta2, eps, weight_decay, .. } => {
                unit("beta1", beta1)?;
                unit("beta2", beta2)?;
                positive("eps", eps)?;
                positive("weight_decay", weight_decay)
            }
        }
    }
}

fn in_range(what: &'static str, value: f32, holds: bool, expected: &'static str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Range { what, value: value.to_string(), expected }) }
}

/// A rule with its state, which lives beside the table.
pub struct Optimiser<R: Runtime> {
    rule: Rule,
    state: State<R>,
    steps: u32,
}

/// What a rule keeps between steps, f32.
enum State<R: Runtime> {
    Nothing,
    /// `[rows, width]`.
    Momentum(Tensor<R>),
    /// `[rows]`.
    Squares(Tensor<R>),
    /// Twice `[rows, width]`.
    Moments(Tensor<R>, Tensor<R>),
}

/// What differs from step to step.
#[derive(Clone, Copy)]
pub struct Step<'a, R: Runtime> {
    /// How far a step goes.
    pub learning_rate: f32,
    /// What gradients are multiplied with first, to clip them or to undo a loss scale; 1 for nothing.
    pub scale: f32,
    /// u32 `[⌈rows / 32⌉]`: bit `row mod 32` of word `row / 32` is set where a row may change. None: every row may.
    pub mask: Option<&'a Tensor<R>>,
}

impl<R: Runtime> Step<'_, R> {
    /// A step of `learning_rate` over every used row.
    pub fn new(learning_rate: f32) -> Self {
        Self { learning_rate, scale: 1.0, mask: None }
    }
}

impl<R: Runtime> Optimiser<R> {
    /// A rule and its state of zeros for a table of `rows` rows of `width`.
    ///
    /// # Errors
    /// A number that makes no sense, or a state larger than one binding of the device.
    pub fn new(client: &ComputeClient<R>, rule: Rule, rows: usize, width: usize) -> Result<Self> {
        rule.check()?;
        let matrix = |name| zeros(client, name, &[rows, width]);
        let state = match rule {
            Rule::Sgd { momentum: 0.0 } => State::Nothing,
            Rule::Sgd { .. } => State::Momentum(matrix("momentum")?),
            Rule::Adagrad { .. } => State::Squares(zeros(client, "squares", &[rows])?),
            Rule::Adam { .. } => State::Moments(matrix("first moment")?, matrix("second moment")?),
        };
        Ok(Self { rule, state, steps: 0 })
    }

    /// The rule.
    pub fn rule(&self) -> Rule {
        self.rule
    }

    /// Steps taken.
    pub fn steps(&self) -> u32 {
        self.steps
    }

    /// The state by name, for saving.
    pub fn state(&self) -> Vec<(&'static str, &Tensor<R>)> {
        match &self.state {
            State::Nothing => vec![],
            State::Momentum(momentum) => vec![("momentum", momentum)],
            State::Squares(squares) => vec![("squares", squares)],
            State::Moments(first, second) => vec![("first_moment", first), ("second_moment", second)],
        }
    }

    /// Takes up a state that was saved after `steps` steps, in the order of [`state`](Self::state).
    ///
    /// # Errors
    /// Tensors that are not this rule's for this table; nothing is changed then.
    pub fn restore(&mut self, steps: u32, state: &[Tensor<R>]) -> Result<()> {
        let own = self.state();
        if own.len() != state.len() {
            let (value, expected) = (state.len() as u64, own.len() as u64);
            return Err(Error::Number { what: "tensors of the optimiser's state", value, expected });
        }
        for ((name, own), tensor) in own.into_iter().zip(state) {
            check(tensor, name, own.shape(), f32_storage())?;
        }
        self.state = match (&self.state, state) {
            (State::Momentum(_), [momentum]) => State::Momentum(momentum.clone()),
            (State::Squares(_), [squares]) => State::Squares(squares.clone()),
            (State::Moments(..), [first, second]) => State::Moments(first.clone(), second.clone()),
            _ => State::Nothing,
        };
        self.steps = steps;
        Ok(())
    }

    /// Updates the used rows of `table` `[rows, width]`, f32, f16 or bf16, in place. Enqueues and returns.
    ///
    /// # Errors
    /// Shapes, types or sizes that don't fit, or a number that is not finite; nothing is launched and no step is counted then.
    pub fn step(
        &mut self,
        client: &ComputeClient<R>,
        table: &Tensor<R>,
        gradients: &RowGradients<R>,
        step: &Step<'_, R>,
    ) -> Result<()> {
        let update = Update::check(client, table, gradients, step)?;
        for (name, state) in self.state() {
            let shape = if name == "squares" { vec![update.rows] } else { vec![update.rows, update.width] };
            check(state, name, &shape, f32_storage())?;
        }
        let steps = self.steps.saturating_add(1);
        match (self.rule, &self.state) {
            (Rule::Adagrad { eps }, State::Squares(squares)) => adagrad::launch(&update, eps, squares)?,
            (Rule::Adam { .. }, State::Moments(first, second)) => {
                adam::launch(&update, &self.rule, steps, first, second)?;
            }
            (Rule::Sgd { momentum }, State::Momentum(state)) => sgd::launch(&update, momentum, Some(state))?,
            _ => sgd::launch(&update, 0.0, None)?,
        }
        self.steps = steps;
        Ok(())
    }
}

/// The checked arguments of a step.
struct Update<'a, R: Runtime> {
    client: &'a ComputeClient<R>,
    device: Device,
    table: &'a Tensor<R>,
    gradients: &'a RowGradients<R>,
    step: &'a Step<'a, R>,
    rows: usize,
    width: usize,
    /// Numbers of a vector.
    vector: usize,
    plan: UpdatePlan,
}

/// What is fixed when the kernels are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct UpdatePlan {
    /// Vectors of a row.
    pub vectors: usize,
    pub masked: bool,
    pub units: usize,
}

impl<'a, R: Runtime> Update<'a, R> {
    fn check(
        client: &'a ComputeClient<R>,
        table: &'a Tensor<R>,
        gradients: &'a RowGradients<R>,
        step: &'a Step<'a, R>,
    ) -> Result<Self> {
        let (_, width) = gradients.check()?;
        let rows = table.shape().first().copied().unwrap_or(0);
        float_type(client, table, "table")?;
        check(table, "table", &[rows, width], table.dtype)?;
        in_range("learning_rate", step.learning_rate, step.learning_rate.is_finite(), "a finite number")?;
        in_range("scale", step.scale, step.scale.is_finite(), "a finite number")?;
        if let Some(mask) = step.mask {
            check(mask, "mask", &[rows.div_ceil(32)], u32_storage())?;
        }
        let device = Device::of(client);
        let vector = device.width(4, &[width]);
        let units = device.flat(gradients.rows.shape()[0] * (width / vector));
        let plan = UpdatePlan { vectors: width / vector, masked: step.mask.is_some(), units };
        Ok(Self { client, device, table, gradients, step, rows, width, vector, plan })
    }

    /// One unit for each vector of every row that can be listed.
    fn grid(&self) -> Result<CubeCount> {
        self.device.grid((self.gradients.rows.shape()[0] * self.plan.vectors).div_ceil(self.plan.units))
    }

    fn cube_dim(&self) -> CubeDim {
        CubeDim::new_1d(self.plan.units as u32)
    }

    fn mask(&self) -> ArrayArg<R> {
        arg(self.step.mask.unwrap_or(&self.gradients.rows), 1)
    }
}

/// A listed row, and whether it may change.
#[derive(CubeType, Clone, Copy)]
struct Listed {
    row: usize,
    changes: bool,
}

/// Row `place` of the list: none past `count`, past the table's last or masked out.
#[cube]
fn listed(
    rows: &Array<u32>,
    count: &Array<u32>,
    mask: &Array<u32>,
    place: usize,
    table_rows: u32,
    #[comptime] plan: UpdatePlan,
) -> Listed {
    let mut row = 0u32;
    let mut changes = false;
    if place < min(count[0] as usize, rows.len()) {
        row = rows[place];
        changes = row < table_rows;
        if plan.masked {
            let word = min(row, table_rows - 1) / 32;
            changes = changes && (mask[word as usize] >> (row % 32)) % 2 == 1;
        }
    }
    Listed { row: row as usize, changes }
}
