//! Memory layers as GPU kernels in pure Rust: UltraMem (arXiv 2411.12364), UltraMemV2 (arXiv 2508.18756), product-key memory (arXiv
//! 1907.05242), Memory+ (arXiv 2412.09764) and PEER (arXiv 2407.04153), on CUDA and on wgpu (Vulkan, Metal, WebGPU), with a CPU oracle that proves them right.
//!
//! A memory layer gives a transformer a table of value rows, of which each token reads a few dozen. The layer is a
//! corridor of stages, and the same words name its kernels, its oracle, its tests and its benchmarks:
//!
//! | stage | gives | kernels | oracle |
//! |---|---|---|---|
//! | query | a query for each side, `[tokens, query_pairs, 2, key_dim]` | [`kernels::query`] | [`reference::query`] |
//! | score | the `top_m` keys of each side, `[tokens, heads, 2, top_m]` | [`kernels::score`] | [`reference::score`] |
//! | combine | the `top_m` slots of each head, `[tokens, heads, top_m]` | [`kernels::combine`] | [`reference::combine`] |
//! | weigh | the slots' scores, times what the pre-values make of the input | [`kernels::weigh`] | [`reference::weigh`] |
//! | expand | the output, `[tokens, hidden_size]` | [`kernels::expand`] | [`reference::expand`] |
//!
//! [`MemoryLayer`] runs them on any CubeCL runtime; each stage can also be launched alone on device buffers.
//!
//! ```
//! use ultramem::{Dimensions, MemoryConfig, Weights, reference};
//!
//! # fn main() -> ultramem::Result<()> {
//! let config = MemoryConfig::new(Dimensions { side_keys: 32, top_m: 8, ..Dimensions::default() })?;
//! let weights = Weights::random(&config, 42);
//! let input = vec![0.5; 3 * config.hidden_size];
//! // On a device: MemoryLayer::new(&client, config, &weights, ElementType::F32)?.forward(&input)?.
//! let forward = reference::forward(&config, &weights, &input)?;
//! assert_eq!(forward.output.len(), 3 * config.hidden_size);
//! # Ok(())
//! # }
//! ```

#[cfg(feature = "burn")]
pub mod burn;
pub mod checkpoint;
mod config;
mod cost;
#[cfg(feature = "cpu")]
mod cpu;
mod error;
mod layer;
pub mod reference;
mod spectrum;
mod table;
#[cfg(all(feature = "wgpu", not(target_family = "wasm")))]
mod webgpu;
mod weights;

pub use checkpoint::Checkpoint;
pub use config::{
    Activation, Blocks, Capabilities, Dimensions, ElementType, Kind, MemoryConfig, Norm, Queries, Scores, SharedSizes,
    SharedTable, Weigh,
};
pub use cost::{Caches, Choices, Cost, StageCost};
#[cfg(feature = "cpu")]
pub use cpu::{CpuForward, CpuGradients, CpuLayer, CpuSaved};
pub use error::{Error, Result};
pub use layer::{
    BackwardPlans, Beside, Chosen, Forward, Gradients, InputGradients, Kept, LayerWeights, MapGradients, MemoryLayer,
    Plans, Saved, SavedState, Strategies, Stream, UpdatePlans, WeighPlans, Weighed, device_shape, update_shared,
};
pub use spectrum::Spectrum;
pub use table::ValueTable;
#[cfg(feature = "cpu")]
pub use ultramem_cpu as processor;
pub use ultramem_kernels as kernels;
pub use ultramem_kernels::{RowGradients, Tensor};
#[cfg(all(feature = "wgpu", not(target_family = "wasm")))]
pub use webgpu::webgpu_limits;
pub use weights::{HostTensor, PerWeight, Weight, Weights};
