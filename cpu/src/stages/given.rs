//! What the stages are given, checked: slices for one number of tokens, and keys, slots and places of this layer.

use crate::shape::{number, whole_rows};
use crate::{Error, Place, Result, Shape};

/// How many tokens a stage is given.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Given<'a> {
    shape: &'a Shape,
    tokens: usize,
}

impl<'a> Given<'a> {
    /// As many tokens as there are rows of `width`.
    pub fn rows(
        shape: &'a Shape,
        what: &'static str,
        count: usize,
        width_name: &'static str,
        width: usize,
    ) -> Result<Self> {
        Ok(Self { shape, tokens: whole_rows(what, count, width_name, width)? })
    }

    /// As many tokens as the input `[tokens, hidden_size]` has.
    pub fn input(shape: &'a Shape, input: &[f32]) -> Result<Self> {
        Self::rows(shape, "numbers of input", input.len(), "hidden_size", shape.hidden_size)
    }

    /// So many numbers, `width` a token.
    pub fn numbers(&self, what: &'static str, count: usize, width: usize) -> Result<()> {
        number(what, count, self.tokens * width)
    }

    /// Kept keys: each row ascending, and its scores.
    pub fn kept(&self, keys: &[u32], scores: &[f32]) -> Result<()> {
        let sides = self.shape.heads * 2 * self.shape.top_m;
        self.numbers("kept keys", keys.len(), sides)?;
        self.numbers("scores of kept keys", scores.len(), sides * self.shape.tucker_rank)?;
        below("a kept key", keys.iter().copied(), "side_keys", self.shape.side_keys)?;
        match keys.chunks(self.shape.top_m).find(|row| !row.is_sorted_by(|a, b| a < b)) {
            Some(row) => {
                let expected = "ascending keys, each once";
                Err(Error::Range { what: "kept keys of a side", value: format!("{row:?}"), expected })
            }
            None => Ok(()),
        }
    }

    /// Chosen slots and their scores.
    pub fn chosen(&self, slots: &[u32], scores: &[f32]) -> Result<()> {
        self.slots(slots)?;
        self.scores(scores)
    }

    /// Chosen slots.
    pub fn slots(&self, slots: &[u32]) -> Result<()> {
        self.numbers("chosen slots", slots.len(), self.shape.entries())?;
        below("a slot", slots.iter().copied(), "side_keys squared", self.shape.side_keys * self.shape.side_keys)
    }

    /// Numbers for each core of each chosen slot.
    pub fn scores(&self, scores: &[f32]) -> Result<()> {
        self.numbers("scores of chosen slots", scores.len(), self.shape.entries() * self.shape.cores)
    }

    /// Places of chosen slots in the table.
    pub fn places(&self, places: &[Place]) -> Result<()> {
        self.numbers("places of slots", places.len(), self.shape.entries())?;
        below("a row", places.iter().map(|place| place.row), "rows of the table", self.shape.table_rows)?;
        below("a block", places.iter().map(|place| place.block), "pooled_blocks", self.shape.pooled_blocks)
    }

    /// Slots whose two keys are kept ones of their head.
    pub fn slots_of_kept(&self, kept: &[u32], slots: &[u32]) -> Result<()> {
        let (m, n) = (self.shape.top_m, self.shape.side_keys as u32);
        for (keys, slots) in kept.chunks_exact(2 * m).zip(slots.chunks_exact(m)) {
            let (rows, columns) = keys.split_at(m);
            let is_kept =
                |&&slot: &&u32| rows.binary_search(&(slot / n)).is_ok() && columns.binary_search(&(slot % n)).is_ok();
            if let Some(slot) = slots.iter().find(|slot| !is_kept(slot)) {
                let value = format!("{slot}, of row key {} and column key {}", slot / n, slot % n);
                return Err(Error::Range { what: "a chosen slot", value, expected: "a pair of kept keys" });
            }
        }
        Ok(())
    }
}

/// Every one is below `limit`.
fn below(what: &'static str, values: impl Iterator<Item = u32>, limit_name: &'static str, limit: usize) -> Result<()> {
    match values.max() {
        Some(largest) if largest as usize >= limit => {
            let (value, limit) = (u64::from(largest), limit as u64 - 1);
            Err(Error::Exceeds { what, value, limit_name, limit })
        }
        _ => Ok(()),
    }
}
