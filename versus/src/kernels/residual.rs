//! Residual: `sum = stream + update`, `normed = RMSNorm(sum) · weight`, over `[tokens, width]`.
//!
//! A cube takes a token; its units share out the row. Moves the stream, the update and both results once, and adds the row up once
//! more from the sum as it was stored.

use cubecl::prelude::*;
use ultramem_kernels::launch::{Device, arg, check_loops, float_type, positive, strided, tokens_of};
use ultramem_kernels::linear::tile::component_sum;
use ultramem_kernels::{ElementType, Result, Tensor, check, empty};

/// Launches the addition and the norm: `stream` and `update` `[tokens, width]` of one type, f32, f16 or bf16, `weight` f32 `[width]`.
/// Returns the sum and the normed sum, `[tokens, width]` of that type.
///
/// # Errors
/// Shapes, types or sizes that don't fit; nothing is launched then.
pub fn residual<R: Runtime>(
    client: &ComputeClient<R>,
    stream: &Tensor<R>,
    update: &Tensor<R>,
    weight: &Tensor<R>,
    eps: f32,
) -> Result<(Tensor<R>, Tensor<R>)> {
    float_type(client, stream, "stream")?;
    let (tokens, size) = (tokens_of(stream, "stream")?, weight.shape().first().copied().unwrap_or(0));
    check(client, stream, "stream", &[tokens, size], stream.dtype)?;
    check(client, update, "update", &[tokens, size], stream.dtype)?;
    check(client, weight, "weight", &[size], ElementType::F32.storage())?;
    positive(&[("width of the stream", size)])?;
    let device = Device::of(client);
    let width = device.width(4, &[size]);
    let result = |name| empty(client, name, &[tokens, size], stream.dtype);
    let (sum, normed) = (result("sum")?, result("normed")?);
    if tokens == 0 {
        return Ok((sum, normed));
    }
    let plan = ResidualPlan { size, units: device.units(size / width) };
    check_loops("residual_kernel", 2 * strided(plan.size, plan.units) + plan.units)?;
    // SAFETY: shapes are checked; a cube reads and writes the row of one token below `tokens`.
    unsafe {
        residual_kernel::launch_unchecked::<R>(
            client,
            device.grid(tokens)?,
            CubeDim::new_1d(plan.units as u32),
            width,
            arg(stream, width),
            arg(update, width),
            arg(weight, width),
            arg(&sum, width),
            arg(&normed, width),
            eps,
            tokens as u32,
            plan,
            stream.dtype,
        );
    }
    Ok((sum, normed))
}

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct ResidualPlan {
    /// Numbers of a row.
    size: usize,
    units: usize,
}

#[cube(launch_unchecked)]
fn residual_kernel<E: Float, N: Size>(
    stream: &Array<Vector<E, N>>,
    update: &Array<Vector<E, N>>,
    weight: &Array<Vector<f32, N>>,
    sum: &mut Array<Vector<E, N>>,
    normed: &mut Array<Vector<E, N>>,
    eps: f32,
    tokens: u32,
    #[comptime] plan: ResidualPlan,
    #[define(E)] _dtype: StorageType,
) {
    if CUBE_POS >= tokens as usize {
        terminate!();
    }
    let width = N::value();
    let vectors = comptime!(plan.size / width);
    let first = CUBE_POS * vectors;
    let mut squares = SharedMemory::<f32>::new(plan.units);
    let mut own = Vector::<f32, N>::new(0.0);
    for v in range_stepped(UNIT_POS as usize, vectors, plan.units) {
        let added = added::<E, N>(stream, update, first + v);
        sum[first + v] = added;
        let wide = Vector::<f32, N>::cast_from(added);
        own += wide * wide;
    }
    squares[UNIT_POS as usize] = component_sum::<N>(own);
    sync_cube();
    let mut total = 0.0f32;
    for unit in 0..plan.units {
        total += squares[unit];
    }
    let scale = Vector::new(1.0 / f32::sqrt(total / comptime!(plan.size as f32) + eps));
    for v in range_stepped(UNIT_POS as usize, vectors, plan.units) {
        let wide = Vector::<f32, N>::cast_from(added::<E, N>(stream, update, first + v));
        normed[first + v] = Vector::cast_from(wide * scale * weight[v]);
    }
}

/// The sum of a vector as it is stored.
#[cube]
fn added<E: Float, N: Size>(stream: &Array<Vector<E, N>>, update: &Array<Vector<E, N>>, at: usize) -> Vector<E, N> {
    Vector::cast_from(Vector::<f32, N>::cast_from(stream[at]) + Vector::<f32, N>::cast_from(update[at]))
}
