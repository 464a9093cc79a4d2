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
//! rows alone. State and arithmetic are f32; the row is rounded to the table's element type, [`Rounding`] says how. Where a row is masked
//! out, neither it nor its state changes.
//!
//! A buffer of the table or of the state that somebody else holds, too, is copied before its first update, once: a clone is a copy. Alone,
//! it is updated in place. The copy costs its bytes of memory while the other lives.
//!
//! Moves, per used row, its gradient once, and the row and its state once in and once out; Adagrad reads the gradient and the
//! accumulator once more. A table of several pages is updated by one launch a page, each of which reads the list of used rows.

mod adagrad;
mod adam;
mod rounding;
mod sgd;

use cubecl::prelude::*;
use cubecl::std::tensor::into_contiguous;

pub use self::rounding::Rounding;
use crate::launch::device::Device;
use crate::launch::plan::{Launch, check_all};
use crate::launch::tensor::{Tensor, arg, check, f32_storage, float_type, index, positive, u32_storage, zeros};
use crate::table::pages::{Page, Window, windows};
use crate::table::row_gradients::RowGradients;
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
    /// The rule's name: the same for rules that keep the same state.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Sgd { momentum: 0.0 } => "SGD",
            Self::Sgd { .. } => "SGD with momentum",
            Self::Adagrad { .. } => "Adagrad",
            Self::Adam { .. } => "Adam",
        }
    }

    /// The shape of each tensor that the rule keeps of a page.
    fn state_shape(&self, rows: usize, width: usize) -> Vec<usize> {
        match self {
            Self::Adagrad { .. } => vec![rows],
            _ => vec![rows, width],
        }
    }

    /// Checks the rule's numbers.
    ///
    /// # Errors
    /// [`Error::Range`] for a decay that is not below 1, or a number that is negative or not finite.
    pub fn check(&self) -> Result<()> {
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

/// A rule with its state, which lives beside the table, in pages as the table has them.
pub struct Optimiser<R: Runtime> {
    rule: Rule,
    rounding: Rounding,
    pages: Vec<State<R>>,
    steps: u64,
}

/// Shares the state until one of the two makes a step.
impl<R: Runtime> Clone for Optimiser<R> {
    fn clone(&self) -> Self {
        let pages = self.pages.iter().map(State::clone).collect();
        Self { rule: self.rule, rounding: self.rounding, pages, steps: self.steps }
    }
}

/// What a rule keeps of a page between steps, f32.
enum State<R: Runtime> {
    Nothing,
    /// `[rows, width]`.
    Momentum(Tensor<R>),
    /// `[rows]`.
    Squares(Tensor<R>),
    /// Twice `[rows, width]`.
    Moments(Tensor<R>, Tensor<R>),
}

impl<R: Runtime> Clone for State<R> {
    fn clone(&self) -> Self {
        match self {
            Self::Nothing => Self::Nothing,
            Self::Momentum(momentum) => Self::Momentum(momentum.clone()),
            Self::Squares(squares) => Self::Squares(squares.clone()),
            Self::Moments(first, second) => Self::Moments(first.clone(), second.clone()),
        }
    }
}

impl<R: Runtime> State<R> {
    fn zeros(client: &ComputeClient<R>, rule: Rule, rows: usize, width: usize) -> Result<Self> {
        let shaped = |name| zeros(client, name, &rule.state_shape(rows, width));
        Ok(match rule {
            Rule::Sgd { momentum: 0.0 } => Self::Nothing,
            Rule::Sgd { .. } => Self::Momentum(shaped("momentum")?),
            Rule::Adagrad { .. } => Self::Squares(shaped("squares")?),
            Rule::Adam { .. } => Self::Moments(shaped("first moment")?, shaped("second moment")?),
        })
    }

    fn tensors(&self) -> Vec<(&'static str, &Tensor<R>)> {
        match self {
            Self::Nothing => vec![],
            Self::Momentum(momentum) => vec![("momentum", momentum)],
            Self::Squares(squares) => vec![("squares", squares)],
            Self::Moments(first, second) => vec![("first_moment", first), ("second_moment", second)],
        }
    }

    fn tensors_mut(&mut self) -> Vec<&mut Tensor<R>> {
        match self {
            Self::Nothing => vec![],
            Self::Momentum(tensor) | Self::Squares(tensor) => vec![tensor],
            Self::Moments(first, second) => vec![first, second],
        }
    }

    /// The same kind of state, of tensors in the order of [`tensors`](Self::tensors).
    fn of(&self, tensors: &[&Tensor<R>]) -> Self {
        match (self, tensors) {
            (Self::Momentum(_), [momentum]) => Self::Momentum((*momentum).clone()),
            (Self::Squares(_), [squares]) => Self::Squares((*squares).clone()),
            (Self::Moments(..), [first, second]) => Self::Moments((*first).clone(), (*second).clone()),
            _ => Self::Nothing,
        }
    }
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
    /// A rule and its state of zeros for a table of pages of `rows` rows, each of `width`.
    ///
    /// # Errors
    /// A number that makes no sense, no pages, or a state of a page larger than one binding of the device.
    pub fn new(client: &ComputeClient<R>, rule: Rule, rows: &[usize], width: usize) -> Result<Self> {
        rule.check()?;
        positive(&[("pages of a table", rows.len()), ("width of a table", width)])?;
        for &rows in rows {
            positive(&[("rows of a page", rows)])?;
        }
        let pages = rows.iter().map(|&rows| State::zeros(client, rule, rows, width)).collect::<Result<_>>()?;
        Ok(Self { rule, rounding: Rounding::default(), pages, steps: 0 })
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

    /// The state by name, a tensor a page, for saving.
    pub fn state(&self) -> Vec<(&'static str, Vec<&Tensor<R>>)> {
        let mut named: Vec<(&'static str, Vec<&Tensor<R>>)> = Vec::new();
        for page in &self.pages {
            for (at, (name, tensor)) in page.tensors().into_iter().enumerate() {
                match named.get_mut(at) {
                    Some((_, pages)) => pages.push(tensor),
                    None => named.push((name, vec![tensor])),
                }
            }
        }
        named
    }

    /// Takes up a state that was saved after `steps` steps, in the order of [`state`](Self::state).
    ///
    /// # Errors
    /// Tensors that are not this rule's for this table; nothing is changed then.
    pub fn restore(&mut self, steps: u64, state: &[Vec<Tensor<R>>]) -> Result<()> {
        let own = self.state();
        count("tensors of the optimiser's state", state.len(), own.len())?;
        for ((name, own), pages) in own.iter().zip(state) {
            count("pages of the optimiser's state", pages.len(), own.len())?;
            for (own, page) in own.iter().zip(pages) {
                check(own.client(), page, name, own.shape(), f32_storage())?;
            }
        }
        for (at, page) in self.pages.iter_mut().enumerate() {
            let tensors: Vec<_> = state.iter().map(|pages| &pages[at]).collect();
            *page = page.of(&tensors);
        }
        self.steps = steps;
        Ok(())
    }

    /// Checks what [`step`](Self::step) checks, and changes nothing: where this is `Ok`, so is the step.
    ///
    /// # Errors
    /// Those of [`step`](Self::step).
    pub fn check(
        &self,
        client: &ComputeClient<R>,
        table: &[Tensor<R>],
        gradients: &RowGradients<R>,
        step: &Step<'_, R>,
    ) -> Result<()> {
        self.updates(client, table, gradients, step).map(drop)
    }

    /// Updates the used rows of a table, in place where nobody else holds its buffers. Enqueues and returns. A step of no used rows is counted.
    ///
    /// - `table`: its pages in their order, `[rows of the page, width]` each, f32, f16 or bf16
    ///
    /// # Errors
    /// Shapes, types or sizes that don't fit, or a number that is not finite; nothing is launched and no step is counted then.
    pub fn step(
        &mut self,
        client: &ComputeClient<R>,
        table: &mut [Tensor<R>],
        gradients: &RowGradients<R>,
        step: &Step<'_, R>,
    ) -> Result<()> {
        self.check(client, table, gradients, step)?;
        let state = self.pages.iter_mut().flat_map(State::tensors_mut);
        make_own(client, table.iter_mut().chain(state))?;
        let updates = self.updates(client, table, gradients, step)?;
        let steps = self.steps.saturating_add(1);
        if gradients.rows.shape()[0] == 0 {
            self.steps = steps;
            return Ok(());
        }
        for (update, state) in updates.iter().zip(&self.pages) {
            match (self.rule, state) {
                (Rule::Adagrad { eps }, State::Squares(squares)) => adagrad::launch(update, eps, squares)?,
                (Rule::Adam { .. }, State::Moments(first, second)) => {
                    adam::launch(update, &self.rule, steps, first, second)?;
                }
                (Rule::Sgd { momentum }, State::Momentum(state)) => sgd::launch(update, momentum, Some(state))?,
                _ => sgd::launch(update, 0.0, None)?,
            }
        }
        self.steps = steps;
        Ok(())
    }

    /// The checked updates of the pages.
    fn updates<'a>(
        &self,
        client: &'a ComputeClient<R>,
        table: &'a [Tensor<R>],
        gradients: &'a RowGradients<R>,
        step: &'a Step<'a, R>,
    ) -> Result<Vec<Update<'a, R>>> {
        count("pages of the table", table.len(), self.pages.len())?;
        let key = self.rounding.key(self.steps.saturating_add(1));
        let pages = table.iter().zip(windows(table)).zip(&self.pages);
        let checked = |((table, window), state): ((&'a Tensor<R>, Window), &State<R>)| {
            let update = Update::check(client, table, window, gradients, step, &self.rule, key)?;
            for (name, tensor) in state.tensors() {
                check(client, tensor, name, &self.rule.state_shape(update.rows, update.width), f32_storage())?;
            }
            Ok(update)
        };
        pages.map(checked).collect()
    }
}

/// Copies each of the tensors whose buffer somebody else holds, too.
fn make_own<'a, R: Runtime>(client: &ComputeClient<R>, tensors: impl Iterator<Item = &'a mut Tensor<R>>) -> Result<()> {
    // The device's own hold on a buffer counts from when its allocation was carried out.
    client.flush().map_err(|error| Error::Device { reason: format!("{error:?}").chars().take(300).collect() })?;
    for tensor in tensors.filter(|tensor| !tensor.handle.can_mut()) {
        let bytes = tensor.shape().iter().product::<usize>() * tensor.dtype.size();
        tracing::debug!(bytes, "a shared buffer is copied before its update");
        *tensor = Tensor::new(client, into_contiguous(client, tensor.binding(), tensor.dtype));
    }
    Ok(())
}

fn count(what: &'static str, found: usize, expected: usize) -> Result<()> {
    let (value, expected) = (found as u64, expected as u64);
    if value == expected { Ok(()) } else { Err(Error::Number { what, value, expected }) }
}

/// The checked arguments of a page's step.
struct Update<'a, R: Runtime> {
    client: &'a ComputeClient<R>,
    device: Device,
    table: &'a Tensor<R>,
    gradients: &'a RowGradients<R>,
    step: &'a Step<'a, R>,
    /// The page's first row in the table, and its rows.
    first_row: usize,
    rows: usize,
    width: usize,
    /// Numbers of a vector.
    vector: usize,
    /// Stirred from the rounding's seed and the step.
    key: u32,
    plans: StepPlans,
    plan: UpdatePlan,
}

/// The sizes of an optimiser's step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepSizes {
    /// Rows that the gradients list at most.
    pub rows: usize,
    /// Width of a row.
    pub width: usize,
    /// Pages of the table.
    pub pages: usize,
}

/// The launches of an optimiser's step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepPlans {
    /// Numbers of a vector.
    vector: usize,
    /// Adds to the accumulators of one page's rows, by [`Rule::Adagrad`].
    pub accumulate: Option<Launch>,
    /// Updates the rows of one page.
    pub update: Launch,
    /// Pages, each with launches of its own.
    pub pages: usize,
}

impl StepPlans {
    /// Plans a step by `rule`: a unit for each vector of every row that can be listed.
    ///
    /// # Errors
    /// Sizes that don't fit the device.
    pub fn of(device: &Device, rule: &Rule, sizes: &StepSizes) -> Result<Self> {
        let StepSizes { rows, width, pages } = *sizes;
        positive(&[("width of the row gradients", width), ("pages of the table", pages)])?;
        let vector = device.width(4, &[width]);
        let vectors = width / vector;
        let kernel = match rule {
            Rule::Sgd { .. } => "sgd_kernel",
            Rule::Adagrad { .. } => "adagrad_kernel",
            Rule::Adam { .. } => "adam_kernel",
        };
        let update = Launch::flat(device, kernel, rows.saturating_mul(vectors), 0);
        let adagrad = matches!(rule, Rule::Adagrad { .. });
        let accumulate = adagrad.then(|| adagrad::accumulating(device, rows, vectors, update.units));
        let plans = Self { vector, accumulate, update, pages };
        check_all("update", device, &plans.of_page())?;
        Ok(plans)
    }

    /// The launches in their order.
    pub fn launches(&self) -> Vec<Launch> {
        self.of_page().repeat(self.pages)
    }

    fn of_page(&self) -> Vec<Launch> {
        self.accumulate.into_iter().chain([self.update]).collect()
    }
}

/// What is fixed when the kernels are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct UpdatePlan {
    /// Vectors of a row.
    pub vectors: usize,
    pub masked: bool,
    /// Bits of an f32's mantissa that the table's type lacks, where they are rounded stochastically; else 0.
    pub dropped: u32,
    pub units: usize,
}

impl<'a, R: Runtime> Update<'a, R> {
    fn check(
        client: &'a ComputeClient<R>,
        table: &'a Tensor<R>,
        window: Window,
        gradients: &'a RowGradients<R>,
        step: &'a Step<'a, R>,
        rule: &Rule,
        key: Option<u32>,
    ) -> Result<Self> {
        let (_, width) = gradients.check(client)?;
        let Window { first_row, rows, all_rows } = window;
        index("rows of the table", all_rows)?;
        gradients.check_table(all_rows)?;
        let dtype = float_type(client, table, "table")?;
        check(client, table, "table", &[rows, width], table.dtype)?;
        in_range("learning_rate", step.learning_rate, step.learning_rate.is_finite(), "a finite number")?;
        in_range("scale", step.scale, step.scale.is_finite(), "a finite number")?;
        if let Some(mask) = step.mask {
            check(client, mask, "mask", &[all_rows.div_ceil(32)], u32_storage())?;
        }
        let device = Device::of(client);
        let plans = StepPlans::of(&device, rule, &StepSizes { rows: gradients.rows.shape()[0], width, pages: 1 })?;
        let (vector, units) = (plans.vector, plans.update.units);
        let dropped = key.map_or(0, |_| rounding::dropped(dtype));
        let plan = UpdatePlan { vectors: width / vector, masked: step.mask.is_some(), dropped, units };
        let key = key.unwrap_or(0);
        Ok(Self { client, device, table, gradients, step, first_row, rows, width, vector, key, plans, plan })
    }

    fn mask(&self) -> ArrayArg<R> {
        // SAFETY: a step checks its mask, and `RowGradients` is made of rows that are checked.
        unsafe { arg(self.step.mask.unwrap_or(&self.gradients.rows), 1) }
    }
}

/// A listed row of a page, and whether it may change.
#[derive(CubeType, Clone, Copy)]
struct Listed {
    row: usize,
    changes: bool,
}

/// Row `place` of the list, as a row of the page: none past `count`, in another page or masked out.
#[cube]
fn listed(
    rows: &Array<u32>,
    count: &Array<u32>,
    mask: &Array<u32>,
    place: usize,
    first_row: u32,
    page_rows: u32,
    #[comptime] plan: UpdatePlan,
) -> Listed {
    let mut row = 0u32;
    let mut changes = false;
    if place < min(count[0] as usize, rows.len()) {
        let listed = rows[place];
        let page = Page { first_row, rows: page_rows };
        row = page.place(listed);
        changes = row < page.rows;
        if plan.masked {
            let word = min(listed as usize / 32, mask.len() - 1);
            changes = changes && (mask[word] >> (listed % 32)) % 2 == 1;
        }
    }
    Listed { row: row as usize, changes }
}
