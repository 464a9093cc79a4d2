//! A token's output has the same bits however many tokens are in the call, where a layer is asked for that.

use rand::{Rng, SeedableRng, rngs::StdRng};
use ultramem::{Dimensions, ElementType, MemoryConfig, MemoryLayer, Strategies, Weights};

use crate::common::{KINDS, random_input, small};
use crate::device::{Case, Found, client, types};

/// Tokens of the calls that are compared with one of all tokens.
const BATCHES: [usize; 9] = [1, 2, 3, 4, 15, 64, 100, 1000, MOST];
const MOST: usize = 4096;

/// Runs of tokens, wherever they begin, give what the call of all tokens gave for them, saving or not.
fn hold(what: &str, config: &MemoryConfig, dtype: ElementType, batches: &[usize], seed: u64) {
    let rng = &mut StdRng::seed_from_u64(seed);
    let most = *batches.iter().max().unwrap();
    let (weights, width) = (Weights::random(config, seed), config.hidden_size);
    let Case { layer, input, .. } = Case::new(config, &weights, &random_input(config, most, seed), dtype);
    let layer = layer.with_invariance(true);
    let run = |from: usize, tokens: usize, saves: bool| {
        let part = layer.upload(&input[from * width..][..tokens * width]).unwrap();
        let forward = if saves { layer.forward_saving(&part).unwrap().0 } else { layer.forward(&part).unwrap() };
        Found {
            output: layer.read(&forward.output).unwrap(),
            slots: layer.read_slots(&forward.chosen).unwrap(),
            scores: layer.read(&forward.chosen.scores).unwrap(),
        }
    };
    let all = run(0, most, false);
    for &tokens in batches {
        let from = rng.random_range(0..=most - tokens);
        for saves in [false, true] {
            let found = run(from, tokens, saves);
            for token in 0..tokens {
                let (found, expected) = (found.bits(tokens, token), all.bits(most, from + token));
                assert_eq!(found, expected, "{what}, {dtype}, {tokens} tokens, saving: {saves}, token {token}");
            }
        }
    }
}

#[test]
fn a_token_has_the_same_bits_in_a_call_of_any_number_of_tokens() {
    for (dtype, _) in types() {
        for kind in KINDS {
            hold(&format!("{kind:?}"), &small(kind), dtype, &BATCHES[..7], 1);
        }
    }
    let dims = Dimensions {
        hidden_size: 72,
        heads: 2,
        side_keys: 96,
        key_dim: 32,
        top_m: 8,
        value_dim: 48,
        ..Dimensions::default()
    };
    hold("many tokens", &MemoryConfig::new(dims).unwrap(), ElementType::F32, &BATCHES, 2);
}

#[test]
fn invariant_strategies_are_those_of_a_layer_that_is_asked_for_them() {
    let config = small(KINDS[0]);
    let weights = Weights::random(&config, 3);
    let layer = MemoryLayer::new(&client(), config, &weights, ElementType::F32).unwrap();
    let invariant = Strategies::invariant(&layer, 5);
    assert!(invariant.query.is_invariant());
    assert_eq!(layer.with_invariance(true).strategies(5), invariant);
}
