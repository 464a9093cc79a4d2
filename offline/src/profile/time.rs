//! How long a launch would take: the blocks of the busiest multiprocessor replayed in order ([`ultramem_ptx::time`]), and the gap before it.

use ultramem_ptx::operand::Space;
use ultramem_ptx::program::{Instruction, Op};
use ultramem_ptx::time::{Blocks, Cost, Machine, PIPES, replay};

use super::flight::{Flight, flight};
use super::pipes::Pipe;
use super::sass::ByPipe;
use super::{Counts, Rates};

/// Steps that are replayed of a launch; the rest takes what the last of these take.
const STEPS: usize = 2_000_000;

/// Bytes of a cycle that a multiprocessor takes from the second-level cache at most, however few others ask: *assumed*, as NVIDIA's
/// Nsight Compute says of its link.
const LINK: f64 = 64.0;

/// Pipes that each quarter has for itself.
const QUARTERS: [Pipe; PIPES] =
    [Pipe::Fma, Pipe::Alu, Pipe::Imad, Pipe::Double, Pipe::Special, Pipe::Conversion, Pipe::Matrix, Pipe::Branch];

/// Blocks of a launch and how the device holds them.
pub struct Spread<'a> {
    /// Blocks.
    pub cubes: u64,
    /// Multiprocessors.
    pub multiprocessors: u64,
    /// Blocks that one holds at once.
    pub resident: usize,
    /// Of each buffer, the share of its sectors that device memory gives or takes.
    pub from_memory: &'a [f64],
}

/// Microseconds of a launch from its first block's start to the end of its last, and blocks that were replayed.
pub fn time(
    counts: &Counts,
    spread: &Spread<'_>,
    (costs, joined): (&[ByPipe], &[f64]),
    listing: &str,
    rates: &Rates,
) -> (f64, u64) {
    let costs = machine_costs(counts, (costs, joined), &flight(listing), rates);
    // The busiest multiprocessor has a whole number of blocks. When it is at its last, others are idle and leave it their part.
    let count = spread.cubes.div_ceil(spread.multiprocessors);
    let active = spread.cubes as f64 / count as f64;
    let share = |rate: f64| (rate / rates.clock / active).min(LINK);
    let machine = Machine {
        resident: spread.resident.max(1),
        tags: rates.tags,
        same_address: rates.same_address,
        cache: share(rates.cache),
        memory: share(rates.memory),
        latency_shared: rates.latency_shared,
        latency_first_level: rates.latency_first_level,
        latency_cache: rates.latency_cache,
        latency_memory: rates.latency_memory,
        latency_barrier: rates.latency_barrier,
        latency_block: rates.latency_block,
    };
    let blocks = Blocks { traces: &counts.traces, count, from_memory: spread.from_memory, steps: STEPS };
    let timed = replay(&counts.loaded.program, &costs, &machine, blocks);
    (timed.cycles / rates.clock / 1000.0, timed.replayed)
}

/// What each PTX instruction is to the machine.
fn machine_costs(counts: &Counts, (costs, joined): (&[ByPipe], &[f64]), flight: &Flight, rates: &Rates) -> Vec<Cost> {
    let code = &counts.loaded.program.code;
    let cost = |((instruction, by_pipe), &joined): ((&Instruction, &ByPipe), &f64)| {
        let issued: f64 = by_pipe.iter().sum();
        let pipe = Pipe::of_ptx(&instruction.opcode);
        let matrix = match &instruction.op {
            Op::Matrix(matrix) => matrix.products().map(super::in_products),
            _ => None,
        };
        let cycles = |pipe: Pipe| match (pipe, matrix) {
            (Pipe::Matrix, Some(products)) => products * rates.matrix_cycles,
            (pipe, _) => rates.lanes(pipe).map_or(0.0, |lanes| by_pipe[pipe as usize] * 32.0 * 4.0 / lanes),
        };
        let shared = matches!(&instruction.op, Op::Load(Space::Shared, ..))
            || matches!(&instruction.op, Op::Matrix(_)) && instruction.opcode.starts_with("ldmatrix");
        // What is made of several instructions is a chain of them.
        let chain = (issued - 1.0).max(0.0) * rates.latency_alu;
        Cost {
            issued,
            pipes: QUARTERS.map(cycles),
            unit: by_pipe[Pipe::Memory as usize],
            joined,
            latency: if issued == 0.0 { 0.0 } else { chain + latency(pipe, rates) },
            pause: by_pipe[Pipe::Branch as usize] * rates.latency_branch,
            in_flight: flight.get(&(instruction.line, shared)).copied().unwrap_or(0),
        }
    };
    code.iter().zip(costs).zip(joined).map(cost).collect()
}

fn latency(pipe: Pipe, rates: &Rates) -> f64 {
    match pipe {
        Pipe::Special | Pipe::Conversion => rates.latency_special,
        Pipe::Matrix => rates.latency_matrix,
        Pipe::Double => 2.0 * rates.latency_alu,
        _ => rates.latency_alu,
    }
}
