//! Decoding attention: one new position of each sequence attends to the cached ones and to itself,
//! `output = softmax(q · K / √head_dim) · V` a head.
//!
//! Shapes: projected `[batch, 3 · heads · head_dim]` (query, key, value), keys and values `[batch, heads, cached, head_dim]`, output
//! `[batch, heads · head_dim]`. A cube takes a head of a sequence: its units share out the positions for the scores, which stay in
//! shared memory, then the columns and slices of the positions for the values. Moves both caches once.

use cubecl::prelude::*;
use ultramem_kernels::launch::{Device, arg, check_loops, float_type, positive, strided};
use ultramem_kernels::linear::tile::component_sum;
use ultramem_kernels::{Error, Result, Tensor, check, empty};

/// Launches the attention: all arguments of one type, f32, f16 or bf16; returns `[batch, heads · head_dim]` of that type. The caches are
/// not changed: whoever keeps them appends the projected key and value.
///
/// # Errors
/// Shapes or types that don't fit, or more positions than shared memory has scores for; nothing is launched then.
pub fn attention<R: Runtime>(
    client: &ComputeClient<R>,
    projected: &Tensor<R>,
    keys: &Tensor<R>,
    values: &Tensor<R>,
) -> Result<Tensor<R>> {
    let dtype = float_type(client, keys, "keys")?.storage();
    let [batch, heads, cached, head_dim] = *keys.shape().as_slice() else {
        let (found, expected) = (keys.shape().to_vec(), "[batch, heads, cached, head_dim]");
        return Err(Error::Dimensions { tensor: "keys", found, expected });
    };
    positive(&[("heads", heads), ("cached", cached), ("head_dim", head_dim)])?;
    check(client, keys, "keys", &[batch, heads, cached, head_dim], dtype)?;
    check(client, values, "values", &[batch, heads, cached, head_dim], dtype)?;
    check(client, projected, "projected", &[batch, 3 * heads * head_dim], dtype)?;
    if batch == 0 {
        return empty(client, "output", &[0, heads * head_dim], dtype);
    }
    let device = Device::of(client);
    let width = device.width(dtype.size(), &[head_dim]);
    let columns = head_dim / width;
    let units = device.units(cached);
    let lanes = 1 << columns.min(units).ilog2();
    let plan = AttentionPlan { heads, columns, cached, lanes, slices: units / lanes };
    device.fits_shared("attention", 4 * (cached + 2 * units + (1 + plan.slices) * head_dim))?;
    check_loops("attention_kernel", plan.loops())?;
    let output = empty(client, "output", &[batch, heads * head_dim], dtype)?;
    let cubes = batch * heads;
    // SAFETY: shapes are checked; a cube reads and writes the part of one head of one sequence.
    unsafe {
        attention_kernel::launch_unchecked::<R>(
            client,
            device.grid(cubes)?,
            CubeDim::new_1d(units as u32),
            keys.required_address_type(),
            width,
            arg(projected, width),
            arg(keys, width),
            arg(values, width),
            arg(&output, width),
            1.0 / (head_dim as f32).sqrt(),
            cubes as u32,
            plan,
            dtype,
        );
    }
    Ok(output)
}

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct AttentionPlan {
    heads: usize,
    /// Vectors of a head.
    columns: usize,
    cached: usize,
    /// Units side by side on the columns of the values.
    lanes: usize,
    /// Parts of the positions.
    slices: usize,
}

impl AttentionPlan {
    /// Loop iterations of a unit: query, scores, weights, values and output.
    fn loops(&self) -> usize {
        let units = self.lanes * self.slices;
        let (own, positions) = (strided(self.columns, units), strided(self.cached, units));
        let scores = (1 + positions) * (1 + self.columns) + positions + 2 * units;
        let values = strided(self.columns, self.lanes) * (1 + strided(self.cached, self.slices));
        own + scores + values + own * (1 + self.slices)
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn attention_kernel<E: Float, N: Size>(
    projected: &Array<Vector<E, N>>,
    keys: &Array<Vector<E, N>>,
    values: &Array<Vector<E, N>>,
    output: &mut Array<Vector<E, N>>,
    scale: f32,
    cubes: u32,
    #[comptime] plan: AttentionPlan,
    #[define(E)] _dtype: StorageType,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    let units = comptime!(plan.lanes * plan.slices);
    let columns = plan.columns;
    let width = comptime!(plan.heads * columns);
    let own = CUBE_POS / plan.heads * comptime!(3 * width) + CUBE_POS % plan.heads * columns;
    let cache = CUBE_POS * comptime!(plan.cached * columns);

    let mut query = SharedMemory::<Vector<f32, N>>::new(columns);
    for c in range_stepped(unit, columns, units) {
        query[c] = Vector::cast_from(projected[own + c]) * Vector::new(scale);
    }
    sync_cube();
    // Every unit scores the new position for itself: a largest score to begin with.
    let own_score = score::<E, N>(&query, projected, own + width, columns);
    let mut largest = own_score;
    let mut scores = SharedMemory::<f32>::new(plan.cached);
    for position in range_stepped(unit, plan.cached, units) {
        let score = score::<E, N>(&query, keys, cache + position * columns, columns);
        scores[position] = score;
        largest = max(largest, score);
    }
    let mut largests = SharedMemory::<f32>::new(units);
    largests[unit] = largest;
    sync_cube();
    for other in 0..units {
        largest = max(largest, largests[other]);
    }
    let mut sum = 0.0f32;
    for position in range_stepped(unit, plan.cached, units) {
        let weight = f32::exp(scores[position] - largest);
        scores[position] = weight;
        sum += weight;
    }
    let mut sums = SharedMemory::<f32>::new(units);
    sums[unit] = sum;
    sync_cube();
    let own_weight = f32::exp(own_score - largest);
    let mut total = own_weight;
    for other in 0..units {
        total += sums[other];
    }

    let mut parts = SharedMemory::<Vector<f32, N>>::new(comptime!(plan.slices * columns));
    let slice = unit / plan.lanes;
    for c in range_stepped(unit % plan.lanes, columns, plan.lanes) {
        let mut part = Vector::<f32, N>::new(0.0);
        for position in range_stepped(slice, plan.cached, plan.slices) {
            let value = Vector::<f32, N>::cast_from(values[cache + position * columns + c]);
            part += Vector::new(scores[position]) * value;
        }
        parts[slice * columns + c] = part;
    }
    sync_cube();
    for c in range_stepped(unit, columns, units) {
        let value = Vector::<f32, N>::cast_from(projected[own + comptime!(2 * width) + c]);
        let mut pooled = Vector::new(own_weight) * value;
        for slice in 0..plan.slices {
            pooled += parts[slice * columns + c];
        }
        output[CUBE_POS * columns + c] = Vector::cast_from(pooled / Vector::new(total));
    }
}

/// The dot product of the scaled query and the key at `first`.
#[cube]
fn score<E: Float, N: Size>(
    query: &SharedMemory<Vector<f32, N>>,
    keys: &Array<Vector<E, N>>,
    first: usize,
    #[comptime] columns: usize,
) -> f32 {
    let mut sum = Vector::<f32, N>::new(0.0);
    for c in 0..columns {
        sum += query[c] * Vector::<f32, N>::cast_from(keys[first + c]);
    }
    component_sum::<N>(sum)
}
