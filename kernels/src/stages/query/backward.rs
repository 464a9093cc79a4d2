//! Backward of the linear maps of an input: `∂input[t, k] = Σ_o ∂map[t, o] · weight[o, k]`, summed over the maps, and of each
//! `∂weight[o, k] = Σ_t ∂map[t, o] · input[t, k]` and `∂bias[o] = Σ_t ∂map[t, o]`.
//!
//! Matrix units take a map's gradient in the type of its weight: it is rounded once, for both products.
//!
//! Moves each weight and its gradient once, the input and a map's gradient once or, from cache, once per tile; of several maps, a sum of the
//! input's gradient once for each.

use cubecl::ir::StorageType;
use cubecl::prelude::*;

use super::plan::{MapSizes, QueryBackwardPlans, QueryBackwardSizes};
use super::{ProjectStrategy, project};
use crate::launch::device::Device;
use crate::launch::plan::Launch;
use crate::launch::tensor::{Tensor, arg, check, empty, f32_storage, float_type, sizes, zeros};
use crate::linear::cast::cast;
use crate::linear::column_sum::column_sum;
use crate::linear::outer::outer;
use crate::{Error, Result};

/// A linear map of the input and the gradient of what it gave.
pub struct Map<'a, R: Runtime> {
    /// `[width, hidden_size]`, in the type of the input, as PyTorch has it (the forward pass takes its transpose).
    pub weight: &'a Tensor<R>,
    /// Whether it has a bias.
    pub biased: bool,
    /// f32 `[tokens, width]`.
    pub grad: &'a Tensor<R>,
}

/// Gradients of one linear map.
pub struct MapGradients<R: Runtime> {
    /// f32 `[width, hidden_size]`.
    pub weight: Tensor<R>,
    /// f32 `[width]`, where there is a bias.
    pub bias: Option<Tensor<R>>,
}

/// Gradients of linear maps of one input.
pub struct QueryGradients<R: Runtime> {
    /// `[tokens, hidden_size]`, in the type of the input.
    pub input: Tensor<R>,
    /// Those of each map, in their order.
    pub maps: Vec<MapGradients<R>>,
}

/// Launches the backward pass of [`query`](super::query), of all the maps of one input together.
///
/// - `input` `[tokens, hidden_size]`, f32, f16 or bf16; no tokens give a gradient of zeros for each weight
/// - `maps`: one at least
/// - `more` f32 `[tokens, hidden_size]`: a gradient that comes to the input by another way
///
/// # Errors
/// Shapes, types or sizes that don't fit; nothing is launched then.
pub fn query_backward<R: Runtime>(
    client: &ComputeClient<R>,
    input: &Tensor<R>,
    maps: &[Map<'_, R>],
    more: Option<&Tensor<R>>,
    strategy: ProjectStrategy,
) -> Result<QueryGradients<R>> {
    let dtype = float_type(client, input, "input")?;
    let [tokens, hidden_size] = sizes(input, "input")?;
    let mut of_maps = Vec::new();
    for map in maps {
        let [_, width] = sizes(map.grad, "gradient of the map")?;
        check(client, map.grad, "gradient of the map", &[tokens, width], f32_storage())?;
        check(client, map.weight, "weight", &[width, hidden_size], input.dtype)?;
        of_maps.push(MapSizes { width, biased: map.biased });
    }
    let sizes = QueryBackwardSizes { tokens, hidden_size, dtype, maps: of_maps, more: more.is_some() };
    let plans = QueryBackwardPlans::of(&Device::of(client), &sizes, strategy)?;
    let (mut sum, last) = (more.cloned(), maps.len() - 1);
    let mut factors = Vec::new();
    for (at, (map, plan)) in maps.iter().zip(&plans.maps).enumerate() {
        let factor = if plan.cast.is_some() { cast(client, map.grad, input.dtype)? } else { map.grad.clone() };
        let through = |output| project(client, &factor, map.weight, output, strategy);
        let output = if at == last { input.dtype } else { f32_storage() };
        sum = Some(match sum.zip(plan.add) {
            Some((sum, launch)) => add(client, launch, &sum, &through(f32_storage())?, input, output)?,
            None => through(output)?,
        });
        factors.push(factor);
    }
    let grad_input = sum.ok_or(Error::Zero { what: "maps of the input" })?;
    let of_map = |(map, factor): (&Map<'_, R>, &Tensor<R>)| {
        Ok(MapGradients {
            weight: outer(client, factor, input, sizes.dtype, strategy)?,
            bias: map.biased.then(|| bias_gradient(client, map.grad)).transpose()?,
        })
    };
    Ok(QueryGradients { input: grad_input, maps: maps.iter().zip(&factors).map(of_map).collect::<Result<_>>()? })
}

/// `Σ_t grad[t, o]`; of no tokens, zeros.
fn bias_gradient<R: Runtime>(client: &ComputeClient<R>, grad: &Tensor<R>) -> Result<Tensor<R>> {
    let [tokens, width] = sizes(grad, "gradient of the map")?;
    if tokens == 0 { zeros(client, "gradient of a bias", &[width]) } else { column_sum(client, grad) }
}

/// `left + right`, both f32, in the shape of `like` and the type `dtype`.
fn add<R: Runtime>(
    client: &ComputeClient<R>,
    launch: Launch,
    left: &Tensor<R>,
    right: &Tensor<R>,
    like: &Tensor<R>,
    dtype: StorageType,
) -> Result<Tensor<R>> {
    let device = Device::of(client);
    let shape = like.shape().to_vec();
    check(client, left, "gradient of the input", &shape, f32_storage())?;
    check(client, right, "gradient of the input through the second map", &shape, f32_storage())?;
    let sum = empty(client, "gradient of the input", &shape, dtype)?;
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
    let (grid, cube_dim) = launch.start(&device)?;
    // SAFETY: the three tensors have one shape, and a unit touches its own vector below their number.
    unsafe {
        add_kernel::launch_unchecked::<R>(
            client,
            grid,
            cube_dim,
            width,
            arg(left, width),
            arg(right, width),
            arg(&sum, width),
            vectors,
            launch.units,
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
