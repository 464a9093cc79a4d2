//! Functions of registers, by the banks of their result and operands.

use crate::lanes::{Long, Mask, Word};

/// What an instruction computes: the banks of its result and of its operands, and the function. `W` is a register of up
/// to 32 bits, `L` one of 64, `P` a predicate; the result comes first.
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "the type's description says what the letters mean")]
pub enum Function {
    W(fn(&Word) -> Word),
    WW(fn(&Word, &Word) -> Word),
    WWW(fn(&Word, &Word, &Word) -> Word),
    WWWW(fn(&Word, &Word, &Word, &Word) -> Word),
    WofL(fn(&Long) -> Word),
    L(fn(&Long) -> Long),
    LL(fn(&Long, &Long) -> Long),
    LLL(fn(&Long, &Long, &Long) -> Long),
    /// A shift of a long register by a word.
    LofLW(fn(&Long, &Word) -> Long),
    /// A field of a long register: position and length are words.
    LofLWW(fn(&Long, &Word, &Word) -> Long),
    /// A choice between long registers by a word.
    LofLLW(fn(&Long, &Long, &Word) -> Long),
    LofLLWW(fn(&Long, &Long, &Word, &Word) -> Long),
    LofW(fn(&Word) -> Long),
    LofWW(fn(&Word, &Word) -> Long),
    LofWWL(fn(&Word, &Word, &Long) -> Long),
    PofW(fn(&Word) -> Mask),
    PofWW(fn(&Word, &Word) -> Mask),
    PofL(fn(&Long) -> Mask),
    PofLL(fn(&Long, &Long) -> Mask),
}

macro_rules! from_functions {
    ($($kind:ident($($operand:ty),+) -> $result:ty;)*) => {$(
        impl From<fn($(&$operand),+) -> $result> for Function {
            fn from(function: fn($(&$operand),+) -> $result) -> Self {
                Function::$kind(function)
            }
        }
    )*};
}

from_functions! {
    W(Word) -> Word;
    WW(Word, Word) -> Word;
    WWW(Word, Word, Word) -> Word;
    WWWW(Word, Word, Word, Word) -> Word;
    WofL(Long) -> Word;
    L(Long) -> Long;
    LL(Long, Long) -> Long;
    LLL(Long, Long, Long) -> Long;
    LofLW(Long, Word) -> Long;
    LofLWW(Long, Word, Word) -> Long;
    LofLLW(Long, Long, Word) -> Long;
    LofLLWW(Long, Long, Word, Word) -> Long;
    LofW(Word) -> Long;
    LofWW(Word, Word) -> Long;
    LofWWL(Word, Word, Long) -> Long;
    PofW(Word) -> Mask;
    PofWW(Word, Word) -> Mask;
    PofL(Long) -> Mask;
    PofLL(Long, Long) -> Mask;
}
