//! The stages of a layer, a folder each: `mod.rs` has the launch, `forward.rs` and `backward.rs` its kernels.

pub mod combine;
pub mod expand;
pub(crate) mod norm;
pub mod query;
pub(crate) mod retrieve;
pub mod score;
pub mod weigh;
