//! Words of opcodes: which space or type one names, how many elements a vector has, and what is of no effect here; and which registers
//! and numbers are of a type.

use crate::operand::{Element, Register, Source, Space};

/// Words of loads and stores that order them or tell caches what to keep: here memory is in order, and there are no caches.
const HINTS: &str =
    "weak volatile relaxed acquire release acq_rel mmio cta cluster gpu sys nc ca cg cs lu cv wb wt unified";

/// Whether a word of an opcode names a space, a vector, or what is of no effect here.
pub fn is_hint(word: &str) -> bool {
    let is_space = space(&[word]) != Space::Generic;
    HINTS.split(' ').any(|hint| hint == word)
        || is_space
        || vector(&[word]) != Some(1)
        || ["L1::", "L2::"].iter().any(|it| word.starts_with(it))
}

/// How many elements a vector instruction has.
pub fn vector(parts: &[&str]) -> Option<usize> {
    let found = parts.iter().find_map(|part| part.strip_prefix('v')?.parse().ok());
    Some(found.unwrap_or(1)).filter(|count| [1, 2, 4, 8].contains(count))
}

/// Whether a register holds all of an element.
pub fn takes(register: Register, element: Element) -> bool {
    match register {
        Register::Word(_) => element.size < 8,
        Register::Long(_) => true,
        Register::Predicate(_) => false,
    }
}

/// Whether a register is of a type's bank.
pub fn is_of(register: Register, ty: &str) -> bool {
    element(ty)
        .is_some_and(|element| takes(register, element) && (element.size == 8) == matches!(register, Register::Long(_)))
}

pub fn is_predicate(source: &Source) -> bool {
    matches!(source, Source::Not(_) | Source::Register(Register::Predicate(_)))
}

pub fn is_truth(register: Register) -> bool {
    matches!(register, Register::Predicate(_))
}

/// The space that an opcode names.
pub fn space(parts: &[&str]) -> Space {
    let found = parts.iter().find_map(|part| match part.split("::").next()? {
        "global" => Some(Space::Global),
        "shared" => Some(Space::Shared),
        "local" => Some(Space::Local),
        "param" => Some(Space::Parameter),
        "const" => Some(Space::Constant),
        _ => None,
    });
    found.unwrap_or(Space::Generic)
}

/// The element that a type names.
pub fn element(ty: &str) -> Option<Element> {
    let size = match ty {
        "b8" | "u8" | "s8" => 1,
        "b16" | "u16" | "s16" | "f16" | "bf16" => 2,
        "b32" | "u32" | "s32" | "f32" | "f16x2" | "bf16x2" => 4,
        "b64" | "u64" | "s64" | "f64" => 8,
        _ => return None,
    };
    Some(Element { size, signed: ty.starts_with('s') })
}
