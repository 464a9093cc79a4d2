//! What the strategies ask of a device: shared memory, planes, units and cubes. Read from its properties, never assumed.

use cubecl::features::Plane;
use cubecl::ir::{HardwareProperties, StorageType};
use cubecl::prelude::*;

use crate::{ElementType, Error, Result};

/// The properties that choose a strategy: how large a cube is, how wide its loads, how many cubes there are.
#[derive(Debug, Clone, Copy)]
pub struct Device {
    /// Bytes of shared memory a cube may use.
    pub shared_bytes: usize,
    /// Units of a plane.
    pub(crate) plane_size: usize,
    /// Units of a plane that exchange numbers through shared memory behind a barrier of the plane; 0 where they can't.
    pub(crate) exchange: usize,
    /// Tokens that share one reading of a weight.
    pub tile: usize,
    /// Column vectors of a weight that a unit keeps sums for.
    pub(crate) block: usize,
    /// Whether matrix units multiply f16 and bf16, 16 by 8 by 16, with sums in f32.
    pub(crate) matrix: [bool; 2],
    /// Whether planes are a processor's vector registers.
    pub(crate) on_cpu: bool,
    planes: usize,
    load_bytes: usize,
    max_width: usize,
    max_units: usize,
    max_cubes: (u32, u32),
    /// Cubes that reach every multiprocessor.
    pub(crate) processors: usize,
    /// Cubes that keep the whole device busy.
    pub(crate) busy_cubes: usize,
}

/// What kernels can use where a device has it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Features {
    /// Units of a plane exchange numbers through shared memory.
    pub exchange: bool,
    /// Matrix units multiply f16, and bf16, 16 by 8 by 16, with sums in f32.
    pub matrix: [bool; 2],
}

impl Device {
    /// The device of `client`.
    pub fn of<R: Runtime>(client: &ComputeClient<R>) -> Self {
        let planes = &client.properties().features.plane;
        // On Vulkan CubeCL's barrier of a plane orders no memory: what a unit writes before it, others may not see behind it.
        let ordered = !R::name(client).contains("spirv");
        let exchange = planes.contains(Plane::Ops) && planes.contains(Plane::Sync) && ordered;
        let matrix = [ElementType::F16, ElementType::BF16].map(|dtype| has_units(client, dtype.storage()));
        Self::new(&client.properties().hardware, R::max_cube_count(), Features { exchange, matrix })
    }

    /// A device of `hardware`, driven by a runtime that launches at most `most_cubes` cubes in each dimension. Some adapters report more
    /// than their drivers take: NVIDIA's on Vulkan.
    pub fn new(hardware: &HardwareProperties, most_cubes: (u32, u32, u32), features: Features) -> Self {
        // A device without planes says nothing, or 0: cubes are as large then as where planes are the usual 32.
        let plane_size = if hardware.plane_size_max == 0 { USUAL_PLANE } else { hardware.plane_size_max };
        // Planes this narrow are a processor's vector registers: a load costs it many times a multiplication, so a unit
        // takes on as large a block as it can, and a barrier saves and restores every plane, so a cube has one.
        let on_cpu = plane_size <= CPU_PLANE;
        let processors = hardware.num_streaming_multiprocessors.unwrap_or(16) as usize;
        let (tile, block, planes) = if on_cpu { (16, 4, 1) } else { (8, 1, 8) };
        let one_size = hardware.plane_size_min == plane_size && (16..=32).contains(&plane_size);
        let exchange = if features.exchange && one_size { plane_size as usize } else { 0 };
        Self {
            tile,
            block,
            planes,
            on_cpu,
            shared_bytes: hardware.max_shared_memory_size,
            plane_size: plane_size.min(64) as usize,
            exchange,
            matrix: features.matrix,
            load_bytes: hardware.load_width as usize / 8,
            max_width: hardware.max_vector_size,
            max_units: (hardware.max_units_per_cube.min(hardware.max_cube_dim.0)) as usize,
            max_cubes: (hardware.max_cube_count.0.min(most_cubes.0), hardware.max_cube_count.1.min(most_cubes.1)),
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

    /// Whether matrix units multiply numbers of `dtype`.
    pub fn multiplies(&self, dtype: ElementType) -> bool {
        match dtype {
            ElementType::F32 => false,
            ElementType::F16 => self.matrix[0],
            ElementType::BF16 => self.matrix[1],
        }
    }

    /// The most units of a cube whose planes multiply on matrix units, which hold sums for each other's rows.
    pub(crate) fn most_matrix_units(&self) -> usize {
        self.max_units
    }

    /// Units of the largest cube where planes exchange; elsewhere as large as any other kernel's.
    pub(crate) fn largest_cube(&self) -> usize {
        if self.exchange > 0 { 1 << self.max_units.max(1).ilog2() } else { self.units(usize::MAX) }
    }

    /// The most units of a cube, a power of two.
    pub(crate) fn most_units(&self) -> usize {
        1 << self.max_units.clamp(1, MAX_UNITS).ilog2()
    }

    /// Units of a cube that works on `items` things, a unit each and nothing shared: a large cube is started less often, but a few
    /// items must still reach the whole device. Two sizes, so that a kernel is compiled twice at most.
    pub fn flat(&self, items: usize) -> usize {
        let most = self.max_units.min(MAX_UNITS);
        if items >= most * self.busy_cubes { most } else { most.min(FEW_UNITS) }
    }

    /// Parts that each of `pieces` pieces of work, a cube each, is cut into to keep the whole device busy. A few cubes are enough for a CPU.
    pub fn parts(&self, pieces: usize) -> usize {
        if self.on_cpu { 1 } else { (self.busy_cubes / pieces.max(1)).max(1) }
    }

    /// Units of a cube that selects among `work` candidates for each row of a tile: a plane a row, where a plane can select. A CPU plane's
    /// lanes are best spent on a row each: [`select`](crate::select) needs no barrier then.
    pub(crate) fn units_for(&self, tile: usize, work: usize) -> usize {
        let units = self.units(work).max((tile * self.exchange).min(self.most_units()));
        if self.on_cpu { units.min(tile.max(self.plane_size)) } else { units }
    }

    /// Rows of a tile, of `rows` rows: a power of two.
    pub(crate) fn tile_of(&self, rows: usize) -> usize {
        rows.min(self.tile).next_power_of_two().min(self.tile)
    }

    /// The widest vector of elements of `bytes` bytes that is one load and divides each of `sizes`.
    pub fn width(&self, bytes: usize, sizes: &[usize]) -> usize {
        let loads = |width: &usize| *width <= self.max_width && width * bytes <= self.load_bytes;
        let divides = |width: &usize| sizes.iter().all(|size| size.is_multiple_of(*width));
        [8, 4, 2].into_iter().filter(loads).find(divides).unwrap_or(1)
    }

    /// Vectors that a unit takes of `vectors` in a row: as many as its block has, that divide them.
    pub(crate) fn run(&self, vectors: usize) -> usize {
        [4, 2].into_iter().find(|run| *run <= self.block && vectors.is_multiple_of(*run)).unwrap_or(1)
    }

    /// A grid of at least `cubes` cubes; kernels leave at once where `CUBE_POS` is `cubes` or more. None is no launch: who has nothing to do
    /// must not come here.
    ///
    /// # Errors
    /// [`Error::Zero`] for none, [`Error::Exceeds`] for more than the device's grid has.
    pub fn grid(&self, cubes: usize) -> Result<CubeCount> {
        if cubes == 0 {
            return Err(Error::Zero { what: "cubes" });
        }
        let (max_x, max_y) = self.max_cubes;
        let y = cubes.div_ceil(max_x as usize);
        let x = cubes.div_ceil(y);
        if y > max_y as usize {
            let limit = u64::from(max_x) * u64::from(max_y);
            return Err(Error::Exceeds { what: "cubes", value: cubes as u64, limit_name: "the device's grid", limit });
        }
        Ok(CubeCount::Static(x as u32, y as u32, 1))
    }

    /// Checks that a cube's working set fits: the shared memory, in bytes, that `stage` needs of it.
    ///
    /// # Errors
    /// [`Error::SharedMemory`].
    pub fn fits_shared(&self, stage: &'static str, bytes: usize) -> Result<()> {
        if bytes <= self.shared_bytes {
            return Ok(());
        }
        Err(Error::SharedMemory { stage, bytes: bytes as u64, limit: self.shared_bytes as u64 })
    }
}

/// Whether work on different streams of the device runs side by side.
pub fn has_streams<R: Runtime>(client: &ComputeClient<R>) -> bool {
    is_cuda(client)
}

/// Whether a kernel may read and write parts of one buffer, as two arguments: wgpu takes a buffer for one or for the other.
pub(crate) fn has_pointers<R: Runtime>(client: &ComputeClient<R>) -> bool {
    is_cuda(client)
}

/// CUDA, or AMD's twin of it.
fn is_cuda<R: Runtime>(client: &ComputeClient<R>) -> bool {
    matches!(R::name(client), "cuda" | "hip")
}

/// Whether the device multiplies numbers of this type on matrix units, 16 by 8 by 16, in planes of 32 and with `ldmatrix`.
pub(crate) fn has_units<R: Runtime>(client: &ComputeClient<R>, dtype: StorageType) -> bool {
    let (features, hardware) = (&client.features().matmul, &client.properties().hardware);
    let multiplies = features.mma.iter().any(|unit| {
        let types = [unit.a_type, unit.b_type] == [dtype; 2] && unit.cd_type == ElementType::F32.storage();
        types && [unit.m, unit.n, unit.k] == [16, 8, 16]
    });
    // Which lane has which numbers of a fragment is known of planes of 32.
    let planes = [hardware.plane_size_min, hardware.plane_size_max] == [USUAL_PLANE; 2];
    multiplies && planes && features.ldmatrix.contains(&dtype)
}

/// Widest plane that is taken for a software device's.
const CPU_PLANE: u32 = 8;
const USUAL_PLANE: u32 = 32;
const MAX_UNITS: usize = 256;
/// Units of a cube where there are few items: a plane of any device.
const FEW_UNITS: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    /// Of an adapter that reports what NVIDIA's driver does on Vulkan.
    fn hardware() -> HardwareProperties {
        HardwareProperties {
            load_width: 128,
            plane_size_min: 32,
            plane_size_max: 32,
            max_bindings: 7,
            max_shared_memory_size: 48 << 10,
            max_cube_count: (i32::MAX as u32, i32::MAX as u32, i32::MAX as u32),
            max_units_per_cube: 1024,
            max_cube_dim: (1024, 1024, 64),
            num_streaming_multiprocessors: None,
            num_tensor_cores: None,
            min_tensor_cores_dim: None,
            num_cpu_cores: None,
            max_vector_size: 4,
        }
    }

    /// What cubecl's wgpu runtime takes in a dimension.
    const WGPU: (u32, u32, u32) = (65_535, 65_535, 65_535);

    #[test]
    fn a_grid_has_no_more_cubes_in_a_dimension_than_the_runtime_takes() {
        let device = Device::new(&hardware(), WGPU, Features::default());
        for cubes in [1, 65_535, 65_536, 1 << 20, 65_535 * 65_535] {
            let CubeCount::Static(x, y, z) = device.grid(cubes).unwrap() else { panic!("a grid of known size") };
            assert!(x <= 65_535 && y <= 65_535 && z == 1, "{cubes}: {x} · {y} · {z}");
            let launched = x as usize * y as usize;
            assert!((cubes..cubes + x as usize).contains(&launched), "{cubes}: {x} · {y}");
        }
        let error = device.grid(65_535 * 65_535 + 1).unwrap_err().to_string();
        assert!(error.contains("4294836226") && error.contains("4294836225"), "{error}");
        // And where the adapter takes fewer than the runtime.
        let small =
            Device::new(&HardwareProperties { max_cube_count: (16, 8, 1), ..hardware() }, WGPU, Features::default());
        let CubeCount::Static(x, y, _) = small.grid(128).unwrap() else { panic!("a grid of known size") };
        assert_eq!((x, y), (16, 8));
        assert!(small.grid(129).is_err());
    }

    #[test]
    fn cubes_fit_devices_of_any_planes() {
        for plane in [0, 1, 4, 8, 16, 32, 64, 128] {
            for most in [64, 128, 256, 1024] {
                let hardware = HardwareProperties {
                    plane_size_min: plane.min(8),
                    plane_size_max: plane,
                    max_units_per_cube: most,
                    ..hardware()
                };
                let device = Device::new(&hardware, WGPU, Features { exchange: true, matrix: [true; 2] });
                let what = format!("planes of {plane}, {most} units");
                for work in [1, 3, 64, 1000, usize::MAX] {
                    for units in [device.units(work), device.units_for(4, work), device.flat(work), device.most_units()]
                    {
                        assert!(units.is_power_of_two() && units <= MAX_UNITS.min(most as usize), "{what}: {units}");
                    }
                    let whole = device.units(work).is_multiple_of(device.plane_size.min(device.most_units()));
                    assert!(whole, "{what}: a part of a plane for {work}");
                }
                assert_eq!(device.on_cpu, (1..=CPU_PLANE).contains(&plane), "{what}");
            }
        }
    }
}
