//! The device: which GPU it stands in for, how launches are run, and what they reported.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cubecl::device::DeviceId;
use cubecl::ir::DeviceProperties;
use cubecl_common::device::Device;
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::profile::sample::Blocks;
use crate::target::Target;
use crate::{Gpu, LaunchReport};

/// A CUDA device without a GPU.
#[derive(Clone)]
pub struct OfflineDevice(Arc<State>);

/// How launches are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// The GPU to stand in for.
    pub gpu: Gpu,
    /// What kernels are compiled to; CUDA's alone are executed.
    pub target: Target,
    /// What is done with a launch.
    pub execution: Execution,
    /// What it reports, where that is not the GPU's.
    pub adapter: Option<Adapter>,
    /// What the order of blocks and warps is drawn from; None draws that itself.
    pub seed: Option<u64>,
    /// Whether a launch that loads what nothing has written in a buffer is good all the same; its report lists the loads. CubeCL's own
    /// copy of a tensor whose rows are padded loads the padding, in units past the end whose numbers go nowhere.
    pub unwritten_loads: bool,
    /// Whether loops run as they are written and not unrolled, so that a report's loop iterations are the source's.
    pub rolled_loops: bool,
    /// Whether streams do what they are given in an order that is drawn anew, as far as their waits allow, and no earlier than somebody
    /// waits for them. A report comes when its launch has run.
    pub shuffled: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            gpu: Gpu::default(),
            target: Target::Cuda,
            execution: Execution::Watched,
            adapter: None,
            seed: None,
            unwritten_loads: false,
            rolled_loops: false,
            shuffled: false,
        }
    }
}

/// What another device reports of itself, for the plans that it leads to: a launch runs as on the GPU. It has no plane operations and no
/// matrix units, whose width would be the GPU's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Adapter {
    /// Units of a plane; 0 where there are none.
    pub plane_size: u32,
    /// Bytes of shared memory of a cube.
    pub shared_bytes: usize,
    /// Units of a cube.
    pub units: u32,
}

impl Adapter {
    pub(crate) fn alter(self, properties: &mut DeviceProperties) {
        let hardware = &mut properties.hardware;
        (hardware.plane_size_min, hardware.plane_size_max) = (self.plane_size, self.plane_size);
        hardware.max_shared_memory_size = self.shared_bytes;
        hardware.max_units_per_cube = self.units;
        hardware.max_cube_dim = (self.units, self.units, self.units.min(64));
        properties.features.plane = Default::default();
        properties.features.matmul = Default::default();
    }
}

/// What is done with a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Execution {
    /// Each access is checked and measured.
    Watched,
    /// Instructions are counted, and accesses neither checked nor measured. Which blocks run, [`OfflineDevice::count`] says; all of them
    /// at first.
    Counted,
    /// Nothing runs: the source and the launch are kept, the buffers stay as they are.
    Skipped,
    /// Nothing runs and nothing is compiled: buffers are looked up, and the launch is dropped without a report.
    Dropped,
}

struct State {
    index: u16,
    options: Options,
    reports: Mutex<Vec<LaunchReport>>,
    /// Draws a seed for each launch.
    seeds: Mutex<StdRng>,
    /// Blocks that run where they are counted.
    blocks: Mutex<Blocks>,
    /// Pieces of memory that were asked for since the last launch, or since reports were taken.
    allocations: AtomicUsize,
}

/// Devices are looked up by number, for CubeCL knows them by number.
static DEVICES: Mutex<Vec<OfflineDevice>> = Mutex::new(Vec::new());

impl OfflineDevice {
    /// A new device, which shares nothing with others.
    ///
    /// # Panics
    /// After 65,536 devices.
    pub fn new(options: Options) -> Self {
        let mut devices = lock(&DEVICES);
        let index = u16::try_from(devices.len()).expect("at most 65,536 offline devices");
        let seeds = Mutex::new(options.seed.map_or_else(StdRng::from_os_rng, StdRng::seed_from_u64));
        devices.push(Self(Arc::new(State {
            index,
            options,
            reports: Mutex::default(),
            seeds,
            blocks: Mutex::default(),
            allocations: AtomicUsize::default(),
        })));
        devices[usize::from(index)].clone()
    }

    /// A new device that stands in for `gpu` and watches every launch.
    pub fn of(gpu: Gpu) -> Self {
        Self::new(Options { gpu, ..Options::default() })
    }

    /// How its launches are run.
    pub fn options(&self) -> Options {
        self.0.options
    }

    /// What launches reported since this was last called, in their order. Wait for the client first.
    pub fn take_reports(&self) -> Vec<LaunchReport> {
        self.take_allocations();
        std::mem::take(&mut lock(&self.0.reports))
    }

    /// Which blocks of the launches from now on run. For [`Execution::Counted`].
    pub fn count(&self, blocks: Blocks) {
        *lock(&self.0.blocks) = blocks;
    }

    /// Which blocks of the next launch run.
    pub(crate) fn next_blocks(&self) -> Blocks {
        let mut blocks = lock(&self.0.blocks);
        let next = *blocks;
        *blocks = next.after();
        next
    }

    /// All devices that were made.
    pub(crate) fn all() -> Vec<Self> {
        lock(&DEVICES).clone()
    }

    pub(crate) fn allocates(&self) {
        self.0.allocations.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn take_allocations(&self) -> usize {
        self.0.allocations.swap(0, Ordering::Relaxed)
    }

    pub(crate) fn next_seed(&self) -> u64 {
        lock(&self.0.seeds).random()
    }

    pub(crate) fn report(&self, report: LaunchReport) {
        lock(&self.0.reports).push(report);
    }
}

impl std::fmt::Debug for OfflineDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Offline({}, {})", self.0.options.gpu, self.0.index)
    }
}

impl Default for OfflineDevice {
    fn default() -> Self {
        Self::new(Options::default())
    }
}

impl Device for OfflineDevice {
    fn from_id(id: DeviceId) -> Self {
        lock(&DEVICES)[usize::from(id.index_id)].clone()
    }

    fn to_id(&self) -> DeviceId {
        DeviceId { type_id: 0, index_id: self.0.index }
    }
}

/// A poisoned lock guards nothing that could be half done here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
