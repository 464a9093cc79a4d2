//! Combine: which pairs of kept keys a head reads, and with what scores (DESIGN §2.3; the paper's Tucker core, section 3.2, and
//! multi-core scoring, section 3.4).
//!
//! Shapes: kept keys `[tokens, heads, 2, top_m]` and scores `[tokens, heads, 2, top_m, rank]` as [`score`](crate::stages::score::score) makes
//! them; result `slots` `[tokens, heads, top_m]`, largest total first, equal totals by smaller slot, and `scores` `[tokens, heads, top_m,
//! cores]`.

mod backward;
mod backward_plan;
mod forward;
mod plan;

use cubecl::prelude::*;

pub use self::backward::{CombineGradients, combine_backward};
pub use self::backward_plan::{CombineBackwardPlans, CorePlans, CoreShares, core_shares};
use self::forward::combine_kernel;
pub(crate) use self::forward::{HeadRow, choose_pairs};
pub use self::plan::{CombinePlan, CombineSizes};
use crate::launch::device::Device;
use crate::launch::plan::Planned;
use crate::launch::tensor::{Tensor, arg, check, empty, f32_storage, u32_storage};
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

impl<R: Runtime> PairScore<'_, R> {
    /// The core as a kernel's argument; `stand_in` for product keys, of which the kernel reads none.
    pub(crate) fn core_or<'t>(&'t self, stand_in: &'t Tensor<R>) -> &'t Tensor<R> {
        if let Self::Tucker(core) = self { core } else { stand_in }
    }
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
    let sizes = check_kept(client, kept, side_keys, pair_score)?;
    let planned = CombinePlan::of(&Device::of(client), &sizes)?;
    launch(client, kept, &sizes, planned, pair_score)
}

/// The sizes of the stage, once kept keys and their pair score are checked.
fn check_kept<R: Runtime>(
    client: &ComputeClient<R>,
    kept: &Kept<R>,
    side_keys: usize,
    pair_score: &PairScore<'_, R>,
) -> Result<CombineSizes> {
    let [tokens, heads, 2, top_m, rank] = *kept.scores.shape().as_slice() else {
        let (found, expected) = (kept.scores.shape().to_vec(), "[tokens, heads, 2, top_m, rank]");
        return Err(Error::Dimensions { tensor: "kept scores", found, expected });
    };
    check(client, &kept.scores, "kept scores", &[tokens, heads, 2, top_m, rank], f32_storage())?;
    check(client, &kept.keys, "kept keys", &[tokens, heads, 2, top_m], u32_storage())?;
    sizes_of(client, [tokens, heads, top_m, rank], side_keys, pair_score)
}

/// The sizes of the stage, once `pair_score` is checked against those of the kept scores `[tokens, heads, 2, top_m, rank]`.
pub(crate) fn sizes_of<R: Runtime>(
    client: &ComputeClient<R>,
    [tokens, heads, top_m, rank]: [usize; 4],
    side_keys: usize,
    pair_score: &PairScore<'_, R>,
) -> Result<CombineSizes> {
    let (cores, additive) = match pair_score {
        PairScore::Tucker(core) => {
            let cores = core.shape().first().copied().unwrap_or(0);
            check(client, core, "core", &[cores, heads, rank, rank], f32_storage())?;
            (cores, false)
        }
        PairScore::Additive if rank == 1 => (1, true),
        PairScore::Additive => {
            let (found, expected) = (vec![tokens, heads, 2, top_m, rank], vec![tokens, heads, 2, top_m, 1]);
            return Err(Error::Shape { tensor: "kept scores", found, expected });
        }
    };
    let sizes = CombineSizes { tokens, heads, side_keys, top_m, rank, cores, additive };
    sizes.check().map(|()| sizes)
}

/// Launches what `planned` says, for kept keys and a pair score of checked `sizes`.
pub(crate) fn launch<R: Runtime>(
    client: &ComputeClient<R>,
    kept: &Kept<R>,
    sizes: &CombineSizes,
    planned: Planned<CombinePlan>,
    pair_score: &PairScore<'_, R>,
) -> Result<Chosen<R>> {
    let chosen = room(client, sizes)?;
    let Planned { plan, launch } = planned;
    if sizes.tokens == 0 {
        return Ok(chosen);
    }
    let core = pair_score.core_or(&kept.scores);
    let (grid, cube_dim) = launch.start(&Device::of(client))?;
    // SAFETY: shapes are checked; a cube reads and writes its own rows only.
    unsafe {
        combine_kernel::launch_unchecked::<R>(
            client,
            grid,
            cube_dim,
            arg(&kept.keys, 1),
            arg(&kept.scores, 1),
            arg(core, 1),
            arg(&chosen.slots, 1),
            arg(&chosen.scores, 1),
            (sizes.tokens * sizes.heads) as u32,
            plan,
        );
    }
    Ok(chosen)
}

/// Room for the result.
pub(crate) fn room<R: Runtime>(client: &ComputeClient<R>, sizes: &CombineSizes) -> Result<Chosen<R>> {
    let CombineSizes { tokens, heads, top_m, cores, .. } = *sizes;
    Ok(Chosen {
        slots: empty(client, "slots", &[tokens, heads, top_m], u32_storage())?,
        scores: empty(client, "scores", &[tokens, heads, top_m, cores], f32_storage())?,
    })
}
