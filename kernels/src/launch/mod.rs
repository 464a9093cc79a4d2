//! What every launch needs: the device's properties, tensors and their checks, element types, limits of loops, errors.
//!
//! A stage of one's own is launched as those of this crate are: [`check`](crate::check) each argument, ask the [`Device`] for vector width,
//! units and grid, make the output with [`empty`](crate::empty), tell [`check_loops`] what the busiest unit goes through, and launch the kernel
//! on [`arg`]s. Each stage plans its launches from sizes and a [`Device`] alone, and launches what it has planned: a [`Planned`] says how many cubes
//! there will be, and what one of them takes.

pub(crate) mod device;
pub(crate) mod element;
pub(crate) mod error;
pub(crate) mod lesser;
pub(crate) mod loops;
pub(crate) mod plan;
pub(crate) mod planes;
pub(crate) mod random;
pub(crate) mod tensor;

pub use self::device::{Device, Features};
pub use self::loops::{check_loops, strided};
pub use self::plan::{Launch, Planned};
pub use self::random::stir;
pub use self::tensor::{arg, float_type, positive, tokens_of};
