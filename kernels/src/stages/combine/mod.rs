//! Combine: which pairs of kept keys a head reads, and with what scores (DESIGN §2.3; the paper's Tucker core, section 3.2, and
//! multi-core scoring, section 3.4).
//!
//! Shapes: kept keys `[tokens, heads, 2, top_m]` and scores `[tokens, heads, 2, top_m, rank]` as [`score`](crate::stages::score::score) makes
//! them; result `slots` `[tokens, heads, top_m]`, largest total first, equal totals by smaller slot, and `scores` `[tokens, heads, top_m,
//! cores]`.

mod backward;
mod forward;

use cubecl::prelude::*;

pub use self::backward::{CombineGradients, CoreShares, combine_backward, core_shares};
pub(crate) use self::forward::{CombinePlan, HeadRow, choose_pairs};
use self::forward::{combine_kernel, listed_vectors};
use crate::launch::device::Device;
use crate::launch::loops::{check_loops, fits_loops};
use crate::launch::tensor::{Tensor, arg, check, empty, f32_storage, positive, u32_storage};
use crate::select::{FOUR, scratch_bytes};
use crate::stages::score::Kept;
use crate::{Error, Result};

/// What a token reads.
pub struct Chosen<R: Runtime> {
    /// u32 `[tokens, heads, top_m]`: `row key · side_keys + column key`, before the shuffle.
    pub slots: Tensor<R>,
    /// f32 `[tokens, heads, top_m, cores]`.
    pub scores: Tensor<R>,
}

impl<R: Runtime> Clone for Chosen<R> {
    fn clone(&self) -> Self {
        Self { slots: self.slots.clone(), scores: self.scores.clone() }
    }
}

/// How the two sides' scores make a pair's.
pub enum PairScore<'a, R: Runtime> {
    /// UltraMem: `s_k = S_rowᵀ · C_k · S_col`, `C` f32 `[cores, heads, rank, rank]`; the order is that of `Σ_k s_k`.
    Tucker(&'a Tensor<R>),
    /// Product keys: `S_row + S_col`, then a softmax over the kept slots of the head.
    Additive,
}

/// Launches the stage. `side_keys` is the number of keys a side has, at most 65,535. No tokens choose no slots.
///
/// # Errors
/// Shapes, types or sizes that don't fit; nothing is launched then.
pub fn combine<R: Runtime>(
    client: &ComputeClient<R>,
    kept: &Kept<R>,
    side_keys: usize,
    pair_score: &PairScore<'_, R>,
) -> Result<Chosen<R>> {
    let device = Device::of(client);
    let shape = Shape::check(client, kept, pair_score)?;
    slots_fit(side_keys)?;
    let rows = shape.tokens * shape.heads;
    if rows == 0 {
        return shape.chosen(client);
    }
    let plan = tiled(&device, shape.plan(side_keys), rows);
    device.fits_shared("combine", shared_bytes(&plan))?;
    check_loops("combine_kernel", plan.loops())?;
    let chosen = shape.chosen(client)?;
    // SAFETY: shapes are checked; a cube reads and writes its own rows only.
    unsafe {
        combine_kernel::launch_unchecked::<R>(
            client,
            device.grid(rows.div_ceil(plan.tile))?,
            CubeDim::new_1d(plan.units as u32),
            arg(&kept.keys, 1),
            arg(&kept.scores, 1),
            arg(shape.core, 1),
            arg(&chosen.slots, 1),
            arg(&chosen.scores, 1),
            rows as u32,
            plan,
        );
    }
    Ok(chosen)
}

/// Checks that slots, `side_keys²` of them, can be counted in a u32.
pub(crate) fn slots_fit(side_keys: usize) -> Result<()> {
    positive(&[("side_keys", side_keys)])?;
    let limit = u64::from(u16::MAX);
    if side_keys as u64 > limit {
        return Err(Error::Exceeds { what: "side_keys", value: side_keys as u64, limit_name: "the limit", limit });
    }
    Ok(())
}

/// The sizes of the stage's checked arguments, and the core or, for product keys, the kept scores in its place.
pub(crate) struct Shape<'a, R: Runtime> {
    tokens: usize,
    heads: usize,
    top_m: usize,
    rank: usize,
    cores: usize,
    additive: bool,
    pub core: &'a Tensor<R>,
}

impl<'a, R: Runtime> Shape<'a, R> {
    pub fn check(client: &ComputeClient<R>, kept: &'a Kept<R>, pair_score: &PairScore<'a, R>) -> Result<Self> {
        let [tokens, heads, 2, top_m, rank] = *kept.scores.shape().as_slice() else {
            let (found, expected) = (kept.scores.shape().to_vec(), "[tokens, heads, 2, top_m, rank]");
            return Err(Error::Dimensions { tensor: "kept scores", found, expected });
        };
        check(client, &kept.scores, "kept scores", &[tokens, heads, 2, top_m, rank], f32_storage())?;
        check(client, &kept.keys, "kept keys", &[tokens, heads, 2, top_m], u32_storage())?;
        let (cores, core) = match *pair_score {
            PairScore::Tucker(core) => (core.shape().first().copied().unwrap_or(0), core),
            PairScore::Additive => (1, &kept.scores),
        };
        if let PairScore::Tucker(core) = pair_score {
            check(client, core, "core", &[cores, heads, rank, rank], f32_storage())?;
        } else if rank != 1 {
            let (found, expected) = (kept.scores.shape().to_vec(), vec![tokens, heads, 2, top_m, 1]);
            return Err(Error::Shape { tensor: "kept scores", found, expected });
        }
        positive(&[("heads", heads), ("top_m", top_m), ("rank", rank), ("cores", cores)])?;
        let additive = matches!(pair_score, PairScore::Additive);
        Ok(Self { tokens, heads, top_m, rank, cores, additive, core })
    }

    /// The plan of a cube of one row and one unit.
    pub fn plan(&self, side_keys: usize) -> CombinePlan {
        let Self { heads, top_m, rank, cores, additive, .. } = *self;
        let vectors = if additive { listed_vectors(top_m) } else { top_m * top_m.div_ceil(FOUR) };
        CombinePlan { heads, side_keys, top_m, rank, cores, vectors, additive, stored: true, tile: 1, units: 1 }
    }

    /// Room for the result.
    pub fn chosen(&self, client: &ComputeClient<R>) -> Result<Chosen<R>> {
        let Self { tokens, heads, top_m, cores, .. } = *self;
        Ok(Chosen {
            slots: empty(client, "slots", &[tokens, heads, top_m], u32_storage())?,
            scores: empty(client, "scores", &[tokens, heads, top_m, cores], f32_storage())?,
        })
    }
}

/// Rows and units of a cube: the largest tile whose working set fits, with the grid in shared memory if it can be there, and, on
/// planes of a CPU, if each row still has a unit of its own; more units for one row where they would go through too many iterations.
fn tiled(device: &Device, plan: CombinePlan, rows: usize) -> CombinePlan {
    let tile_of = |stored, tile: usize| {
        let lanes = (device.units_for(tile, usize::MAX) / tile).max(1);
        CombinePlan { stored, tile, units: tile * lanes, ..plan }
    };
    let tiles = [16, 8, 4, 2, 1].into_iter().filter(|&tile| tile <= device.tile.min(rows.next_power_of_two()));
    let fits = |plan: &CombinePlan| shared_bytes(plan) <= device.shared_bytes && fits_loops(plan.loops());
    let stored = tiles.clone().map(|tile| tile_of(true, tile)).find(fits);
    let anew = tiles.map(|tile| tile_of(false, tile)).find(fits);
    let crowded = |plan: &CombinePlan| device.on_cpu && plan.units > plan.tile;
    let most = CombinePlan { stored: false, tile: 1, units: device.most_units(), ..plan };
    let doubled = |units: &usize| (*units < most.units).then_some(2 * units);
    let widened = core::iter::successors(Some(device.plane_size.min(most.units)), doubled);
    stored
        .filter(|plan| !crowded(plan))
        .or(anew.filter(|plan| !crowded(plan)))
        .or(stored)
        .or(anew)
        .or_else(|| widened.map(|units| CombinePlan { units, ..most }).find(fits))
        .unwrap_or(most)
}

/// Shared memory of a cube: both sides, what is kept, the lists of product keys, the grid and the selection's scratch.
pub(crate) fn shared_bytes(plan: &CombinePlan) -> usize {
    let CombinePlan { top_m, rank, vectors, tile, units, .. } = *plan;
    let sides = if plan.additive { 3 * top_m + vectors } else { rank * (top_m + top_m.next_multiple_of(FOUR)) };
    let grid = if plan.stored { FOUR * vectors } else { 0 };
    let sums = if plan.additive { units } else { 0 };
    4 * (tile * (sides + 2 * top_m + grid) + sums + FOUR) + scratch_bytes(tile, units / tile)
}
