//! Device memory of one call, beyond weights, input and output.

use cubecl::prelude::*;
use ultramem_kernels::{expand::ExpandStrategy, score::candidates};

use crate::{MemoryLayer, Strategies};

/// Bytes of an f32 or of a u32.
const WORD: usize = 4;

impl<R: Runtime> MemoryLayer<R> {
    /// Bytes that [`forward_with`](Self::forward_with) allocates for `tokens` tokens besides its output. Bytes per token,
    /// with `c` the [`candidates`] of a side:
    ///
    /// | what | bytes per token | when |
    /// |---|---|---|
    /// | queries | `4 · query_heads · 2 · key_dim` | |
    /// | candidates: key and score | `8 · heads · 2 · c` | scores are split |
    /// | kept keys and scores | `4 · heads · 2 · top_m · (1 + tucker_rank)` | |
    /// | slots and scores | `4 · heads · top_m · (1 + cores)` | |
    /// | gate | `4 · value_dim` | Memory+ |
    /// | pooled values | element size · `expansion · value_dim`; in f32 for a table of several pages | values are pooled |
    ///
    /// Slots and scores live as long as the [`Forward`](crate::Forward) that holds them, the others as long as the call. The
    /// allocator rounds each of these at most eight buffers up to its alignment, 256 bytes on most devices, and keeps what it
    /// has reserved for the next call.
    pub fn workspace_bytes(&self, tokens: usize, strategies: Strategies) -> usize {
        let config = self.config();
        let candidates = candidates(config.side_keys, config.top_m, strategies.score);
        let queries = WORD * config.query_heads() * 2 * config.key_dim;
        let candidates = 2 * WORD * config.heads * 2 * candidates;
        let kept = WORD * config.heads * 2 * config.top_m * (1 + config.tucker_rank);
        let chosen = WORD * config.heads * config.top_m * (1 + config.cores);
        let gate = if config.capabilities.gated { WORD * config.value_dim } else { 0 };
        let pooled = match strategies.expand {
            ExpandStrategy::Fused => 0,
            ExpandStrategy::Pooled(_) if self.table().pages().len() > 1 => WORD * config.pooled_dim(),
            ExpandStrategy::Pooled(_) => self.dtype().size() * config.pooled_dim(),
        };
        tokens.saturating_mul(queries + candidates + kept + chosen + gate + pooled)
    }
}
