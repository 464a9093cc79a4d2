//! The server behind the client: memory, and launches that run to their end before they return.

use std::collections::HashMap;
use std::sync::Arc;

use cubecl::server::LaunchError;
use cubecl_common::device::Device;
use cubecl_common::{
    backtrace::BackTrace, bytes::Bytes, device::DeviceId, device::DeviceService, future::DynFut,
    profile::ProfileDuration, stream_id::StreamId,
};
use cubecl_runtime::allocator::PitchedMemoryLayoutPolicy;
use cubecl_runtime::compiler::CubeTask;
use cubecl_runtime::id::KernelId;
use cubecl_runtime::kernel::KernelMetadata;
use cubecl_runtime::logging::ServerLogger;
use cubecl_runtime::memory_management::{
    ManagedMemoryHandle, MemoryAllocationMode, MemoryConfiguration, MemoryManagement, MemoryManagementOptions,
    MemoryUsage,
};
use cubecl_runtime::server::{
    Binding, ComputeServer, CopyDescriptor, CubeCount, ExecutionMode, KernelArguments, ProfileError, ProfilingToken,
    ServerCommunication, ServerError, ServerUtilities,
};
use cubecl_runtime::storage::ManagedResource;
use cubecl_runtime::timestamp_profiler::TimestampProfiler;
use cubecl_runtime::validation::{validate_cube_dim, validate_units};

use crate::compile::Architecture;
use crate::device::{Execution, OfflineDevice};
use crate::execute::{Launch, execute};
use crate::gpu::ALIGNMENT;
use crate::memory::{HostBuffer, HostStorage};
use crate::profile::sample;
use crate::target::{TargetCompiler, TargetOptions};
use crate::{Error, Fault, Finding, Kernel, LaunchReport, Options, Space};

/// The server of an [`OfflineDevice`].
pub struct OfflineServer {
    device: OfflineDevice,
    memory: MemoryManagement<HostStorage>,
    utilities: Arc<ServerUtilities<Self>>,
    timestamps: TimestampProfiler,
    kernels: HashMap<KernelId, Arc<Kernel>>,
    /// What launches failed with since the last flush.
    errors: Vec<ServerError>,
    /// Pieces of memory that were asked for since the last launch.
    allocations: usize,
}

impl std::fmt::Debug for OfflineServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "OfflineServer of {:?}", self.device)
    }
}

impl DeviceService for OfflineServer {
    fn init(id: DeviceId) -> Self {
        let device = OfflineDevice::from_id(id);
        let Options { gpu, target, adapter, .. } = device.options();
        let mut properties = target.properties(gpu);
        if let Some(adapter) = adapter {
            adapter.alter(&mut properties);
        }
        let logger = Arc::new(ServerLogger::default());
        let memory = MemoryManagement::from_configuration(
            HostStorage::default(),
            &properties.memory,
            MemoryConfiguration::ExclusivePages,
            logger.clone(),
            MemoryManagementOptions::new("offline device"),
        );
        let policy = PitchedMemoryLayoutPolicy::new(ALIGNMENT as usize);
        Self {
            device,
            memory,
            utilities: Arc::new(ServerUtilities::new(properties, logger, (), policy)),
            timestamps: TimestampProfiler::default(),
            kernels: HashMap::new(),
            errors: Vec::new(),
            allocations: 0,
        }
    }

    fn utilities(&self) -> Arc<dyn std::any::Any + Send + Sync> {
        self.utilities.clone()
    }
}

impl ServerCommunication for OfflineServer {
    const SERVER_COMM_ENABLED: bool = false;
}

impl OfflineServer {
    fn buffer(&mut self, binding: Binding) -> Result<HostBuffer, ServerError> {
        Ok(self.memory.get_resource(binding.memory, binding.offset_start, binding.offset_end)?)
    }

    fn take_errors(&mut self) -> Result<(), ServerError> {
        match std::mem::take(&mut self.errors) {
            errors if errors.is_empty() => Ok(()),
            errors => Err(ServerError::ServerUnhealthy { errors, backtrace: BackTrace::capture() }),
        }
    }

    fn read_all(&mut self, descriptors: Vec<CopyDescriptor>) -> Result<Vec<Bytes>, ServerError> {
        self.take_errors()?;
        descriptors.into_iter().map(|descriptor| self.read_one(descriptor)).collect()
    }

    fn read_one(&mut self, descriptor: CopyDescriptor) -> Result<Bytes, ServerError> {
        let rows = Rows::of(&descriptor);
        let bytes = self.buffer(descriptor.handle)?.read();
        let packed = rows.starts().flat_map(|start| bytes[start..][..rows.width].iter().copied()).collect();
        Ok(Bytes::from_bytes_vec(packed))
    }

    fn write_one(&mut self, descriptor: CopyDescriptor, data: &[u8]) -> Result<(), ServerError> {
        let rows = Rows::of(&descriptor);
        let buffer = self.buffer(descriptor.handle)?;
        for (start, row) in rows.starts().zip(data.chunks(rows.width.max(1))) {
            buffer.write(start, row);
        }
        Ok(())
    }

    /// The kernel behind a task, compiled once.
    fn kernel(
        &mut self,
        task: Box<dyn CubeTask<TargetCompiler>>,
        mode: ExecutionMode,
        info: usize,
    ) -> Result<Arc<Kernel>, LaunchError> {
        let mut id = task.id();
        id.mode(mode);
        if let Some(kernel) = self.kernels.get(&id) {
            return Ok(kernel.clone());
        }
        validate_cube_dim(&self.utilities.properties, &id)?;
        validate_units(&self.utilities.properties, &id)?;
        let Options { gpu, target, .. } = self.device.options();
        let options = TargetOptions { target, cuda: gpu.compilation_options() };
        let compiled = task.compile(&mut TargetCompiler, &options, mode, task.address_type())?;
        let code = compiled.repr;
        let kernel = Arc::new(Kernel {
            name: task.name().to_string(),
            entry: compiled.entrypoint_name,
            source: compiled.source,
            binary: code.as_ref().and_then(|code| code.binary.clone()),
            dim: [compiled.cube_dim.x, compiled.cube_dim.y, compiled.cube_dim.z],
            shared: code.as_ref().map_or(0, |code| code.shared),
            buffers: code.map_or_else(Vec::new, |code| code.buffers),
            info,
        });
        self.kernels.insert(id, kernel.clone());
        Ok(kernel)
    }

    fn count(&mut self, count: CubeCount) -> Result<[u32; 3], ServerError> {
        match count {
            CubeCount::Static(x, y, z) => Ok([x, y, z]),
            CubeCount::Dynamic(binding) => {
                let bytes = self.buffer(binding)?.read();
                let word = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|byte| bytes[4 * at + byte]));
                Ok([0, 1, 2].map(word))
            }
        }
    }

    fn launch_checked(
        &mut self,
        task: Box<dyn CubeTask<TargetCompiler>>,
        count: CubeCount,
        arguments: KernelArguments,
        mode: ExecutionMode,
    ) -> Result<(), ServerError> {
        let count = self.count(count)?;
        if self.device.options().execution == Execution::Dropped {
            if count.contains(&0) {
                return Err(generic(&Error::Exceeds {
                    kernel: task.name().into(),
                    what: "blocks",
                    value: 0,
                    limit: 0,
                }));
            }
            return arguments.buffers.into_iter().try_for_each(|it| self.buffer(it).map(drop));
        }
        let info: Vec<u64> = arguments.info.data.to_vec();
        let kernel = self.kernel(task, mode, size_of_val(info.as_slice()))?;
        let limit = self.utilities.properties.hardware.max_shared_memory_size;
        if kernel.shared > limit {
            let (value, kernel) = (kernel.shared, kernel.entry.clone());
            return Err(generic(&Error::Exceeds { kernel, what: "shared memory", value, limit }));
        }
        let tensor_maps = !arguments.tensor_maps.is_empty();
        let buffers = arguments.buffers.into_iter().map(|it| self.buffer(it)).collect::<Result<Vec<_>, _>>()?;
        let options = self.device.options();
        let mut report = LaunchReport {
            kernel,
            count,
            lengths: buffers.iter().map(|buffer| buffer.length() as u64).collect(),
            words: info.clone(),
            seed: self.device.next_seed(),
            traffic: Vec::new(),
            faults: Vec::new(),
            gaps: Vec::new(),
            products: 0,
            loops: 0,
            allocations: std::mem::take(&mut self.allocations),
            counts: None,
            executed: false,
        };
        let result = match options.execution {
            Execution::Skipped | Execution::Dropped => Ok(()),
            _ if tensor_maps => {
                let (kernel, reason) = (report.kernel.entry.clone(), "it takes tensor maps".to_string());
                Err(Error::NotExecutable { kernel, reason })
            }
            Execution::Counted => {
                let (architecture, dynamic) = (Architecture::of(options.gpu), arguments.info.dynamic_metadata_offset);
                let (buffers, info, rolled) = (buffers.as_slice(), info.as_slice(), options.rolled_loops);
                let launch = Launch { architecture, rolled, buffers, info, dynamic };
                sample::run(&launch, options.gpu, self.device.next_blocks(), &mut report)
            }
            Execution::Watched => {
                let dynamic = arguments.info.dynamic_metadata_offset;
                let architecture = Architecture::of(options.gpu);
                let (buffers, info, rolled) = (buffers.as_slice(), info.as_slice(), options.rolled_loops);
                let result = execute(&Launch { architecture, rolled, buffers, info, dynamic }, &mut report);
                let unwritten =
                    |fault: &Fault| matches!(fault.finding, Finding::Unwritten { space: Space::Buffer { .. } });
                match result {
                    Err(Error::Faults { .. }) if options.unwritten_loads && report.faults.iter().all(unwritten) => {
                        Ok(())
                    }
                    result => result,
                }
            }
        };
        self.device.report(report);
        result.map_err(|error| generic(&error))
    }
}

fn generic(error: &Error) -> ServerError {
    ServerError::Generic { reason: error.to_string(), backtrace: BackTrace::capture() }
}

/// The rows of a tensor whose last dimension is contiguous and whose rows may be padded.
struct Rows {
    width: usize,
    count: usize,
    pitch: usize,
}

impl Rows {
    fn of(descriptor: &CopyDescriptor) -> Self {
        let CopyDescriptor { shape, strides, elem_size, .. } = descriptor;
        let rank = shape.len();
        let width = shape.last().copied().unwrap_or(1) * elem_size;
        let count = shape.iter().rev().skip(1).product();
        let pitch = if rank > 1 { strides[rank - 2] * elem_size } else { width };
        Self { width, count, pitch }
    }

    fn starts(&self) -> impl Iterator<Item = usize> + use<> {
        let pitch = self.pitch;
        (0..self.count).map(move |row| row * pitch)
    }
}

impl ComputeServer for OfflineServer {
    type Kernel = Box<dyn CubeTask<TargetCompiler>>;
    type Info = ();
    type MemoryLayoutPolicy = PitchedMemoryLayoutPolicy;
    type Storage = HostStorage;

    fn initialize_memory(&mut self, memory: ManagedMemoryHandle, size: u64, _: StreamId) {
        self.allocations += 1;
        let bound = self.memory.reserve(size).and_then(|reserved| {
            self.memory.bind(reserved, memory.clone(), 0)?;
            self.memory.get_resource(memory.binding(), None, None)
        });
        match bound {
            // Memory that nothing reads is not touched, however large it is.
            Ok(_) if matches!(self.device.options().execution, Execution::Skipped | Execution::Dropped) => {}
            Ok(buffer) => buffer.forget(),
            Err(error) => self.errors.push(error.into()),
        }
    }

    fn logger(&self) -> Arc<ServerLogger> {
        self.utilities.logger.clone()
    }

    fn utilities(&self) -> Arc<ServerUtilities<Self>> {
        self.utilities.clone()
    }

    fn read(&mut self, descriptors: Vec<CopyDescriptor>, _: StreamId) -> DynFut<Result<Vec<Bytes>, ServerError>> {
        let result = self.read_all(descriptors);
        Box::pin(async move { result })
    }

    fn write(&mut self, descriptors: Vec<(CopyDescriptor, Bytes)>, _: StreamId) {
        for (descriptor, data) in descriptors {
            if let Err(error) = self.write_one(descriptor, &data) {
                self.errors.push(error);
            }
        }
    }

    fn sync(&mut self, _: StreamId) -> DynFut<Result<(), ServerError>> {
        let result = self.take_errors();
        Box::pin(async move { result })
    }

    fn get_resource(&mut self, binding: Binding, _: StreamId) -> Result<ManagedResource<HostBuffer>, ServerError> {
        let memory = binding.memory.clone();
        Ok(ManagedResource::new(memory, self.buffer(binding)?))
    }

    unsafe fn launch(
        &mut self,
        kernel: Self::Kernel,
        count: CubeCount,
        arguments: KernelArguments,
        mode: ExecutionMode,
        _: StreamId,
    ) {
        if let Err(error) = self.launch_checked(kernel, count, arguments, mode) {
            self.errors.push(error);
        }
    }

    fn flush(&mut self, _: StreamId) -> Result<(), ServerError> {
        self.take_errors()
    }

    fn memory_usage(&mut self, _: StreamId) -> Result<MemoryUsage, ServerError> {
        Ok(self.memory.memory_usage())
    }

    fn memory_cleanup(&mut self, _: StreamId) {
        self.memory.cleanup(true);
    }

    fn start_profile(&mut self, _: StreamId) -> Result<ProfilingToken, ServerError> {
        Ok(self.timestamps.start())
    }

    fn end_profile(&mut self, _: StreamId, token: ProfilingToken) -> Result<ProfileDuration, ProfileError> {
        self.timestamps.stop(token)
    }

    fn allocation_mode(&mut self, mode: MemoryAllocationMode, _: StreamId) {
        self.memory.mode(mode);
    }
}
