//! Rounding of an updated row to the table's element type.
//!
//! A step that is smaller than half of a number's last place vanishes when it is rounded to the nearest: in bf16, at |w| = 0.02, every step below
//! 4e-5. Rounded up or down by chance, in proportion to how near each of the two is, a row takes the whole of its steps on average. The
//! chance is a hash of seed, step, row and column: every run gives the same bits, whatever pages the table lies in.
//!
//! With `d` the bits of an f32's mantissa that the type lacks (f16 13, bf16 16) and `r = hash(…) mod 2ᵈ`, a number becomes the one of the type
//! whose magnitude is `⌊|w| / ulp + r / 2ᵈ⌋ · ulp`, `ulp` the distance of the type's numbers at w. What is not finite, or past f16's largest
//! number, is rounded to the nearest.

use cubecl::prelude::*;

use crate::ElementType;
use crate::launch::random::{hash, stir};

/// How an update of a table in half precision is rounded. A table in f32 is not rounded at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// Up or down by chance, so that the mean of many small steps is kept.
    Stochastic {
        /// Another seed, other chances.
        seed: u32,
    },
    /// To the nearest: steps below half of a number's last place vanish.
    Nearest,
}

impl Default for Rounding {
    fn default() -> Self {
        Self::Stochastic { seed: 0 }
    }
}

impl Rounding {
    /// What the chances of the step that is the `steps`th are made of, beside row and column; None where there is no chance.
    pub fn key(self, steps: u64) -> Option<u32> {
        match self {
            Self::Stochastic { seed } => Some(stir(stir(seed ^ (steps >> 32) as u32).wrapping_add(steps as u32))),
            Self::Nearest => None,
        }
    }
}

/// Bits of an f32's mantissa that a type lacks.
pub(super) fn dropped(dtype: ElementType) -> u32 {
    match dtype {
        ElementType::F32 => 0,
        ElementType::F16 => F16_DROPPED,
        ElementType::BF16 => 16,
    }
}

const F16_DROPPED: u32 = 13;
/// The magnitude of f16's largest number and of its smallest normal one, as an f32's bits.
const F16_LARGEST: u32 = 0x477f_e000;
const F16_NORMAL: u32 = 0x3880_0000;
/// The distance of f16's numbers below its smallest normal one is 2⁻²⁴.
const F16_PLACES: f32 = 16_777_216.0;

/// A vector of a row, to the nearest where `dropped` is 0. `vector`: its place in the row.
#[cube]
pub(super) fn rounded<E: Float, N: Size>(
    weight: Vector<f32, N>,
    key: u32,
    first_row: u32,
    row: usize,
    vector: usize,
    #[comptime] dropped: u32,
) -> Vector<E, N> {
    let mut numbers = weight;
    if comptime!(dropped > 0) {
        let chance = hash(key + first_row + row as u32);
        #[unroll]
        for n in 0..N::value() {
            let column = vector * N::value() + n;
            numbers[n] = by_chance(weight[n], hash(chance + column as u32), dropped);
        }
    }
    Vector::cast_from(numbers)
}

/// The number of the type, as an f32, that `chance` takes `number` to.
#[cube]
fn by_chance(number: f32, chance: u32, #[comptime] dropped: u32) -> f32 {
    let bits = u32::reinterpret(number);
    let magnitude = bits & 0x7fff_ffffu32;
    let below = chance & comptime!((1u32 << dropped) - 1);
    let mut rounded = number;
    if comptime!(dropped == F16_DROPPED) {
        if magnitude < F16_NORMAL {
            let places = f32::floor(f32::abs(number) * F16_PLACES + f32::cast_from(below) / 8192.0) / F16_PLACES;
            rounded = f32::reinterpret(u32::reinterpret(places) | (bits & 0x8000_0000u32));
        } else if magnitude < F16_LARGEST {
            rounded = f32::reinterpret((bits + below) & comptime!(!((1u32 << dropped) - 1)));
        }
    } else if magnitude < 0x7f80_0000u32 {
        rounded = f32::reinterpret((bits + below) & comptime!(!((1u32 << dropped) - 1)));
    }
    rounded
}
