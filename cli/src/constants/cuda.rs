//! Measures constants on a CUDA device: the kernels as NVRTC compiles them there, launched without CubeCL, timed by events.

use std::sync::Arc;
use std::time::Instant;

use cubecl::future::block_on;
use cubecl::prelude::*;
use cudarc::driver::sys::{CUdevice_attribute, CUevent_flags};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaSlice, CudaStream, DeviceRepr, DriverError, LaunchConfig, PushKernelArg,
};
use cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
use serde_json::{Map, json};
use ultramem_offline::constants::{Data, Grid, LINE, Probe, Runs, SINK, chain, scalars, source};

use super::Found;
use crate::backend::{Adapter, Job, cuda_adapters};
use crate::failure::{Failure, Result};

/// Runs of which the shortest counts.
const SAMPLES: usize = 7;
/// Launches of a queue.
const QUEUE: usize = 200;
/// Rounds of a kernel that takes a while, so that a queue of it is never empty: some 100 µs.
const WHILE: u32 = 640;

/// A device's constants: those of `probes`, its clock, and what launches cost.
pub fn measured(probes: impl Iterator<Item = Probe>) -> Result<Found> {
    // Says what is missing, before anything panics for want of it.
    let adapters = cuda_adapters()?;
    let adapter: &Adapter = adapters.first().ok_or_else(|| Failure::new("no CUDA device found"))?;
    let device = Device::new()?;
    let (mut constants, mut failed) = (Map::new(), Vec::new());
    let mut keep = |constant: &str, found: Result<f64>| match found {
        Ok(value) if value.is_finite() && value > 0.0 => {
            constants.insert(constant.to_string(), json!(value));
            Some(value)
        }
        Ok(value) => {
            failed.push(format!("{constant}: {value} is no number above 0"));
            None
        }
        Err(error) => {
            failed.push(format!("{constant}: {error}"));
            None
        }
    };
    let clock = keep("clock", device.clock()).ok_or_else(|| Failure::new("the clock could not be measured"))?;
    for probe in probes {
        let value = device.runs(&probe).map(|runs| probe.value(runs, clock, device.multiprocessors));
        keep(probe.constant, value);
    }
    keep("launch_gap", device.launch_gap());
    keep("lone_launch", device.lone_launch());
    keep("host_task", adapter.with_client(Tasks));
    Ok((adapter.name.clone(), constants, failed))
}

struct Device {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    multiprocessors: u32,
    architecture: String,
}

/// What a kernel works on.
struct Buffers {
    data: CudaSlice<u8>,
    sink: CudaSlice<u8>,
}

/// The last parameter of a kernel.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Scalars([u8; 16]);

// SAFETY: it is what the kernels' structure of a 64-bit and two 32-bit numbers is.
unsafe impl DeviceRepr for Scalars {}

impl Device {
    fn new() -> Result<Self> {
        let context = CudaContext::new(0).map_err(driver)?;
        let stream = context.new_stream().map_err(driver)?;
        let count = context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT).map_err(driver)?;
        let (major, minor) = context.compute_capability().map_err(driver)?;
        let architecture = format!("--gpu-architecture=compute_{major}{minor}");
        Ok(Self { context, stream, multiprocessors: count.unsigned_abs(), architecture })
    }

    fn function(&self, entry: &str) -> Result<CudaFunction> {
        let options = CompileOptions { options: vec![self.architecture.clone()], ..CompileOptions::default() };
        let ptx = compile_ptx_with_opts(source(entry), options)
            .map_err(|error| Failure::new(format!("NVRTC on {entry}: {error}")))?;
        let module = self.context.load_module(ptx).map_err(driver)?;
        module.load_function(entry).map_err(driver)
    }

    fn buffers(&self, data: Data) -> Result<Buffers> {
        let sink = self.stream.alloc_zeros(SINK).map_err(driver)?;
        let Data::Chain(bytes) = data else {
            let Data::Zeros(bytes) = data else { unreachable!("the other kind") };
            return Ok(Buffers { data: self.stream.alloc_zeros(bytes).map_err(driver)?, sink });
        };
        let mut places = vec![0u8; bytes];
        for (place, next) in chain(bytes) {
            places[place..place + 8].copy_from_slice(&(next as u64).to_le_bytes());
        }
        let data = self.stream.clone_htod(&places).map_err(driver)?;
        let mut buffers = Buffers { data, sink };
        let blocks = (bytes / LINE).div_ceil(256) as u32;
        self.launch(&self.function("link")?, &mut buffers, (blocks, 256), 0)?;
        self.stream.synchronize().map_err(driver)?;
        Ok(buffers)
    }

    fn launch(&self, function: &CudaFunction, buffers: &mut Buffers, of: (u32, u32), rounds: u32) -> Result<()> {
        let scalars = Scalars(scalars(buffers.data.len(), rounds));
        let config = LaunchConfig { grid_dim: (of.0, 1, 1), block_dim: (of.1, 1, 1), shared_mem_bytes: 0 };
        let mut launch = self.stream.launch_builder(function);
        launch.arg(&mut buffers.data).arg(&mut buffers.sink).arg(&scalars);
        // SAFETY: the kernels stay within the buffers that their probe asks for.
        unsafe { launch.launch(config) }.map_err(driver)?;
        Ok(())
    }

    /// Microseconds of what `work` puts into the stream.
    fn micros(&self, work: impl FnOnce() -> Result<()>) -> Result<f64> {
        let event = || self.context.new_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(driver);
        let (start, end) = (event()?, event()?);
        start.record(&self.stream).map_err(driver)?;
        work()?;
        end.record(&self.stream).map_err(driver)?;
        end.synchronize().map_err(driver)?;
        Ok(f64::from(start.elapsed_ms(&end).map_err(driver)?) * 1000.0)
    }

    /// The shortest of some runs, in turn with the other kind.
    fn runs(&self, probe: &Probe) -> Result<Runs> {
        let function = self.function(probe.entry)?;
        let mut buffers = self.buffers(probe.data)?;
        let of = (probe.blocks(self.multiprocessors), probe.threads);
        let mut best = [f64::INFINITY; 2];
        for _ in 0..SAMPLES {
            for (best, rounds) in best.iter_mut().zip([probe.rounds, 2 * probe.rounds]) {
                *best = best.min(self.micros(|| self.launch(&function, &mut buffers, of, rounds))?);
            }
        }
        let [short, long] = best;
        Ok(Runs { rounds: probe.rounds, short, long })
    }

    /// Cycles of a nanosecond, under a load on every multiprocessor.
    fn clock(&self) -> Result<f64> {
        let function = self.function("clock")?;
        let mut buffers = self.buffers(Data::Zeros(LINE))?;
        let mut best = 0.0f64;
        for _ in 0..SAMPLES {
            // Some 10 ms, beside which a launch is nothing.
            let of = (self.multiprocessors, 512);
            let micros = self.micros(|| self.launch(&function, &mut buffers, of, 1 << 16))?;
            let sink = self.stream.clone_dtoh(&buffers.sink).map_err(driver)?;
            let cycles = u64::from_le_bytes(sink[..8].try_into().unwrap_or_default());
            best = best.max(cycles as f64 / micros / 1000.0);
        }
        Ok(best)
    }

    /// Microseconds from one launch of a full queue to the next, less what each takes by itself.
    fn launch_gap(&self) -> Result<f64> {
        let probe = Probe { rounds: WHILE, ..lone() };
        let runs = self.runs(&probe)?;
        let function = self.function(probe.entry)?;
        let mut buffers = self.buffers(probe.data)?;
        let queue = self
            .micros(|| (0..QUEUE).try_for_each(|_| self.launch(&function, &mut buffers, (1, probe.threads), WHILE)))?;
        Ok(queue / QUEUE as f64 - (runs.long - runs.short))
    }

    /// Microseconds of a launch that does nothing, from the call until the host knows of its end.
    fn lone_launch(&self) -> Result<f64> {
        let probe = lone();
        let function = self.function(probe.entry)?;
        let mut buffers = self.buffers(probe.data)?;
        let mut best = f64::INFINITY;
        for _ in 0..QUEUE {
            let start = Instant::now();
            self.launch(&function, &mut buffers, (1, probe.threads), 0)?;
            self.stream.synchronize().map_err(driver)?;
            best = best.min(micros(start));
        }
        Ok(best)
    }
}

fn micros(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e6
}

/// Next to nothing.
#[cube(launch_unchecked)]
fn mark(output: &mut Array<u32>) {
    output[UNIT_POS as usize] = UNIT_POS;
}

/// What the host takes for a launch by CubeCL.
struct Tasks;

impl Job for Tasks {
    type Output = f64;

    fn run<R: Runtime>(self, client: &ComputeClient<R>) -> Result<f64> {
        let output = client.empty(4 * 32);
        let mut best = f64::INFINITY;
        for _ in 0..SAMPLES {
            let start = Instant::now();
            for _ in 0..QUEUE {
                // SAFETY: the buffer has a number for each unit.
                unsafe {
                    let output = ArrayArg::from_raw_parts(output.clone(), 32);
                    mark::launch_unchecked::<R>(client, CubeCount::Static(1, 1, 1), CubeDim::new_1d(32), output);
                }
            }
            block_on(client.sync())?;
            best = best.min(micros(start));
        }
        Ok(best / QUEUE as f64)
    }
}

/// A kernel of one warp, which does nothing where it has no rounds.
fn lone() -> Probe {
    let alu = super::probes().find(|probe| probe.constant == "latency_alu");
    alu.filter(|probe| probe.grid == Grid::One).expect("it is one of the constants")
}

fn driver(error: DriverError) -> Failure {
    let reason = error.error_string().map_or_else(|_| format!("{:?}", error.0), |it| it.to_string_lossy().into_owned());
    Failure::new(format!("the CUDA driver: {reason}"))
}
