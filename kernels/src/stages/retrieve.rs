//! Score and combine together: which slots a token reads, from its queries.
//!
//! Where the keys of a side are split over cubes, what the splits keep is a short list. One cube per token and head then merges the
//! lists of both sides and chooses among the pairs at once: two launches for both stages, for the few tokens whose time is
//! that of their launches. Reads the candidates and `2 · top_m · rank` normalised keys per token and head, and writes what each stage
//! writes.

use cubecl::prelude::*;

use crate::Result;
use crate::launch::device::Device;
use crate::launch::plan::{Launch, Planned};
use crate::launch::tensor::{Parts, Tensor, arg, f32_storage, u32_storage};
use crate::select::select_lane;
use crate::stages::combine::{self, Chosen, CombinePlan, CombineSizes, HeadRow, PairScore, choose_pairs};
use crate::stages::score::{
    Kept, Place, PreparedKeys, Queries, ScoreCall, ScorePlan, ScorePlans, ScoreSizes, ScoreStrategy, merge, padded,
    write_keys,
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
        RetrievePlans::Together { retrieve, .. } => {
            let work = Work::empty(&stage)?;
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
    /// The plan whose working set fits, with the grid of pairs in shared memory if it can be there.
    fn of(device: &Device, score: &ScorePlan, tokens: usize, sizes: &CombineSizes) -> Result<Option<Planned<Self>>> {
        let units = device.units(usize::MAX);
        let score = ScorePlan { tile: 2, units, matrix: false, ..*score };
        let combine = CombinePlan::of_row(device, sizes, units)?;
        let plan = |stored| Self { score, combine: CombinePlan { stored, ..combine } }.merging(tokens);
        Ok([device.exchange == 0, false].map(plan).into_iter().find(|planned| planned.launch.fits(device)))
    }

    /// The launch for so many tokens.
    fn merging(self, tokens: usize) -> Planned<Self> {
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
        self.score.merge_bytes() + 4 * tile * top_m * rank + self.combine.shared_bytes()
    }

    fn loops(&self) -> usize {
        let ScorePlan { tile, units, top_m, rank, .. } = self.score;
        self.combine.loops().saturating_add(self.score.merge_loops() + (top_m * rank).div_ceil(units / tile))
    }
}

/// The launches of scoring and combining for so many tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetrievePlans {
    /// Split keys are scored, and what follows is one kernel.
    Together {
        /// Scores the keys.
        score: Planned<ScorePlan>,
        /// Merges what the splits keep, and chooses among the pairs.
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
        let few = tokens > 0 && tokens.saturating_mul(combine.heads) <= device.busy_cubes;
        if score.merge.is_some()
            && few
            && !device.on_cpu
            && let Some(retrieve) = RetrievePlan::of(device, &score.score.plan, tokens, combine)?
        {
            return Ok(Self::Together { score: score.score, retrieve });
        }
        Ok(Self::Apart { score, combine: CombinePlan::of(device, combine)? })
    }

    /// How keys are scored.
    fn score(&self) -> &ScorePlan {
        match self {
            Self::Together { score, .. } => &score.plan,
            Self::Apart { score, .. } => &score.score.plan,
        }
    }

    /// Tokens that share one reading of the keys.
    pub fn tile(&self) -> usize {
        self.score().tile
    }

    /// Projected keys of a side that are read: matrix units fill up the last group.
    pub fn keys_read(&self) -> usize {
        let ScorePlan { matrix, side_keys, .. } = *self.score();
        if matrix { padded(side_keys) } else { side_keys }
    }

    /// Whether all keys are scored on matrix units, and what is kept of them is taken from there.
    pub fn on_matrix_units(&self) -> bool {
        matches!(self, Self::Apart { score, .. } if score.score.plan.matrix && score.merge.is_none())
    }

    /// Candidates per token and side that the scores of split keys leave; 0 where keys are not split.
    pub fn candidates(&self) -> usize {
        match self {
            Self::Together { score, .. } => score.plan.listed(),
            Self::Apart { score, .. } => score.candidates(),
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

/// What the two launches hand on, in one buffer: the second would bind more arrays than WebGPU allows.
struct Work<R: Runtime> {
    words: Tensor<R>,
    starts: [usize; 4],
    candidates: Kept<R>,
    kept: Kept<R>,
}

impl<R: Runtime> Work<R> {
    fn empty(stage: &ScoreCall<'_, R>) -> Result<Self> {
        let (candidates, kept) = (stage.candidates_shape(), stage.kept_shape());
        let (keys, scores) = (u32_storage(), f32_storage());
        let parts = [(&candidates[..], keys), (&candidates, scores), (&kept[..4], keys), (&kept, scores)];
        let Parts { words, starts, tensors } = Parts::empty(stage.client, "candidates and kept keys", parts)?;
        let [candidate_keys, candidate_scores, keys, scores] = tensors;
        let candidates = Kept { keys: candidate_keys, scores: candidate_scores };
        Ok(Self { words, starts, candidates, kept: Kept { keys, scores } })
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
    stage.launch_score(&work.candidates)?;
    let (grid, cube_dim) = launch.start(&stage.device)?;
    let width = plan.score.width;
    let [_, candidate_scores, kept_keys, kept_scores] = work.starts.map(|start| start as u32);
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
            candidate_scores,
            kept_keys,
            kept_scores,
            launch.cubes as u32,
            plan,
            stage.keys.normalised.dtype,
        );
    }
    Ok(chosen)
}

/// `work` holds candidate keys, their scores from `candidate_scores` on, and room for the kept keys and scores from `kept_keys` and
/// `kept_scores` on; scores as bits. `CUBE_POS` is `token · heads + head`.
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
    candidate_scores: u32,
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
    let side = select_lane(comptime!(plan.score.select_merged()));
    let place = Place { token: CUBE_POS / plan.score.heads, side: head * 2 + side.row, tokens: tokens as usize };
    let size = comptime!(plan.score.top_m * plan.score.rank);
    let mut vectors = SharedMemory::<f32>::new(comptime!(plan.score.tile * size));
    let keys = merge::<E, D>(
        query,
        query_norm,
        &work.slice(0, candidate_scores as usize),
        &work.slice(candidate_scores as usize, kept_keys as usize),
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
