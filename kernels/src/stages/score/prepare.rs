//! Keys made ready for scoring, once per change of the weights:
//!
//! - `normalised[h, s, i, ρ, d] = K̂[h, s, i, d, ρ]`, the keys normalised over `key_dim`, each ρ's vector contiguous;
//! - `projected[h, s, d, i] = Σ_ρ w_s[h, ρ] · K̂[h, s, i, d, ρ]` with `w_0 = u`, `w_1 = v`: the approximate score of a key is one dot
//!   product with it. Keys run innermost, zero-padded to whole groups, so that neighbouring units read neighbouring keys.
//!
//! Both are rounded to the keys' type; for matrix units they are written line by line as well: the projected keys of a side, then the normalised
//! ones, padded alike. Reads the keys three times (twice for RMSNorm) and writes all forms.

use cubecl::prelude::*;

use crate::stages::norm::{Norm, moments};

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct PreparePlan {
    pub heads: usize,
    pub side_keys: usize,
    /// `side_keys` rounded up to whole groups.
    pub padded: usize,
    pub key_dim: usize,
    pub rank: usize,
    /// None takes the keys as they are.
    pub norm: Option<Norm>,
    /// Lines of a side for matrix units: `padded`, and as many for each rank whose scores are not the approximate ones; 0 where none are written.
    pub lines: usize,
}

/// One unit prepares one key of one side of one head.
#[cube(launch_unchecked)]
pub(crate) fn prepare_kernel<E: Float>(
    keys: &Array<E>,
    weight: &Array<f32>,
    core_u: &Array<f32>,
    core_v: &Array<f32>,
    normalised: &mut Array<E>,
    projected: &mut Array<E>,
    lines: &mut Array<E>,
    eps: f32,
    #[comptime] plan: PreparePlan,
    #[define(E)] _dtype: StorageType,
) {
    let side = ABSOLUTE_POS / plan.padded;
    let key = ABSOLUTE_POS % plan.padded;
    if side >= comptime!(plan.heads * 2) {
        terminate!();
    }
    let columns = side * plan.key_dim * plan.padded + key;
    let line = (side * plan.lines + key) * plan.key_dim;
    let of_rank = (side * plan.lines + plan.padded + key * plan.rank) * plan.key_dim;
    if key < plan.side_keys {
        let first = (side * plan.side_keys + key) * plan.key_dim * plan.rank;
        let mut means = Array::<f32>::new(plan.rank);
        let mut scales = Array::<f32>::new(plan.rank);
        for rho in 0..plan.rank {
            means[rho] = 0.0;
            scales[rho] = 1.0;
            if comptime!(plan.norm.is_some()) {
                let norm = comptime!(plan.norm.unwrap_or(Norm::Rms));
                let of_key = moments::<E>(keys, first + rho, eps, plan.key_dim, plan.rank, norm);
                means[rho] = of_key.mean;
                scales[rho] = of_key.scale;
            }
        }
        for d in 0..plan.key_dim {
            let mut sum = 0.0f32;
            for rho in 0..plan.rank {
                let mut value = (f32::cast_from(keys[first + d * plan.rank + rho]) - means[rho]) * scales[rho];
                if comptime!(plan.norm.is_some()) {
                    value *= weight[d];
                }
                normalised[first + rho * plan.key_dim + d] = E::cast_from(value);
                if comptime!(plan.lines > plan.padded) {
                    lines[of_rank + rho * plan.key_dim + d] = E::cast_from(value);
                }
                let core = side / 2 * plan.rank + rho;
                let mut factor = core_u[core];
                if side % 2 == 1 {
                    factor = core_v[core];
                }
                sum += factor * value;
            }
            projected[columns + d * plan.padded] = E::cast_from(sum);
            if comptime!(plan.lines > 0) {
                lines[line + d] = E::cast_from(sum);
            }
        }
    } else {
        for d in 0..plan.key_dim {
            projected[columns + d * plan.padded] = E::cast_from(0.0f32);
            if comptime!(plan.lines > 0) {
                lines[line + d] = E::cast_from(0.0f32);
            }
            if comptime!(plan.lines > plan.padded) {
                for rho in 0..plan.rank {
                    lines[of_rank + rho * plan.key_dim + d] = E::cast_from(0.0f32);
                }
            }
        }
    }
}
