//! A run's folder: `settings.json`, `log.jsonl`, and the last checkpoint, `checkpoint-STEP/`.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
};

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::{Result, model::Sizes};

/// What a run is made of. A run can only be continued with the settings that it began with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Args)]
pub struct Settings {
    #[command(flatten)]
    #[serde(flatten)]
    pub sizes: Sizes,
    /// Rows of a batch
    #[arg(long, default_value_t = 16)]
    pub batch: usize,
    /// Steps of the whole run
    #[arg(long, default_value_t = 1500)]
    pub steps: usize,
    /// Steps in which the learning rate rises
    #[arg(long, default_value_t = 50)]
    pub warmup: usize,
    /// The highest learning rate
    #[arg(long, default_value_t = 1e-3)]
    pub learning_rate: f64,
    /// Weight decay of everything but the values
    #[arg(long, default_value_t = 0.01)]
    pub weight_decay: f32,
    /// The gradient's norm is clipped to this
    #[arg(long, default_value_t = 1.0)]
    pub clip: f32,
    /// Gives the first weights and the batches
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Steps between two checkpoints
    #[arg(long, default_value_t = 50)]
    pub checkpoint_every: usize,
    /// Steps between two validations
    #[arg(long, default_value_t = 250)]
    pub validate_every: usize,
    /// Windows of the validation text that are read, at most
    #[arg(long, default_value_t = usize::MAX)]
    pub windows: usize,
}

/// A line of the log.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Line {
    /// Steps that were done.
    pub step: usize,
    /// The mean loss of the step's batch before the step, in nats per byte.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f32>,
    /// The gradient's norm before it was clipped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gradient_norm: Option<f32>,
    /// The mean loss on the validation text after the step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<f32>,
    /// How long that took.
    pub seconds: f64,
}

/// An open run.
pub struct Run {
    folder: PathBuf,
    log: File,
}

impl Run {
    /// Opens the run in `folder`, or begins it. What the log holds after the last checkpoint is cut off.
    pub fn open(folder: &Path, settings: &Settings) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let path = folder.join("settings.json");
        if path.exists() {
            let found = Self::settings(folder)?;
            if found != *settings {
                return Err(format!("{} was begun with other settings: {}", folder.display(), json(&found)?).into());
            }
        } else {
            replace(&path, json(settings)?.as_bytes())?;
        }
        let path = folder.join("log.jsonl");
        let done = checkpoint(folder)?.map_or(0, |(step, _)| step);
        let kept: Vec<_> = Self::log(folder)?.into_iter().filter(|line| line.step <= done).collect();
        let text = kept.iter().map(|line| Ok(json(line)? + "\n")).collect::<Result<String>>()?;
        replace(&path, text.as_bytes())?;
        Ok(Self { folder: folder.into(), log: OpenOptions::new().append(true).open(&path)? })
    }

    /// The settings of the run in `folder`.
    pub fn settings(folder: &Path) -> Result<Settings> {
        let path = folder.join("settings.json");
        let file = File::open(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        serde_json::from_reader(BufReader::new(file)).map_err(|error| format!("{}: {error}", path.display()).into())
    }

    /// The whole lines of the log in `folder`. The last one may be half written.
    pub fn log(folder: &Path) -> Result<Vec<Line>> {
        let Ok(file) = File::open(folder.join("log.jsonl")) else { return Ok(Vec::new()) };
        let lines: Vec<String> = BufReader::new(file).lines().collect::<std::io::Result<_>>()?;
        Ok(lines.iter().map_while(|line| serde_json::from_str(line).ok()).collect())
    }

    /// Adds a line to the log.
    pub fn write(&mut self, line: &Line) -> Result<()> {
        Ok(self.log.write_all((json(line)? + "\n").as_bytes())?)
    }

    /// Makes `checkpoint-STEP` with what `write` puts into the folder that it is given, then removes older ones. A
    /// checkpoint is whole or not there.
    pub fn save(&self, step: usize, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let partial = self.folder.join("partial");
        if partial.exists() {
            fs::remove_dir_all(&partial)?;
        }
        fs::create_dir(&partial)?;
        write(&partial)?;
        let whole = self.folder.join(format!("{CHECKPOINT}{step:06}"));
        fs::rename(&partial, &whole)?;
        for (_, old) in checkpoints(&self.folder)?.into_iter().filter(|(_, path)| *path != whole) {
            fs::remove_dir_all(old)?;
        }
        Ok(())
    }
}

/// The step and the folder of the last checkpoint.
pub fn checkpoint(folder: &Path) -> Result<Option<(usize, PathBuf)>> {
    Ok(checkpoints(folder)?.into_iter().max())
}

const CHECKPOINT: &str = "checkpoint-";

fn checkpoints(folder: &Path) -> Result<Vec<(usize, PathBuf)>> {
    let entries = fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let step = |path: &Path| path.file_name()?.to_str()?.strip_prefix(CHECKPOINT)?.parse().ok();
    Ok(paths.into_iter().filter_map(|path| Some((step(&path)?, path))).collect())
}

fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let partial = path.with_extension("partial");
    fs::write(&partial, bytes)?;
    Ok(fs::rename(partial, path)?)
}

fn json(value: &impl Serialize) -> Result<String> {
    Ok(serde_json::to_string(value)?)
}
