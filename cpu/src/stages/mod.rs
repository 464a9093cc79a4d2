//! The stages, one file each with its forward and its backward pass: slices of the documented shapes, of one number of tokens, and keys, slots and
//! places of the layer.
//!
//! # Errors
//! Slices of other lengths than the others call for, rows of kept keys that are not ascending, keys, slots or places that the layer does not have.

pub mod combine;
pub mod expand;
mod given;
pub mod query;
pub mod score;
pub mod weigh;
