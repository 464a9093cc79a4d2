//! AdamW over all parameters, after the gradient was clipped to a norm, at a learning rate that rises and falls.

use std::{f64::consts::PI, path::Path};

use burn::{
    module::{AutodiffModule, ModuleVisitor, Param},
    optim::{AdamW, AdamWConfig, GradientsParams, Optimizer, adaptor::OptimizerAdaptor},
    prelude::*,
    record::{FullPrecisionSettings, NamedMpkFileRecorder, Recorder},
    tensor::backend::AutodiffBackend,
};

use crate::{Result, model::Model, run::Settings};

/// The optimiser and its state.
pub struct Optimiser<B: AutodiffBackend> {
    settings: Settings,
    adam: OptimizerAdaptor<AdamW, Model<B>, B>,
}

impl<B: AutodiffBackend> Optimiser<B> {
    /// An optimiser that has made no step.
    pub fn new(settings: &Settings) -> Self {
        let config = AdamWConfig::new().with_beta_1(0.9).with_beta_2(0.95).with_epsilon(1e-8);
        Self { adam: config.with_weight_decay(settings.weight_decay).init(), settings: settings.clone() }
    }

    /// Makes step `step`, counted from 0. Also gives the norm of the gradient before it was clipped, on the device.
    pub fn step(
        &mut self,
        step: usize,
        model: Model<B>,
        gradients: B::Gradients,
    ) -> (Model<B>, Tensor<B::InnerBackend, 1>) {
        let mut gradients = GradientsParams::from_grads(gradients, &model);
        let norm = clip(&model, &mut gradients, self.settings.clip);
        (self.adam.step(learning_rate(&self.settings, step), model, gradients), norm)
    }

    /// Writes the state into `folder`.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let recorder = NamedMpkFileRecorder::<FullPrecisionSettings>::new();
        Ok(Recorder::<B>::record(&recorder, self.adam.to_record(), folder.join("optimiser"))?)
    }

    /// Reads the state from `folder`.
    pub fn load(mut self, folder: &Path, device: &B::Device) -> Result<Self> {
        let recorder = NamedMpkFileRecorder::<FullPrecisionSettings>::new();
        self.adam = self.adam.load_record(Recorder::<B>::load(&recorder, folder.join("optimiser"), device)?);
        Ok(self)
    }
}

/// Rises to the highest in `warmup` steps, then falls to a tenth of it along a cosine.
pub fn learning_rate(settings: &Settings, step: usize) -> f64 {
    let (step, warmup) = ((step + 1) as f64, settings.warmup as f64);
    if step <= warmup {
        return settings.learning_rate * step / warmup;
    }
    let part = (step - warmup) / (settings.steps as f64 - warmup);
    settings.learning_rate * (0.1 + 0.45 * (1.0 + (PI * part).cos()))
}

/// Scales the gradients to a norm of at most `limit`, all of them together, and gives the norm that they had.
fn clip<B: AutodiffBackend, M: AutodiffModule<B>>(
    module: &M,
    gradients: &mut GradientsParams,
    limit: f32,
) -> Tensor<B::InnerBackend, 1> {
    let mut squares = Squares { gradients, sum: None };
    module.visit(&mut squares);
    let sum = squares.sum.expect("a model has parameters");
    let norm = sum.sqrt();
    let scale = (norm.clone() + 1e-6).recip().mul_scalar(limit).clamp_max(1.0);
    module.visit(&mut Scale { gradients, scale });
    norm
}

struct Squares<'a, B: AutodiffBackend> {
    gradients: &'a GradientsParams,
    sum: Option<Tensor<B::InnerBackend, 1>>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Squares<'_, B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if let Some(gradient) = self.gradients.get::<B::InnerBackend, D>(param.id) {
            let square = gradient.square().sum();
            self.sum = Some(match self.sum.take() {
                Some(sum) => sum + square,
                None => square,
            });
        }
    }
}

struct Scale<'a, B: AutodiffBackend> {
    gradients: &'a mut GradientsParams,
    scale: Tensor<B::InnerBackend, 1>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Scale<'_, B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if let Some(gradient) = self.gradients.remove::<B::InnerBackend, D>(param.id) {
            self.gradients.register(param.id, gradient * self.scale.clone().reshape([1; D]));
        }
    }
}
