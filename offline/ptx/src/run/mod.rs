//! What executes a program: memory, warps with their registers, each kind of instruction, and the launch of all blocks.
//!
//! From the bottom up: [`shape`], [`memory`] and who looks on ([`observe`]); copies under way ([`transfer::state`]), a warp's [`context`],
//! its state ([`warp`]) and its [`registers`]; loads and stores ([`access`]), then [`atomic`], [`collective`], [`matrix`] and
//! [`transfer`]; one instruction of a warp ([`step`]); all blocks ([`launch`]).

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
