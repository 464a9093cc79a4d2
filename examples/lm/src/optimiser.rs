//! The library's trainer at a learning rate that rises and falls, and its state in a checkpoint.

use std::{f64::consts::PI, path::Path};

use burn::{
    record::{FullPrecisionSettings, NamedMpkFileRecorder, Recorder},
    tensor::backend::AutodiffBackend,
};
use ultramem::burn::{MemoryBackend, StepReport, Trainer, TrainerConfig};

use crate::{Result, model::Model, run::Settings};

/// The optimiser and its state.
pub struct Optimiser<B: MemoryBackend + AutodiffBackend> {
    settings: Settings,
    trainer: Trainer<B, Model<B>>,
}

impl<B: MemoryBackend + AutodiffBackend> Optimiser<B>
where
    B::InnerBackend: MemoryBackend<Engine = B::Engine>,
{
    /// An optimiser that has made no step.
    pub fn new(settings: &Settings) -> Self {
        let config = TrainerConfig::new(settings.steps).with_beta_1(0.9).with_beta_2(0.95);
        let config = config.with_weight_decay(settings.weight_decay).with_clip(settings.clip);
        Self { trainer: Trainer::new(config), settings: settings.clone() }
    }

    /// One step.
    pub fn step(&mut self, model: Model<B>, gradients: B::Gradients) -> Result<(Model<B>, StepReport)> {
        let rate = learning_rate(&self.settings, self.trainer.steps());
        self.trainer.step(rate, model, gradients).map_err(|refused| refused.error.into())
    }

    /// Writes the state into `folder`.
    pub fn save(&self, folder: &Path) -> Result<()> {
        Ok(Recorder::<B>::record(&recorder(), self.trainer.to_record(), folder.join("optimiser"))?)
    }

    /// Reads the state from `folder`.
    pub fn load(self, folder: &Path, device: &B::Device) -> Result<Self> {
        let record = Recorder::<B>::load(&recorder(), folder.join("optimiser"), device)?;
        Ok(Self { trainer: self.trainer.load_record(record)?, ..self })
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

fn recorder() -> NamedMpkFileRecorder<FullPrecisionSettings> {
    NamedMpkFileRecorder::new()
}
