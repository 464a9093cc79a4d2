//! What the strategies ask of a device: shared memory, planes, units and cubes. Read from its properties, never assumed.

use cubecl::prelude::*;

use crate::{Error, Result};

/// The properties that choose a strategy.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Device {
    /// Bytes of shared memory a cube may use.
    pub shared_bytes: usize,
    /// Units of a plane.
    pub plane_size: usize,
    /// Tokens that share one reading of a weight.
    pub tile: usize,
    /// Column vectors of a weight that a unit keeps sums for.
    pub block: usize,
    /// Whether planes are a processor's vector registers.
    pub narrow: bool,
    planes: usize,
    load_bytes: usize,
    max_width: usize,
    max_units: usize,
    max_cubes: (u32, u32, u32),
    /// Cubes that reach every multiprocessor.
    pub processors: usize,
    /// Cubes that keep the whole device busy.
    pub busy_cubes: usize,
}

impl Device {
    pub fn of<R: Runtime>(client: &ComputeClient<R>) -> Self {
        let hardware = &client.properties().hardware;
        // Planes this narrow are a processor's vector registers: a load costs it many times a multiplication, so a unit
        // takes on as large a block as it can, and a barrier saves and restores every plane, so a cube has one.
        let narrow = hardware.plane_size_max <= NARROW;
        let processors = hardware.num_streaming_multiprocessors.unwrap_or(16) as usize;
        let (tile, block, planes) = if narrow { (16, 4, 1) } else { (8, 1, 8) };
        Self {
            tile,
            block,
            planes,
            narrow,
            shared_bytes: hardware.max_shared_memory_size,
            plane_size: hardware.plane_size_max.clamp(1, 64) as usize,
            load_bytes: hardware.load_width as usize / 8,
            max_width: hardware.max_vector_size,
            max_units: (hardware.max_units_per_cube.min(hardware.max_cube_dim.0)) as usize,
            max_cubes: hardware.max_cube_count,
            processors,
            busy_cubes: 2 * processors,
        }
    }

    /// Units of a cube that has `work` independent pieces: whole planes, as many as keep a full cube; a power of two.
    pub fn units(&self, work: usize) -> usize {
        let most = (self.plane_size * self.planes).min(self.max_units).min(MAX_UNITS);
        let wanted = work.min(MAX_UNITS).next_power_of_two().clamp(self.plane_size.min(most), most);
        1 << wanted.ilog2()
    }

    /// The most units of a cube, a power of two.
    pub fn most_units(&self) -> usize {
        1 << self.max_units.clamp(1, MAX_UNITS).ilog2()
    }

    /// Units of a cube that works on `items` things, a unit each and nothing shared: a large cube is started less often, but a few
    /// items must still reach the whole device. Two sizes, so that a kernel is compiled twice at most.
    pub fn flat(&self, items: usize) -> usize {
        let most = self.max_units.min(MAX_UNITS);
        if items >= most * self.busy_cubes { most } else { most.min(FEW_UNITS) }
    }

    /// Units of a cube that selects among `work` candidates for each row of a tile. A narrow plane's lanes are best spent on a row
    /// each: [`select`](crate::select) needs no barrier then.
    pub fn units_for(&self, tile: usize, work: usize) -> usize {
        let units = self.units(work);
        if self.narrow { units.min(tile.max(self.plane_size)) } else { units }
    }

    /// The widest vector of elements of `bytes` bytes that is one load and divides each of `sizes`.
    pub fn width(&self, bytes: usize, sizes: &[usize]) -> usize {
        let loads = |width: &usize| *width <= self.max_width && width * bytes <= self.load_bytes;
        let divides = |width: &usize| sizes.iter().all(|size| size.is_multiple_of(*width));
        [8, 4, 2].into_iter().filter(loads).find(divides).unwrap_or(1)
    }

    /// Vectors that a unit takes of `vectors` in a row: as many as its block has, that divide them.
    pub fn run(&self, vectors: usize) -> usize {
        [4, 2].into_iter().find(|run| *run <= self.block && vectors.is_multiple_of(*run)).unwrap_or(1)
    }

    /// A grid of at least `cubes` cubes; kernels leave at once where `CUBE_POS` is `cubes` or more. None is no launch: who has nothing to do
    /// must not come here.
    pub fn grid(&self, cubes: usize) -> Result<CubeCount> {
        if cubes == 0 {
            return Err(Error::Zero { what: "cubes" });
        }
        let (max_x, max_y, _) = self.max_cubes;
        let x = cubes.min(max_x as usize);
        let y = cubes.div_ceil(x);
        if y > max_y as usize {
            let limit = u64::from(max_x) * u64::from(max_y);
            return Err(Error::Exceeds { what: "cubes", value: cubes as u64, limit_name: "the device's grid", limit });
        }
        Ok(CubeCount::Static(x as u32, y as u32, 1))
    }

    /// Checks that a cube's working set fits.
    pub fn fits_shared(&self, stage: &'static str, bytes: usize) -> Result<()> {
        if bytes <= self.shared_bytes {
            return Ok(());
        }
        Err(Error::SharedMemory { stage, bytes: bytes as u64, limit: self.shared_bytes as u64 })
    }
}

/// Widest plane that is taken for a software device's.
const NARROW: u32 = 8;
const MAX_UNITS: usize = 256;
/// Units of a cube where there are few items: a plane of any device.
const FEW_UNITS: usize = 32;
