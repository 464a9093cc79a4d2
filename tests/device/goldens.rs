//! PyTorch's results, by every strategy.

use cubecl::prelude::*;
use ultramem::ElementType;

use crate::common::{golden_files, relative_l2};
use crate::device::{Adapter, Case, client, every_strategy, poison};

/// A compiler that falls back in silence would leave the other one untested.
#[test]
fn kernels_are_compiled_as_the_features_say() {
    let expected = match (cfg!(feature = "wgpu"), cfg!(feature = "vulkan")) {
        (true, true) => "wgpu<spirv>",
        (true, false) => "wgpu<wgsl>",
        (false, _) => "cuda",
    };
    assert_eq!(Adapter::name(&client()), expected);
}

/// What the other tests rely on: memory that was poisoned is what is handed out next.
#[test]
fn fresh_memory_is_poisoned() {
    let client = client();
    for sizes in [vec![4, 1000, 256, 60_000], vec![1 << 20, 500_000], vec![9_000_000]] {
        poison(&client, sizes.iter().sum());
        let held: Vec<_> = sizes.iter().map(|&size| client.empty(size)).collect();
        for (size, handle) in sizes.iter().zip(held) {
            let bytes = client.read_one(handle).unwrap();
            assert!(bytes.iter().all(|&byte| byte == 0xff), "{size} bytes of {sizes:?}");
        }
    }
}

#[test]
fn agrees_with_pytorch_by_every_strategy() {
    for (name, file) in golden_files() {
        let input = file.tensor("input").unwrap().to_f32();
        let case = Case::new(file.config(), &file.weights().unwrap(), &input, ElementType::F32);
        let expected = |tensor| file.tensor(tensor).unwrap().to_f32();
        let (output, scores) = (expected("expected.output"), expected("expected.scores"));
        let indices = file.integers("expected.indices").unwrap().numbers;
        let chosen = case.layer.strategies(case.tokens());
        for strategies in every_strategy().into_iter().chain([chosen]) {
            let found = case.run(&input, strategies);
            let (output, scores) = (relative_l2(&found.output, &output), relative_l2(&found.scores, &scores));
            let slots: Vec<i64> = found.slots.iter().map(|&slot| slot.into()).collect();
            assert!(output <= 1e-5, "{name}, {strategies:?}: output differs by {output}");
            assert!(scores <= 1e-5, "{name}, {strategies:?}: scores differ by {scores}");
            assert_eq!(slots, indices, "{name}, {strategies:?}: slots");
        }
    }
}
