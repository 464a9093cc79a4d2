//! The one error type of the library.

use std::path::PathBuf;

/// What can go wrong. Every message is one line and holds the numbers that matter.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A shape, type or limit that a kernel's launch refused, or a configuration that no kernel could run.
    #[error(transparent)]
    Kernel(#[from] ultramem_kernels::Error),
    /// A configuration value that makes no sense by itself.
    #[error("{what} is {value}, expected {expected}")]
    Config {
        /// The value, by its name in [`Dimensions`](crate::Dimensions).
        what: &'static str,
        /// What was given.
        value: String,
        /// What would have been accepted.
        expected: &'static str,
    },
    /// A model's memory layers can't be where they are said to be.
    #[error("memory placement {text:?}: {problem}")]
    Placement {
        /// The placement, or the part of it that is wrong.
        text: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The saved state of an optimiser does not belong to the table or to the rule that it is given to.
    #[error("the optimiser's record of table {table}: {what} is {found}, expected {expected}")]
    Record {
        /// The table: its parameter's id.
        table: String,
        /// What does not fit.
        what: &'static str,
        /// What the record says.
        found: String,
        /// What was expected.
        expected: String,
    },
    /// A host slice has another length than its shape.
    #[error("{tensor} holds {found} numbers, expected {expected}")]
    Length {
        /// The tensor.
        tensor: String,
        /// Numbers given.
        found: usize,
        /// Numbers that its shape calls for.
        expected: usize,
    },
    /// A file could not be opened, mapped or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file of a model, or of its settings, can't be used.
    #[error("{}: {problem}", path.display())]
    Model {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Bytes that are not a safetensors file.
    #[error("not a safetensors file: {0}")]
    Format(String),
    /// A metadata entry is missing or can't be read.
    #[error("metadata entry {key:?} {problem}")]
    Metadata {
        /// The entry.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A tensor is missing, or has the wrong shape, type or values.
    #[error("tensor {name:?} {problem}")]
    Tensor {
        /// The tensor's name in the file.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The device did not do what was asked of it.
    #[error("device: {0}")]
    Device(String),
}

/// The library's result.
pub type Result<T> = std::result::Result<T, Error>;
