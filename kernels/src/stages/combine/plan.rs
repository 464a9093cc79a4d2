//! How the stage is launched, from sizes and a device alone: rows and units of a cube, and where the grid of pairs is kept.

use crate::launch::device::Device;
use crate::launch::loops::strided;
use crate::launch::plan::{Launch, Planned};
use crate::launch::tensor::{index, positive};
use crate::select::{FOUR, SelectPlan};
use crate::{Error, Result};

/// The sizes of the stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CombineSizes {
    /// Tokens; none is no launch.
    pub tokens: usize,
    /// Heads.
    pub heads: usize,
    /// Keys of a side, at most 65,535.
    pub side_keys: usize,
    /// Keys of a side that were kept, and slots that are chosen.
    pub top_m: usize,
    /// Width of a score vector.
    pub rank: usize,
    /// Scores of a slot.
    pub cores: usize,
    /// Whether the total of a pair is the sum of its sides' scores.
    pub additive: bool,
}

impl CombineSizes {
    pub(super) fn check(&self) -> Result<()> {
        let Self { heads, side_keys, top_m, rank, cores, .. } = *self;
        positive(&[("heads", heads), ("top_m", top_m), ("rank", rank), ("cores", cores)])?;
        slots_fit(side_keys)?;
        let product = |sizes: [usize; 4]| sizes.into_iter().fold(1, usize::saturating_mul);
        index("numbers of the core", product([cores, heads, rank, rank]))?;
        index("kept scores of a token", product([heads, 2, top_m, rank]))?;
        index("pairs of a head", top_m.saturating_mul(top_m)).map(drop)
    }
}

/// Checks that slots, `side_keys²` of them, can be counted in a u32.
fn slots_fit(side_keys: usize) -> Result<()> {
    positive(&[("side_keys", side_keys)])?;
    let limit = u64::from(u16::MAX);
    if side_keys as u64 > limit {
        return Err(Error::Exceeds { what: "side_keys", value: side_keys as u64, limit_name: "the limit", limit });
    }
    Ok(())
}

/// What is fixed when the stage's kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CombinePlan {
    /// Heads.
    pub heads: usize,
    /// Keys of a side.
    pub side_keys: usize,
    /// Keys of a side that were kept, and slots that are chosen.
    pub top_m: usize,
    /// Width of a score vector.
    pub rank: usize,
    /// Scores of a slot.
    pub cores: usize,
    /// Vectors of four positions that are looked at: for a Tucker core every pair, each row of the grid filled up to whole vectors; for
    /// additive scores those that can be among the best.
    pub vectors: usize,
    /// Product keys: the total is the sum of the sides, and a softmax runs over the kept.
    pub additive: bool,
    /// Whether the pairs' order keys are kept in shared memory.
    pub stored: bool,
    /// Rows of a cube, a row being one head of one token.
    pub tile: usize,
    /// Units of a cube.
    pub units: usize,
    /// Units of a plane that can select a row; 0 where none can.
    pub plane: usize,
}

impl CombinePlan {
    /// Plans [`combine`](super::combine()): the largest tile whose working set fits, with the grid in shared memory if it can be there, and, on
    /// planes of a CPU, if each row still has a unit of its own; more units for one row where they would go through too many iterations.
    ///
    /// # Errors
    /// Sizes that don't fit the device, or more keys than slots can be counted of.
    pub fn of(device: &Device, sizes: &CombineSizes) -> Result<Planned<Self>> {
        sizes.check()?;
        tiled(device, Self::single(device, sizes), sizes.tokens.saturating_mul(sizes.heads)).checked("combine", device)
    }

    /// The plan of a cube of one row and one unit, for checked sizes.
    fn single(device: &Device, sizes: &CombineSizes) -> Self {
        let CombineSizes { heads, side_keys, top_m, rank, cores, additive, .. } = *sizes;
        let vectors = if additive { listed_vectors(top_m) } else { top_m * top_m.div_ceil(FOUR) };
        Self {
            heads,
            side_keys,
            top_m,
            rank,
            cores,
            vectors,
            additive,
            stored: true,
            tile: 1,
            units: 1,
            plane: device.exchange,
        }
    }

    /// How the pairs are selected from.
    pub(crate) fn select(&self) -> SelectPlan {
        SelectPlan::new(self.tile, self.units / self.tile, self.top_m, self.plane)
    }

    /// The plan of one row that has all of a cube's `units`.
    ///
    /// # Errors
    /// As [`of`](Self::of), but for the device.
    pub(crate) fn of_row(device: &Device, sizes: &CombineSizes, units: usize) -> Result<Self> {
        sizes.check()?;
        Ok(Self { units, ..Self::single(device, sizes) })
    }

    /// The launch for `rows` rows.
    fn choosing(self, rows: usize) -> Planned<Self> {
        let (cubes, units) = (rows.div_ceil(self.tile), self.units);
        let (shared_bytes, loops) = (self.shared_bytes(), self.loops());
        Planned { plan: self, launch: Launch { kernel: "combine_kernel", cubes, units, shared_bytes, loops } }
    }

    /// Loop iterations of a unit, inlined loops over ranks and cores included.
    pub(crate) fn loops(&self) -> usize {
        let Self { top_m, rank, cores, vectors, .. } = *self;
        let lanes = self.units / self.tile;
        let (own, sort) = (strided(top_m, lanes), self.select().sort_loops(top_m));
        let (load, write) = if self.additive {
            (4 * own + 2 * sort + lanes + vectors.min(own * (1 + top_m.div_ceil(FOUR))), 2 * own + top_m)
        } else {
            let through_core = strided(top_m * rank, lanes).saturating_mul(1 + rank * (1 + cores));
            let transposed = strided(rank * top_m.div_ceil(FOUR), lanes);
            (through_core.saturating_add(transposed), own.saturating_mul(1 + cores * (1 + rank * (1 + rank))))
        };
        let grid = if self.stored { strided(vectors, lanes) } else { 0 };
        load.saturating_add(grid + self.select().loops(vectors) + own + sort).saturating_add(write)
    }

    /// Shared memory of a cube: both sides, what is kept, the lists of product keys, the grid and the selection's scratch.
    pub(crate) fn shared_bytes(&self) -> usize {
        let Self { top_m, rank, vectors, tile, units, .. } = *self;
        let sides = if self.additive { 3 * top_m + vectors } else { rank * (top_m + top_m.next_multiple_of(FOUR)) };
        let grid = if self.stored { FOUR * vectors } else { 0 };
        let apart = self.select().plane > 0 && self.select().lanes > self.select().plane;
        let counts = if self.additive && apart { units } else { 0 };
        4 * (tile * (sides + 2 * top_m + grid) + counts + FOUR) + self.select().bytes()
    }
}

/// Additive pairs that can be among the best `top_m`, in vectors of four.
///
/// With each side ranked by score, then key, the pair at ranks `(x, y)` follows `(x + 1)(y + 1) - 1` pairs, so it can be kept only if
/// `(x + 1)(y + 1) <= top_m`. Whoever ranks `x` on the row side goes with the `top_m / (x + 1)` best of the column side, and with up to
/// three more that fill up a vector.
fn listed_vectors(top_m: usize) -> usize {
    (1..=top_m).map(|x| (top_m / x).div_ceil(FOUR)).sum()
}

fn tiled(device: &Device, plan: CombinePlan, rows: usize) -> Planned<CombinePlan> {
    let tile_of = |stored, tile: usize| {
        // Planes without a row of their own would wait in cubes that shared memory allows few of.
        let crowded = device.exchange > 0 && tile < device.tile_of(rows);
        let lanes = if crowded { device.exchange } else { (device.units_for(tile, usize::MAX) / tile).max(1) };
        CombinePlan { stored, tile, units: tile * lanes, ..plan }.choosing(rows)
    };
    let tiles = [16, 8, 4, 2, 1].into_iter().filter(|&tile| tile <= device.tile_of(rows));
    let fits = |planned: &Planned<CombinePlan>| planned.launch.fits(device);
    // A plane looks at a pair once.
    let stored = tiles.clone().filter(|_| device.exchange == 0).map(|tile| tile_of(true, tile)).find(fits);
    let anew = tiles.map(|tile| tile_of(false, tile)).find(fits);
    let crowded = |planned: &Planned<CombinePlan>| device.on_cpu && planned.plan.units > planned.plan.tile;
    let most = CombinePlan { stored: false, tile: 1, units: device.most_units(), ..plan };
    let doubled = |units: &usize| (*units < most.units).then_some(2 * units);
    let widened = core::iter::successors(Some(device.plane_size.min(most.units)), doubled);
    stored
        .filter(|planned| !crowded(planned))
        .or(anew.filter(|planned| !crowded(planned)))
        .or(stored)
        .or(anew)
        .or_else(|| widened.map(|units| CombinePlan { units, ..most }.choosing(rows)).find(fits))
        .unwrap_or(most.choosing(rows))
}
