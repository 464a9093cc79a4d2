//! Weigh: multiply the chosen slots' scores by what a second table, the pre-values, makes of the input (DESIGN §2.4; arXiv 2508.18756,
//! and arXiv 2407.04153 for `z = x`).
//!
//! `s_k ·= act(z · P[row])`. Shapes: slots `[tokens, heads, top_m]` and scores `[tokens, heads, top_m, cores]` as
//! [`combine`](crate::stages::combine::combine) makes them, `z` `[tokens, pre_dim]`, pre-values `[table_rows, pre_dim]`; result as scores.
//!
//! A few lanes take one slot: they look its row up, multiply it with their token's `z` and scale the slot's scores. Reads `heads · top_m` rows of
//! `pre_dim` numbers a token, each once, `z` from cache, and scores; writes scores and a product a slot, which the way back needs. A table of
//! several pages takes a launch a page.

mod backward;
mod backward_plan;
mod forward;
mod plan;

use cubecl::prelude::*;

pub use self::backward::{WeighGradients, weigh_backward};
pub use self::backward_plan::{WeighBackwardPlans, WeighBackwardSizes};
use self::forward::weigh_kernel;
pub use self::plan::{WeighPlan, WeighSizes};
use crate::launch::device::Device;
use crate::launch::plan::Planned;
use crate::launch::tensor::{Tensor, arg, check, empty, f32_storage, float_type, positive, sizes, u32_storage};
use crate::stages::combine::Chosen;
use crate::table::pages::{Window, check_pages, windows};
use crate::table::source::RowSource;
use crate::{ElementType, Error, Result};

/// What is done to the product of `z` and a pre-value row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// Nothing.
    Identity,
    /// The exact gelu, `x · Φ(x)`.
    Gelu,
}

/// The table that the stage reads.
pub struct PreValues<'a, R: Runtime> {
    /// `[table_rows, pre_dim]`, f32, f16 or bf16, in pages of some rows each.
    pub values: &'a [Tensor<R>],
    /// Where the slots find their rows: the value table's.
    pub rows: RowSource<'a, R>,
    /// What is done to the product.
    pub activation: Activation,
}

/// Slots with weighed scores.
pub struct Weighed<R: Runtime> {
    /// The slots, and their scores `[tokens, heads, top_m, cores]` times `act(product)`.
    pub chosen: Chosen<R>,
    /// f32 `[tokens, heads, top_m]`: `z · P[row]`.
    pub products: Tensor<R>,
}

impl<R: Runtime> Clone for Weighed<R> {
    fn clone(&self) -> Self {
        Self { chosen: self.chosen.clone(), products: self.products.clone() }
    }
}

/// Launches the stage.
///
/// - `chosen`: slots and their scores, before they are weighed
/// - `z` `[tokens, pre_dim]`, f32, f16 or bf16
///
/// Slots and addresses past the table are read as its last one. No tokens give no scores.
///
/// # Errors
/// Shapes, types or sizes that don't fit; nothing is launched then.
pub fn weigh<R: Runtime>(
    client: &ComputeClient<R>,
    chosen: &Chosen<R>,
    z: &Tensor<R>,
    pre_values: &PreValues<'_, R>,
) -> Result<Weighed<R>> {
    WeighCall::check(client, chosen, z, pre_values)?.run()
}

/// The checked arguments.
struct WeighCall<'a, R: Runtime> {
    client: &'a ComputeClient<R>,
    device: Device,
    chosen: &'a Chosen<R>,
    z: &'a Tensor<R>,
    values: &'a [Tensor<R>],
    dtype: ElementType,
    /// All blocks as one: a pre-value row has no block.
    rows: RowSource<'a, R>,
    activation: Activation,
    tokens: usize,
    /// Slots of a token.
    entries: usize,
    cores: usize,
    pre_dim: usize,
}

impl<'a, R: Runtime> WeighCall<'a, R> {
    fn check(
        client: &'a ComputeClient<R>,
        chosen: &'a Chosen<R>,
        z: &'a Tensor<R>,
        pre_values: &PreValues<'a, R>,
    ) -> Result<Self> {
        let [tokens, heads, top_m, cores] = *chosen.scores.shape().as_slice() else {
            let (found, expected) = (chosen.scores.shape().to_vec(), "[tokens, heads, top_m, cores]");
            return Err(Error::Dimensions { tensor: "scores", found, expected });
        };
        let values = pre_values.values;
        let first_page = values.first().ok_or(Error::Zero { what: "pages of the pre-values" })?;
        let dtype = float_type(client, first_page, "pre-values")?;
        let [_, pre_dim] = sizes(first_page, "pre-values")?;
        positive(&[("heads", heads), ("top_m", top_m), ("cores", cores), ("pre_dim", pre_dim)])?;
        let rows = RowSource { summed: true, ..pre_values.rows };
        rows.check(client)?;
        check_pages(client, "pre-values", values, rows.table_rows, pre_dim)?;
        check(client, &chosen.scores, "scores", &[tokens, heads, top_m, cores], f32_storage())?;
        check(client, &chosen.slots, "slots", &[tokens, heads, top_m], u32_storage())?;
        float_type(client, z, "z")?;
        check(client, z, "z", &[tokens, pre_dim], z.dtype)?;
        let (device, activation, entries) = (Device::of(client), pre_values.activation, heads * top_m);
        Ok(Self { client, device, chosen, z, values, dtype, rows, activation, tokens, entries, cores, pre_dim })
    }

    fn run(&self) -> Result<Weighed<R>> {
        let (client, scores) = (self.client, self.chosen.scores.shape());
        let products = empty(client, "products", &scores[..3], f32_storage())?;
        let weighed = empty(client, "weighed scores", scores, f32_storage())?;
        if self.tokens > 0 {
            let planned = WeighPlan::of(&self.device, &self.sizes())?;
            let slots = self.rows.resolve(client, &self.chosen.slots)?;
            for (page, window) in self.values.iter().zip(windows(self.values)) {
                self.launch_page(page, window, &slots, &products, &weighed, planned)?;
            }
        }
        Ok(Weighed { chosen: Chosen { slots: self.chosen.slots.clone(), scores: weighed }, products })
    }

    fn sizes(&self) -> WeighSizes {
        let Self { tokens, entries: slots, cores, pre_dim, dtype, activation, .. } = *self;
        let (address, pages) = (self.rows.plan(), self.values.len());
        WeighSizes { tokens, slots, cores, address, pre_dim, dtype, activation, pages }
    }

    /// Weighs the slots whose row one page has.
    fn launch_page(
        &self,
        page: &Tensor<R>,
        window: Window,
        slots: &Tensor<R>,
        products: &Tensor<R>,
        weighed: &Tensor<R>,
        planned: Planned<WeighPlan>,
    ) -> Result<()> {
        let Planned { plan, launch } = planned;
        let (grid, cube_dim) = launch.start(&self.device)?;
        // SAFETY: `check` has seen every shape; addresses stay inside the table, and rows of the page alone are read.
        unsafe {
            weigh_kernel::launch_unchecked::<R>(
                self.client,
                grid,
                cube_dim,
                page.required_address_type(),
                plan.width,
                arg(slots, 1),
                arg(&self.chosen.scores, 1),
                arg(self.rows.shuffle_or(slots), 1),
                arg(page, plan.width),
                arg(self.z, plan.width),
                arg(products, 1),
                arg(weighed, 1),
                self.rows.offset as u32,
                window.first_row as u32,
                window.rows as u32,
                (self.tokens * self.entries) as u32,
                plan,
                page.dtype,
                self.z.dtype,
            );
        }
        Ok(())
    }
}
