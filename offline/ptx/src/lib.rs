//! An interpreter of NVIDIA's PTX: runs the kernels that NVRTC compiles, without a GPU.
//!
//! [`Program::parse`] reads a kernel; [`run`] executes its blocks, warps of 32 lanes in lock step, on a launch's [`Memory`]. An
//! [`Observer`] is told of each instruction and each access: a sanitiser or a counter. An instruction that is not known is an error
//! that names it, never a guess.

mod access;
mod atomic;
mod collective;
pub mod compute;
pub mod count;
mod decode;
mod error;
mod flow;
pub mod lanes;
mod launch;
mod matrix;
mod memory;
mod observe;
mod parse;
pub mod program;
pub mod sanitise;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod text;
pub mod time;
mod transfer;
mod uses;
mod warp;
mod windows;

pub use error::{ParseError, Site, Stop};
pub use flow::ControlFlow;
pub use launch::{Chance, Done, run};
pub use matrix::{Matrix, Number, Products};
pub use memory::{Access, Buffer, Kind, Memory, Place};
pub use observe::{At, Observer};
pub use program::Program;
pub use warp::{Context, Shape, State, Warp};
