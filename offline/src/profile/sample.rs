//! Runs as many blocks of a launch as its counts need.
//!
//! Where tokens repeat after a period, what the first period's blocks have written is what all others would write: it is repeated for them,
//! and the next launch finds whole results. Elsewhere a launch whose results are whole numbers runs every block, for others go by them:
//! sorted entries, places, chosen experts. Of any other launch some blocks run, spread evenly over the grid.

use std::collections::BTreeSet;
use std::sync::Arc;

use ultramem_ptx::Buffer;
use ultramem_ptx::count::{Count, Moved, count};

use super::Counts;
use crate::compile::{Architecture, compile};
use crate::execute::{Launch, Loaded, Pages, load, shape};
use crate::{Error, Gpu, Kernel, LaunchReport, Result};

/// Which blocks of a launch run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Blocks {
    /// All of them.
    #[default]
    All,
    /// Those that the first period of the tokens needs; their results are repeated. Every buffer that a launch writes has a row for each
    /// token, or is written whole.
    Repeated {
        /// All tokens, a multiple of the period.
        tokens: usize,
        /// Tokens after which they repeat.
        period: usize,
    },
    /// So many, at even distances.
    Number(usize),
    /// All of a launch that writes whole numbers, of another one as many as it takes to count some 200,000 instructions of warps: the
    /// first, the last and some at even distances between. What the others would write stays unwritten.
    Spread {
        /// So many launches run whole first, whatever they write.
        whole: usize,
    },
    /// The same with so many blocks side by side at each of four places or more: they show what blocks fetch that others beside them have fetched.
    Beside {
        /// As for [`Spread`](Self::Spread).
        whole: usize,
        /// Blocks of a place.
        blocks: usize,
    },
    /// None: the launch is kept, without counts.
    None,
}

impl Blocks {
    /// What holds for the launch after this one.
    pub(crate) fn after(self) -> Self {
        match self {
            Self::Spread { whole } => Self::Spread { whole: whole.saturating_sub(1) },
            Self::Beside { whole, blocks } => Self::Beside { whole: whole.saturating_sub(1), blocks },
            same => same,
        }
    }

    /// What is left of the choice for a launch of `kernel`.
    fn of(self, kernel: &Kernel) -> Self {
        match self {
            Self::Spread { whole } | Self::Beside { whole, .. } if whole > 0 || writes_whole_numbers(kernel) => {
                Self::All
            }
            same => same,
        }
    }
}

/// Whether a kernel may write anything but floating-point numbers.
fn writes_whole_numbers(kernel: &Kernel) -> bool {
    let is_float = |element: &str| ["float", "half"].iter().any(|name| element.contains(name));
    kernel.buffers.iter().any(|buffer| buffer.writable && !is_float(&buffer.element))
}

/// Steps of warps that are kept for the replay.
const TRACED: usize = 1_000_000;
/// Blocks that run before it is seen whether they are enough, where tokens repeat.
const COUNTED: usize = 8;
/// Instructions of warps that are enough where blocks are spread, of so many blocks at least.
const ENOUGH: u64 = 200_000;
const FEWEST: usize = 4;
/// Instructions that are enough of any number of blocks.
const HEAVY: u64 = 2_000_000;
/// Blocks of which the last of the grid is one. With fewer it would weigh too much.
const WITH_LAST: usize = 64;

/// Runs blocks as `blocks` says, and counts what they do.
pub fn run(launch: &Launch<'_>, gpu: Gpu, blocks: Blocks, report: &mut LaunchReport) -> Result<()> {
    let kernel = report.kernel.clone();
    let blocks = blocks.of(&kernel);
    if blocks == Blocks::None {
        return Ok(());
    }
    let loaded = load(&kernel, launch.architecture, launch.rolled)?;
    let Loaded { program, flow } = &*loaded;
    let mut pages = Pages::lock(launch);
    let lengths: Vec<usize> = pages.buffers.iter().map(|it| it.length).take(launch.buffers.len()).collect();
    let shape = shape(report);
    let total = shape.blocks.iter().map(|&n| n as usize).product::<usize>();
    let first_level = first_level(&kernel, launch.architecture, gpu, total)?;
    let mut counted = Count::new(program, first_level, &lengths).traced(TRACED);
    let mut memory = pages.memory(program, &shape, launch.info);
    let mut rounds = Rounds { total, taken: 0, parts: 0, blocks };
    while let Some(next) = rounds.next(&counted, |counted, repeated| covered(counted, &kernel, &lengths, repeated)) {
        let stopped = |stop| Error::NotExecutable { kernel: kernel.entry.clone(), reason: format!("{stop:?}") };
        count((program, flow), shape, &next, &mut memory, &mut counted).map_err(stopped)?;
    }
    drop(memory);
    let done = rounds.taken;
    if let Blocks::Repeated { tokens, period } = blocks
        && done < total
    {
        repeat(&mut pages, &counted, &lengths, (tokens, period));
    }
    let traces = counted.take_traces();
    let Count { counts: instructions, buffers, barriers, chain, .. } = counted;
    let loaded = loaded.clone();
    let blocks = done;
    let counts = Counts { loaded, instructions, buffers, blocks, barriers, chain, traces };
    report.counts = Some(Arc::new(counts));
    report.executed = true;
    Ok(())
}

/// The blocks of a launch, round by round.
struct Rounds {
    total: usize,
    /// Blocks so far.
    taken: usize,
    /// Parts that the grid was cut into; 0 before the first round.
    parts: usize,
    blocks: Blocks,
}

impl Rounds {
    /// The blocks that run next; None where those that have run are enough.
    fn next(
        &mut self,
        counted: &Count<'_>,
        covered: impl Fn(&Count<'_>, (usize, usize)) -> bool,
    ) -> Option<Vec<usize>> {
        let begun = self.taken > 0;
        if self.taken == self.total {
            return None;
        }
        let next: Vec<usize> = match self.blocks {
            Blocks::Repeated { tokens, period } if begun && covered(counted, (tokens, period)) => return None,
            Blocks::Repeated { .. } => (self.taken..self.total.min(self.taken + COUNTED)).collect(),
            Blocks::Spread { .. } if self.taken >= FEWEST && issued(counted) >= ENOUGH => return None,
            Blocks::Beside { .. } if self.parts >= FEWEST && issued(counted) >= ENOUGH => return None,
            Blocks::Spread { .. } | Blocks::Beside { .. } if begun && issued(counted) >= HEAVY => return None,
            Blocks::Spread { .. } | Blocks::Beside { .. } => self.between(),
            Blocks::Number(_) if begun => return None,
            Blocks::Number(number) => {
                self.parts = number.clamp(1, self.total);
                (0..self.parts).map(|part| self.first(part)).collect()
            }
            Blocks::All | Blocks::None => (0..self.total).collect(),
        };
        self.taken += next.len();
        Some(next)
    }

    /// The first blocks of twice as many parts as before, without those that have run.
    fn between(&mut self) -> Vec<usize> {
        let before = self.places();
        self.parts = (2 * self.parts).clamp(1, self.total);
        self.places().difference(&before).copied().collect()
    }

    /// The blocks where each part begins, and the last block.
    fn places(&self) -> BTreeSet<usize> {
        let last = (self.parts >= WITH_LAST).then(|| self.total - 1);
        let beside = if let Blocks::Beside { blocks, .. } = self.blocks { blocks } else { 1 };
        let of_part = |part| (self.first(part)..self.total).take(beside);
        (0..self.parts).flat_map(of_part).chain(last).collect()
    }

    /// The first block of a part.
    fn first(&self, part: usize) -> usize {
        (part as u128 * self.total as u128 / self.parts as u128) as usize
    }
}

/// Instructions of warps.
fn issued(counted: &Count<'_>) -> u64 {
    counted.counts.iter().map(|it| it.issued).sum()
}

/// Bytes of the first-level cache that a block has to itself: what shared memory leaves, over the blocks that a multiprocessor holds, of
/// `total` that there are.
fn first_level(kernel: &Kernel, architecture: Architecture, gpu: Gpu, total: usize) -> Result<usize> {
    let resources = compile(kernel, architecture)?.resources;
    let threads = kernel.dim.iter().map(|&n| n as usize).product::<usize>();
    let shared = kernel.shared + resources.shared;
    let it = gpu.specification();
    let held =
        gpu.resident(threads, resources.registers, shared).min(total.div_ceil(it.multiprocessors as usize)).max(1);
    Ok((it.shared_per_multiprocessor + (28 << 10)).saturating_sub(held * (shared + 1024)) / held)
}

/// Bytes of the first period of a buffer that has so many bytes a token; None where it has none.
fn period(length: usize, (tokens, period): (usize, usize)) -> Option<usize> {
    length.is_multiple_of(tokens).then_some(length / tokens * period)
}

/// Whether what was written of each buffer is all of its first period.
fn covered(counted: &Count<'_>, kernel: &Kernel, lengths: &[usize], tokens: (usize, usize)) -> bool {
    let buffers = counted.buffers.iter().zip(lengths).zip(&kernel.buffers).filter(|(_, argument)| argument.writable);
    let whole = |((moved, &length), _): ((&Moved, &usize), _)| {
        let Some(period) = period(length, tokens) else { return false };
        moved.written.get(..period).is_some_and(|written| !written.contains(&false))
    };
    buffers.into_iter().all(whole)
}

/// Repeats the first period of what was written.
fn repeat(pages: &mut Pages<'_>, counted: &Count<'_>, lengths: &[usize], tokens: (usize, usize)) {
    for (index, (moved, &length)) in counted.buffers.iter().zip(lengths).enumerate() {
        let Some(period) = period(length, tokens).filter(|_| !moved.written.is_empty()) else { continue };
        let Buffer { page, offset, .. } = pages.buffers[index];
        let bytes = &mut pages.pages[page].memory[offset..][..length];
        let (first, others) = bytes.split_at_mut(period);
        others.chunks_mut(period).for_each(|part| part.copy_from_slice(&first[..part.len()]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds(total: usize) -> Rounds {
        Rounds { total, taken: 0, parts: 0, blocks: Blocks::Spread { whole: 0 } }
    }

    #[test]
    fn blocks_lie_at_even_distances_and_each_runs_once() {
        let mut of_ten = rounds(10);
        let found: Vec<Vec<usize>> = (0..4).map(|_| of_ten.between()).collect();
        assert_eq!(found, [vec![0], vec![5], vec![2, 7], vec![1, 3, 6, 8]]);
        for total in [1, 2, 7, 64, 100, 1000] {
            let (mut grid, mut seen) = (rounds(total), Vec::new());
            while seen.len() < total {
                seen.extend(grid.between());
            }
            seen.sort_unstable();
            assert_eq!(seen, (0..total).collect::<Vec<_>>());
        }
    }

    #[test]
    fn blocks_lie_side_by_side_where_they_are_to() {
        let mut of_ten = Rounds { blocks: Blocks::Beside { whole: 0, blocks: 2 }, ..rounds(10) };
        let found: Vec<Vec<usize>> = (0..4).map(|_| of_ten.between()).collect();
        assert_eq!(found, [vec![0, 1], vec![5, 6], vec![2, 3, 7, 8], vec![4, 9]]);
    }

    #[test]
    fn the_last_block_is_one_of_many() {
        let mut grid = rounds(1 << 40);
        let mut seen: Vec<usize> = (0..6).flat_map(|_| grid.between()).collect();
        assert_eq!((seen.len(), seen.contains(&((1 << 40) - 1))), (32, false));
        seen.extend(grid.between());
        assert_eq!((seen.len(), seen.contains(&((1 << 40) - 1))), (65, true));
    }
}
