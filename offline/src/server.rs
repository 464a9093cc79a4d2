//! The server behind the client: streams with memory of their own, and launches that they run.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

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
use cubecl_runtime::memory_management::{ManagedMemoryHandle, MemoryAllocationMode, MemoryUsage};
use cubecl_runtime::server::{
    Binding, ComputeServer, CopyDescriptor, CubeCount, ExecutionMode, KernelArguments, ProfileError, ProfilingToken,
    ServerCommunication, ServerError, ServerUtilities,
};
use cubecl_runtime::storage::ManagedResource;
use cubecl_runtime::stream::MultiStream;
use cubecl_runtime::timestamp_profiler::TimestampProfiler;
use cubecl_runtime::validation::{validate_cube_dim, validate_units};

use crate::compile::Architecture;
use crate::device::{Execution, OfflineDevice};
use crate::execute::{Launch, execute};
use crate::gpu::ALIGNMENT;
use crate::memory::{HostBuffer, HostStorage};
use crate::profile::sample;
use crate::stream::Backend;
use crate::target::{TargetCompiler, TargetOptions};
use crate::{Error, Fault, Finding, Kernel, LaunchReport, Options, Space};

/// The server of an [`OfflineDevice`].
pub struct OfflineServer {
    device: OfflineDevice,
    streams: MultiStream<Backend>,
    utilities: Arc<ServerUtilities<Self>>,
    timestamps: TimestampProfiler,
    kernels: HashMap<KernelId, Arc<Kernel>>,
    /// What launches failed with since the last flush.
    errors: Errors,
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
        let order = device.options().shuffled.then(|| device.next_seed());
        let backend = Backend::new(order, properties.memory.clone(), logger.clone());
        let streams = MultiStream::new(logger.clone(), backend, STREAMS);
        let policy = PitchedMemoryLayoutPolicy::new(ALIGNMENT as usize);
        Self {
            device,
            streams,
            utilities: Arc::new(ServerUtilities::new(properties, logger, (), policy)),
            timestamps: TimestampProfiler::default(),
            kernels: HashMap::new(),
            errors: Errors::default(),
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
    /// The buffers of bindings; from now on the stream waits for what others were to do with them.
    fn buffers(&mut self, stream: StreamId, bindings: Vec<Binding>) -> Result<Vec<HostBuffer>, ServerError> {
        let mut streams = self.streams.resolve(stream, bindings.iter(), false)?;
        let buffer =
            |it: Binding| Ok(streams.get(&it.stream).memory.get_resource(it.memory, it.offset_start, it.offset_end)?);
        bindings.into_iter().map(buffer).collect()
    }

    fn buffer(&mut self, stream: StreamId, binding: Binding) -> Result<HostBuffer, ServerError> {
        let found = self.buffers(stream, vec![binding])?.pop();
        found.ok_or_else(|| ServerError::Generic { reason: "no buffer".into(), backtrace: BackTrace::capture() })
    }

    /// Hands `task` to a stream.
    fn give(&mut self, stream: StreamId, task: impl FnOnce() + Send + 'static) {
        match self.streams.resolve(stream, [].into_iter(), false) {
            Ok(mut streams) => streams.current().give(task),
            Err(error) => self.errors.push(error),
        }
    }

    /// Returns when the stream has done all that it was given.
    fn finish(&mut self, stream: StreamId) -> Result<(), ServerError> {
        self.streams.resolve(stream, [].into_iter(), false)?.current().finish();
        Ok(())
    }

    fn take_errors(&mut self) -> Result<(), ServerError> {
        match self.errors.take() {
            errors if errors.is_empty() => Ok(()),
            errors => Err(ServerError::ServerUnhealthy { errors, backtrace: BackTrace::capture() }),
        }
    }

    fn read_all(&mut self, descriptors: Vec<CopyDescriptor>, stream: StreamId) -> Result<Vec<Bytes>, ServerError> {
        let rows: Vec<_> = descriptors.iter().map(Rows::of).collect();
        let buffers = self.buffers(stream, descriptors.into_iter().map(|it| it.handle).collect())?;
        self.finish(stream)?;
        self.take_errors()?;
        let packed = |(buffer, rows): (HostBuffer, Rows)| {
            let bytes = buffer.read();
            Bytes::from_bytes_vec(rows.starts().flat_map(|at| bytes[at..][..rows.width].iter().copied()).collect())
        };
        Ok(buffers.into_iter().zip(rows).map(packed).collect())
    }

    fn write_one(&mut self, descriptor: CopyDescriptor, data: Bytes, stream: StreamId) -> Result<(), ServerError> {
        let rows = Rows::of(&descriptor);
        let buffer = self.buffer(stream, descriptor.handle)?;
        self.give(stream, move || {
            for (start, row) in rows.starts().zip(data.chunks(rows.width.max(1))) {
                buffer.write(start, row);
            }
        });
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

    fn count(&mut self, count: CubeCount, stream: StreamId) -> Result<[u32; 3], ServerError> {
        match count {
            CubeCount::Static(x, y, z) => Ok([x, y, z]),
            CubeCount::Dynamic(binding) => {
                let buffer = self.buffer(stream, binding)?;
                self.finish(stream)?;
                let bytes = buffer.read();
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
        stream: StreamId,
    ) -> Result<(), ServerError> {
        let count = self.count(count, stream)?;
        if self.device.options().execution == Execution::Dropped {
            if count.contains(&0) {
                return Err(generic(&Error::Exceeds {
                    kernel: task.name().into(),
                    what: "blocks",
                    value: 0,
                    limit: 0,
                }));
            }
            return self.buffers(stream, arguments.buffers).map(drop);
        }
        let info: Vec<u64> = arguments.info.data.to_vec();
        let kernel = self.kernel(task, mode, size_of_val(info.as_slice()))?;
        let limit = self.utilities.properties.hardware.max_shared_memory_size;
        if kernel.shared > limit {
            let (value, kernel) = (kernel.shared, kernel.entry.clone());
            return Err(generic(&Error::Exceeds { kernel, what: "shared memory", value, limit }));
        }
        let tensor_maps = !arguments.tensor_maps.is_empty();
        let buffers = self.buffers(stream, arguments.buffers)?;
        let dynamic = arguments.info.dynamic_metadata_offset;
        let report = LaunchReport {
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
            stream: stream.value,
            allocations: self.device.take_allocations(),
            counts: None,
            executed: false,
        };
        let (device, errors) = (self.device.clone(), self.errors.clone());
        self.give(stream, move || {
            let mut report = report;
            let (architecture, rolled) = (Architecture::of(device.options().gpu), device.options().rolled_loops);
            let launch = Launch { architecture, rolled, buffers: &buffers, info: &info, dynamic };
            let result = run(&device, &launch, tensor_maps, &mut report);
            device.report(report);
            if let Err(error) = result {
                errors.push(generic(&error));
            }
        });
        Ok(())
    }
}

/// Runs a launch as the device's options say.
fn run(device: &OfflineDevice, launch: &Launch<'_>, tensor_maps: bool, report: &mut LaunchReport) -> Result<(), Error> {
    let options = device.options();
    match options.execution {
        Execution::Skipped | Execution::Dropped => Ok(()),
        _ if tensor_maps => {
            let (kernel, reason) = (report.kernel.entry.clone(), "it takes tensor maps".to_string());
            Err(Error::NotExecutable { kernel, reason })
        }
        Execution::Counted => sample::run(launch, options.gpu, device.next_blocks(), report),
        Execution::Watched => {
            let unwritten = |fault: &Fault| matches!(fault.finding, Finding::Unwritten { space: Space::Buffer { .. } });
            match execute(launch, report) {
                Err(Error::Faults { .. }) if options.unwritten_loads && report.faults.iter().all(unwritten) => Ok(()),
                result => result,
            }
        }
    }
}

/// Streams that a device has: as many as CubeCL's CUDA by default.
const STREAMS: u8 = 128;

/// What failed, in whatever stream.
#[derive(Clone, Default)]
struct Errors(Arc<Mutex<Vec<ServerError>>>);

impl Errors {
    fn push(&self, error: ServerError) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(error);
    }

    fn take(&self) -> Vec<ServerError> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
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

    fn initialize_memory(&mut self, memory: ManagedMemoryHandle, size: u64, stream: StreamId) {
        self.device.allocates();
        let bound = self.streams.resolve(stream, [].into_iter(), false).and_then(|mut streams| {
            let cursor = streams.cursor;
            let own = &mut streams.current().memory;
            let reserved = own.reserve(size)?;
            own.bind(reserved, memory.clone(), cursor)?;
            Ok(own.get_resource(memory.binding(), None, None)?)
        });
        match bound {
            // Memory that nothing reads is not touched, however large it is.
            Ok(_) if matches!(self.device.options().execution, Execution::Skipped | Execution::Dropped) => {}
            Ok(buffer) => self.give(stream, move || buffer.forget()),
            Err(error) => self.errors.push(error),
        }
    }

    fn logger(&self) -> Arc<ServerLogger> {
        self.utilities.logger.clone()
    }

    fn utilities(&self) -> Arc<ServerUtilities<Self>> {
        self.utilities.clone()
    }

    fn read(&mut self, descriptors: Vec<CopyDescriptor>, stream: StreamId) -> DynFut<Result<Vec<Bytes>, ServerError>> {
        let result = self.read_all(descriptors, stream);
        Box::pin(async move { result })
    }

    fn write(&mut self, descriptors: Vec<(CopyDescriptor, Bytes)>, stream: StreamId) {
        for (descriptor, data) in descriptors {
            if let Err(error) = self.write_one(descriptor, data, stream) {
                self.errors.push(error);
            }
        }
    }

    fn sync(&mut self, stream: StreamId) -> DynFut<Result<(), ServerError>> {
        let result = self.finish(stream).and_then(|()| self.take_errors());
        Box::pin(async move { result })
    }

    fn get_resource(&mut self, binding: Binding, stream: StreamId) -> Result<ManagedResource<HostBuffer>, ServerError> {
        let memory = binding.memory.clone();
        Ok(ManagedResource::new(memory, self.buffer(stream, binding)?))
    }

    unsafe fn launch(
        &mut self,
        kernel: Self::Kernel,
        count: CubeCount,
        arguments: KernelArguments,
        mode: ExecutionMode,
        stream: StreamId,
    ) {
        if let Err(error) = self.launch_checked(kernel, count, arguments, mode, stream) {
            self.errors.push(error);
        }
    }

    fn flush(&mut self, _: StreamId) -> Result<(), ServerError> {
        self.take_errors()
    }

    fn memory_usage(&mut self, stream: StreamId) -> Result<MemoryUsage, ServerError> {
        Ok(self.streams.resolve(stream, [].into_iter(), false)?.current().memory.memory_usage())
    }

    fn memory_cleanup(&mut self, stream: StreamId) {
        if let Ok(mut streams) = self.streams.resolve(stream, [].into_iter(), false) {
            streams.current().memory.cleanup(true);
        }
    }

    fn start_profile(&mut self, _: StreamId) -> Result<ProfilingToken, ServerError> {
        Ok(self.timestamps.start())
    }

    fn end_profile(&mut self, _: StreamId, token: ProfilingToken) -> Result<ProfileDuration, ProfileError> {
        self.timestamps.stop(token)
    }

    fn allocation_mode(&mut self, mode: MemoryAllocationMode, stream: StreamId) {
        if let Ok(mut streams) = self.streams.resolve(stream, [].into_iter(), false) {
            streams.current().memory.mode(mode);
        }
    }
}
