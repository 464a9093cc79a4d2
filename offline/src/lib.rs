//! A CUDA device without a GPU, for tests and for `ultramem kernels`.
//!
//! [`OfflineRuntime`] is a CubeCL runtime that reports a real GPU's properties ([`Gpu`]) and keeps buffers in host memory. Code that
//! launches kernels runs on it unchanged and makes the choices that it would make on that GPU; each launch gives the very CUDA
//! C++ that CubeCL's CUDA runtime would hand to NVRTC ([`Kernel`]). That source is
//!
//! - **compiled** ([`compile`]) by NVRTC and `ptxas` for real architectures: registers, spills, stack, shared memory, load widths;
//! - **executed**: the PTX that NVRTC makes of it is interpreted ([`ultramem_ptx`]), warp by warp, as the hardware would run it;
//! - **sanitised**: each load and store is seen with its thread; accesses out of bounds or off their alignment, races, reads of what nothing wrote and
//!   divergent barriers are [`Fault`]s, what stays unwritten are [`Gap`]s, and the order of blocks and warps is another one each time;
//! - **measured**: the bytes and sectors that warps read and write of each buffer are [`Traffic`].
//!
//! ```no_run
//! use cubecl::Runtime;
//! use ultramem_offline::{Gpu, OfflineDevice, OfflineRuntime};
//!
//! let device = OfflineDevice::of(Gpu::H100);
//! let client = OfflineRuntime::client(&device);
//! // Launch kernels with the client and read their results; then:
//! for launch in device.take_reports() {
//!     println!("{}: {:?}", launch.kernel.entry, launch.faults);
//! }
//! ```

mod cache;
pub mod compile;
pub mod constants;
mod device;
mod error;
mod execute;
mod gpu;
mod memory;
pub mod profile;
mod report;
mod runtime;
mod server;
mod stream;
pub mod table;
mod target;
pub mod trace;

pub use device::{Adapter, Execution, OfflineDevice, Options};
pub use error::{Error, Result};
pub use gpu::{Gpu, Specification};
pub use memory::{HostBuffer, HostStorage};
pub use profile::sample::Blocks;
pub use report::{Argument, Kernel, LaunchReport};
pub use runtime::OfflineRuntime;
pub use server::OfflineServer;
pub use target::{CudaCompiler, Target, TargetCompiler};
pub use ultramem_ptx::sanitise::{Fault, Finding, Flow, Gap, Place, SECTOR, Space, Traffic};
