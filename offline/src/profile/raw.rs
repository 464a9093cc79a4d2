//! Counts a kernel that is given as CUDA C++: its buffers, then one structure of scalars by value.

use std::sync::Arc;

use super::sample::{self, Blocks};
use super::{Profile, Rates};
use crate::compile::Architecture;
use crate::execute::Launch;
use crate::{Error, Gpu, HostBuffer, Kernel, LaunchReport, Result};

/// A kernel and what it is launched with.
#[derive(Debug, Clone)]
pub struct Raw<'a> {
    /// CUDA C++, compiled with `ONLY_` and the kernel's name defined, for what is compiled may hold one kernel alone.
    pub source: &'a str,
    /// The kernel's name, which is `extern "C"`.
    pub entry: &'a str,
    /// Blocks in each dimension.
    pub count: [u32; 3],
    /// Threads of a block in each dimension.
    pub dim: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: usize,
    /// The first parameters.
    pub buffers: &'a [HostBuffer],
    /// The bytes of the parameter behind them; empty where there is none.
    pub scalars: &'a [u8],
    /// Blocks that run and stand for all, spread evenly over them.
    pub blocks: usize,
}

impl Raw<'_> {
    /// Runs the blocks and counts what they do. What they write is in the buffers.
    ///
    /// # Errors
    /// Compilers that are not installed or refuse the source, and what the interpreter cannot run.
    pub fn count(&self, gpu: Gpu) -> Result<LaunchReport> {
        let kernel = Kernel {
            name: self.entry.to_string(),
            entry: self.entry.to_string(),
            source: format!("#define ONLY_{}\n{}", self.entry, self.source),
            binary: None,
            dim: self.dim,
            shared: self.shared,
            buffers: Vec::new(),
            info: self.scalars.len(),
        };
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
        let words: Vec<u64> = self.scalars.chunks(8).map(word).collect();
        let mut report = LaunchReport {
            kernel: Arc::new(kernel),
            count: self.count,
            lengths: self.buffers.iter().map(|buffer| buffer.length() as u64).collect(),
            words: words.clone(),
            seed: 0,
            traffic: Vec::new(),
            faults: Vec::new(),
            gaps: Vec::new(),
            products: 0,
            loops: 0,
            stream: 0,
            allocations: 0,
            counts: None,
            executed: false,
        };
        let (architecture, dynamic) = (Architecture::of(gpu), words.len());
        let launch = Launch { architecture, rolled: false, buffers: self.buffers, info: &words, dynamic };
        sample::run(&launch, gpu, Blocks::Number(self.blocks), &mut report)?;
        Ok(report)
    }

    /// What the launch would cost a GPU of these rates.
    ///
    /// # Errors
    /// As [`count`](Self::count).
    pub fn profile(&self, gpu: Gpu, rates: &Rates) -> Result<Profile> {
        let uncounted = || Error::NotExecutable { kernel: self.entry.into(), reason: "it was not counted".into() };
        Profile::of(&self.count(gpu)?, gpu, rates)?.ok_or_else(uncounted)
    }
}
