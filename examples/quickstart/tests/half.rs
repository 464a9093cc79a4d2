//! The Burn modules on a backend whose own floats are f16, in a process of their own: Burn keeps one default type for each device, that of the
//! backend which used it first.

mod support;

use burn::{
    backend::wgpu::{CubeBackend, WgpuRuntime},
    tensor::{DType, Tensor, f16},
};

use support::checks::{hold_gradients, trainer_goes_on_with_the_same_bits};

type Half = CubeBackend<WgpuRuntime, f16, i32, u32>;

/// Against the oracle with the numbers that parameters and inputs round to.
#[test]
fn gradients_are_near_the_oracle() {
    assert_eq!(Tensor::<Half, 1>::zeros([1], &Default::default()).dtype(), DType::F16);
    hold_gradients::<Half>(|numbers| numbers.iter().map(|&x| f16::from_f32(x).to_f32()).collect(), 1e-2);
}

/// Burn reads the floats of a record in the backend's own type; the state of the optimisers stays f32.
#[test]
fn a_trainer_goes_on_with_the_same_bits() {
    trainer_goes_on_with_the_same_bits::<Half>();
}
