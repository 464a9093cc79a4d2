//! The stages, one file each with its forward and its backward pass.
//!
//! They take what [`Layer`](crate::Layer)'s methods have checked, or what another stage gave: slices of the documented shapes, of one number of tokens, and
//! keys, slots and places of this layer.
//!
//! # Panics
//! Given anything else. [`Layer::forward`](crate::Layer::forward) and its like return errors instead.

pub mod combine;
pub mod expand;
pub mod query;
pub mod score;
pub mod weigh;
