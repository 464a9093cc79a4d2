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
}

impl Default for Rates {
    fn default() -> Self {
        Self::of(Gpu::default())
    }
}

impl Rates {
    /// The rates of a GPU. Clocks are boost clocks of the data sheets, less what they fall to under load (*assumed*: 1.7 of the H100's
    /// 1.98 GHz). Memory is nine tenths of the data sheets' bandwidth, as published copies reach. Lanes are those of the CUDA programming
    /// guide's table of arithmetic throughput. The rest is *assumed*: cache (5.5 TB/s on an H100, by multiprocessors and clock elsewhere),
    /// tags, products of integers at half the multiply-adds, and the cycles of atomics that hit one address, which nobody publishes.
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
        };
        let cache = |clock: f64| 5500.0 * clock / 1.7 * f64::from(gpu.specification().multiprocessors) / 132.0;
        match gpu {
            Gpu::A100 => Self {
                clock: 1.3,
                memory: 1750.0,
                cache: cache(1.3),
                double: 32.0,
                fma: 64.0,
                matrix_cycles: 8.0,
                first_level: 192.0 * 1024.0,
                ..hopper
            },
            Gpu::H100 => hopper,
            Gpu::H200 => Self { memory: 4300.0, ..hopper },
            Gpu::B200 => Self { clock: 1.8, memory: 7200.0, cache: cache(1.8), ..hopper },
            Gpu::Rtx4090 => Self {
                clock: 2.4,
                memory: 920.0,
                cache: cache(2.4),
                double: 2.0,
                matrix_cycles: 16.0,
                first_level: 128.0 * 1024.0,
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
