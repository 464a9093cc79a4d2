//! Products of the rows that slots read with vectors of their tokens: `product[e, k] = Σ_c row[c] · vector[c]` over slice k, a few lanes to a
//! slot, each row read once in loads as wide as it allows.

use cubecl::prelude::*;

use super::locate::Places;
use super::pages::{Page, Window, windows};
use crate::Result;
use crate::launch::device::Device;
use crate::launch::plan::{Launch, Planned};
use crate::launch::tensor::{Tensor, arg};
use crate::linear::tile::component_sum;
use crate::select::{Lane, lane_of, lane_sum, row_lanes};

/// What is fixed when a kernel that multiplies rows is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ProductPlan {
    /// Slices of a row, each with a product of its own.
    pub slices: usize,
    /// Vectors of a slice.
    pub slice: usize,
    /// Vectors that a lane takes at a time; divides `slice` where a row has one lane.
    pub run: usize,
    /// Whether the table has several pages.
    pub paged: bool,
    /// Slots of a cube.
    pub tile: usize,
    /// Units of a cube.
    pub units: usize,
}

impl ProductPlan {
    /// For `entries` slots that read rows of `slices` slices, each of `slice` vectors.
    pub(crate) fn of(device: &Device, entries: usize, slices: usize, slice: usize, paged: bool) -> Self {
        let lanes = row_lanes(device, slice);
        let units = device.flat(entries.saturating_mul(lanes));
        let run = if lanes == 1 { device.run(slice) } else { 1 };
        Self { slices, slice, run, paged, tile: units / lanes, units }
    }

    /// A launch of `kernel` for `entries` slots, in which a unit goes through `more` iterations besides the product's.
    pub(crate) fn launch(&self, kernel: &'static str, entries: usize, more: usize) -> Launch {
        // A number a unit, where lanes share a row.
        let shared_bytes = if self.units > self.tile { 4 * self.units } else { 0 };
        let loops = self.loops().saturating_add(more);
        Launch { kernel, cubes: entries.div_ceil(self.tile), units: self.units, shared_bytes, loops }
    }

    /// Loop iterations of a unit.
    fn loops(&self) -> usize {
        let lanes = self.units / self.tile;
        let sum = if lanes > 1 { lanes } else { 0 };
        self.slices * (1 + self.slice.div_ceil(lanes * self.run) + sum)
    }
}

/// Writes the products of each slot's row with its row of `vectors` f32 `[.., slices · slice]`, f32 `[slots, slices]`, into `products`, page by
/// page, as `planned`. The caller has checked the shapes; rows are those of `places`.
pub(crate) fn row_products<R: Runtime>(
    client: &ComputeClient<R>,
    planned: Planned<ProductPlan>,
    values: &[Tensor<R>],
    places: &Places<R>,
    vectors: &Tensor<R>,
    width: usize,
    products: &Tensor<R>,
) -> Result<()> {
    let (device, entries) = (Device::of(client), places.source.shape()[0]);
    let Planned { plan, launch } = planned;
    for (page, Window { first_row, rows, .. }) in values.iter().zip(windows(values)) {
        let (grid, cube_dim) = launch.start(&device)?;
        // SAFETY: rows and sources are those that `locate` has clamped; a unit writes products of its own entry.
        unsafe {
            row_products_kernel::launch_unchecked::<R>(
                client,
                grid,
                cube_dim,
                page.required_address_type(),
                width,
                arg(&places.rows.keys, 1),
                arg(&places.source, 1),
                arg(page, width),
                arg(vectors, width),
                arg(products, 1),
                first_row as u32,
                rows as u32,
                entries as u32,
                plan,
                page.dtype,
            );
        }
    }
    Ok(())
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn row_products_kernel<E: Float, N: Size>(
    rows: &Array<u32>,
    source: &Array<u32>,
    values: &Array<Vector<E, N>>,
    vectors: &Array<Vector<f32, N>>,
    products: &mut Array<f32>,
    first_row: u32,
    page_rows: u32,
    entries: u32,
    #[comptime] plan: ProductPlan,
    #[define(E)] _dtype: StorageType,
) {
    let at = lane_of(plan.tile, plan.units);
    let entry = CUBE_POS * plan.tile + at.row;
    let read = min(entry, entries as usize - 1);
    let pitch = comptime!(plan.slices * plan.slice);
    let page = Page { first_row, rows: page_rows };
    let place = page.place(rows[read]);
    let mut held = entry < entries as usize;
    if comptime!(plan.paged) {
        held = held && place < page.rows;
    }
    let (row, vector) = (place as usize * pitch, source[read] as usize * pitch);
    let mut partial = SharedMemory::<f32>::new(comptime!(if at.lanes > 1 { plan.units } else { 1 }));
    for k in 0..plan.slices {
        let first = k * plan.slice;
        let sum = row_product::<E, f32, N>(values, row + first, vectors, vector + first, held, &mut partial, at, plan);
        if at.lane == 0 && held {
            products[entry * plan.slices + k] = sum;
        }
    }
}

/// The product of a slice of a row, from `row` on, with a vector, from `vector` on, in all lanes of the row; where it is not `held`, nothing is
/// read and the product is zero.
#[cube]
pub(crate) fn row_product<E: Float, Z: Float, N: Size>(
    values: &Array<Vector<E, N>>,
    row: usize,
    vectors: &Array<Vector<Z, N>>,
    vector: usize,
    held: bool,
    partial: &mut SharedMemory<f32>,
    at: Lane,
    #[comptime] plan: ProductPlan,
) -> f32 {
    let mut products = Vector::<f32, N>::new(0.0);
    if held {
        for first in range_stepped(at.lane, plan.slice, comptime!(at.lanes * plan.run)) {
            #[unroll]
            for r in 0..plan.run {
                products += Vector::cast_from(values[row + first + r]) * Vector::cast_from(vectors[vector + first + r]);
            }
        }
    }
    lane_sum(component_sum::<N>(products), partial, at)
}
