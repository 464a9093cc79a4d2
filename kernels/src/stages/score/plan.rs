//! How the stage is launched, from sizes and a device alone: how the keys of a side are cut, tiles, units and shared memory.

use super::{FOUR, GROUP, ScoreStrategy};
use crate::launch::device::Device;
use crate::launch::loops::strided;
use crate::launch::plan::{Launch, Planned};
use crate::launch::tensor::{index, positive};
use crate::select::SelectPlan;
use crate::stages::norm::Norm;
use crate::{ElementType, Error, Result};

/// The sizes of the stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScoreSizes {
    /// Tokens; none is no launch.
    pub tokens: usize,
    /// Heads, each with keys of its own.
    pub heads: usize,
    /// Query pairs of a token.
    pub query_pairs: usize,
    /// Head h uses pair `h / heads_per_pair`.
    pub heads_per_pair: usize,
    /// Keys of a side.
    pub side_keys: usize,
    /// Width of a key.
    pub key_dim: usize,
    /// Width of a score vector.
    pub rank: usize,
    /// Keys of a side that are kept.
    pub top_m: usize,
    /// How queries are normalised; None takes them as they are.
    pub norm: Option<Norm>,
    /// Whether the approximate score of a key is its score: rank 1 with a factor of one, as product keys have it.
    pub direct: bool,
    /// Of the keys; queries are rounded to it.
    pub dtype: ElementType,
}

impl ScoreSizes {
    fn check(&self) -> Result<()> {
        self.check_keys()?;
        let Self { side_keys, top_m, .. } = *self;
        if top_m > side_keys {
            let (value, limit) = (top_m as u64, side_keys as u64);
            return Err(Error::Exceeds { what: "top_m", value, limit_name: "side_keys", limit });
        }
        Ok(())
    }

    /// Tokens of a tile that matrix units score, where they do.
    pub(super) fn matrix_tile(&self, device: &Device) -> Option<usize> {
        self.check().ok()?;
        let planned = ScorePlan::cut(device, self, ScoreStrategy::Whole).on_matrix_units(device, self);
        planned.map(|it| it.plan.tile)
    }

    /// What the backward pass, too, asks of them.
    pub(super) fn check_keys(&self) -> Result<()> {
        let Self { heads, side_keys, key_dim, rank, top_m, .. } = *self;
        positive(&[("heads", heads), ("side_keys", side_keys), ("key_dim", key_dim), ("rank", rank)])?;
        positive(&[("top_m", top_m), ("heads of a query pair", self.heads_per_pair)])?;
        let numbers = [heads, 2, side_keys, key_dim, rank].into_iter().fold(1, usize::saturating_mul);
        index("numbers of the keys", numbers).map(drop)
    }
}

/// What is fixed when the stage's kernels are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ScorePlan {
    /// Heads.
    pub heads: usize,
    /// Query pairs of a token.
    pub query_pairs: usize,
    /// Heads that share a query pair.
    pub heads_per_pair: usize,
    /// Keys of a side.
    pub side_keys: usize,
    /// Width of a key.
    pub key_dim: usize,
    /// Numbers of a load of queries and keys.
    pub width: usize,
    /// Width of a score vector.
    pub rank: usize,
    /// Keys of a side that are kept.
    pub top_m: usize,
    /// None takes the queries as they are.
    pub norm: Option<Norm>,
    /// Whether the approximate score is the score (product keys: rank 1, factor 1).
    pub direct: bool,
    /// Keys of a split, a multiple of four.
    pub range: usize,
    /// Ranges that a side is cut into.
    pub splits: usize,
    /// Candidates that a split hands on: `min(top_m, range)`.
    pub keep: usize,
    /// Whether a merge keeps its candidates' order keys in shared memory; else they are read where the splits left them.
    pub stored: bool,
    /// Tokens of a cube, which share one reading of its keys.
    pub tile: usize,
    /// Units of a cube.
    pub units: usize,
    /// Vectors of projected keys that a unit scores at a time.
    pub block: usize,
    /// Units of a plane that can select a row; 0 where none can.
    pub plane: usize,
    /// Whether matrix units score: a cube has eight planes for each 32 tokens then.
    pub matrix: bool,
}

impl ScorePlan {
    /// The keys of a side cut as `strategy` says, and a cube of one token and one unit.
    fn cut(device: &Device, sizes: &ScoreSizes, strategy: ScoreStrategy) -> Self {
        let ScoreSizes { heads, query_pairs, heads_per_pair, side_keys, key_dim, rank, top_m, norm, direct, .. } =
            *sizes;
        let splits = match strategy {
            ScoreStrategy::Whole => 1,
            ScoreStrategy::Split { splits } => splits.clamp(2, side_keys.max(2)),
        };
        let range = side_keys.div_ceil(splits).next_multiple_of(FOUR);
        Self {
            heads,
            query_pairs,
            heads_per_pair,
            side_keys,
            key_dim,
            width: device.width(4, &[key_dim]),
            rank,
            top_m,
            norm,
            direct,
            range,
            splits: side_keys.div_ceil(range),
            keep: top_m.min(range),
            stored: device.exchange == 0,
            tile: 1,
            units: 1,
            block: 1,
            plane: device.exchange,
            matrix: false,
        }
    }

    /// The same on matrix units, with the largest tile of tokens whose working set fits; None where they can't score, or a tile would have
    /// fewer tokens than half of it.
    fn on_matrix_units(self, device: &Device, sizes: &ScoreSizes) -> Option<Planned<Self>> {
        let fits = device.multiplies(sizes.dtype) && device.exchange == MATRIX_PLANE;
        let whole = self.key_dim.is_multiple_of(DEPTH) && self.width == FOUR && self.side_keys >= GROUP;
        let range = self.range.next_multiple_of(GROUP);
        let cut = Self { matrix: true, range, splits: self.side_keys.div_ceil(range), ..self };
        let with = |rows: usize| Self { tile: rows, units: rows / MATRIX_ROWS * MATRIX_PLANES * MATRIX_PLANE, ..cut };
        let tiles = [2 * MATRIX_ROWS, MATRIX_ROWS].into_iter().filter(|&rows| fits && whole && sizes.tokens > rows / 2);
        tiles
            .map(|rows| with(rows).scoring(sizes.tokens))
            .find(|it| it.launch.fits(device) && it.launch.units <= device.most_matrix_units())
    }

    /// How a range of keys is selected from.
    pub(crate) fn select(&self) -> SelectPlan {
        self.select_plan(self.keep)
    }

    /// How the candidates of all splits are.
    pub(crate) fn select_merged(&self) -> SelectPlan {
        self.select_plan(self.top_m)
    }

    fn select_plan(&self, keep: usize) -> SelectPlan {
        if self.matrix {
            let (rows, plane) = (self.tile, self.plane);
            return SelectPlan { rows, lanes: plane, keep, plane, free: MATRIX_FREE };
        }
        SelectPlan::new(self.tile, self.units / self.tile, keep, self.plane)
    }

    /// Candidates of a side that all splits hand on.
    pub(crate) fn listed(&self) -> usize {
        self.splits * self.keep
    }

    /// The launch that scores one range a cube.
    fn scoring(self, tokens: usize) -> Planned<Self> {
        let Self { heads, splits, key_dim, range, tile, units, .. } = self;
        let launch = Launch {
            kernel: if self.matrix { "score_matrix_kernel" } else { "score_kernel" },
            cubes: tokens.div_ceil(tile).saturating_mul(heads * 2 * splits),
            units,
            shared_bytes: if self.matrix { self.matrix_bytes() } else { shared_bytes(range, key_dim, &self.select()) },
            loops: if self.matrix { self.matrix_loops() } else { self.score_loops() },
        };
        Planned { plan: self, launch }
    }

    /// The launch that merges what the splits keep.
    fn merging(self, tokens: usize) -> Planned<Self> {
        let launch = Launch {
            kernel: "merge_kernel",
            cubes: tokens.div_ceil(self.tile).saturating_mul(self.heads * 2),
            units: self.units,
            shared_bytes: self.merge_bytes(),
            loops: self.merge_loops(),
        };
        Planned { plan: self, launch }
    }

    /// Loop iterations of a unit that scores one range.
    fn score_loops(&self) -> usize {
        let (lanes, vectors) = (self.units / self.tile, self.range / FOUR);
        let scores = strided(vectors, self.units * self.block) * (1 + self.key_dim / self.width);
        let kept = if self.splits == 1 && !self.direct { self.kept_loops() } else { 0 };
        self.norm_loops() + scores + self.select().loops(vectors) + strided(self.keep, lanes) + kept
    }

    /// Loop iterations of a unit that merges what the splits keep.
    pub(crate) fn merge_loops(&self) -> usize {
        let (lanes, vectors) = (self.units / self.tile, self.listed().div_ceil(FOUR));
        let load = if self.stored { strided(vectors, lanes) } else { 0 };
        let kept = if self.direct { 0 } else { self.kept_loops() };
        self.norm_loops() + load + self.select_merged().loops(vectors) + 2 * strided(self.top_m, lanes) + kept
    }

    /// Shared memory of a cube on matrix units: rounded queries, the scores of [`MATRIX_KEYS`] keys, each row filled up, and the selection's scratch.
    fn matrix_bytes(&self) -> usize {
        self.tile * (16 * query_pitch(self.key_dim) + 8 * SCORE_PITCH) + self.select().bytes()
    }

    /// Loop iterations of a unit of such a cube.
    fn matrix_loops(&self) -> usize {
        let (rows, tiles) = (self.tile / (self.units / self.plane), self.range.div_ceil(MATRIX_KEYS));
        let norm = 3 * strided(self.key_dim / self.width, self.plane);
        let select = self.select().loops(self.range / FOUR) + strided(self.keep, self.plane);
        let kept = if self.splits > 1 || self.direct { 0 } else { self.rank * (1 + tiles * (1 + 2 * rows)) };
        rows * (1 + norm + select) + tiles * (1 + rows) + kept + self.rank * strided(self.top_m, self.plane) * rows
    }

    fn norm_loops(&self) -> usize {
        let lanes = self.units / self.tile;
        5 * strided(self.key_dim / self.width, lanes) + 2 * lanes
    }

    fn kept_loops(&self) -> usize {
        strided(self.top_m, self.units / self.tile) * (1 + self.key_dim / self.width)
    }

    /// Shared memory of [`merge`](super::forward::merge): as [`shared_bytes`] for the candidates, where they are stored.
    pub(crate) fn merge_bytes(&self) -> usize {
        let candidates = if self.stored { self.listed() } else { 0 };
        shared_bytes(candidates, self.key_dim, &self.select_merged())
    }
}

/// The launches of the stage for so many tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScorePlans {
    /// Scores the keys: all there is, or of split keys the candidates.
    pub score: Planned<ScorePlan>,
    /// Merges the candidates of split keys.
    pub merge: Option<Planned<ScorePlan>>,
}

impl ScorePlans {
    /// Plans [`score`](super::score()) by `strategy`.
    ///
    /// # Errors
    /// Sizes that don't fit each other or the device.
    pub fn of(device: &Device, sizes: &ScoreSizes, strategy: ScoreStrategy) -> Result<Self> {
        sizes.check()?;
        let (cut, tokens) = (ScorePlan::cut(device, sizes, strategy), sizes.tokens);
        let by_units = || {
            tiled(device, tokens, cut.range, |tile, units| {
                let block = (cut.range / FOUR / units).clamp(1, device.block);
                ScorePlan { tile, units, block, ..cut }.scoring(tokens)
            })
        };
        let score = cut.on_matrix_units(device, sizes).map_or_else(by_units, Ok)?.checked(STAGE, device)?;
        if score.plan.splits == 1 {
            return Ok(Self { score, merge: None });
        }
        let with = |stored| {
            tiled(device, tokens, score.plan.listed(), |tile, units| {
                ScorePlan { tile, units, stored, matrix: false, ..score.plan }.merging(tokens)
            })
        };
        let merge = with(score.plan.stored).or_else(|_| with(false))?.checked(STAGE, device)?;
        Ok(Self { score, merge: Some(merge) })
    }

    /// Candidates per token and side that the first launch hands to the second; 0 where one launch does it all. Their keys and scores, 4
    /// bytes each, are the stage's only memory besides its result.
    pub fn candidates(&self) -> usize {
        self.merge.map_or(0, |merge| merge.plan.listed())
    }

    /// The launches in their order.
    pub fn launches(&self) -> Vec<Launch> {
        [Some(self.score), self.merge].into_iter().flatten().map(|planned| planned.launch).collect()
    }
}

const STAGE: &str = "score";

/// Tokens that eight planes select for.
const MATRIX_ROWS: usize = 32;
/// Planes that multiply, a group of keys each.
pub(super) const MATRIX_PLANES: usize = 8;
/// Keys of a tile.
pub(super) const MATRIX_KEYS: usize = MATRIX_PLANES * GROUP;
/// Pairs of scores from a row of a tile to the next, so that the rows of a matrix fall into different banks.
pub(super) const SCORE_PITCH: usize = MATRIX_KEYS / 2 + 4;
/// Numbers of the depth that a plane reads at a time.
const DEPTH: usize = 32;

/// Loads of eight numbers from a query in shared memory to the next, four more than a multiple of eight: two rows that are read together fall
/// into different banks.
pub(super) fn query_pitch(key_dim: usize) -> usize {
    (key_dim / 8 + 4) / 8 * 8 + 4
}

/// Units of a plane that multiplies.
const MATRIX_PLANE: usize = 32;
/// See [`SelectPlan`]: less than elsewhere, for a cube has many rows.
const MATRIX_FREE: usize = 6;

/// The plan of a cube that selects among `range` keys, with the largest tile of tokens that fits; more units for one token where they would
/// go through too many iterations. `plan` is that of a tile and units.
fn tiled(
    device: &Device,
    tokens: usize,
    range: usize,
    plan: impl Fn(usize, usize) -> Planned<ScorePlan>,
) -> Result<Planned<ScorePlan>> {
    let most = device.tile_of(tokens).min(device.units(range));
    let tiles = [16, 8, 4, 2, 1].into_iter().filter(|&tile| tile <= most);
    let tiles = tiles.map(|tile| plan(tile, device.units_for(tile, range)));
    let fewest = device.units_for(1, range);
    let widened = core::iter::successors(Some(2 * fewest), |units| Some(2 * units));
    let widened = widened.take_while(|&units| units <= device.most_units()).map(|units| plan(1, units));
    let fits = |planned: &Planned<ScorePlan>| planned.launch.fits(device);
    let planned = tiles.chain(widened).find(fits).unwrap_or_else(|| plan(1, fewest));
    device.fits_shared(STAGE, planned.launch.shared_bytes)?;
    Ok(planned)
}

/// Shared memory of a cube: queries, the scores of `range` keys, kept positions, the norm's partial sums and the selection's scratch.
pub(super) fn shared_bytes(range: usize, key_dim: usize, select: &SelectPlan) -> usize {
    let SelectPlan { rows, lanes, keep, .. } = *select;
    4 * (rows * (key_dim + range.next_multiple_of(FOUR) + keep + lanes)) + select.bytes()
}
