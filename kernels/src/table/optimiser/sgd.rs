//! SGD, with or without momentum.

use cubecl::prelude::*;

use super::rounding::rounded;
use super::{Update, UpdatePlan, listed};
use crate::Result;
use crate::launch::tensor::{Tensor, arg, empty, f32_storage};

pub(super) fn launch<R: Runtime>(update: &Update<'_, R>, momentum: f32, state: Option<&Tensor<R>>) -> Result<()> {
    let gradients = update.gradients;
    // Without momentum the kernel touches no state, but a buffer must be bound, and none that it reads or writes elsewhere.
    let nothing = || empty(update.client, "no state", &[update.vector], f32_storage());
    let keeps = state.is_some();
    let state = state.cloned().map_or_else(nothing, Ok)?;
    let (grid, cube_dim) = update.plans.update.start(&update.device)?;
    // SAFETY: `Update::check` and the optimiser have seen every shape; rows are listed once, and each unit changes its own vector.
    unsafe {
        sgd_kernel::launch_unchecked::<R>(
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
            arg(&state, update.vector),
            update.step.learning_rate,
            update.step.scale,
            momentum,
            update.first_row as u32,
            update.rows as u32,
            update.key,
            keeps,
            update.plan,
            update.table.dtype,
        );
    }
    Ok(())
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn sgd_kernel<E: Float, N: Size>(
    rows: &Array<u32>,
    count: &Array<u32>,
    gradients: &Array<Vector<f32, N>>,
    mask: &Array<u32>,
    table: &mut Array<Vector<E, N>>,
    state: &mut Array<Vector<f32, N>>,
    learning_rate: f32,
    scale: f32,
    momentum: f32,
    first_row: u32,
    page_rows: u32,
    key: u32,
    #[comptime] keeps: bool,
    #[comptime] plan: UpdatePlan,
    #[define(E)] _dtype: StorageType,
) {
    let item = CUBE_POS * plan.units + UNIT_POS as usize;
    let own = listed(rows, count, mask, item / plan.vectors, first_row, page_rows, plan);
    if own.changes {
        let at = own.row * plan.vectors + item % plan.vectors;
        let mut direction = gradients[item] * Vector::new(scale);
        if keeps {
            direction += state[at] * Vector::new(momentum);
            state[at] = direction;
        }
        let weight = Vector::<f32, N>::cast_from(table[at]) - direction * Vector::new(learning_rate);
        table[at] = rounded::<E, N>(weight, key, first_row, own.row, item % plan.vectors, plan.dropped);
    }
}
