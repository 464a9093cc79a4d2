//! PTX as text, as NVRTC writes it: declarations, labels, line numbers and statements with their operands (section 4).

pub mod opcode;
mod parser;
pub mod statement;
mod text;

pub use parser::parse;
