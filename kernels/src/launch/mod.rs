//! What every launch needs: the device's properties, tensors and their checks, element types, limits of loops, errors.

pub(crate) mod device;
pub(crate) mod element;
pub(crate) mod error;
pub(crate) mod loops;
pub(crate) mod random;
pub(crate) mod tensor;
