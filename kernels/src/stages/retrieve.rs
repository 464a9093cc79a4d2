//! Score and combine together: which slots a token reads, from its queries.
//!
//! Where the keys of a side are split over cubes, one cube per token and head then selects among the scores of both sides and chooses among the
//! pairs at once, all its planes sharing the work: two launches for both stages, for the few tokens whose time is that of their launches. Reads
//! `2 · side_keys` approximate scores and `2 · top_m · rank` normalised keys per token and head, and writes what each stage writes.

use cubecl::prelude::*;

use crate::Result;
use crate::launch::device::Device;
use crate::launch::plan::{Launch, Planned};
use crate::launch::tensor::{Parts, Tensor, arg, f32_storage, u32_storage};
use crate::select::select_lane;
use crate::stages::combine::{self, Chosen, CombinePlan, CombineSizes, HeadRow, PairScore, choose_pairs};
use crate::stages::score::{
    Kept, Place, PreparedKeys, Queries, ScoreCall, ScorePlan, ScorePlans, ScoreSizes, ScoreStrategy, SplitPlans,
    padded, select_keys, write_keys,
};

/// Launches [`score`](crate::stages::score::score()), then [`combine`](crate::stages::combine::combine()); as one kernel what follows a split of the keys, where
/// there are no more tokens than keep the device busy so ([`RetrievePlans`]).
///
/// # Errors
/// As those two.
pub fn retrieve<R: Runtime>(
    client: &ComputeClient<R>,
    queries: &Queries<'_, R>,
    keys: &PreparedKeys<R>,
    top_m: usize,
    strategy: ScoreStrategy,
    pair_score: &PairScore<'_, R>,
) -> Result<(Kept<R>, Chosen<R>)> {
    let stage = ScoreCall::check(client, queries, keys, top_m, strategy)?;
    let ScoreSizes { tokens, heads, side_keys, rank, .. } = stage.sizes;
    let sizes = combine::sizes_of(client, [tokens, heads, top_m, rank], side_keys, pair_score)?;
    match RetrievePlans::with(&stage.device, stage.plans, tokens, &sizes)? {
        RetrievePlans::Together { score, retrieve } => {
            let work = Work::empty(&stage)?;
            stage.launch_approximate(score, &work.approximate, 0, tokens)?;
            let chosen = launch(&stage, &work, &sizes, retrieve, pair_score)?;
            Ok((work.kept, chosen))
        }
        RetrievePlans::Apart { combine, .. } => {
            let kept = stage.run()?;
            let chosen = combine::launch(client, &kept, &sizes, combine, pair_score)?;
            Ok((kept, chosen))
        }
    }
}

/// What is fixed when the kernel is compiled: both sides of one head as two rows, then their pairs as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RetrievePlan {
    /// Of the merge.
    pub score: ScorePlan,
    /// Of the choice among the pairs.
    pub combine: CombinePlan,
}

impl RetrievePlan {
    /// The plan whose working set fits, with the order keys of scores and pairs in shared memory if they can be there, and no plane can select.
    fn of(device: &Device, score: &ScorePlan, tokens: usize, sizes: &CombineSizes) -> Result<Option<Planned<Self>>> {
        let units = device.units(usize::MAX);
        let score = ScorePlan { tile: 2, units, ..*score };
        let combine = CombinePlan::of_row(device, sizes, units)?;
        let plan = |(scores, pairs)| {
            let (score, combine) = (ScorePlan { stored: scores, ..score }, CombinePlan { stored: pairs, ..combine });
            Self { score, combine }.selecting(tokens)
        };
        let whole = device.exchange == 0;
        let stored = [(whole, whole), (whole, false), (false, false)].map(plan);
        Ok(stored.into_iter().find(|planned| planned.launch.fits(device)))
    }

    /// The launch for so many tokens.
    fn selecting(self, tokens: usize) -> Planned<Self> {
        let launch = Launch {
            kernel: "retrieve_kernel",
            cubes: tokens.saturating_mul(self.score.heads),
            units: self.score.units,
            shared_bytes: self.shared_bytes(),
            loops: self.loops(),
        };
        Planned { plan: self, launch }
    }

    /// Shared memory of a cube: both stages', and the score vectors between them.
    fn shared_bytes(&self) -> usize {
        let ScorePlan { tile, top_m, rank, .. } = self.score;
        self.score.select_bytes() + 4 * tile * top_m * rank + self.combine.shared_bytes()
    }

    fn loops(&self) -> usize {
        let ScorePlan { tile, units, top_m, rank, .. } = self.score;
        self.combine.loops().saturating_add(self.score.select_loops() + (top_m * rank).div_ceil(units / tile))
    }
}

/// The launches of scoring and combining for so many tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetrievePlans {
    /// Split keys are scored, and what follows is one kernel.
    Together {
        /// Writes the approximate scores.
        score: Planned<ScorePlan>,
        /// Selects among them, and chooses among the pairs.
        retrieve: Planned<RetrievePlan>,
    },
    /// Each stage by itself.
    Apart {
        /// Scores the keys.
        score: ScorePlans,
        /// Chooses among the pairs.
        combine: Planned<CombinePlan>,
    },
}

impl RetrievePlans {
    /// Plans [`retrieve`]; both stages have the same tokens, heads, keys and rank.
    ///
    /// # Errors
    /// As the plans of both stages.
    pub fn of(device: &Device, score: &ScoreSizes, strategy: ScoreStrategy, combine: &CombineSizes) -> Result<Self> {
        Self::with(device, ScorePlans::of(device, score, strategy)?, score.tokens, combine)
    }

    /// The same where scoring is planned. In one launch less what follows split keys, for so few tokens that a launch counts.
    fn with(device: &Device, score: ScorePlans, tokens: usize, combine: &CombineSizes) -> Result<Self> {
        let few = tokens > 0 && tokens.saturating_mul(combine.heads) <= device.busy_cubes && !device.on_cpu;
        if let ScorePlans::Split(SplitPlans { approximate, chunk, .. }) = score
            && few
            && chunk == tokens
            && let Some(retrieve) = RetrievePlan::of(device, &approximate.plan, tokens, combine)?
        {
            return Ok(Self::Together { score: approximate, retrieve });
        }
        Ok(Self::Apart { score, combine: CombinePlan::of(device, combine)? })
    }

    /// How keys are scored.
    fn score(&self) -> &ScorePlan {
        match self {
            Self::Together { score, .. } => &score.plan,
            Self::Apart { score: ScorePlans::Whole(score), .. } => &score.plan,
            Self::Apart { score: ScorePlans::Split(split), .. } => &split.approximate.plan,
            Self::Apart { score: ScorePlans::Filtered(filtered), .. } => &filtered.plan.score,
        }
    }

    /// Tokens that share one reading of the keys.
    pub fn tile(&self) -> usize {
        self.score().tile
    }

    /// Projected keys of a side that are read; on matrix units all lines, the normalised keys among them, and where these filter the projected ones
    /// again.
    pub fn keys_read(&self) -> usize {
        let score = self.score();
        match self {
            Self::Apart { score: ScorePlans::Filtered(_), .. } => score.pitch() + padded(score.side_keys),
            _ if score.matrix => score.pitch(),
            _ => score.side_keys,
        }
    }

    /// Whether matrix units score all ranks of all keys.
    pub fn on_matrix_units(&self) -> bool {
        self.score().matrix
    }

    /// Chunks of tokens, each with launches of its own.
    pub fn chunks(&self) -> usize {
        match self {
            Self::Apart { score: ScorePlans::Split(split), .. } => split.tokens.div_ceil(split.chunk.max(1)),
            _ => 1,
        }
    }

    /// Numbers of the approximate scores that are in memory at once, and of those of all tokens; none where keys are not split.
    pub fn approximate_numbers(&self, tokens: usize) -> [usize; 2] {
        let score = self.score();
        let all = tokens.saturating_mul(score.heads * 2).saturating_mul(score.pitch());
        match self {
            Self::Together { .. } => [all; 2],
            Self::Apart { score: ScorePlans::Whole(_) | ScorePlans::Filtered(_), .. } => [0; 2],
            Self::Apart { score: ScorePlans::Split(split), .. } => [split.numbers(), all],
        }
    }

    /// The launches in their order.
    pub fn launches(&self) -> Vec<Launch> {
        match self {
            Self::Together { score, retrieve } => vec![score.launch, retrieve.launch],
            Self::Apart { score, combine } => [score.launches(), vec![combine.launch]].concat(),
        }
    }
}

/// What the two launches hand on, and what they keep, in one buffer: the second would bind more arrays than WebGPU allows.
struct Work<R: Runtime> {
    words: Tensor<R>,
    starts: [usize; 3],
    approximate: Tensor<R>,
    kept: Kept<R>,
}

impl<R: Runtime> Work<R> {
    fn empty(stage: &ScoreCall<'_, R>) -> Result<Self> {
        let (numbers, kept) = ([stage.plans.approximate_numbers()], stage.kept_shape());
        let parts = [(&numbers[..], f32_storage()), (&kept[..4], u32_storage()), (&kept, f32_storage())];
        let Parts { words, starts, tensors } = Parts::empty(stage.client, "scores and kept keys", parts)?;
        let [approximate, keys, scores] = tensors;
        Ok(Self { words, starts, approximate, kept: Kept { keys, scores } })
    }
}

fn launch<R: Runtime>(
    stage: &ScoreCall<'_, R>,
    work: &Work<R>,
    sizes: &CombineSizes,
    planned: Planned<RetrievePlan>,
    pair_score: &PairScore<'_, R>,
) -> Result<Chosen<R>> {
    let (client, Planned { plan, launch }) = (stage.client, planned);
    let chosen = combine::room(client, sizes)?;
    let (grid, cube_dim) = launch.start(&stage.device)?;
    let width = plan.score.width;
    let [_, kept_keys, kept_scores] = work.starts.map(|start| start as u32);
    // SAFETY: both stages have checked every shape; a cube reads and writes what belongs to its token and head only. What it keeps,
    // which it writes, can't stand for the core that product keys don't have: the norm's weight does.
    unsafe {
        retrieve_kernel::launch_unchecked::<R>(
            client,
            grid,
            cube_dim,
            width,
            arg(stage.query, width),
            arg(stage.query_norm, width),
            arg(&work.words, 1),
            arg(&stage.keys.normalised, width),
            arg(pair_score.core_or(stage.query_norm), 1),
            arg(&chosen.slots, 1),
            arg(&chosen.scores, 1),
            stage.eps,
            sizes.tokens as u32,
            kept_keys,
            kept_scores,
            launch.cubes as u32,
            plan,
            stage.keys.normalised.dtype,
        );
    }
    Ok(chosen)
}

/// `work` holds the approximate scores, and room for the kept keys and scores from `kept_keys` and `kept_scores` on; scores as bits.
/// `CUBE_POS` is `token · heads + head`.
#[cube(launch_unchecked)]
fn retrieve_kernel<E: Float, D: Size>(
    query: &Array<Vector<f32, D>>,
    query_norm: &Array<Vector<f32, D>>,
    work: &mut Array<u32>,
    normalised: &Array<Vector<E, D>>,
    core: &Array<f32>,
    slots: &mut Array<u32>,
    scores: &mut Array<f32>,
    eps: f32,
    tokens: u32,
    kept_keys: u32,
    kept_scores: u32,
    cubes: u32,
    #[comptime] plan: RetrievePlan,
    #[define(E)] _dtype: StorageType,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let head = CUBE_POS % plan.score.heads;
    let side = select_lane(comptime!(plan.score.select()));
    let token = CUBE_POS / plan.score.heads;
    let place = Place { token, side: head * 2 + side.row, first: 0usize.runtime(), end: tokens as usize };
    let size = comptime!(plan.score.top_m * plan.score.rank);
    let mut vectors = SharedMemory::<f32>::new(comptime!(plan.score.tile * size));
    let keys = select_keys::<E, D>(
        query,
        query_norm,
        &work.slice(0, kept_keys as usize),
        normalised,
        &mut vectors.to_slice_mut(),
        side.row * size,
        place,
        side,
        eps,
        comptime!(plan.score),
    );
    write_keys(
        &keys,
        &mut work.slice_mut(kept_keys as usize, kept_scores as usize),
        place,
        side,
        comptime!(plan.score),
    );
    // A cube's place is a row of its own, below the last.
    for i in range_stepped(side.lane, size, side.lanes) {
        let score = vectors[side.row * size + i];
        work[kept_scores as usize + (CUBE_POS * 2 + side.row) * size + i] = u32::reinterpret(score);
    }
    let row = HeadRow { source: 0usize.runtime(), out: CUBE_POS, rows: cubes as usize, head };
    let at = select_lane(comptime!(plan.combine.select()));
    let (keys, vectors) = (keys.to_slice(), vectors.to_slice());
    choose_pairs(&keys, &vectors, core, slots, scores, row, at, comptime!(plan.combine));
}
