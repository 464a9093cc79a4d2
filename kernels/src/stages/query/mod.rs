//! Query: the linear map from hidden states to queries, `W_q x (+ b_q)` (the norm is fused into [`score`](crate::score)), and every other
//! map of the input that a layer has: those of its gates and of its pre-values.
//!
//! Shapes: input `[tokens, hidden_size]`, weight `[hidden_size, width]` (the transpose of PyTorch's `Linear.weight`), bias `[width]`, output
//! `[tokens, width]`; a query's width is `query_pairs · 2 · key_dim`. A bias is added by a kernel of its own, which reads and writes the output
//! once more. Backwards, all maps of one input together.

mod backward;
mod bias;
mod plan;

use cubecl::prelude::*;

pub use self::backward::{Map, MapGradients, QueryGradients, query_backward};
use self::bias::add_bias;
pub use self::plan::{MapPlans, MapSizes, QueryBackwardPlans, QueryBackwardSizes, QueryPlans};
use crate::Result;
use crate::launch::tensor::{Tensor, check, f32_storage};
use crate::linear::{ProjectStrategy, project};

/// Launches `query = input · weight + bias`.
///
/// - `input` `[tokens, hidden_size]`, f32, f16 or bf16
/// - `weight` `[hidden_size, width]`, the same type
/// - `bias` f32 `[width]`
/// - returns `[tokens, width]` f32
///
/// # Errors
/// Shapes, types or sizes that don't fit; nothing is launched then.
pub fn query<R: Runtime>(
    client: &ComputeClient<R>,
    input: &Tensor<R>,
    weight: &Tensor<R>,
    bias: Option<&Tensor<R>>,
    strategy: ProjectStrategy,
) -> Result<Tensor<R>> {
    if let Some(bias) = bias {
        let width = weight.shape().last().copied().unwrap_or(0);
        check(client, bias, "bias", &[width], f32_storage())?;
    }
    let product = project(client, input, weight, f32_storage(), strategy)?;
    match bias {
        Some(bias) => add_bias(client, &product, bias).map(|()| product),
        None => Ok(product),
    }
}
