//! How a product on matrix units is cut, from its sizes and a device alone: the tile of a cube, and parts of the depth.

use crate::Result;
use crate::launch::device::Device;
use crate::launch::plan::{Launch, Planned, check_all};

/// Rows, columns and numbers of the depth of a fragment.
pub(super) const SIXTEEN: usize = 16;
/// Numbers that a line of a buffer is longer than what it holds: 16 bytes, so that lines that are read at once lie in different banks.
pub(super) const PAD: usize = 8;

/// The sizes of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatrixSizes {
    /// Rows of the output.
    pub rows: usize,
    /// Columns of the output.
    pub columns: usize,
    /// Products of a sum.
    pub depth: usize,
    /// Whether the left factor is `[depth, rows]`.
    pub turned: bool,
    /// Whether each sum goes through the depth in one piece.
    pub whole: bool,
}

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MatrixPlan {
    /// Slices of a stage's depth, each with planes of its own.
    pub slices: usize,
    /// Planes of a slice, down its rows and along its columns.
    pub planes: [usize; 2],
    /// Sixteens of rows and of columns of a plane.
    pub tiles: [usize; 2],
    /// Numbers of the depth of a stage.
    pub stage: usize,
    /// Whether the left factor is `[depth, rows]`.
    pub turned: bool,
}

impl MatrixPlan {
    /// Rows of a cube.
    pub fn rows(&self) -> usize {
        self.planes[0] * self.tiles[0] * SIXTEEN
    }

    /// Columns of a cube.
    pub fn columns(&self) -> usize {
        self.planes[1] * self.tiles[1] * SIXTEEN
    }

    /// Units of a cube.
    pub fn units(&self) -> usize {
        self.slices * self.planes[0] * self.planes[1] * PLANE
    }

    /// The left factor's panel.
    pub(super) fn left(&self) -> Panel {
        let (rows, stage, units) = (self.rows(), self.stage, self.units());
        match self.turned {
            true => Panel { lines: stage, run: rows, across: true, units },
            false => Panel { lines: rows, run: stage, across: false, units },
        }
    }

    /// The right factor's panel.
    pub(super) fn right(&self) -> Panel {
        Panel { lines: self.stage, run: self.columns(), across: true, units: self.units() }
    }

    /// Pairs of sums of a unit: four of each sixteen of rows and of columns.
    pub(super) fn pairs(&self) -> usize {
        4 * self.tiles[0] * self.tiles[1]
    }

    /// Bytes of the buffers of a cube, and of the sums of all slices but the first.
    pub fn shared_bytes(&self) -> usize {
        let sums = (self.slices - 1) * self.units() / self.slices * self.pairs();
        BUFFERS * 2 * (self.left().buffer() + self.right().buffer()) + 8 * sums
    }

    /// Cycles of a multiprocessor for a stage of a cube, when others hide its latency.
    fn busy(&self) -> f64 {
        let read = 2 * (self.rows() + self.columns()) * self.stage;
        let products = self.rows() * self.columns() * self.stage;
        (read as f64 / CACHE).max(products as f64 / PRODUCTS)
    }

    /// The tile for groups of rows that are multiplied one time after another, by products of all of these sizes.
    pub fn of_groups(device: &Device, sizes: &[GroupSizes]) -> Self {
        let cycles = |plan: &Self| -> f64 {
            let of = |sizes: &GroupSizes| {
                let cubes = sizes.tiles(plan.rows()) * sizes.columns.div_ceil(plan.columns()) as f64;
                plan.cycles(device, cubes.ceil() as usize, sizes.depth.div_ceil(plan.stage))
            };
            sizes.iter().map(of).sum()
        };
        let least = |it: &&Self, other: &&Self| cycles(it).total_cmp(&cycles(other));
        *GROUPED.iter().min_by(least).unwrap_or(&GROUPED[0])
    }

    /// Cycles of the busiest multiprocessor, roughly: what its cubes read from the second-level cache or what they compute, whichever is more, but
    /// at least the stages of one after the other. A replay of these kernels on an H100 takes about as long.
    fn cycles(&self, device: &Device, cubes: usize, stages: usize) -> f64 {
        let cubes = cubes.div_ceil(device.processors) as f64;
        let waves = (cubes / (RESIDENT / self.units()) as f64).ceil();
        let stage = (cubes * self.busy()).max(waves * (LATENCY + self.busy()));
        stages as f64 * stage + waves * EDGES
    }

    /// Tiles of the output.
    fn cubes(&self, sizes: &MatrixSizes) -> usize {
        sizes.rows.div_ceil(self.rows()).saturating_mul(sizes.columns.div_ceil(self.columns()))
    }
}

/// Products of rows that come in groups, each with a right factor of its own.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupSizes {
    /// Groups, as many as are expected.
    pub groups: f64,
    /// Rows of a group on average.
    pub rows: f64,
    /// Columns of the output.
    pub columns: usize,
    /// Products of a sum.
    pub depth: usize,
}

impl GroupSizes {
    /// Tiles of rows: the last of a group is half full, if there are several.
    fn tiles(&self, rows: usize) -> f64 {
        self.groups * (self.rows / rows as f64 + 0.5).max(1.0)
    }
}

/// Bytes that a multiprocessor reads of the second-level cache in a cycle.
const CACHE: f64 = 24.0;
/// Multiply-adds that the matrix units of a multiprocessor do in a cycle: an H100's, and about half of an A100's.
const PRODUCTS: f64 = 1365.0;
/// Cycles until the numbers of a stage are there.
const LATENCY: f64 = 650.0;
/// Cycles until the first stage of a cube is there, and until its sums are written.
const EDGES: f64 = 5000.0;
/// Cycles that a second launch takes, whatever it does.
const LAUNCH: f64 = 3000.0;
/// Units of a multiprocessor at once, as the registers of these kernels allow.
const RESIDENT: usize = 512;

/// Units of a plane, on every device that has such matrix units.
pub(super) const PLANE: usize = 32;
/// Buffers of a stage.
pub(super) const BUFFERS: usize = 2;

/// A factor's panel of a stage: `lines` lines of `run` numbers, along which the depth runs, or across.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Panel {
    pub lines: usize,
    pub run: usize,
    pub across: bool,
    pub units: usize,
}

impl Panel {
    /// Vectors of `width` numbers that a unit moves.
    pub fn loads(&self, width: usize) -> usize {
        self.lines * self.run / width / self.units
    }

    /// Numbers of the depth.
    pub fn depth(&self) -> usize {
        if self.across { self.lines } else { self.run }
    }

    /// Numbers from one line of a buffer to the next.
    pub fn pitch(&self) -> usize {
        self.run + PAD
    }

    /// Numbers of a buffer.
    pub fn buffer(&self) -> usize {
        self.lines * self.pitch()
    }
}

/// The launches of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatrixPlans {
    /// Multiplies.
    pub product: Planned<MatrixPlan>,
    /// Parts of the depth, each summed apart.
    pub splits: usize,
    /// Numbers of the depth of a part.
    pub share: usize,
    /// Numbers of the output.
    pub area: usize,
    /// Adds the parts up, where there are several.
    pub sum: Option<Launch>,
}

/// Tiles of a cube: the largest reads least, the smallest reaches the whole device.
const TILES: [MatrixPlan; 5] = [
    plan(1, [4, 2], [2, 3], 32),
    plan(1, [2, 2], [2, 2], 64),
    plan(1, [2, 2], [1, 1], 64),
    plan(2, [2, 2], [1, 1], 128),
    plan(4, [1, 1], [1, 1], 256),
];
/// Tiles of groups: the larger a group, the higher.
const GROUPED: [MatrixPlan; 4] = [plan(1, [4, 4], [2, 3], 64), TILES[1], plan(1, [2, 2], [1, 2], 64), TILES[4]];
/// Parts of the depth.
const SPLITS: [usize; 8] = [1, 2, 3, 4, 6, 8, 12, 16];

const fn plan(slices: usize, planes: [usize; 2], tiles: [usize; 2], stage: usize) -> MatrixPlan {
    MatrixPlan { slices, planes, tiles, stage, turned: false }
}

impl MatrixPlans {
    /// Plans a product; no rows are no launch, a depth of 0 counts as 1. A weight's gradient alone is cut into parts: a second launch is little
    /// beside the backward pass. The launches are checked when they are made.
    pub fn of(device: &Device, sizes: &MatrixSizes) -> Self {
        let sizes = MatrixSizes { depth: sizes.depth.max(1), ..*sizes };
        let splits = if sizes.turned && !sizes.whole { &SPLITS[..] } else { &SPLITS[..1] };
        let tiles = TILES.iter().filter(|plan| plan.slices == 1 || !sizes.whole);
        let all = tiles.flat_map(|plan| splits.iter().map(|&splits| Self::with(device, &sizes, *plan, splits)));
        let least = |it: &Self, other: &Self| it.cycles(device).total_cmp(&other.cycles(device));
        all.min_by(least).unwrap_or_else(|| Self::with(device, &sizes, TILES[0], 1))
    }

    /// Cycles of the product, then of adding up the parts.
    fn cycles(&self, device: &Device) -> f64 {
        let Planned { plan, launch } = self.product;
        let product = plan.cycles(device, launch.cubes, launch.loops);
        let parts = self.area as f64 * (8 * self.splits) as f64 / (device.processors as f64 * CACHE);
        product + self.sum.map_or(0.0, |_| LAUNCH + parts)
    }

    /// With a tile and so many parts of the depth, as far as there are as many stages.
    fn with(device: &Device, sizes: &MatrixSizes, plan: MatrixPlan, splits: usize) -> Self {
        let plan = MatrixPlan { turned: sizes.turned, ..plan };
        let share = sizes.depth.div_ceil(splits).div_ceil(plan.stage).saturating_mul(plan.stage);
        let splits = sizes.depth.div_ceil(share);
        let launch = Launch {
            kernel: "matrix_kernel",
            cubes: plan.cubes(sizes).saturating_mul(splits),
            units: plan.units(),
            shared_bytes: plan.shared_bytes(),
            loops: share.div_ceil(plan.stage),
        };
        let area = sizes.rows.saturating_mul(sizes.columns);
        let sum = || Launch::flat(device, "add_parts_kernel", area / device.width(4, &[area]), 0);
        Self { product: Planned { plan, launch }, splits, share, area, sum: (splits > 1).then(sum) }
    }

    /// The launches in their order.
    pub fn launches(&self) -> Vec<Launch> {
        core::iter::once(self.product.launch).chain(self.sum).collect()
    }

    /// Bytes of the parts, where there are several.
    pub fn parts_bytes(&self) -> usize {
        if self.splits > 1 { self.area.saturating_mul(4 * self.splits) } else { 0 }
    }

    /// The plans, once their launches have been checked against `device`.
    pub(super) fn checked(self, device: &Device) -> Result<Self> {
        check_all("product", device, &self.launches())?;
        Ok(self)
    }
}
