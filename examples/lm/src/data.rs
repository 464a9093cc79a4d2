//! The text: the King James Bible as bytes, its last 5% kept for validation, and the batches that a step reads.

use std::io::Read;

use flate2::read::GzDecoder;
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::Result;

static KJV: &[u8] = include_bytes!("../data/kjv.txt.gz");

/// The text in its two parts.
pub struct Text {
    /// The first 95%.
    pub train: Vec<u8>,
    /// The last 5%.
    pub validation: Vec<u8>,
}

/// Rows of `context + 1` bytes: all but the last of each row are read, all but the first predicted.
pub struct Batch {
    pub rows: Vec<Vec<u8>>,
}

impl Text {
    /// Unpacks the text that the program carries.
    pub fn load() -> Result<Self> {
        let mut train = Vec::new();
        GzDecoder::new(KJV).read_to_end(&mut train)?;
        let validation = train.split_off(train.len() - train.len() / 20);
        Ok(Self { train, validation })
    }

    /// The batch of step `step`: windows at random places. It hangs on `seed` and `step` alone, so that a run that continues
    /// needs no more than its step.
    pub fn batch(&self, seed: u64, step: usize, size: usize, context: usize) -> Batch {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&(step as u64).to_le_bytes());
        let mut rng = StdRng::from_seed(key);
        let row = |_| {
            let start = rng.random_range(0..self.train.len() - context);
            self.train[start..=start + context].to_vec()
        };
        Batch { rows: (0..size).map(row).collect() }
    }

    /// The validation text in batches of whole windows, one behind the other; `limit` windows at most.
    pub fn validation(&self, size: usize, context: usize, limit: usize) -> Vec<Batch> {
        let starts = (0..).map(|window| window * context).take_while(|start| start + context < self.validation.len());
        let rows: Vec<_> = starts.take(limit).map(|start| self.validation[start..=start + context].to_vec()).collect();
        rows.chunks(size).map(|rows| Batch { rows: rows.to_vec() }).collect()
    }
}
