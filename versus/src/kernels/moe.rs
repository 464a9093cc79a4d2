//! Mixture of experts: `output[t] = Σ_k weights[t, k] · expert_k(input[t])`, each expert an FFN of its own.
//!
//! The router's product, the routing and grouping of [`route`](super::route()), then the two matrices of the experts as grouped products: a
//! cube takes a tile of one expert's entries against a block of its columns, tiles of one expert next to each other, so that each
//! touched expert's weights come from memory once a call and from cache for the expert's further tiles. Last the weighted sum.
//! Moves the touched experts' weights, and per entry `hidden + 2 · inner` numbers in and out.

use cubecl::ir::StorageType;
use cubecl::prelude::*;
use ultramem_kernels::launch::{Device, arg, check_loops, float_type, positive, tokens_of};
use ultramem_kernels::linear::tile::{Columns, Outputs, Places, Product, Sharing, multiply};
use ultramem_kernels::linear::{ProjectStrategy, project};
use ultramem_kernels::{ElementType, Error, Result, Tensor, check, empty};

use super::dense::{Activation, activate};
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
    let dtype = float_type(client, input, "input")?.storage();
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
    let tile = tile_of(&Device::of(client), tokens, count, experts.top_k);
    let (routed, grouped) = route_and_group(client, &logits, experts.top_k, tile)?;
    let product = |input, weight, output, rows| grouped_product(client, input, weight, output, &grouped, tile, rows);
    let raised = product(input, experts.up, dtype, InputRows::Tokens(experts.top_k))?;
    let activated = activate(client, &raised, experts.activation)?;
    let lowered = product(&activated, experts.down, ElementType::F32.storage(), InputRows::Grouped)?;
    let output = weighted_sum(client, &lowered, &grouped, &routed, dtype)?;
    Ok(Mixture { output, routed })
}

/// Entries of a tile: twice as many as an expert that is touched has on average, if tokens choose evenly. A larger tile would compute
/// rows that are not there, a smaller one read weights again.
fn tile_of(device: &Device, tokens: usize, experts: usize, top_k: usize) -> usize {
    let spared = 1.0 - top_k.min(experts) as f64 / experts as f64;
    let touched = experts as f64 * (1.0 - spared.powf(tokens as f64));
    let average = (tokens * top_k) as f64 / touched.max(1.0);
    (2 << average.log2().round().max(0.0) as u32).min(device.tile)
}

/// Which rows of its input a grouped product takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum InputRows {
    /// Those of the tokens that the entries belong to, so many entries a token.
    Tokens(usize),
    /// A row an entry, in the order of the groups.
    Grouped,
}

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct GroupedPlan {
    sharing: Sharing,
    /// Entries of a cube.
    tile: usize,
    rows: InputRows,
}

/// `output[place, n] = Σ_k input[row, k] · weight[expert, k, n]` for every entry, in the order of the groups: `[entries, columns]`.
fn grouped_product<R: Runtime>(
    client: &ComputeClient<R>,
    input: &Tensor<R>,
    weight: &Tensor<R>,
    output: StorageType,
    grouped: &Grouped<R>,
    tile: usize,
    rows: InputRows,
) -> Result<Tensor<R>> {
    let device = Device::of(client);
    let (entries, depth, out) = (grouped.order.shape()[0], weight.shape()[1], weight.shape()[2]);
    let output = empty(client, "expert output", &[entries, out], output)?;
    let (width, row_width) = (device.width(weight.dtype.size(), &[out]), device.width(4, &[depth]));
    let (columns, bytes) = (out / width, width * weight.dtype.size());
    let product = Product { columns, depth: depth / row_width, tile, bytes, width };
    let sharing = Sharing::choose(&device, &product, grouped.tile_count);
    let plan = GroupedPlan { sharing, tile, rows };
    let cubes = grouped.tile_count * sharing.cubes(columns);
    check_loops("grouped_product_kernel", (depth / row_width).div_ceil(sharing.slices))?;
    // SAFETY: shapes are checked; tiles hold experts below their number and places below `entries`, entries belong to tokens of
    // the input, and a unit writes its own columns of its tile's places.
    unsafe {
        grouped_product_kernel::launch_unchecked::<R>(
            client,
            device.grid(cubes)?,
            CubeDim::new_1d(sharing.units() as u32),
            weight.required_address_type(),
            width,
            row_width,
            arg(input, row_width),
            arg(weight, width),
            arg(&grouped.order, 1),
            arg(&grouped.tiles, 1),
            arg(&output, width),
            (depth / row_width) as u32,
            columns as u32,
            grouped.tile_count as u32,
            cubes as u32,
            plan,
            input.dtype,
            weight.dtype,
            output.dtype,
        );
    }
    Ok(output)
}

/// One cube computes a tile of entries by `lanes · block` column vectors; `CUBE_POS` runs over tiles first. `depth` is the vectors of
/// an input row, `width` those of an output row.
#[cube(launch_unchecked, address_type = "dynamic")]
fn grouped_product_kernel<I: Float, E: Float, O: Float, N: Size, W: Size>(
    input: &Array<Vector<I, W>>,
    weight: &Array<Vector<E, N>>,
    order: &Array<u32>,
    tiles: &Array<u32>,
    output: &mut Array<Vector<O, N>>,
    depth: u32,
    width: u32,
    tile_count: u32,
    cubes: u32,
    #[comptime] plan: GroupedPlan,
    #[define(I)] _input_type: StorageType,
    #[define(E)] _weight_type: StorageType,
    #[define(O)] _output_type: StorageType,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let row_width = W::value();
    let sharing = comptime!(plan.sharing);
    let tile = CUBE_POS % tile_count as usize * 3;
    let (expert, first, end) = (tiles[tile] as usize, tiles[tile + 1] as usize, tiles[tile + 2] as usize);
    // Where units share out the depth they meet at barriers, and one that has nothing to do must be there too.
    if comptime!(sharing.slices == 1) && first == end {
        terminate!();
    }
    let group = comptime!(sharing.lanes * sharing.block);
    let columns = Columns {
        first: CUBE_POS / tile_count as usize * group + UNIT_POS as usize % sharing.lanes,
        last: width as usize - 1,
        stride: sharing.lanes,
        count: sharing.block,
    };
    let base = expert * depth as usize * row_width * width as usize;
    let outputs = Outputs { first, end };
    // Most experts' last tiles are not full: half a tile's rows are computed where that is enough.
    let half = comptime!(plan.tile / 2);
    if comptime!(sharing.slices == 1 && half > 0) && end - first <= half {
        let rows = rows_of(order, first, end, depth as usize, half, plan.rows);
        multiply::<I, E, O, N, W>(&input.to_slice(), &rows, weight, base, output, outputs, columns, 1usize);
    } else {
        let rows = rows_of(order, first, end, depth as usize, plan.tile, plan.rows);
        multiply::<I, E, O, N, W>(&input.to_slice(), &rows, weight, base, output, outputs, columns, sharing.slices);
    }
}

/// Where the input rows of the entries from `first` to `end` begin; those past the end stand for the last. No numbers where there are no
/// entries.
#[cube]
fn rows_of(
    order: &Array<u32>,
    first: usize,
    end: usize,
    depth: usize,
    #[comptime] count: usize,
    #[comptime] rows: InputRows,
) -> Places {
    let mut starts = Array::<usize>::new(count);
    #[unroll]
    for t in 0..count {
        let place = min(first + t, max(end, 1usize) - 1);
        starts[t] = match rows {
            InputRows::Tokens(top_k) => order[place] as usize / top_k * depth,
            InputRows::Grouped => place * depth,
        };
    }
    Places { starts, depth: select(first < end, depth, 0usize), count }
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
