//! The lesser of two places in a tensor, in kernels whose addresses may have 64 bits.

use cubecl::prelude::*;

/// `min(a, b)`. CubeCL writes a constant with 32 bits beside an address of 64, between which C++ knows no `min`: NVRTC refuses it.
#[cube]
pub(crate) fn lesser(a: usize, b: usize) -> usize {
    select(a < b, a, b)
}
