//! Instructions that compute a lane's result from the lane's operands and nothing else: arithmetic, logic, comparisons,
//! conversions.
//!
//! Each is a function of whole registers, a loop over lanes that the compiler makes vector code of. [`find`] gives the
//! function of an opcode; what it does not know has none. Section numbers are those of NVIDIA's PTX ISA 8.7.

mod approximate;
mod arithmetic;
mod bits;
mod compare;
mod convert;
mod convert_packed;
mod double;
mod floats;
mod half;
mod integer;
mod lanewise;
mod rounding;
mod single;
#[cfg(test)]
mod tests;

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
    WofLL(fn(&Long, &Long) -> Word),
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

/// The function of an opcode, written as in PTX with all its modifiers and types; none for an opcode that is not known,
/// or known but not lane by lane.
pub fn find(opcode: &str) -> Option<Function> {
    let (name, modifiers) = opcode.split_once('.')?;
    let words: Vec<&str> = modifiers.split('.').collect();
    let (kind, middle) = words.split_last()?;
    let rooms = [
        integer::find,
        bits::find,
        single::find,
        half::find,
        double::find,
        approximate::find,
        compare::find,
        convert::find,
    ];
    rooms.iter().find_map(|find| find(name, middle, kind))
}
