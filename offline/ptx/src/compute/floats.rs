//! The types of floating-point numbers in registers (PTX ISA 8.7, section 5.2): `f16`, `bf16`, `f32`, `f64`, and those
//! whose subnormal numbers are zeros.

use super::lanewise::Number;
use super::rounding::{BRAIN, HALF, Rounding, SINGLE};

/// A number of the format `f16`.
#[derive(Clone, Copy)]
pub(super) struct F16(pub u16);

/// A number of the format `bf16`.
#[derive(Clone, Copy)]
pub(super) struct Bf16(pub u16);

/// A number of a type `T` whose subnormal numbers are zeros: `ftz`.
#[derive(Clone, Copy)]
pub(super) struct Flushed<T>(pub T);

macro_rules! small_numbers {
    ($($number:ident)+) => {$(
        impl Number for $number {
            type Bits = u32;
            #[inline(always)]
            fn read(bits: u32) -> Self {
                $number(bits as u16)
            }
            #[inline(always)]
            fn write(self) -> u32 {
                self.0.into()
            }
        }
    )+};
}

small_numbers!(F16 Bf16);

impl<T: Float> Number for Flushed<T> {
    type Bits = T::Bits;
    #[inline(always)]
    fn read(bits: T::Bits) -> Self {
        Flushed(T::read(bits).flush())
    }
    #[inline(always)]
    fn write(self) -> T::Bits {
        self.0.flush().write()
    }
}

/// A floating-point number.
pub(super) trait Float: Number {
    /// The number in 64 bits.
    fn wide(self) -> f64;
    /// A number of 64 bits rounded; one that was rounded to odd comes out right.
    fn rounded(number: f64, rounding: Rounding) -> Self;
    /// A number of `f32` rounded.
    #[inline(always)]
    fn of_single(number: f32, rounding: Rounding) -> Self {
        Self::rounded(number.into(), rounding)
    }
    /// A zero of the same sign for a subnormal number.
    fn flush(self) -> Self;
}

impl Float for f64 {
    #[inline(always)]
    fn wide(self) -> f64 {
        self
    }
    #[inline(always)]
    fn rounded(number: f64, _: Rounding) -> Self {
        number
    }
    #[inline(always)]
    fn flush(self) -> Self {
        self
    }
}

impl Float for f32 {
    #[inline(always)]
    fn wide(self) -> f64 {
        self.into()
    }
    #[inline(always)]
    fn rounded(number: f64, rounding: Rounding) -> Self {
        match rounding {
            Rounding::Nearest => number as f32,
            _ => f32::from_bits(SINGLE.narrow(number, rounding)),
        }
    }
    #[inline(always)]
    fn flush(self) -> Self {
        f32::from_bits(if self.abs() < f32::MIN_POSITIVE { self.to_bits() & 1 << 31 } else { self.to_bits() })
    }
}

impl Float for F16 {
    #[inline(always)]
    fn wide(self) -> f64 {
        const TWO_TO_112: f32 = f32::from_bits((112 + 127) << 23);
        let magnitude = u32::from(self.0 & 0x7fff);
        let scaled = (f32::from_bits(magnitude << 13) * TWO_TO_112).to_bits();
        let special = if magnitude >= HALF.infinity { SINGLE.infinity } else { 0 };
        f32::from_bits(scaled | special | u32::from(self.0 & 0x8000) << 16).into()
    }
    #[inline(always)]
    fn rounded(number: f64, rounding: Rounding) -> Self {
        F16(HALF.narrow(number, rounding) as u16)
    }
    #[inline(always)]
    fn of_single(number: f32, rounding: Rounding) -> Self {
        match rounding {
            Rounding::Nearest => F16(nearest_half(number)),
            _ => Self::rounded(number.into(), rounding),
        }
    }
    #[inline(always)]
    fn flush(self) -> Self {
        F16(if self.0 & 0x7c00 == 0 { self.0 & 0x8000 } else { self.0 })
    }
}

impl Float for Bf16 {
    #[inline(always)]
    fn wide(self) -> f64 {
        f32::from_bits(u32::from(self.0) << 16).into()
    }
    #[inline(always)]
    fn rounded(number: f64, rounding: Rounding) -> Self {
        Bf16(BRAIN.narrow(number, rounding) as u16)
    }
    #[inline(always)]
    fn of_single(number: f32, rounding: Rounding) -> Self {
        match rounding {
            Rounding::Nearest => Bf16(nearest_brain(number)),
            _ => Self::rounded(number.into(), rounding),
        }
    }
    #[inline(always)]
    fn flush(self) -> Self {
        Bf16(if self.0 & 0x7f80 == 0 { self.0 & 0x8000 } else { self.0 })
    }
}

impl<T: Float> Float for Flushed<T> {
    #[inline(always)]
    fn wide(self) -> f64 {
        self.0.wide()
    }
    #[inline(always)]
    fn rounded(number: f64, rounding: Rounding) -> Self {
        Flushed(T::rounded(number, rounding))
    }
    #[inline(always)]
    fn flush(self) -> Self {
        self
    }
}

/// The `f16` nearest to a number. Below the normal ones, adding a half in `f32` rounds to the same places as `f16` has.
#[inline(always)]
fn nearest_half(number: f32) -> u16 {
    const SMALLEST_NORMAL: u32 = (127 - 14) << 23;
    const BEYOND: u32 = (127 + 16) << 23;
    let magnitude = number.to_bits() & 0x7fff_ffff;
    let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0xfff + (magnitude >> 13 & 1)) >> 13;
    let small = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let result = if magnitude < SMALLEST_NORMAL { small } else { normal };
    let result = if magnitude >= BEYOND { HALF.infinity } else { result };
    let result = result | number.to_bits() >> 31 << 15;
    if number.is_nan() { HALF.nan as u16 } else { result as u16 }
}

/// The `bf16` nearest to a number, whose places are the upper ones of `f32`.
#[inline(always)]
fn nearest_brain(number: f32) -> u16 {
    let bits = number.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if number.is_nan() { BRAIN.nan as u16 } else { rounded as u16 }
}
