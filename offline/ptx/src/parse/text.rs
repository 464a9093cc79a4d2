//! Words of PTX: numbers, names, special registers, variables and lists of operands (sections 4.4 to 5).

use super::opcode;
use crate::operand::{Source, Special};

/// The line of the first file in what follows `.loc`: of inlined code the line that it was inlined at.
pub fn source_line(place: &str) -> Option<u32> {
    let numbers = |text: &str| {
        let mut words = text.split_whitespace().map(|word| word.trim_end_matches(',').parse::<u32>());
        Some((words.next()?.ok()?, words.next()?.ok()?))
    };
    let (file, line) = match place.split_once("inlined_at") {
        Some((inner, outer)) => match numbers(inner)? {
            found @ (1, _) => found,
            _ => numbers(outer)?,
        },
        None => numbers(place)?,
    };
    (file == 1).then_some(line)
}

/// Whether a text is a name: of a label, a register, a variable or a kernel.
pub fn is_name(text: &str) -> bool {
    !text.starts_with(|c: char| c.is_ascii_digit())
        && !text.is_empty()
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "$_%".contains(c))
}

/// Operands, which commas part outside of braces and brackets.
pub fn split(text: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0, 0);
    for (at, character) in text.char_indices() {
        match character {
            '{' | '[' | '(' => depth += 1,
            '}' | ']' | ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(text[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    let last = text[start..].trim();
    if !last.is_empty() {
        parts.push(last);
    }
    parts
}

/// A number as its bits: an integer, or the bits of a float after `0f` or `0d` (section 4.5).
pub fn constant(text: &str) -> Option<u64> {
    let digits = |prefixes: [&str; 2]| prefixes.iter().find_map(|prefix| text.strip_prefix(prefix));
    let exactly = |bits: &str, count: usize| u64::from_str_radix(bits, 16).ok().filter(|_| bits.len() == count);
    if let Some(bits) = digits(["0f", "0F"]) {
        return exactly(bits, 8);
    }
    if let Some(bits) = digits(["0d", "0D"]) {
        return exactly(bits, 16);
    }
    match text.strip_prefix('-') {
        Some(number) => integer(number).map(u64::wrapping_neg),
        None => integer(text),
    }
}

/// An integer without a sign: in hexadecimal, octal, binary or decimal digits.
fn integer(text: &str) -> Option<u64> {
    let text = text.strip_suffix('U').unwrap_or(text);
    if !text.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    let (digits, radix) = match text.as_bytes() {
        [b'0', b'x' | b'X', ..] => (&text[2..], 16),
        [b'0', b'b' | b'B', ..] => (&text[2..], 2),
        [b'0', _, ..] => (&text[1..], 8),
        _ => (text, 10),
    };
    u64::from_str_radix(digits, radix).ok()
}

pub fn special(text: &str) -> Option<Source> {
    let (name, dimension) = text.split_once('.').unwrap_or((text, "x"));
    let dimension = ["x", "y", "z"].iter().position(|it| *it == dimension)? as u8;
    let found = match name {
        "%tid" => Special::Thread(dimension),
        "%ntid" => Special::Threads(dimension),
        "%ctaid" => Special::Block(dimension),
        "%nctaid" => Special::Blocks(dimension),
        "%laneid" => Special::Lane,
        "%warpid" => Special::Warp,
        "%lanemask_lt" => Special::LanesBelow,
        "%lanemask_le" => Special::LanesUpTo,
        "%lanemask_eq" => Special::LaneAlone,
        "%lanemask_ge" => Special::LanesFrom,
        "%lanemask_gt" => Special::LanesAbove,
        "%clock" | "%clock64" | "%globaltimer" => Special::Clock,
        "%dynamic_smem_size" => Special::DynamicShared,
        "%total_smem_size" => Special::TotalShared,
        // One block a cluster.
        "%cluster_ctaid" | "%cluster_ctarank" => return Some(Source::Constant(0)),
        "%cluster_nctaid" | "%cluster_nctarank" => return Some(Source::Constant(1)),
        "WARP_SZ" => return Some(Source::Constant(32)),
        _ => return None,
    };
    Some(Source::Special(found))
}

/// `.param .align 4 .b8 name[56]`, `.global .align 4 .b32 name = 5` and the like.
pub struct Variable {
    pub name: String,
    pub bytes: usize,
    pub alignment: usize,
    pub data: Vec<u8>,
}

impl Variable {
    pub fn parse(text: &str) -> Option<Self> {
        let (declared, value) = text.split_once('=').unwrap_or((text, ""));
        let Words { element, count, alignment, name } = Words::read(declared)?;
        let numbers = value.split([',', '{', '}']).map(str::trim).filter(|it| !it.is_empty());
        let numbers = numbers.map(constant).collect::<Option<Vec<u64>>>()?;
        let data: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes().into_iter().take(element)).collect();
        let (name, bytes) = match name.split_once('[') {
            Some((name, "]")) => (name, data.len()),
            Some((name, length)) => {
                let length: usize = length.strip_suffix(']')?.parse().ok()?;
                (name, length.checked_mul(element * count)?)
            }
            None => (name, element * count),
        };
        let fits = data.len() <= bytes && is_name(name);
        let alignment = alignment.unwrap_or(element * count);
        fits.then(|| Self { name: name.to_string(), bytes, alignment, data })
    }

    /// Puts it behind `end` and moves that on; None where more than `most` bytes would be taken.
    pub fn place(&self, end: &mut usize, most: usize) -> Option<usize> {
        let offset = end.checked_next_multiple_of(self.alignment)?;
        *end = offset.checked_add(self.bytes).filter(|end| *end <= most)?;
        Some(offset)
    }
}

/// What stands before a variable's value: bytes of a number, numbers of an element, alignment, and the name with its length.
struct Words<'a> {
    element: usize,
    count: usize,
    alignment: Option<usize>,
    name: &'a str,
}

impl<'a> Words<'a> {
    fn read(declared: &'a str) -> Option<Self> {
        let mut words = declared.split_whitespace();
        let (mut element, mut count, mut alignment, mut name, mut points) = (None, 1, None, None, false);
        while let Some(word) = words.next() {
            match word {
                ".align" => {
                    let bytes = words.next()?.parse::<usize>().ok().filter(|it| it.is_power_of_two())?;
                    // What a pointer points at is aligned, not the pointer.
                    alignment = if points { alignment } else { Some(bytes) };
                }
                ".ptr" => points = true,
                ".v2" => count = 2,
                ".v4" => count = 4,
                ".param" | ".shared" | ".local" | ".const" | ".global" => {}
                ".visible" | ".extern" | ".weak" | ".common" | ".managed" | ".attribute(.managed)" => {}
                _ => match word.strip_prefix('.') {
                    Some(ty) => element = Some(usize::from(opcode::element(ty)?.size)),
                    None if name.is_none() => name = Some(word),
                    None => return None,
                },
            }
        }
        Some(Self { element: element?, count, alignment, name: name? })
    }
}
