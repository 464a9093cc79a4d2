//! A launch's counts by the line of its source: what each line costs, and what it says.
//!
//! A line's time is the longest of its own times, each as if the launch had nothing else to do. An instruction that `ptxas` has moved to
//! another line counts there; what stands in no line of the source, in a header or in the entry of the kernel, is line 0.

use std::collections::BTreeMap;

use serde::Serialize;
use ultramem_ptx::count::Counted;

use super::pipes::Pipe;
use super::sass::ByPipe;
use super::{Counts, Rates, cycles_of};
use crate::{Gpu, SECTOR};

/// What a line of the source costs, in all blocks.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    /// Its number, from 1 on; 0 for what stands in no line.
    pub line: u32,
    /// What it says, without the blanks around it.
    pub text: String,
    /// Machine instructions of warps by pipe; only those that there are.
    pub machine: Vec<(Pipe, f64)>,
    /// Cycles of shared memory, without atomics on one address.
    pub shared_cycles: f64,
    /// Lanes that hit the same address in atomic operations on shared memory, over 32.
    pub conflicts: f64,
    /// Lines of the first-level cache that were looked up.
    pub tags: f64,
    /// Sectors from the second-level cache, or there.
    pub sectors: f64,
    /// What takes longest of it.
    pub binds: String,
    /// How long, in microseconds, as if the launch had nothing else to do.
    pub time: f64,
}

/// What turns a line's counts into times.
pub(super) struct Scale<'a> {
    pub gpu: Gpu,
    pub rates: &'a Rates,
    /// Blocks of the launch.
    pub cubes: u64,
    /// All blocks over those that ran.
    pub scale: f64,
}

/// Counts of a line.
#[derive(Default)]
struct Sums {
    machine: ByPipe,
    shared_cycles: f64,
    counted: Counted,
}

/// The lines of `source` that cost anything, the dearest first. `costs` are the machine instructions of each instruction,
/// `joined` the part of one that it is.
pub(super) fn lines(
    source: &str,
    counts: &Counts,
    (costs, joined): (&[ByPipe], &[f64]),
    scale: &Scale<'_>,
) -> Vec<Line> {
    let mut sums: BTreeMap<u32, Sums> = BTreeMap::new();
    let counted = counts.loaded.program.code.iter().zip(&counts.instructions);
    for (((instruction, counted), cost), joined) in counted.zip(costs).zip(joined) {
        let sum = sums.entry(instruction.line).or_default();
        sum.machine.iter_mut().zip(cost).for_each(|(sum, cost)| *sum += counted.issued as f64 * cost);
        sum.shared_cycles += cycles_of(counted, *joined);
        sum.counted.same_address += counted.same_address;
        sum.counted.tags += counted.tags;
        sum.counted.sectors += counted.sectors;
    }
    let texts: Vec<&str> = source.lines().collect();
    let text = |line: u32| line.checked_sub(1).and_then(|at| texts.get(at as usize)).map_or("", |text| text.trim());
    let lines = sums.into_iter().map(|(line, sums)| scale.line(line, text(line), &sums));
    let mut lines: Vec<Line> = lines.filter(|line| line.time > 0.0).collect();
    lines.sort_by(|a, b| b.time.total_cmp(&a.time));
    lines
}

impl Scale<'_> {
    fn line(&self, line: u32, text: &str, Sums { machine, shared_cycles, counted }: &Sums) -> Line {
        let all = |count: u64| count as f64 * self.scale;
        let present = Pipe::ALL.into_iter().zip(machine).filter(|(_, number)| **number > 0.0);
        let mut line = Line {
            line,
            text: text.to_string(),
            machine: present.map(|(pipe, number)| (pipe, number * self.scale)).collect(),
            shared_cycles: shared_cycles * self.scale,
            conflicts: all(counted.same_address) / 32.0,
            tags: all(counted.tags),
            sectors: all(counted.sectors),
            binds: String::new(),
            time: 0.0,
        };
        let longest = self.times(&line).into_iter().max_by(|a, b| a.1.total_cmp(&b.1));
        (line.binds, line.time) = longest.unwrap_or_default();
        line
    }

    /// Microseconds of each thing that a line takes.
    fn times(&self, line: &Line) -> Vec<(String, f64)> {
        let rates = self.rates;
        let multiprocessors = u64::from(self.gpu.specification().multiprocessors);
        let share = self.cubes.div_ceil(multiprocessors) as f64 / (self.cubes as f64).max(1.0);
        let cycles = |cycles: f64| cycles * share / rates.clock / 1000.0;
        let issued: f64 = line.machine.iter().map(|it| it.1).sum();
        let pipe = |&(pipe, warps): &(Pipe, f64)| Some((pipe.to_string(), cycles(32.0 * warps / rates.lanes(pipe)?)));
        let shared = line.shared_cycles + line.conflicts * rates.same_address + line.tags / rates.tags;
        let matrix = line.machine.iter().find(|it| it.0 == Pipe::Matrix).map_or(0.0, |it| it.1);
        let mut times: Vec<(String, f64)> = line.machine.iter().filter_map(pipe).collect();
        times.extend([
            (Pipe::Matrix.to_string(), cycles(matrix * rates.matrix_cycles / 4.0)),
            ("shared and lines".to_string(), cycles(shared)),
            ("issue".to_string(), cycles(issued / rates.issue)),
            ("cache".to_string(), line.sectors * SECTOR as f64 / rates.cache / 1000.0),
        ]);
        times
    }
}
