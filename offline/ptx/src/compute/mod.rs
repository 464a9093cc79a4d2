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
mod function;
mod half;
mod integer;
mod lanewise;
mod rounding;
mod single;
#[cfg(test)]
mod tests;

pub use function::Function;

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
