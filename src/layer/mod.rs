//! A memory layer on a device.
//!
//! | file | gives |
//! |---|---|
//! | `weights` | the weights, as training changes them |
//! | `forward` | [`MemoryLayer`], its stages one by one and together |
//! | `plans` | the launches of a forward pass before they are made, and the strategies that they are planned by |
//! | `backward` | the gradients, stage by stage and together |
//! | `backward_plans` | the launches of a backward pass and of an update of the tables, likewise |
//! | `training` | updates of the tables, and the way of weights and optimisers into files and back |
//! | `stream` | [`Stream`], for a forward pass beside other work |
//! | `workspace` | device memory of a call |

mod backward;
mod backward_plans;
mod forward;
mod plans;
mod stream;
mod training;
mod weights;
mod workspace;

pub use backward::{Gradients, InputGradients, MapGradients, Saved};
pub use backward_plans::{BackwardPlans, UpdatePlans};
pub use forward::{Chosen, Forward, Kept, MemoryLayer, Weighed};
pub use plans::{Plans, Strategies, WeighPlans};
pub use stream::{Beside, Stream};
pub use training::{SavedState, update_shared};
pub use weights::{LayerWeights, device_shape};
