//! Backward of weigh: from the weighed scores to the scores, to `z` and to the pre-values, with `d = z · P[row]`.
//!
//! - `grad_scores[t, h, m, k] = grad[t, h, m, k] · act(d)`;
//! - `grad_d[t, h, m] = act'(d) · Σ_k grad[t, h, m, k] · s_k`;
//! - `grad_z[t] = Σ grad_d · P[row]`: the pooling of [`expand`](crate::stages::expand) with `grad_d` for scores, all blocks summed;
//! - `grad_P[row] = Σ grad_d · z[t]` over the slots that read the row, grouped as the values' gradient is and summed in slot order.
//!
//! Reads the pre-value rows once more, and writes a gradient for each used row.

use cubecl::prelude::*;

use super::backward_plan::{WeighBackwardPlans, WeighBackwardSizes};
use super::forward::{activate, activate_backward};
use super::{Activation, PreValues, WeighCall, Weighed};
use crate::Result;
use crate::launch::plan::Launch;
use crate::launch::tensor::{Tensor, arg, check, empty, f32_storage, float_type};
use crate::linear::cast::cast;
use crate::stages::combine::Chosen;
use crate::stages::expand::{ExpandGradients, Memory, Readers, pool};
use crate::table::row_gradients::RowGradients;
use crate::table::segment_sum::{Terms, sum_rows};

/// Gradients of the stage.
pub struct WeighGradients<R: Runtime> {
    /// f32 `[tokens, heads, top_m, cores]`: of the scores before they were weighed.
    pub scores: Tensor<R>,
    /// f32 `[tokens, pre_dim]`.
    pub z: Tensor<R>,
    /// Of the pre-values `[table_rows, pre_dim]`.
    pub pre_values: RowGradients<R>,
}

/// Launches the backward pass of [`weigh`](super::weigh), for what it was given and gave.
///
/// - `expand`: the gradients of the stage behind it, whose list of rows is this one's, too
///
/// # Errors
/// Shapes, types or sizes that don't fit; nothing is launched then.
pub fn weigh_backward<R: Runtime>(
    client: &ComputeClient<R>,
    chosen: &Chosen<R>,
    weighed: &Weighed<R>,
    z: &Tensor<R>,
    pre_values: &PreValues<'_, R>,
    expand: &ExpandGradients<R>,
) -> Result<WeighGradients<R>> {
    let stage = WeighCall::check(client, chosen, z, pre_values)?;
    let shape = chosen.scores.shape();
    check(client, &expand.scores, "gradient of the weighed scores", shape, f32_storage())?;
    check(client, &weighed.products, "products", &shape[..3], f32_storage())?;
    let scores = empty(client, "gradient of the scores", shape, f32_storage())?;
    let (table_rows, pre_dim) = (stage.rows.table_rows, stage.pre_dim);
    let Some(readers) = &expand.readers else {
        let z = empty(client, "gradient of z", &[0, pre_dim], f32_storage())?;
        return Ok(WeighGradients { scores, z, pre_values: RowGradients::none(client, table_rows, pre_dim)? });
    };
    let grad_products = empty(client, "gradient of the products", &[shape[0], shape[1], shape[2], 1], f32_storage())?;
    let sizes = WeighBackwardSizes {
        forward: stage.sizes(),
        shuffle_pages: stage.rows.shuffle.len(),
        z: float_type(client, z, "z")?,
    };
    let plans = WeighBackwardPlans::of(&stage.device, &sizes)?;
    stage.grad_products(plans.products, &weighed.products, &expand.scores, &scores, &grad_products)?;
    let along = Chosen { slots: chosen.slots.clone(), scores: grad_products };
    let memory =
        Memory { values: stage.values, rows: stage.rows, weight: None, bias: None, gate: None, output_gate: None };
    let grad_z = pool(client, &along, &memory, false)?;
    let pre_values = stage.grad_rows(readers, &along.scores)?;
    Ok(WeighGradients { scores, z: grad_z, pre_values })
}

impl<R: Runtime> WeighCall<'_, R> {
    /// The gradients of scores and of products, a unit a slot.
    fn grad_products(
        &self,
        launch: Launch,
        products: &Tensor<R>,
        grad_weighed: &Tensor<R>,
        grad_scores: &Tensor<R>,
        grad_products: &Tensor<R>,
    ) -> Result<()> {
        let slots = self.tokens * self.entries;
        let (grid, cube_dim) = launch.start(&self.device)?;
        // SAFETY: shapes are checked; a unit touches its own slot's numbers.
        unsafe {
            weigh_backward_kernel::launch_unchecked::<R>(
                self.client,
                grid,
                cube_dim,
                arg(&self.chosen.scores, 1),
                arg(products, 1),
                arg(grad_weighed, 1),
                arg(grad_scores, 1),
                arg(grad_products, 1),
                slots as u32,
                WeighBackwardPlan { cores: self.cores, activation: self.activation, units: launch.units },
            );
        }
        Ok(())
    }

    /// The pre-values' gradient, over the groups of the values'.
    fn grad_rows(&self, readers: &Readers<R>, grad_products: &Tensor<R>) -> Result<RowGradients<R>> {
        let z = cast(self.client, self.z, f32_storage())?;
        let entries = Terms {
            source: &readers.places.source,
            // Where blocks are pooled apart, the values' list names a token's block.
            per: readers.blocks,
            factors: grad_products,
            sources: &z,
            count: 1,
            slice: self.pre_dim,
            shared: false,
        };
        sum_rows(self.client, &readers.groups, &entries, self.rows.table_rows)
    }
}

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct WeighBackwardPlan {
    cores: usize,
    activation: Activation,
    units: usize,
}

#[cube(launch_unchecked)]
fn weigh_backward_kernel(
    scores: &Array<f32>,
    products: &Array<f32>,
    grad_weighed: &Array<f32>,
    grad_scores: &mut Array<f32>,
    grad_products: &mut Array<f32>,
    slots: u32,
    #[comptime] plan: WeighBackwardPlan,
) {
    let slot = CUBE_POS * plan.units + UNIT_POS as usize;
    if slot < slots as usize {
        let product = products[slot];
        let factor = activate(product, comptime!(plan.activation));
        let mut along = 0.0f32;
        for k in 0..plan.cores {
            let grad = grad_weighed[slot * plan.cores + k];
            grad_scores[slot * plan.cores + k] = grad * factor;
            along += grad * scores[slot * plan.cores + k];
        }
        grad_products[slot] = along * activate_backward(product, comptime!(plan.activation));
    }
}
