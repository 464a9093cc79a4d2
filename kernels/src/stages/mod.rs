//! The stages of a layer, a folder each: `plan.rs` says from sizes and a device how the stage is launched, `mod.rs` checks tensors and launches
//! that, `forward.rs` and `backward.rs` have the kernels.

pub mod combine;
pub mod expand;
pub(crate) mod norm;
pub mod query;
pub(crate) mod retrieve;
pub mod score;
pub mod weigh;
