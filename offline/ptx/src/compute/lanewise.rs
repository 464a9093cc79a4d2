//! Functions of whole registers made from functions of one lane: how a lane's bits become a number and back, and the
//! loops over lanes.

use crate::lanes::{Mask, WARP, Word, those};
use multiversion::multiversion;

/// A number in one lane of a register.
pub(super) trait Number: Copy {
    /// What the lane holds: 32 or 64 bits.
    type Bits: Copy + Default;
    /// The number of the lower bits; what lies above its width is ignored.
    fn read(bits: Self::Bits) -> Self;
    /// The bits of the number, zeros above its width.
    fn write(self) -> Self::Bits;
}

/// A register of numbers.
pub(super) type Register<T> = [<T as Number>::Bits; WARP];

macro_rules! whole_numbers {
    ($($bits:ty: $($number:ty as $plain:ty),+;)*) => {$($(
        impl Number for $number {
            type Bits = $bits;
            #[inline(always)]
            fn read(bits: $bits) -> Self {
                bits as Self
            }
            #[inline(always)]
            fn write(self) -> $bits {
                self as $plain as $bits
            }
        }
    )+)*};
}

whole_numbers! {
    u32: u8 as u8, i8 as u16, u16 as u16, i16 as u16, u32 as u32, i32 as u32;
    u64: u64 as u64, i64 as u64;
}

/// A NaN that an operation makes has all bits set but the sign, whatever the operands' were.
impl Number for f32 {
    type Bits = u32;
    #[inline(always)]
    fn read(bits: u32) -> Self {
        f32::from_bits(bits)
    }
    #[inline(always)]
    fn write(self) -> u32 {
        if self.is_nan() { 0x7fff_ffff } else { self.to_bits() }
    }
}

impl Number for f64 {
    type Bits = u64;
    #[inline(always)]
    fn read(bits: u64) -> Self {
        f64::from_bits(bits)
    }
    #[inline(always)]
    fn write(self) -> u64 {
        self.to_bits()
    }
}

/// The upper halves of words.
pub(super) fn upper(words: &Word) -> Word {
    words.map(|word| word >> 16)
}

/// Words from their lower and upper halves.
pub(super) fn join(lower: Word, upper: Word) -> Word {
    std::array::from_fn(|lane| lower[lane] | upper[lane] << 16)
}

macro_rules! maps {
    ($($(#[$doc:meta])* $name:ident($($operand:ident: $type:ident),+);)*) => {$(
        $(#[$doc])*
        #[multiversion(targets("x86_64+avx2+fma"), dispatcher = "direct")]
        pub(super) fn $name<$($type: Number,)+ D: Number, F: Fn($($type),+) -> D>(
            $($operand: &Register<$type>,)+
            function: F,
        ) -> Register<D> {
            let mut result = [D::Bits::default(); WARP];
            for lane in 0..WARP {
                result[lane] = function($($type::read($operand[lane])),+).write();
            }
            result
        }
    )*};
}

maps! {
    /// A function of one operand in each lane.
    map1(a: A);
    /// A function of two operands in each lane.
    map2(a: A, b: B);
    /// A function of three operands in each lane.
    map3(a: A, b: B, c: C);
    /// A function of four operands in each lane.
    map4(a: A, b: B, c: C, e: E);
}

/// The lanes where a condition on one operand holds.
#[multiversion(targets("x86_64+avx2+fma"), dispatcher = "direct")]
pub(super) fn test1<A: Number, F: Fn(A) -> bool>(a: &Register<A>, condition: F) -> Mask {
    those(|lane| condition(A::read(a[lane])))
}

/// The lanes where a condition on two operands holds.
#[multiversion(targets("x86_64+avx2+fma"), dispatcher = "direct")]
pub(super) fn test2<A: Number, B: Number, F: Fn(A, B) -> bool>(a: &Register<A>, b: &Register<B>, condition: F) -> Mask {
    those(|lane| condition(A::read(a[lane]), B::read(b[lane])))
}

/// The [`Function`](super::function::Function) that a closure computes in each lane, or, if the constant before it says so, in each half of each
/// lane. A result of type `bool` makes a predicate.
macro_rules! op {
    ($PAIR:ident, |$a:ident: $A:ty| -> $D:ty $body:block) => {
        op!($PAIR, map1, (a), (|$a: $A| -> $D { $body }), |$a: $A| -> $D $body)
    };
    ($PAIR:ident, |$a:ident: $A:ty, $b:ident: $B:ty| -> $D:ty $body:block) => {
        op!($PAIR, map2, (a, b), (|$a: $A, $b: $B| -> $D { $body }), |$a: $A, $b: $B| -> $D $body)
    };
    ($PAIR:ident, |$a:ident: $A:ty, $b:ident: $B:ty, $c:ident: $C:ty| -> $D:ty $body:block) => {
        op!(
            $PAIR,
            map3,
            (a, b, c),
            (|$a: $A, $b: $B, $c: $C| -> $D { $body }),
            |$a: $A, $b: $B, $c: $C| -> $D $body
        )
    };
    ($PAIR:ident, $loop:ident, ($($operand:ident),+), $function:expr, $($single:tt)+) => {
        if $PAIR {
            $crate::compute::function::Function::from(
                (|$($operand),+| {
                    let function = $function;
                    let lower = $crate::compute::lanewise::$loop($($operand,)+ function);
                    let upper = $crate::compute::lanewise::$loop(
                        $(&$crate::compute::lanewise::upper($operand),)+
                        function,
                    );
                    $crate::compute::lanewise::join(lower, upper)
                }) as fn($(op!(@word $operand)),+) -> $crate::lanes::Word,
            )
        } else {
            op!($($single)+)
        }
    };
    (@word $operand:ident) => { &$crate::lanes::Word };
    (|$a:ident: $A:ty| -> bool $body:block) => {
        op!(test1, (a: $A) -> $crate::lanes::Mask, |$a: $A| $body)
    };
    (|$a:ident: $A:ty, $b:ident: $B:ty| -> bool $body:block) => {
        op!(test2, (a: $A, b: $B) -> $crate::lanes::Mask, |$a: $A, $b: $B| $body)
    };
    (|$a:ident: $A:ty| -> $D:ty $body:block) => {
        op!(map1, (a: $A) -> $crate::compute::lanewise::Register<$D>, |$a: $A| -> $D { $body })
    };
    (|$a:ident: $A:ty, $b:ident: $B:ty| -> $D:ty $body:block) => {
        op!(map2, (a: $A, b: $B) -> $crate::compute::lanewise::Register<$D>, |$a: $A, $b: $B| -> $D { $body })
    };
    (|$a:ident: $A:ty, $b:ident: $B:ty, $c:ident: $C:ty| -> $D:ty $body:block) => {
        op!(map3, (a: $A, b: $B, c: $C) -> $crate::compute::lanewise::Register<$D>, |$a: $A, $b: $B, $c: $C| -> $D {
            $body
        })
    };
    (|$a:ident: $A:ty, $b:ident: $B:ty, $c:ident: $C:ty, $e:ident: $E:ty| -> $D:ty $body:block) => {
        op!(
            map4,
            (a: $A, b: $B, c: $C, e: $E) -> $crate::compute::lanewise::Register<$D>,
            |$a: $A, $b: $B, $c: $C, $e: $E| -> $D { $body }
        )
    };
    ($loop:ident, ($($operand:ident: $type:ty),+) -> $result:ty, $function:expr) => {
        $crate::compute::function::Function::from(
            (|$($operand),+| $crate::compute::lanewise::$loop($($operand,)+ $function))
                as fn($(&$crate::compute::lanewise::Register<$type>),+) -> $result,
        )
    };
}

/// An expression compiled for each of the types that a PTX type's name may mean here; none for other names.
macro_rules! for_type {
    ($name:expr, $T:ident in { $($($text:literal)|+ => $type:ty),+ $(,)? } => $body:expr) => {
        match $name {
            $($($text)|+ => {
                type $T = $type;
                $body
            })+
            _ => None,
        }
    };
}

/// An expression compiled once for `true` and once for `false`.
macro_rules! for_flag {
    ($value:expr, $FLAG:ident => $body:expr) => {
        if $value {
            const $FLAG: bool = true;
            $body
        } else {
            const $FLAG: bool = false;
            $body
        }
    };
}

pub(super) use {for_flag, for_type, op};

/// The words of an opcode that are still to be understood.
pub(super) struct Words<'a>(pub &'a [&'a str]);

impl Words<'_> {
    /// Takes the next word if it is this one.
    pub fn take(&mut self, word: &str) -> bool {
        let found = self.0.first() == Some(&word);
        if found {
            self.0 = &self.0[1..];
        }
        found
    }

    /// Takes the next two words if they are these.
    pub fn take_both(&mut self, first: &str, second: &str) -> bool {
        let found = self.0.starts_with(&[first, second]);
        if found {
            self.0 = &self.0[2..];
        }
        found
    }

    /// Nothing is left, if every word has been taken.
    pub fn end(&self) -> Option<()> {
        self.0.is_empty().then_some(())
    }
}
