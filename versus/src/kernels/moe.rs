//! Mixture of experts: `output[t] = Σ_k weights[t, k] · expert_k(input[t])`, each expert an FFN of its own.
//!
//! The router's product, the routing and grouping of [`route`](super::route()), then the two matrices of the experts as grouped products, with
//! the activation between them, and last the weighted sum.
//! Moves the touched experts' weights, and per entry `hidden + 2 · inner` numbers in and out.

use cubecl::ir::StorageType;
use cubecl::prelude::*;
use ultramem_kernels::launch::{Device, arg, check_loops, float_type, positive, tokens_of};
use ultramem_kernels::linear::{ProjectStrategy, project};
use ultramem_kernels::{ElementType, Error, Result, Tensor, check, empty};

use super::dense::{Activation, activate};
use super::grouped::{InputRows, MixtureSizes, Tiling, grouped_product};
use super::route::{Grouped, Routed, route, route_and_group};

/// The weights of a mixture, all of one type, f32, f16 or bf16.
pub struct Experts<'a, R: Runtime> {
    /// `[hidden, experts]`.
    pub router: &'a Tensor<R>,
    /// `[experts, hidden, inner]`, or `[experts, hidden, 2 · inner]` for SwiGLU, the gate's columns first.
    pub up: &'a Tensor<R>,
    /// `[experts, inner, hidden]`.
    pub down: &'a Tensor<R>,
    /// What an expert does between its two matrices.
    pub activation: Activation,
    /// Experts that a token uses.
    pub top_k: usize,
}

/// What a mixture gives.
pub struct Mixture<R: Runtime> {
    /// `[tokens, hidden]`, in the type of the input.
    pub output: Tensor<R>,
    /// The experts of each token.
    pub routed: Routed<R>,
}

/// Launches the mixture for `input` `[tokens, hidden]`.
///
/// # Errors
/// Shapes, types or sizes that don't fit; nothing is launched then.
pub fn moe<R: Runtime>(client: &ComputeClient<R>, input: &Tensor<R>, experts: &Experts<'_, R>) -> Result<Mixture<R>> {
    let element = float_type(client, input, "input")?;
    let dtype = element.storage();
    let tokens = tokens_of(input, "input")?;
    let [count, inner, hidden] = *experts.down.shape().as_slice() else {
        let (found, expected) = (experts.down.shape().to_vec(), "[experts, inner, hidden]");
        return Err(Error::Dimensions { tensor: "down", found, expected });
    };
    positive(&[("experts", count), ("inner", inner), ("hidden", hidden)])?;
    check(client, input, "input", &[tokens, hidden], dtype)?;
    check(client, experts.router, "router", &[hidden, count], dtype)?;
    check(client, experts.up, "up", &[count, hidden, inner * experts.activation.columns()], dtype)?;
    check(client, experts.down, "down", &[count, inner, hidden], dtype)?;
    let strategy = ProjectStrategy::choose(client, tokens, dtype);
    let logits = project(client, input, experts.router, ElementType::F32.storage(), strategy)?;
    if tokens == 0 {
        let output = empty(client, "output", &[0, hidden], dtype)?;
        return Ok(Mixture { output, routed: route(client, &logits, experts.top_k)? });
    }
    let sizes = MixtureSizes {
        tokens,
        experts: count,
        top_k: experts.top_k,
        hidden,
        inner: [inner * experts.activation.columns(), inner],
        dtype: element,
    };
    let tiling = Tiling::choose(&Device::of(client), &sizes);
    let (routed, grouped) = route_and_group(client, &logits, experts.top_k, tiling.rows())?;
    let product = |input, weight, output, rows| grouped_product(client, input, weight, output, &grouped, tiling, rows);
    let raised = product(input, experts.up, dtype, InputRows::Tokens(experts.top_k))?;
    let activated = activate(client, &raised, experts.activation)?;
    let lowered = product(&activated, experts.down, ElementType::F32.storage(), InputRows::Grouped)?;
    let output = weighted_sum(client, &lowered, &grouped, &routed, dtype)?;
    Ok(Mixture { output, routed })
}

/// `output[t] = Σ_k weights[t, k] · rows[place of the token's k-th entry]`, summed in the order of `k`.
fn weighted_sum<R: Runtime>(
    client: &ComputeClient<R>,
    rows: &Tensor<R>,
    grouped: &Grouped<R>,
    routed: &Routed<R>,
    dtype: StorageType,
) -> Result<Tensor<R>> {
    let device = Device::of(client);
    let (tokens, top_k, hidden) = (routed.weights.shape()[0], routed.weights.shape()[1], rows.shape()[1]);
    let width = device.width(4, &[hidden]);
    let output = empty(client, "output", &[tokens, hidden], dtype)?;
    let items = tokens * (hidden / width);
    let units = device.flat(items);
    check_loops("weighted_sum_kernel", top_k)?;
    // SAFETY: places are below the number of entries, which are the rows; a unit writes one vector below `items`.
    unsafe {
        weighted_sum_kernel::launch_unchecked::<R>(
            client,
            device.grid(items.div_ceil(units))?,
            CubeDim::new_1d(units as u32),
            width,
            arg(rows, width),
            arg(&grouped.places, 1),
            arg(&routed.weights, 1),
            arg(&output, width),
            items as u32,
            (hidden / width) as u32,
            top_k,
            units,
            dtype,
        );
    }
    Ok(output)
}

#[cube(launch_unchecked)]
fn weighted_sum_kernel<E: Float, N: Size>(
    rows: &Array<Vector<f32, N>>,
    places: &Array<u32>,
    weights: &Array<f32>,
    output: &mut Array<Vector<E, N>>,
    items: u32,
    vectors: u32,
    #[comptime] top_k: usize,
    #[comptime] units: usize,
    #[define(E)] _dtype: StorageType,
) {
    let item = CUBE_POS * units + UNIT_POS as usize;
    if item >= items as usize {
        terminate!();
    }
    let vectors = vectors as usize;
    let first = item / vectors * top_k;
    let mut sum = Vector::<f32, N>::new(0.0);
    for k in 0..top_k {
        sum += Vector::new(weights[first + k]) * rows[places[first + k] as usize * vectors + item % vectors];
    }
    output[item] = Vector::cast_from(sum);
}
