//! What becomes of projected values: `y[t, c] = (v[t, c] + b[c]) · sigmoid(o[t])`, in the layer's type, and the way back through it:
//! `∂v[t, c] = ∂y[t, c] · sigmoid(o[t])` and `∂o[t] = sigmoid'(o[t]) · Σ_c ∂y[t, c] · (v[t, c] + b[c])`.
//!
//! Reads and writes `[tokens, hidden_size]` once each; backwards, through a gate, it reads two of them and writes one.

use cubecl::ir::StorageType;
use cubecl::prelude::*;

use super::{ExpandSizes, Memory};
use crate::Result;
use crate::launch::device::Device;
use crate::launch::plan::{Launch, Planned};
use crate::launch::tensor::{Tensor, arg, check, empty, f32_storage, sizes};
use crate::linear::cast::cast;
use crate::linear::tile::component_sum;
use crate::select::{lane_of, lane_sum, row_lanes};

/// Pooled values `[tokens, hidden_size]` after the projection, before bias and output gate.
pub struct Projected<R: Runtime> {
    /// In f32 where something is still to be done to them, else the output itself.
    pub values: Tensor<R>,
    /// Element type of the output.
    pub(super) dtype: StorageType,
}

/// What is fixed when the kernels are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct FinishPlan {
    /// Vectors of a row.
    columns: usize,
    biased: bool,
    gated: bool,
    /// Tokens of a cube, backwards.
    tile: usize,
    units: usize,
}

impl FinishPlan {
    /// Plans [`Projected::output`].
    pub fn of(device: &Device, sizes: &FinishSizes) -> Planned<Self> {
        let plan = Self::single(device, sizes);
        let launch = Launch::flat(device, "finish_kernel", sizes.tokens.saturating_mul(plan.columns), 0);
        Planned { plan: Self { units: launch.units, ..plan }, launch }
    }

    /// Plans the way back through an output gate.
    pub fn backward(device: &Device, sizes: &FinishSizes) -> Planned<Self> {
        let plan = Self::single(device, sizes);
        let lanes = row_lanes(device, plan.columns);
        let units = device.flat(sizes.tokens.saturating_mul(lanes));
        let plan = Self { tile: units / lanes, units, ..plan };
        let launch = Launch {
            kernel: "finish_backward_kernel",
            cubes: sizes.tokens.div_ceil(plan.tile),
            units,
            shared_bytes: if lanes > 1 { 4 * units } else { 0 },
            loops: 1 + plan.columns.div_ceil(lanes) + lanes,
        };
        Planned { plan, launch }
    }

    /// The plan of a cube of one token and one unit.
    fn single(device: &Device, sizes: &FinishSizes) -> Self {
        let FinishSizes { hidden_size, biased, gated, .. } = *sizes;
        Self { columns: hidden_size / device.width(4, &[hidden_size]), biased, gated, tile: 1, units: 1 }
    }
}

/// What is finished: `[tokens, hidden_size]`, by a bias and by an output gate.
#[derive(Debug, Clone, Copy)]
pub(super) struct FinishSizes {
    pub tokens: usize,
    pub hidden_size: usize,
    pub biased: bool,
    pub gated: bool,
}

impl FinishSizes {
    fn new<R: Runtime>(memory: &Memory<'_, R>, tokens: usize, hidden_size: usize) -> Self {
        Self { tokens, hidden_size, biased: memory.bias.is_some(), gated: memory.output_gate.is_some() }
    }
}

impl From<&ExpandSizes> for FinishSizes {
    fn from(sizes: &ExpandSizes) -> Self {
        let ExpandSizes { tokens, hidden_size, biased, output_gated: gated, .. } = *sizes;
        Self { tokens, hidden_size, biased, gated }
    }
}

impl<R: Runtime> Projected<R> {
    /// The layer's output.
    ///
    /// # Errors
    /// An output larger than one binding of the device.
    pub fn output(&self, memory: &Memory<'_, R>) -> Result<Tensor<R>> {
        if !memory.finishes() {
            return Ok(self.values.clone());
        }
        let [tokens, hidden_size] = sizes(&self.values, "projected values")?;
        let client = self.values.client();
        check(client, &self.values, "projected values", &[tokens, hidden_size], f32_storage())?;
        let output = empty(client, "output", &[tokens, hidden_size], self.dtype)?;
        if tokens == 0 {
            return Ok(output);
        }
        let device = Device::of(client);
        let width = device.width(4, &[hidden_size]);
        let Planned { plan, launch } = FinishPlan::of(&device, &FinishSizes::new(memory, tokens, hidden_size));
        let (grid, cube_dim) = launch.start(&device)?;
        // SAFETY: shapes are checked, those of bias and gate by the stage; a unit reads and writes its own vector.
        unsafe {
            finish_kernel::launch_unchecked::<R>(
                client,
                grid,
                cube_dim,
                width,
                arg(&self.values, width),
                arg(memory.bias.unwrap_or(&self.values), width),
                arg(memory.output_gate.unwrap_or(&self.values), 1),
                arg(&output, width),
                tokens as u32,
                plan,
                self.dtype,
            );
        }
        Ok(output)
    }
}

#[cube(launch_unchecked)]
fn finish_kernel<E: Float, N: Size>(
    values: &Array<Vector<f32, N>>,
    bias: &Array<Vector<f32, N>>,
    gate: &Array<f32>,
    output: &mut Array<Vector<E, N>>,
    tokens: u32,
    #[comptime] plan: FinishPlan,
    #[define(E)] _dtype: StorageType,
) {
    let item = CUBE_POS * plan.units + UNIT_POS as usize;
    if item < tokens as usize * plan.columns {
        let mut value = values[item];
        if comptime!(plan.biased) {
            value += bias[item % plan.columns];
        }
        if comptime!(plan.gated) {
            value *= Vector::new(sigmoid(gate[item / plan.columns]));
        }
        output[item] = Vector::cast_from(value);
    }
}

#[cube]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + f32::exp(-x))
}

/// Gradients that have come through bias and output gate.
pub(super) struct Finished<R: Runtime> {
    /// f32 `[tokens, hidden_size]`: of the projected values.
    pub values: Tensor<R>,
    /// f32 `[tokens]`: of the output gate before its sigmoid, where there is one.
    pub gate: Option<Tensor<R>>,
}

/// Brings `grad_output` `[tokens, hidden_size]` back through [`Projected::output`]. `projected`, which an output gate alone needs, is f32.
/// The stage has checked the shapes; there are tokens.
pub(super) fn finish_backward<R: Runtime>(
    client: &ComputeClient<R>,
    memory: &Memory<'_, R>,
    projected: Option<&Tensor<R>>,
    grad_output: &Tensor<R>,
) -> Result<Finished<R>> {
    let (Some(gate), Some(projected)) = (memory.output_gate, projected) else {
        return Ok(Finished { values: cast(client, grad_output, f32_storage())?, gate: None });
    };
    let [tokens, hidden_size] = sizes(grad_output, "gradient of the output")?;
    let device = Device::of(client);
    let width = device.width(4, &[hidden_size]);
    let Planned { plan, launch } = FinishPlan::backward(&device, &FinishSizes::new(memory, tokens, hidden_size));
    let (grid, cube_dim) = launch.start(&device)?;
    let values = empty(client, "gradient of the projected values", &[tokens, hidden_size], f32_storage())?;
    let grad_gate = empty(client, "gradient of the output gate", &[tokens], f32_storage())?;
    // SAFETY: shapes are checked; the lanes of a token read and write its own numbers.
    unsafe {
        finish_backward_kernel::launch_unchecked::<R>(
            client,
            grid,
            cube_dim,
            width,
            arg(projected, width),
            arg(memory.bias.unwrap_or(projected), width),
            arg(gate, 1),
            arg(grad_output, width),
            arg(&values, width),
            arg(&grad_gate, 1),
            tokens as u32,
            plan,
            grad_output.dtype,
        );
    }
    Ok(Finished { values, gate: Some(grad_gate) })
}

#[cube(launch_unchecked)]
fn finish_backward_kernel<E: Float, N: Size>(
    projected: &Array<Vector<f32, N>>,
    bias: &Array<Vector<f32, N>>,
    gate: &Array<f32>,
    grad_output: &Array<Vector<E, N>>,
    grad_values: &mut Array<Vector<f32, N>>,
    grad_gate: &mut Array<f32>,
    tokens: u32,
    #[comptime] plan: FinishPlan,
    #[define(E)] _dtype: StorageType,
) {
    let at = lane_of(plan.tile, plan.units);
    let token = CUBE_POS * plan.tile + at.row;
    let mut partial = SharedMemory::<f32>::new(comptime!(if at.lanes > 1 { plan.units } else { 1 }));
    let mut open = 0.0f32;
    let mut along = Vector::<f32, N>::new(0.0);
    if token < tokens as usize {
        open = sigmoid(gate[token]);
        for c in range_stepped(at.lane, plan.columns, at.lanes) {
            let item = token * plan.columns + c;
            let grad = Vector::<f32, N>::cast_from(grad_output[item]);
            grad_values[item] = grad * Vector::new(open);
            let mut value = projected[item];
            if comptime!(plan.biased) {
                value += bias[c];
            }
            along += grad * value;
        }
    }
    let sum = lane_sum(component_sum::<N>(along), &mut partial, at);
    if at.lane == 0 && token < tokens as usize {
        grad_gate[token] = sum * open * (1.0 - open);
    }
}
