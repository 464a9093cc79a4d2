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
mod finish;
mod forward;

use cubecl::ir::StorageType;
use cubecl::prelude::*;

pub(crate) use self::backward::Readers;
pub use self::backward::{ExpandGradients, Pooled, expand_backward};
pub use self::finish::Projected;
use self::forward::{ExpandPlan, expand_kernel, pool_kernel};
use crate::launch::device::Device;
use crate::launch::loops::{check_loops, fits_loops};
use crate::launch::tensor::{Tensor, arg, check, empty, f32_storage, float_type, positive, sizes, u32_storage};
use crate::linear::tile::{Product, Sharing};
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
    /// Two kernels where matrix units take the product, or the table has pages; one where its cubes reach the whole device, or where so few tokens gather that
    /// cubes can share out the weight and each gather again. A CPU's device's cubes don't share: one kernel for any tile.
    /// `slots` are those of a token.
    pub fn choose<R: Runtime>(client: &ComputeClient<R>, tokens: usize, slots: usize, memory: &Memory<'_, R>) -> Self {
        let device = Device::of(client);
        let Some(weight) = memory.weight else { return Self::Pooled(ProjectStrategy::Tile) };
        let product = ProjectStrategy::choose(client, tokens, weight.dtype);
        let pooled_dim = weight.shape().first().copied().unwrap_or(0);
        let hidden_size = weight.shape().last().copied().unwrap_or(0);
        let loops = pooled_dim.saturating_mul(hidden_size) / (FOUR * FOUR * device.units(usize::MAX) * device.block);
        let fits = pooled_dim.saturating_add(slots).saturating_mul(8) / 8 < usize::MAX / 64
            && (5 * pooled_dim + 8 * slots) * device.tile.min(tokens) <= device.shared_bytes
            && fits_loops(2 * loops);
        let worth = match device.on_cpu {
            true => tokens > 1,
            false => tokens.div_ceil(device.tile) >= device.processors || tokens <= FEW_TOKENS,
        };
        let whole = memory.values.len() <= 1 && !memory.finishes();
        if product == ProjectStrategy::Tile && worth && fits && whole { Self::Fused } else { Self::Pooled(product) }
    }
}

/// Tokens whose rows are few beside the weight that they are projected with: one kernel saves more than it gathers again.
const FEW_TOKENS: usize = 2;

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
    if stage.tokens == 0 {
        return empty(client, "output", &[0, stage.hidden_size], stage.dtype);
    }
    match strategy {
        ExpandStrategy::Fused => stage.launch_fused(),
        ExpandStrategy::Pooled(product) => {
            let pooled = stage.launch_pool()?;
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
/// table has several pages, whose sums are added up page by page, and where there is no projection to sum in f32.
///
/// # Errors
/// Shapes, types or sizes that don't fit; nothing is launched then.
pub fn pool<R: Runtime>(client: &ComputeClient<R>, chosen: &Chosen<R>, memory: &Memory<'_, R>) -> Result<Tensor<R>> {
    ExpandCall::check(client, chosen, memory)?.launch_pool()
}

/// The checked arguments.
struct ExpandCall<'a, R: Runtime> {
    client: &'a ComputeClient<R>,
    device: Device,
    chosen: &'a Chosen<R>,
    memory: &'a Memory<'a, R>,
    tokens: usize,
    hidden_size: usize,
    /// Element type of the values and of the weight.
    dtype: StorageType,
    /// That of the pooled values.
    sums: StorageType,
    plan: ExpandPlan,
}

impl<'a, R: Runtime> ExpandCall<'a, R> {
    fn check(client: &'a ComputeClient<R>, chosen: &'a Chosen<R>, memory: &'a Memory<'a, R>) -> Result<Self> {
        let first_page = memory.values.first().ok_or(Error::Zero { what: "pages of the values" })?;
        let dtype = float_type(client, first_page, "values")?.storage();
        let [tokens, heads, top_m, cores] = *chosen.scores.shape().as_slice() else {
            let (found, expected) = (chosen.scores.shape().to_vec(), "[tokens, heads, top_m, cores]");
            return Err(Error::Dimensions { tensor: "scores", found, expected });
        };
        let [_, value_dim] = sizes(first_page, "values")?;
        positive(&[("heads", heads), ("top_m", top_m), ("cores", cores), ("value_dim", value_dim)])?;
        multiple("value_dim", value_dim, "cores", cores)?;
        memory.rows.check(client)?;
        let address = memory.rows.plan();
        let pooled_dim = address.pooled_blocks().saturating_mul(value_dim);
        let hidden_size = match memory.weight {
            Some(weight) => sizes(weight, "weight")?[1],
            None => pooled_dim,
        };
        positive(&[("hidden_size", hidden_size)])?;
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
            let value = address.pooled_blocks() as u64;
            if value > 1 {
                return Err(Error::Exceeds { what: "expansion", value, limit_name: "what a gate takes,", limit: 1 });
            }
        }
        let plan = ExpandPlan {
            entries: heads * top_m,
            cores,
            address,
            value_dim,
            gated: memory.gate.is_some(),
            paged: memory.values.len() > 1,
            run: 1,
            columns: 0,
            sharing: Sharing { lanes: 1, slices: 1, block: 1 },
            splits: 1,
            tile: 1,
            units: 1,
        };
        let wide = plan.paged || memory.weight.is_none();
        let sums = if wide { f32_storage() } else { dtype };
        let device = Device::of(client);
        let mut stage = Self { client, device, chosen, memory, tokens, hidden_size, dtype, sums, plan };
        stage.plan.run = stage.device.run(value_dim / cores / stage.width());
        Ok(stage)
    }

    /// Elements of a load of a value row: as wide as the device loads, within one core's slice.
    fn width(&self) -> usize {
        self.device.width(self.dtype.size(), &[self.plan.value_dim / self.plan.cores])
    }

    /// The plan with the largest tile that fits, `work` being pieces of work a token and `shared` the bytes of a token besides its entries;
    /// more units where one would go through too many iterations.
    fn tiled(&self, work: usize, shared: usize) -> Result<ExpandPlan> {
        let (device, width) = (&self.device, self.width());
        let most = device.tile.min(self.tokens.next_power_of_two());
        let tiles = [16, 8, 4, 2, 1].into_iter().filter(|&tile| tile <= most);
        let tiles = tiles.map(|tile| (tile, device.units(tile * work)));
        let widened = core::iter::successors(Some(2 * device.units(work)), |units| Some(2 * units));
        let widened = widened.take_while(|&units| units <= device.most_units()).map(|units| (1, units));
        let with = |(tile, units)| ExpandPlan { tile, units, ..self.plan };
        let bytes = |plan: &ExpandPlan| 4 * plan.entry_words() + plan.tile * shared;
        let fits = |plan: &ExpandPlan| bytes(plan) <= device.shared_bytes && fits_loops(plan.pool_loops(width));
        let plan = tiles.chain(widened).map(with).find(fits).unwrap_or_else(|| with((1, device.units(work))));
        device.fits_shared("expand", bytes(&plan))?;
        Ok(plan)
    }

    /// The plan of the fused kernel: a cube a tile where they reach the whole device, else as many as share out the weight with at most
    /// twice its bytes gathered again.
    fn fused_plan(&self, columns_width: usize) -> Result<ExpandPlan> {
        let (device, bytes) = (&self.device, self.dtype.size());
        let pooled_dim = self.plan.blocks() * self.plan.value_dim;
        let (columns, depth) = (self.hidden_size / columns_width, pooled_dim / self.width());
        let plan = ExpandPlan { columns, ..self.tiled(depth.max(columns), 4 * pooled_dim)? };
        let gathered = plan.tile * plan.entries * plan.value_dim;
        let cubes = device.processors.div_ceil(self.tokens.div_ceil(plan.tile));
        let cubes = cubes.min(2 * pooled_dim * self.hidden_size / gathered);
        if device.on_cpu || cubes <= 1 {
            let block = (columns / plan.units).clamp(1, device.block);
            return Ok(ExpandPlan { sharing: Sharing { lanes: plan.units, slices: 1, block }, ..plan });
        }
        let product = Product { columns, depth, tile: plan.tile, bytes: bytes * columns_width, width: columns_width };
        let most = ExpandPlan { units: device.most_units(), ..plan };
        let used = 4 * most.entry_words() + plan.tile * 4 * pooled_dim;
        let sharing = Sharing::sliced(device, &product, cubes, device.shared_bytes.saturating_sub(used));
        Ok(ExpandPlan { sharing, splits: sharing.cubes(columns), units: sharing.units(), ..plan })
    }

    fn launch_fused(&self) -> Result<Tensor<R>> {
        let (memory, dtype) = (self.memory, self.dtype);
        let [values] = memory.values else {
            let value = memory.values.len() as u64;
            return Err(Error::Number { what: "pages of values for one kernel", value, expected: 1 });
        };
        let (Some(weight), false) = (memory.weight, memory.finishes()) else {
            let what = "output projections without bias or gate, for one kernel";
            return Err(Error::Number { what, value: 0, expected: 1 });
        };
        let slots = memory.rows.resolve(self.client, &self.chosen.slots)?;
        let columns_width = self.device.width(dtype.size(), &[self.hidden_size]);
        let plan = self.fused_plan(columns_width)?;
        check_loops("expand_kernel", plan.fused_loops(self.width()))?;
        let output = empty(self.client, "output", &[self.tokens, self.hidden_size], dtype)?;
        let cubes = self.tokens.div_ceil(plan.tile) * plan.splits;
        // SAFETY: `check` has seen every shape; the kernel clamps slots and addresses to the table.
        unsafe {
            expand_kernel::launch_unchecked::<R>(
                self.client,
                self.device.grid(cubes)?,
                CubeDim::new_1d(plan.units as u32),
                values.required_address_type(),
                self.width(),
                columns_width,
                arg(&slots, 1),
                arg(&self.chosen.scores, 1),
                arg(memory.rows.shuffle_or(&slots), 1),
                arg(values, self.width()),
                arg(memory.gate.unwrap_or(&self.chosen.scores), 1),
                arg(weight, columns_width),
                arg(&output, columns_width),
                memory.rows.offset as u32,
                self.tokens as u32,
                cubes as u32,
                plan,
                dtype,
            );
        }
        Ok(output)
    }

    fn launch_pool(&self) -> Result<Tensor<R>> {
        let pooled_dim = self.plan.blocks() * self.plan.value_dim;
        if self.tokens == 0 {
            return empty(self.client, "pooled", &[0, pooled_dim], self.sums);
        }
        let tile = if self.tokens > 8 * self.device.busy_cubes { self.device.tile } else { 1 };
        let plan = self.tiled(pooled_dim / self.width() / self.plan.run, 0)?;
        let plan = ExpandPlan { tile: plan.tile.min(tile), ..plan };
        check_loops("pool_kernel", plan.pool_loops(self.width()))?;
        let pooled = empty(self.client, "pooled", &[self.tokens, pooled_dim], self.sums)?;
        let slots = self.memory.rows.resolve(self.client, &self.chosen.slots)?;
        for (page, window) in self.memory.values.iter().zip(windows(self.memory.values)) {
            self.launch_page(page, window, &slots, &pooled, plan)?;
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
        plan: ExpandPlan,
    ) -> Result<()> {
        let (memory, width) = (self.memory, self.width());
        let cubes = self.tokens.div_ceil(plan.tile);
        // SAFETY: `check` has seen every shape; the kernel clamps slots and addresses to the table and reads rows of the page alone.
        unsafe {
            pool_kernel::launch_unchecked::<R>(
                self.client,
                self.device.grid(cubes)?,
                CubeDim::new_1d(plan.units as u32),
                page.required_address_type(),
                width,
                arg(slots, 1),
                arg(&self.chosen.scores, 1),
                arg(memory.rows.shuffle_or(slots), 1),
                arg(page, width),
                arg(memory.gate.unwrap_or(&self.chosen.scores), 1),
                arg(pooled, width),
                window.first_row as u32,
                window.rows as u32,
                memory.rows.offset as u32,
                self.tokens as u32,
                cubes as u32,
                window.first_row > 0,
                plan,
                self.dtype,
                pooled.dtype,
            );
        }
        Ok(())
    }
}

fn multiple(what: &'static str, value: usize, divisor_name: &'static str, divisor: usize) -> Result<()> {
    if value.is_multiple_of(divisor) {
        return Ok(());
    }
    Err(Error::NotMultiple { what, value: value as u64, divisor_name, divisor: divisor as u64 })
}
