//! Gather and pool: `pooled[t, e, c] = Σ s_k(c) · V[row, c]` over the slots of token t whose address lies in block e, then, in the fused
//! kernel, `output[t] = W_o · pooled[t]`.
//!
//! One cube takes a tile of tokens. It turns slots into addresses, orders each token's entries by virtual block, and gives every
//! `(token, block, run of vectors)` to one unit, which sums its rows in slot order in registers: each selected row is read
//! once, in loads as wide as the row allows, and nothing is accumulated in memory. Reads `heads · top_m` rows of `value_dim` per
//! token, and W_o once per tile.
//!
//! At few tokens several cubes share out a tile's output columns. Each of them pools the tile anew, from rows that the others have
//! brought into the cache, and reads its own part of W_o.

use cubecl::prelude::*;

use crate::pages::Page;
use crate::product::{Columns, Outputs, Rows, Sharing, multiply, zero_sums};

/// What is fixed when the kernels are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ExpandPlan {
    /// Entries of a token: `heads · top_m`.
    pub entries: usize,
    pub cores: usize,
    pub expansion: usize,
    pub rows: usize,
    pub value_dim: usize,
    pub shuffled: bool,
    pub gated: bool,
    /// Whether the table has several pages.
    pub paged: bool,
    /// Vectors of a row that a unit sums; divides a core's slice.
    pub run: usize,
    /// Vectors of an output row; 0 where pooling is all.
    pub columns: usize,
    /// How the units of a cube project.
    pub sharing: Sharing,
    /// Cubes of a tile, each of which projects every `splits`-th group of `lanes · block` columns.
    pub splits: usize,
    /// Tokens of a cube.
    pub tile: usize,
    pub units: usize,
}

/// A tile's entries, ordered by virtual block.
#[derive(CubeType)]
struct Entries {
    /// `[tile, entries]`: the physical row.
    rows: SharedMemory<u32>,
    /// `[tile, entries, cores]`.
    scores: SharedMemory<f32>,
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
    tokens: u32,
    cubes: u32,
    #[comptime] plan: ExpandPlan,
    #[define(E)] _dtype: StorageType,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let width = N::value();
    let depth = comptime!(plan.expansion * plan.value_dim / width);
    let token = CUBE_POS / plan.splits * plan.tile;
    let mut pooled = SharedMemory::<Vector<f32, N>>::new(comptime!(plan.tile * depth));
    let entries = order_entries(slots, scores, shuffle, token, tokens as usize, plan);
    let page = Page { first_row: 0u32, rows: comptime!(plan.rows as u32).runtime() };
    for item in range_stepped(UNIT_POS as usize, comptime!(plan.tile * depth / plan.run), plan.units) {
        let sums = pool::<E, N>(&entries, values, page, gate, token, tokens as usize, item, plan);
        #[unroll]
        for r in 0..plan.run {
            pooled[item * plan.run + r] = sums[r];
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

/// The pooled values alone, of the rows of one page: `pooled` `[tokens, expansion · value_dim]`, added to where `adds`.
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
    let width = N::value();
    let vectors = comptime!(plan.expansion * plan.value_dim / width);
    let token = CUBE_POS * plan.tile;
    let page = Page { first_row, rows: page_rows };
    let entries = order_entries(slots, scores, shuffle, token, tokens as usize, plan);
    for item in range_stepped(UNIT_POS as usize, comptime!(plan.tile * vectors / plan.run), plan.units) {
        let sums = pool::<E, N>(&entries, values, page, gate, token, tokens as usize, item, plan);
        let first = item * plan.run;
        if token + first / vectors < tokens as usize {
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

/// Reads a tile's slots and scores and orders them by virtual block, in slot order within a block. Entries past the last token
/// read slot 0 with score 0. Ends with a barrier.
#[cube]
fn order_entries(
    slots: &Array<u32>,
    scores: &Array<f32>,
    shuffle: &Array<u32>,
    token: usize,
    tokens: usize,
    #[comptime] plan: ExpandPlan,
) -> Entries {
    let size = comptime!(plan.tile * plan.entries);
    let mut addresses = SharedMemory::<u32>::new(size);
    let mut rows = SharedMemory::<u32>::new(size);
    let mut ordered = SharedMemory::<f32>::new(comptime!(size * plan.cores));
    let mut starts = SharedMemory::<u32>::new(comptime!(plan.tile * (plan.expansion + 1)));
    let last = comptime!((plan.rows * plan.expansion - 1) as u32);
    let present = min(comptime!(plan.tile * plan.entries), (tokens - token) * plan.entries);
    for i in range_stepped(UNIT_POS as usize, size, plan.units) {
        let mut address = 0u32;
        if i < present {
            address = min(slots[token * plan.entries + i], last);
            if plan.shuffled {
                address = min(shuffle[address as usize], last);
            }
        }
        addresses[i] = address;
    }
    sync_cube();
    for i in range_stepped(UNIT_POS as usize, size, plan.units) {
        let address = addresses[i];
        let block = address / comptime!(plan.rows as u32);
        let first = i / plan.entries * plan.entries;
        let mut place = first;
        for j in 0..plan.entries {
            let other = addresses[first + j] / comptime!(plan.rows as u32);
            place += usize::cast_from(other < block || (other == block && first + j < i));
        }
        rows[place] = address - block * comptime!(plan.rows as u32);
        for k in 0..plan.cores {
            let mut score = 0.0f32;
            if i < present {
                score = scores[(token * plan.entries + i) * plan.cores + k];
            }
            ordered[place * plan.cores + k] = score;
        }
    }
    for i in range_stepped(UNIT_POS as usize, comptime!(plan.tile * (plan.expansion + 1)), plan.units) {
        let block = (i % comptime!(plan.expansion + 1)) as u32;
        let first = i / comptime!(plan.expansion + 1) * plan.entries;
        let mut start = 0u32;
        for j in 0..plan.entries {
            start += u32::cast_from(addresses[first + j] / comptime!(plan.rows as u32) < block);
        }
        starts[i] = start;
    }
    sync_cube();
    Entries { rows, scores: ordered, starts }
}

/// Run `item` of a tile's pooled vectors, summed over the rows of a page, `[tile, expansion, value_dim / width]` flattened, gated where the layer has a gate.
#[cube]
#[allow(
    clippy::collapsible_if,
    clippy::if_same_then_else,
    reason = "the outer one is decided when the kernel is compiled"
)]
fn pool<E: Float, N: Size>(
    entries: &Entries,
    values: &Array<Vector<E, N>>,
    page: Page,
    gate: &Array<f32>,
    token: usize,
    tokens: usize,
    item: usize,
    #[comptime] plan: ExpandPlan,
) -> Array<Vector<f32, N>> {
    let width = N::value();
    let vectors = comptime!(plan.value_dim / width);
    let first = item * plan.run;
    let block = first / vectors % plan.expansion;
    let t = first / comptime!(vectors * plan.expansion);
    let column = first % vectors;
    let core = column / comptime!(vectors / plan.cores);
    let starts = t * comptime!(plan.expansion + 1) + block;
    let mut sums = zero_sums::<N>(plan.run);
    for place in entries.starts[starts]..entries.starts[starts + 1] {
        let entry = t * plan.entries + place as usize;
        let score = entries.scores[entry * plan.cores + core];
        let row = page.place(entries.rows[entry]);
        if comptime!(!plan.paged) {
            add_run::<E, N>(&mut sums, values, row as usize * vectors + column, score, plan.run);
        } else if row < page.rows {
            add_run::<E, N>(&mut sums, values, row as usize * vectors + column, score, plan.run);
        }
    }
    if comptime!(plan.gated) {
        if token + t < tokens {
            #[unroll]
            for r in 0..plan.run {
                let mut sum = sums[r];
                #[unroll]
                for n in 0..width {
                    let g = gate[(token + t) * plan.value_dim + (column + r) * width + n];
                    sum[n] = sum[n] * g / (1.0 + f32::exp(-g));
                }
                sums[r] = sum;
            }
        }
    }
    sums
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
