//! A layer's forward pass, counted: its weights and its hidden states drawn at random.

use ultramem::{ElementType, MemoryConfig, Result, Weights};

use super::Rates;
pub use super::passes::Staged;
use super::passes::{Subject, hidden_states};
use crate::{Adapter, Gpu};

/// What a forward pass over `tokens` tokens launches on a GPU, or where it reports of itself what `adapter` says.
///
/// # Errors
/// An element type that the GPU lacks, tensors too large for it, compilers that are not installed.
pub fn forward(
    config: &MemoryConfig,
    tokens: usize,
    dtype: ElementType,
    gpu: Gpu,
    adapter: Option<Adapter>,
    rates: &Rates,
) -> Result<Vec<Staged>> {
    let weights = Weights::random_without_tables(config, 1);
    let input = hidden_states(config.hidden_size, tokens, 1);
    Subject { config, weights: &weights, input: &input, dtype, invariant: false, gpu, adapter, rates }.forward()
}
