//! What executes a program: memory, warps with their registers, each kind of instruction, and the launch of all blocks.

mod access;
mod atomic;
mod collective;
mod context;
pub mod launch;
mod matrix;
pub mod memory;
pub mod observe;
mod registers;
pub mod shape;
mod step;
mod transfer;
mod warp;
