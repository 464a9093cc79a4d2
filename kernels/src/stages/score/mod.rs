//! Score: which keys of each side a token keeps, and their score vectors (DESIGN §2.2; the paper's TDQKR, section 3.2).
//!
//! Shapes: query `[tokens, query_pairs, 2, key_dim]` as [`query`](crate::stages::query::query) makes it, before its norm; result
//! `keys` `[tokens, heads, 2, top_m]` in ascending order of the key, `scores` `[tokens, heads, 2, top_m, rank]`.
//!
//! Three strategies. One cube holds a tile of tokens against all keys of a side, and selects ([`ScoreStrategy::Whole`]); for many tokens on matrix
//! units, too, where it lists only what reaches a bound ([`ScoreStrategy::Filtered`]). For fewer tokens on matrix units, for very few on any device,
//! or with more keys than shared memory holds, the keys are split over cubes, which write the approximate scores, and a second launch selects
//! ([`ScoreStrategy::Split`]); of many tokens chunk by chunk, so that what lies between the two stays in a cache.

mod backward;
mod backward_plan;
mod filter;
mod filter_plan;
mod forward;
mod matrix;
mod plan;
mod plans;
mod prepare;

use cubecl::prelude::*;

pub use self::backward::{ScoreGradients, Scored, score_backward};
pub use self::backward_plan::ScoreBackwardPlans;
use self::filter::filter_keys_kernel;
pub use self::filter_plan::FilterPlan;
pub(crate) use self::forward::{Place, select_keys, write_keys};
use self::forward::{approximate_kernel, score_kernel, select_keys_kernel};
use self::matrix::approximate_matrix_kernel;
use self::plan::{MATRIX_KEYS, range_of, shared_bytes};
pub use self::plan::{ScorePlan, ScoreSizes};
pub use self::plans::{ScorePlans, SplitPlans};
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
    /// Where matrix units read them: both `[heads, 2, lines, key_dim]`, the `padded` projected keys, then `padded · rank` normalised ones if their
    /// scores are not the same.
    lines: Option<Tensor<R>>,
    /// Whether the approximate score of a key is its score: rank 1 with a factor of one, as product keys have it.
    direct: bool,
}

impl<R: Runtime> Clone for PreparedKeys<R> {
    fn clone(&self) -> Self {
        let Self { normalised, projected, lines, direct } = self;
        Self { normalised: normalised.clone(), projected: projected.clone(), lines: lines.clone(), direct: *direct }
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
    let direct = factors.vectors.is_none() && rank == 1;
    let twice = device.multiplies(dtype) && key_dim.is_multiple_of(GROUP);
    let of_side = if twice { lines_of(side_keys, rank, direct) } else { 0 };
    let lines = match twice {
        true => empty(client, LINES, &[heads, 2, of_side, key_dim], keys.dtype)?,
        // Nobody writes or reads it.
        false => from_f32(client, &[1], &[0.0])?,
    };
    let plan = PreparePlan { heads, side_keys, padded, key_dim, rank, norm, lines: of_side };
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
            arg(&lines, 1),
            eps,
            plan,
            keys.dtype,
        );
    }
    Ok(PreparedKeys { normalised, projected, lines: twice.then_some(lines), direct })
}

/// Keys of a side, filled up to whole groups of a matrix unit.
pub(crate) fn padded(side_keys: usize) -> usize {
    side_keys.next_multiple_of(GROUP)
}

/// Lines of a side that matrix units multiply: its projected keys, and its normalised ones where their scores are not the same.
pub(crate) fn lines_of(side_keys: usize, rank: usize, direct: bool) -> usize {
    padded(side_keys) * if direct { 1 } else { 1 + rank }
}

const LINES: &str = "keys line by line";
/// Keys that a matrix unit takes at a time.
const GROUP: usize = 16;

/// How the keys of a side are shared out among cubes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScoreStrategy {
    /// A cube holds a tile of tokens against all keys of a side: one launch.
    Whole,
    /// The keys of a side are cut into `splits` ranges, one a cube, which writes their approximate scores; a second launch selects. On matrix
    /// units; keeps the whole device busy on a few tokens, and takes any number of keys.
    Split {
        /// Ranges per side.
        splits: usize,
    },
    /// On matrix units a cube holds a tile of tokens against all keys of a side, without a score in memory but those of what it keeps: one launch.
    /// Where that does not fit, as one range a side.
    Filtered,
}

impl ScoreStrategy {
    /// Filters on matrix units where there are tokens for half of the device. Splits on matrix units else, and where whole sides would leave most of the
    /// device idle or would not fit its shared memory.
    pub fn choose<R: Runtime>(client: &ComputeClient<R>, sizes: &ScoreSizes) -> Self {
        let device = Device::of(client);
        let [heads, side_keys, top_m] = [sizes.heads, sizes.side_keys, sizes.top_m].map(|size| size.min(MOST));
        let sizes = ScoreSizes { heads, side_keys, top_m, key_dim: sizes.key_dim.min(MOST), ..*sizes };
        if FilterPlan::of(&device, &sizes).is_some_and(|it| it.is_worth_it(&device)) {
            return Self::Filtered;
        }
        if let Some(sides) = sizes.matrix_sides(&device) {
            let lines = lines_of(side_keys, sizes.rank.min(MOST), sizes.direct);
            let splits = (device.busy_cubes / sides.max(1)).min(lines.div_ceil(MATRIX_KEYS)).max(1);
            return Self::Split { splits };
        }
        let wanted = (device.busy_cubes / sizes.tokens.saturating_mul(heads * 2).max(1)).min(side_keys / MIN_RANGE);
        let fitting = (1..=side_keys).find(|&splits| {
            let range = range_of(side_keys, splits);
            let select = SelectPlan::new(1, device.units(range), top_m.min(range), device.exchange);
            shared_bytes(range, sizes.key_dim, &select) <= device.shared_bytes
        });
        match wanted.max(fitting.unwrap_or(1)) {
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
        if let Some(lines) = &keys.lines {
            check(client, lines, LINES, &[heads, 2, lines_of(side_keys, rank, keys.direct), key_dim], stored)?;
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

    /// The stage in one launch, or in two for each chunk of tokens where it is split.
    pub fn run(&self) -> Result<Kept<R>> {
        let kept = self.kept()?;
        match self.plans {
            _ if self.sizes.tokens == 0 => {}
            ScorePlans::Whole(whole) => self.launch_whole(whole, &kept)?,
            ScorePlans::Filtered(filtered) => self.launch_filtered(filtered, &kept)?,
            ScorePlans::Split(split) => {
                let approximate = empty(self.client, APPROXIMATE, &[split.numbers()], f32_storage())?;
                for (first, end, [scores, select]) in split.chunks() {
                    self.launch_approximate(scores, &approximate, first, end)?;
                    self.launch_select(select, &approximate, &kept, first, end)?;
                }
            }
        }
        Ok(kept)
    }

    /// Of the result's scores; its keys have all but the last.
    pub fn kept_shape(&self) -> [usize; 5] {
        [self.sizes.tokens, self.sizes.heads, 2, self.sizes.top_m, self.sizes.rank]
    }

    /// Room for the result.
    fn kept(&self) -> Result<Kept<R>> {
        let shape = self.kept_shape();
        Ok(Kept {
            keys: empty(self.client, "kept keys", &shape[..4], u32_storage())?,
            scores: empty(self.client, "kept scores", &shape, f32_storage())?,
        })
    }

    fn launch_whole(&self, planned: Planned<ScorePlan>, kept: &Kept<R>) -> Result<()> {
        let Planned { plan, launch } = planned;
        let (grid, cube_dim) = launch.start(&self.device)?;
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

    fn launch_filtered(&self, planned: Planned<FilterPlan>, kept: &Kept<R>) -> Result<()> {
        let Planned { plan, launch } = planned;
        let (grid, cube_dim) = launch.start(&self.device)?;
        // Keys are prepared line by line wherever matrix units multiply them.
        let lines = self.keys.lines.as_ref().unwrap_or(&self.keys.normalised);
        // SAFETY: as above; a side's keys are filled up to whole groups.
        unsafe {
            filter_keys_kernel::launch_unchecked::<R>(
                self.client,
                grid,
                cube_dim,
                plan.width(),
                arg(self.query, FOUR),
                arg(self.query_norm, FOUR),
                arg(lines, 2 * FOUR),
                arg(&kept.keys, 1),
                arg(&kept.scores, plan.width()),
                self.eps,
                self.sizes.tokens as u32,
                launch.cubes as u32,
                plan,
                self.keys.normalised.dtype,
            );
        }
        Ok(())
    }

    /// Of a split stage: writes the approximate scores of tokens from `first` to `end`.
    pub fn launch_approximate(
        &self,
        planned: Planned<ScorePlan>,
        scores: &Tensor<R>,
        first: usize,
        end: usize,
    ) -> Result<()> {
        let Planned { plan, launch } = planned;
        let (grid, cube_dim) = launch.start(&self.device)?;
        if let (true, Some(lines)) = (plan.matrix, &self.keys.lines) {
            // SAFETY: as below; a side's keys are filled up to whole groups.
            unsafe {
                approximate_matrix_kernel::launch_unchecked::<R>(
                    self.client,
                    grid,
                    cube_dim,
                    arg(self.query, FOUR),
                    arg(self.query_norm, FOUR),
                    arg(lines, 2 * FOUR),
                    arg(scores, 2),
                    self.eps,
                    first as u32,
                    end as u32,
                    plan.range as u32,
                    plan.splits as u32,
                    launch.cubes as u32,
                    plan.of_any_range(),
                    self.keys.normalised.dtype,
                );
            }
            return Ok(());
        }
        // SAFETY: `check` has seen every shape; keys stay below `side_keys` and tokens below `end`; a chunk has room for its scores.
        unsafe {
            approximate_kernel::launch_unchecked::<R>(
                self.client,
                grid,
                cube_dim,
                plan.width,
                arg(self.query, plan.width),
                arg(self.query_norm, plan.width),
                arg(&self.keys.projected, FOUR),
                arg(scores, 1),
                self.eps,
                first as u32,
                end as u32,
                launch.cubes as u32,
                plan,
                self.keys.normalised.dtype,
            );
        }
        Ok(())
    }

    /// Of a split stage: selects among the approximate scores of tokens from `first` to `end`.
    fn launch_select(
        &self,
        planned: Planned<ScorePlan>,
        approximate: &Tensor<R>,
        kept: &Kept<R>,
        first: usize,
        end: usize,
    ) -> Result<()> {
        let Planned { plan, launch } = planned;
        let (grid, cube_dim) = launch.start(&self.device)?;
        // SAFETY: `check` has seen every shape; keys stay below `side_keys` and tokens below `end`.
        unsafe {
            select_keys_kernel::launch_unchecked::<R>(
                self.client,
                grid,
                cube_dim,
                plan.width,
                arg(self.query, plan.width),
                arg(self.query_norm, plan.width),
                arg(approximate, 1),
                arg(&self.keys.normalised, plan.width),
                arg(&kept.keys, 1),
                arg(&kept.scores, 1),
                self.eps,
                first as u32,
                end as u32,
                launch.cubes as u32,
                plan,
                self.keys.normalised.dtype,
            );
        }
        Ok(())
    }
}

const APPROXIMATE: &str = "approximate scores";
