//! How the stage is launched, from sizes and a device alone: tokens and units of a cube, and how cubes share out a projection.

use super::ExpandStrategy;
use super::finish::{FinishPlan, FinishSizes};
use crate::launch::device::Device;
use crate::launch::loops::{fits_loops, strided};
use crate::launch::plan::{Launch, Planned};
use crate::launch::tensor::{index, positive};
use crate::linear::tile::{Product, Sharing};
use crate::linear::{ProductPlans, ProjectSizes};
use crate::table::source::{AddressPlan, ShufflePlan};
use crate::{ElementType, Error, Result};

/// The sizes of the stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpandSizes {
    /// Tokens; none is no launch.
    pub tokens: usize,
    /// Slots of a token: `heads · top_m`.
    pub slots: usize,
    /// Scores of a slot.
    pub cores: usize,
    /// How slots find blocks and rows.
    pub address: AddressPlan,
    /// Width of a value row.
    pub value_dim: usize,
    /// Width of the output.
    pub hidden_size: usize,
    /// Element type of the values and of the weight.
    pub dtype: ElementType,
    /// Whether a gate comes between pooling and projection.
    pub gated: bool,
    /// Whether there is an output projection.
    pub projects: bool,
    /// Whether projected values get a bias.
    pub biased: bool,
    /// Whether the output goes through a gate.
    pub output_gated: bool,
    /// Pages of the table.
    pub pages: usize,
    /// Pages of the shuffle; 0 where there is none.
    pub shuffle_pages: usize,
}

impl ExpandSizes {
    /// Width of the pooled values of a token.
    pub fn pooled_dim(&self) -> usize {
        self.address.pooled_blocks().saturating_mul(self.value_dim)
    }

    /// Whether something is done to pooled or projected values before they are the output: where nothing projects, and by a bias or an output
    /// gate.
    pub fn finishes(&self) -> bool {
        !self.projects || self.biased || self.output_gated
    }

    /// Numbers of a load of a value row: as wide as the device loads, within one core's slice.
    pub(super) fn width(&self, device: &Device) -> usize {
        device.width(self.dtype.size(), &[self.value_dim / self.cores])
    }

    /// The look-up of all slots.
    pub(super) fn shuffle(&self, device: &Device) -> ShufflePlan {
        ShufflePlan::of(device, self.tokens.saturating_mul(self.slots), self.shuffle_pages)
    }

    pub(super) fn check(&self) -> Result<()> {
        let Self { slots, cores, value_dim, hidden_size, pages, .. } = *self;
        positive(&[("slots", slots), ("cores", cores), ("value_dim", value_dim), ("hidden_size", hidden_size)])?;
        positive(&[("pages of the values", pages)])?;
        if !value_dim.is_multiple_of(cores) {
            let (value, divisor) = (value_dim as u64, cores as u64);
            return Err(Error::NotMultiple { what: "value_dim", value, divisor_name: "cores", divisor });
        }
        self.address.check()?;
        index("scores of a token", slots.saturating_mul(cores))?;
        index("pooled values of a token", self.pooled_dim())?;
        let blocks = self.address.pooled_blocks() as u64;
        if self.gated && blocks > 1 {
            return Err(Error::Exceeds {
                what: "expansion",
                value: blocks,
                limit_name: "what a gate takes,",
                limit: 1,
            });
        }
        Ok(())
    }
}

/// What is fixed when the stage's kernels are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ExpandPlan {
    /// Entries of a token: `heads · top_m`.
    pub entries: usize,
    /// Scores of an entry.
    pub cores: usize,
    /// How slots find blocks and rows.
    pub address: AddressPlan,
    /// Width of a value row.
    pub value_dim: usize,
    /// Numbers of a load of a row, within one core's slice.
    pub width: usize,
    /// Whether a gate comes between pooling and projection.
    pub gated: bool,
    /// Whether the table has several pages.
    pub paged: bool,
    /// Vectors of a row that a unit sums; divides a core's slice.
    pub run: usize,
    /// Units that share out the entries of a run.
    pub slices: usize,
    /// Vectors of an output row; 0 where pooling is all.
    pub columns: usize,
    /// Numbers of such a vector.
    pub columns_width: usize,
    /// How the units of a cube project.
    pub sharing: Sharing,
    /// Cubes of a tile, each of which pools a share of the runs, or, where it projects, pools all and projects every `splits`-th group of
    /// `lanes · block` columns.
    pub splits: usize,
    /// Tokens of a cube, which share one reading of its part of the weight.
    pub tile: usize,
    /// Units of a cube.
    pub units: usize,
}

impl ExpandPlan {
    /// Plans the kernel that pools and projects: a cube a tile where they reach the whole device, else as many as share out the weight with at
    /// most twice its bytes gathered again.
    ///
    /// # Errors
    /// Sizes that don't fit each other or the device, a table of several pages, or a layer that does not project last.
    pub fn fused(device: &Device, sizes: &ExpandSizes) -> Result<Planned<Self>> {
        if sizes.pages > 1 {
            let value = sizes.pages as u64;
            return Err(Error::Number { what: "pages of values for one kernel", value, expected: 1 });
        }
        if sizes.finishes() {
            return Err(FINISHES);
        }
        let start = Self::single(device, sizes)?;
        let (tokens, pooled_dim) = (sizes.tokens, sizes.pooled_dim());
        let columns_width = device.width(sizes.dtype.size(), &[sizes.hidden_size]);
        let (columns, depth) = (sizes.hidden_size / columns_width, pooled_dim / start.width);
        let plan = start.tiled(device, tokens, depth.max(columns), 4 * pooled_dim)?;
        let plan = Self { columns, columns_width, ..plan };
        let gathered = (plan.tile * plan.entries).saturating_mul(plan.value_dim);
        let cubes = device.processors.div_ceil(tokens.div_ceil(plan.tile).max(1));
        let cubes = cubes.min((2 * pooled_dim).saturating_mul(sizes.hidden_size) / gathered);
        let bytes = sizes.dtype.size() * columns_width;
        let product = Product { columns, depth, tile: plan.tile, bytes, width: columns_width };
        if device.on_cpu || cubes <= 1 {
            let block = (columns / plan.units).clamp(1, device.block);
            let sharing = Sharing { lanes: plan.units, slices: 1, block };
            return Self { sharing, ..plan }.projecting(tokens, &product).checked(STAGE, device);
        }
        let sliced = plan.sliced(device);
        let used = 4 * sliced.entry_words() + plan.tile * 4 * pooled_dim;
        let left = device.shared_bytes.saturating_sub(used + 4 * sliced.slice_sums() * plan.width);
        let sharing = Sharing::sliced(sliced.units, &product, cubes, left);
        let (splits, units) = (sharing.cubes(columns), sharing.units());
        let slices = if units == sliced.units { sliced.slices } else { 1 };
        Self { sharing, splits, units, slices, ..plan }.projecting(tokens, &product).checked(STAGE, device)
    }

    /// Plans the kernel that pools alone, which is launched once a page of the table. For few tokens several cubes share out the runs of a token, and
    /// several units the entries of a run, unless a token is to have the same bits however many there are.
    ///
    /// # Errors
    /// Sizes that don't fit each other or the device.
    pub fn pooling(device: &Device, sizes: &ExpandSizes, invariant: bool) -> Result<Planned<Self>> {
        let start = Self::single(device, sizes)?;
        let tile = if sizes.tokens > 8 * device.busy_cubes { device.tile } else { 1 };
        let plan = start.tiled(device, sizes.tokens, sizes.pooled_dim() / start.width / start.run, 0)?;
        let plan = Self { tile: plan.tile.min(tile), ..plan };
        let few = sizes.tokens <= device.processors && !device.on_cpu;
        let splits = (device.processors / sizes.tokens.max(1)).clamp(1, (plan.items() / LEAST_RUNS).max(1));
        let plan = Self { splits: if few { splits } else { 1 }, ..plan };
        let sliced = few && !invariant;
        if sliced { plan.sliced(device) } else { plan }.pooling_alone(sizes.tokens).checked(STAGE, device)
    }

    /// The plan of a cube of one token and one unit.
    fn single(device: &Device, sizes: &ExpandSizes) -> Result<Self> {
        sizes.check()?;
        let ExpandSizes { slots, cores, address, value_dim, gated, pages, .. } = *sizes;
        let width = sizes.width(device);
        Ok(Self {
            entries: slots,
            cores,
            address,
            value_dim,
            width,
            gated,
            paged: pages > 1,
            run: device.run(value_dim / cores / width),
            slices: 1,
            columns: 0,
            columns_width: 1,
            sharing: Sharing { lanes: 1, slices: 1, block: 1 },
            splits: 1,
            tile: 1,
            units: 1,
        })
    }

    /// The plan with the largest tile that fits, `work` being pieces of work a token and `shared` the bytes of a token besides its entries;
    /// more units where one would go through too many iterations.
    fn tiled(self, device: &Device, tokens: usize, work: usize, shared: usize) -> Result<Self> {
        let most = device.tile_of(tokens);
        let tiles = [16, 8, 4, 2, 1].into_iter().filter(|&tile| tile <= most);
        let tiles = tiles.map(|tile| (tile, device.units(work.saturating_mul(tile))));
        let widened = core::iter::successors(Some(2 * device.units(work)), |units| Some(2 * units));
        let widened = widened.take_while(|&units| units <= device.most_units()).map(|units| (1, units));
        let with = |(tile, units)| Self { tile, units, ..self };
        let bytes = |plan: &Self| 4 * plan.entry_words() + plan.tile * shared;
        let fits = |plan: &Self| bytes(plan) <= device.shared_bytes && fits_loops(plan.pool_loops());
        let plan = tiles.chain(widened).map(with).find(fits).unwrap_or_else(|| with((1, device.units(work))));
        device.fits_shared(STAGE, bytes(&plan))?;
        Ok(plan)
    }

    /// The same in the largest cubes, several units sharing out the entries of a run, if they are so many.
    fn sliced(self, device: &Device) -> Self {
        let units = device.largest_cube();
        let of_block = (self.entries / self.blocks()).max(1);
        let slices = (units / self.share().max(1)).min(of_block).max(1);
        let slices = 1 << slices.ilog2();
        let sliced = Self { units, slices, ..self };
        let bytes = 4 * (sliced.entry_words() + sliced.slice_sums() * self.width);
        if bytes <= device.shared_bytes / 2 { sliced } else { Self { units: device.units(usize::MAX), ..self } }
    }

    /// Runs of a tile's pooled vectors.
    pub(super) fn items(&self) -> usize {
        self.tile * self.blocks() * self.value_dim / self.width / self.run
    }

    /// Runs of a cube: where it projects, all of its tile.
    pub(super) fn share(&self) -> usize {
        if self.columns > 0 { self.items() } else { self.items().div_ceil(self.splits) }
    }

    /// Vectors of shared memory that slices take.
    pub(super) fn slice_sums(&self) -> usize {
        if self.slices > 1 { self.units * self.run } else { 0 }
    }

    /// The launch that pools and projects.
    fn projecting(self, tokens: usize, product: &Product) -> Planned<Self> {
        let pooled = 4 * (self.tile * self.blocks() * self.value_dim + self.slice_sums() * self.width);
        let launch = Launch {
            kernel: "expand_kernel",
            cubes: tokens.div_ceil(self.tile).saturating_mul(self.splits),
            units: self.units,
            shared_bytes: 4 * self.entry_words() + pooled + self.sharing.shared_bytes(product),
            loops: self.fused_loops(),
        };
        Planned { plan: self, launch }
    }

    /// The launch that pools the rows of one page.
    fn pooling_alone(self, tokens: usize) -> Planned<Self> {
        let launch = Launch {
            kernel: "pool_kernel",
            cubes: tokens.div_ceil(self.tile).saturating_mul(self.splits),
            units: self.units,
            shared_bytes: 4 * (self.entry_words() + self.slice_sums() * self.width),
            loops: self.pool_loops(),
        };
        Planned { plan: self, launch }
    }

    /// Pooled values of a token.
    pub fn blocks(&self) -> usize {
        self.address.pooled_blocks()
    }

    /// Chunks that a token's entries are ordered in: units that the tile's blocks leave, but no more than balance the entries of a chunk, looked at
    /// twice, and the counts before it, half of all.
    pub(super) fn chunks(&self) -> usize {
        let balanced = (4 * self.entries / self.blocks()).isqrt();
        (self.units / (self.tile * self.blocks())).min(balanced).clamp(1, self.entries)
    }

    /// Words of shared memory that ordering takes: addresses, order, counts and where blocks start.
    fn entry_words(&self) -> usize {
        self.tile * (2 * self.entries + self.blocks() * (self.chunks() + 1) + 1)
    }

    /// Loop iterations of a unit that orders the entries and pools.
    fn pool_loops(&self) -> usize {
        let counted = strided(self.tile * self.blocks() * self.chunks(), self.units);
        let count = 1 + strided(self.entries, self.chunks());
        let counting = counted.saturating_mul(2 * count + self.blocks() * self.chunks());
        let order = strided(self.tile * self.entries, self.units).saturating_add(counting);
        // At most: all entries of every token lie in one block.
        let runs = self.value_dim / self.width / self.run;
        let all = strided(self.share(), self.units / self.slices);
        let entries = strided(self.entries, self.slices);
        let rows = entries.saturating_mul(all.min(self.tile * (1 + strided(runs, self.units / self.slices))));
        order.saturating_add(all * (1 + self.slices * self.run)).saturating_add(rows)
    }
    /// Those of a unit that projects as well.
    fn fused_loops(&self) -> usize {
        let depth = self.blocks() * self.value_dim / self.width;
        let groups = strided(self.columns, self.splits * self.sharing.lanes * self.sharing.block);
        self.pool_loops().saturating_add(groups.saturating_mul(1 + strided(depth, self.sharing.slices)))
    }
}

/// The launches of the stage for so many tokens.
#[expect(clippy::large_enum_variant, reason = "there is one of them a pass, and it is copied")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpandPlans {
    /// One kernel.
    Fused {
        /// Looks slots up in a shuffle of several pages.
        shuffle: ShufflePlan,
        /// Pools and projects.
        expand: Planned<ExpandPlan>,
    },
    /// A pooling kernel, then a product.
    Pooled {
        /// Pools.
        pool: PoolPlans,
        /// Projects what is pooled; None where nothing does, or cubek.
        project: Option<ProductPlans>,
        /// Makes the output of what is pooled or projected, where something is done to that.
        finish: Option<Launch>,
    },
}

/// The launches of [`pool`](super::pool).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolPlans {
    /// Looks slots up in a shuffle of several pages.
    pub shuffle: ShufflePlan,
    /// Pools the rows of one page of the table.
    pub pool: Planned<ExpandPlan>,
    /// Pages, each with a launch of its own.
    pub pages: usize,
}

impl PoolPlans {
    /// Plans [`pool`](super::pool).
    ///
    /// # Errors
    /// Sizes that don't fit each other or the device.
    pub fn of(device: &Device, sizes: &ExpandSizes, invariant: bool) -> Result<Self> {
        let (pool, pages) = (ExpandPlan::pooling(device, sizes, invariant)?, sizes.pages);
        Ok(Self { shuffle: sizes.shuffle(device), pool, pages })
    }

    /// The launches in their order.
    pub fn launches(&self) -> Vec<Launch> {
        [self.shuffle.launches(), vec![self.pool.launch; self.pages]].concat()
    }
}

impl ExpandPlans {
    /// Plans [`expand`](super::expand()) by `strategy`.
    ///
    /// # Errors
    /// Sizes that don't fit each other or the device, and what [`ExpandStrategy::Fused`] does not take.
    pub fn of(device: &Device, sizes: &ExpandSizes, strategy: ExpandStrategy) -> Result<Self> {
        let product = match strategy {
            ExpandStrategy::Fused => {
                let (shuffle, expand) = (sizes.shuffle(device), ExpandPlan::fused(device, sizes)?);
                return Ok(Self::Fused { shuffle, expand });
            }
            ExpandStrategy::Pooled(product) => product,
        };
        let ExpandSizes { tokens, hidden_size, dtype, .. } = *sizes;
        let of_product = ProjectSizes { tokens, depth: sizes.pooled_dim(), width: hidden_size, dtype };
        let project = if sizes.projects { product.plan(device, &of_product)? } else { None };
        let finish = sizes.finishes().then(|| FinishPlan::of(device, &FinishSizes::from(sizes)).launch);
        let pool = PoolPlans::of(device, sizes, product.is_invariant())?;
        Ok(Self::Pooled { pool, project, finish })
    }

    /// The same without what is done to projected values.
    pub(super) fn unfinished(self) -> Self {
        match self {
            Self::Pooled { pool, project, .. } => Self::Pooled { pool, project, finish: None },
            fused => fused,
        }
    }

    /// The launches in their order.
    pub fn launches(&self) -> Vec<Launch> {
        match self {
            Self::Fused { shuffle, expand } => [shuffle.launches(), vec![expand.launch]].concat(),
            Self::Pooled { pool, project, finish } => {
                let project = project.iter().flat_map(ProductPlans::launches);
                pool.launches().into_iter().chain(project).chain(*finish).collect()
            }
        }
    }
}

const STAGE: &str = "expand";
/// Runs that are worth a cube.
const LEAST_RUNS: usize = 32;

/// What one kernel for both halves of the stage says of a layer that has a bias, an output gate or no projection.
pub(super) const FINISHES: Error =
    Error::Number { what: "output projections without bias or gate, for one kernel", value: 0, expected: 1 };
