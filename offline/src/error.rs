//! What can go wrong before a kernel runs, or in one that should not have run.

use std::path::PathBuf;

/// Why a kernel could not be built, compiled or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of the cache could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// NVRTC, the CUDA headers or `ptxas` are missing. The reason is the line that installs them.
    #[error("{} is missing; install it: {install}", missing.display())]
    NoCudaTools {
        /// What was looked for.
        missing: PathBuf,
        /// The line.
        install: String,
    },
    /// A compiler refused a kernel.
    #[error("{compiler} refuses {kernel}: {reason}")]
    Refused {
        /// The command.
        compiler: &'static str,
        /// The kernel's entry point.
        kernel: String,
        /// The first errors.
        reason: String,
    },
    /// What was built could not be loaded.
    #[error("{path} can't be loaded: {reason}")]
    Load {
        /// The library.
        path: PathBuf,
        /// What the loader said.
        reason: String,
    },
    /// A launch asks for what the GPU does not have.
    #[error("{kernel}: {what} {value} exceeds the GPU's {limit}")]
    Exceeds {
        /// The kernel's entry point.
        kernel: String,
        /// What was asked for.
        what: &'static str,
        /// How much of it.
        value: usize,
        /// How much there is.
        limit: usize,
    },
    /// The sanitiser found a fault.
    #[error("{kernel}: {faults} (order {seed})")]
    Faults {
        /// The kernel's entry point.
        kernel: String,
        /// What the order of blocks and warps was drawn from.
        seed: u64,
        /// The first faults, in words.
        faults: String,
    },
    /// The launch can't be executed, or not to its end.
    #[error("{kernel} can't be executed: {reason}")]
    NotExecutable {
        /// The kernel's entry point.
        kernel: String,
        /// What it uses or does.
        reason: String,
    },
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
