//! Rounding to the formats of floating-point numbers (PTX ISA 8.7, sections 5.2.3 and 9.7.3), in any direction and once
//! only.
//!
//! A result is first held in 64 bits: exactly, or, where that is not enough, rounded to odd: the neighbour whose last
//! bit is one. With two bits or more to spare, rounding that to the narrower format gives what rounding the exact
//! result would have given.

/// Which of the two neighbours a number that lies between them becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rounding {
    /// The nearer, and of two equally near ones the even one: `rn`.
    Nearest,
    /// The nearer, and of two equally near ones the larger in magnitude: `rna`.
    NearestAway,
    /// The one towards zero: `rz`.
    Zero,
    /// The lower one: `rm`.
    Down,
    /// The higher one: `rp`.
    Up,
}

/// An expression compiled for each of the roundings `rn`, `rz`, `rm` and `rp`, with the word's optional last letter;
/// none for other words.
macro_rules! for_rounding {
    ($word:expr, $R:ident => $body:expr) => {
        match $word {
            "rn" | "rni" => {
                const $R: Rounding = Rounding::Nearest;
                $body
            }
            "rz" | "rzi" => {
                const $R: Rounding = Rounding::Zero;
                $body
            }
            "rm" | "rmi" => {
                const $R: Rounding = Rounding::Down;
                $body
            }
            "rp" | "rpi" => {
                const $R: Rounding = Rounding::Up;
                $body
            }
            _ => None,
        }
    };
}

pub(super) use for_rounding;

/// A format of floating-point numbers: sign, exponent, fraction.
#[derive(Debug, Clone, Copy)]
pub(super) struct Format {
    /// Bits of the fraction.
    pub fraction: u32,
    /// What is added to the exponent.
    pub bias: u32,
    /// The largest finite number.
    pub largest: u32,
    /// Infinity; above the sign bit in a format that has none.
    pub infinity: u32,
    /// What an operation's NaN becomes.
    pub nan: u32,
    /// The place of the sign.
    pub sign: u32,
}

/// `f32`.
pub(super) const SINGLE: Format =
    Format { fraction: 23, bias: 127, largest: 0x7f7f_ffff, infinity: 0x7f80_0000, nan: 0x7fff_ffff, sign: 31 };
/// `f16`.
pub(super) const HALF: Format =
    Format { fraction: 10, bias: 15, largest: 0x7bff, infinity: 0x7c00, nan: 0x7fff, sign: 15 };
/// `bf16`.
pub(super) const BRAIN: Format =
    Format { fraction: 7, bias: 127, largest: 0x7f7f, infinity: 0x7f80, nan: 0x7fff, sign: 15 };
/// `tf32` without the 13 bits below it.
pub(super) const TENSOR: Format =
    Format { fraction: 10, bias: 127, largest: 0x3_fbff, infinity: 0x3_fc00, nan: 0x3_ffff, sign: 18 };
/// `e4m3`: no infinity.
pub(super) const E4M3: Format = Format { fraction: 3, bias: 7, largest: 0x7e, infinity: 0x100, nan: 0x7f, sign: 7 };
/// `e5m2`.
pub(super) const E5M2: Format = Format { fraction: 2, bias: 15, largest: 0x7b, infinity: 0x7c, nan: 0x7f, sign: 7 };
/// `e2m3`: neither infinity nor NaN, which becomes the largest number.
pub(super) const E2M3: Format = Format { fraction: 3, bias: 1, largest: 0x1f, infinity: 0x40, nan: 0x1f, sign: 5 };
/// `e3m2`: neither infinity nor NaN, which becomes the largest number.
pub(super) const E3M2: Format = Format { fraction: 2, bias: 3, largest: 0x1f, infinity: 0x40, nan: 0x1f, sign: 5 };
/// `e2m1`: neither infinity nor NaN, which becomes the largest number.
pub(super) const E2M1: Format = Format { fraction: 1, bias: 1, largest: 0x7, infinity: 0x10, nan: 0x7, sign: 3 };

impl Format {
    /// The number of these bits, which every format's numbers are in 64 bits.
    #[inline(always)]
    pub fn widen(self, bits: u32) -> f64 {
        let magnitude = bits & ((1 << self.sign) - 1);
        let (exponent, fraction) = (magnitude >> self.fraction, magnitude & ((1 << self.fraction) - 1));
        let normal = u64::from(exponent + 1023 - self.bias) << 52 | u64::from(fraction) << (52 - self.fraction);
        let smallest = f64::from_bits(u64::from(1023 + 1 - self.bias - self.fraction) << 52);
        let number = if exponent == 0 { f64::from(fraction as i32) * smallest } else { f64::from_bits(normal) };
        let number = if magnitude > self.largest { f64::NAN } else { number };
        let number = if magnitude == self.infinity { f64::INFINITY } else { number };
        if bits >> self.sign & 1 == 1 { -number } else { number }
    }

    /// The bits of a number rounded to this format.
    #[inline(always)]
    pub fn narrow(self, number: f64, rounding: Rounding) -> u32 {
        let bits = number.to_bits();
        let negative = bits >> 63 == 1;
        let exponent = (bits >> 52 & 0x7ff) as i32;
        let fraction = bits & ((1 << 52) - 1);
        let significand = if exponent == 0 { fraction } else { fraction | 1 << 52 };
        let scale = exponent.max(1) - 1023 + self.bias as i32;
        let base = scale.clamp(1, 1 << (self.sign - self.fraction));
        let shift = (52 - self.fraction as i32 + (1 - scale).max(0)).min(62) as u32;
        let (kept, rest, half) = (significand >> shift, significand & ((1 << shift) - 1), 1u64 << (shift - 1));
        let up = match rounding {
            Rounding::Nearest => (rest > half) | ((rest == half) & (kept & 1 == 1)),
            Rounding::NearestAway => rest >= half,
            Rounding::Zero => false,
            Rounding::Down => negative & (rest != 0),
            Rounding::Up => !negative & (rest != 0),
        };
        let magnitude = ((base as u32 - 1) << self.fraction) + kept as u32 + u32::from(up);
        let stays = match rounding {
            Rounding::Nearest | Rounding::NearestAway => false,
            Rounding::Zero => true,
            Rounding::Down => !negative,
            Rounding::Up => negative,
        };
        let beyond = if stays & number.is_finite() { self.largest } else { self.infinity };
        let magnitude = if magnitude > self.largest { beyond } else { magnitude };
        if number.is_nan() { self.nan } else { magnitude | u32::from(negative) << self.sign }
    }

    /// The bits of a number rounded to this format, the largest one for all beyond it, infinity too.
    #[inline(always)]
    pub fn narrow_finite(self, number: f64, rounding: Rounding) -> u32 {
        let largest = self.widen(self.largest);
        let clamped = if number.is_nan() { number } else { number.clamp(-largest, largest) };
        self.narrow(clamped, rounding)
    }
}

/// A number next to `nearest` where the exact result lies on the side that `error` points to: of the two around it the
/// odd one.
#[inline(always)]
fn to_odd(nearest: f64, error: f64) -> f64 {
    let bits = nearest.to_bits();
    let step = if (error > 0.0) == (nearest > 0.0) { 1 } else { u64::MAX };
    let inexact = (error != 0.0) & nearest.is_finite() & (bits & 1 == 0);
    f64::from_bits(if inexact { bits.wrapping_add(step) } else { bits })
}

/// The sum of two numbers whose exponents lie well within those of 64 bits, rounded to odd; a zero from opposite signs
/// is negative when rounding down.
#[inline(always)]
pub(super) fn sum(a: f64, b: f64, rounding: Rounding) -> f64 {
    let sum = a + b;
    let from_b = sum - a;
    let error = (a - (sum - from_b)) + (b - from_b);
    let below = rounding == Rounding::Down && sum == 0.0 && (a.is_sign_negative() || b.is_sign_negative());
    if below { -0.0 } else { to_odd(sum, error) }
}

/// A quotient of two numbers of at most 24 bits, rounded to odd.
#[inline(always)]
pub(super) fn quotient(a: f64, b: f64) -> f64 {
    let nearest = a / b;
    let rest = (-nearest).mul_add(b, a);
    if b.is_infinite() { nearest } else { to_odd(nearest, if b < 0.0 { -rest } else { rest }) }
}

/// The square root of a number of at most 24 bits, rounded to odd.
#[inline(always)]
pub(super) fn root(a: f64) -> f64 {
    let nearest = a.sqrt();
    to_odd(nearest, (-nearest).mul_add(nearest, a))
}

/// The nearest integer, or the next in a direction.
#[inline(always)]
pub(super) fn whole(number: f64, rounding: Rounding) -> f64 {
    match rounding {
        Rounding::Nearest => number.round_ties_even(),
        Rounding::NearestAway => number.round(),
        Rounding::Zero => number.trunc(),
        Rounding::Down => number.floor(),
        Rounding::Up => number.ceil(),
    }
}

/// An integer of 64 bits, rounded to odd.
#[inline(always)]
pub(super) fn of_integer_to_odd(number: i128) -> f64 {
    let nearest = number as f64;
    to_odd(nearest, (number - nearest as i128) as f64)
}

/// An integer of 64 bits, rounded.
#[inline(always)]
pub(super) fn of_integer(number: i128, rounding: Rounding) -> f64 {
    let nearest = number as f64;
    let (above, below) = (nearest as i128 > number, (nearest as i128) < number);
    match rounding {
        Rounding::Zero if above && number > 0 => nearest.next_down(),
        Rounding::Zero if below && number < 0 => nearest.next_up(),
        Rounding::Down if above => nearest.next_down(),
        Rounding::Up if below => nearest.next_up(),
        _ => nearest,
    }
}
