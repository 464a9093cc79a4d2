//! What a step does to the gradients of a model: the auxiliary loss's share, the norm of everything, and clipping.

use burn::{
    module::{ModuleVisitor, Param},
    optim::GradientsParams,
    tensor::{
        Tensor, TensorData,
        backend::{AutodiffBackend, Backend},
    },
};

use super::backend::MemoryBackend;
use super::model::{MemoryModel, read, square_sum};
use super::sparse::SparseTables;
use crate::{Result, Spectrum};

/// The auxiliary loss of all layers, and its gradient, multiplied with `weight`, for the cores that `gradients` has. Waits for the device.
pub(super) fn auxiliary<B: MemoryBackend + AutodiffBackend, M: MemoryModel<B>>(
    model: &mut M,
    gradients: &GradientsParams,
    weight: f64,
) -> Result<(f32, GradientsParams)> {
    let (mut sum, mut found) = (0.0, GradientsParams::new());
    for memory in model.memories() {
        let Some(core) = memory.core.as_ref().filter(|_| memory.config.has_auxiliary_loss()) else { continue };
        let numbers = read(core.cores.val())?;
        let (loss, gradient) = Spectrum::new(&memory.config, &numbers)?.auxiliary_loss(&memory.config);
        sum += loss;
        if let Some(cores) = gradients.get::<B::InnerBackend, 4>(core.cores.id) {
            let gradient: Vec<f32> = gradient.iter().map(|g| (g * weight) as f32).collect();
            let data = TensorData::new(gradient, cores.dims());
            found.register(core.cores.id, Tensor::<B::InnerBackend, 4>::from_data(data, &cores.device()));
        }
    }
    Ok((sum as f32, found))
}

/// The norm of `gradients`, `more` added to them, and of the tables' that wait. Waits for the device.
pub(super) fn norm<B: MemoryBackend + AutodiffBackend, M: MemoryModel<B>>(
    model: &M,
    gradients: &GradientsParams,
    more: &GradientsParams,
    tables: &SparseTables<B>,
) -> Result<f32>
where
    B::InnerBackend: MemoryBackend<Engine = B::Engine>,
{
    let mut squares = Squares::<B> { gradients, more, sum: None };
    model.visit(&mut squares);
    let sum = squares.sum.into_iter().chain(tables.squares(model)?).reduce(|a, b| a + b);
    let norm = sum.map(|sum| read(sum.sqrt())).transpose()?;
    Ok(norm.and_then(|norm| norm.first().copied()).unwrap_or(0.0))
}

struct Squares<'a, B: AutodiffBackend> {
    gradients: &'a GradientsParams,
    more: &'a GradientsParams,
    sum: Option<Tensor<B::InnerBackend, 1>>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Squares<'_, B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if let Some(gradient) = whole::<B::InnerBackend, D>(param.id, self.gradients, self.more) {
            let square = square_sum(gradient);
            self.sum = Some(match self.sum.take() {
                Some(sum) => sum + square,
                None => square,
            });
        }
    }
}

fn whole<B: Backend, const D: usize>(
    id: burn::module::ParamId,
    gradients: &GradientsParams,
    more: &GradientsParams,
) -> Option<Tensor<B, D>> {
    let gradient = gradients.get::<B, D>(id)?;
    Some(match more.get::<B, D>(id) {
        Some(more) => gradient + more,
        None => gradient,
    })
}

/// Gradients as a step takes them: `more` added, and multiplied with `scale`. Those of the cores, which are needed first, are kept apart.
pub(super) struct Ready<'a> {
    pub(super) gradients: &'a GradientsParams,
    pub(super) more: &'a GradientsParams,
    pub(super) scale: f32,
    /// What the walk gives.
    pub(super) found: GradientsParams,
    /// Which parameters to take.
    pub(super) takes: &'a dyn Fn(burn::module::ParamId) -> bool,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Ready<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if !(self.takes)(param.id) {
            return;
        }
        if let Some(gradient) = whole::<B::InnerBackend, D>(param.id, self.gradients, self.more) {
            let gradient = if self.scale < 1.0 { gradient.mul_scalar(self.scale) } else { gradient };
            self.found.register(param.id, gradient);
        }
    }
}
