//! Runs as many blocks of a launch as its counts need. Where tokens repeat after a period, what the first period's blocks have written is
//! what all others would write: it is repeated for them, and the next launch finds whole results.

use std::sync::Arc;

use ultramem_ptx::Buffer;
use ultramem_ptx::count::{Count, Moved, count};

use super::Counts;
use crate::compile::{Architecture, compile};
use crate::execute::{Launch, Loaded, Pages, load, shape};
use crate::{Error, Gpu, Kernel, LaunchReport, Result};

/// Steps of warps that are kept for the replay.
const TRACED: usize = 1_000_000;

/// Blocks that run before it is seen whether they are enough.
const COUNTED: usize = 8;

/// How many blocks stand for all.
#[derive(Debug, Clone, Copy)]
pub enum Enough {
    /// All of them.
    All,
    /// So many, spread evenly over all.
    Blocks(usize),
    /// As many as write the first period of the tokens: tokens, and those after which they repeat.
    Tokens((usize, usize)),
}

/// Runs as many blocks as are enough and counts what they do; of tokens that repeat, repeats what they have written.
pub fn run(launch: &Launch<'_>, gpu: Gpu, enough: Enough, report: &mut LaunchReport) -> Result<()> {
    let kernel = report.kernel.clone();
    let loaded = load(&kernel, launch.architecture, launch.rolled)?;
    let Loaded { program, flow } = &*loaded;
    let mut pages = Pages::lock(launch);
    let lengths: Vec<usize> = pages.buffers.iter().map(|it| it.length).take(launch.buffers.len()).collect();
    let shape = shape(report);
    let total = shape.blocks.iter().map(|&n| n as usize).product::<usize>();
    let first_level = first_level(&kernel, launch.architecture, gpu, total)?;
    let mut counted = Count::new(program, first_level, &lengths).traced(TRACED);
    let blocks: Vec<usize> = match enough {
        Enough::Blocks(some) if some < total => (0..some.max(1)).map(|at| at * total / some.max(1)).collect(),
        _ => (0..total).collect(),
    };
    let mut memory = pages.memory(program, &shape, launch.info);
    let mut done = 0;
    for next in blocks.chunks(COUNTED) {
        let stopped = |stop| Error::NotExecutable { kernel: kernel.entry.clone(), reason: format!("{stop:?}") };
        count((program, flow), shape, next, &mut memory, &mut counted).map_err(stopped)?;
        done += next.len();
        if matches!(enough, Enough::Tokens(tokens) if covered(&counted, &kernel, &lengths, tokens)) {
            break;
        }
    }
    drop(memory);
    if let Enough::Tokens(tokens) = enough
        && done < total
    {
        repeat(&mut pages, &counted, &lengths, tokens);
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
