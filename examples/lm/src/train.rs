//! `lm train`.

use std::{path::Path, time::Instant};

use burn::{
    backend::Autodiff,
    module::{AutodiffModule, Module},
    prelude::*,
    record::{FullPrecisionSettings, NamedMpkFileRecorder},
};
use indicatif::{ProgressBar, ProgressStyle};
use ultramem::burn::MemoryBackend;

use crate::{
    Result,
    data::{Batch, Text},
    model::Model,
    optimiser::Optimiser,
    run::{self, Line, Run, Settings},
};

/// Trains until all steps are done. Continues at the last checkpoint, if there is one.
pub fn train<B: MemoryBackend>(folder: &Path, settings: Settings) -> Result<()> {
    let device = Default::default();
    let mut run = Run::open(folder, &settings)?;
    let text = Text::load()?;
    let validation = text.validation(settings.batch, settings.sizes.context, settings.windows);
    Autodiff::<B>::seed(&device, settings.seed);
    let mut model = Model::<Autodiff<B>>::new(&settings.sizes, &device)?;
    let mut optimiser = Optimiser::new(&settings);
    let mut first = 0;
    if let Some((step, checkpoint)) = run::checkpoint(folder)? {
        model = load(model, &checkpoint, &device)?;
        optimiser = optimiser.load(&checkpoint, &device)?;
        first = step;
    }
    let bar = bar(settings.steps, first);
    for step in first..settings.steps {
        let start = Instant::now();
        let batch = text.batch(settings.seed, step, settings.batch, settings.sizes.context);
        let loss = model.loss(&batch, &device);
        let (next, report) = optimiser.step(model, loss.backward())?;
        model = next;
        let (loss, norm) = (loss.into_scalar().elem::<f32>(), report.gradient_norm);
        if !report.done {
            return Err(format!("step {step}: loss {loss}, gradient norm {norm}").into());
        }
        let done = step + 1;
        let seconds = start.elapsed().as_secs_f64();
        run.write(&Line { step: done, loss: Some(loss), gradient_norm: Some(norm), validation: None, seconds })?;
        let tokens = (settings.batch * settings.sizes.context) as f64 / seconds;
        bar.set_message(format!("loss {loss:.3}  {tokens:.0} tokens/s"));
        bar.set_position(done as u64);
        if done % settings.validate_every == 0 || done == settings.steps {
            let start = Instant::now();
            let loss = mean_loss(&model.valid(), &validation, &device);
            let seconds = start.elapsed().as_secs_f64();
            run.write(&Line { step: done, loss: None, gradient_norm: None, validation: Some(loss), seconds })?;
            bar.println(format!("step {done}: validation loss {loss:.4} nats per byte"));
        }
        if done % settings.checkpoint_every == 0 || done == settings.steps {
            run.save(done, |folder| {
                model.clone().save_file(folder.join("model"), &recorder())?;
                optimiser.save(folder)
            })?;
        }
    }
    bar.finish();
    Ok(())
}

/// Reads the weights of a checkpoint into `model`.
pub fn load<B: MemoryBackend>(model: Model<B>, checkpoint: &Path, device: &B::Device) -> Result<Model<B>> {
    Ok(model.load_file(checkpoint.join("model"), &recorder(), device)?)
}

/// The settings and the model of a run, as its last checkpoint has it.
pub fn open<B: MemoryBackend>(folder: &Path, device: &B::Device) -> Result<(Settings, Model<B>)> {
    let settings = Run::settings(folder)?;
    let Some((_, checkpoint)) = run::checkpoint(folder)? else {
        return Err(format!("{} holds no checkpoint yet", folder.display()).into());
    };
    let model = load(Model::new(&settings.sizes, device)?, &checkpoint, device)?;
    Ok((settings, model))
}

/// The mean loss of the batches, weighted by their rows.
fn mean_loss<B: MemoryBackend>(model: &Model<B>, batches: &[Batch], device: &B::Device) -> f32 {
    let rows: usize = batches.iter().map(|batch| batch.rows.len()).sum();
    let loss = |batch: &Batch| model.loss(batch, device).into_scalar().elem::<f32>() * batch.rows.len() as f32;
    let sum: f32 = batches.iter().map(loss).sum();
    sum / rows as f32
}

fn recorder() -> NamedMpkFileRecorder<FullPrecisionSettings> {
    NamedMpkFileRecorder::new()
}

fn bar(steps: usize, first: usize) -> ProgressBar {
    let bar = ProgressBar::new(steps as u64).with_position(first as u64);
    if let Ok(style) = ProgressStyle::with_template("{wide_bar} step {pos} of {len}  {msg}  {eta} left") {
        bar.set_style(style);
    }
    bar.reset_eta();
    bar
}
