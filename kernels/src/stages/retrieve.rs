//! Score and combine together: which slots a token reads, from its queries.
//!
//! Where the keys of a side are split over cubes, what the splits keep is a short list. One cube per token and head then merges the
//! lists of both sides and chooses among the pairs at once: two launches for both stages, for the few tokens whose time is
//! that of their launches. Reads the candidates and `2 · top_m · rank` normalised keys per token and head, and writes what each stage
//! writes.

use cubecl::prelude::*;

use crate::Result;
use crate::launch::loops::{check_loops, fits_loops};
use crate::launch::tensor::{Parts, Tensor, arg, f32_storage, u32_storage};
use crate::select::lane_of;
use crate::stages::combine::{self, Chosen, CombinePlan, HeadRow, PairScore, Shape, choose_pairs, combine, slots_fit};
use crate::stages::score::{
    Kept, Place, PreparedKeys, Queries, ScoreCall, ScorePlan, ScoreStrategy, merge, merge_bytes, write_keys,
};

/// Launches [`score`](crate::stages::score::score), then [`combine`](crate::stages::combine::combine); as one kernel what follows a split of the keys, where
/// there are no more tokens than keep the device busy so.
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
    if is_short(&stage) {
        let work = Work::empty(&stage)?;
        let shape = Shape::check(client, &work.kept, pair_score)?;
        slots_fit(stage.plan.side_keys)?;
        if let Some(plan) = plan(&stage, &shape) {
            let chosen = launch(&stage, &work, &shape, plan)?;
            return Ok((work.kept, chosen));
        }
    }
    let kept = stage.run()?;
    let chosen = combine(client, &kept, stage.plan.side_keys, pair_score)?;
    Ok((kept, chosen))
}

/// Whether [`retrieve`] with these arguments is one kernel after the split keys are scored.
///
/// # Errors
/// As [`retrieve`].
pub fn retrieves_at_once<R: Runtime>(
    client: &ComputeClient<R>,
    queries: &Queries<'_, R>,
    keys: &PreparedKeys<R>,
    top_m: usize,
    strategy: ScoreStrategy,
    pair_score: &PairScore<'_, R>,
) -> Result<bool> {
    let stage = ScoreCall::check(client, queries, keys, top_m, strategy)?;
    let kept = stage.kept()?;
    let shape = Shape::check(client, &kept, pair_score)?;
    Ok(is_short(&stage) && plan(&stage, &shape).is_some())
}

/// Whether the candidates are those of split keys and of so few tokens that one launch less counts.
fn is_short<R: Runtime>(stage: &ScoreCall<'_, R>) -> bool {
    let few = stage.tokens > 0 && stage.tokens * stage.plan.heads <= stage.device.busy_cubes;
    stage.plan.splits > 1 && few && !stage.device.on_cpu
}

/// What is fixed when the kernel is compiled: both sides of one head as two rows, then their pairs as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct RetrievePlan {
    score: ScorePlan,
    combine: CombinePlan,
}

impl RetrievePlan {
    /// Shared memory of a cube: both stages', and the score vectors between them.
    fn shared_bytes(&self) -> usize {
        let ScorePlan { tile, top_m, rank, .. } = self.score;
        merge_bytes(&self.score) + 4 * tile * top_m * rank + combine::shared_bytes(&self.combine)
    }

    /// Loop iterations of a unit, keys being read in vectors of `width`.
    fn loops(&self, width: usize) -> usize {
        let ScorePlan { tile, units, top_m, rank, .. } = self.score;
        self.score.merge_loops(width) + (top_m * rank).div_ceil(units / tile) + self.combine.loops()
    }
}

/// The plan whose working set fits, with the grid of pairs in shared memory if it can be there.
fn plan<R: Runtime>(stage: &ScoreCall<'_, R>, shape: &Shape<'_, R>) -> Option<RetrievePlan> {
    let units = stage.device.units(usize::MAX);
    let score = ScorePlan { tile: 2, units, ..stage.plan };
    let combine = CombinePlan { units, ..shape.plan(score.side_keys) };
    let fits = |plan: &RetrievePlan| {
        plan.shared_bytes() <= stage.device.shared_bytes && fits_loops(plan.loops(stage.depth_width()))
    };
    [true, false]
        .map(|stored| RetrievePlan { score, combine: CombinePlan { stored, ..combine } })
        .into_iter()
        .find(fits)
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
    shape: &Shape<'_, R>,
    plan: RetrievePlan,
) -> Result<Chosen<R>> {
    let (client, depth) = (stage.client, stage.depth_width());
    let cubes = stage.tokens * plan.score.heads;
    check_loops("retrieve_kernel", plan.loops(depth))?;
    let chosen = shape.chosen(client)?;
    stage.launch_score(&work.candidates)?;
    // The kernel writes what it keeps: that can't stand for the core that product keys don't have.
    let core = if plan.combine.additive { stage.query_norm } else { shape.core };
    let [_, candidate_scores, kept_keys, kept_scores] = work.starts.map(|start| start as u32);
    // SAFETY: both stages have checked every shape; a cube reads and writes what belongs to its token and head only.
    unsafe {
        retrieve_kernel::launch_unchecked::<R>(
            client,
            stage.device.grid(cubes)?,
            CubeDim::new_1d(plan.score.units as u32),
            depth,
            arg(stage.query, depth),
            arg(stage.query_norm, depth),
            arg(&work.words, 1),
            arg(&stage.keys.normalised, depth),
            arg(core, 1),
            arg(&chosen.slots, 1),
            arg(&chosen.scores, 1),
            stage.eps,
            stage.tokens as u32,
            candidate_scores,
            kept_keys,
            kept_scores,
            cubes as u32,
            plan,
        );
    }
    Ok(chosen)
}

/// `work` holds candidate keys, their scores from `candidate_scores` on, and room for the kept keys and scores from `kept_keys` and
/// `kept_scores` on; scores as bits. `CUBE_POS` is `token · heads + head`.
#[cube(launch_unchecked)]
fn retrieve_kernel<D: Size>(
    query: &Array<Vector<f32, D>>,
    query_norm: &Array<Vector<f32, D>>,
    work: &mut Array<u32>,
    normalised: &Array<Vector<f32, D>>,
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
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let head = CUBE_POS % plan.score.heads;
    let side = lane_of(plan.score.tile, plan.score.units);
    let place = Place { token: CUBE_POS / plan.score.heads, side: head * 2 + side.row, tokens: tokens as usize };
    let size = comptime!(plan.score.top_m * plan.score.rank);
    let mut vectors = SharedMemory::<f32>::new(comptime!(plan.score.tile * size));
    let keys = merge::<D>(
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
    let at = lane_of(plan.combine.tile, plan.combine.units);
    let (keys, vectors) = (keys.to_slice(), vectors.to_slice());
    choose_pairs(&keys, &vectors, core, slots, scores, row, at, comptime!(plan.combine));
}
