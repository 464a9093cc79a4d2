//! The stage-free form of selection: the positions of the best `keep` numbers of each row of a matrix, best first.
//!
//! A cube takes a tile of rows. Reads each score once where planes select, and up to ten times from cache where lanes go by digits; writes
//! `keep` positions a row.

use cubecl::prelude::*;

use super::{
    Candidates, CandidatesExpand, FOUR, Four, NOTHING, Scratch, SelectPlan, no_score, order_key, select_lane,
    select_sorted,
};
use crate::launch::device::Device;
use crate::launch::loops::strided;
use crate::launch::plan::{Launch, Planned};
use crate::launch::tensor::{Tensor, arg, check, empty, f32_storage, index, positive, u32_storage};
use crate::{Error, Result};

/// Scores of a row, as bits, from `first` on.
#[derive(CubeType)]
pub(crate) struct Scores {
    pub bits: Slice<u32>,
    pub first: usize,
    #[cube(comptime)]
    pub count: usize,
}

#[cube]
impl Candidates for Scores {
    fn keys(&self, vector: usize) -> Vector<u32, Four> {
        let mut keys = Vector::<u32, Four>::new(NOTHING);
        #[unroll]
        for n in 0..FOUR {
            if vector * FOUR + n < self.count {
                keys[n] = order_key(f32::reinterpret(self.bits[self.first + vector * FOUR + n]));
            }
        }
        keys
    }

    fn scores(&self, vector: usize) -> Vector<f32, Four> {
        let mut scores = Vector::<f32, Four>::new(no_score());
        #[unroll]
        for n in 0..FOUR {
            if vector * FOUR + n < self.count {
                scores[n] = f32::reinterpret(self.bits[self.first + vector * FOUR + n]);
            }
        }
        scores
    }
}

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TopMPlan {
    /// Numbers of a row.
    pub count: usize,
    select: SelectPlan,
}

impl TopMPlan {
    /// Plans [`top_m`]: the largest tile of rows whose working set fits.
    ///
    /// # Errors
    /// Sizes that don't fit the device.
    pub fn of(device: &Device, rows: usize, count: usize, keep: usize) -> Result<Planned<Self>> {
        positive(&[("top_m", keep), ("numbers of a row", count)])?;
        index("numbers of a row", count)?;
        if keep > count {
            let (value, limit) = (keep as u64, count as u64);
            return Err(Error::Exceeds { what: "top_m", value, limit_name: "the numbers of a row", limit });
        }
        let with = |tile: usize| {
            let lanes = (device.units_for(tile, count) / tile).max(1);
            Self { count, select: SelectPlan::new(tile, lanes, keep, device.exchange) }.selecting(rows)
        };
        let mut tiles = [16, 8, 4, 2, 1].into_iter().filter(|&tile| tile <= device.tile_of(rows)).map(with);
        let fits = |planned: &Planned<Self>| planned.launch.fits(device);
        tiles.find(fits).unwrap_or_else(|| with(1)).checked("top-m", device)
    }

    fn selecting(self, rows: usize) -> Planned<Self> {
        let SelectPlan { rows: tile, lanes, keep, .. } = self.select;
        let vectors = self.count.div_ceil(FOUR);
        let sort = if self.select.plane > 0 { 0 } else { self.select.sort_loops(keep) };
        let launch = Launch {
            kernel: "top_m_kernel",
            cubes: rows.div_ceil(tile),
            units: tile * lanes,
            shared_bytes: 8 * tile * keep + self.select.bytes(),
            loops: self.select.loops(vectors) + sort + 2 * strided(keep, lanes),
        };
        Planned { plan: self, launch }
    }
}

/// Launches the selection of the best `keep` of each row of `scores` f32 `[rows, count]`: their positions, u32 `[rows, keep]`, larger
/// scores first, equal scores by smaller position, NaN after every number. No rows choose nothing.
///
/// # Errors
/// Shapes, types or sizes that don't fit; nothing is launched then.
pub fn top_m<R: Runtime>(client: &ComputeClient<R>, scores: &Tensor<R>, keep: usize) -> Result<Tensor<R>> {
    let [rows, count] = *scores.shape().as_slice() else {
        let (found, expected) = (scores.shape().to_vec(), "[rows, count]");
        return Err(Error::Dimensions { tensor: "scores", found, expected });
    };
    check(client, scores, "scores", &[rows, count], f32_storage())?;
    let device = Device::of(client);
    let Planned { plan, launch } = TopMPlan::of(&device, rows, count, keep)?;
    let positions = empty(client, "positions", &[rows, keep], u32_storage())?;
    if rows == 0 {
        return Ok(positions);
    }
    let (grid, cube_dim) = launch.start(&device)?;
    // SAFETY: shapes are checked; a cube reads and writes its own rows only.
    unsafe {
        top_m_kernel::launch_unchecked::<R>(
            client,
            grid,
            cube_dim,
            arg(scores, 1),
            arg(&positions, 1),
            rows as u32,
            plan,
        );
    }
    Ok(positions)
}

/// `CUBE_POS` counts tiles of rows. `scores` as bits.
#[cube(launch_unchecked)]
fn top_m_kernel(scores: &Array<u32>, positions: &mut Array<u32>, rows: u32, #[comptime] plan: TopMPlan) {
    let select = comptime!(plan.select);
    if CUBE_POS * select.rows >= rows as usize {
        terminate!();
    }
    let at = select_lane(select);
    let row = CUBE_POS * select.rows + at.row;
    let mut keys = SharedMemory::<u32>::new(comptime!(select.rows * select.keep));
    let mut kept = SharedMemory::<u32>::new(comptime!(select.rows * select.keep));
    let mut scratch = Scratch::new(select);
    // A row past the last one selects from the last one again and writes nothing.
    let first = min(row, rows as usize - 1) * plan.count;
    let candidates = Scores { bits: scores.to_slice(), first, count: plan.count };
    let vectors = comptime!(plan.count.div_ceil(FOUR)).runtime();
    select_sorted::<Scores>(&candidates, vectors, at, &mut keys, &mut kept, &mut scratch);
    if row < rows as usize {
        for i in range_stepped(at.lane, select.keep, at.lanes) {
            positions[row * select.keep + i] = kept[at.row * select.keep + i];
        }
    }
}
