//! Score: which keys of each side a token keeps, and their score vectors (DESIGN §2.2; the paper's TDQKR, section 3.2).
//!
//! Shapes: query `[tokens, query_pairs, 2, key_dim]` as [`query`](crate::stages::query::query) makes it, before its norm; result
//! `keys` `[tokens, heads, 2, top_m]` in ascending order of the key, `scores` `[tokens, heads, 2, top_m, rank]`.
//!
//! Two strategies. At prefill sizes one cube holds a tile of tokens against all keys of a side ([`ScoreStrategy::Whole`]). For a
//! few tokens, or more keys than shared memory holds, the keys are split over cubes and a second launch merges what the
//! splits keep ([`ScoreStrategy::Split`]).

mod backward;
mod backward_plan;
mod forward;
mod matrix;
mod plan;
mod prepare;

use cubecl::prelude::*;

pub use self::backward::{ScoreGradients, Scored, score_backward};
pub use self::backward_plan::ScoreBackwardPlans;
pub(crate) use self::forward::{Place, merge, write_keys};
use self::forward::{merge_kernel, score_kernel};
use self::matrix::score_matrix_kernel;
use self::plan::shared_bytes;
pub use self::plan::{ScorePlan, ScorePlans, ScoreSizes};
use self::prepare::{PreparePlan, prepare_kernel};
use crate::launch::device::Device;
use crate::launch::loops::check_loops;
use crate::launch::plan::Planned;
use crate::launch::tensor::{
    Tensor, arg, check, empty, f32_storage, float_type, from_f32, positive, tokens_of, u32_storage,
};
use crate::select::{FOUR, SelectPlan};
use crate::stages::norm::Norm;
use crate::{Error, Result};

/// Keys of a layer in the two forms that scoring reads, both in the type of the keys: queries are rounded to it too, so that products of
/// halves are what matrix units compute (DESIGN §2, half precision).
pub struct PreparedKeys<R: Runtime> {
    /// `[heads, 2, side_keys, rank, key_dim]`.
    pub normalised: Tensor<R>,
    /// `[heads, 2, key_dim, padded]`, `padded` being `side_keys` rounded up to a multiple of 16.
    pub projected: Tensor<R>,
    /// The same `[heads, 2, padded, key_dim]`, where matrix units read it.
    by_key: Option<Tensor<R>>,
    /// Whether the approximate score of a key is its score: rank 1 with a factor of one, as product keys have it.
    direct: bool,
}

impl<R: Runtime> Clone for PreparedKeys<R> {
    fn clone(&self) -> Self {
        let Self { normalised, projected, by_key, direct } = self;
        Self { normalised: normalised.clone(), projected: projected.clone(), by_key: by_key.clone(), direct: *direct }
    }
}

/// What a token keeps of each side.
pub struct Kept<R: Runtime> {
    /// u32 `[tokens, heads, 2, top_m]`, ascending along the last dimension.
    pub keys: Tensor<R>,
    /// f32 `[tokens, heads, 2, top_m, rank]`.
    pub scores: Tensor<R>,
}

impl<R: Runtime> Clone for Kept<R> {
    fn clone(&self) -> Self {
        Self { keys: self.keys.clone(), scores: self.scores.clone() }
    }
}

/// How a vector is normalised: the norm, its epsilon and its weight f32 `[key_dim]`.
pub type Normalisation<'a, R> = (Norm, f32, &'a Tensor<R>);

/// The queries that keys are scored with.
pub struct Queries<'a, R: Runtime> {
    /// f32 `[tokens, query_pairs, 2, key_dim]`, before the norm (any shape of as many numbers, tokens first).
    pub numbers: &'a Tensor<R>,
    /// None takes the queries as they are.
    pub norm: Option<Normalisation<'a, R>>,
    /// Head h uses pair `h / heads_per_pair`.
    pub heads_per_pair: usize,
}

impl<R: Runtime> Clone for Queries<'_, R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<R: Runtime> Copy for Queries<'_, R> {}

impl<R: Runtime> Queries<'_, R> {
    /// Checks the shapes, and returns tokens and query pairs. The pairs must be those of `heads` heads, or more.
    fn check(&self, client: &ComputeClient<R>, heads: usize, key_dim: usize) -> Result<(usize, usize)> {
        positive(&[("heads of a query pair", self.heads_per_pair)])?;
        let (tokens, needed) = (tokens_of(self.numbers, "query")?, heads.div_ceil(self.heads_per_pair));
        let per_token = self.numbers.shape()[1..].iter().product::<usize>();
        if !per_token.is_multiple_of(2 * key_dim) || per_token / (2 * key_dim) < needed {
            let (found, expected) = (self.numbers.shape().to_vec(), vec![tokens, needed, 2, key_dim]);
            return Err(Error::Shape { tensor: "query", found, expected });
        }
        check(client, self.numbers, "query", &self.numbers.shape().to_vec(), f32_storage())?;
        if let Some((_, _, weight)) = self.norm {
            check(client, weight, "query_norm", &[key_dim], f32_storage())?;
        }
        Ok((tokens, per_token / (2 * key_dim)))
    }
}

/// How keys are normalised and projected.
pub struct KeyFactors<'a, R: Runtime> {
    /// None takes the keys as they are.
    pub norm: Option<Normalisation<'a, R>>,
    /// `u` and `v`, f32 `[heads, rank]`; None for product keys, whose rank is 1.
    pub vectors: Option<(&'a Tensor<R>, &'a Tensor<R>)>,
}

/// Makes keys ready for scoring. Once per change of the weights, not per call.
///
/// - `keys` `[heads, 2, side_keys, key_dim, rank]`, f32, f16 or bf16
///
/// # Errors
/// Shapes, types or sizes that don't fit; nothing is launched then.
pub fn prepare_keys<R: Runtime>(
    client: &ComputeClient<R>,
    keys: &Tensor<R>,
    factors: &KeyFactors<'_, R>,
) -> Result<PreparedKeys<R>> {
    let device = Device::of(client);
    let [heads, 2, side_keys, key_dim, rank] = *keys.shape().as_slice() else {
        let (found, expected) = (keys.shape().to_vec(), "[heads, 2, side_keys, key_dim, rank]");
        return Err(Error::Dimensions { tensor: "keys", found, expected });
    };
    let dtype = float_type(client, keys, "keys")?;
    positive(&[("heads", heads), ("side_keys", side_keys), ("key_dim", key_dim), ("rank", rank)])?;
    check(client, keys, "keys", &[heads, 2, side_keys, key_dim, rank], keys.dtype)?;
    let (u, v) = match factors.vectors {
        Some((u, v)) => (u.clone(), v.clone()),
        None => {
            let ones = from_f32(client, &[heads, rank], &vec![1.0; heads * rank])?;
            (ones.clone(), ones)
        }
    };
    let (u, v) = (&u, &v);
    check(client, u, "core_u", &[heads, rank], f32_storage())?;
    check(client, v, "core_v", &[heads, rank], f32_storage())?;
    if let Some((_, _, weight)) = factors.norm {
        check(client, weight, "keys_norm", &[key_dim], f32_storage())?;
    }
    let padded = padded(side_keys);
    let normalised = empty(client, "normalised keys", &[heads, 2, side_keys, rank, key_dim], keys.dtype)?;
    let projected = empty(client, "projected keys", &[heads, 2, key_dim, padded], keys.dtype)?;
    let (norm, eps, weight) = match factors.norm {
        Some((norm, eps, weight)) => (Some(norm), eps, weight),
        None => (None, 0.0, u),
    };
    let twice = device.multiplies(dtype) && key_dim.is_multiple_of(GROUP);
    let by_key = match twice {
        true => empty(client, BY_KEY, &[heads, 2, padded, key_dim], keys.dtype)?,
        // Nobody writes or reads it.
        false => from_f32(client, &[1], &[0.0])?,
    };
    let plan = PreparePlan { heads, side_keys, padded, key_dim, rank, norm, by_key: twice };
    check_loops("prepare_kernel", key_dim + rank * (1 + 3 * key_dim))?;
    let units = device.units(usize::MAX);
    // SAFETY: shapes are checked; a unit writes its own key's numbers only, units past the last side leave at once.
    unsafe {
        prepare_kernel::launch_unchecked::<R>(
            client,
            device.grid((heads * 2 * padded).div_ceil(units))?,
            CubeDim::new_1d(units as u32),
            arg(keys, 1),
            arg(weight, 1),
            arg(u, 1),
            arg(v, 1),
            arg(&normalised, 1),
            arg(&projected, 1),
            arg(&by_key, 1),
            eps,
            plan,
            keys.dtype,
        );
    }
    Ok(PreparedKeys {
        normalised,
        projected,
        by_key: twice.then_some(by_key),
        direct: factors.vectors.is_none() && rank == 1,
    })
}

/// Keys of a side, filled up to whole groups of a matrix unit.
pub(crate) fn padded(side_keys: usize) -> usize {
    side_keys.next_multiple_of(GROUP)
}

const BY_KEY: &str = "projected keys by key";
/// Keys that a matrix unit takes at a time.
const GROUP: usize = 16;

/// How the keys of a side are shared out among cubes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScoreStrategy {
    /// A cube holds a tile of tokens against all keys of a side: one launch.
    Whole,
    /// The keys of a side are cut into `splits` ranges, one a cube; a second launch merges. Keeps the whole device busy on a
    /// few tokens, and takes any number of keys.
    Split {
        /// Ranges per side, at least 2.
        splits: usize,
    },
}

impl ScoreStrategy {
    /// Splits where whole sides would leave most of the device idle or would not fit its shared memory.
    pub fn choose<R: Runtime>(client: &ComputeClient<R>, sizes: &ScoreSizes) -> Self {
        let device = Device::of(client);
        let [heads, side_keys, top_m] = [sizes.heads, sizes.side_keys, sizes.top_m].map(|size| size.min(MOST));
        let sizes = ScoreSizes { heads, side_keys, top_m, key_dim: sizes.key_dim.min(MOST), ..*sizes };
        let tile = sizes.matrix_tile(&device).unwrap_or(1);
        let sides = sizes.tokens.div_ceil(tile).saturating_mul(heads * 2).max(1);
        let wanted = (device.busy_cubes / sides).min(side_keys / (2 * top_m).max(MIN_RANGE));
        let fitting = (1..=side_keys).find(|&splits| {
            let range = side_keys.div_ceil(splits).next_multiple_of(FOUR);
            let select = SelectPlan::new(1, device.units(range), top_m.min(range), device.exchange);
            shared_bytes(range, sizes.key_dim, &select) <= device.shared_bytes
        });
        // Matrix units hold no more than a tile of a range.
        match wanted.max(if tile > 1 { 1 } else { fitting.unwrap_or(1) }) {
            0 | 1 => Self::Whole,
            splits => Self::Split { splits },
        }
    }
}

/// More than any layer has: larger sizes count as this one.
const MOST: usize = 1 << 20;
/// Fewer keys than this are not worth a cube of their own.
const MIN_RANGE: usize = 128;

/// Launches the stage.
///
/// - returns [`Kept`]: the `top_m` keys of each side with the largest approximate score, equal scores by smaller key; of no tokens, no keys
///
/// # Errors
/// Shapes, types or sizes that don't fit; nothing is launched then.
pub fn score<R: Runtime>(
    client: &ComputeClient<R>,
    queries: &Queries<'_, R>,
    keys: &PreparedKeys<R>,
    top_m: usize,
    strategy: ScoreStrategy,
) -> Result<Kept<R>> {
    ScoreCall::check(client, queries, keys, top_m, strategy)?.run()
}

/// The checked arguments.
pub(crate) struct ScoreCall<'a, R: Runtime> {
    pub client: &'a ComputeClient<R>,
    pub device: Device,
    pub query: &'a Tensor<R>,
    /// Read where queries are normalised alone.
    pub query_norm: &'a Tensor<R>,
    pub eps: f32,
    pub keys: &'a PreparedKeys<R>,
    pub sizes: ScoreSizes,
    pub plans: ScorePlans,
}

impl<'a, R: Runtime> ScoreCall<'a, R> {
    pub fn check(
        client: &'a ComputeClient<R>,
        queries: &Queries<'a, R>,
        keys: &'a PreparedKeys<R>,
        top_m: usize,
        strategy: ScoreStrategy,
    ) -> Result<Self> {
        let device = Device::of(client);
        let [heads, 2, side_keys, rank, key_dim] = *keys.normalised.shape().as_slice() else {
            let (found, expected) = (keys.normalised.shape().to_vec(), "[heads, 2, side_keys, rank, key_dim]");
            return Err(Error::Dimensions { tensor: "normalised keys", found, expected });
        };
        positive(&[("key_dim", key_dim)])?;
        let (tokens, query_pairs) = queries.check(client, heads, key_dim)?;
        let dtype = float_type(client, &keys.normalised, "normalised keys")?;
        let stored = dtype.storage();
        check(client, &keys.normalised, "normalised keys", &[heads, 2, side_keys, rank, key_dim], stored)?;
        check(client, &keys.projected, "projected keys", &[heads, 2, key_dim, padded(side_keys)], stored)?;
        if let Some(by_key) = &keys.by_key {
            check(client, by_key, BY_KEY, &[heads, 2, padded(side_keys), key_dim], stored)?;
        }
        let heads_per_pair = queries.heads_per_pair;
        let (norm, direct) = (queries.norm.map(|(norm, ..)| norm), keys.direct);
        let sizes = ScoreSizes {
            tokens,
            heads,
            query_pairs,
            heads_per_pair,
            side_keys,
            key_dim,
            rank,
            top_m,
            norm,
            direct,
            dtype,
        };
        let plans = ScorePlans::of(&device, &sizes, strategy)?;
        let (_, eps, query_norm) = queries.norm.unwrap_or((Norm::Rms, 0.0, queries.numbers));
        Ok(Self { client, device, query: queries.numbers, query_norm, eps, keys, sizes, plans })
    }

    /// The stage in one launch, or in two where it is split.
    pub fn run(&self) -> Result<Kept<R>> {
        let kept = self.kept()?;
        match self.plans.merge {
            _ if self.sizes.tokens == 0 => {}
            Some(merge) => self.launch_merge(merge, &self.candidates()?, &kept)?,
            None => self.launch_score(&kept)?,
        }
        Ok(kept)
    }

    /// What each split keeps: keys and approximate scores.
    fn candidates(&self) -> Result<Kept<R>> {
        let shape = self.candidates_shape();
        let candidates = Kept {
            keys: empty(self.client, "candidate keys", &shape, u32_storage())?,
            scores: empty(self.client, "candidate scores", &shape, f32_storage())?,
        };
        self.launch_score(&candidates)?;
        Ok(candidates)
    }

    /// Of the keys and of the scores that the splits keep.
    pub fn candidates_shape(&self) -> [usize; 4] {
        [self.sizes.tokens, self.sizes.heads, 2, self.plans.candidates()]
    }

    /// Of the result's scores; its keys have all but the last.
    pub fn kept_shape(&self) -> [usize; 5] {
        [self.sizes.tokens, self.sizes.heads, 2, self.sizes.top_m, self.sizes.rank]
    }

    /// Room for the result.
    pub fn kept(&self) -> Result<Kept<R>> {
        let shape = self.kept_shape();
        Ok(Kept {
            keys: empty(self.client, "kept keys", &shape[..4], u32_storage())?,
            scores: empty(self.client, "kept scores", &shape, f32_storage())?,
        })
    }

    /// The first launch: the result, or what each split keeps.
    pub fn launch_score(&self, kept: &Kept<R>) -> Result<()> {
        let Planned { plan, launch } = self.plans.score;
        let (grid, cube_dim) = launch.start(&self.device)?;
        if let (true, Some(by_key)) = (plan.matrix, &self.keys.by_key) {
            // SAFETY: as below; a group of keys begins where whole groups are left.
            unsafe {
                score_matrix_kernel::launch_unchecked::<R>(
                    self.client,
                    grid,
                    cube_dim,
                    arg(self.query, FOUR),
                    arg(self.query_norm, FOUR),
                    arg(by_key, 2 * FOUR),
                    arg(&self.keys.normalised, 2 * FOUR),
                    arg(&kept.keys, 1),
                    arg(&kept.scores, 1),
                    self.eps,
                    self.sizes.tokens as u32,
                    launch.cubes as u32,
                    plan,
                    self.keys.normalised.dtype,
                );
            }
            return Ok(());
        }
        // SAFETY: `check` has seen every shape; keys stay below `side_keys` and tokens below `tokens`.
        unsafe {
            score_kernel::launch_unchecked::<R>(
                self.client,
                grid,
                cube_dim,
                plan.width,
                arg(self.query, plan.width),
                arg(self.query_norm, plan.width),
                arg(&self.keys.projected, FOUR),
                arg(&self.keys.normalised, plan.width),
                arg(&kept.keys, 1),
                arg(&kept.scores, 1),
                self.eps,
                self.sizes.tokens as u32,
                launch.cubes as u32,
                plan,
                self.keys.normalised.dtype,
            );
        }
        Ok(())
    }

    /// The second launch, of a split stage.
    fn launch_merge(&self, merge: Planned<ScorePlan>, candidates: &Kept<R>, kept: &Kept<R>) -> Result<()> {
        let Planned { plan, launch } = merge;
        let (grid, cube_dim) = launch.start(&self.device)?;
        // SAFETY: `check` has seen every shape; keys stay below `side_keys` and tokens below `tokens`.
        unsafe {
            merge_kernel::launch_unchecked::<R>(
                self.client,
                grid,
                cube_dim,
                plan.width,
                arg(self.query, plan.width),
                arg(self.query_norm, plan.width),
                arg(&candidates.keys, 1),
                arg(&candidates.scores, 1),
                arg(&self.keys.normalised, plan.width),
                arg(&kept.keys, 1),
                arg(&kept.scores, 1),
                self.eps,
                self.sizes.tokens as u32,
                launch.cubes as u32,
                plan,
                self.keys.normalised.dtype,
            );
        }
        Ok(())
    }
}
