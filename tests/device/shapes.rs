//! Odd shapes against the oracle, every stage on the same inputs: some that are known to be awkward, and random ones.

use proptest::prelude::*;
use proptest::test_runner::{RngSeed, TestError, TestRunner};
use ultramem::kernels::{expand::ExpandStrategy, linear::ProjectStrategy, score::ScoreStrategy};
use ultramem::{Dimensions, ElementType, Kind, MemoryConfig, Norm, Strategies, Weights};

use crate::common::random_input;
use crate::device::{Case, Tally, client, every_strategy, hold};
pub use crate::dimensions::any_dimensions;

const TILE: ProjectStrategy = ProjectStrategy::Tile;

pub fn plain() -> Dimensions {
    Dimensions { hidden_size: 12, side_keys: 16, key_dim: 8, top_m: 4, value_dim: 8, heads: 2, ..Dimensions::default() }
}

pub fn product_keys(kind: Kind) -> Dimensions {
    Dimensions { capabilities: kind.capabilities(), tucker_rank: 1, cores: 1, expansion: 1, ..plain() }
}

/// Random weights and input for `dims`.
pub fn random_case(dims: &Dimensions, tokens: usize, dtype: ElementType, seed: u64) -> Case {
    let config = MemoryConfig::new(dims.clone()).unwrap();
    let weights = Weights::random(&config, seed);
    Case::new(&config, &weights, &random_input(&config, tokens, seed), dtype)
}

/// What is stored in half precision may be off by this much.
pub fn tolerance(dtype: ElementType) -> f64 {
    if dtype == ElementType::F32 { 1e-5 } else { 1e-2 }
}

#[test]
fn awkward_shapes_agree_with_the_oracle() {
    let primes = Dimensions { hidden_size: 13, side_keys: 34, key_dim: 7, top_m: 5, value_dim: 22, ..plain() };
    let shapes = [
        ("primes", 17, primes.clone()),
        ("one token", 1, plain()),
        ("top_m 1", 9, Dimensions { top_m: 1, ..plain() }),
        ("every key kept", 3, Dimensions { top_m: 16, ..plain() }),
        ("one block", 5, Dimensions { expansion: 1, cores: 1, value_dim: 3, ..plain() }),
        ("nine blocks", 5, Dimensions { expansion: 9, side_keys: 21, cores: 3, value_dim: 9, heads: 4, ..plain() }),
        ("rank 1", 6, Dimensions { tucker_rank: 1, heads: 1, ..plain() }),
        ("rank 4", 6, Dimensions { tucker_rank: 4, heads: 3, norm: Norm::Layer, ..plain() }),
        (
            "as small as can be",
            2,
            Dimensions {
                hidden_size: 1,
                side_keys: 1,
                key_dim: 1,
                top_m: 1,
                value_dim: 1,
                ..product_keys(Kind::ProductKey)
            },
        ),
        ("product keys", 11, Dimensions { side_keys: 19, top_m: 7, value_dim: 5, ..product_keys(Kind::ProductKey) }),
        ("Memory+", 11, Dimensions { heads: 3, key_dim: 6, value_dim: 10, ..product_keys(Kind::MemoryPlus) }),
    ];
    let strategies = every_strategy();
    let mut tally = Tally::default();
    for (at, (name, tokens, dims)) in shapes.into_iter().enumerate() {
        println!("{name}: {tokens} tokens, {dims:?}");
        let case = random_case(&dims, tokens, ElementType::F32, at as u64);
        // Every strategy has its turn, four a shape.
        for turn in 0..4 {
            tally.add(hold(&case, strategies[(4 * at + turn) % strategies.len()], 1e-5));
        }
    }
    tally.assert_rare();
}

fn any_strategies() -> impl Strategy<Value = Strategies> {
    proptest::sample::select(every_strategy())
}

/// The seed is fixed: these tests find the same faults each time they run.
pub fn runner(cases: u32) -> TestRunner {
    let seed = RngSeed::Fixed(0x75_6c_74_72_61);
    TestRunner::new(ProptestConfig {
        cases,
        max_shrink_iters: 20,
        failure_persistence: None,
        rng_seed: seed,
        ..Default::default()
    })
}

fn hold_random_shapes(dtype: ElementType, cases: u32) {
    let tally = std::cell::Cell::new(Tally::default());
    let result = runner(cases).run(
        &(any_dimensions(), 1..=40usize, any_strategies(), 0..1000u64),
        |(dims, tokens, strategies, seed)| {
            let mut sum = tally.get();
            sum.add(hold(&random_case(&dims, tokens, dtype, seed), strategies, tolerance(dtype)));
            tally.set(sum);
            Ok(())
        },
    );
    if let Err(TestError::Fail(reason, smallest)) = result {
        panic!("{reason}\nsmallest case: {smallest:?}");
    }
    tally.get().assert_rare();
}

#[test]
fn random_shapes_agree_with_the_oracle() {
    hold_random_shapes(ElementType::F32, 16);
}

#[test]
fn random_shapes_agree_with_the_oracle_in_half_precision() {
    hold_random_shapes(ElementType::F16, 8);
}

#[test]
#[cfg(not(feature = "wgpu"))]
fn random_shapes_agree_with_the_oracle_in_bf16() {
    hold_random_shapes(ElementType::BF16, 8);
}

#[test]
#[cfg(feature = "wgpu")]
fn a_type_without_support_is_refused() {
    let config = MemoryConfig::new(plain()).unwrap();
    let weights = Weights::random(&config, 0);
    let refused = ultramem::MemoryLayer::new(&client(), config, &weights, ElementType::BF16);
    let message = refused.err().map(|error| error.to_string());
    assert_eq!(message.as_deref(), Some("this device does not support bf16 in kernels"));
}

/// The sizes of a layer of the 1B model, but for the widths.
#[test]
fn long_selections_agree_with_the_oracle() {
    let widths = Dimensions { hidden_size: 8, key_dim: 8, value_dim: 4, ..plain() };
    let real = Dimensions { side_keys: 1616, top_m: 80, ..widths.clone() };
    // 200² totals need 160 kB.
    let wide = Dimensions { side_keys: 256, top_m: 200, heads: 1, ..widths.clone() };
    let product_keys =
        Dimensions { side_keys: 128, top_m: 100, heads: 1, value_dim: 4, ..product_keys(Kind::ProductKey) };
    let mut tally = Tally::default();
    for (dims, tokens) in [(real, 3), (wide, 3), (product_keys, 9)] {
        let case = random_case(&dims, tokens, ElementType::F32, 1);
        for score in [ScoreStrategy::Whole, ScoreStrategy::Split { splits: 3 }] {
            tally.add(hold(&case, Strategies { query: TILE, score, expand: ExpandStrategy::Pooled(TILE) }, 1e-5));
        }
    }
    tally.assert_rare();
}
