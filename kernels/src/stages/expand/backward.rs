//! Backward of expand: from the output to the scores of the slots, the chosen value rows, W_o, the bias and the gates.
//!
//! - through the output gate and the bias as [`finish`](super::finish) says;
//! - `grad_pooled = grad_output · W_o`; through a gate, `grad_pooled ⊙ silu(g)` and `grad_gate = grad_pooled ⊙ pooled ⊙ silu'(g)`;
//! - `grad_scores[t, h, m, k] = Σ_c grad_pooled[t, e, c] · V[row, c]` over slice k: a few lanes take one slot and read its row once;
//! - `grad_values[row] = Σ s_k · grad_pooled[t, e, slice k]` over the slots that read the row, grouped by row and summed in slot order
//!   ([`RowGradients`]): no row is touched that no slot read;
//! - `grad_W_o = grad_outputᵀ · pooled`, the pooled values as the forward pass left them; where a gate came between they are made anew.
//!
//! Moves the chosen rows once (twice with a gate), `grad_pooled` once per slot (from cache) and a gradient for each used row.

use cubecl::prelude::*;

use super::backward_plan::{ExpandBackwardPlans, ExpandBackwardSizes};
use super::finish::{Finished, finish_backward};
use super::{ExpandCall, ExpandSizes, Memory, pool, project_pooled};
use crate::Result;
use crate::launch::plan::Launch;
use crate::launch::tensor::{Tensor, arg, check, empty, f32_storage, zeros};
use crate::linear::column_sum::column_sum;
use crate::linear::outer::outer;
use crate::linear::{ProjectStrategy, project};
use crate::stages::combine::Chosen;
use crate::table::group::{Groups, group};
use crate::table::locate::{Places, locate};
use crate::table::row_gradients::RowGradients;
use crate::table::row_products::row_products;
use crate::table::segment_sum::{Terms, sum_rows};

/// Gradients of the stage.
pub struct ExpandGradients<R: Runtime> {
    /// f32 `[tokens, heads, top_m, cores]`.
    pub scores: Tensor<R>,
    /// Of `[table_rows, value_dim]`.
    pub values: RowGradients<R>,
    /// f32 `[hidden_size, pooled_blocks · value_dim]`, as PyTorch has the weight; None without a projection.
    pub weight: Option<Tensor<R>>,
    /// f32 `[hidden_size]`, where there is a bias.
    pub bias: Option<Tensor<R>>,
    /// f32 `[tokens, value_dim]`: of the gate before its silu, where there is one.
    pub gate: Option<Tensor<R>>,
    /// f32 `[tokens]`: of the output gate before its sigmoid, where there is one.
    pub output_gate: Option<Tensor<R>>,
    /// Which slots read each row.
    pub(crate) readers: Option<Readers<R>>,
}

/// The slots that read each row: what the gradient of another table of the same rows is summed by, too.
pub(crate) struct Readers<R: Runtime> {
    pub places: Places<R>,
    pub groups: Groups<R>,
    /// Pooled values of a token.
    pub blocks: usize,
}

/// What the forward pass leaves for this stage's way back; what is not there is made anew.
pub struct Pooled<'a, R: Runtime> {
    /// `[tokens, pooled_blocks · value_dim]`: what [`pool`](super::pool) gives without a gate.
    pub pooled: Option<&'a Tensor<R>>,
    /// f32 `[tokens, hidden_size]`: what [`project_pooled`](super::project_pooled) gives, which an output gate alone needs.
    pub projected: Option<&'a Tensor<R>>,
}

/// Launches the backward pass of [`expand`](super::expand), for what it was given.
///
/// - `weight` `[hidden_size, pooled_blocks · value_dim]`: W_o as PyTorch has it, the transpose of the memory's; None where it has none
/// - `grad_output` `[tokens, hidden_size]`, in the type of the values; no tokens give a weight's gradient of zeros, and no used row
///
/// # Errors
/// Shapes, types or sizes that don't fit; nothing is launched then.
pub fn expand_backward<R: Runtime>(
    client: &ComputeClient<R>,
    chosen: &Chosen<R>,
    memory: &Memory<'_, R>,
    weight: Option<&Tensor<R>>,
    saved: Pooled<'_, R>,
    grad_output: &Tensor<R>,
    strategy: ProjectStrategy,
) -> Result<ExpandGradients<R>> {
    let stage = ExpandCall::check(client, chosen, memory)?;
    let ExpandSizes { tokens, slots, cores, value_dim, hidden_size, .. } = stage.sizes;
    let (dtype, pooled_dim) = (stage.dtype, stage.sizes.pooled_dim());
    match (weight, memory.weight) {
        (Some(weight), Some(_)) => check(client, weight, "weight", &[hidden_size, pooled_dim], dtype)?,
        (None, None) => {}
        (given, _) => {
            let value = u64::from(given.is_some());
            return Err(crate::Error::Number { what: "output projections", value, expected: 1 - value });
        }
    }
    check(client, grad_output, "gradient of the output", &[tokens, hidden_size], dtype)?;
    if let Some(pooled) = saved.pooled {
        check(client, pooled, "pooled", &[tokens, pooled_dim], stage.sums)?;
    }
    if let Some(projected) = saved.projected {
        check(client, projected, "projected values", &[tokens, hidden_size], f32_storage())?;
    }
    if tokens == 0 {
        return stage.nothing();
    }
    let (pooled, projected) = (saved.pooled.is_some(), saved.projected.is_some());
    let sizes = ExpandBackwardSizes { forward: stage.sizes, pooled, projected };
    let plans = ExpandBackwardPlans::of(&stage.device, &sizes, strategy)?;
    let finished = stage.finished(&saved, grad_output, strategy)?;
    let grad_projected = finished.as_ref().map_or(grad_output, |finished| &finished.values);
    // A bias alone changes nothing of what is multiplied.
    let factor = if memory.output_gate.is_some() { grad_projected } else { grad_output };
    let mut grad_pooled = match weight {
        Some(weight) => project(client, factor, weight, f32_storage(), strategy)?,
        None => grad_projected.clone(),
    };
    let mut pooled = match saved.pooled {
        Some(pooled) => pooled.clone(),
        None => pool(client, chosen, &Memory { gate: None, ..*memory }, false)?,
    };
    let mut grad_gate = None;
    if let Some((gate, launch)) = memory.gate.zip(plans.gate) {
        let gradients = stage.gate_backward(launch, gate, &pooled, &grad_pooled)?;
        (pooled, grad_pooled) = (gradients.pooled, gradients.grad_pooled);
        grad_gate = Some(gradients.grad_gate);
    }
    let places = locate(client, &chosen.slots, slots, &memory.rows)?;
    let scores = empty(client, "gradient of the scores", chosen.scores.shape(), f32_storage())?;
    let width = stage.sizes.width(&stage.device);
    row_products(client, plans.products, memory.values, &places, &grad_pooled, width, &scores)?;
    let groups = group(client, &places.rows)?;
    let entries = Terms {
        source: &places.source,
        per: 1,
        factors: &chosen.scores,
        sources: &grad_pooled,
        count: cores,
        slice: value_dim / cores,
        shared: false,
    };
    let values = sum_rows(client, &groups, &entries, memory.rows.table_rows)?;
    Ok(ExpandGradients {
        scores,
        values,
        weight: weight.map(|_| outer(client, factor, &pooled, stage.sizes.dtype, strategy)).transpose()?,
        bias: memory.bias.map(|_| column_sum(client, grad_projected)).transpose()?,
        gate: grad_gate,
        output_gate: finished.and_then(|finished| finished.gate),
        readers: Some(Readers { places, groups, blocks: stage.sizes.address.pooled_blocks() }),
    })
}

impl<R: Runtime> ExpandCall<'_, R> {
    /// The gradients for no tokens: zeros, and no used row.
    fn nothing(&self) -> Result<ExpandGradients<R>> {
        let (client, memory, pooled_dim) = (self.client, self.memory, self.sizes.pooled_dim());
        let ExpandSizes { value_dim, hidden_size, .. } = self.sizes;
        let zeros = |name, shape: &[usize]| zeros(client, name, shape);
        let none = |name, shape: &[usize]| empty(client, name, shape, f32_storage());
        Ok(ExpandGradients {
            scores: none("gradient of the scores", self.chosen.scores.shape())?,
            values: RowGradients::none(client, memory.rows.table_rows, value_dim)?,
            weight: memory.weight.map(|_| zeros("gradient of the weight", &[hidden_size, pooled_dim])).transpose()?,
            bias: memory.bias.map(|_| zeros("gradient of the bias", &[hidden_size])).transpose()?,
            gate: memory.gate.map(|_| none("gradient of the gate", &[0, value_dim])).transpose()?,
            output_gate: memory.output_gate.map(|_| none("gradient of the output gate", &[0])).transpose()?,
            readers: None,
        })
    }

    /// The gradient of the projected values, where something was done to them.
    fn finished(
        &self,
        saved: &Pooled<'_, R>,
        grad_output: &Tensor<R>,
        strategy: ProjectStrategy,
    ) -> Result<Option<Finished<R>>> {
        let (client, memory) = (self.client, self.memory);
        if !memory.finishes() {
            return Ok(None);
        }
        let anew = match (memory.output_gate, saved.projected) {
            (Some(_), None) => {
                let pooled = pool(client, self.chosen, memory, false)?;
                Some(project_pooled(client, &pooled, memory, strategy)?.values)
            }
            _ => None,
        };
        let projected = saved.projected.or(anew.as_ref());
        finish_backward(client, memory, projected, grad_output).map(Some)
    }

    /// Goes back through the gate.
    fn gate_backward(
        &self,
        launch: Launch,
        gate: &Tensor<R>,
        pooled: &Tensor<R>,
        grad_gated: &Tensor<R>,
    ) -> Result<Gated<R>> {
        let like = |name| empty(self.client, name, gate.shape(), f32_storage());
        let gated = Gated {
            pooled: like("gated values")?,
            grad_pooled: like("gradient of the pooled values")?,
            grad_gate: like("gradient of the gate")?,
        };
        let (grid, cube_dim) = launch.start(&self.device)?;
        // SAFETY: the six tensors have one shape, and a unit touches its own number below their count.
        unsafe {
            gate_backward_kernel::launch_unchecked::<R>(
                self.client,
                grid,
                cube_dim,
                arg(gate, 1),
                arg(pooled, 1),
                arg(grad_gated, 1),
                arg(&gated.pooled, 1),
                arg(&gated.grad_pooled, 1),
                arg(&gated.grad_gate, 1),
                launch.units,
                pooled.dtype,
            );
        }
        Ok(gated)
    }
}

/// What a gate's backward gives, each `[tokens, value_dim]`.
struct Gated<R: Runtime> {
    /// `pooled ⊙ silu(g)`, f32.
    pooled: Tensor<R>,
    /// f32.
    grad_pooled: Tensor<R>,
    /// f32.
    grad_gate: Tensor<R>,
}

/// `silu(g) = g · σ(g)`, `silu'(g) = σ(g) · (1 + g · (1 - σ(g)))`.
#[cube(launch_unchecked)]
fn gate_backward_kernel<E: Float>(
    gate: &Array<f32>,
    pooled: &Array<E>,
    grad_gated: &Array<f32>,
    gated: &mut Array<f32>,
    grad_pooled: &mut Array<f32>,
    grad_gate: &mut Array<f32>,
    #[comptime] units: usize,
    #[define(E)] _dtype: StorageType,
) {
    let item = CUBE_POS * units + UNIT_POS as usize;
    if item < gate.len() {
        let (g, value, grad) = (gate[item], f32::cast_from(pooled[item]), grad_gated[item]);
        let sigma = 1.0 / (1.0 + f32::exp(-g));
        gated[item] = value * g * sigma;
        grad_pooled[item] = grad * g * sigma;
        grad_gate[item] = grad * value * sigma * (1.0 + g * (1.0 - sigma));
    }
}
