//! What floating-point numbers compute (PTX ISA 8.7, sections 9.7.3 and 9.7.4): each result is the exact one rounded
//! once.

use super::floats::{Bf16, F16, Float, Flushed};
use super::lanewise::Number;
use super::rounding::{self, Rounding};

/// Sums, products and choices. For `f64` there is rounding to nearest only.
pub(super) trait Arithmetic: Number {
    /// The sum.
    fn plus(self, other: Self, rounding: Rounding) -> Self;
    /// The product.
    fn times(self, other: Self, rounding: Rounding) -> Self;
    /// The product plus a third number.
    fn times_plus(self, factor: Self, addend: Self, rounding: Rounding) -> Self;
    /// The number with the other sign.
    fn negated(self) -> Self;
    /// The number without its sign.
    fn magnitude(self) -> Self;
    /// The smaller (`MIN`) or the larger of two numbers, -0 less than 0. Of a number and a NaN it is the number, or NaN
    /// for `NAN`.
    fn extreme<const MIN: bool, const NAN: bool>(self, other: Self) -> Self;
    /// The number, with the other sign if the second operand is negative.
    fn signed_by(self, other: Self) -> Self;
    /// The nearest number from zero to one, zero for NaN: `sat`.
    fn saturated(self) -> Self;
    /// Zero for a negative number: `relu`.
    fn rectified(self) -> Self;
}

/// Division and square root, of `f32`.
pub(super) trait Division: Arithmetic {
    /// The number one.
    const ONE: Self;
    /// The quotient.
    fn over(self, other: Self, rounding: Rounding) -> Self;
    /// The square root.
    fn root(self, rounding: Rounding) -> Self;
}

/// The methods that only choose between numbers, for a type that has Rust's operators.
macro_rules! choices {
    () => {
        #[inline(always)]
        fn negated(self) -> Self {
            -self
        }
        #[inline(always)]
        fn magnitude(self) -> Self {
            self.abs()
        }
        #[inline(always)]
        fn extreme<const MIN: bool, const NAN: bool>(self, other: Self) -> Self {
            let before = (self < other) | ((self == other) & self.is_sign_negative());
            let chosen = if before == MIN { self } else { other };
            let (if_self_is_nan, if_other_is_nan) = if NAN { (self, other) } else { (other, self) };
            let chosen = if other.is_nan() { if_other_is_nan } else { chosen };
            if self.is_nan() { if_self_is_nan } else { chosen }
        }
        #[inline(always)]
        fn signed_by(self, other: Self) -> Self {
            if other.is_sign_negative() { -self } else { self }
        }
        #[inline(always)]
        fn saturated(self) -> Self {
            if self > 0.0 { self.min(1.0) } else { 0.0 }
        }
        #[inline(always)]
        fn rectified(self) -> Self {
            if self <= 0.0 { 0.0 } else { self }
        }
    };
}

impl Arithmetic for f32 {
    #[inline(always)]
    fn plus(self, other: Self, rounding: Rounding) -> Self {
        match rounding {
            Rounding::Nearest => self + other,
            _ => Self::rounded(rounding::sum(self.wide(), other.wide(), rounding), rounding),
        }
    }
    #[inline(always)]
    fn times(self, other: Self, rounding: Rounding) -> Self {
        match rounding {
            Rounding::Nearest => self * other,
            _ => Self::rounded(self.wide() * other.wide(), rounding),
        }
    }
    #[inline(always)]
    fn times_plus(self, factor: Self, addend: Self, rounding: Rounding) -> Self {
        match rounding {
            Rounding::Nearest => self.mul_add(factor, addend),
            _ => Self::rounded(rounding::sum(self.wide() * factor.wide(), addend.wide(), rounding), rounding),
        }
    }
    choices!();
}

impl Division for f32 {
    const ONE: Self = 1.0;
    #[inline(always)]
    fn over(self, other: Self, rounding: Rounding) -> Self {
        match rounding {
            Rounding::Nearest => self / other,
            _ => Self::rounded(rounding::quotient(self.wide(), other.wide()), rounding),
        }
    }
    #[inline(always)]
    fn root(self, rounding: Rounding) -> Self {
        match rounding {
            Rounding::Nearest => self.sqrt(),
            _ => Self::rounded(rounding::root(self.wide()), rounding),
        }
    }
}

impl Arithmetic for f64 {
    #[inline(always)]
    fn plus(self, other: Self, _: Rounding) -> Self {
        self + other
    }
    #[inline(always)]
    fn times(self, other: Self, _: Rounding) -> Self {
        self * other
    }
    #[inline(always)]
    fn times_plus(self, factor: Self, addend: Self, _: Rounding) -> Self {
        self.mul_add(factor, addend)
    }
    choices!();
}

/// Arithmetic of 16-bit numbers, by way of 64 bits; signs are bits, NaN's too.
macro_rules! small_arithmetic {
    ($($number:ident)+) => {$(
        impl Arithmetic for $number {
            #[inline(always)]
            fn plus(self, other: Self, rounding: Rounding) -> Self {
                Self::rounded(rounding::sum(self.wide(), other.wide(), rounding), rounding)
            }
            #[inline(always)]
            fn times(self, other: Self, rounding: Rounding) -> Self {
                Self::rounded(self.wide() * other.wide(), rounding)
            }
            #[inline(always)]
            fn times_plus(self, factor: Self, addend: Self, rounding: Rounding) -> Self {
                Self::rounded(rounding::sum(self.wide() * factor.wide(), addend.wide(), rounding), rounding)
            }
            #[inline(always)]
            fn negated(self) -> Self {
                $number(self.0 ^ 0x8000)
            }
            #[inline(always)]
            fn magnitude(self) -> Self {
                $number(self.0 & 0x7fff)
            }
            #[inline(always)]
            fn extreme<const MIN: bool, const NAN: bool>(self, other: Self) -> Self {
                Self::of_single(self.wide().extreme::<MIN, NAN>(other.wide()) as f32, Rounding::Nearest)
            }
            #[inline(always)]
            fn signed_by(self, other: Self) -> Self {
                $number(self.0 ^ other.0 & 0x8000)
            }
            #[inline(always)]
            fn saturated(self) -> Self {
                Self::of_single(self.wide().saturated() as f32, Rounding::Nearest)
            }
            #[inline(always)]
            fn rectified(self) -> Self {
                Self::of_single(self.wide().rectified() as f32, Rounding::Nearest)
            }
        }
    )+};
}

small_arithmetic!(F16 Bf16);

/// Each method made from the method of the number inside.
macro_rules! by_parts {
    ($($name:ident($($operand:ident),*; $($rounding:ident)?);)*) => {$(
        #[inline(always)]
        fn $name(self $(, $operand: Self)* $(, $rounding: Rounding)?) -> Self {
            Self(self.0.$name($($operand.0,)* $($rounding)?))
        }
    )*};
}

impl<T: Arithmetic + Float> Arithmetic for Flushed<T> {
    by_parts! {
        plus(other; rounding);
        times(other; rounding);
        times_plus(factor, addend; rounding);
        negated(;);
        magnitude(;);
        signed_by(other;);
        saturated(;);
        rectified(;);
    }
    #[inline(always)]
    fn extreme<const MIN: bool, const NAN: bool>(self, other: Self) -> Self {
        Self(self.0.extreme::<MIN, NAN>(other.0))
    }
}

impl<T: Division + Float> Division for Flushed<T> {
    const ONE: Self = Flushed(T::ONE);
    by_parts! {
        over(other; rounding);
        root(; rounding);
    }
}
