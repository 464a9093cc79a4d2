//! Dense FFN: `output = act(input · up) · down`.
//!
//! Shapes: input `[tokens, hidden]`, up `[hidden, inner]` (`[hidden, 2 · inner]` for SwiGLU, the gate's columns first), down `[inner,
//! hidden]`, output `[tokens, hidden]`. Moves both weights once, and `tokens · inner` numbers four times beside them.

use cubecl::prelude::*;
use ultramem_kernels::launch::{Device, arg};
use ultramem_kernels::linear::{ProjectStrategy, project};
use ultramem_kernels::{Result, Tensor, check, empty};

/// What an FFN does between its two matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `gelu(x) = x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))`.
    Gelu,
    /// `silu(g) · u`, `g` being the first half of what the first matrix gives, `u` the second.
    SwiGlu,
}

impl Activation {
    /// Columns of the first matrix for each of the second's rows.
    pub(crate) fn columns(self) -> usize {
        match self {
            Self::Gelu => 1,
            Self::SwiGlu => 2,
        }
    }
}

/// Launches the FFN: `input` `[tokens, hidden]`, `up` `[hidden, inner]` or, for SwiGLU, `[hidden, 2 · inner]`, `down` `[inner,
/// hidden]`, all of one type, f32, f16 or bf16; returns `[tokens, hidden]` of that type. What lies between the matrices is stored in it too.
///
/// # Errors
/// Shapes, types or sizes that don't fit; nothing is launched then.
pub fn dense<R: Runtime>(
    client: &ComputeClient<R>,
    input: &Tensor<R>,
    up: &Tensor<R>,
    down: &Tensor<R>,
    activation: Activation,
    strategy: ProjectStrategy,
) -> Result<Tensor<R>> {
    let inner = down.shape().first().copied().unwrap_or(0);
    let hidden = input.shape().last().copied().unwrap_or(0);
    check(client, up, "up", &[hidden, inner * activation.columns()], input.dtype)?;
    check(client, down, "down", &[inner, hidden], input.dtype)?;
    let raised = project(client, input, up, input.dtype, strategy)?;
    let activated = activate(client, &raised, activation)?;
    project(client, &activated, down, input.dtype, strategy)
}

/// `act` of `numbers` `[rows, inner]` or, for SwiGLU, `[rows, 2 · inner]`: `[rows, inner]` in their type.
pub(crate) fn activate<R: Runtime>(
    client: &ComputeClient<R>,
    numbers: &Tensor<R>,
    activation: Activation,
) -> Result<Tensor<R>> {
    let (rows, inner) = (numbers.shape()[0], numbers.shape()[1] / activation.columns());
    let output = empty(client, "activated", &[rows, inner], numbers.dtype)?;
    if rows * inner == 0 {
        return Ok(output);
    }
    let device = Device::of(client);
    let width = device.width(4, &[inner]);
    let items = rows * (inner / width);
    let units = device.flat(items);
    // SAFETY: the output has the input's rows; a unit reads and writes vectors of one place below `items`.
    unsafe {
        activate_kernel::launch_unchecked::<R>(
            client,
            device.grid(items.div_ceil(units))?,
            CubeDim::new_1d(units as u32),
            width,
            arg(numbers, width),
            arg(&output, width),
            items as u32,
            (inner / width) as u32,
            activation,
            units,
            numbers.dtype,
        );
    }
    Ok(output)
}

#[cube(launch_unchecked)]
fn activate_kernel<E: Float, N: Size>(
    numbers: &Array<Vector<E, N>>,
    output: &mut Array<Vector<E, N>>,
    items: u32,
    inner: u32,
    #[comptime] activation: Activation,
    #[comptime] units: usize,
    #[define(E)] _dtype: StorageType,
) {
    let item = CUBE_POS * units + UNIT_POS as usize;
    if item >= items as usize {
        terminate!();
    }
    let inner = inner as usize;
    let first = item / inner * comptime!(activation.columns()) * inner + item % inner;
    let x = Vector::<f32, N>::cast_from(numbers[first]);
    let mut activated = Vector::<f32, N>::new(0.0);
    #[unroll]
    for n in 0..N::value() {
        activated[n] = match activation {
            Activation::Gelu => x[n] * sigmoid(GELU * (x[n] + 0.044715 * x[n] * x[n] * x[n])),
            Activation::SwiGlu => x[n] * sigmoid(x[n]),
        };
    }
    if comptime!(activation == Activation::SwiGlu) {
        activated *= Vector::<f32, N>::cast_from(numbers[first + inner]);
    }
    output[item] = Vector::cast_from(activated);
}

/// `2 · √(2/π)`: `(1 + tanh(y)) / 2` is the sigmoid of `2y`, which no large y turns into NaN.
const GELU: f32 = 1.595_769;

#[cube]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + f32::exp(0.0 - x))
}
