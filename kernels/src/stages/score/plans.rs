//! The launches of the stage, by strategy: one that scores and selects, one that filters, or two for each chunk of tokens.

use super::filter_plan::FilterPlan;
use super::plan::{ScorePlan, ScoreSizes};
use super::{FOUR, ScoreStrategy};
use crate::launch::device::Device;
use crate::launch::plan::{Launch, Planned};
use crate::{Error, Result};

/// The launches of the stage for so many tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScorePlans {
    /// One launch.
    Whole(Planned<ScorePlan>),
    /// The keys of a side are split: all are scored, then selected from.
    Split(SplitPlans),
    /// One launch, on matrix units.
    Filtered(Planned<FilterPlan>),
}

/// The launches of a split stage, for each chunk of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SplitPlans {
    /// Writes the approximate scores of a chunk.
    pub approximate: Planned<ScorePlan>,
    /// Selects among them.
    pub select: Planned<ScorePlan>,
    /// Tokens of a chunk, the last one having fewer.
    pub chunk: usize,
    /// Of all chunks.
    pub tokens: usize,
}

impl SplitPlans {
    /// Numbers of a chunk's approximate scores.
    pub(crate) fn numbers(&self) -> usize {
        self.chunk.saturating_mul(self.select.plan.heads * 2).saturating_mul(self.select.plan.pitch())
    }

    /// The first token of each chunk and where it ends, with its two launches.
    pub(super) fn chunks(&self) -> impl Iterator<Item = (usize, usize, [Planned<ScorePlan>; 2])> + use<> {
        let Self { approximate, select, chunk, tokens } = *self;
        (0..tokens).step_by(chunk.max(1)).map(move |first| {
            let end = tokens.min(first + chunk);
            let launches = [approximate.plan.approximating(end - first), select.plan.selecting(end - first)];
            (first, end, launches)
        })
    }
}

impl ScorePlans {
    /// Plans [`score`](super::score()) by `strategy`.
    ///
    /// # Errors
    /// Sizes that don't fit each other or the device.
    pub fn of(device: &Device, sizes: &ScoreSizes, strategy: ScoreStrategy) -> Result<Self> {
        sizes.check()?;
        let (cut, tokens) = (ScorePlan::cut(device, sizes, strategy), sizes.tokens);
        let with = |tile: usize, units: usize| {
            let block = (cut.range / FOUR / units).clamp(1, device.block);
            ScorePlan { tile, units, block, splits: cut.side_keys.div_ceil(cut.range), ..cut }
        };
        if strategy == ScoreStrategy::Whole {
            let whole = tiled(device, tokens, cut.range, |tile, units| with(tile, units).scoring(tokens))?;
            return Ok(Self::Whole(whole.checked(STAGE, device)?));
        }
        let filtered = FilterPlan::of(device, sizes).filter(|_| strategy == ScoreStrategy::Filtered);
        if let Some(filtered) = filtered {
            return Ok(Self::Filtered(filtered.checked(STAGE, device)?));
        }
        let chunk = cut.on_matrix_units(device, sizes).map_or(cut, |it| it.plan).chunk_of(tokens);
        let chunks = tokens.div_ceil(chunk.max(1));
        if chunks > MOST_CHUNKS {
            let (value, limit) = (chunks as u64, MOST_CHUNKS as u64);
            return Err(Error::Exceeds {
                what: "chunks of tokens",
                value,
                limit_name: "what one call launches,",
                limit,
            });
        }
        let of_chunk = ScoreSizes { tokens: chunk, ..*sizes };
        let by_units = || tiled(device, chunk, cut.range, |tile, units| with(tile, units).approximating(chunk));
        let approximate = cut.on_matrix_units(device, &of_chunk).map_or_else(by_units, Ok)?.checked(STAGE, device)?;
        let select = |stored| {
            tiled(device, chunk, sizes.side_keys, |tile, units| {
                ScorePlan { tile, units, stored, ..approximate.plan }.selecting(chunk)
            })
        };
        let select = select(cut.stored).or_else(|_| select(false))?.checked(STAGE, device)?;
        Ok(Self::Split(SplitPlans { approximate, select, chunk, tokens }))
    }

    /// Numbers of the approximate scores, 4 bytes each, the stage's only memory besides its result; 0 where one launch does it all.
    pub fn approximate_numbers(&self) -> usize {
        match self {
            Self::Whole(_) | Self::Filtered(_) => 0,
            Self::Split(split) => split.numbers(),
        }
    }

    /// The launches in their order.
    pub fn launches(&self) -> Vec<Launch> {
        match self {
            Self::Whole(whole) => vec![whole.launch],
            Self::Filtered(filtered) => vec![filtered.launch],
            Self::Split(split) => split.chunks().flat_map(|(.., launches)| launches.map(|it| it.launch)).collect(),
        }
    }
}

const STAGE: &str = "score";

/// Chunks of a call: more tokens than any device's memory has room for.
const MOST_CHUNKS: usize = 1 << 16;

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
