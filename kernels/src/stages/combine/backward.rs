//! Backward of combine: from the scores of the chosen slots to the score vectors of their two keys, and to the Tucker core.
//!
//! - `grad_sides[t, h, m, 0, ρ] = Σ_k g_k Σ_σ C_k[ρ, σ] · S_col[σ]`, `grad_sides[t, h, m, 1, σ] = Σ_k g_k Σ_ρ S_row[ρ] · C_k[ρ, σ]` with `g_k` the
//!   gradient of the slot's score k: slot by slot, so a kept key that no slot uses has no part in anything that follows;
//! - `grad_core[k, h, ρ, σ] = Σ_{t, m} g_k · S_row[ρ] · S_col[σ]`, in parts of a few tokens, then added up;
//! - additive pairs: the softmax, `g · s - s · Σ g · s` over the head's slots, for both sides alike.
//!
//! A unit takes one slot. It finds the slot's keys among the kept ones, which are in ascending order, by bisection.

use cubecl::prelude::*;

use super::backward_plan::{CombineBackwardPlan, CombineBackwardPlans, CorePlans, CoreShares};
use super::{Chosen, CombineSizes, PairScore, check_kept};
use crate::Result;
use crate::launch::device::Device;
use crate::launch::tensor::{Tensor, arg, check, empty, f32_storage, u32_storage, zeros};
use crate::linear::column_sum::column_sum;
use crate::stages::score::Kept;

/// Gradients of the stage.
pub struct CombineGradients<R: Runtime> {
    /// f32 `[tokens, heads, top_m, 2, rank]`: of the score vectors of each slot's row key and column key.
    pub sides: Tensor<R>,
    /// f32 `[cores, heads, rank, rank]`; None for additive pairs.
    pub core: Option<Tensor<R>>,
}

/// Launches the backward pass of [`combine`](super::combine), for what it was given and what it gave.
///
/// - `grad_scores` f32 `[tokens, heads, top_m, cores]`; no tokens give a core's gradient of zeros
///
/// # Errors
/// Shapes, types or sizes that don't fit; nothing is launched then.
pub fn combine_backward<R: Runtime>(
    client: &ComputeClient<R>,
    kept: &Kept<R>,
    side_keys: usize,
    pair_score: &PairScore<'_, R>,
    chosen: &Chosen<R>,
    grad_scores: &Tensor<R>,
) -> Result<CombineGradients<R>> {
    let device = Device::of(client);
    let sizes = check_kept(client, kept, side_keys, pair_score)?;
    let CombineSizes { tokens, heads, top_m, rank, cores, additive, .. } = sizes;
    check(client, &chosen.slots, "slots", &[tokens, heads, top_m], u32_storage())?;
    check(client, &chosen.scores, "scores", &[tokens, heads, top_m, cores], f32_storage())?;
    check(client, grad_scores, "gradient of the scores", &[tokens, heads, top_m, cores], f32_storage())?;
    let entries = tokens * heads * top_m;
    let plans = CombineBackwardPlans::of(&device, &sizes)?;
    let plan = plans.plan;
    let sides = empty(client, "gradient of the side scores", &[tokens, heads, top_m, 2, rank], f32_storage())?;
    if entries == 0 {
        let zeros = || zeros(client, "gradient of the core", &[cores, heads, rank, rank]);
        return Ok(CombineGradients { sides, core: (!additive).then(zeros).transpose()? });
    }
    let places = empty(client, "places", &[tokens, heads, top_m], u32_storage())?;
    let (grid, cube_dim) = plans.sides.start(&device)?;
    // SAFETY: shapes are checked; bisection stays within the kept keys of a unit's own token whatever the slot is.
    unsafe {
        grad_sides_kernel::launch_unchecked::<R>(
            client,
            grid,
            cube_dim,
            arg(&chosen.slots, 1),
            arg(grad_scores, 1),
            arg(&kept.keys, 1),
            arg(&kept.scores, 1),
            arg(pair_score.core_or(&chosen.scores), 1),
            arg(&sides, 1),
            arg(&places, 1),
            entries as u32,
            plan,
        );
    }
    let Some(CorePlans { shares: CoreShares { share, shares }, parts: launch, .. }) = plans.core else {
        return Ok(CombineGradients { sides, core: None });
    };
    let parts = empty(client, "parts of the core's gradient", &[shares, cores * heads * rank * rank], f32_storage())?;
    let (grid, cube_dim) = launch.start(&device)?;
    // SAFETY: shapes are checked; places are those of the launch above.
    unsafe {
        grad_core_kernel::launch_unchecked::<R>(
            client,
            grid,
            cube_dim,
            arg(&places, 1),
            arg(grad_scores, 1),
            arg(&kept.scores, 1),
            arg(&parts, 1),
            tokens as u32,
            share as u32,
            plan,
        );
    }
    let sum = column_sum(client, &parts)?;
    Ok(CombineGradients { sides, core: Some(sum.reshaped(vec![cores, heads, rank, rank])) })
}

/// `grad_sides` `[tokens, heads, top_m, 2, rank]`, and `places` `[tokens, heads, top_m]`: where each slot's keys are among the kept ones,
/// `row place · top_m + column place`. `through` is the core, and for additive pairs, which have none, the slots' scores: one array, for a
/// browser binds eight.
#[cube(launch_unchecked)]
pub(crate) fn grad_sides_kernel(
    slots: &Array<u32>,
    grad_scores: &Array<f32>,
    kept_keys: &Array<u32>,
    kept_scores: &Array<f32>,
    through: &Array<f32>,
    grad_sides: &mut Array<f32>,
    places: &mut Array<u32>,
    entries: u32,
    #[comptime] plan: CombineBackwardPlan,
) {
    let item = CUBE_POS * plan.units + UNIT_POS as usize;
    if item >= entries as usize {
        terminate!();
    }
    let row = item / plan.top_m;
    let slot = slots[item];
    let own = row * comptime!(2 * plan.top_m);
    let of_row = place_of(kept_keys, own, slot / comptime!(plan.side_keys as u32), plan.top_m);
    let of_column = place_of(kept_keys, own + plan.top_m, slot % comptime!(plan.side_keys as u32), plan.top_m);
    places[item] = (of_row * plan.top_m + of_column) as u32;
    if plan.additive {
        let first = row * plan.top_m;
        let mut mean = 0.0f32;
        for other in first..first + plan.top_m {
            mean += through[other] * grad_scores[other];
        }
        let grad = through[item] * (grad_scores[item] - mean);
        grad_sides[item * 2] = grad;
        grad_sides[item * 2 + 1] = grad;
    } else {
        let a = (own + of_row) * plan.rank;
        let b = (own + plan.top_m + of_column) * plan.rank;
        for rho in 0..plan.rank {
            let mut to_row = 0.0f32;
            let mut to_column = 0.0f32;
            for k in 0..plan.cores {
                let of_core = (k * plan.heads + row % plan.heads) * comptime!(plan.rank * plan.rank);
                let mut through_row = 0.0f32;
                let mut through_column = 0.0f32;
                for sigma in 0..plan.rank {
                    through_row += through[of_core + rho * plan.rank + sigma] * kept_scores[b + sigma];
                    through_column += through[of_core + sigma * plan.rank + rho] * kept_scores[a + sigma];
                }
                let grad = grad_scores[item * plan.cores + k];
                to_row += grad * through_row;
                to_column += grad * through_column;
            }
            grad_sides[item * comptime!(2 * plan.rank) + rho] = to_row;
            grad_sides[item * comptime!(2 * plan.rank) + plan.rank + rho] = to_column;
        }
    }
}

/// Where `key` is among the `count` ascending keys from `first` on.
#[cube]
fn place_of(keys: &Array<u32>, first: usize, key: u32, #[comptime] count: usize) -> usize {
    let mut low = 0usize.runtime();
    let mut high = comptime!(count - 1).runtime();
    while low < high {
        let middle = (low + high) / 2;
        if keys[first + middle] < key {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
}

/// Parts of the core's gradient, `[parts, cores, heads, rank, rank]`, each of `share` tokens.
#[cube(launch_unchecked)]
pub(crate) fn grad_core_kernel(
    places: &Array<u32>,
    grad_scores: &Array<f32>,
    kept_scores: &Array<f32>,
    parts: &mut Array<f32>,
    tokens: u32,
    share: u32,
    #[comptime] plan: CombineBackwardPlan,
) {
    let area = comptime!(plan.rank * plan.rank);
    let numbers = comptime!(plan.cores * plan.heads * area);
    let item = CUBE_POS * plan.units + UNIT_POS as usize;
    if item >= parts.len() {
        terminate!();
    }
    let k = item % numbers / comptime!(plan.heads * area);
    let head = item / area % plan.heads;
    let rho = item / plan.rank % plan.rank;
    let sigma = item % plan.rank;
    let first = item / numbers * share as usize;
    let mut sum = 0.0f32;
    for token in first..min(first + share as usize, tokens as usize) {
        let row = token * plan.heads + head;
        let mut of_token = 0.0f32;
        for m in 0..plan.top_m {
            let place = places[row * plan.top_m + m] as usize;
            let a = row * comptime!(2 * plan.top_m) + place / plan.top_m;
            let b = row * comptime!(2 * plan.top_m) + plan.top_m + place % plan.top_m;
            let grad = grad_scores[(row * plan.top_m + m) * plan.cores + k];
            of_token += grad * kept_scores[a * plan.rank + rho] * kept_scores[b * plan.rank + sigma];
        }
        sum += of_token;
    }
    parts[item] = sum;
}
