//! Decoding attention: one new position of each sequence attends to the cached ones and to itself,
//! `output = softmax(q · K / √head_dim) · V` a head.
//!
//! Shapes: projected `[batch, 3 · heads · head_dim]` (query, key, value), keys and values `[batch, heads, cached, head_dim]`, output
//! `[batch, heads · head_dim]`. A cube takes a head of a sequence: its units share out the positions for the scores, which stay in
//! shared memory, then the columns and slices of the positions for the values.
//!
//! Few sequences would leave most of a device idle, and many positions have more scores than shared memory. Then a cube takes a part of the
//! positions, and writes what they pool to in f32, with the logarithm of the sum of its powers; a second launch adds up the parts in their order.
//! Moves both caches once, and the parts twice.

use cubecl::prelude::*;
use ultramem_kernels::launch::{Device, arg, check_loops, float_type, positive, strided};
use ultramem_kernels::linear::tile::component_sum;
use ultramem_kernels::{ElementType, Error, Result, Tensor, check, empty};

/// Launches the attention: all arguments of one type, f32, f16 or bf16; returns `[batch, heads · head_dim]` of that type. The caches are
/// not changed: whoever keeps them appends the projected key and value.
///
/// # Errors
/// Shapes or types that don't fit, or heads too wide for shared memory; nothing is launched then.
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
    let plan = AttentionPlan::of(&device, batch * heads, cached, heads, head_dim / width, width)?;
    check_loops("attention_kernel", plan.loops())?;
    let splits = cached.div_ceil(plan.positions);
    let cubes = batch * heads * splits;
    let output = empty(client, "output", &[batch, heads * head_dim], dtype)?;
    let found = match plan.whole {
        true => output.clone(),
        false => empty(client, "parts of the positions", &[cubes, head_dim + width], ElementType::F32.storage())?,
    };
    // SAFETY: shapes are checked; a cube reads some positions of one head of one sequence, and writes what is its own.
    unsafe {
        attention_kernel::launch_unchecked::<R>(
            client,
            device.grid(cubes)?,
            CubeDim::new_1d(plan.units() as u32),
            keys.required_address_type(),
            width,
            arg(projected, width),
            arg(keys, width),
            arg(values, width),
            arg(&found, width),
            1.0 / (head_dim as f32).sqrt(),
            cached as u32,
            splits as u32,
            cubes as u32,
            plan,
            dtype,
            found.dtype,
        );
    }
    if !plan.whole {
        merge(client, &found, &output, splits, width)?;
    }
    Ok(output)
}

/// Launches the sum of the parts, `[batch · heads · splits, head_dim + width]`, into `output`.
fn merge<R: Runtime>(
    client: &ComputeClient<R>,
    parts: &Tensor<R>,
    output: &Tensor<R>,
    splits: usize,
    width: usize,
) -> Result<()> {
    let device = Device::of(client);
    let items = output.shape().iter().product::<usize>() / width;
    let units = device.flat(items);
    check_loops("merge_attention_kernel", 2 * splits)?;
    // SAFETY: there are `splits` parts for each head of a sequence; a unit writes one vector of the output below `items`.
    unsafe {
        merge_attention_kernel::launch_unchecked::<R>(
            client,
            device.grid(items.div_ceil(units))?,
            CubeDim::new_1d(units as u32),
            parts.required_address_type(),
            width,
            arg(parts, width),
            arg(output, width),
            items as u32,
            (parts.shape()[1] / width) as u32,
            splits as u32,
            units,
            output.dtype,
        );
    }
    Ok(())
}

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct AttentionPlan {
    heads: usize,
    /// Vectors of a head.
    columns: usize,
    /// The most positions of a cube, a power of two: a cache that grows is served by few kernels.
    positions: usize,
    /// Whether these are all.
    whole: bool,
    /// Units side by side on the columns of the values.
    lanes: usize,
    /// Slices of the positions.
    slices: usize,
}

/// The fewest positions that are worth a cube.
const FEW: usize = 128;

impl AttentionPlan {
    /// As many parts of the positions as reach the whole device, and as have room for their scores, for `pieces` heads of all sequences.
    fn of(device: &Device, pieces: usize, cached: usize, heads: usize, columns: usize, width: usize) -> Result<Self> {
        let with = |positions: usize| {
            let units = device.units(positions.min(cached));
            let lanes = 1 << columns.min(units).ilog2();
            Self { heads, columns, positions, whole: cached <= positions, lanes, slices: units / lanes }
        };
        let least = FEW.min(cached.next_power_of_two());
        let mut plan = with(cached.div_ceil(device.parts(pieces)).next_power_of_two().max(least));
        while plan.positions > least && plan.shared_bytes(width) > device.shared_bytes {
            plan = with(plan.positions / 2);
        }
        device.fits_shared("attention", plan.shared_bytes(width))?;
        Ok(plan)
    }

    fn units(&self) -> usize {
        self.lanes * self.slices
    }

    /// Scores, what units have found, the query and the slices' sums.
    fn shared_bytes(&self, width: usize) -> usize {
        4 * (self.positions + 2 * self.units() + (1 + self.slices) * self.columns * width)
    }

    /// Loop iterations of a unit: query, scores, weights, values and output.
    fn loops(&self) -> usize {
        let units = self.units();
        let (own, positions) = (strided(self.columns, units), strided(self.positions, units));
        let scores = (1 + positions) * (1 + self.columns) + positions + 2 * units;
        let values = strided(self.columns, self.lanes) * (1 + strided(self.positions, self.slices));
        own + scores + values + own * (1 + self.slices)
    }
}

/// The lowest number: no score is taken for less.
const LOWEST: f32 = f32::MIN;

/// `CUBE_POS` runs over the parts of a head's positions first. The new position belongs to the last of them.
#[cube(launch_unchecked, address_type = "dynamic")]
fn attention_kernel<E: Float, O: Float, N: Size>(
    projected: &Array<Vector<E, N>>,
    keys: &Array<Vector<E, N>>,
    values: &Array<Vector<E, N>>,
    output: &mut Array<Vector<O, N>>,
    scale: f32,
    cached: u32,
    splits: u32,
    cubes: u32,
    #[comptime] plan: AttentionPlan,
    #[define(E)] _dtype: StorageType,
    #[define(O)] _output_type: StorageType,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    let units = comptime!(plan.units());
    let columns = plan.columns;
    let width = comptime!(plan.heads * columns);
    let (piece, split) = (CUBE_POS / splits as usize, CUBE_POS % splits as usize);
    let own = piece / plan.heads * comptime!(3 * width) + piece % plan.heads * columns;
    let first = split * plan.positions;
    let count = min(plan.positions, cached as usize - first);
    let cache = (piece * cached as usize + first) * columns;
    let has_new = split + 1 == splits as usize;

    let mut query = SharedMemory::<Vector<f32, N>>::new(columns);
    for c in range_stepped(unit, columns, units) {
        query[c] = Vector::cast_from(projected[own + c]) * Vector::new(scale);
    }
    sync_cube();
    // Every unit scores the new position for itself: a largest score to begin with.
    let new_score = select(has_new, score::<E, N>(&query, projected, own + width, columns), LOWEST);
    let mut largest = new_score;
    let mut scores = SharedMemory::<f32>::new(plan.positions);
    for position in range_stepped(unit, count, units) {
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
    for position in range_stepped(unit, count, units) {
        let weight = f32::exp(scores[position] - largest);
        scores[position] = weight;
        sum += weight;
    }
    let mut sums = SharedMemory::<f32>::new(units);
    sums[unit] = sum;
    sync_cube();
    let new_weight = select(has_new, f32::exp(new_score - largest), 0.0);
    let mut total = new_weight;
    for other in 0..units {
        total += sums[other];
    }

    let mut parts = SharedMemory::<Vector<f32, N>>::new(comptime!(plan.slices * columns));
    let slice = unit / plan.lanes;
    for c in range_stepped(unit % plan.lanes, columns, plan.lanes) {
        let mut part = Vector::<f32, N>::new(0.0);
        for position in range_stepped(slice, count, plan.slices) {
            let value = Vector::<f32, N>::cast_from(values[cache + position * columns + c]);
            part += Vector::new(scores[position]) * value;
        }
        parts[slice * columns + c] = part;
    }
    sync_cube();
    let row = CUBE_POS * comptime!(if plan.whole { columns } else { columns + 1 });
    for c in range_stepped(unit, columns, units) {
        let value = Vector::<f32, N>::cast_from(projected[own + comptime!(2 * width) + c]);
        let mut pooled = Vector::new(new_weight) * value;
        for slice in 0..plan.slices {
            pooled += parts[slice * columns + c];
        }
        output[row + c] = Vector::cast_from(pooled / Vector::new(total));
    }
    if comptime!(!plan.whole) && unit == 0 {
        output[row + columns] = Vector::cast_from(Vector::<f32, N>::new(largest + f32::ln(total)));
    }
}

/// `output = Σ_i w_i · parts[i] / Σ_i w_i`, `w_i` being the sum of the powers of part `i`, whose logarithm is behind its `pitch - 1` vectors.
#[cube(launch_unchecked, address_type = "dynamic")]
fn merge_attention_kernel<E: Float, N: Size>(
    parts: &Array<Vector<f32, N>>,
    output: &mut Array<Vector<E, N>>,
    items: u32,
    pitch: u32,
    splits: u32,
    #[comptime] units: usize,
    #[define(E)] _dtype: StorageType,
) {
    let item = CUBE_POS * units + UNIT_POS as usize;
    if item >= items as usize {
        terminate!();
    }
    let (pitch, splits) = (pitch as usize, splits as usize);
    let columns = pitch - 1;
    let first = item / columns * splits * pitch;
    let mut largest = LOWEST.runtime();
    for split in 0..splits {
        largest = max(largest, parts[first + split * pitch + columns][0]);
    }
    let mut total = 0.0f32;
    let mut sum = Vector::<f32, N>::new(0.0);
    for split in 0..splits {
        let part = first + split * pitch;
        let weight = f32::exp(parts[part + columns][0] - largest);
        total += weight;
        sum += Vector::new(weight) * parts[part + item % columns];
    }
    output[item] = Vector::cast_from(sum / Vector::new(total));
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
