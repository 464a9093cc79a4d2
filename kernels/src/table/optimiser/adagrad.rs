//! Adagrad with one accumulator per row: first every used row's accumulator, then the rows.

use cubecl::prelude::*;

use super::rounding::rounded;
use super::{Update, UpdatePlan, listed};
use crate::Result;
use crate::launch::device::Device;
use crate::launch::plan::Launch;
use crate::launch::tensor::{Tensor, arg};
use crate::linear::tile::component_sum;
use crate::select::{lane_of, lane_sum, row_lanes};

pub(super) fn launch<R: Runtime>(update: &Update<'_, R>, eps: f32, squares: &Tensor<R>) -> Result<()> {
    let gradients = update.gradients;
    let tile = update.plan.units / row_lanes(&update.device, update.plan.vectors);
    let Some(accumulate) = update.plans.accumulate else { return Ok(()) };
    let [(rows_grid, rows_dim), (grid, cube_dim)] =
        [accumulate.start(&update.device)?, update.plans.update.start(&update.device)?];
    // SAFETY: `Update::check` and the optimiser have seen every shape; rows are listed once, an accumulator is changed by one unit and
    // each vector of a row by its own.
    unsafe {
        accumulate_kernel::launch_unchecked::<R>(
            update.client,
            rows_grid,
            rows_dim,
            gradients.gradients.required_address_type(),
            update.vector,
            arg(&gradients.rows, 1),
            arg(&gradients.count, 1),
            arg(&gradients.gradients, update.vector),
            update.mask(),
            arg(squares, 1),
            update.step.scale,
            update.first_row as u32,
            update.rows as u32,
            tile,
            update.plan,
        );
        adagrad_kernel::launch_unchecked::<R>(
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
            arg(squares, 1),
            update.step.learning_rate,
            update.step.scale,
            eps,
            update.first_row as u32,
            update.rows as u32,
            update.key,
            update.plan,
            update.table.dtype,
        );
    }
    Ok(())
}

/// The launch that adds to the accumulators of `rows` rows of `vectors` vectors.
pub(super) fn accumulating(device: &Device, rows: usize, vectors: usize, units: usize) -> Launch {
    let lanes = row_lanes(device, vectors);
    let (shared, sum) = if lanes > 1 { (units, lanes) } else { (0, 0) };
    Launch {
        kernel: "accumulate_kernel",
        cubes: rows.div_ceil(units / lanes),
        units,
        shared_bytes: 4 * shared,
        loops: vectors.div_ceil(lanes) + sum,
    }
}

/// `squares[row] += mean(g²)`; a few lanes take one of a cube's `tile` rows.
#[cube(launch_unchecked, address_type = "dynamic")]
fn accumulate_kernel<N: Size>(
    rows: &Array<u32>,
    count: &Array<u32>,
    gradients: &Array<Vector<f32, N>>,
    mask: &Array<u32>,
    squares: &mut Array<f32>,
    scale: f32,
    first_row: u32,
    page_rows: u32,
    #[comptime] tile: usize,
    #[comptime] plan: UpdatePlan,
) {
    let width = N::value();
    let at = lane_of(tile, plan.units);
    let place = CUBE_POS * tile + at.row;
    let own = listed(rows, count, mask, place, first_row, page_rows, plan);
    let mut partial = SharedMemory::<f32>::new(comptime!(if at.lanes > 1 { plan.units } else { 1 }));
    let mut squared = Vector::<f32, N>::new(0.0);
    if own.changes {
        for vector in range_stepped(at.lane, plan.vectors, at.lanes) {
            let gradient = gradients[place * plan.vectors + vector] * Vector::new(scale);
            squared += gradient * gradient;
        }
    }
    let sum = lane_sum(component_sum::<N>(squared), &mut partial, at);
    if own.changes && at.lane == 0 {
        squares[own.row] += sum / comptime!((plan.vectors * width) as f32);
    }
}

/// `w -= lr · g / (√s + eps)`; a unit takes one vector.
#[cube(launch_unchecked, address_type = "dynamic")]
fn adagrad_kernel<E: Float, N: Size>(
    rows: &Array<u32>,
    count: &Array<u32>,
    gradients: &Array<Vector<f32, N>>,
    mask: &Array<u32>,
    table: &mut Array<Vector<E, N>>,
    squares: &Array<f32>,
    learning_rate: f32,
    scale: f32,
    eps: f32,
    first_row: u32,
    page_rows: u32,
    key: u32,
    #[comptime] plan: UpdatePlan,
    #[define(E)] _dtype: StorageType,
) {
    let item = CUBE_POS * plan.units + UNIT_POS as usize;
    let own = listed(rows, count, mask, item / plan.vectors, first_row, page_rows, plan);
    if own.changes {
        let at = own.row * plan.vectors + item % plan.vectors;
        let rate = learning_rate * scale / (f32::sqrt(squares[own.row]) + eps);
        let weight = Vector::<f32, N>::cast_from(table[at]) - gradients[item] * Vector::new(rate);
        table[at] = rounded::<E, N>(weight, key, first_row, own.row, item % plan.vectors, plan.dropped);
    }
}
