//! Query: the linear map from hidden states to queries, `W_q x` (the norm is fused into [`score`](crate::score)).
//!
//! Shapes: input `[tokens, hidden_size]`, weight `[hidden_size, query_heads · 2 · key_dim]` (the transpose of PyTorch's `Linear.weight`), output
//! `[tokens, query_heads · 2 · key_dim]`. Backwards, the same map through its transpose, for a gate beside it too.

mod backward;

use cubecl::prelude::*;

pub use self::backward::{Map, QueryGradients, query_backward};
use crate::Result;
use crate::launch::tensor::{Tensor, f32_storage};
use crate::linear::{ProjectStrategy, project};

/// Launches `query = input · weight`.
///
/// - `input` `[tokens, hidden_size]`, f32, f16 or bf16
/// - `weight` `[hidden_size, query_heads · 2 · key_dim]`, the same type
/// - returns `[tokens, query_heads · 2 · key_dim]` f32
///
/// # Errors
/// Shapes, types or sizes that don't fit; nothing is launched then.
pub fn query<R: Runtime>(
    client: &ComputeClient<R>,
    input: &Tensor<R>,
    weight: &Tensor<R>,
    strategy: ProjectStrategy,
) -> Result<Tensor<R>> {
    project(client, input, weight, f32_storage(), strategy)
}
