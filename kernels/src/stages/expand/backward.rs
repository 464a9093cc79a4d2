//! Backward of expand: from the output to the scores of the slots, the chosen value rows, W_o and the gate.
//!
//! - `grad_pooled = grad_output · W_o`; through a gate, `grad_pooled ⊙ silu(g)` and `grad_gate = grad_pooled ⊙ pooled ⊙ silu'(g)`;
//! - `grad_scores[t, h, m, k] = Σ_c grad_pooled[t, e, c] · V[row, c]` over slice k: a few lanes take one slot and read its row once;
//! - `grad_values[row] = Σ s_k · grad_pooled[t, e, slice k]` over the slots that read the row, grouped by row and summed in slot order
//!   ([`RowGradients`]): no row is touched that no slot read;
//! - `grad_W_o = grad_outputᵀ · pooled`, the pooled values as the forward pass left them; where a gate came between they are made anew.
//!
//! Moves the chosen rows once (twice with a gate), `grad_pooled` once per slot (from cache) and a gradient for each used row.

use cubecl::prelude::*;

use super::{Memory, Stage, pool};
use crate::Result;
use crate::launch::device::Device;
use crate::launch::loops::check_loops;
use crate::launch::tensor::{Tensor, arg, check, empty, f32_storage, u32_storage, zeros};
use crate::linear::outer::outer;
use crate::linear::tile::component_sum;
use crate::linear::{ProjectStrategy, project};
use crate::select::{lane_of, lane_sum, row_lanes};
use crate::stages::combine::Chosen;
use crate::table::group::group;
use crate::table::pages::{Page, Window, windows};
use crate::table::row_gradients::RowGradients;
use crate::table::segment_sum::{Entries, sum_rows};

/// Gradients of the stage.
pub struct ExpandGradients<R: Runtime> {
    /// f32 `[tokens, heads, top_m, cores]`.
    pub scores: Tensor<R>,
    /// Of `[rows, value_dim]`.
    pub values: RowGradients<R>,
    /// f32 `[hidden_size, expansion · value_dim]`, as PyTorch has the weight.
    pub weight: Tensor<R>,
    /// f32 `[tokens, value_dim]`: of the gate before its silu, where there is one.
    pub gate: Option<Tensor<R>>,
}

/// Launches the backward pass of [`expand`](super::expand), for what it was given.
///
/// - `weight` `[hidden_size, expansion · value_dim]`: W_o as PyTorch has it, the transpose of the memory's
/// - `pooled` `[tokens, expansion · value_dim]`: what [`pool`](super::pool) gives without a gate; None: made anew
/// - `grad_output` `[tokens, hidden_size]`, in the type of the values; no tokens give a weight's gradient of zeros, and no used row
///
/// # Errors
/// Shapes, types or sizes that don't fit; nothing is launched then.
pub fn expand_backward<R: Runtime>(
    client: &ComputeClient<R>,
    chosen: &Chosen<R>,
    memory: &Memory<'_, R>,
    weight: &Tensor<R>,
    pooled: Option<&Tensor<R>>,
    grad_output: &Tensor<R>,
    strategy: ProjectStrategy,
) -> Result<ExpandGradients<R>> {
    let stage = Stage::check(client, chosen, memory)?;
    let (tokens, hidden_size, dtype) = (stage.tokens, stage.hidden_size, stage.dtype);
    let pooled_dim = stage.plan.expansion * stage.plan.value_dim;
    check(client, weight, "weight", &[hidden_size, pooled_dim], dtype)?;
    check(client, grad_output, "gradient of the output", &[tokens, hidden_size], dtype)?;
    if let Some(pooled) = pooled {
        let sums = if stage.plan.paged { f32_storage() } else { dtype };
        check(client, pooled, "pooled", &[tokens, pooled_dim], sums)?;
    }
    if tokens == 0 {
        return stage.nothing();
    }
    let mut grad_pooled = project(client, grad_output, weight, f32_storage(), strategy)?;
    let mut pooled = match pooled {
        Some(pooled) => pooled.clone(),
        None => pool(client, chosen, &Memory { gate: None, ..*memory })?,
    };
    let mut grad_gate = None;
    if let Some(gate) = memory.gate {
        let gradients = gate_backward(client, gate, &pooled, &grad_pooled)?;
        (pooled, grad_pooled) = (gradients.pooled, gradients.grad_pooled);
        grad_gate = Some(gradients.grad_gate);
    }
    let places = stage.locate()?;
    let scores = stage.grad_scores(&places, &grad_pooled)?;
    let groups = group(client, &places.rows, stage.plan.rows)?;
    let entries = Entries {
        source: &places.source,
        factors: &chosen.scores,
        sources: &grad_pooled,
        count: stage.plan.cores,
        slice: stage.plan.value_dim / stage.plan.cores,
        shared: false,
    };
    let values = sum_rows(client, groups, &entries, stage.plan.rows)?;
    Ok(ExpandGradients { scores, values, weight: outer(client, grad_output, &pooled, strategy)?, gate: grad_gate })
}

/// Where each slot reads.
struct Places<R: Runtime> {
    /// u32 `[entries]`: the physical row.
    rows: Tensor<R>,
    /// u32 `[entries]`: `token · expansion + block`, the row of `grad_pooled` as `[tokens · expansion, value_dim]`.
    source: Tensor<R>,
}

/// What is fixed when the kernels are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct LocatePlan {
    /// Entries of a token.
    entries: usize,
    rows: usize,
    expansion: usize,
    shuffled: bool,
    units: usize,
}

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct GradScoresPlan {
    cores: usize,
    /// Vectors of a core's slice.
    slice: usize,
    /// Vectors that a lane takes at a time; divides `slice` where a row has one lane.
    run: usize,
    /// Whether the table has several pages.
    paged: bool,
    /// Entries of a cube.
    tile: usize,
    units: usize,
}

impl<R: Runtime> Stage<'_, R> {
    /// The gradients for no tokens: zeros, and no used row.
    fn nothing(&self) -> Result<ExpandGradients<R>> {
        let (client, plan) = (self.client, &self.plan);
        let gate = || empty(client, "gradient of the gate", &[0, plan.value_dim], f32_storage());
        Ok(ExpandGradients {
            scores: empty(client, "gradient of the scores", self.chosen.scores.shape(), f32_storage())?,
            values: RowGradients::none(client, plan.rows, plan.value_dim)?,
            weight: zeros(client, "gradient of the weight", &[self.hidden_size, plan.expansion * plan.value_dim])?,
            gate: plan.gated.then(gate).transpose()?,
        })
    }

    fn locate(&self) -> Result<Places<R>> {
        let entries = self.tokens * self.plan.entries;
        let places = Places {
            rows: empty(self.client, "rows", &[entries], u32_storage())?,
            source: empty(self.client, "sources", &[entries], u32_storage())?,
        };
        let plan = LocatePlan {
            entries: self.plan.entries,
            rows: self.plan.rows,
            expansion: self.plan.expansion,
            shuffled: self.plan.shuffled,
            units: self.device.flat(entries),
        };
        // SAFETY: `check` has seen every shape; the kernel clamps slots and addresses to the table.
        unsafe {
            locate_kernel::launch_unchecked::<R>(
                self.client,
                self.device.grid(entries.div_ceil(plan.units))?,
                CubeDim::new_1d(plan.units as u32),
                arg(&self.chosen.slots, 1),
                arg(self.memory.shuffle.unwrap_or(&self.chosen.slots), 1),
                arg(&places.rows, 1),
                arg(&places.source, 1),
                entries as u32,
                plan,
            );
        }
        Ok(places)
    }

    fn grad_scores(&self, places: &Places<R>, grad_pooled: &Tensor<R>) -> Result<Tensor<R>> {
        let scores = empty(self.client, "gradient of the scores", self.chosen.scores.shape(), f32_storage())?;
        for (page, window) in self.memory.values.iter().zip(windows(self.memory.values)) {
            self.grad_scores_of(page, window, places, grad_pooled, &scores)?;
        }
        Ok(scores)
    }

    /// Those of slots that read a row of one page.
    fn grad_scores_of(
        &self,
        values: &Tensor<R>,
        window: Window,
        places: &Places<R>,
        grad_pooled: &Tensor<R>,
        scores: &Tensor<R>,
    ) -> Result<()> {
        let width = self.width();
        let entries = self.tokens * self.plan.entries;
        let slice = self.plan.value_dim / self.plan.cores / width;
        let lanes = row_lanes(&self.device, slice);
        let units = self.device.flat(entries * lanes);
        let run = if lanes == 1 { self.device.run(slice) } else { 1 };
        let (cores, paged) = (self.plan.cores, self.plan.paged);
        let sum = if lanes > 1 { lanes } else { 0 };
        check_loops("grad_scores_kernel", cores * (1 + slice.div_ceil(lanes * run) + sum))?;
        let plan = GradScoresPlan { cores, slice, run, paged, tile: units / lanes, units };
        // SAFETY: rows and sources are those that `locate` has clamped; a unit writes scores of its own entry.
        unsafe {
            grad_scores_kernel::launch_unchecked::<R>(
                self.client,
                self.device.grid(entries.div_ceil(plan.tile))?,
                CubeDim::new_1d(units as u32),
                values.required_address_type(),
                width,
                arg(&places.rows, 1),
                arg(&places.source, 1),
                arg(values, width),
                arg(grad_pooled, width),
                arg(scores, 1),
                window.first_row as u32,
                window.rows as u32,
                entries as u32,
                plan,
                values.dtype,
            );
        }
        Ok(())
    }
}

/// Slots to physical rows and to rows of the pooled values.
#[cube(launch_unchecked)]
fn locate_kernel(
    slots: &Array<u32>,
    shuffle: &Array<u32>,
    rows: &mut Array<u32>,
    source: &mut Array<u32>,
    entries: u32,
    #[comptime] plan: LocatePlan,
) {
    let item = CUBE_POS * plan.units + UNIT_POS as usize;
    if item >= entries as usize {
        terminate!();
    }
    let last = comptime!((plan.rows * plan.expansion - 1) as u32);
    let mut address = min(slots[item], last);
    if plan.shuffled {
        address = min(shuffle[address as usize], last);
    }
    let block = address / comptime!(plan.rows as u32);
    rows[item] = address - block * comptime!(plan.rows as u32);
    source[item] = (item / plan.entries * plan.expansion) as u32 + block;
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn grad_scores_kernel<E: Float, N: Size>(
    rows: &Array<u32>,
    source: &Array<u32>,
    values: &Array<Vector<E, N>>,
    grad_pooled: &Array<Vector<f32, N>>,
    grad_scores: &mut Array<f32>,
    first_row: u32,
    page_rows: u32,
    entries: u32,
    #[comptime] plan: GradScoresPlan,
    #[define(E)] _dtype: StorageType,
) {
    let at = lane_of(plan.tile, plan.units);
    let entry = CUBE_POS * plan.tile + at.row;
    let read = min(entry, entries as usize - 1);
    let pitch = comptime!(plan.cores * plan.slice);
    let page = Page { first_row, rows: page_rows };
    let place = page.place(rows[read]);
    let mut held = entry < entries as usize;
    if comptime!(plan.paged) {
        held = held && place < page.rows;
    }
    let (row, pooled) = (place as usize * pitch, source[read] as usize * pitch);
    let mut partial = SharedMemory::<f32>::new(comptime!(if at.lanes > 1 { plan.units } else { 1 }));
    for k in 0..plan.cores {
        let mut products = Vector::<f32, N>::new(0.0);
        if held {
            let step = comptime!(at.lanes * plan.run);
            for first in range_stepped(k * plan.slice + at.lane, (k + 1) * plan.slice, step) {
                #[unroll]
                for r in 0..plan.run {
                    products += Vector::cast_from(values[row + first + r]) * grad_pooled[pooled + first + r];
                }
            }
        }
        let sum = lane_sum(component_sum::<N>(products), &mut partial, at);
        if at.lane == 0 && held {
            grad_scores[entry * plan.cores + k] = sum;
        }
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

fn gate_backward<R: Runtime>(
    client: &ComputeClient<R>,
    gate: &Tensor<R>,
    pooled: &Tensor<R>,
    grad_gated: &Tensor<R>,
) -> Result<Gated<R>> {
    let device = Device::of(client);
    let like = |name| empty(client, name, gate.shape(), f32_storage());
    let gated = Gated {
        pooled: like("gated values")?,
        grad_pooled: like("gradient of the pooled values")?,
        grad_gate: like("gradient of the gate")?,
    };
    let count: usize = gate.shape().iter().product();
    let units = device.flat(count);
    // SAFETY: the six tensors have one shape, and a unit touches its own number below their count.
    unsafe {
        gate_backward_kernel::launch_unchecked::<R>(
            client,
            device.grid(count.div_ceil(units))?,
            CubeDim::new_1d(units as u32),
            arg(gate, 1),
            arg(pooled, 1),
            arg(grad_gated, 1),
            arg(&gated.pooled, 1),
            arg(&gated.grad_pooled, 1),
            arg(&gated.grad_gate, 1),
            units,
            pooled.dtype,
        );
    }
    Ok(gated)
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
