//! An interpreter of NVIDIA's PTX: runs the kernels that NVRTC compiles, without a GPU.
//!
//! [`Program::parse`] reads a kernel; [`run()`] executes its blocks, warps of 32 lanes in lock step, on a launch's [`Memory`]. An
//! [`Observer`] is told of each instruction and each access: a sanitiser or a counter. An instruction that is not known is an error
//! that names it, never a guess.
//!
//! The files read from the bottom up: none needs one that comes later.
//!
//! 1. [`lanes`] are what a warp computes with, [`operand`] is what instructions name, `windows` are generic addresses, `error` is what
//!    goes wrong.
//! 2. [`compute`] has the functions of registers, by opcode.
//! 3. [`program`] is a kernel: instructions with all that they name. `flow` finds in it where lanes that part come together.
//! 4. `parse` takes a text apart, `decode` makes instructions of its statements.
//! 5. `run` executes a program.
//! 6. [`sanitise`] and [`count`] look on, [`time`] says how long what was counted takes.

pub mod compute;
pub mod count;
mod decode;
mod error;
mod flow;
pub mod lanes;
pub mod operand;
mod parse;
pub mod program;
mod run;
pub mod sanitise;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
pub mod time;
mod windows;

pub use error::{ParseError, Site, Stop};
pub use flow::ControlFlow;
pub use program::Program;
pub use program::fragment::Number;
pub use program::matrix::{Matrix, Products};
pub use run::launch::{Chance, Done, run};
pub use run::memory::{Access, Buffer, Kind, Memory, Place};
pub use run::observe::{At, Observer};
pub use run::shape::Shape;
