//! Lazy Adam, and AdamW.

use cubecl::prelude::*;

use super::rounding::rounded;
use super::{Rule, Update, UpdatePlan, listed};
use crate::Result;
use crate::launch::tensor::{Tensor, arg};

/// The step that is the `steps`th. Does nothing for other rules.
pub(super) fn launch<R: Runtime>(
    update: &Update<'_, R>,
    rule: &Rule,
    steps: u64,
    first: &Tensor<R>,
    second: &Tensor<R>,
) -> Result<()> {
    let Rule::Adam { beta1, beta2, eps, weight_decay, decoupled } = *rule else { return Ok(()) };
    let correction = |beta: f32| (1.0 - f64::from(beta).powf(steps as f64)) as f32;
    let gradients = update.gradients;
    let (grid, cube_dim) = update.plans.update.start(&update.device)?;
    // SAFETY: `Update::check` and the optimiser have seen every shape; rows are listed once, and each unit changes its own vector.
    unsafe {
        adam_kernel::launch_unchecked::<R>(
            update.client,
            grid,
            cube_dim,
            update.table.required_address_type(),
            update.vector,
            arg(&gradients.rows, 1),
            arg(&gradients.count, 1),
            arg(&gradients.gradients, update.vector),
            update.mask(),
            arg(update.table, update.vector),
            arg(first, update.vector),
            arg(second, update.vector),
            update.step.learning_rate,
            update.step.scale,
            beta1,
            beta2,
            correction(beta1),
            correction(beta2),
            eps,
            weight_decay,
            update.first_row as u32,
            update.rows as u32,
            update.key,
            decoupled,
            update.plan,
            update.table.dtype,
        );
    }
    Ok(())
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn adam_kernel<E: Float, N: Size>(
    rows: &Array<u32>,
    count: &Array<u32>,
    gradients: &Array<Vector<f32, N>>,
    mask: &Array<u32>,
    table: &mut Array<Vector<E, N>>,
    first: &mut Array<Vector<f32, N>>,
    second: &mut Array<Vector<f32, N>>,
    learning_rate: f32,
    scale: f32,
    beta1: f32,
    beta2: f32,
    correction1: f32,
    correction2: f32,
    eps: f32,
    weight_decay: f32,
    first_row: u32,
    page_rows: u32,
    key: u32,
    #[comptime] decoupled: bool,
    #[comptime] plan: UpdatePlan,
    #[define(E)] _dtype: StorageType,
) {
    let item = CUBE_POS * plan.units + UNIT_POS as usize;
    let own = listed(rows, count, mask, item / plan.vectors, first_row, page_rows, plan);
    if own.changes {
        let at = own.row * plan.vectors + item % plan.vectors;
        let mut weight = Vector::<f32, N>::cast_from(table[at]);
        let mut gradient = gradients[item] * Vector::new(scale);
        if decoupled {
            weight -= weight * Vector::new(learning_rate * weight_decay);
        } else {
            gradient += weight * Vector::new(weight_decay);
        }
        let mean = first[at] * Vector::new(beta1) + gradient * Vector::new(1.0 - beta1);
        let square = second[at] * Vector::new(beta2) + gradient * gradient * Vector::new(1.0 - beta2);
        first[at] = mean;
        second[at] = square;
        let root = Vector::sqrt(square * Vector::new(1.0 / correction2)) + Vector::new(eps);
        weight -= mean / root * Vector::new(learning_rate / correction1);
        table[at] = rounded::<E, N>(weight, key, first_row, own.row, item % plan.vectors, plan.dropped);
    }
}
