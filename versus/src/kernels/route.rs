//! Routing: the experts of each token, and the tokens of each expert side by side.
//!
//! The router's logits `[tokens, experts]` go through the layers' own selection, [`top_m`](ultramem_kernels::top_m()), which keeps the `top_k`
//! largest of each token; they are weighted by the softmax over them. `group` sorts the entries (a token and one of its experts) by expert, a
//! counting sort: each unit counts the entries of its own tokens, so that no atomics are needed and the order is the same in every run. It
//! cuts each expert's entries into tiles, which are what the experts' products run over. One cube groups few tokens; of more each
//! cube has a part, and what the parts hold is counted by a launch before. Moves the logits once and a few words an entry.

use cubecl::prelude::*;
use ultramem_kernels::launch::{Device, arg, check_loops, positive, strided, tokens_of};
use ultramem_kernels::{ElementType, Error, Result, Tensor, check, empty, top_m, u32_storage};

/// What the router chose.
pub struct Routed<R: Runtime> {
    /// u32 `[tokens, top_k]`: the experts of a token, largest logit first; equal logits, smaller expert first.
    pub experts: Tensor<R>,
    /// f32 `[tokens, top_k]`: the softmax over the kept logits.
    pub weights: Tensor<R>,
}

/// Entries by expert.
pub(crate) struct Grouped<R: Runtime> {
    /// u32 `[entries]`: entries by expert, those of one expert in their own order.
    pub order: Tensor<R>,
    /// u32 `[entries]`: where in `order` each entry is.
    pub places: Tensor<R>,
    /// u32 `[tile_count, 3]`: a tile's expert, and its first and last place in `order`, the last not included; none where they are equal.
    pub tiles: Tensor<R>,
    /// The most tiles there can be.
    pub tile_count: usize,
}

/// Launches the router's choice among `logits` f32 `[tokens, experts]`: the `top_k` largest of each token. A NaN is never chosen
/// before a number; it spoils the weights of its own token where it is.
///
/// # Errors
/// Shapes, types or sizes that don't fit; nothing is launched then.
pub fn route<R: Runtime>(client: &ComputeClient<R>, logits: &Tensor<R>, top_k: usize) -> Result<Routed<R>> {
    let Choice { tokens, experts, routed } = choose(client, logits, top_k)?;
    if tokens == 0 {
        return Ok(routed);
    }
    let device = Device::of(client);
    let units = device.flat(tokens);
    check_loops("weigh_kernel", 2 * top_k)?;
    // SAFETY: shapes are checked; a unit reads and writes the row of one token below `tokens`.
    unsafe {
        weigh_kernel::launch_unchecked::<R>(
            client,
            device.grid(tokens.div_ceil(units))?,
            CubeDim::new_1d(units as u32),
            arg(logits, 1),
            arg(&routed.experts, 1),
            arg(&routed.weights, 1),
            tokens as u32,
            experts as u32,
            top_k,
            units,
        );
    }
    Ok(routed)
}

/// What was chosen, the weights not written yet.
struct Choice<R: Runtime> {
    tokens: usize,
    experts: usize,
    routed: Routed<R>,
}

fn choose<R: Runtime>(client: &ComputeClient<R>, logits: &Tensor<R>, top_k: usize) -> Result<Choice<R>> {
    let (tokens, experts) = (tokens_of(logits, "logits")?, logits.shape().get(1).copied().unwrap_or(0));
    check(client, logits, "logits", &[tokens, experts], ElementType::F32.storage())?;
    positive(&[("experts", experts), ("top_k", top_k)])?;
    if top_k > experts {
        let (value, limit) = (top_k as u64, experts as u64);
        return Err(Error::Exceeds { what: "top_k", value, limit_name: "experts", limit });
    }
    if tokens.saturating_mul(top_k) > u32::MAX as usize {
        let (value, limit) = (tokens as u64, u64::from(u32::MAX) / top_k as u64);
        return Err(Error::Exceeds { what: "tokens", value, limit_name: "what entries can be counted", limit });
    }
    let weights = empty(client, "weights", &[tokens, top_k], ElementType::F32.storage())?;
    Ok(Choice { tokens, experts, routed: Routed { experts: top_m(client, logits, top_k)?, weights } })
}

/// What is fixed when the kernels are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct GroupPlan {
    experts: usize,
    top_k: usize,
    units: usize,
    /// Entries of a tile.
    tile: usize,
    /// Whether one cube groups all entries.
    alone: bool,
}

impl GroupPlan {
    /// As many units as tokens keep busy and as have room for their tallies.
    fn of(device: &Device, tokens: usize, experts: usize, top_k: usize, tile: usize) -> Result<Self> {
        let with = |units| Self { experts, top_k, units, tile, alone: tokens <= units * SHARE };
        let mut plan = with(device.units(tokens.max(experts)).min(UNITS));
        while plan.units > 1 && plan.shared_bytes() > device.shared_bytes {
            plan = with(plan.units / 2);
        }
        device.fits_shared("route", plan.shared_bytes())?;
        Ok(plan)
    }

    /// Cubes that share out the tokens.
    fn cubes(&self, tokens: usize) -> usize {
        if self.alone { 1 } else { tokens.div_ceil(self.units * SHARE).min(CUBES) }
    }

    /// Words from an expert's tallies to the next one's: one more than units, so that those of a unit lie in different banks.
    fn pitch(&self) -> usize {
        self.units + 1
    }

    /// Shared memory of a tally for each expert and unit, and of what each expert has, in all and before a cube.
    fn shared_bytes(&self) -> usize {
        4 * self.experts * (self.pitch() + 2)
    }

    /// Loop iterations of a unit that counts.
    fn count_loops(&self, share: usize) -> usize {
        self.experts + share * self.top_k + strided(self.experts, self.units) * (1 + self.units)
    }

    /// Those of a unit that groups, at most.
    fn group_loops(&self, share: usize, cubes: usize, tile_count: usize) -> usize {
        let of_expert = 2 + self.units + cubes + self.experts;
        let tiles = tile_count + strided(tile_count, self.units) + self.experts;
        let tokens = share * (1 + 3 * self.top_k);
        self.count_loops(share) + tokens + strided(self.experts, self.units) * of_expert + tiles
    }
}

/// The most units of a cube: an expert's tallies are added up one after the other.
const UNITS: usize = 64;
/// Tokens of a unit, as long as there are cubes.
const SHARE: usize = 4;
/// The most cubes, of which each adds up what those before it have.
const CUBES: usize = 64;

/// Routes, and groups the entries in tiles of `tile`.
pub(crate) fn route_and_group<R: Runtime>(
    client: &ComputeClient<R>,
    logits: &Tensor<R>,
    top_k: usize,
    tile: usize,
) -> Result<(Routed<R>, Grouped<R>)> {
    let device = Device::of(client);
    let Choice { tokens, experts, routed } = choose(client, logits, top_k)?;
    let entries = tokens * top_k;
    let touched = experts.min(entries);
    let tile_count = (entries + touched * (tile - 1)) / tile;
    let words = |name, shape: &[usize]| empty(client, name, shape, u32_storage());
    let grouped = Grouped {
        order: words("order", &[entries])?,
        places: words("places", &[entries])?,
        tiles: words("tiles", &[tile_count, 3])?,
        tile_count,
    };
    let plan = GroupPlan::of(&device, tokens, experts, top_k, tile)?;
    let cubes = plan.cubes(tokens);
    let share = tokens.div_ceil(cubes * plan.units);
    let (grid, cube_dim) = (|| device.grid(cubes), CubeDim::new_1d(plan.units as u32));
    check_loops("group_kernel", plan.group_loops(share, cubes, tile_count))?;
    let counts = if plan.alone { routed.experts.clone() } else { words("counts", &[cubes, experts])? };
    if !plan.alone {
        check_loops("count_kernel", plan.count_loops(share))?;
        // SAFETY: a unit reads entries of its own tokens, and a cube writes its own counts.
        unsafe {
            count_kernel::launch_unchecked::<R>(
                client,
                grid()?,
                cube_dim,
                arg(&routed.experts, 1),
                arg(&counts, 1),
                tokens as u32,
                share as u32,
                cubes as u32,
                plan,
            );
        }
    }
    // SAFETY: units read and write entries of their own tokens and tiles of their own experts; there are at most `tile_count` tiles, for each
    // touched expert leaves at most one of its own unfilled.
    unsafe {
        group_kernel::launch_unchecked::<R>(
            client,
            grid()?,
            cube_dim,
            arg(logits, 1),
            arg(&routed.experts, 1),
            arg(&counts, 1),
            arg(&routed.weights, 1),
            arg(&grouped.order, 1),
            arg(&grouped.places, 1),
            arg(&grouped.tiles, 1),
            tokens as u32,
            share as u32,
            cubes as u32,
            tile_count as u32,
            plan,
        );
    }
    Ok((routed, grouped))
}

#[cube(launch_unchecked)]
fn weigh_kernel(
    logits: &Array<f32>,
    chosen: &Array<u32>,
    weights: &mut Array<f32>,
    tokens: u32,
    experts: u32,
    #[comptime] top_k: usize,
    #[comptime] units: usize,
) {
    let token = CUBE_POS * units + UNIT_POS as usize;
    if token >= tokens as usize {
        terminate!();
    }
    weigh(logits, chosen, weights, token, experts as usize, top_k);
}

/// The softmax over a token's kept logits.
#[cube]
fn weigh(
    logits: &Array<f32>,
    chosen: &Array<u32>,
    weights: &mut Array<f32>,
    token: usize,
    experts: usize,
    #[comptime] top_k: usize,
) {
    let (row, first) = (token * experts, token * top_k);
    let largest = logits[row + chosen[first] as usize];
    let mut sum = 0.0f32;
    for k in 0..top_k {
        sum += f32::exp(logits[row + chosen[first + k] as usize] - largest);
    }
    for k in 0..top_k {
        weights[first + k] = f32::exp(logits[row + chosen[first + k] as usize] - largest) / sum;
    }
}

/// The unit's tokens, the last not included.
#[cube]
fn own_tokens(tokens: u32, share: u32, #[comptime] units: usize) -> (usize, usize) {
    let first = min((CUBE_POS * units + UNIT_POS as usize) * share as usize, tokens as usize);
    (first, min(first + share as usize, tokens as usize))
}

/// Counts each unit's entries by expert. Ends with a barrier.
#[cube]
fn tally(chosen: &Array<u32>, tallies: &mut SharedMemory<u32>, tokens: u32, share: u32, #[comptime] plan: GroupPlan) {
    let unit = UNIT_POS as usize;
    let (first, last) = own_tokens(tokens, share, plan.units);
    for e in 0..plan.experts {
        tallies[e * comptime!(plan.pitch()) + unit] = 0u32;
    }
    for entry in first * plan.top_k..last * plan.top_k {
        let at = chosen[entry] as usize * comptime!(plan.pitch()) + unit;
        tallies[at] += 1u32;
    }
    sync_cube();
}

/// What the units of a cube have of an expert.
#[cube]
fn tallied(tallies: &SharedMemory<u32>, expert: usize, #[comptime] plan: GroupPlan) -> u32 {
    let mut sum = 0u32;
    for unit in 0..plan.units {
        sum += tallies[expert * comptime!(plan.pitch()) + unit];
    }
    sum
}

/// Each cube's entries by expert, `[cubes, experts]`.
#[cube(launch_unchecked)]
fn count_kernel(
    chosen: &Array<u32>,
    counts: &mut Array<u32>,
    tokens: u32,
    share: u32,
    cubes: u32,
    #[comptime] plan: GroupPlan,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let mut tallies = SharedMemory::<u32>::new(comptime!(plan.experts * plan.pitch()));
    tally(chosen, &mut tallies, tokens, share, plan);
    for e in range_stepped(UNIT_POS as usize, plan.experts, plan.units) {
        counts[CUBE_POS * plan.experts + e] = tallied(&tallies, e, plan);
    }
}

/// Weighs what each token chose and sorts the entries by expert. A unit counts and places the entries of its own tokens; between, it turns
/// the counts of its own experts into places, and those of the first cube write the tiles.
#[cube(launch_unchecked)]
fn group_kernel(
    logits: &Array<f32>,
    chosen: &Array<u32>,
    counts: &Array<u32>,
    weights: &mut Array<f32>,
    order: &mut Array<u32>,
    places: &mut Array<u32>,
    tiles: &mut Array<u32>,
    tokens: u32,
    share: u32,
    cubes: u32,
    tile_count: u32,
    #[comptime] plan: GroupPlan,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    let mut tallies = SharedMemory::<u32>::new(comptime!(plan.experts * plan.pitch()));
    let mut totals = SharedMemory::<u32>::new(plan.experts);
    let mut befores = SharedMemory::<u32>::new(plan.experts);
    tally(chosen, &mut tallies, tokens, share, plan);
    for e in range_stepped(unit, plan.experts, plan.units) {
        let mut total = 0u32;
        let mut before = 0u32;
        if comptime!(plan.alone) {
            total = tallied(&tallies, e, plan);
        } else {
            for cube in 0..cubes as usize {
                let count = counts[cube * plan.experts + e];
                total += count;
                before += select(cube < CUBE_POS, count, 0u32);
            }
        }
        totals[e] = total;
        befores[e] = before;
    }
    sync_cube();
    for e in range_stepped(unit, plan.experts, plan.units) {
        place_expert(&mut tallies, &totals, befores[e], tiles, e, plan);
    }
    if CUBE_POS == 0 {
        fill_tiles(&totals, tiles, tile_count, plan);
    }
    sync_cube();
    let (first, last) = own_tokens(tokens, share, plan.units);
    for token in first..last {
        weigh(logits, chosen, weights, token, plan.experts, plan.top_k);
        for entry in token * plan.top_k..(token + 1) * plan.top_k {
            let at = chosen[entry] as usize * comptime!(plan.pitch()) + unit;
            let place = tallies[at];
            tallies[at] = place + 1u32;
            order[place as usize] = entry as u32;
            places[entry] = place;
        }
    }
}

/// Turns the counts of expert `e`, of which `before` lie in the cubes before this one, into the place of each unit's first entry; the first cube
/// writes the expert's tiles.
#[cube]
fn place_expert(
    tallies: &mut SharedMemory<u32>,
    totals: &SharedMemory<u32>,
    before: u32,
    tiles: &mut Array<u32>,
    e: usize,
    #[comptime] plan: GroupPlan,
) {
    let mut start = 0u32;
    let mut tile = 0u32;
    for other in 0..e {
        start += totals[other];
        tile += totals[other].div_ceil(plan.tile as u32);
    }
    if CUBE_POS == 0 {
        let end = start + totals[e];
        for first in range_stepped(start, end, plan.tile as u32) {
            let at = tile as usize * 3;
            tiles[at] = e as u32;
            tiles[at + 1] = first;
            tiles[at + 2] = min(first + plan.tile as u32, end);
            tile += 1u32;
        }
    }
    let mut place = start + before;
    for unit in 0..plan.units {
        let at = e * comptime!(plan.pitch()) + unit;
        let count = tallies[at];
        tallies[at] = place;
        place += count;
    }
}

/// Marks the tiles after the last expert's as none.
#[cube]
fn fill_tiles(totals: &SharedMemory<u32>, tiles: &mut Array<u32>, tile_count: u32, #[comptime] plan: GroupPlan) {
    let mut used = 0u32;
    for e in 0..plan.experts {
        used += totals[e].div_ceil(plan.tile as u32);
    }
    for tile in range_stepped(used + UNIT_POS, tile_count, plan.units as u32) {
        let at = tile as usize * 3;
        tiles[at] = 0u32;
        tiles[at + 1] = 0u32;
        tiles[at + 2] = 0u32;
    }
}
