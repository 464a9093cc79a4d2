//! Expand: read the chosen rows, pool them per virtual block and core slice, and project (DESIGN §2.4; the paper's implicit
//! value expansion, section 3.3).
//!
//! Shapes: slots `[tokens, heads, top_m]` and scores `[tokens, heads, top_m, cores]` as [`combine`](crate::stages::combine::combine) makes them, values
//! `[table_rows, value_dim]`, weight `[pooled_blocks · value_dim, hidden_size]`; result `[tokens, hidden_size]`. A bias and an output gate are
//! applied to the projected values by a kernel of their own, which also rounds what is not projected.
//!
//! Two strategies: one kernel that pools a tile of tokens in shared memory and projects it there, several cubes sharing out the columns
//! at few tokens, or a pooling kernel and a matrix product. A table of several pages takes the second: the pooling kernel is launched once a
//! page and adds the page's rows to f32 sums, which costs a reading of slots and sums for each further page; no row is read twice.

mod backward;
mod backward_plan;
mod finish;
mod forward;
mod plan;

use cubecl::ir::StorageType;
use cubecl::prelude::*;

pub(crate) use self::backward::Readers;
pub use self::backward::{ExpandGradients, Pooled, expand_backward};
pub use self::backward_plan::{ExpandBackwardPlans, ExpandBackwardSizes};
pub use self::finish::Projected;
use self::forward::{expand_kernel, pool_kernel};
use self::plan::FINISHES;
pub use self::plan::{ExpandPlan, ExpandPlans, ExpandSizes, PoolPlans};
use crate::launch::device::Device;
use crate::launch::loops::fits_loops;
use crate::launch::plan::Planned;
use crate::launch::tensor::{Tensor, arg, check, empty, f32_storage, float_type, positive, sizes, u32_storage};
use crate::linear::{ProjectStrategy, project};
use crate::select::FOUR;
use crate::stages::combine::Chosen;
use crate::table::pages::{Window, check_pages, windows};
use crate::table::source::RowSource;
use crate::{Error, Result};

/// What the stage reads besides the chosen slots.
pub struct Memory<'a, R: Runtime> {
    /// `[table_rows, value_dim]`, f32, f16 or bf16, in pages of some rows each; one where it fits a binding.
    pub values: &'a [Tensor<R>],
    /// Where the slots find their rows.
    pub rows: RowSource<'a, R>,
    /// `W_oᵀ` `[pooled_blocks · value_dim, hidden_size]`, in the type of the values; None: the pooled value is the output.
    pub weight: Option<&'a Tensor<R>>,
    /// f32 `[hidden_size]`, added to the output.
    pub bias: Option<&'a Tensor<R>>,
    /// f32 `[tokens, value_dim]`: the pooled value is multiplied by its silu. Only with one pooled block.
    pub gate: Option<&'a Tensor<R>>,
    /// f32 `[tokens]`: the output is multiplied by its sigmoid.
    pub output_gate: Option<&'a Tensor<R>>,
}

impl<R: Runtime> Clone for Memory<'_, R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<R: Runtime> Copy for Memory<'_, R> {}

impl<R: Runtime> Memory<'_, R> {
    /// Whether something is done to the pooled or projected values before they are the output.
    fn finishes(&self) -> bool {
        self.weight.is_none() || self.bias.is_some() || self.output_gate.is_some()
    }
}

/// How the stage is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExpandStrategy {
    /// Pool and project in one kernel; the pooled values of a tile stay in shared memory. For a table of one page, with an output
    /// projection and neither bias nor output gate.
    Fused,
    /// A pooling kernel that writes `[tokens, expansion · value_dim]`, then a matrix product.
    Pooled(ProjectStrategy),
}

impl ExpandStrategy {
    /// Two kernels where matrix units take the product, or the table has pages; one where its cubes reach the whole device, or where a token's rows are so few beside the
    /// weight that cubes can share that out and each gather again. A CPU's device's cubes don't share: one kernel for any tile.
    pub fn choose<R: Runtime>(client: &ComputeClient<R>, sizes: &ExpandSizes) -> Self {
        if !sizes.projects {
            return Self::Pooled(ProjectStrategy::Tile);
        }
        let ExpandSizes { tokens, slots, hidden_size, dtype, .. } = *sizes;
        let (device, pooled_dim) = (Device::of(client), sizes.pooled_dim());
        let product = ProjectStrategy::choose(client, tokens, dtype.storage());
        let loops = pooled_dim.saturating_mul(hidden_size) / (FOUR * FOUR * device.units(usize::MAX) * device.block);
        let fits = pooled_dim.saturating_add(slots).saturating_mul(8) / 8 < usize::MAX / 64
            && (5 * pooled_dim + 8 * slots) * device.tile.min(tokens) <= device.shared_bytes
            && fits_loops(2 * loops);
        let worth = match device.on_cpu {
            true => tokens > 1,
            false => tokens.div_ceil(device.tile) >= device.processors || tokens == 1,
        };
        let whole = sizes.pages <= 1 && !sizes.finishes();
        if product == ProjectStrategy::Tile && worth && fits && whole { Self::Fused } else { Self::Pooled(product) }
    }
}

/// Launches the stage: `y = (W_o · pooled + b) · sigmoid(o)`, in the type of the values.
///
/// Slots and addresses past the table are read as its last one. No tokens give no output, `[0, hidden_size]`.
///
/// # Errors
/// Shapes, types or sizes that don't fit; nothing is launched then.
pub fn expand<R: Runtime>(
    client: &ComputeClient<R>,
    chosen: &Chosen<R>,
    memory: &Memory<'_, R>,
    strategy: ExpandStrategy,
) -> Result<Tensor<R>> {
    let stage = ExpandCall::check(client, chosen, memory)?;
    if stage.sizes.tokens == 0 {
        return empty(client, "output", &[0, stage.sizes.hidden_size], stage.dtype);
    }
    match strategy {
        ExpandStrategy::Fused => stage.launch_fused(),
        ExpandStrategy::Pooled(product) => {
            let pooled = stage.launch_pool(product.is_invariant())?;
            project_pooled(client, &pooled, memory, product)?.output(memory)
        }
    }
}

/// The second half of the two-kernel strategy: `pooled` as [`pool`] gives it, projected where the layer projects.
///
/// # Errors
/// As [`expand`].
pub fn project_pooled<R: Runtime>(
    client: &ComputeClient<R>,
    pooled: &Tensor<R>,
    memory: &Memory<'_, R>,
    strategy: ProjectStrategy,
) -> Result<Projected<R>> {
    let dtype = memory.values.first().ok_or(Error::Zero { what: "pages of the values" })?.dtype;
    let values = match memory.weight {
        // What is finished afterwards is rounded then.
        Some(weight) if memory.finishes() => project(client, pooled, weight, f32_storage(), strategy)?,
        Some(weight) => project(client, pooled, weight, weight.dtype, strategy)?,
        None => pooled.clone(),
    };
    Ok(Projected { values, dtype })
}

/// The first half of the two-kernel strategy: pooled values `[tokens, pooled_blocks · value_dim]`, in the type of the values; in f32 where the
/// table has several pages, whose sums are added up page by page, and where there is no projection to sum in f32. If `invariant`, a token has the same
/// bits however many there are.
///
/// # Errors
/// Shapes, types or sizes that don't fit; nothing is launched then.
pub fn pool<R: Runtime>(
    client: &ComputeClient<R>,
    chosen: &Chosen<R>,
    memory: &Memory<'_, R>,
    invariant: bool,
) -> Result<Tensor<R>> {
    ExpandCall::check(client, chosen, memory)?.launch_pool(invariant)
}

/// The checked arguments.
struct ExpandCall<'a, R: Runtime> {
    client: &'a ComputeClient<R>,
    device: Device,
    chosen: &'a Chosen<R>,
    memory: &'a Memory<'a, R>,
    /// Element type of the values and of the weight.
    dtype: StorageType,
    /// That of the pooled values.
    sums: StorageType,
    sizes: ExpandSizes,
}

impl<'a, R: Runtime> ExpandCall<'a, R> {
    fn check(client: &'a ComputeClient<R>, chosen: &'a Chosen<R>, memory: &'a Memory<'a, R>) -> Result<Self> {
        let first_page = memory.values.first().ok_or(Error::Zero { what: "pages of the values" })?;
        let element = float_type(client, first_page, "values")?;
        let dtype = element.storage();
        let [tokens, heads, top_m, cores] = *chosen.scores.shape().as_slice() else {
            let (found, expected) = (chosen.scores.shape().to_vec(), "[tokens, heads, top_m, cores]");
            return Err(Error::Dimensions { tensor: "scores", found, expected });
        };
        let [_, value_dim] = sizes(first_page, "values")?;
        positive(&[("heads", heads), ("top_m", top_m)])?;
        memory.rows.check(client)?;
        let address = memory.rows.plan();
        let pooled_dim = address.pooled_blocks().saturating_mul(value_dim);
        let hidden_size = match memory.weight {
            Some(weight) => sizes(weight, "weight")?[1],
            None => pooled_dim,
        };
        let sizes = ExpandSizes {
            tokens,
            slots: heads * top_m,
            cores,
            address,
            value_dim,
            hidden_size,
            dtype: element,
            gated: memory.gate.is_some(),
            projects: memory.weight.is_some(),
            biased: memory.bias.is_some(),
            output_gated: memory.output_gate.is_some(),
            pages: memory.values.len(),
            shuffle_pages: memory.rows.shuffle.len(),
        };
        sizes.check()?;
        check(client, &chosen.scores, "scores", &[tokens, heads, top_m, cores], f32_storage())?;
        check(client, &chosen.slots, "slots", &[tokens, heads, top_m], u32_storage())?;
        check_pages(client, "values", memory.values, memory.rows.table_rows, value_dim)?;
        if let Some(weight) = memory.weight {
            check(client, weight, "weight", &[pooled_dim, hidden_size], dtype)?;
        }
        if let Some(bias) = memory.bias {
            check(client, bias, "bias", &[hidden_size], f32_storage())?;
        }
        if let Some(gate) = memory.output_gate {
            check(client, gate, "output gate", &[tokens], f32_storage())?;
        }
        if let Some(gate) = memory.gate {
            check(client, gate, "gate", &[tokens, value_dim], f32_storage())?;
        }
        let wide = memory.values.len() > 1 || memory.weight.is_none();
        let sums = if wide { f32_storage() } else { dtype };
        Ok(Self { client, device: Device::of(client), chosen, memory, dtype, sums, sizes })
    }

    fn launch_fused(&self) -> Result<Tensor<R>> {
        let (client, memory, sizes) = (self.client, self.memory, &self.sizes);
        let Planned { plan, launch } = ExpandPlan::fused(&self.device, sizes)?;
        let ([values], Some(weight)) = (memory.values, memory.weight) else { return Err(FINISHES) };
        let output = empty(client, "output", &[sizes.tokens, sizes.hidden_size], self.dtype)?;
        let slots = memory.rows.resolve(client, &self.chosen.slots)?;
        let (grid, cube_dim) = launch.start(&self.device)?;
        // SAFETY: `check` has seen every shape; the kernel clamps slots and addresses to the table.
        unsafe {
            expand_kernel::launch_unchecked::<R>(
                client,
                grid,
                cube_dim,
                values.required_address_type(),
                plan.width,
                plan.columns_width,
                arg(&slots, 1),
                arg(&self.chosen.scores, 1),
                arg(memory.rows.shuffle_or(&slots), 1),
                arg(values, plan.width),
                arg(memory.gate.unwrap_or(&self.chosen.scores), 1),
                arg(weight, plan.columns_width),
                arg(&output, plan.columns_width),
                memory.rows.offset as u32,
                sizes.tokens as u32,
                launch.cubes as u32,
                plan,
                self.dtype,
            );
        }
        Ok(output)
    }

    fn launch_pool(&self, invariant: bool) -> Result<Tensor<R>> {
        let (memory, tokens) = (self.memory, self.sizes.tokens);
        let shape = [tokens, self.sizes.pooled_dim()];
        if tokens == 0 {
            return empty(self.client, "pooled", &shape, self.sums);
        }
        let planned = ExpandPlan::pooling(&self.device, &self.sizes, invariant)?;
        let pooled = empty(self.client, "pooled", &shape, self.sums)?;
        let slots = memory.rows.resolve(self.client, &self.chosen.slots)?;
        for (page, window) in memory.values.iter().zip(windows(memory.values)) {
            self.launch_page(page, window, &slots, &pooled, planned)?;
        }
        Ok(pooled)
    }

    /// Adds the rows of a page to `pooled`; the first page's sums take the place of what was there.
    fn launch_page(
        &self,
        page: &Tensor<R>,
        window: Window,
        slots: &Tensor<R>,
        pooled: &Tensor<R>,
        planned: Planned<ExpandPlan>,
    ) -> Result<()> {
        let (memory, Planned { plan, launch }) = (self.memory, planned);
        let (grid, cube_dim) = launch.start(&self.device)?;
        // SAFETY: `check` has seen every shape; the kernel clamps slots and addresses to the table and reads rows of the page alone.
        unsafe {
            pool_kernel::launch_unchecked::<R>(
                self.client,
                grid,
                cube_dim,
                page.required_address_type(),
                plan.width,
                arg(slots, 1),
                arg(&self.chosen.scores, 1),
                arg(memory.rows.shuffle_or(slots), 1),
                arg(page, plan.width),
                arg(memory.gate.unwrap_or(&self.chosen.scores), 1),
                arg(pooled, plan.width),
                window.first_row as u32,
                window.rows as u32,
                memory.rows.offset as u32,
                self.sizes.tokens as u32,
                launch.cubes as u32,
                window.first_row > 0,
                plan,
                self.dtype,
                pooled.dtype,
            );
        }
        Ok(())
    }
}
