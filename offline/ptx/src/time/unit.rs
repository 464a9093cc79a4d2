//! What the quarters of a multiprocessor share: the unit of shared memory and first-level lines, and the ways to the second-level cache and to
//! device memory. Each takes what comes to it in turn.

use super::machine::{Cost, Machine};
use crate::count::Step;

/// Bytes of a sector.
const SECTOR: f64 = crate::sanitise::SECTOR as f64;

/// When each of them is free again.
#[derive(Debug)]
pub struct Unit<'a> {
    machine: &'a Machine,
    /// Of each buffer, the share of its sectors that device memory gives or takes.
    from_memory: &'a [f64],
    /// Of each buffer, sectors of that share that are due.
    due: Vec<f64>,
    lines: f64,
    cache: f64,
    memory: f64,
}

impl<'a> Unit<'a> {
    /// All free.
    pub fn new(machine: &'a Machine, from_memory: &'a [f64]) -> Self {
        Self { machine, from_memory, due: vec![0.0; from_memory.len()], lines: 0.0, cache: 0.0, memory: 0.0 }
    }

    /// Takes an instruction that is issued at `now`; when what it loads is there.
    pub fn take(&mut self, now: f64, step: &Step, cost: &Cost) -> f64 {
        let it = self.machine;
        let atomic = f64::from(step.same_address) / 32.0 * it.same_address;
        // Joined loads move all their words, but take the cycle that the least of them takes once.
        let shared = (cost.joined * f64::from(step.shared)).max(f64::from(step.words) / 32.0);
        let cycles = shared + atomic + f64::from(step.tags) / it.tags;
        self.lines = self.lines.max(now) + cycles.max(cost.unit);
        let passed = self.lines;
        if step.sectors > 0 {
            return self.fetch(passed, step);
        }
        passed + if step.tags > 0 { it.latency_first_level } else { it.latency_shared }
    }

    fn fetch(&mut self, now: f64, step: &Step) -> f64 {
        let it = self.machine;
        let sectors = f64::from(step.sectors);
        self.cache = self.cache.max(now) + sectors * SECTOR / it.cache;
        let arrived = self.cache + it.latency_cache;
        let buffer = usize::from(step.buffer);
        let Some(due) = self.due.get_mut(buffer) else { return arrived };
        *due += sectors * self.from_memory[buffer];
        let missing = due.floor();
        *due -= missing;
        if missing == 0.0 {
            return arrived;
        }
        self.memory = self.memory.max(now) + missing * SECTOR / it.memory;
        arrived.max(self.memory + it.latency_memory)
    }

    /// When nothing is under way any more.
    pub fn idle(&self) -> f64 {
        self.lines.max(self.cache).max(self.memory)
    }
}
