//! The value table `[rows, value_dim]`: its pages, the gradients of the rows that were used, and what updates them.
//!
//! Entries (a slot of a token, each of one row) are grouped by row, a segment sum gives each row its gradient, and an optimiser reads and writes
//! these rows alone. Nothing here moves bytes in proportion to the table.

pub(crate) mod group;
pub(crate) mod join;
pub(crate) mod locate;
pub mod optimiser;
pub(crate) mod pages;
pub(crate) mod row_gradients;
pub(crate) mod row_products;
pub(crate) mod segment_sum;
pub(crate) mod source;
