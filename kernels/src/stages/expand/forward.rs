//! Gather and pool: `pooled[t, e, c] = Σ s_k(c) · V[row, c]` over the slots of token t whose address lies in block e, then, in the fused
//! kernel, `output[t] = W_o · pooled[t]`.
//!
//! One cube takes a tile of tokens. It turns slots into addresses, orders each token's entries by virtual block, and gives every
//! `(token, block, run of vectors)` to one unit, which sums its rows in slot order in registers: each selected row is read
//! once, in loads as wide as the row allows, and nothing is accumulated in memory. Entries are ordered by counting: a unit counts those of
//! one block in a chunk of a token's entries, and knows from the counts before it where they go. Reads `heads · top_m` rows of
//! `value_dim` per token, and W_o once per tile; scores come from cache.
//!
//! At few tokens several cubes share out a tile's output columns. Each of them pools the tile anew, from rows that the others have
//! brought into the cache, and reads its own part of W_o. A unit waits for one row after the other then: where a device has large cubes, several
//! units, each a slice of the entries, pool one run, and their sums are added up in order.

use cubecl::prelude::*;

use super::plan::ExpandPlan;
use crate::launch::lesser::lesser;
use crate::linear::tile::{Columns, Outputs, Rows, multiply, zero_sums};
use crate::table::pages::Page;
use crate::table::source::address;

/// A tile's entries, ordered by virtual block.
#[derive(CubeType)]
struct ByBlock {
    /// `[tile, entries]`: each entry's address, `block · table_rows + row`.
    addresses: SharedMemory<u32>,
    /// `[tile, entries]`: the entries by block, those of one block in their own order.
    order: SharedMemory<u32>,
    /// `[tile, expansion + 1]`: where a block's entries start.
    starts: SharedMemory<u32>,
}

/// The pooled values, projected: `output` `[tokens, columns]`. `CUBE_POS` runs over the splits of a tile of tokens first.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn expand_kernel<E: Float, N: Size, O: Size>(
    slots: &Array<u32>,
    scores: &Array<f32>,
    shuffle: &Array<u32>,
    values: &Array<Vector<E, N>>,
    gate: &Array<f32>,
    weight: &Array<Vector<E, O>>,
    output: &mut Array<Vector<E, O>>,
    offset: u32,
    tokens: u32,
    cubes: u32,
    #[comptime] plan: ExpandPlan,
    #[define(E)] _dtype: StorageType,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let width = N::value();
    let depth = comptime!(plan.blocks() * plan.value_dim / width);
    let token = CUBE_POS / plan.splits * plan.tile;
    let mut pooled = SharedMemory::<Vector<f32, N>>::new(comptime!(plan.tile * depth));
    let entries = order_entries(slots, shuffle, offset, token, tokens as usize, plan);
    let page = Page { first_row: 0u32, rows: comptime!(plan.address.table_rows as u32).runtime() };
    let mut slices = SharedMemory::<Vector<f32, N>>::new(comptime!(plan.slice_sums().max(1)));
    for start in range_stepped(0usize, comptime!(plan.items()), comptime!(plan.units / plan.slices)) {
        let item = start + UNIT_POS as usize % comptime!(plan.units / plan.slices);
        let own = Own { item, end: plan.items() };
        let sums = pool::<E, N>(&entries, scores, values, page, gate, token, tokens as usize, own, &mut slices, plan);
        if item < plan.items() && UNIT_POS < comptime!((plan.units / plan.slices) as u32) {
            #[unroll]
            for r in 0..plan.run {
                pooled[item * plan.run + r] = sums[r];
            }
        }
    }
    sync_cube();
    let rows = Rows::of_tile(depth, plan.tile).places();
    let outputs = Outputs { first: token, end: tokens as usize };
    let sharing = comptime!(plan.sharing);
    let group = comptime!(sharing.lanes * sharing.block);
    for start in range_stepped(CUBE_POS % plan.splits * group, plan.columns, comptime!(plan.splits * group)) {
        let columns = Columns {
            first: start + UNIT_POS as usize % sharing.lanes,
            last: comptime!(plan.columns - 1).runtime(),
            stride: sharing.lanes,
            count: sharing.block,
        };
        multiply::<f32, E, E, O, N>(
            &pooled.to_slice(),
            &rows,
            weight,
            0usize,
            output,
            outputs,
            columns,
            sharing.slices,
        );
    }
}

/// The pooled values alone, of the rows of one page: `pooled` `[tokens, expansion · value_dim]`, added to where `adds`. `CUBE_POS` runs over the splits of
/// a tile of tokens first.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn pool_kernel<E: Float, P: Float, N: Size>(
    slots: &Array<u32>,
    scores: &Array<f32>,
    shuffle: &Array<u32>,
    values: &Array<Vector<E, N>>,
    gate: &Array<f32>,
    pooled: &mut Array<Vector<P, N>>,
    first_row: u32,
    page_rows: u32,
    offset: u32,
    tokens: u32,
    cubes: u32,
    #[comptime] adds: bool,
    #[comptime] plan: ExpandPlan,
    #[define(E)] _dtype: StorageType,
    #[define(P)] _sums: StorageType,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let vectors = comptime!(plan.blocks() * plan.value_dim / plan.width);
    let token = CUBE_POS / plan.splits * plan.tile;
    let begin = CUBE_POS % plan.splits * plan.share();
    let end = lesser(begin + plan.share(), plan.items());
    let page = Page { first_row, rows: page_rows };
    let entries = order_entries(slots, shuffle, offset, token, tokens as usize, plan);
    let mut slices = SharedMemory::<Vector<f32, N>>::new(comptime!(plan.slice_sums().max(1)));
    for start in range_stepped(begin, end, comptime!(plan.units / plan.slices)) {
        let item = start + UNIT_POS as usize % comptime!(plan.units / plan.slices);
        let own = Own { item, end };
        let sums = pool::<E, N>(&entries, scores, values, page, gate, token, tokens as usize, own, &mut slices, plan);
        let first = item * plan.run;
        let own = item < end && UNIT_POS < comptime!((plan.units / plan.slices) as u32);
        if own && token + first / vectors < tokens as usize {
            #[unroll]
            for r in 0..plan.run {
                let at = token * vectors + first + r;
                let mut sum = sums[r];
                if adds {
                    sum += Vector::cast_from(pooled[at]);
                }
                pooled[at] = Vector::cast_from(sum);
            }
        }
    }
}

/// Reads a tile's slots and orders them by virtual block, in slot order within a block. Past the last token addresses are 0. Ends with a
/// barrier.
#[cube]
fn order_entries(
    slots: &Array<u32>,
    shuffle: &Array<u32>,
    offset: u32,
    token: usize,
    tokens: usize,
    #[comptime] plan: ExpandPlan,
) -> ByBlock {
    let size = comptime!(plan.tile * plan.entries);
    let of_token = comptime!(plan.blocks() * plan.chunks());
    let mut addresses = SharedMemory::<u32>::new(size);
    let mut order = SharedMemory::<u32>::new(size);
    let mut counts = SharedMemory::<u32>::new(comptime!(plan.tile * of_token));
    let mut starts = SharedMemory::<u32>::new(comptime!(plan.tile * (plan.blocks() + 1)));
    let present = lesser(size, (tokens - token) * plan.entries);
    for i in range_stepped(UNIT_POS as usize, size, plan.units) {
        let mut found = 0u32;
        if i < present {
            found = address(slots, shuffle, token * plan.entries + i, offset, comptime!(plan.address));
        }
        addresses[i] = found;
    }
    sync_cube();
    for i in range_stepped(UNIT_POS as usize, comptime!(plan.tile * of_token), plan.units) {
        let own = part_of(i, plan);
        let mut count = 0u32;
        for entry in own.first..own.last {
            count += u32::cast_from(addresses[entry] / comptime!(plan.address.table_rows as u32) == own.block);
        }
        counts[i] = count;
    }
    sync_cube();
    for i in range_stepped(UNIT_POS as usize, comptime!(plan.tile * of_token), plan.units) {
        let own = part_of(i, plan);
        let t = i / of_token;
        let mut place = 0u32;
        for before in t * of_token..i {
            place += counts[before];
        }
        let start = t * comptime!(plan.blocks() + 1) + own.block as usize;
        if i % comptime!(plan.chunks()) == 0 {
            starts[start] = place;
        }
        for entry in own.first..own.last {
            if addresses[entry] / comptime!(plan.address.table_rows as u32) == own.block {
                order[t * plan.entries + place as usize] = entry as u32;
                place += 1;
            }
        }
        if i % of_token == comptime!(of_token - 1) {
            starts[start + 1] = place;
        }
    }
    sync_cube();
    ByBlock { addresses, order, starts }
}

/// A chunk of a token's entries, `first..last` of the tile's, and the block that is looked for in it.
#[derive(CubeType, Clone, Copy)]
struct Part {
    first: usize,
    last: usize,
    block: u32,
}

/// Part `i` of `[tile, expansion, chunks]`.
#[cube]
fn part_of(i: usize, #[comptime] plan: ExpandPlan) -> Part {
    let chunks = comptime!(plan.chunks());
    let share = comptime!(plan.entries.div_ceil(chunks));
    let entries = i / comptime!(chunks * plan.blocks()) * plan.entries;
    let first = lesser(i % chunks * share, plan.entries);
    let last = lesser(first + share, plan.entries);
    Part { first: entries + first, last: entries + last, block: (i / chunks % comptime!(plan.blocks())) as u32 }
}

/// A run of a tile's pooled vectors, and where those of its cube end.
#[derive(CubeType, Clone, Copy)]
struct Own {
    item: usize,
    end: usize,
}

/// A run of a tile's pooled vectors, summed over the rows of a page, `[tile, expansion, value_dim / width]` flattened, gated where the layer has
/// a gate; of several slices, for the units of the first. All units of the cube come here then, and there is a barrier at the end.
#[cube]
#[allow(clippy::collapsible_if, reason = "the outer one is decided when the kernel is compiled")]
fn pool<E: Float, N: Size>(
    entries: &ByBlock,
    scores: &Array<f32>,
    values: &Array<Vector<E, N>>,
    page: Page,
    gate: &Array<f32>,
    token: usize,
    tokens: usize,
    own: Own,
    slices: &mut SharedMemory<Vector<f32, N>>,
    #[comptime] plan: ExpandPlan,
) -> Array<Vector<f32, N>> {
    let vectors = comptime!(plan.value_dim / plan.width);
    let first = own.item * plan.run;
    let t = first / comptime!(vectors * plan.blocks());
    let present = own.item < own.end && token + t < tokens;
    let mut sums = zero_sums::<N>(plan.run);
    if present {
        sum_rows::<E, N>(&mut sums, entries, scores, values, page, token, t, first, plan);
    }
    if comptime!(plan.slices > 1) {
        add_slices::<N>(&mut sums, slices, plan);
    }
    if comptime!(plan.gated) {
        if present && UNIT_POS < comptime!((plan.units / plan.slices) as u32) {
            apply_gate::<N>(&mut sums, gate, (token + t) * plan.value_dim + first % vectors * plan.width, plan);
        }
    }
    sums
}

/// Adds the rows of a slice's entries to the run that begins at vector `first` of the tile, of its token `t`.
#[cube]
#[allow(
    clippy::collapsible_if,
    clippy::if_same_then_else,
    reason = "the outer one is decided when the kernel is compiled"
)]
fn sum_rows<E: Float, N: Size>(
    sums: &mut Array<Vector<f32, N>>,
    entries: &ByBlock,
    scores: &Array<f32>,
    values: &Array<Vector<E, N>>,
    page: Page,
    token: usize,
    t: usize,
    first: usize,
    #[comptime] plan: ExpandPlan,
) {
    let vectors = comptime!(plan.value_dim / plan.width);
    let block = first / vectors % comptime!(plan.blocks());
    let column = first % vectors;
    let core = column / comptime!(vectors / plan.cores);
    let starts = t * comptime!(plan.blocks() + 1) + block;
    let base = block as u32 * comptime!(plan.address.table_rows as u32);
    let mut start = entries.starts[starts];
    if comptime!(plan.slices > 1) {
        start += UNIT_POS / comptime!((plan.units / plan.slices) as u32);
    }
    for place in range_stepped(start, entries.starts[starts + 1], comptime!(plan.slices as u32)) {
        let entry = entries.order[t * plan.entries + place as usize] as usize;
        let score = scores[(token * plan.entries + entry) * plan.cores + core];
        let row = page.place(entries.addresses[entry] - base);
        if comptime!(!plan.paged) {
            add_run::<E, N>(sums, values, row as usize * vectors + column, score, plan.run);
        } else if row < page.rows {
            add_run::<E, N>(sums, values, row as usize * vectors + column, score, plan.run);
        }
    }
}

/// Adds the sums of the other slices to those of the first. Begins without a barrier and ends with one.
#[cube]
fn add_slices<N: Size>(
    sums: &mut Array<Vector<f32, N>>,
    slices: &mut SharedMemory<Vector<f32, N>>,
    #[comptime] plan: ExpandPlan,
) {
    #[unroll]
    for r in 0..plan.run {
        slices[comptime!(r * plan.units) + UNIT_POS as usize] = sums[r];
    }
    sync_cube();
    if UNIT_POS < comptime!((plan.units / plan.slices) as u32) {
        #[unroll]
        for r in 0..plan.run {
            for slice in 1..plan.slices {
                sums[r] += slices[r * plan.units + slice * comptime!(plan.units / plan.slices) + UNIT_POS as usize];
            }
        }
    }
    sync_cube();
}

/// Multiplies a run by the silu of the gate's numbers from `first` on.
#[cube]
fn apply_gate<N: Size>(
    sums: &mut Array<Vector<f32, N>>,
    gate: &Array<f32>,
    first: usize,
    #[comptime] plan: ExpandPlan,
) {
    #[unroll]
    for r in 0..plan.run {
        let mut sum = sums[r];
        #[unroll]
        for n in 0..plan.width {
            let g = gate[first + r * plan.width + n];
            sum[n] = sum[n] * g / (1.0 + f32::exp(-g));
        }
        sums[r] = sum;
    }
}

#[cube]
fn add_run<E: Float, N: Size>(
    sums: &mut Array<Vector<f32, N>>,
    values: &Array<Vector<E, N>>,
    first: usize,
    score: f32,
    #[comptime] run: usize,
) {
    #[unroll]
    for r in 0..run {
        sums[r] += Vector::cast_from(values[first + r]) * Vector::new(score);
    }
}
