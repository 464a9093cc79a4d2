//! NaN and infinities in one token's input: nothing but that token changes, and no slot leaves its range. And the same call
//! twice, which must give the same bits.

use ultramem::{ElementType, Kind, Strategies, Weights};

use crate::common::{random_input, small};
use crate::device::{Case, every_strategy, poison};

const TOKENS: usize = 11;

fn case(kind: Kind, dtype: ElementType) -> Case {
    let config = small(kind);
    Case::new(&config, &Weights::random(&config, 1), &random_input(&config, TOKENS, 2), dtype)
}

/// Spoils the first, a middle and the last token in turn and looks at all of them.
fn assert_contained(case: &Case, strategies: Strategies) {
    let config = case.layer.config();
    let clean = case.run(&case.input, strategies);
    assert!(clean.output.iter().all(|y| y.is_finite()), "{strategies:?}");
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for spoilt in [0, TOKENS / 2, TOKENS - 1] {
            let mut input = case.input.clone();
            input[spoilt * config.hidden_size + 1] = bad;
            let found = case.run(&input, strategies);
            let what = format!("{:?}, {strategies:?}: {bad} in token {spoilt}", config.kind());
            for token in (0..TOKENS).filter(|&token| token != spoilt) {
                assert_eq!(found.bits(TOKENS, token), clean.bits(TOKENS, token), "{what}, token {token}");
            }
            assert!(found.slots.iter().all(|&slot| (slot as usize) < config.slots()), "{what}: {:?}", found.slots);
            let output = &found.output[spoilt * config.hidden_size..][..config.hidden_size];
            assert!(output.iter().all(|y| y.is_nan()), "{what} was swallowed: {output:?}");
        }
    }
}

#[test]
fn a_spoilt_token_spoils_only_itself() {
    for strategies in every_strategy() {
        assert_contained(&case(Kind::UltraMem, ElementType::F32), strategies);
    }
}

#[test]
fn a_spoilt_token_spoils_only_itself_behind_a_gate() {
    for strategies in every_strategy() {
        assert_contained(&case(Kind::MemoryPlus, ElementType::F32), strategies);
    }
}

#[test]
fn a_spoilt_token_spoils_only_itself_behind_pre_values() {
    for kind in [Kind::UltraMemV2, Kind::Peer, Kind::LinguaMemoryPlus] {
        let case = case(kind, ElementType::F32);
        assert_contained(&case, case.layer.strategies(TOKENS));
    }
}

#[test]
fn a_spoilt_token_spoils_only_itself_in_half_precision() {
    let case = case(Kind::UltraMem, ElementType::F16);
    assert_contained(&case, case.layer.strategies(TOKENS));
}

#[test]
fn the_same_call_gives_the_same_bits() {
    for kind in [Kind::UltraMem, Kind::ProductKey, Kind::UltraMemV2, Kind::Peer] {
        let case = case(kind, ElementType::F32);
        for strategies in every_strategy() {
            let first = case.run(&case.input, strategies);
            // Other memory, with other contents.
            let _held = case.layer.client().create_from_slice(&[1; 5000]);
            poison(case.layer.client(), 1 << 14);
            let second = case.run(&case.input, strategies);
            for token in 0..TOKENS {
                assert_eq!(first.bits(TOKENS, token), second.bits(TOKENS, token), "{kind:?}, {strategies:?}");
            }
        }
    }
}
