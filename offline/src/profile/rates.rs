//! What a GPU does in a second: one table of rates, each with where it comes from. `ultramem profile --constants FILE` replaces any of
//! them by what was measured.

use serde::{Deserialize, Serialize};

use super::pipes::Pipe;
use crate::Gpu;

/// The rates of a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rates {
    /// Cycles of a nanosecond.
    pub clock: f64,
    /// Bytes of a nanosecond between device memory and chip, as a plain copy moves them.
    pub memory: f64,
    /// Bytes of a nanosecond from the second-level cache to all multiprocessors.
    pub cache: f64,
    /// Warp instructions that a multiprocessor issues in a cycle.
    pub issue: f64,
    /// Lanes of a cycle and multiprocessor: multiply-adds in f32.
    pub fma: f64,
    /// Integers, logic, comparisons.
    pub alu: f64,
    /// Products of integers.
    pub imad: f64,
    /// f64.
    pub double: f64,
    /// Special functions.
    pub special: f64,
    /// Conversions, counts of bits.
    pub conversion: f64,
    /// Cycles that a quarter of a multiprocessor takes for a product of 16 by 16 with 16 by 8 in 16 bits.
    pub matrix_cycles: f64,
    /// Lines of the first-level cache that are looked up in a cycle.
    pub tags: f64,
    /// Cycles of an atomic operation on shared memory whose 32 lanes hit one address.
    pub same_address: f64,
    /// Bytes of a multiprocessor's first-level cache and shared memory together.
    pub first_level: f64,
    /// Cycles until the next instruction can read a result: of multiply-adds, logic, products of integers.
    pub latency_alu: f64,
    /// Of special functions and conversions.
    pub latency_special: f64,
    /// Of matrix units.
    pub latency_matrix: f64,
    /// Cycles that a warp issues nothing after a jump.
    pub latency_branch: f64,
    /// Cycles from a load to its use: from shared memory, and of what lanes exchange.
    pub latency_shared: f64,
    /// From the first-level cache.
    pub latency_first_level: f64,
    /// From the second-level cache.
    pub latency_cache: f64,
    /// From device memory.
    pub latency_memory: f64,
    /// Cycles from the last warp's coming to a barrier until all go on.
    pub latency_barrier: f64,
    /// Cycles from a block's end to the first instruction of the one that takes its place.
    pub latency_block: f64,
    /// Microseconds between two launches that wait in a queue.
    pub launch_gap: f64,
    /// Microseconds that a launch takes which finds nothing to do, from the host's call to its end.
    pub lone_launch: f64,
    /// Microseconds of the host for a launch or an allocation.
    pub host_task: f64,
}

impl Default for Rates {
    fn default() -> Self {
        Self::of(Gpu::default())
    }
}

impl Rates {
    /// The rates of a GPU. Clocks are boost clocks of the data sheets, on H100, H200 and B200 less what they fall to under load (*assumed*:
    /// 1.7 of the H100's 1.98 GHz); an A100 holds its own, or cuBLAS could not reach 19.0 TFLOP/s in f32 on it (README of Boehm's
    /// SGEMM_CUDA). Memory is nine tenths of the data sheets' bandwidth, as published copies reach. Lanes are those of the CUDA programming
    /// guide's table of arithmetic throughput. The rest is *assumed*: cache (5.5 TB/s on an H100, by multiprocessors and clock elsewhere),
    /// tags, products of integers at half the multiply-adds, and the cycles of atomics that hit one address, which nobody publishes.
    /// Matrix units are those of products with sums in f32: on a GeForce half of what the data sheet has for sums in f16.
    ///
    /// Latencies of memory are those that Luo and others measured on an A100, an H100 and an RTX 4090 (*Benchmarking and Dissecting the
    /// Nvidia Hopper GPU Architecture through Microbenchmarking*, arXiv:2402.13499). That of arithmetic is the four cycles at which a
    /// dependent instruction has been issued since Volta (Jia and others, arXiv:1804.06826). Those of special functions, matrix units,
    /// jumps and barriers, and the microseconds of launches, are *assumed*. What a block takes to begin is *fitted*: to published sums over two
    /// million small blocks (`offline/tests/public.rs`).
    pub fn of(gpu: Gpu) -> Self {
        let hopper = Self {
            clock: 1.7,
            memory: 3000.0,
            cache: 5500.0,
            issue: 4.0,
            fma: 128.0,
            alu: 64.0,
            imad: 64.0,
            double: 64.0,
            special: 16.0,
            conversion: 16.0,
            matrix_cycles: 6.0,
            tags: 4.0,
            same_address: 32.0,
            first_level: 256.0 * 1024.0,
            latency_alu: 4.0,
            latency_special: 18.0,
            latency_matrix: 33.0,
            latency_branch: 6.0,
            latency_shared: 29.0,
            latency_first_level: 41.0,
            latency_cache: 263.0,
            latency_memory: 479.0,
            latency_barrier: 30.0,
            latency_block: 450.0,
            launch_gap: 1.0,
            lone_launch: 5.0,
            host_task: 4.0,
        };
        let cache = |clock: f64| 5500.0 * clock / 1.7 * f64::from(gpu.specification().multiprocessors) / 132.0;
        match gpu {
            Gpu::A100 => Self {
                clock: 1.41,
                memory: 1750.0,
                cache: cache(1.41),
                double: 32.0,
                fma: 64.0,
                matrix_cycles: 8.0,
                first_level: 192.0 * 1024.0,
                latency_first_level: 38.0,
                latency_cache: 262.0,
                latency_memory: 466.0,
                ..hopper
            },
            Gpu::H100 => hopper,
            Gpu::H200 => Self { memory: 4300.0, ..hopper },
            Gpu::B200 => Self { clock: 1.8, memory: 7200.0, cache: cache(1.8), ..hopper },
            Gpu::Rtx4090 => Self {
                clock: 2.52,
                memory: 920.0,
                cache: cache(2.52),
                double: 2.0,
                matrix_cycles: 32.0,
                first_level: 128.0 * 1024.0,
                latency_shared: 30.0,
                latency_first_level: 43.0,
                latency_cache: 273.0,
                latency_memory: 542.0,
                ..hopper
            },
        }
    }

    /// Lanes of a cycle and multiprocessor; None for what takes an issue slot alone, or is counted by what it moves.
    pub fn lanes(&self, pipe: Pipe) -> Option<f64> {
        match pipe {
            Pipe::Fma => Some(self.fma),
            Pipe::Alu => Some(self.alu),
            Pipe::Imad => Some(self.imad),
            Pipe::Double => Some(self.double),
            Pipe::Special => Some(self.special),
            Pipe::Conversion => Some(self.conversion),
            Pipe::Matrix | Pipe::Memory | Pipe::Branch | Pipe::Other => None,
        }
    }
}
