//! The stages of a memory layer on the processor: query, score, combine, weigh and expand, forwards and backwards, and the optimisers of its tables.
//!
//! Arithmetic is f32. Keys and tables are read as they lie, f32, f16 or bf16, in memory or in a mapped file, and widened as they are read; of an f16 or
//! bf16 layer queries and keys are rounded where DESIGN §2 rounds them. All cores share tokens, tiles and rows, as rayon's current pool has them; how
//! work is cut up, shapes alone decide, so any number of threads gives the same bits. No token sees another one: what is no number in one row of the
//! input spoils that row alone.
//!
//! Memory of a call, beside what it returns: for each thread a tile of scores and of queries, `64 · (side_keys + 2 · key_dim)` numbers, and `3 · top_m²`
//! integers for the pairs of a head; while a prepared layer multiplies, the rows that it multiplies once more; and of all tokens what [`Saved`] keeps, some `query_pairs · 4 · key_dim + heads · top_m · (4 + 2 · tucker_rank + cores) + pooled_dim` numbers
//! a token.

mod layer;
mod linear;
mod norm;
mod numbers;
mod output;
mod panels;
mod select;
mod shape;
pub mod stages;
pub mod table;

pub use layer::{Forward, Gradients, Layer, Saved, Weights};
pub use linear::Linear;
pub use numbers::{Numbers, NumbersMut, vectors};
pub use shape::{Place, Shape};
pub use table::RowGradients;
pub use ultramem_kernels::{Error, Result};
