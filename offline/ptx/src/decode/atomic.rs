//! Which atomic operation an opcode is.

use super::reader::Operands;
use crate::operand::Space;
use crate::parse::opcode::{element, is_hint, space, takes, vector};
use crate::program::{Atomic, AtomicFunction};

/// The operation that an opcode names.
pub fn decode(parts: &[&str], operands: &mut Operands<'_>) -> Option<Atomic> {
    use AtomicFunction as F;
    // The type is the last word, or of a vector's form stands before the operation.
    let at = parts.iter().rposition(|word| element(word).is_some())?;
    let (ty, element) = (parts[at], element(parts[at])?);
    let (name, hints) = name_and_hints(&[&parts[1..at], &parts[at + 1..]].concat())?;
    let function = match (name, ty) {
        ("add", "u32" | "s32" | "u64" | "s64") => F::Add,
        ("add", "f32") => F::AddF32,
        ("add", "f64") => F::AddF64,
        ("add", "f16") => F::AddF16,
        ("add", "f16x2") => F::AddF16x2,
        ("add", "bf16") => F::AddBf16,
        ("add", "bf16x2") => F::AddBf16x2,
        ("and", "b32" | "b64") => F::And,
        ("or", "b32" | "b64") => F::Or,
        ("xor", "b32" | "b64") => F::Xor,
        ("exch", "b32" | "b64") if parts[0] == "atom" => F::Exchange,
        ("cas", "b16" | "b32" | "b64") if parts[0] == "atom" => F::CompareAndSwap,
        ("inc", "u32") => F::Increment,
        ("dec", "u32") => F::Decrement,
        ("min", "u32" | "u64") => F::MinUnsigned,
        ("max", "u32" | "u64") => F::MaxUnsigned,
        ("min", "s32" | "s64") => F::MinSigned,
        ("max", "s32" | "s64") => F::MaxSigned,
        _ => return None,
    };
    let (space, count) = (space(&hints), vector(&hints)?);
    operands.skip_policy(&hints);
    let targets = if parts[0] == "red" { Box::new([]) } else { operands.targets()? };
    let (address, mut sources) = (operands.address()?, operands.sources()?.into_vec());
    let floats = matches!(ty.strip_prefix('b').unwrap_or(ty), "f16" | "f16x2" | "f32");
    let vectors = count == 1 || floats && usize::from(element.size) * count <= 16;
    let fits = sources.len() == count
        && (parts[0] == "red" || targets.len() == count)
        && targets.iter().flatten().all(|target| takes(*target, element));
    if function == F::CompareAndSwap {
        sources.push(operands.source()?);
    }
    let known = fits && vectors && matches!(space, Space::Generic | Space::Global | Space::Shared);
    let (size, sources) = (element.size, sources.into());
    known.then_some(Atomic { space, function, size, targets, address, sources })
}

/// The operation among the words of an opcode, and the others, which are all without effect here.
fn name_and_hints<'a>(words: &[&'a str]) -> Option<(&'a str, Vec<&'a str>)> {
    const NAMES: [&str; 10] = ["add", "and", "or", "xor", "exch", "cas", "inc", "dec", "min", "max"];
    let (names, hints): (Vec<&str>, Vec<&str>) = words.iter().partition(|word| NAMES.contains(word));
    let known = hints.iter().all(|word| *word == "noftz" || is_hint(word));
    match names.as_slice() {
        [name] if known => Some((name, hints)),
        _ => None,
    }
}
