//! Which keys and slots all tokens choose: the oracle's, so that rows are as popular as the layer makes them.

use std::collections::HashMap;

use ultramem::kernels::Tensor;
use ultramem::{Error, MemoryLayer, Result, Saved, reference};

use super::{Counting, Subject};
use crate::OfflineRuntime;

/// What every token chooses.
#[derive(Debug, Clone, Default)]
pub struct Choices {
    /// `[tokens, heads, 2, top_m]`.
    keys: Vec<u32>,
    /// `[tokens, heads, 2, top_m, tucker_rank]`.
    key_scores: Vec<f32>,
    /// `[tokens, heads, top_m]`.
    slots: Vec<u32>,
    /// `[tokens, heads, top_m, cores]`.
    scores: Vec<f32>,
}

/// How often slots are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Popularity {
    /// Choices: tokens times heads times slots of a head.
    pub entries: usize,
    /// Slots that are chosen at all.
    pub slots: usize,
    /// Choices of the slot that is chosen most.
    pub most: usize,
}

/// Tokens that the oracle takes at once: it keeps the scores of all their keys.
const AT_ONCE: usize = 256;

impl Subject<'_> {
    /// The choices of all tokens.
    ///
    /// # Errors
    /// Weights or an input that do not fit the configuration.
    pub fn choices(&self) -> Result<Choices> {
        self.tokens()?;
        let narrow = |numbers: Vec<f64>| numbers.into_iter().map(|x| x as f32);
        let mut choices = Choices::default();
        let (config, weights) = (self.config, self.weights);
        for tokens in self.input.chunks(AT_ONCE * config.hidden_size) {
            let query = reference::query(config, weights, tokens)?;
            let kept = reference::score(config, weights, &query)?;
            let chosen = reference::combine(config, weights, &kept)?;
            choices.keys.extend(kept.keys);
            choices.key_scores.extend(narrow(kept.scores));
            choices.slots.extend(chosen.slots);
            choices.scores.extend(narrow(chosen.scores));
        }
        Ok(choices)
    }
}

impl Choices {
    /// How often slots are chosen.
    pub fn popularity(&self) -> Popularity {
        let mut times: HashMap<u32, usize> = HashMap::new();
        self.slots.iter().for_each(|&slot| *times.entry(slot).or_default() += 1);
        Popularity { entries: self.slots.len(), slots: times.len(), most: times.values().copied().max().unwrap_or(0) }
    }

    /// The same choices, but that every token's first slot of each of `heads` heads is `slot`: a row, and two keys of each head, that all choose.
    #[must_use]
    pub fn choosing(mut self, slot: u32, heads: usize, top_m: usize) -> Self {
        self.slots.chunks_exact_mut(heads * top_m).for_each(|token| {
            token.iter_mut().step_by(top_m).for_each(|first| *first = slot);
        });
        self
    }

    /// What a forward pass leaves for the backward pass: these choices, and beside them memory that nobody has written. Nothing may run.
    pub(super) fn saved(
        &self,
        counting: &Counting<'_>,
        layer: &MemoryLayer<OfflineRuntime>,
        input: &Tensor<OfflineRuntime>,
    ) -> Result<Saved<OfflineRuntime>> {
        let (forward, saved) = layer.forward_saving(input)?;
        counting.drop_taken()?;
        write(counting, &saved.kept().keys, bytes(&self.keys, u32::to_le_bytes))?;
        write(counting, &saved.kept().scores, bytes(&self.key_scores, f32::to_le_bytes))?;
        write(counting, &forward.chosen.slots, bytes(&self.slots, u32::to_le_bytes))?;
        write(counting, &forward.chosen.scores, bytes(&self.scores, f32::to_le_bytes))?;
        Ok(saved)
    }
}

fn bytes<T: Copy>(numbers: &[T], of: fn(T) -> [u8; 4]) -> Vec<u8> {
    numbers.iter().flat_map(|&number| of(number)).collect()
}

/// Writes a tensor's contents.
fn write(counting: &Counting<'_>, tensor: &Tensor<OfflineRuntime>, bytes: Vec<u8>) -> Result<()> {
    let failed = |error| Error::Device(format!("{error:?}"));
    let expected = tensor.shape().iter().product::<usize>() * tensor.dtype.size();
    reference::length("choices", bytes.len(), expected)?;
    let resource = counting.client.get_resource(tensor.handle.clone()).map_err(failed)?;
    resource.resource().write(0, &bytes);
    Ok(())
}
