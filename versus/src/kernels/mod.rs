//! The kernels of what memory layers are compared with: the FFN and the mixture of experts that they stand beside, and what a decoding
//! step has around either. Product-key memory and Memory+ are the four stages of [`ultramem::kernels`] themselves.
//!
//! | file | gives |
//! |---|---|
//! | `dense` | an FFN: two products with an activation between them |
//! | `route` | each token's experts and their weights, and the tokens of each expert side by side |
//! | `grouped` | products of each expert's tokens with its weights, which are read once a call |
//! | `moe` | the experts' FFNs, and their weighted sum |
//! | `attention` | one new position of each sequence against a cache |
//! | `residual` | an addition to the residual stream and the RMSNorm after it |

mod attention;
mod dense;
mod grouped;
mod moe;
mod residual;
mod route;

pub use attention::attention;
pub use dense::{Activation, dense};
pub(crate) use grouped::touched;
pub use moe::{Experts, Mixture, moe};
pub use residual::residual;
pub use route::{Routed, route};
