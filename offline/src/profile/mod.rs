//! What a launch would cost a GPU, counted: each pipe's time, the caches' and the memory's, and which of them is the longest.
//!
//! A launch's blocks are interpreted and counted ([`ultramem_ptx::count`]); where the tokens repeat, as many of them as the first period
//! of tokens needs, and the results are repeated. Counts of PTX instructions become those of machine instructions by what `ptxas` made of each
//! line ([`sass`]). The time of a pipe is its instructions on the busiest multiprocessor over its rate ([`Rates`]). The longest of these
//! times is what the launch takes at least. What it is predicted to take is a replay of the busiest multiprocessor's blocks (`time.rs`):
//! in order, with latencies and what hides them, in waves, behind a gap.

mod copies;
mod flight;
mod joined;
pub mod layer;
pub mod lines;
mod listing;
pub mod passes;
pub mod pipes;
pub mod predictions;
pub mod rates;
pub mod raw;
pub mod sample;
pub mod sass;
mod time;

use std::sync::Arc;

use serde::Serialize;
use ultramem_ptx::Products;
use ultramem_ptx::count::{Counted, Moved, Trace};
use ultramem_ptx::program::Op;

use self::lines::Line;
use self::pipes::Pipe;
pub use self::rates::Rates;
use self::sass::ByPipe;
use crate::compile::{Architecture, compile, machine_code};
use crate::execute::Loaded;
use crate::{Gpu, LaunchReport, Result, SECTOR};

/// What a launch did, as far as its blocks were run.
#[derive(Debug, Clone)]
pub struct Counts {
    /// The kernel.
    pub loaded: Arc<Loaded>,
    /// Of each instruction.
    pub instructions: Vec<Counted>,
    /// Of each buffer.
    pub buffers: Vec<Moved>,
    /// Blocks that ran.
    pub blocks: usize,
    /// Warps that waited at a barrier.
    pub barriers: u64,
    /// The most loads, each of which needs the one before.
    pub chain: u32,
    /// What some blocks did, step by step.
    pub traces: Vec<Trace>,
}

/// A launch in numbers. Times are microseconds.
#[derive(Debug, Clone, Serialize)]
pub struct Profile {
    /// The entry point.
    pub kernel: String,
    /// Blocks, and threads of each.
    pub cubes: u64,
    /// See `cubes`.
    pub units: u64,
    /// Registers of a thread.
    pub registers: usize,
    /// Bytes of shared memory of a block.
    pub shared: usize,
    /// Warps that run at once over those that could.
    pub occupancy: f64,
    /// Blocks that were counted; the counts are scaled by all over these.
    pub counted: usize,
    /// PTX instructions of warps by pipe, of all blocks.
    pub ptx: Vec<(Pipe, f64)>,
    /// Machine instructions of warps by pipe, of all blocks.
    pub machine: Vec<(Pipe, f64)>,
    /// Bytes from the second-level cache to the multiprocessors, and back.
    pub cache_bytes: f64,
    /// Bytes between device memory and chip.
    pub memory_bytes: f64,
    /// Cycles of shared memory, of all blocks, without atomics on one address.
    pub shared_cycles: f64,
    /// Lines of the first-level cache that were looked up, of all blocks.
    pub tags: f64,
    /// Lanes that hit the same address in atomic operations on shared memory, over 32, of all blocks.
    pub conflicts: f64,
    /// Lanes that divergence left idle, as a share.
    pub idle: f64,
    /// Barriers at which warps waited.
    pub barriers: f64,
    /// The longest chain of loads.
    pub chain: u32,
    /// Blocks that a multiprocessor holds at once, and how often all of them fill the device.
    pub resident: usize,
    /// See `resident`.
    pub waves: f64,
    /// Blocks of the busiest multiprocessor that were replayed.
    pub replayed: u64,
    /// What it takes, the gap before it included.
    pub predicted: f64,
    /// Of that, the gap.
    pub gap: f64,
    /// What the host does for it meanwhile: a task for the launch, and one for each piece of memory that is asked for before it.
    pub tasks: usize,
    /// How long that takes it.
    pub host: f64,
    /// What takes time, and how long, as if nothing else took any.
    pub times: Vec<(String, f64)>,
    /// The lines of the source, the dearest first.
    pub lines: Vec<Line>,
}

impl Profile {
    /// A launch of `report` on `gpu`; None where its blocks were not counted.
    ///
    /// # Errors
    /// Compilers that are not installed.
    pub fn of(report: &LaunchReport, gpu: Gpu, rates: &Rates) -> Result<Option<Self>> {
        let Some(counts) = &report.counts else { return Ok(None) };
        let architecture = Architecture::of(gpu);
        let resources = compile(&report.kernel, architecture)?.resources;
        let listing = machine_code(&report.kernel, architecture)?;
        let costs = sass::costs(&counts.loaded.program, &listing);
        let joined = joined::joined(counts, &listing::listed(&listing));
        let units: u64 = report.kernel.dim.iter().map(|&n| u64::from(n)).product();
        let cubes: u64 = report.count.iter().map(|&n| u64::from(n)).product();
        let shared = report.kernel.shared + resources.shared;
        let scale = cubes as f64 / counts.blocks.max(1) as f64;
        let (ptx, machine) = by_pipe(counts, &costs, scale);
        let sum = |of: fn(&Counted) -> u64| counts.instructions.iter().map(of).sum::<u64>() as f64 * scale;
        let (lanes, idle) = (sum(|it| it.lanes), sum(|it| it.idle));
        let resident = gpu.resident(units as usize, resources.registers, shared);
        let multiprocessors = u64::from(gpu.specification().multiprocessors);
        let at_once = cubes.min(multiprocessors * resident as u64) as f64;
        let from_memory = from_memory(counts, &report.lengths, gpu, at_once, scale);
        let spread = time::Spread { cubes, multiprocessors, resident, from_memory: &from_memory };
        let (time, replayed) = time::time(counts, &spread, (&costs, &joined), &listing, rates);
        let moved = counts.buffers.iter().zip(&from_memory).map(|(it, share)| it.sectors as f64 * share);
        let list = |numbers: ByPipe| Pipe::ALL.into_iter().zip(numbers).collect();
        let mut profile = Self {
            kernel: report.kernel.entry.clone(),
            cubes,
            units,
            registers: resources.registers,
            shared,
            occupancy: gpu.occupancy(units as usize, resources.registers, shared),
            counted: counts.blocks,
            ptx: list(ptx),
            machine: list(machine),
            cache_bytes: sum(|it| it.sectors) * SECTOR as f64,
            memory_bytes: moved.sum::<f64>() * scale * SECTOR as f64,
            shared_cycles: shared_cycles(counts, &joined) * scale,
            tags: sum(|it| it.tags),
            conflicts: sum(|it| it.same_address) / 32.0,
            idle: idle / (lanes + idle).max(1.0),
            barriers: counts.barriers as f64 * scale,
            chain: counts.chain,
            resident,
            waves: cubes as f64 / (multiprocessors * resident.max(1) as u64) as f64,
            replayed,
            predicted: rates.launch_gap + time,
            gap: rates.launch_gap,
            tasks: 1 + report.allocations,
            host: (1 + report.allocations) as f64 * rates.host_task,
            times: Vec::new(),
            lines: lines::lines(
                &report.kernel.source,
                counts,
                (&costs, &joined),
                &lines::Scale { gpu, rates, cubes, scale },
            ),
        };
        profile.times = profile.times(counts, gpu, rates, scale);
        Ok(Some(profile))
    }

    /// What sets the predicted time: the gap, where that is most of it; what takes longest, where that is nearly all of the rest; else
    /// latency.
    pub fn binds(&self) -> &str {
        let (name, time) = self.bound();
        match self.predicted - self.gap {
            rest if rest < self.gap => "launch",
            rest if time >= BINDING * rest => name,
            _ => "latency",
        }
    }

    /// What takes longest if nothing else takes any time, and how long.
    pub fn bound(&self) -> (&str, f64) {
        let longest = self.times.iter().max_by(|a, b| a.1.total_cmp(&b.1));
        longest.map_or(("nothing", 0.0), |(name, time)| (name, *time))
    }

    /// The time of one thing by its name; 0 where there is none.
    pub fn time(&self, name: &str) -> f64 {
        self.times.iter().find(|(it, _)| it == name).map_or(0.0, |(_, time)| *time)
    }

    fn times(&self, counts: &Counts, gpu: Gpu, rates: &Rates, scale: f64) -> Vec<(String, f64)> {
        let multiprocessors = u64::from(gpu.specification().multiprocessors);
        // The busiest multiprocessor has a whole number of blocks.
        let share = self.cubes.div_ceil(multiprocessors) as f64 / (self.cubes as f64).max(1.0);
        let cycles = |cycles: f64| cycles * share / rates.clock / 1000.0;
        let warps = |pipe: Pipe| self.machine[pipe as usize].1;
        let pipe = |pipe: Pipe| Some((pipe.to_string(), cycles(32.0 * warps(pipe) / rates.lanes(pipe)?)));
        let mut times: Vec<(String, f64)> = Pipe::ALL.into_iter().filter_map(pipe).collect();
        let matrix = matrix_products(counts) * scale;
        let shared = self.shared_cycles + self.conflicts * rates.same_address;
        times.extend([
            ("matrix".to_string(), cycles(matrix * rates.matrix_cycles / 4.0)),
            ("shared and lines".to_string(), cycles(shared + self.tags / rates.tags)),
            ("issue".to_string(), cycles(self.machine.iter().map(|it| it.1).sum::<f64>() / rates.issue)),
            ("cache".to_string(), self.cache_bytes / rates.cache / 1000.0),
            ("memory".to_string(), self.memory_bytes / rates.memory / 1000.0),
        ]);
        times
    }
}

/// PTX and machine instructions by pipe.
fn by_pipe(counts: &Counts, costs: &[ByPipe], scale: f64) -> (ByPipe, ByPipe) {
    let (mut ptx, mut machine) = (ByPipe::default(), ByPipe::default());
    for ((instruction, counted), cost) in counts.loaded.program.code.iter().zip(&counts.instructions).zip(costs) {
        let issued = counted.issued as f64 * scale;
        ptx[Pipe::of_ptx(&instruction.opcode) as usize] += issued;
        machine.iter_mut().zip(cost).for_each(|(sum, cost)| *sum += issued * cost);
    }
    (ptx, machine)
}

/// Cycles of shared memory.
fn shared_cycles(counts: &Counts, joined: &[f64]) -> f64 {
    counts.instructions.iter().zip(joined).map(|(counted, joined)| cycles_of(counted, *joined)).sum()
}

/// Cycles of shared memory of one instruction. Loads that `ptxas` has joined move all their words, but take the cycle that the least takes once.
fn cycles_of(counted: &Counted, joined: f64) -> f64 {
    (joined * counted.shared_cycles as f64).max(counted.words as f64 / 32.0)
}

/// A pipe binds where its time is this share of what the launch takes.
const BINDING: f64 = 0.7;

/// Products of matrix units, in those of 16 by 16 with 16 by 8.
fn matrix_products(counts: &Counts) -> f64 {
    let products = counts.loaded.program.code.iter().zip(&counts.instructions).filter_map(|(instruction, counted)| {
        let Op::Matrix(matrix) = &instruction.op else { return None };
        Some(in_products(matrix.products()?) * counted.issued as f64)
    });
    products.sum()
}

/// A product in those of 16 by 16 with 16 by 8 of 16 bits.
fn in_products(it: Products) -> f64 {
    (it.m * it.n * it.k) as f64 * it.input.size() as f64 / 2.0 / (16.0 * 16.0 * 8.0)
}

/// Of each buffer, the share of its sectors that device memory gives or takes, where so many blocks run at once. What takes no more than
/// half of the second-level cache is moved once. Of a larger buffer, a block finds there what blocks beside it have fetched, as far as those
/// that were counted show it; and what it has fetched itself, if what all fetch while they run takes no more than half either: what it changes
/// goes back once. `scale` is all blocks over those that were counted.
fn from_memory(counts: &Counts, lengths: &[u64], gpu: Gpu, at_once: f64, scale: f64) -> Vec<f64> {
    let half = gpu.specification().cache / 2;
    let distinct = counts.buffers.iter().map(Moved::distinct).sum::<u64>() as f64 / counts.blocks.max(1) as f64;
    let stays = distinct * at_once * SECTOR as f64 <= half as f64;
    let share = |(moved, &length): (&Moved, &u64)| match moved.sectors as f64 {
        0.0 => 0.0,
        all if length <= half => (moved.distinct() as f64 * scale).min(length as f64 / SECTOR as f64) / (all * scale),
        all if stays => (moved.distinct() + moved.changed()) as f64 / all,
        _ => moved.distinct() as f64 / moved.by_block.max(1) as f64,
    };
    counts.buffers.iter().zip(lengths).map(share).map(|share| share.min(1.0)).collect()
}
