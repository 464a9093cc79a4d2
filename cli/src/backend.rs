//! Which device runs the layer: what there is, what was asked for, and the cure where the two don't meet.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "wgpu")]
mod wgpu;

use clap::ValueEnum;
use cubecl::{Runtime, client::ComputeClient, ir::DeviceProperties};
use ultramem::{ElementType, MemoryConfig, MemoryLayer, Weights};
use ultramem_offline::{Gpu, OfflineDevice, OfflineRuntime};

use crate::engine::{Engine, Oracle};
use crate::failure::{Failure, Result};
use crate::numbers::counted;
use crate::processor::Processor;

/// What `--backend` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// CUDA if a driver answers, else a GPU through wgpu, else the processor.
    Auto,
    /// Vulkan or Metal, through wgpu; a software device, too.
    Wgpu,
    /// CUDA.
    Cuda,
    /// The processor: native code on all cores.
    Cpu,
    /// The oracle: plain loops on the CPU.
    Reference,
    /// The CUDA kernels on a GPU that is not there (--device): interpreted on the CPU and checked as they run. Slow.
    Offline,
}

/// What `--limits` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Limits {
    /// All that the adapter has.
    Adapter,
    /// What every browser guarantees: 8 storage buffers, 16 KiB of shared memory, 128 MiB a binding.
    Webgpu,
}

/// A device that a layer can run on.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// `cuda`, `wgpu`, `cpu`, `reference` or `offline`.
    pub backend: &'static str,
    /// The device's own name.
    pub name: String,
    /// The driver's name and version.
    pub driver: String,
    place: Place,
}

#[derive(Debug, Clone)]
enum Place {
    #[cfg(feature = "cuda")]
    Cuda(cubecl::cuda::CudaDevice),
    #[cfg(feature = "wgpu")]
    Wgpu {
        device: cubecl::wgpu::WgpuDevice,
        /// Whether its memory is the host's.
        shares_host: bool,
    },
    Offline(OfflineDevice),
    Processor,
    Reference,
}

/// Something to do with a device, whichever runtime drives it.
pub trait Job {
    /// What it gives.
    type Output;

    /// Does it.
    fn run<R: Runtime>(self, client: &ComputeClient<R>) -> Result<Self::Output>;
}

/// What to do where there is no adapter.
#[cfg(feature = "wgpu")]
pub const CURE: &str = "for a software Vulkan device: apt-get install mesa-vulkan-drivers";
/// The same for a build that would not find one.
#[cfg(not(feature = "wgpu"))]
pub const CURE: &str = "this build has no wgpu: build it with --features wgpu";

/// CUDA devices, or the reason why there are none to use.
pub fn cuda_adapters() -> Result<Vec<Adapter>> {
    #[cfg(feature = "cuda")]
    return crate::failure::guard(cuda::adapters);
    #[cfg(not(feature = "cuda"))]
    return Err(Failure::new("this build has no CUDA"));
}

/// wgpu adapters, the best first, or the reason why there are none to use.
pub fn wgpu_adapters() -> Result<Vec<Adapter>> {
    #[cfg(feature = "wgpu")]
    return crate::failure::guard(wgpu::adapters);
    #[cfg(not(feature = "wgpu"))]
    return Err(Failure::new("this build has no wgpu"));
}

/// The processor.
pub fn processors() -> Result<Vec<Adapter>> {
    Ok(vec![Adapter::processor()])
}

/// The GPUs that the offline device stands in for.
pub fn offline_adapters() -> Result<Vec<Adapter>> {
    Ok(Gpu::ALL.map(Adapter::offline).to_vec())
}

impl Backend {
    /// The backend that has `limits`.
    pub fn within(self, limits: Limits) -> Result<Self> {
        match (limits, self) {
            (Limits::Adapter, _) => Ok(self),
            (Limits::Webgpu, Self::Auto | Self::Wgpu) => Ok(Self::Wgpu),
            (Limits::Webgpu, Self::Cuda | Self::Cpu | Self::Reference | Self::Offline) => {
                Err(Failure::new("--limits webgpu is for --backend wgpu alone"))
            }
        }
    }

    /// The device to use; `gpu` is the one that an offline device stands in for.
    pub fn find(self, gpu: Gpu) -> Result<Adapter> {
        match self {
            Self::Cpu => Ok(Adapter::processor()),
            Self::Reference => Ok(Adapter::reference()),
            Self::Offline => Ok(Adapter::offline(gpu)),
            Self::Cuda => first(cuda_adapters()?, "no CUDA device found; use --backend wgpu"),
            Self::Wgpu => match wgpu_adapters().and_then(|found| first(found, "no wgpu adapter found")) {
                Ok(adapter) => Ok(adapter),
                Err(failure) if cfg!(feature = "wgpu") => Err(Failure::new(format!("{failure}; {CURE}"))),
                Err(_) => Err(Failure::new(CURE)),
            },
            Self::Auto => Ok(best().unwrap_or_else(Adapter::processor)),
        }
    }

    /// Refuses a device whose times would mean nothing.
    pub fn can_be_timed(self, verb: &str) -> Result<Self> {
        match self {
            Self::Offline => Err(Failure::new(format!(
                "{verb} measures time; the offline device interprets kernels on the CPU, for forward, backward and check"
            ))),
            _ => Ok(self),
        }
    }

    /// The device for a verb that means nothing on the reference.
    pub fn find_device(self, verb: &str) -> Result<Adapter> {
        match self {
            Self::Reference => Err(Failure::new(format!(
                "{verb} needs a device, cpu, wgpu or cuda; the reference has no kernels to measure"
            ))),
            _ => self.can_be_timed(verb)?.find(Gpu::default()),
        }
    }

    /// The device for a verb that measures what only GPUs have kernels for.
    pub fn find_gpu(self, verb: &str) -> Result<Adapter> {
        let needs = format!("{verb} needs a GPU backend, wgpu or cuda");
        match self {
            Self::Cpu => Err(Failure::new(format!("{needs}: what layers are compared with has no native kernels"))),
            Self::Reference => Err(Failure::new(format!("{needs}; the reference has no kernels to measure"))),
            Self::Auto => best().ok_or_else(|| {
                Failure::new(format!(
                    "{needs}: no CUDA device or GPU found; --backend wgpu takes a software device, {CURE}"
                ))
            }),
            Self::Cuda | Self::Wgpu | Self::Offline => self.find_device(verb),
        }
    }
}

fn first(adapters: Vec<Adapter>, otherwise: &str) -> Result<Adapter> {
    adapters.into_iter().next().ok_or_else(|| Failure::new(otherwise))
}

fn best() -> Option<Adapter> {
    let cuda = cuda_adapters().unwrap_or_default().into_iter().next();
    cuda.or_else(|| wgpu_adapters().unwrap_or_default().into_iter().find(Adapter::is_hardware))
}

impl Adapter {
    fn reference() -> Self {
        let driver = "plain loops with f64 sums".to_string();
        Self { backend: "reference", name: "CPU".to_string(), driver, place: Place::Reference }
    }

    /// The processor that this runs on.
    fn processor() -> Self {
        let (threads, vectors) = (rayon::current_num_threads(), ultramem::processor::vectors());
        let driver = format!("{}, {vectors}", counted(threads, "thread"));
        Self { backend: "cpu", name: processor_name(), driver, place: Place::Processor }
    }

    /// Whether it is a GPU, and no software that stands in for one.
    fn is_hardware(&self) -> bool {
        match &self.place {
            #[cfg(feature = "cuda")]
            Place::Cuda(_) => true,
            #[cfg(feature = "wgpu")]
            Place::Wgpu { device, .. } => !matches!(device, cubecl::wgpu::WgpuDevice::Cpu),
            Place::Offline(_) | Place::Processor | Place::Reference => false,
        }
    }

    fn offline(gpu: Gpu) -> Self {
        let (name, driver) = (format!("{gpu} without a GPU"), "PTX interpreted on the CPU".to_string());
        Self { backend: "offline", name, driver, place: Place::Offline(OfflineDevice::of(gpu)) }
    }

    /// The same adapter with no more than `limits`.
    pub fn within(self, limits: Limits) -> Result<Self> {
        match (limits, &self.place) {
            #[cfg(feature = "wgpu")]
            (Limits::Webgpu, Place::Wgpu { device, shares_host }) => {
                let (device, shares_host) = (crate::failure::guard(|| wgpu::webgpu(device))?, *shares_host);
                let driver = format!("{}, within WebGPU's limits", self.driver);
                Ok(Self { driver, place: Place::Wgpu { device, shares_host }, ..self })
            }
            _ => Ok(self),
        }
    }

    /// Whether it compiles kernels in its first call.
    pub fn compiles(&self) -> bool {
        !matches!(self.place, Place::Processor | Place::Reference)
    }

    /// What the device can do; None for the processor and the oracle. Opens the device.
    pub fn properties(&self) -> Option<DeviceProperties> {
        match &self.place {
            #[cfg(feature = "cuda")]
            Place::Cuda(device) => Some(cuda::client(device).properties().clone()),
            #[cfg(feature = "wgpu")]
            Place::Wgpu { device, .. } => Some(wgpu::client(device).properties().clone()),
            Place::Offline(device) => Some(OfflineRuntime::client(device).properties().clone()),
            Place::Processor | Place::Reference => None,
        }
    }

    /// Bytes of device memory to plan with: what is free on a device that shares the host's memory, what there is on a CUDA device.
    /// None where nobody says.
    pub fn memory(&self) -> Option<u64> {
        match &self.place {
            #[cfg(feature = "cuda")]
            Place::Cuda(device) => cuda::memory(device),
            #[cfg(feature = "wgpu")]
            Place::Wgpu { shares_host, .. } => shares_host.then(host_memory).flatten(),
            Place::Offline(_) | Place::Processor | Place::Reference => host_memory(),
        }
    }

    /// Does a job on the device.
    pub fn with_client<J: Job>(&self, job: J) -> Result<J::Output> {
        match &self.place {
            #[cfg(feature = "cuda")]
            Place::Cuda(device) => job.run(&cuda::client(device)),
            #[cfg(feature = "wgpu")]
            Place::Wgpu { device, .. } => job.run(&wgpu::client(device)),
            Place::Offline(device) => job.run(&OfflineRuntime::client(device)),
            Place::Processor | Place::Reference => Err(Failure::new("the processor is no device that runs kernels")),
        }
    }

    /// Brings a layer to the device, which gives a token the same bits in a call of any number of tokens if `invariant`.
    pub fn engine<'a>(
        &self,
        config: &MemoryConfig,
        weights: &'a Weights<'_>,
        dtype: ElementType,
        invariant: bool,
    ) -> Result<Box<dyn Engine + 'a>> {
        fn layer<'a, R: Runtime>(
            client: &ComputeClient<R>,
            config: &MemoryConfig,
            weights: &Weights<'_>,
            dtype: ElementType,
            invariant: bool,
        ) -> Result<Box<dyn Engine + 'a>> {
            Ok(Box::new(MemoryLayer::new(client, config.clone(), weights, dtype)?.with_invariance(invariant)))
        }
        match &self.place {
            #[cfg(feature = "cuda")]
            Place::Cuda(device) => layer(&cuda::client(device), config, weights, dtype, invariant),
            #[cfg(feature = "wgpu")]
            Place::Wgpu { device, .. } => layer(&wgpu::client(device), config, weights, dtype, invariant),
            Place::Offline(device) => layer(&OfflineRuntime::client(device), config, weights, dtype, invariant),
            // It takes one token after the other.
            Place::Reference => Ok(Box::new(Oracle::new(config, weights, dtype))),
            Place::Processor => Ok(Box::new(Processor::new(config, weights, dtype, invariant)?)),
        }
    }
}

/// Bytes that this machine could give, where it says so.
pub fn host_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// What the processor calls itself, where it says so.
fn processor_name() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| format!("{} processor", std::env::consts::ARCH), |(_, name)| name.trim().to_string())
}
