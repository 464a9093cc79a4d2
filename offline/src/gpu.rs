//! The GPUs that can be stood in for, and what each reports: the figures of NVIDIA's data sheets and of the table of compute
//! capabilities in the CUDA programming guide.

use cubecl::features::{AtomicUsage, Plane, Tma, TypeUsage};
use cubecl::ir::{
    BarrierLevel, DeviceProperties, ElemType, FloatKind, HardwareProperties, MemoryDeviceProperties, OpaqueType,
    SemanticType, StorageType, Type, VectorSize,
};
use cubecl_common::profile::TimingMethod;
use cubecl_cpp::cuda::{CudaDialect, arch::CudaArchitecture, mma::CudaWmmaCompiler};
use cubecl_cpp::shared::{
    CompilationOptions, CppSupportedFeatures, DialectWmmaCompiler, register_mma_features, register_scaled_mma_features,
    register_wmma_features,
};
use serde::{Deserialize, Serialize};

/// A GPU to stand in for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Gpu {
    /// A100 with 80 GB.
    A100,
    /// H100 with 80 GB, SXM.
    #[default]
    H100,
    /// H200 with 141 GB.
    H200,
    /// B200 with 180 GB.
    B200,
    /// GeForce RTX 4090.
    Rtx4090,
}

/// What tells one GPU from another.
#[derive(Debug, Clone, Copy)]
pub struct Specification {
    /// Compute capability, times ten.
    pub capability: u32,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of shared memory that one block may ask for.
    pub shared_per_block: usize,
    /// Bytes of shared memory of a multiprocessor.
    pub shared_per_multiprocessor: usize,
    /// Warps that a multiprocessor holds.
    pub warps: usize,
    /// Blocks that a multiprocessor holds.
    pub blocks: usize,
    /// Bytes of device memory.
    pub memory: u64,
    /// Bytes of the second-level cache.
    pub cache: u64,
}

/// 32-bit registers of a multiprocessor, on every GPU here.
const REGISTERS: usize = 65_536;
/// Threads of a warp, on every GPU there is.
pub(crate) const WARP: usize = 32;
const KIB: usize = 1024;

type Wmma = CudaWmmaCompiler;
type Dialect = CudaDialect<Wmma>;

impl Gpu {
    /// Every GPU that can be stood in for.
    pub const ALL: [Self; 5] = [Self::A100, Self::H100, Self::H200, Self::B200, Self::Rtx4090];

    /// The figures.
    pub fn specification(self) -> Specification {
        let hopper = Specification {
            capability: 90,
            multiprocessors: 132,
            shared_per_block: 227 * KIB,
            shared_per_multiprocessor: 228 * KIB,
            warps: 64,
            blocks: 32,
            memory: 80 << 30,
            cache: 50 << 20,
        };
        match self {
            Self::A100 => Specification {
                capability: 80,
                multiprocessors: 108,
                shared_per_block: 163 * KIB,
                shared_per_multiprocessor: 164 * KIB,
                cache: 40 << 20,
                ..hopper
            },
            Self::H100 => hopper,
            Self::H200 => Specification { memory: 141_000_000_000, ..hopper },
            Self::B200 => Specification {
                capability: 100,
                multiprocessors: 148,
                memory: 180_000_000_000,
                cache: 126 << 20,
                ..hopper
            },
            Self::Rtx4090 => Specification {
                capability: 89,
                multiprocessors: 128,
                shared_per_block: 99 * KIB,
                shared_per_multiprocessor: 100 * KIB,
                warps: 48,
                blocks: 24,
                memory: 24 << 30,
                cache: 72 << 20,
            },
        }
    }

    /// Blocks that a multiprocessor holds at once, of `threads` threads with so many registers a thread and bytes of shared memory.
    pub fn resident(self, threads: usize, registers: usize, shared: usize) -> usize {
        let it = self.specification();
        let warps = threads.div_ceil(WARP).max(1);
        // Registers are handed out to warps in units of 256; the system keeps 1 KiB of each block's shared memory.
        let per_warp = (registers * WARP).next_multiple_of(256).max(256);
        let by_registers = REGISTERS / per_warp / warps;
        let by_shared = it.shared_per_multiprocessor / (shared + KIB);
        (it.warps / warps).min(by_registers).min(by_shared).min(it.blocks)
    }

    /// Warps that run at once on a multiprocessor over those it can hold; see [`Self::resident`].
    pub fn occupancy(self, threads: usize, registers: usize, shared: usize) -> f64 {
        let blocks = self.resident(threads, registers, shared);
        (blocks * threads.div_ceil(WARP)) as f64 / self.specification().warps as f64
    }

    /// What CubeCL's CUDA compiler is told on this GPU.
    pub(crate) fn compilation_options(self) -> CompilationOptions {
        let capability = self.specification().capability;
        CompilationOptions {
            warp_size: WARP as u32,
            supports_features: CppSupportedFeatures {
                grid_constants: capability >= 70,
                clusters: capability >= 90,
                fast_math: true,
                fast_tanh: capability >= 75,
                elect_sync: capability >= 90,
            },
        }
    }

    /// What CubeCL's CUDA runtime reports on this GPU.
    pub fn properties(self) -> DeviceProperties {
        let it = self.specification();
        let hardware = HardwareProperties {
            load_width: 128,
            plane_size_min: WARP as u32,
            plane_size_max: WARP as u32,
            max_bindings: 1024,
            max_shared_memory_size: it.shared_per_block,
            max_cube_count: (i32::MAX as u32, u16::MAX.into(), u16::MAX.into()),
            max_units_per_cube: 1024,
            max_cube_dim: (1024, 1024, 64),
            num_streaming_multiprocessors: Some(it.multiprocessors),
            num_tensor_cores: Some(4),
            min_tensor_cores_dim: Some(8),
            num_cpu_cores: None,
            max_vector_size: VectorSize::MAX,
        };
        let memory = MemoryDeviceProperties { max_page_size: it.memory / 4, alignment: ALIGNMENT };
        let mut properties = DeviceProperties::new(Default::default(), memory, hardware, TimingMethod::System);
        register_types(&mut properties, it.capability);
        register_features(&mut properties, it.capability);
        properties
    }
}

/// Bytes to which CubeCL's CUDA runtime aligns buffers.
pub(crate) const ALIGNMENT: u64 = 512;

fn register_types(properties: &mut DeviceProperties, capability: u32) {
    let atomic = |kind, width| Type::new(StorageType::Atomic(ElemType::Float(kind))).with_vector_size(width);
    let add = AtomicUsage::Add | AtomicUsage::LoadStore;
    cubecl_cpp::register_supported_types(properties);
    properties.register_type_usage(ElemType::Float(FloatKind::TF32), TypeUsage::Conversion);
    properties.register_atomic_type_usage(atomic(FloatKind::F64, 1), add);
    properties.register_atomic_type_usage(atomic(FloatKind::F16, 1), add);
    properties.register_atomic_type_usage(atomic(FloatKind::F16, 2), add);
    properties.register_semantic_type(SemanticType::Pipeline);
    for level in [BarrierLevel::Unit, BarrierLevel::Cube] {
        properties.register_type_usage(OpaqueType::Barrier(level), TypeUsage::Buffer);
    }
    if capability >= 89 {
        for kind in [FloatKind::E4M3, FloatKind::E5M2] {
            properties.register_type_usage(ElemType::Float(kind), TypeUsage::Conversion | TypeUsage::Buffer);
        }
    }
    if capability >= 90 {
        properties.register_semantic_type(SemanticType::TensorMap);
        properties.register_atomic_type_usage(atomic(FloatKind::F32, 2), add);
        properties.register_atomic_type_usage(atomic(FloatKind::F32, 4), add);
    }
}

fn register_features(properties: &mut DeviceProperties, capability: u32) {
    let arch = CudaArchitecture { version: capability };
    let features = &mut properties.features;
    for plane in [Plane::Ops, Plane::Sync, Plane::NonUniformControlFlow] {
        features.plane.insert(plane);
    }
    for kind in [FloatKind::F16, FloatKind::BF16] {
        features.matmul.ldmatrix.insert(ElemType::Float(kind).into());
        if capability >= 90 {
            features.matmul.stmatrix.insert(ElemType::Float(kind).into());
        }
    }
    features.copy_async = true;
    features.memory_reinterpret = true;
    features.alignment = true;
    if capability >= 90 {
        features.tma.insert(Tma::Base);
        features.cube_cluster = true;
    }
    if capability >= 100 {
        features.tma.insert(Tma::Im2colWide);
    }
    register_wmma_features(<Wmma as DialectWmmaCompiler<Dialect>>::supported_wmma_combinations(&arch), properties);
    register_mma_features(<Wmma as DialectWmmaCompiler<Dialect>>::supported_mma_combinations(&arch), properties);
    register_scaled_mma_features(
        <Wmma as DialectWmmaCompiler<Dialect>>::supported_scaled_mma_combinations(&arch),
        properties,
    );
}

impl std::fmt::Display for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::A100 => "a100",
            Self::H100 => "h100",
            Self::H200 => "h200",
            Self::B200 => "b200",
            Self::Rtx4090 => "rtx4090",
        })
    }
}

impl std::str::FromStr for Gpu {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = || Self::ALL.map(|gpu| gpu.to_string());
        let found = Self::ALL.into_iter().zip(names()).find(|(_, name)| name == text);
        found.map(|(gpu, _)| gpu).ok_or_else(|| format!("unknown GPU {text:?}, expected one of {}", names().join(", ")))
    }
}
