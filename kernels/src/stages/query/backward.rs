//! Backward of the linear maps of an input, the query's and a gate's: `∂input[t, k] = Σ_o ∂map[t, o] · weight[o, k]`, summed over the
//! maps, and `∂weight[o, k] = Σ_t ∂map[t, o] · input[t, k]` for each.
//!
//! Moves the weight and its gradient once, the input and the map's gradient once or, from cache, once per tile.

use cubecl::prelude::*;

use super::{ProjectStrategy, project};
use crate::launch::device::Device;
use crate::launch::tensor::{Tensor, arg, check, empty, f32_storage, sizes};
use crate::linear::outer::outer;
use crate::{Error, Result};

/// A linear map of the input and the gradient of what it gave.
pub struct Map<'a, R: Runtime> {
    /// `[width, hidden_size]`, in the type of the input, as PyTorch has it (the forward pass takes its transpose).
    pub weight: &'a Tensor<R>,
    /// f32 `[tokens, width]`.
    pub grad: &'a Tensor<R>,
}

/// Gradients of linear maps of one input.
pub struct QueryGradients<R: Runtime> {
    /// `[tokens, hidden_size]`, in the type of the input.
    pub input: Tensor<R>,
    /// f32 `[width, hidden_size]`.
    pub weight: Tensor<R>,
    /// The same of the second map, where there is one.
    pub second_weight: Option<Tensor<R>>,
}

/// Launches the backward pass of [`query`](super::query), and of a second map of the same input where a layer has one.
///
/// - `input` `[tokens, hidden_size]`, f32, f16 or bf16; no tokens give a gradient of zeros for each weight
///
/// # Errors
/// Shapes, types or sizes that don't fit; nothing is launched then.
pub fn query_backward<R: Runtime>(
    client: &ComputeClient<R>,
    input: &Tensor<R>,
    map: &Map<'_, R>,
    second: Option<&Map<'_, R>>,
    strategy: ProjectStrategy,
) -> Result<QueryGradients<R>> {
    for map in core::iter::once(map).chain(second) {
        let ([_, width], [_, hidden_size]) = (sizes(map.grad, "gradient of the map")?, sizes(input, "input")?);
        check(client, map.weight, "weight", &[width, hidden_size], input.dtype)?;
    }
    let weight = outer(client, map.grad, input, strategy)?;
    let through = |map: &Map<'_, R>, dtype| project(client, map.grad, map.weight, dtype, strategy);
    match second {
        None => Ok(QueryGradients { input: through(map, input.dtype)?, weight, second_weight: None }),
        Some(second) => {
            let parts = (through(map, f32_storage())?, through(second, f32_storage())?);
            Ok(QueryGradients {
                input: add(client, &parts.0, &parts.1, input)?,
                weight,
                second_weight: Some(outer(client, second.grad, input, strategy)?),
            })
        }
    }
}

/// `left + right`, both f32, in the shape and type of `like`.
fn add<R: Runtime>(
    client: &ComputeClient<R>,
    left: &Tensor<R>,
    right: &Tensor<R>,
    like: &Tensor<R>,
) -> Result<Tensor<R>> {
    let device = Device::of(client);
    let shape = like.shape().to_vec();
    check(client, left, "gradient of the input", &shape, f32_storage())?;
    check(client, right, "gradient of the input through the second map", &shape, f32_storage())?;
    let sum = empty(client, "gradient of the input", &shape, like.dtype)?;
    let count: usize = shape.iter().product();
    if count == 0 {
        return Ok(sum);
    }
    let width = device.width(4, &[count]);
    let vectors = u32::try_from(count / width).map_err(|_| Error::Exceeds {
        what: "numbers of the input",
        value: count as u64,
        limit_name: "the largest index",
        limit: u64::from(u32::MAX),
    })?;
    let units = device.flat(vectors as usize);
    // SAFETY: the three tensors have one shape, and a unit touches its own vector below their number.
    unsafe {
        add_kernel::launch_unchecked::<R>(
            client,
            device.grid((vectors as usize).div_ceil(units))?,
            CubeDim::new_1d(units as u32),
            width,
            arg(left, width),
            arg(right, width),
            arg(&sum, width),
            vectors,
            units,
            sum.dtype,
        );
    }
    Ok(sum)
}

#[cube(launch_unchecked)]
fn add_kernel<E: Float, N: Size>(
    left: &Array<Vector<f32, N>>,
    right: &Array<Vector<f32, N>>,
    sum: &mut Array<Vector<E, N>>,
    vectors: u32,
    #[comptime] units: usize,
    #[define(E)] _dtype: StorageType,
) {
    let item = CUBE_POS * units + UNIT_POS as usize;
    if item < vectors as usize {
        sum[item] = Vector::cast_from(left[item] + right[item]);
    }
}
