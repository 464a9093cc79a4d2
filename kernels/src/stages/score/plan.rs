//! How the stage is launched, from sizes and a device alone: how the keys of a side are cut, tiles, units and shared memory.

use super::{FOUR, GROUP, ScoreStrategy, lines_of};
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
    pub(super) fn check(&self) -> Result<()> {
        self.check_keys()?;
        let Self { side_keys, top_m, .. } = *self;
        if top_m > side_keys {
            let (value, limit) = (top_m as u64, side_keys as u64);
            return Err(Error::Exceeds { what: "top_m", value, limit_name: "side_keys", limit });
        }
        Ok(())
    }

    /// Cubes of a chunk of tokens that matrix units score, if a side's keys are not cut; None where they can't score.
    pub(super) fn matrix_sides(&self, device: &Device) -> Option<usize> {
        self.check().ok()?;
        let cut = ScorePlan::cut(device, self, ScoreStrategy::Split { splits: 1 });
        let planned = cut.on_matrix_units(device, self)?;
        let chunk = Self { tokens: planned.plan.chunk_of(self.tokens), ..*self };
        Some(chunk.tokens.div_ceil(MATRIX_TOKENS) * self.heads * 2)
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
    /// Keys of a split, a multiple of four; on matrix units lines.
    pub range: usize,
    /// Ranges that a side is cut into.
    pub splits: usize,
    /// Whether who selects among the scores of split keys keeps their order keys in shared memory; else they are read where they are.
    pub stored: bool,
    /// Tokens of a cube, which share one reading of its keys.
    pub tile: usize,
    /// Units of a cube.
    pub units: usize,
    /// Vectors of projected keys that a unit scores at a time.
    pub block: usize,
    /// Units of a plane that can select a row; 0 where none can.
    pub plane: usize,
    /// Whether matrix units score, all ranks of all keys.
    pub matrix: bool,
}

impl ScorePlan {
    /// The keys of a side cut as `strategy` says, and a cube of one token and one unit.
    pub(super) fn cut(device: &Device, sizes: &ScoreSizes, strategy: ScoreStrategy) -> Self {
        let ScoreSizes { heads, query_pairs, heads_per_pair, side_keys, key_dim, rank, top_m, norm, direct, .. } =
            *sizes;
        let splits = match strategy {
            ScoreStrategy::Whole | ScoreStrategy::Filtered => 1,
            ScoreStrategy::Split { splits } => splits.max(1),
        };
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
            range: range_of(side_keys, splits),
            splits,
            stored: device.exchange == 0,
            tile: 1,
            units: 1,
            block: 1,
            plane: device.exchange,
            matrix: false,
        }
    }

    /// The same on matrix units, where they can score: the largest tile of tokens that keeps the device busy, or else the smallest.
    pub(super) fn on_matrix_units(self, device: &Device, sizes: &ScoreSizes) -> Option<Planned<Self>> {
        let lines = lines_of(self.side_keys, self.rank, self.direct);
        let range = lines.div_ceil(self.splits).next_multiple_of(MATRIX_KEYS);
        let cut = Self { matrix: true, range, splits: lines.div_ceil(range), ..self };
        let with = |tile| Self { tile, units: MATRIX_PLANES * MATRIX_PLANE, ..cut }.approximating(sizes.tokens);
        let tiles = [MATRIX_TOKENS, 4 * GROUP, 2 * GROUP, GROUP]
            .into_iter()
            .filter(|&tile| tile == GROUP || sizes.tokens > tile / 2);
        let mut tiles = tiles.map(with).filter(|it| it.launch.fits(device));
        // A load of the largest tile serves twice the products: it is worth leaving some multiprocessors without one.
        let enough =
            |tile: usize| if tile == MATRIX_TOKENS { device.processors / 2 } else { 3 * device.processors / 2 };
        let busy = |it: &Planned<Self>| it.launch.cubes >= enough(it.plan.tile);
        let possible = self.takes_matrix_units(device, sizes, MATRIX_PLANES);
        tiles.clone().find(busy).or_else(|| tiles.next_back()).filter(|_| possible)
    }

    /// Whether matrix units can score, in cubes of so many planes.
    pub(super) fn takes_matrix_units(&self, device: &Device, sizes: &ScoreSizes, planes: usize) -> bool {
        let fits = device.multiplies(sizes.dtype) && device.exchange == MATRIX_PLANE;
        let whole = self.key_dim.is_multiple_of(DEPTH) && self.width == FOUR && self.side_keys >= GROUP;
        fits && whole && device.most_matrix_units() >= planes * MATRIX_PLANE
    }

    /// What the kernel on matrix units is compiled for: ranges come when it is launched, so that there is one for all numbers of tokens.
    pub(super) fn of_any_range(&self) -> Self {
        Self { range: 0, splits: 0, ..*self }
    }

    /// How a side's keys are selected from.
    pub(crate) fn select(&self) -> SelectPlan {
        let plan = SelectPlan::new(self.tile, self.units / self.tile, self.top_m, self.plane);
        SelectPlan { marked: self.side_keys.next_multiple_of(FOUR), ..plan }
    }

    /// Scores of a side from one token's to the next: the approximate ones, and of matrix units those of all ranks behind them.
    pub(crate) fn pitch(&self) -> usize {
        match self.matrix {
            true => lines_of(self.side_keys, self.rank, self.direct),
            false => self.side_keys.next_multiple_of(FOUR),
        }
    }

    /// Tokens whose approximate scores are in memory at once: all, or chunks of much the same size, of whole tiles if they are so large.
    pub(super) fn chunk_of(&self, tokens: usize) -> usize {
        let bytes = if self.matrix { MATRIX_BYTES } else { APPROXIMATE_BYTES };
        let most = (bytes / (8 * self.heads).saturating_mul(self.pitch())).max(1);
        let chunk = tokens.div_ceil(tokens.div_ceil(most).max(1));
        let whole = chunk.next_multiple_of(MATRIX_TOKENS);
        if whole <= most { whole.min(tokens) } else { chunk }
    }

    /// Planes of a cube on matrix units that share a tile's tokens, and groups of lines of each: 64 tokens by 32 lines take fewer loads a product
    /// than 128 by 16.
    pub(super) fn matrix_shares(&self) -> (usize, usize) {
        if self.tile > 4 * GROUP { (2, 2) } else { (1, 1) }
    }

    /// Lanes that share a key whose score vector is computed.
    pub(crate) fn key_lanes(&self) -> usize {
        if self.select().plane > 0 { KEY_LANES } else { 1 }
    }

    /// The launch that scores all keys of a side and selects.
    pub(super) fn scoring(self, tokens: usize) -> Planned<Self> {
        let Self { heads, key_dim, range, tile, units, .. } = self;
        let kept = if self.direct { strided(self.top_m, units / tile) } else { self.kept_loops() };
        let launch = Launch {
            kernel: "score_kernel",
            cubes: tokens.div_ceil(tile).saturating_mul(heads * 2),
            units,
            shared_bytes: shared_bytes(range, key_dim, &self.select()),
            loops: self.approximate_loops()
                + self.select().loops(range / FOUR)
                + strided(self.top_m, units / tile)
                + kept,
        };
        Planned { plan: self, launch }
    }

    /// The launch that writes the approximate scores of one range a cube.
    pub(super) fn approximating(self, tokens: usize) -> Planned<Self> {
        let Self { heads, splits, key_dim, range, tile, units, .. } = self;
        let by_units = FOUR * (tile * (key_dim + range));
        let launch = Launch {
            kernel: if self.matrix { "approximate_matrix_kernel" } else { "approximate_kernel" },
            cubes: tokens.div_ceil(tile).saturating_mul(heads * 2 * splits),
            units,
            shared_bytes: if self.matrix { 2 * tile * key_dim } else { by_units },
            loops: match self.matrix {
                true => {
                    tile / MATRIX_PLANES * (1 + 3 * strided(key_dim / FOUR, MATRIX_PLANE)) + range.div_ceil(MATRIX_KEYS)
                }
                false => self.approximate_loops() + strided(range, units / tile),
            },
        };
        Planned { plan: self, launch }
    }

    /// The launch that selects among the scores of all ranges.
    pub(super) fn selecting(self, tokens: usize) -> Planned<Self> {
        let launch = Launch {
            kernel: "select_keys_kernel",
            cubes: tokens.div_ceil(self.tile).saturating_mul(self.heads * 2),
            units: self.units,
            shared_bytes: self.select_bytes(),
            loops: self.select_loops(),
        };
        Planned { plan: self, launch }
    }

    /// Loop iterations of a unit that scores one range.
    fn approximate_loops(&self) -> usize {
        let scores = strided(self.range / FOUR, self.units * self.block) * (1 + self.key_dim / self.width);
        self.norm_loops() + scores
    }

    /// Loop iterations of a unit in [`select_keys`](super::forward::select_keys), and of writing what it keeps.
    pub(crate) fn select_loops(&self) -> usize {
        let (lanes, vectors) = (self.units / self.tile, self.side_keys.div_ceil(FOUR));
        let load = if self.stored { strided(vectors, lanes) } else { 0 };
        let kept = match self.direct || self.matrix {
            true => strided(self.top_m * self.rank, lanes),
            false => self.kept_loops(),
        };
        let norm = if self.matrix || self.direct { 0 } else { self.norm_loops() };
        norm + load + self.select().loops(vectors) + strided(self.top_m, lanes) + kept
    }

    fn norm_loops(&self) -> usize {
        let vectors = self.key_dim / self.width;
        3 * strided(vectors, self.units / self.tile) + 2 * strided(vectors, self.select().plane.max(1))
    }

    fn kept_loops(&self) -> usize {
        let (keys, share) = (self.units / self.tile / self.key_lanes(), self.key_lanes());
        strided(self.top_m, keys) * (1 + strided(self.key_dim / self.width, share))
    }

    /// Shared memory of [`select_keys`](super::forward::select_keys): as [`shared_bytes`] for the scores, where they are stored, without queries
    /// where the kept keys have their scores already.
    pub(crate) fn select_bytes(&self) -> usize {
        let (select, order) = (self.select(), if self.stored { self.side_keys } else { 0 });
        let queries = if self.matrix || self.direct { self.key_dim } else { 0 };
        shared_bytes(order, self.key_dim, &select) - 4 * self.tile * queries
    }
}

/// Keys of a range where a side is cut into at least so many: all of them, or a power of two, for which few kernels are compiled.
pub(super) fn range_of(side_keys: usize, splits: usize) -> usize {
    match side_keys.div_ceil(splits) {
        all if splits == 1 => all.next_multiple_of(FOUR),
        share => 1 << share.max(FOUR).ilog2(),
    }
}

/// Bytes of the scores that are in memory at once, of matrix units, which write those of all ranks, and of others.
const MATRIX_BYTES: usize = 512 << 20;
const APPROXIMATE_BYTES: usize = 24 << 20;
/// Tokens of the largest tile of a cube on matrix units.
pub(super) const MATRIX_TOKENS: usize = 8 * GROUP;
/// Lanes that share a key: a load of each reads a sector or two of it together.
const KEY_LANES: usize = 8;
/// Planes that multiply, a group of keys each.
pub(super) const MATRIX_PLANES: usize = 8;
/// Keys that a cube multiplies at a time.
pub(super) const MATRIX_KEYS: usize = MATRIX_PLANES * GROUP;
/// Numbers of the depth that a plane reads at a time.
const DEPTH: usize = 32;

/// Units of a plane that multiplies.
pub(super) const MATRIX_PLANE: usize = 32;

/// Shared memory of a cube: queries, the scores of `range` keys, kept positions and the selection's scratch.
pub(super) fn shared_bytes(range: usize, key_dim: usize, select: &SelectPlan) -> usize {
    let SelectPlan { rows, keep, .. } = *select;
    4 * (rows * (key_dim + range.next_multiple_of(FOUR) + keep)) + select.bytes()
}
