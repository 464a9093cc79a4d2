//! The layer on the processor: PyTorch's goldens, the oracle on random layers of every kind and element type, the same bits on any number of threads,
//! and how far a NaN goes.

#![cfg(all(feature = "cpu", feature = "files"))]

mod common;
#[path = "common/dimensions.rs"]
mod dimensions;

use std::collections::BTreeMap;

use common::{KINDS, cast, golden_files, random_input, relative_l2, small};
use dimensions::any_dimensions;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use rand::{Rng, SeedableRng, rngs::StdRng};
use rayon::ThreadPoolBuilder;
use ultramem::kernels::optimiser::Rule;
use ultramem::processor::stages::combine::{self, Chosen};
use ultramem::processor::stages::expand::{self, Expanded};
use ultramem::processor::stages::query::{self, OfMaps};
use ultramem::processor::stages::score::{self, Kept, KeptGradients};
use ultramem::processor::stages::weigh::{self, Weighed};
use ultramem::processor::table::optimiser::{Optimiser, Step};
use ultramem::processor::{NumbersMut, RowGradients};
use ultramem::reference::{self, Judged};
use ultramem::{CpuLayer, Dimensions, ElementType, HostTensor, Kind, MemoryConfig, Weight, Weights};

const DTYPES: [ElementType; 3] = [ElementType::F32, ElementType::F16, ElementType::BF16];
/// Of f32 sums over hundreds of terms.
const OUTPUT: f64 = 1e-5;
const GRADIENT: f64 = 1e-4;

/// Gradients by name.
fn named(config: &MemoryConfig, gradients: &reference::Gradients) -> Vec<(String, Vec<f32>)> {
    let named = gradients.named(config).unwrap();
    named.into_iter().map(|(name, tensor)| (name, tensor.to_f32())).collect()
}

/// Within the tolerance.
fn assert_close(what: &str, found: &[f32], expected: &[f32], tolerance: f64) {
    assert_near(what, found, expected, tolerance, 0.0);
}

/// The same, or no number further off than `cancelled`: what is left of terms that cancel, each rounded to f32.
fn assert_near(what: &str, found: &[f32], expected: &[f32], tolerance: f64, cancelled: f32) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths");
    let near = found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() <= cancelled);
    let distance = relative_l2(found, expected);
    assert!(near || distance <= tolerance, "{what}: relative L2 {distance:.2e} exceeds {tolerance:.0e}");
}

/// How much a norm over a few numbers may add to the error: what it gives is what is left of numbers that cancel, `x - mean` of two that are nearly equal,
/// or `1 - x² / (x² + eps)` of one.
fn narrow_norm(config: &MemoryConfig) -> f64 {
    if config.key_dim < 4 { 30.0 } else { 1.0 }
}

/// Holds output and gradients against the oracle's for the slots that the layer chose, and the slots against the oracle's scores.
fn hold(what: &str, config: &MemoryConfig, weights: &Weights<'_>, tokens: usize) -> Judged {
    let (input, grad_output) = (random_input(config, tokens, 5), random_input(config, tokens, 77));
    let layer = CpuLayer::new(config.clone(), weights).unwrap();
    let (forward, saved) = layer.forward_saving(&input).unwrap();
    assert_eq!(layer.forward(&input).unwrap(), forward, "{what}: forward, and forward that saves");
    let prepared = layer.clone().prepared().forward(&input).unwrap();
    // Where rounding swaps slots, the oracle below judges.
    if prepared.chosen.slots == forward.chosen.slots {
        assert_close(&format!("{what}: prepared"), &prepared.output, &forward.output, OUTPUT * narrow_norm(config));
    }
    let slots = &forward.chosen.slots;
    let of_slots = reference::score_slots(config, weights, &input, slots).unwrap();
    let weighed = reference::weigh(config, weights, &input, &of_slots).unwrap();
    let expected = reference::expand(config, weights, &input, slots, &weighed.scores).unwrap();
    let narrow = |numbers: &[f64]| numbers.iter().map(|&x| x as f32).collect::<Vec<_>>();
    let norm = narrow_norm(config);
    assert_close(&format!("{what}: scores"), &forward.chosen.scores, &narrow(&of_slots.scores), OUTPUT * norm);
    assert_close(&format!("{what}: output"), &forward.output, &narrow(&expected), OUTPUT * norm);
    let best = reference::forward(config, weights, &input).unwrap();
    let judged = reference::judge(config, weights, &input, slots, &best.slots, 1e-5).unwrap();
    assert!(judged.right(), "{what}: {judged:?}");

    let found = layer.named(&layer.backward(&input, &saved, &grad_output).unwrap());
    let expected = reference::backward(config, weights, &input, slots, &grad_output).unwrap();
    let named_expected = named(config, &expected);
    let largest =
        named_expected.iter().flat_map(|(_, numbers)| numbers).fold(0.0, |largest: f32, x| largest.max(x.abs()));
    for ((name, found), (_, expected)) in named(config, &found).iter().zip(&named_expected) {
        assert_near(&format!("{what}: {name}"), found, expected, GRADIENT * norm, largest * 1e-6);
    }
    assert_eq!(found.values.len(), expected.values.len(), "{what}: used rows");
    assert_eq!(found.pre_values.len(), expected.pre_values.len(), "{what}: used rows of the pre-values");
    judged
}

#[test]
fn outputs_and_gradients_agree_with_pytorch() {
    for (name, file) in golden_files() {
        let (config, weights) = (file.config(), file.weights().unwrap());
        let numbers = |tensor: &str| file.tensor(tensor).unwrap().to_f32();
        let input = numbers("input");
        let layer = CpuLayer::new(config.clone(), &weights).unwrap();
        let (forward, saved) = layer.forward_saving(&input).unwrap();
        assert_close(&format!("{name}: output"), &forward.output, &numbers("expected.output"), OUTPUT);
        let gradients = layer.named(&layer.backward(&input, &saved, &numbers("grad_output")).unwrap());
        let found = named(config, &gradients);
        let expected: Vec<_> = file.names().filter(|tensor| tensor.starts_with("expected.grad")).collect();
        assert!(!expected.is_empty(), "{name} holds no gradient");
        for tensor in expected {
            let of = tensor.trim_start_matches("expected.");
            let found = found.iter().find(|(name, _)| name == of).map(|(_, numbers)| numbers).expect(of);
            assert_close(&format!("{name}: {of}"), found, &numbers(tensor), GRADIENT);
        }
    }
}

#[test]
fn every_kind_agrees_with_the_oracle_in_every_type() {
    for kind in KINDS {
        let config = small(kind);
        let weights = Weights::random(&config, 3);
        for dtype in DTYPES {
            let judged = hold(&format!("{kind:?} in {dtype}"), &config, &cast(&weights, dtype), 70);
            assert!(judged.swapped * 50 <= judged.equal, "{kind:?} in {dtype}: {judged:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, rng_seed: RngSeed::Fixed(0x63_70_75), ..ProptestConfig::default() })]

    #[test]
    fn random_layers_agree_with_the_oracle(dims in any_dimensions(), tokens in 0..90usize, seed in 0..1000u64) {
        let config = MemoryConfig::new(dims).unwrap();
        hold("a random layer", &config, &Weights::random(&config, seed), tokens);
    }
}

/// 2,048 slots a token, and the sizes of a layer of the 1B model but for its widths.
#[test]
fn many_slots_agree_with_the_oracle() {
    let narrow = Dimensions { hidden_size: 8, key_dim: 8, value_dim: 4, ..Dimensions::default() };
    let many = Dimensions { side_keys: 1100, top_m: 1024, ..narrow.clone() };
    let real = Dimensions { side_keys: 1616, top_m: 80, ..narrow.clone() };
    let additive = Dimensions {
        capabilities: Kind::ProductKey.capabilities(),
        tucker_rank: 1,
        cores: 1,
        expansion: 1,
        side_keys: 300,
        top_m: 256,
        ..narrow
    };
    for (name, dims, tokens) in [("2,048 slots", many, 2), ("the 1B model's", real, 5), ("additive", additive, 3)] {
        let config = MemoryConfig::new(dims).unwrap();
        hold(name, &config, &Weights::random(&config, 1), tokens);
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let dims = Dimensions { hidden_size: 300, side_keys: 200, top_m: 20, ..Dimensions::default() };
    let config = MemoryConfig::new(dims).unwrap();
    let weights = Weights::random(&config, 9);
    let (input, grad) = (random_input(&config, 333, 1), random_input(&config, 333, 2));
    let run = || {
        let layer = CpuLayer::new(config.clone(), &weights).unwrap();
        let (forward, saved) = layer.forward_saving(&input).unwrap();
        (forward, layer.backward(&input, &saved, &grad).unwrap())
    };
    let found: Vec<_> =
        [1, 2, 3, 8].map(|threads| ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(run)).into();
    assert!(found.windows(2).all(|pair| pair[0] == pair[1]), "other bits on another number of threads");
}

#[test]
fn a_nan_spoils_no_other_token() {
    for kind in KINDS {
        let config = small(kind);
        let weights = Weights::random(&config, 3);
        let layer = CpuLayer::new(config.clone(), &weights).unwrap();
        let input = random_input(&config, 70, 4);
        let clean = layer.forward(&input).unwrap();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut spoilt = input.clone();
            spoilt[33 * config.hidden_size + 2] = bad;
            let found = layer.forward(&spoilt).unwrap();
            let tokens =
                |numbers: &[f32]| numbers.chunks_exact(config.hidden_size).map(<[f32]>::to_vec).collect::<Vec<_>>();
            for (token, (found, clean)) in tokens(&found.output).iter().zip(tokens(&clean.output)).enumerate() {
                assert!(token == 33 || *found == clean, "{kind:?}: {bad} in token 33 changed token {token}");
            }
            assert!(
                found.chosen.slots.iter().all(|&slot| (slot as usize) < config.slots()),
                "{kind:?}: a slot out of range"
            );
        }
    }
}

#[test]
fn wrong_lengths_are_refused() {
    let config = small(Kind::UltraMem);
    let weights = Weights::random(&config, 3);
    let layer = CpuLayer::new(config.clone(), &weights).unwrap();
    let message = |error: ultramem::Error| error.to_string();
    let found = layer.forward(&[0.0; 12]).map_err(message);
    assert_eq!(found.err().as_deref(), Some("numbers of input 12 is not a multiple of hidden_size 11"));
    let (_, saved) = layer.forward_saving(&[0.0; 22]).unwrap();
    let found = layer.backward(&[0.0; 22], &saved, &[0.0; 11]).map_err(message);
    assert_eq!(found.err().as_deref(), Some("numbers of the output's gradient: 11, expected 22"));
}

/// What each stage says of what is not this layer's: no panic, whatever it is given.
#[test]
fn stages_refuse_what_is_not_theirs() {
    for kind in KINDS {
        let config = small(kind);
        let weights = Weights::random(&config, 3);
        let layer = CpuLayer::new(config.clone(), &weights).unwrap();
        let layer = layer.layer();
        let input = random_input(&config, 3, 5);
        let short = &input[1..];
        let raw = query::forward(layer, &input).unwrap();
        let queries = query::normalised(layer, raw.clone()).unwrap();
        let kept = score::forward(layer, &queries).unwrap();
        let chosen = combine::forward(layer, &kept).unwrap();
        let places = expand::places(layer, &chosen.slots).unwrap();
        let weighed = weigh::forward(layer, &input, &chosen, &places).unwrap();
        let scores = weighed.as_ref().map_or(&chosen.scores, |weighed| &weighed.scores);
        let (_, expanded) = expand::forward(layer, &input, &places, scores).unwrap();
        let of_expand = expand::backward(layer, &places, scores, &expanded, &input).unwrap();
        let of_combine = combine::backward(layer, &kept, &chosen, &of_expand.scores).unwrap();

        let last = kept.keys.len() - 1;
        let changed = |change: &dyn Fn(&mut Kept)| {
            let mut kept = kept.clone();
            change(&mut kept);
            kept
        };
        let beyond = changed(&|kept| kept.keys[last] = u32::MAX);
        let twice = changed(&|kept| kept.keys[last] = kept.keys[last - 1]);
        let fewer = changed(&|kept| kept.scores.truncate(1));
        for kept in [&beyond, &twice, &fewer] {
            assert!(combine::forward(layer, kept).is_err());
            assert!(combine::backward(layer, kept, &chosen, &of_expand.scores).is_err());
            assert!(score::backward(layer, &raw, &queries, kept, &of_combine.kept).is_err());
        }
        let mut elsewhere = places.clone();
        elsewhere[0].row = u32::MAX;
        let mut blocks = places.clone();
        blocks[0].block = u32::MAX;
        for places in [&places[1..], &elsewhere, &blocks] {
            assert!(expand::pool(layer, places, scores).is_err());
            assert!(expand::forward(layer, &input, places, scores).is_err());
            assert!(expand::backward(layer, places, scores, &expanded, &input).is_err());
            assert!(weigh::forward(layer, &input, &chosen, places).map_or(true, |weighed| weighed.is_none()));
        }
        let other = Chosen { slots: vec![u32::MAX; chosen.slots.len()], ..chosen.clone() };
        let error = expand::places(layer, &other.slots).unwrap_err().to_string();
        assert!(error.contains("4294967295"), "{error}");
        assert!(combine::backward(layer, &kept, &other, &of_expand.scores).is_err());
        let unkept = (0..config.side_keys as u32).find(|key| !kept.keys[..config.top_m].contains(key)).unwrap();
        let mut strange = chosen.clone();
        strange.slots[0] = unkept * config.side_keys as u32;
        assert!(combine::backward(layer, &kept, &strange, &of_expand.scores).is_err());

        assert!(query::forward(layer, short).is_err());
        assert!(query::normalised(layer, raw[1..].to_vec()).is_err());
        assert!(score::forward(layer, &queries[1..]).is_err());
        assert!(score::backward(layer, &raw[1..], &queries, &kept, &of_combine.kept).is_err());
        assert!(score::backward(layer, &raw, &queries, &kept, &KeptGradients::default()).is_err());
        assert!(expand::forward(layer, short, &places, scores).is_err());
        assert!(expand::forward(layer, &input, &places, &scores[1..]).is_err());
        assert!(expand::backward(layer, &places, scores, &expanded, short).is_err());
        assert!(expand::backward(layer, &places, scores, &Expanded::default(), &input).is_err());
        assert!(combine::backward(layer, &kept, &chosen, &of_expand.scores[1..]).is_err());
        if let Some(weighed) = &weighed {
            assert!(weigh::forward(layer, short, &chosen, &places).is_err());
            assert!(weigh::backward(layer, &input, &chosen, &places, weighed, &scores[1..]).is_err());
            assert!(weigh::backward(layer, &input, &chosen, &places, &Weighed::default(), scores).is_err());
        }
        let nothing = OfMaps { query: &[], z: &[], gate: &[], output_gate: &[] };
        assert!(query::backward(layer, &input, &nothing).is_err());
    }
}

#[test]
fn no_tokens_give_no_output_and_no_gradient() {
    for kind in KINDS {
        let config = small(kind);
        let weights = Weights::random(&config, 3);
        for invariant in [false, true] {
            let layer = CpuLayer::new(config.clone(), &weights).unwrap().prepared().with_invariance(invariant);
            let (forward, saved) = layer.forward_saving(&[]).unwrap();
            assert!(forward.output.is_empty() && forward.chosen.slots.is_empty(), "{kind:?}");
            let found = layer.named(&layer.backward(&[], &saved, &[]).unwrap());
            assert!(
                found.values.is_empty() && named(&config, &found).iter().all(|(_, it)| it.iter().all(|&x| x == 0.0))
            );
        }
    }
}

/// Whatever the number of tokens in the call, bit by bit.
#[test]
fn an_invariant_layer_gives_a_token_the_same_bits_in_any_call() {
    for kind in KINDS {
        let config = small(kind);
        let weights = Weights::random(&config, 3);
        let layer = CpuLayer::new(config.clone(), &weights).unwrap().with_invariance(true);
        let input = random_input(&config, 150, 4);
        for (layer, tokens) in [&layer, &layer.clone().prepared()]
            .into_iter()
            .flat_map(|layer| [1, 2, 3, 4, 5, 16, 64, 65, 128].map(|tokens| (layer, tokens)))
        {
            let whole = layer.forward(&input).unwrap();
            let found = layer.forward(&input[..tokens * config.hidden_size]).unwrap();
            assert_eq!(found.output, whole.output[..found.output.len()], "{kind:?}, {tokens} tokens");
            assert_eq!(found.chosen.slots, whole.chosen.slots[..found.chosen.slots.len()], "{kind:?}, {tokens} tokens");
        }
    }
}

/// A table whose bytes lie at an odd address is read all the same.
#[test]
fn weights_lie_wherever_they_lie() {
    let config = small(Kind::UltraMem);
    let weights = Weights::random(&config, 3);
    let values = &weights[Weight::Values];
    let mut bytes = vec![0; 1];
    bytes.extend_from_slice(values.bytes());
    let odd =
        weights.clone().with(Weight::Values, HostTensor::new(values.shape(), ElementType::F32, &bytes[1..]).unwrap());
    let input = random_input(&config, 7, 4);
    let output = |weights| CpuLayer::new(config.clone(), weights).unwrap().forward(&input).unwrap().output;
    assert_eq!(output(&weights), output(&odd));
}

const ADAM: Rule = Rule::Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, decoupled: false };
const ADAM_W: Rule = Rule::Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, decoupled: true };
const RULES: [Rule; 5] =
    [Rule::Sgd { momentum: 0.0 }, Rule::Sgd { momentum: 0.9 }, Rule::Adagrad { eps: 1e-8 }, ADAM, ADAM_W];

/// Five steps over other rows each time, some of them masked, against the oracle's; rows that no step may change keep their bits.
#[test]
fn every_rule_agrees_with_the_oracle() {
    let (rows, width) = (900, 12);
    let rng = &mut StdRng::seed_from_u64(7);
    for (rule, dtype) in RULES.into_iter().flat_map(|rule| DTYPES.map(|dtype| (rule, dtype))) {
        let numbers: Vec<f32> = (0..rows * width).map(|_| rng.random_range(-1.0..1.0)).collect();
        let before = HostTensor::from_f32([rows, width], &numbers).unwrap().cast(dtype).into_owned();
        let mut table = before.bytes().to_vec();
        let wide = |row: &[f32]| row.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let mut expected: BTreeMap<usize, Vec<f64>> = before.to_f32().chunks(width).map(wide).enumerate().collect();
        let mask: Vec<u32> = (0..rows.div_ceil(32)).map(|_| rng.random()).collect();
        let may_change = |row: usize| mask[row / 32] >> (row % 32) & 1 == 1;
        let mut optimiser = Optimiser::new(rule, rows, width).unwrap();
        let mut oracle = reference::Optimiser::new(rule).with_rounding(0, dtype);
        let mut changed = vec![false; rows];
        for step in 1..=5 {
            let listed: Vec<u32> = (0..rows as u32).filter(|_| rng.random_bool(0.7)).collect();
            let numbers: Vec<f32> = (0..listed.len() * width).map(|_| rng.random_range(-1.0..1.0)).collect();
            let gradients = RowGradients { rows: listed, numbers, width };
            let (learning_rate, scale) = (0.1 / step as f32, 0.5);
            let how = Step { learning_rate, scale, mask: Some(&mask) };
            optimiser.step(NumbersMut::of_bytes(dtype, &mut table).unwrap(), &gradients, &how).unwrap();
            let on_host = gradients.iter().map(|(row, gradient)| (row as usize, wide(gradient))).collect();
            oracle.step(&mut expected, &on_host, learning_rate.into(), scale.into(), may_change);
            on_host.keys().filter(|&&row| may_change(row)).for_each(|&row| changed[row] = true);
        }
        let found = HostTensor::new([rows, width], dtype, table).unwrap().to_f32();
        let tolerance = if dtype == ElementType::F32 { 1e-5 } else { 1e-2 };
        for (row, (found, before)) in found.chunks(width).zip(before.to_f32().chunks(width)).enumerate() {
            let expected: Vec<f32> = expected[&row].iter().map(|&x| x as f32).collect();
            match changed[row] {
                true => assert_close(&format!("{rule:?} in {dtype}, row {row}"), found, &expected, tolerance),
                false => assert_eq!(found, before, "{rule:?}: row {row} was not to change"),
            }
        }
    }
}

#[test]
fn a_refused_step_changes_nothing() {
    let mut table = vec![1.0; 12];
    let mut optimiser = Optimiser::new(ADAM, 3, 4).unwrap();
    let mut refused = |rows: &[u32], numbers: usize, rate: f32| {
        let gradients = RowGradients { rows: rows.to_vec(), numbers: vec![1.0; numbers], width: 4 };
        let before = (table.clone(), optimiser.clone());
        let found = optimiser.step(NumbersMut::F32(&mut table), &gradients, &Step::new(rate));
        assert_eq!((table.clone(), optimiser.clone()), before);
        found.unwrap_err().to_string()
    };
    assert!(refused(&[0, 3], 8, 0.1).contains("2 rows, the last 3, of 3"));
    assert!(refused(&[1, 0], 8, 0.1).contains("ascending rows of the table"));
    assert_eq!(refused(&[0, 1], 4, 0.1), "numbers of the gradients: 4, expected 8");
    assert!(refused(&[0], 4, f32::NAN).contains("learning_rate is NaN"));
    assert!(Optimiser::new(Rule::Sgd { momentum: 1.0 }, 3, 4).is_err());
    let parts = [4, 5].map(|width| RowGradients { rows: vec![0], numbers: vec![1.0; width], width });
    assert_eq!(RowGradients::sum(&parts.each_ref()).unwrap_err().to_string(), "width of row gradients: 5, expected 4");
}
