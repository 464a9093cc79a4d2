//! Memory layers next to what they compete with: models of equal computation and equal sparse parameters, planned, counted
//! and run, one decoding step at a time, with random weights; the kernels that these need beside a memory layer's, and their CPU oracle.
//!
//! | design | where its sparse parameters are |
//! |---|---|
//! | [`Design::Dense`] | it has none: a wider FFN instead |
//! | [`Design::Moe`] | experts in every block, of which a token uses two |
//! | [`Design::ProductKey`], [`Design::MemoryPlus`], [`Design::UltraMem`] | a few memory layers beside a dense FFN in every block |
//!
//! A [`Scale`] says how much may be computed and stored, a [`Plan`] is one design's way to spend that, [`Plan::cost`] counts
//! its bytes and operations, and a [`Decoder`] runs it. Each of the [`kernels`] can also be launched alone; [`reference`](mod@reference) is
//! what they are held against.

mod cost;
pub mod kernels;
mod model;
mod plan;
pub mod reference;

pub use model::{Cache, Decoder};
pub use plan::{Design, Plan, Scale};
