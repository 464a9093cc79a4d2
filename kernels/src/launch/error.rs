//! What a launch can refuse, with the numbers that made it refuse.

use crate::ElementType;

/// Why a stage was not launched. Nothing has run on the device when one of these is returned.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A size that must be positive is zero.
    #[error("{what} must be at least 1, got 0")]
    Zero {
        /// The size, by its name in the documentation.
        what: &'static str,
    },
    /// A size is larger than another one or than a limit of the kernels.
    #[error("{what} {value} exceeds {limit_name} {limit}")]
    Exceeds {
        /// The size, by its name in the documentation.
        what: &'static str,
        /// Its value.
        value: u64,
        /// What it was held against.
        limit_name: &'static str,
        /// The largest value allowed.
        limit: u64,
    },
    /// A size that must be a multiple of another one is not.
    #[error("{what} {value} is not a multiple of {divisor_name} {divisor}")]
    NotMultiple {
        /// The size, by its name in the documentation.
        what: &'static str,
        /// Its value.
        value: u64,
        /// What must divide it.
        divisor_name: &'static str,
        /// The divisor's value.
        divisor: u64,
    },
    /// There are more or fewer of something than there must be.
    #[error("{what}: {value}, expected {expected}")]
    Number {
        /// What was counted.
        what: &'static str,
        /// How many were given.
        value: u64,
        /// How many there must be.
        expected: u64,
    },
    /// A number that makes no sense by itself.
    #[error("{what} is {value}, expected {expected}")]
    Range {
        /// The number, by its name in the documentation.
        what: &'static str,
        /// What was given.
        value: String,
        /// What would have been accepted.
        expected: &'static str,
    },
    /// A tensor has another shape than the stage documents.
    #[error("{tensor} has shape {found:?}, expected {expected:?}")]
    Shape {
        /// The tensor, by its name in the stage's documentation.
        tensor: &'static str,
        /// The shape that was given.
        found: Vec<usize>,
        /// The shape that the other arguments call for.
        expected: Vec<usize>,
    },
    /// A tensor has another number of dimensions than the stage documents, or another size in one that is always the same.
    #[error("{tensor} has shape {found:?}, expected {expected}")]
    Dimensions {
        /// The tensor, by its name in the stage's documentation.
        tensor: &'static str,
        /// The shape that was given.
        found: Vec<usize>,
        /// The dimensions by name.
        expected: &'static str,
    },
    /// A tensor is not contiguous in row-major order.
    #[error("{tensor} of shape {shape:?} has strides {strides:?}, expected a contiguous tensor")]
    NotContiguous {
        /// The tensor, by its name in the stage's documentation.
        tensor: &'static str,
        /// Its shape.
        shape: Vec<usize>,
        /// Its strides.
        strides: Vec<usize>,
    },
    /// A tensor holds another element type than the stage documents.
    #[error("{tensor} holds {found}, expected {expected}")]
    Type {
        /// The tensor, by its name in the stage's documentation.
        tensor: &'static str,
        /// The element type that was given.
        found: String,
        /// The element type, or types, that the stage takes.
        expected: String,
    },
    /// A tensor's buffer belongs to another client than the one that the call names.
    #[error("{tensor} is on another device: its client is not the one of this call")]
    Client {
        /// The tensor, by its name in the stage's documentation.
        tensor: &'static str,
    },
    /// The device can't compute with an element type.
    #[error("this device does not support {0} in kernels")]
    UnsupportedType(ElementType),
    /// A buffer would not fit the device's largest binding.
    #[error("{tensor} needs {bytes} bytes, more than the {limit} bytes that one binding of this device holds")]
    Binding {
        /// The tensor, by its name in the stage's documentation.
        tensor: &'static str,
        /// The bytes that it needs.
        bytes: u64,
        /// The bytes that one binding holds.
        limit: u64,
    },
    /// A handle is smaller than its tensor says.
    #[error("{tensor} needs {bytes} bytes, its buffer holds {found}")]
    Buffer {
        /// The tensor, by its name in the stage's documentation.
        tensor: &'static str,
        /// The bytes that its shape calls for.
        bytes: u64,
        /// The bytes behind its handle.
        found: u64,
    },
    /// A stage's working set does not fit the device's shared memory.
    #[error("{stage} needs {bytes} bytes of shared memory a cube, this device has {limit}")]
    SharedMemory {
        /// The stage.
        stage: &'static str,
        /// The bytes that the smallest cube needs.
        bytes: u64,
        /// The bytes that the device offers.
        limit: u64,
    },
    /// A unit would go through more loop iterations than every device takes ([`MAX_LOOPS`](crate::MAX_LOOPS)).
    #[error("{kernel} needs {loops} loop iterations of one unit, more than the {limit} that every device takes")]
    Loops {
        /// The kernel.
        kernel: &'static str,
        /// The iterations of its busiest unit.
        loops: u64,
        /// The most that are allowed.
        limit: u64,
    },
    /// The device failed in what was enqueued before.
    #[error("device: {reason}")]
    Device {
        /// The device's own words.
        reason: String,
    },
    /// The matrix product library refused the problem.
    #[error("matrix product [{m}, {k}] x [{k}, {n}]: {reason}")]
    Matmul {
        /// Rows of the left side.
        m: usize,
        /// The shared dimension.
        k: usize,
        /// Columns of the right side.
        n: usize,
        /// The library's own words.
        reason: String,
    },
}
