//! What is read and written by rows: gradients of the used rows of a table, and the optimisers that follow them.

pub mod optimiser;
mod row_gradients;

pub use row_gradients::RowGradients;
pub(crate) use row_gradients::{Grouped, Named, group};
