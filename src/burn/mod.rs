//! Memory layers as Burn modules, on every CubeCL backend, with and without fusion, with and without `Autodiff`.
//!
//! | item | what |
//! |---|---|
//! | [`UltraMemConfig`], [`ProductKeyMemoryConfig`] | a layer as a Burn user writes it down; `init` gives it its first weights |
//! | [`UltraMem`], [`ProductKeyMemory`] | the modules; [`Memory`] is what both are made of |
//! | [`Placement`], [`Memories`] | the layers of a model, placed by "2:5/6:9", and their skips |
//! | [`Trainer`] | a training step with all that memory layers need |
//! | [`MemoryBackend`] | the bound that a model's methods need |
//!
//! A layer is one node of the autodiff graph; its forward pass saves slots, scores and pooled values, never a gathered row.
//!
//! The table is sparse unless the configuration says otherwise: backward leaves it a gradient of the rows that were read, and
//! [`Trainer::step`] updates these rows in place. Several calls in one graph, and several passes before one step
//! ([`Trainer::accumulate`]), add up; the gradient of a pass that the trainer is not given goes when it is given the next. Every clone of the module shares the table and sees the update. Train in the
//! thread that ran the forward pass. A dense table is a parameter like any other, for optimisers of one's own; its gradient
//! is as large as the table.
//!
//! On CUDA, CubeCL pads the rows of most tensors that Burn makes. Kernels take contiguous ones, so a layer that is new or loaded has its weights so, and a
//! call copies those alone that an optimiser of Burn's has made since. Trainers refuse a sparse table that is not contiguous: loading the model's own
//! record (`model.clone().load_record(model.into_record())`) mends it.

mod autodiff;
mod backend;
mod config;
#[cfg(feature = "burn-fusion")]
mod fusion;
mod module;
mod placement;
mod training;

pub use backend::{Call, MemoryBackend};
pub use config::{ProductKeyMemoryConfig, UltraMemConfig};
pub use module::{Core, Memory, ProductKeyMemory, UltraMem};
pub use placement::{Carried, Memories, Placement};
pub use training::{MemoryModel, StepReport, TableRecord, Trainer, TrainerConfig, TrainerRecord};
