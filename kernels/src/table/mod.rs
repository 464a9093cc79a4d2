//! The value table: its pages, gradients of the rows that were used, and what updates them.

pub(crate) mod group;
pub mod optimiser;
pub(crate) mod pages;
pub(crate) mod row_gradients;
pub(crate) mod segment_sum;
