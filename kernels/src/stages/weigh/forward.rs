//! The rows' products with `z`, and the scores times what an activation makes of them; shapes and bytes stand in [`super`].

use core::f32::consts::{FRAC_1_SQRT_2, PI};

use cubecl::prelude::*;

use super::Activation;
use super::plan::WeighPlan;
use crate::select::lane_of;
use crate::table::pages::Page;
use crate::table::row_products::row_product;
use crate::table::source::address;

#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn weigh_kernel<E: Float, Z: Float, N: Size>(
    slots: &Array<u32>,
    scores: &Array<f32>,
    shuffle: &Array<u32>,
    values: &Array<Vector<E, N>>,
    z: &Array<Vector<Z, N>>,
    products: &mut Array<f32>,
    weighed: &mut Array<f32>,
    offset: u32,
    first_row: u32,
    page_rows: u32,
    entries: u32,
    #[comptime] plan: WeighPlan,
    #[define(E)] _dtype: StorageType,
    #[define(Z)] _z_type: StorageType,
) {
    let product_plan = comptime!(plan.product);
    let at = lane_of(product_plan.tile, product_plan.units);
    let entry = CUBE_POS * product_plan.tile + at.row;
    let read = min(entry, entries as usize - 1);
    let page = Page { first_row, rows: page_rows };
    let row = page.place(address(slots, shuffle, read, offset, comptime!(plan.address)));
    let mut held = entry < entries as usize;
    if comptime!(plan.product.paged) {
        held = held && row < page.rows;
    }
    let (first, own) = (row as usize * product_plan.slice, read / plan.entries * product_plan.slice);
    let mut partial = SharedMemory::<f32>::new(comptime!(if at.lanes > 1 { plan.product.units } else { 1 }));
    let product = row_product::<E, Z, N>(values, first, z, own, held, &mut partial, at, product_plan);
    if held {
        if at.lane == 0 {
            products[entry] = product;
        }
        let factor = activate(product, comptime!(plan.activation));
        for k in range_stepped(at.lane, plan.cores, at.lanes) {
            weighed[entry * plan.cores + k] = scores[entry * plan.cores + k] * factor;
        }
    }
}

/// The activation of a product.
#[cube]
pub(super) fn activate(x: f32, #[comptime] activation: Activation) -> f32 {
    let mut factor = x;
    if comptime!(activation == Activation::Gelu) {
        factor = x * cumulative(x);
    }
    factor
}

/// The activation's derivative: gelu's is `Φ(x) + x · φ(x)`.
#[cube]
pub(super) fn activate_backward(x: f32, #[comptime] activation: Activation) -> f32 {
    let mut slope = 1.0f32;
    if comptime!(activation == Activation::Gelu) {
        slope = cumulative(x) + x * f32::exp(-0.5 * x * x) * comptime!(1.0 / (2.0 * PI).sqrt());
    }
    slope
}

/// `Φ(x)`, the normal distribution's.
#[cube]
#[allow(unstable_name_collisions, reason = "CubeCL's error function, not one that the standard library may get")]
fn cumulative(x: f32) -> f32 {
    0.5 * (1.0 + f32::erf(x * comptime!(FRAC_1_SQRT_2)))
}
