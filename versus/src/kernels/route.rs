//! Routing: the experts of each token, and the tokens of each expert side by side.
//!
//! `route` reads the router's logits `[tokens, experts]` and keeps the `top_k` largest of each token, weighted by the softmax over
//! them. `group` sorts the entries (a token and one of its experts) by expert, a counting sort in one cube: each unit counts the
//! entries of its own tokens, so that no atomics are needed and the order is the same in every run. It cuts each expert's entries into tiles,
//! which are what the experts' products run over. Few tokens are routed and grouped in one launch. Moves the logits once and a few words an entry.

use cubecl::prelude::*;
use ultramem_kernels::launch::{Device, arg, check_loops, positive, strided, tokens_of};
use ultramem_kernels::{ElementType, Error, Result, Tensor, check, empty, order_key, u32_storage};

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

/// What is fixed when the kernels are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct RoutePlan {
    experts: usize,
    top_k: usize,
    units: usize,
    /// Entries of a tile.
    tile: usize,
    /// Whether the grouping cube routes as well.
    routes: bool,
}

impl RoutePlan {
    /// Loop iterations of a unit that routes a token.
    fn token_loops(&self) -> usize {
        self.top_k * self.experts
    }

    /// Those of a unit of the one cube that groups all entries, at most.
    fn group_loops(&self, tokens: usize, tile_count: usize) -> usize {
        let share = strided(tokens, self.units);
        let routed = if self.routes { share * (1 + self.token_loops()) } else { 0 };
        let of_expert = 2 + 2 * self.units + self.experts;
        let tiles = tile_count + strided(tile_count, self.units);
        2 * self.experts + routed + 2 * share * self.top_k + strided(self.experts, self.units) * of_expert + tiles
    }
}

/// Launches the router's choice among `logits` f32 `[tokens, experts]`: the `top_k` largest of each token. A NaN is never chosen
/// before a number; it spoils the weights of its own token where it is.
///
/// # Errors
/// Shapes, types or sizes that don't fit; nothing is launched then.
pub fn route<R: Runtime>(client: &ComputeClient<R>, logits: &Tensor<R>, top_k: usize) -> Result<Routed<R>> {
    let (tokens, experts) = sizes(client, logits, top_k)?;
    let device = Device::of(client);
    let routed = routed(client, tokens, top_k)?;
    if tokens == 0 {
        return Ok(routed);
    }
    let plan = RoutePlan { experts, top_k, units: device.flat(tokens), tile: 1, routes: true };
    check_loops("route_kernel", plan.token_loops())?;
    // SAFETY: shapes are checked; a unit reads and writes the row of one token below `tokens`.
    unsafe {
        route_kernel::launch_unchecked::<R>(
            client,
            device.grid(tokens.div_ceil(plan.units))?,
            CubeDim::new_1d(plan.units as u32),
            arg(logits, 1),
            arg(&routed.experts, 1),
            arg(&routed.weights, 1),
            tokens as u32,
            plan,
        );
    }
    Ok(routed)
}

/// Routes, and groups the entries in tiles of `tile`.
pub(crate) fn route_and_group<R: Runtime>(
    client: &ComputeClient<R>,
    logits: &Tensor<R>,
    top_k: usize,
    tile: usize,
) -> Result<(Routed<R>, Grouped<R>)> {
    let (tokens, experts) = sizes(client, logits, top_k)?;
    let device = Device::of(client);
    let entries = tokens * top_k;
    let units = tally_units(&device, tokens, experts)?;
    // One cube looks at so many logits as fast as another launch begins.
    let routes = tokens.div_ceil(units) * experts <= FEW_LOGITS;
    let routed = if routes { routed(client, tokens, top_k)? } else { route(client, logits, top_k)? };
    let touched = experts.min(entries);
    let tile_count = (entries + touched * (tile - 1)) / tile;
    let words = |name, shape: &[usize]| empty(client, name, shape, u32_storage());
    let grouped = Grouped {
        order: words("order", &[entries])?,
        places: words("places", &[entries])?,
        tiles: words("tiles", &[tile_count, 3])?,
        tile_count,
    };
    let plan = RoutePlan { experts, top_k, units, tile, routes };
    check_loops("group_kernel", plan.group_loops(tokens, tile_count))?;
    // SAFETY: one cube, whose units read and write entries of their own tokens and tiles of their own experts; there are at most
    // `tile_count` tiles, for each touched expert leaves at most one of its own unfilled.
    unsafe {
        group_kernel::launch_unchecked::<R>(
            client,
            CubeCount::Static(1, 1, 1),
            CubeDim::new_1d(units as u32),
            arg(logits, 1),
            arg(&routed.experts, 1),
            arg(&routed.weights, 1),
            arg(&grouped.order, 1),
            arg(&grouped.places, 1),
            arg(&grouped.tiles, 1),
            tokens as u32,
            tile_count as u32,
            plan,
        );
    }
    Ok((routed, grouped))
}

/// Logits of a unit that one cube still takes on.
const FEW_LOGITS: usize = 1024;

fn sizes<R: Runtime>(client: &ComputeClient<R>, logits: &Tensor<R>, top_k: usize) -> Result<(usize, usize)> {
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
    Ok((tokens, experts))
}

fn routed<R: Runtime>(client: &ComputeClient<R>, tokens: usize, top_k: usize) -> Result<Routed<R>> {
    Ok(Routed {
        experts: empty(client, "experts", &[tokens, top_k], u32_storage())?,
        weights: empty(client, "weights", &[tokens, top_k], ElementType::F32.storage())?,
    })
}

/// As many units as tokens or experts keep busy and as have room for their tallies.
fn tally_units(device: &Device, tokens: usize, experts: usize) -> Result<usize> {
    let mut units = device.units(tokens.max(experts));
    while units > 1 && tally_bytes(experts, units) > device.shared_bytes {
        units /= 2;
    }
    device.fits_shared("route", tally_bytes(experts, units))?;
    Ok(units)
}

/// Shared memory of a tally for each expert and unit, and of each expert's sum.
fn tally_bytes(experts: usize, units: usize) -> usize {
    4 * experts * (units + 1)
}

#[cube(launch_unchecked)]
fn route_kernel(
    logits: &Array<f32>,
    experts: &mut Array<u32>,
    weights: &mut Array<f32>,
    tokens: u32,
    #[comptime] plan: RoutePlan,
) {
    let token = CUBE_POS * plan.units + UNIT_POS as usize;
    if token >= tokens as usize {
        terminate!();
    }
    route_token(logits, experts, weights, token, plan);
}

/// One token: `top_k` times the best of the experts that are left, then the softmax over their logits.
#[cube]
fn route_token(
    logits: &Array<f32>,
    experts: &mut Array<u32>,
    weights: &mut Array<f32>,
    token: usize,
    #[comptime] plan: RoutePlan,
) {
    let mut chosen = Array::<u32>::new(plan.top_k);
    #[unroll]
    for k in 0..plan.top_k {
        chosen[k] = comptime!(plan.experts as u32).runtime();
        let mut best = 0u32.runtime();
        for e in 0..plan.experts as u32 {
            let mut taken = false;
            #[unroll]
            for other in 0..k {
                taken = taken || chosen[other] == e;
            }
            // The smaller the order key, the larger the logit; a NaN's is the largest.
            let key = order_key(logits[token * plan.experts + e as usize]);
            if !taken && (chosen[k] == comptime!(plan.experts as u32) || key < best) {
                chosen[k] = e;
                best = key;
            }
        }
        experts[token * plan.top_k + k] = chosen[k];
    }
    let largest = logits[token * plan.experts + chosen[0] as usize];
    let mut sum = 0.0f32;
    #[unroll]
    for k in 0..plan.top_k {
        sum += f32::exp(logits[token * plan.experts + chosen[k] as usize] - largest);
    }
    #[unroll]
    for k in 0..plan.top_k {
        weights[token * plan.top_k + k] = f32::exp(logits[token * plan.experts + chosen[k] as usize] - largest) / sum;
    }
}

/// Sorts entries by expert. A unit routes, counts and places the entries of its own tokens; between, it turns the counts of its
/// own experts into places and writes their tiles.
#[cube(launch_unchecked)]
fn group_kernel(
    logits: &Array<f32>,
    experts: &mut Array<u32>,
    weights: &mut Array<f32>,
    order: &mut Array<u32>,
    places: &mut Array<u32>,
    tiles: &mut Array<u32>,
    tokens: u32,
    tile_count: u32,
    #[comptime] plan: RoutePlan,
) {
    let unit = UNIT_POS as usize;
    let share = tokens.div_ceil(plan.units as u32) as usize;
    let first = min(unit * share, tokens as usize);
    let last = min(first + share, tokens as usize);
    let mut tallies = SharedMemory::<u32>::new(comptime!(plan.experts * plan.units));
    let mut totals = SharedMemory::<u32>::new(plan.experts);
    for e in 0..plan.experts {
        tallies[e * plan.units + unit] = 0u32;
    }
    if comptime!(plan.routes) {
        for token in first..last {
            route_token(logits, experts, weights, token, plan);
        }
    }
    for entry in first * plan.top_k..last * plan.top_k {
        tallies[experts[entry] as usize * plan.units + unit] += 1u32;
    }
    sync_cube();
    for e in range_stepped(unit, plan.experts, plan.units) {
        let mut total = 0u32;
        for other in 0..plan.units {
            total += tallies[e * plan.units + other];
        }
        totals[e] = total;
    }
    sync_cube();
    for e in range_stepped(unit, plan.experts, plan.units) {
        place_expert(&mut tallies, &totals, tiles, e, plan);
    }
    fill_tiles(&totals, tiles, tile_count, plan);
    sync_cube();
    for entry in first * plan.top_k..last * plan.top_k {
        let at = experts[entry] as usize * plan.units + unit;
        let place = tallies[at];
        tallies[at] = place + 1u32;
        order[place as usize] = entry as u32;
        places[entry] = place;
    }
}

/// Turns the counts of expert `e` into the place of each unit's first entry, and writes the expert's tiles.
#[cube]
fn place_expert(
    tallies: &mut SharedMemory<u32>,
    totals: &SharedMemory<u32>,
    tiles: &mut Array<u32>,
    e: usize,
    #[comptime] plan: RoutePlan,
) {
    let mut place = 0u32;
    let mut tile = 0u32;
    for other in 0..e {
        place += totals[other];
        tile += totals[other].div_ceil(plan.tile as u32);
    }
    let end = place + totals[e];
    for start in range_stepped(place, end, plan.tile as u32) {
        let at = tile as usize * 3;
        tiles[at] = e as u32;
        tiles[at + 1] = start;
        tiles[at + 2] = min(start + plan.tile as u32, end);
        tile += 1u32;
    }
    for unit in 0..plan.units {
        let count = tallies[e * plan.units + unit];
        tallies[e * plan.units + unit] = place;
        place += count;
    }
}

/// Marks the tiles after the last expert's as none.
#[cube]
fn fill_tiles(totals: &SharedMemory<u32>, tiles: &mut Array<u32>, tile_count: u32, #[comptime] plan: RoutePlan) {
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
