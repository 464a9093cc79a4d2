//! The words that kernels are compiled to: CUDA C++, or what wgpu would be given, without an adapter.

use std::fmt;

use cubecl::ir::{DeviceProperties, ElemType, StorageType};
use cubecl::prelude::{KernelDefinition, Visibility};
use cubecl_cpp::cuda::{CudaDialect, mma::CudaWmmaCompiler};
use cubecl_cpp::shared::SharedMemory;
use cubecl_cpp::shared::{CompilationOptions, CppCompiler};
use cubecl_runtime::compiler::{CompilationError, Compiler};
use cubecl_runtime::server::ExecutionMode;

use crate::{Argument, Gpu};

/// The compiler of CubeCL's CUDA runtime.
pub type CudaCompiler = CppCompiler<CudaDialect<CudaWmmaCompiler>>;

/// The words that kernels are compiled to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Target {
    /// CUDA C++, as CubeCL's CUDA runtime hands it to NVRTC.
    #[default]
    Cuda,
    /// WebGPU's language, as CubeCL's wgpu runtime hands it to an NVIDIA GPU's adapter.
    #[cfg(feature = "wgpu")]
    Wgsl,
    /// Vulkan's binary, as the wgpu runtime with its SPIR-V compiler makes it for an NVIDIA GPU's adapter.
    #[cfg(feature = "wgpu")]
    SpirV,
}

impl Target {
    /// What the runtime of this target reports on `gpu`.
    pub fn properties(self, gpu: Gpu) -> DeviceProperties {
        match self {
            Self::Cuda => gpu.properties(),
            #[cfg(feature = "wgpu")]
            Self::Wgsl | Self::SpirV => wgpu::properties(gpu),
        }
    }
}

/// A kernel in its target's words.
#[derive(Debug, Clone)]
pub struct Code {
    /// Source; of a binary, its disassembly.
    pub text: String,
    /// SPIR-V.
    pub binary: Option<Vec<u32>>,
    /// Bytes of shared memory.
    pub shared: usize,
    /// The buffers, in order.
    pub buffers: Vec<Argument>,
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// What a compilation depends on besides the kernel.
#[derive(Debug, Default)]
pub struct TargetOptions {
    /// The words.
    pub target: Target,
    /// What the CUDA compiler is told.
    pub cuda: CompilationOptions,
}

/// The compiler of each target, as CubeCL's runtimes use them.
#[derive(Debug, Clone, Default)]
pub struct TargetCompiler;

impl Compiler for TargetCompiler {
    type Representation = Code;
    type CompilationOptions = TargetOptions;

    fn compile(
        &mut self,
        kernel: KernelDefinition,
        options: &TargetOptions,
        mode: ExecutionMode,
        address_type: StorageType,
    ) -> Result<Code, CompilationError> {
        match options.target {
            Target::Cuda => cuda(kernel, &options.cuda, mode, address_type),
            #[cfg(feature = "wgpu")]
            Target::Wgsl => wgpu::wgsl(kernel, mode, address_type),
            #[cfg(feature = "wgpu")]
            Target::SpirV => wgpu::spirv(kernel, mode, address_type),
        }
    }

    fn elem_size(&self, elem: ElemType) -> usize {
        elem.size()
    }

    fn extension(&self) -> &'static str {
        "txt"
    }
}

fn cuda(
    kernel: KernelDefinition,
    options: &CompilationOptions,
    mode: ExecutionMode,
    address_type: StorageType,
) -> Result<Code, CompilationError> {
    let mut kernel = CudaCompiler::default().compile(kernel, options, mode, address_type)?;
    order_shared(&mut kernel.body.shared_memories);
    let argument = |buffer: &cubecl_cpp::shared::KernelArg<_>| Argument {
        element: buffer.item.to_string(),
        size: buffer.item.size(),
        writable: buffer.vis == Visibility::ReadWrite,
    };
    let (shared, buffers) = (kernel.shared_memory_size(), kernel.buffers.iter().map(argument).collect());
    Ok(Code { text: kernel.to_string(), binary: None, shared, buffers })
}

/// Lays shared memories one behind the other in the order of their ids. CubeCL lays them in the order of a hash table, which is another in each
/// process, and a product whose two tiles change places is predicted a fifth faster or slower. Memories that share bytes stay where they are.
fn order_shared(memories: &mut [SharedMemory<CudaDialect<CudaWmmaCompiler>>]) {
    memories.sort_by_key(SharedMemory::offset);
    if memories.windows(2).any(|pair| pair[0].offset() + pair[0].size() > pair[1].offset()) {
        return;
    }
    memories.sort_by_key(|it| match it {
        SharedMemory::Array { index, .. } | SharedMemory::Value { index, .. } => *index,
    });
    let mut end = 0_usize;
    for memory in memories {
        let start = end.next_multiple_of(memory.align());
        end = start + memory.size();
        match memory {
            SharedMemory::Array { offset, .. } | SharedMemory::Value { offset, .. } => *offset = start,
        }
    }
}

#[cfg(feature = "wgpu")]
mod wgpu {
    use cubecl::WgpuCompilationOptions;
    use cubecl::features::{AtomicUsage, Plane, TypeUsage};
    use cubecl::ir::{AddressType, FloatKind, HardwareProperties, IntKind, MemoryDeviceProperties, Type, UIntKind};
    use cubecl_common::profile::TimingMethod;
    use cubecl_spirv::{GLCompute, SpirvCompiler};
    use cubecl_wgpu::WgslCompiler;

    use super::{
        Argument, Code, CompilationError, Compiler, DeviceProperties, ElemType, ExecutionMode, Gpu, KernelDefinition,
        StorageType, Visibility,
    };
    use crate::gpu::WARP;

    fn arguments(kernel: &KernelDefinition) -> Vec<Argument> {
        let argument = |buffer: &cubecl::prelude::KernelArg| Argument {
            element: buffer.ty.to_string(),
            size: buffer.ty.size(),
            writable: buffer.visibility == Visibility::ReadWrite,
        };
        kernel.buffers.iter().map(argument).collect()
    }

    pub fn wgsl(
        kernel: KernelDefinition,
        mode: ExecutionMode,
        address_type: StorageType,
    ) -> Result<Code, CompilationError> {
        let buffers = arguments(&kernel);
        let shader = WgslCompiler::default().compile(kernel, &WgpuCompilationOptions::default(), mode, address_type)?;
        Ok(Code { text: shader.to_string(), binary: None, shared: shader.shared_memory_bytes(), buffers })
    }

    pub fn spirv(
        kernel: KernelDefinition,
        mode: ExecutionMode,
        address_type: StorageType,
    ) -> Result<Code, CompilationError> {
        let buffers = arguments(&kernel);
        let mut options = WgpuCompilationOptions { supports_u64: true, supports_vulkan: true, ..Default::default() };
        options.vulkan.max_spirv_version = (1, 6);
        options.vulkan.supports_uniform_standard_layout = true;
        options.vulkan.supports_explicit_smem = true;
        let module = SpirvCompiler::<GLCompute>::default().compile(kernel, &options, mode, address_type)?;
        let (text, shared) = (module.to_string(), module.shared_size);
        Ok(Code { text, binary: Some(module.assembled_module), shared, buffers })
    }

    /// The limits of NVIDIA's Vulkan driver as WebGPU sees them: planes of 32, 48 KiB of shared memory, bindings below 2 GiB, f16,
    /// neither bf16 nor matrix units.
    pub fn properties(gpu: Gpu) -> DeviceProperties {
        let hardware = HardwareProperties {
            plane_size_min: WARP as u32,
            plane_size_max: WARP as u32,
            max_shared_memory_size: 48 << 10,
            max_cube_count: (65_535, 65_535, 65_535),
            num_streaming_multiprocessors: None,
            num_tensor_cores: None,
            min_tensor_cores_dim: None,
            max_vector_size: 4,
            ..gpu.properties().hardware
        };
        let memory = MemoryDeviceProperties { max_page_size: (2 << 30) - 4, alignment: 256 };
        let mut properties = DeviceProperties::new(Default::default(), memory, hardware, TimingMethod::System);
        properties.register_address_type(AddressType::U32);
        for kind in [FloatKind::F32, FloatKind::F16] {
            properties.register_type_usage(ElemType::Float(kind), TypeUsage::all());
        }
        for elem in [ElemType::UInt(UIntKind::U32), ElemType::Int(IntKind::I32), ElemType::Bool] {
            properties.register_type_usage(elem, TypeUsage::all());
        }
        for elem in [ElemType::UInt(UIntKind::U32), ElemType::Int(IntKind::I32)] {
            let usage = AtomicUsage::LoadStore | AtomicUsage::Add;
            properties.register_atomic_type_usage(Type::new(StorageType::Atomic(elem)), usage);
        }
        properties.features.plane.insert(Plane::Ops);
        properties
    }
}
