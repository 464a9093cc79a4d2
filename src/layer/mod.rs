//! A memory layer on a device.
//!
//! | file | gives |
//! |---|---|
//! | `weights` | the weights, as training changes them |
//! | `forward` | [`MemoryLayer`], its stages one by one and together |
//! | `backward` | the gradients, stage by stage and together |
//! | `training` | updates of the tables, and the way of weights and optimisers into files and back |
//! | `workspace` | device memory of a call |

mod backward;
mod forward;
mod training;
mod weights;
mod workspace;

pub use backward::{Gradients, InputGradients, MapGradients, Saved};
pub use forward::{Chosen, Forward, Kept, MemoryLayer, Strategies, Weighed};
pub use training::{SavedState, update_shared};
pub use weights::{LayerWeights, device_shape};
