//! Training on the device: the value table's own optimiser, and the way of both into files and back.
//!
//! ```no_run
//! use cubecl::prelude::*;
//! use ultramem::kernels::optimiser::{Rule, Step};
//! use ultramem::{Checkpoint, MemoryLayer, Tensor};
//!
//! # fn train<R: Runtime>(layer: &mut MemoryLayer<R>, input: Tensor<R>, grad_output: Tensor<R>) -> ultramem::Result<()> {
//! let rule = Rule::Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, decoupled: true };
//! let mut optimiser = layer.value_optimiser(rule)?;
//! let (_, saved) = layer.forward_saving(&input)?;
//! let gradients = layer.backward(&input, &saved, &grad_output)?;
//! layer.update_values(&mut optimiser, &gradients.values, &Step::new(1e-3))?;
//! # Ok(())
//! # }
//! ```

use cubecl::prelude::*;
use ultramem_kernels::optimiser::{Optimiser, Rule, Step};
use ultramem_kernels::{ElementType, RowGradients, Tensor};

use super::forward::missing;
use crate::table::{cut, upload};
use crate::{Checkpoint, Error, HostTensor, MemoryLayer, PerWeight, Result, ValueTable, Weight, Weights};

/// Where a file keeps the state of the table's optimiser: a tensor for each name of [`Optimiser::state`], and a metadata entry.
const STATE: &str = "optimiser.values.";
const STEPS: &str = "optimiser.values.steps";

/// An optimiser's state as a file keeps it.
#[derive(Debug, Clone, PartialEq)]
pub struct SavedState {
    /// The tensors by name, f32.
    pub tensors: Vec<(String, HostTensor<'static>)>,
    /// The metadata entry that goes with them: how many steps were taken.
    pub metadata: (String, String),
}

impl<R: Runtime> MemoryLayer<R> {
    /// An optimiser for the value table, its state zeros.
    ///
    /// # Errors
    /// A number of the rule that makes no sense, or a page's state, in f32, larger than one binding of the device:
    /// [`ValueTable::upload_in_pages`](crate::ValueTable::upload_in_pages) makes smaller pages.
    pub fn value_optimiser(&self, rule: Rule) -> Result<Optimiser<R>> {
        Ok(Optimiser::new(&self.client, rule, &self.weights.values.page_rows(), self.config.value_dim)?)
    }

    /// An optimiser for the pre-values, its state zeros.
    ///
    /// # Errors
    /// A layer without pre-values; else as [`value_optimiser`](Self::value_optimiser).
    pub fn pre_value_optimiser(&self, rule: Rule) -> Result<Optimiser<R>> {
        let table = self.weights.pre_values.as_ref().ok_or_else(|| missing(Weight::PreValues))?;
        Ok(Optimiser::new(&self.client, rule, &table.page_rows(), self.config.pre_dim)?)
    }

    /// Updates the used rows of the value table, in place where nobody else holds it: a page that a clone of the table or of the weights
    /// holds, too, is copied first, once, and the clone stays as it was. Enqueues and returns.
    ///
    /// # Errors
    /// Gradients or an optimiser of another table.
    pub fn update_values(
        &mut self,
        optimiser: &mut Optimiser<R>,
        gradients: &RowGradients<R>,
        step: &Step<'_, R>,
    ) -> Result<()> {
        Ok(optimiser.step(&self.client, self.weights.values.pages_mut(), gradients, step)?)
    }

    /// [`update_values`](Self::update_values), of the pre-values.
    ///
    /// # Errors
    /// As [`update_values`](Self::update_values), and a layer without pre-values.
    pub fn update_pre_values(
        &mut self,
        optimiser: &mut Optimiser<R>,
        gradients: &RowGradients<R>,
        step: &Step<'_, R>,
    ) -> Result<()> {
        let table = self.weights.pre_values.as_mut().ok_or_else(|| missing(Weight::PreValues))?;
        Ok(optimiser.step(&self.client, table.pages_mut(), gradients, step)?)
    }

    /// Downloads the weights as they are now, for a checkpoint. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Device`] if the device failed in what was enqueued before.
    pub fn read_weights(&self) -> Result<Weights<'static>> {
        let weights = &self.weights;
        let mut tensors = PerWeight::default();
        for weight in Weight::ALL {
            let read = match weight {
                Weight::Values => Some(self.read_pages(weights.values.pages())?),
                Weight::PreValues => {
                    weights.pre_values.as_ref().map(|table| self.read_pages(table.pages())).transpose()?
                }
                _ => weights.get(weight).map(|tensor| self.read_tensor(tensor)).transpose()?,
            };
            let shaped = |tensor: HostTensor<'static>| {
                HostTensor::new(weight.shape(&self.config), tensor.dtype(), tensor.bytes().to_vec())
            };
            tensors[weight] = read.map(shaped).transpose()?;
        }
        let (core_u, core_v) = match &weights.vectors {
            Some((u, v)) => (self.read(u)?, self.read(v)?),
            None => (Vec::new(), Vec::new()),
        };
        let pages = weights.shuffle.iter().map(|page| self.read_integers(page)).collect::<Result<Vec<_>>>()?;
        let shuffle_index = (!pages.is_empty()).then(|| pages.concat());
        Ok(Weights { tensors, core_u, core_v, shuffle_index })
    }

    /// Downloads pages `[rows of the page, …]` as one tensor.
    fn read_pages<'a>(&self, pages: impl IntoIterator<Item = &'a Tensor<R>>) -> Result<HostTensor<'static>> {
        let pages = pages.into_iter().map(|page| self.read_tensor(page)).collect::<Result<Vec<_>>>()?;
        let [first, others @ ..] = pages.as_slice() else { return Err(Error::Device("a table without pages".into())) };
        if others.is_empty() {
            return Ok(first.clone());
        }
        let mut shape = first.shape().to_vec();
        shape[0] = pages.iter().map(|page| page.shape()[0]).sum();
        let bytes: Vec<&[u8]> = pages.iter().map(HostTensor::bytes).collect();
        HostTensor::new(shape, first.dtype(), bytes.concat())
    }

    /// The optimiser's state for a file, whole whatever pages it has: tensors by name, and the metadata entry that goes with them. Waits
    /// for the device.
    ///
    /// # Errors
    /// [`Error::Device`] if the device failed in what was enqueued before.
    pub fn read_state(&self, optimiser: &Optimiser<R>) -> Result<SavedState> {
        let read = |(name, pages)| Ok((format!("{STATE}{name}"), self.read_pages(pages)?));
        let tensors = optimiser.state().into_iter().map(read).collect::<Result<_>>()?;
        Ok(SavedState { tensors, metadata: (STEPS.to_string(), optimiser.steps().to_string()) })
    }

    /// An optimiser with the state that a file keeps, as [`read_state`](Self::read_state) gave it.
    ///
    /// # Errors
    /// [`Error::Tensor`] or [`Error::Metadata`] if the file keeps no state, or another rule's or table's.
    pub fn restore_state(&self, file: &Checkpoint, rule: Rule) -> Result<Optimiser<R>> {
        let mut optimiser = self.value_optimiser(rule)?;
        let problem = |problem: &str| Error::Metadata { key: STEPS.into(), problem: problem.into() };
        let steps = file.metadata().get(STEPS).ok_or_else(|| problem("is missing"))?;
        let steps = steps.parse().map_err(|_| problem("is no number of steps"))?;
        let names: Vec<_> = optimiser.state().iter().map(|(name, _)| format!("{STATE}{name}")).collect();
        let upload = |name: &String| {
            let tensor = file.tensor(name)?;
            cut(name, &tensor, &self.weights.values.page_rows())?
                .iter()
                .map(|page| upload(&self.client, "state", page, ElementType::F32))
                .collect()
        };
        let state = names.iter().map(upload).collect::<Result<Vec<_>>>()?;
        optimiser.restore(steps, &state)?;
        Ok(optimiser)
    }
}

/// Updates the used rows of a table that `layers` share, the values or the pre-values: the first layer's, by the sum of the layers' gradients, in
/// place where nobody else holds it. All of them have it then. Enqueues and returns.
///
/// # Errors
/// No layer, a layer without such a table, gradients or an optimiser of another table; the tables are as they were then.
pub fn update_shared<R: Runtime>(
    layers: &mut [&mut MemoryLayer<R>],
    table: Weight,
    optimiser: &mut Optimiser<R>,
    gradients: &[RowGradients<R>],
    step: &Step<'_, R>,
) -> Result<()> {
    let [owner, sharing @ ..] = layers else {
        return Err(ultramem_kernels::Error::Zero { what: "layers that share a table" }.into());
    };
    for layer in sharing.iter_mut() {
        layer.table_mut(table)?;
    }
    let client = owner.client.clone();
    let sum = RowGradients::sum(&client, gradients, owner.config.table_rows())?;
    let shared = owner.table_mut(table)?;
    // An update is in place where this is the only hold on the pages.
    let mut held = std::mem::replace(shared, ValueTable::nothing(shared.dtype()));
    let mut others = Vec::new();
    for layer in sharing.iter_mut() {
        let own = layer.table_mut(table)?;
        others.push(std::mem::replace(own, ValueTable::nothing(own.dtype())));
    }
    drop(others);
    let done = optimiser.step(&client, held.pages_mut(), &sum, step);
    for layer in layers {
        *layer.table_mut(table)? = held.clone();
    }
    Ok(done?)
}

impl<R: Runtime> MemoryLayer<R> {
    fn table_mut(&mut self, table: Weight) -> Result<&mut ValueTable<R>> {
        let found = match table {
            Weight::Values => Some(&mut self.weights.values),
            Weight::PreValues => self.weights.pre_values.as_mut(),
            _ => None,
        };
        found.ok_or_else(|| missing(table))
    }
}
