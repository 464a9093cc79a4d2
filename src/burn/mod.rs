//! Memory layers as Burn modules, on every CubeCL backend, with and without fusion, and (with the feature `burn-flex`) on Burn's backend of the
//! processor, `Flex`; with and without `Autodiff`.
//!
//! | item | what |
//! |---|---|
//! | [`UltraMemConfig`], [`ProductKeyMemoryConfig`], [`MemoryPlusConfig`] | a layer as a Burn user writes it down; `init` gives it its first weights |
//! | [`UltraMem`], [`ProductKeyMemory`], [`MemoryPlus`] | the modules, `from_checkpoint` too; [`Memory`] is what they are made of |
//! | [`Placement`], [`Memories`] | the layers of a model, placed by "2:5/6:9", and their skips |
//! | [`Trainer`] | a training step with all that memory layers need |
//! | [`SparseTables`] | the sparse tables alone, beside any optimiser of Burn's |
//! | [`SparseOptimizer`] | both as one of Burn's optimisers, for `burn-train`'s learner |
//! | [`MemoryBackend`] | the bound that a model's methods need |
//!
//! A layer is one node of the autodiff graph; its forward pass saves slots, scores and pooled values, never a gathered row.
//!
//! The table is sparse unless the configuration says otherwise: backward leaves it a gradient of the rows that were read, and
//! [`Trainer::step`] updates these rows in place. Several calls in one graph, and several passes before one step
//! ([`Trainer::accumulate`]), add up; a pass that nobody takes is replaced by the next, and the first time that is said aloud. Train in the
//! thread that ran the forward pass.
//!
//! A clone is a copy: a table that somebody else holds (a clone of the module, its record, its [`Memory::layer`], a graph that has not gone
//! backwards) is copied before its first update, once, and there are two tables while the other lives. An update borrows the module
//! mutably, so no thread sees half of one. A dense table is a parameter like any other, for optimisers of one's own; its gradient
//! is as large as the table.
//!
//! On CUDA, CubeCL pads the rows of most tensors that Burn makes. Kernels take contiguous ones, so a layer that is new or loaded has its weights so, and a
//! call copies those alone that an optimiser of Burn's has made since. Trainers refuse a sparse table that is not contiguous: loading the model's own
//! record (`model.clone().load_record(model.into_record())`) mends it.
//!
//! On the processor a call is done when it returns, in the thread that makes it and rayon's others: there is no stream, and layers that add some
//! blocks later run where they read. Weights, inputs and tables that are contiguous are read where they lie.

mod adamw;
mod autodiff;
mod backend;
mod config;
mod engine;
mod full;
#[cfg(feature = "burn-fusion")]
mod fusion;
mod gradients;
mod kernels;
mod model;
mod module;
mod optimiser;
mod pending;
mod placement;
#[cfg(feature = "burn-flex")]
mod processor;
mod sparse;
mod training;

pub use backend::{Buffer, Call, MemoryBackend};
pub use config::{MemoryPlusConfig, ProductKeyMemoryConfig, UltraMemConfig, UltraMemV2Config};
pub use engine::{Buffers, Engine, Gradients, Step, TableOptimiser};
pub use full::FullTensor;
pub use kernels::Kernels;
pub use model::MemoryModel;
pub use module::{Core, LinguaMemoryPlus, Memory, MemoryPlus, Peer, ProductKeyMemory, Tables, UltraMem, UltraMemV2};
pub use optimiser::{SparseOptimizer, SparseOptimizerRecord};
pub use placement::{Carried, Memories, Placement};
#[cfg(feature = "burn-flex")]
pub use processor::Processor;
pub use sparse::{SparseTables, TableRecord};
pub use training::{StepError, StepReport, Stepped, Trainer, TrainerConfig, TrainerRecord};
