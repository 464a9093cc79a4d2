//! What our kernels are measured against, and the layers that both are given.
//!
//! [`Composition`] is the layer in stock Burn operations; [`Case`] lists the shapes of the comparison and makes random
//! weights and inputs for them.

mod case;
mod composition;

pub use case::Case;
pub use composition::{Chosen, Composition, Kept};
