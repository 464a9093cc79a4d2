//! The stages, one file each with its forward and its backward pass.

pub mod combine;
pub mod expand;
pub mod query;
pub mod score;
pub mod weigh;
