//! The oracle against PyTorch's results, against brute force, and against sums done by hand; and the initial weights.

#![cfg(feature = "files")]

mod common;

use common::{KINDS, golden_files, random_input, relative_l2, small};
use ultramem::{
    Capabilities, Dimensions, Error, HostTensor, Kind, MemoryConfig, Norm, Weight, Weights,
    reference::{Kept, backward, combine, expand, forward, judge, query, score, score_slots},
};

#[test]
fn agrees_with_pytorch() {
    for (name, file) in golden_files() {
        let weights = file.weights().unwrap();
        let input = file.tensor("input").unwrap().to_f32();
        let found = forward(file.config(), &weights, &input).unwrap();
        let output = relative_l2(&found.output, &file.tensor("expected.output").unwrap().to_f32());
        let scores = relative_l2(&found.scores, &file.tensor("expected.scores").unwrap().to_f32());
        let slots: Vec<i64> = found.slots.iter().map(|&slot| slot.into()).collect();
        assert!(output <= 1e-5, "{name}: output differs by {output}");
        assert!(scores <= 1e-5, "{name}: scores differ by {scores}");
        assert_eq!(slots, file.integers("expected.indices").unwrap().numbers, "{name}: slots");
    }
}

#[test]
fn gradients_agree_with_pytorch() {
    for (name, file) in golden_files() {
        let (config, weights) = (file.config(), file.weights().unwrap());
        let numbers = |tensor: &str| file.tensor(tensor).unwrap().to_f32();
        let input = numbers("input");
        let slots = forward(config, &weights, &input).unwrap().slots;
        let found = backward(config, &weights, &input, &slots, &numbers("grad_output")).unwrap();
        let mut pairs: Vec<_> = found
            .named(config)
            .unwrap()
            .into_iter()
            .map(|(name, found)| {
                (
                    format!(
                        "expected.{}",
                        if file.has(&format!("expected.{name}")) {
                            name
                        } else {
                            name.replace("full_memory_layer.", "")
                        }
                    ),
                    found.to_f32(),
                )
            })
            .collect();
        pairs.retain(|(tensor, _)| file.has(tensor));
        assert_eq!(pairs.len(), file.names().filter(|name| name.starts_with("expected.grad")).count(), "{name}");
        for (tensor, found) in pairs {
            let distance = relative_l2(&found, &numbers(&tensor));
            assert!(distance <= 1e-4, "{name}: {tensor} differs by {distance}");
        }
    }
}

/// Central differences of `sum(output · grad_output)` in the input, for every kind and both norms; the slots must stay.
#[test]
fn gradients_agree_with_finite_differences() {
    for (kind, norm) in KINDS.into_iter().flat_map(|kind| [(kind, Norm::Rms), (kind, Norm::Layer)]) {
        let config = config(Dimensions { norm, ..(*small(kind)).clone() });
        let weights = Weights::random(&config, 8);
        let input = random_input(&config, 2, 9);
        let grad_output = random_input(&config, 2, 10);
        let run = |weights: &Weights<'_>, input: &[f32]| {
            let found = forward(&config, weights, input).unwrap();
            (found.output.iter().zip(&grad_output).map(|(y, &g)| y * f64::from(g)).sum::<f64>(), found.slots)
        };
        let slots = run(&weights, &input).1;
        let found = backward(&config, &weights, &input, &slots, &grad_output).unwrap();
        let slope = |change: &dyn Fn(f32) -> (Weights<'static>, Vec<f32>)| {
            let step = 2f32.powi(-12);
            let [(above, kept_above), (below, kept_below)] = [step, -step].map(|step| {
                let (weights, input) = change(step);
                run(&weights, &input)
            });
            (kept_above == slots && kept_below == slots).then_some((above - below) / (2.0 * f64::from(step)))
        };
        let add = |tensor: &HostTensor<'_>, at: usize, step: f32| {
            let mut numbers = tensor.to_f32();
            numbers[at] += step;
            HostTensor::from_f32(tensor.shape(), &numbers).unwrap()
        };
        let (mut slopes, mut expected) = (Vec::new(), Vec::new());
        let mut hold = |slope: Option<f64>, gradient: f64| {
            if let Some(slope) = slope {
                slopes.push(slope);
                expected.push(gradient);
            }
        };
        for at in 0..input.len() {
            let change = |step: f32| {
                let mut input = input.clone();
                input[at] += step;
                (weights.clone(), input)
            };
            hold(slope(&change), found.input[at]);
        }
        for weight in Weight::ALL.into_iter().filter(|weight| weight.learns(&config)) {
            let gradient = found.dense(&config, weight);
            // Of a table and of the keys every seventh number, and those of the rows that are read.
            for at in (0..gradient.len()).filter(|&at| at % 7 == 0 || gradient[at] != 0.0) {
                let change = |step: f32| (weights.clone().with(weight, add(&weights[weight], at, step)), input.clone());
                hold(slope(&change), gradient[at]);
            }
        }
        let distance = relative_l2(&slopes, &expected);
        assert!(slopes.len() > input.len() && distance < 1e-3, "{kind:?} {norm:?}: {distance} of {}", slopes.len());
    }
}

/// What product keys promise: the same slots as if every one of the `side_keys²` had been scored.
#[test]
fn product_keys_find_what_brute_force_finds() {
    let config = small(Kind::ProductKey);
    let weights = Weights::random(&config, 1);
    let input = random_input(&config, 7, 2);
    let queries = query(&config, &weights, &input).unwrap();
    let kept = score(&config, &weights, &queries).unwrap();
    let found = forward(&config, &weights, &input).unwrap();
    let (n, m) = (config.side_keys, config.top_m);
    for (at, sides) in kept.approximate.chunks(2 * n).enumerate() {
        let mut all: Vec<_> = (0..n * n).map(|slot| (sides[slot / n] + sides[n + slot % n], slot as u32)).collect();
        all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let slots: Vec<u32> = all[..m].iter().map(|pair| pair.1).collect();
        assert_eq!(found.slots[at * m..][..m], slots, "token and head {at}");
        let sum: f64 = all[..m].iter().map(|pair| pair.0.exp()).sum();
        let scores: Vec<f64> = all[..m].iter().map(|pair| pair.0.exp() / sum).collect();
        assert!(relative_l2(&found.scores[at * m..][..m], &scores) < 1e-12, "token and head {at}");
    }
}

/// A layer in which every size is as small as the case needs.
fn config(dims: Dimensions) -> MemoryConfig {
    MemoryConfig::new(dims).unwrap()
}

fn hand_dims(kind: Kind) -> Dimensions {
    Dimensions {
        capabilities: kind.capabilities(),
        hidden_size: 1,
        heads: 1,
        side_keys: 4,
        key_dim: 1,
        tucker_rank: 1,
        top_m: 2,
        cores: 1,
        expansion: 1,
        value_dim: 1,
        norm_eps: 0.0,
        ..Dimensions::default()
    }
}

fn tensor(shape: &[usize], numbers: &[f32]) -> HostTensor<'static> {
    HostTensor::from_f32(shape, numbers).unwrap()
}

#[test]
fn query_is_normalised_half_by_half() {
    let rms = config(Dimensions { hidden_size: 2, key_dim: 2, ..hand_dims(Kind::ProductKey) });
    let mut weights = Weights::random(&rms, 0);
    weights.tensors[Weight::QueryProj] = Some(tensor(&[4, 2], &[1.0, 0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 0.0]));
    weights.tensors[Weight::QueryNorm] = Some(tensor(&[2], &[1.0, 10.0]));
    // Halves (1, 7) and (2, 0), whose root mean squares are 5 and √2.
    let found = query(&rms, &weights, &[1.0, 7.0]).unwrap();
    assert!(relative_l2(&found, &[0.2, 14.0, 2f64.sqrt(), 0.0]) < 1e-12, "{found:?}");

    let layer = config(Dimensions { norm: Norm::Layer, norm_eps: 16.0, ..(*rms).clone() });
    // (1, 7) less its mean is (-3, 3) and √(9 + 16) = 5; (2, 0) is (1, -1) and √(1 + 16).
    let found = query(&layer, &weights, &[1.0, 7.0]).unwrap();
    assert!(relative_l2(&found, &[-0.6, 6.0, 17f64.powf(-0.5), -10.0 * 17f64.powf(-0.5)]) < 1e-7, "{found:?}");
}

/// Memory+ takes its keys as they are, so with a query of ones the keys are the scores.
fn scores_by_hand(keys: [f32; 8]) -> (MemoryConfig, Weights<'static>, Kept) {
    let config = config(hand_dims(Kind::MemoryPlus));
    let mut weights = Weights::random(&config, 0);
    weights.tensors[Weight::Keys] = Some(tensor(&[1, 2, 4, 1], &keys));
    let kept = score(&config, &weights, &[1.0, 1.0]).unwrap();
    (config, weights, kept)
}

#[test]
fn ties_go_to_the_smaller_key_and_the_smaller_slot() {
    let (config, weights, kept) = scores_by_hand([1.0, 3.0, 3.0, 3.0, 2.0, 0.0, 5.0, 2.0]);
    assert_eq!(kept.keys, [1, 2, 0, 2]);
    assert_eq!(kept.scores, [3.0, 3.0, 2.0, 5.0]);
    assert_eq!(kept.approximate, [1.0, 3.0, 3.0, 3.0, 2.0, 0.0, 5.0, 2.0]);
    let chosen = combine(&config, &weights, &kept).unwrap();
    assert_eq!(chosen.slots, [6, 10]);
    assert_eq!(chosen.totals, [8.0, 8.0]);
    assert_eq!(chosen.scores, [0.5, 0.5]);
}

#[test]
fn softmax_is_over_the_chosen_alone() {
    let (config, weights, kept) = scores_by_hand([0.0, 0.0, 3.0, 2.0, 1.0, -9.0, -9.0, 0.5]);
    let chosen = combine(&config, &weights, &kept).unwrap();
    assert_eq!(chosen.slots, [8, 11]);
    assert_eq!(chosen.totals, [4.0, 3.5]);
    let first = 1.0 / (1.0 + (-0.5f64).exp());
    assert!(relative_l2(&chosen.scores, &[first, 1.0 - first]) < 1e-12, "{:?}", chosen.scores);
}

#[test]
fn nan_is_never_selected_over_a_number() {
    let nan = f32::NAN;
    let (_, _, kept) = scores_by_hand([nan, f32::NEG_INFINITY, nan, -3.0, -0.0, nan, 0.0, -1.0]);
    assert_eq!(kept.keys, [1, 3, 0, 2]);
    let (config, weights, kept) = scores_by_hand([nan, nan, nan, 7.0, 1.0, nan, nan, nan]);
    assert_eq!(kept.keys, [0, 3, 0, 1]);
    let chosen = combine(&config, &weights, &kept).unwrap();
    assert_eq!(chosen.slots, [12, 0]);
    assert_eq!(chosen.totals[0], 8.0);
    assert!(chosen.totals[1].is_nan());
}

#[test]
fn scores_are_judged_by_the_singular_vectors() {
    let config = config(Dimensions { key_dim: 2, tucker_rank: 2, top_m: 1, ..hand_dims(Kind::UltraMem) });
    let mut weights = Weights::random(&config, 0);
    weights.tensors[Weight::KeysNorm] = Some(tensor(&[2], &[1.0, 2.0]));
    // Key i of either side, ranks side by side: (x of rank 0, x of rank 1, y of rank 0, y of rank 1), already of root
    // mean square 1. Only keys 1 and 2 differ from the others.
    let plain = [1.0, 1.0, 1.0, 1.0];
    let side = [plain, [-1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 1.0, 1.0], plain].concat();
    weights.tensors[Weight::Keys] = Some(tensor(&[1, 2, 4, 2, 2], &side.repeat(2)));
    (weights.core_u, weights.core_v) = (vec![-1.0, 10.0], vec![10.0, -1.0]);
    let kept = score(&config, &weights, &[1.0, 0.0, 3.0, 1.0]).unwrap();
    // Row: S = x, so p is -1 + 10, 1 + 10, -1 - 10, -1 + 10. Column: S = 3x + 2y, p is 50 - 5, -10 - 5, 50 + 1, 50 - 5.
    assert_eq!(kept.approximate, [9.0, 11.0, -11.0, 9.0, 45.0, -15.0, 51.0, 45.0]);
    assert_eq!(kept.keys, [1, 2]);
    assert_eq!(kept.scores, [-1.0, 1.0, 5.0, -1.0]);
}

#[test]
fn pairs_are_scored_by_every_core() {
    let config = config(Dimensions { tucker_rank: 2, cores: 2, value_dim: 2, ..hand_dims(Kind::UltraMem) });
    let mut weights = Weights::random(&config, 0);
    weights.tensors[Weight::Cores] = Some(tensor(&[2, 1, 2, 2], &[1.0, 2.0, 0.0, 1.0, 0.0, 0.0, 10.0, 0.0]));
    let kept =
        Kept { keys: vec![0, 3, 1, 2], approximate: Vec::new(), scores: vec![1.0, 2.0, 3.0, -1.0, 1.0, 0.0, 0.0, 4.0] };
    // Core 0 gives row₀·col₀ + 2·row₀·col₁ + row₁·col₁, core 1 gives 10·row₁·col₀:
    // (0, 1): 1 and 20; (0, 2): 8 + 8 and 0; (3, 1): 3 and -10; (3, 2): 24 - 4 and 0.
    let chosen = combine(&config, &weights, &kept).unwrap();
    assert_eq!(chosen.slots, [1, 14]);
    assert_eq!(chosen.totals, [21.0, 20.0]);
    assert_eq!(chosen.scores, [1.0, 20.0, 20.0, 0.0]);
}

#[test]
fn virtual_blocks_have_columns_of_their_own() {
    let dims = Dimensions { side_keys: 2, cores: 2, expansion: 2, value_dim: 2, ..hand_dims(Kind::UltraMem) };
    let config = config(dims);
    let mut weights = Weights::random(&config, 0);
    weights.shuffle_index = Some(vec![2, 0, 3, 1]);
    weights.tensors[Weight::Values] = Some(tensor(&[2, 2], &[1.0, 2.0, 3.0, 4.0]));
    weights.tensors[Weight::ValuesProj] = Some(tensor(&[1, 4], &[1.0, 10.0, 100.0, 1000.0]));
    // Slot 3 is row 1 of block 0, slot 2 row 1 of block 1.
    let output = expand(&config, &weights, &[0.0], &[3, 2], &[1.0, 2.0, 0.5, 0.25]).unwrap();
    assert_eq!(output, [3.0 + 10.0 * 8.0 + 100.0 * 1.5 + 1000.0 * 1.0]);
}

#[test]
fn memory_plus_is_gated_by_its_input() {
    let config = config(hand_dims(Kind::MemoryPlus));
    let mut weights = Weights::random(&config, 0);
    let table: Vec<f32> = (0..16).map(|row| row as f32).collect();
    weights.tensors[Weight::Values] = Some(tensor(&[16, 1], &table));
    weights.tensors[Weight::ValuesProj] = Some(tensor(&[1, 1], &[2.0]));
    weights.tensors[Weight::GateProj] = Some(tensor(&[1, 1], &[3.0]));
    let output = expand(&config, &weights, &[-0.5], &[5, 9], &[0.75, 0.25]).unwrap();
    let silu = -1.5 / (1.0 + 1.5f64.exp());
    assert!(relative_l2(&output, &[6.0 * silu * 2.0]) < 1e-12, "{output:?}");
}

#[test]
fn every_key_can_be_kept() {
    for kind in KINDS {
        let small = small(kind);
        let config = config(Dimensions { top_m: small.side_keys, ..(*small).clone() });
        let weights = Weights::random(&config, 5);
        let queries = query(&config, &weights, &random_input(&config, 3, 6)).unwrap();
        let kept = score(&config, &weights, &queries).unwrap();
        let every: Vec<u32> = (0..config.side_keys as u32).collect();
        assert!(kept.keys.chunks(config.side_keys).all(|keys| keys == every), "{kind:?}");
        let chosen = combine(&config, &weights, &kept).unwrap();
        assert!(chosen.totals.chunks(config.top_m).all(|totals| totals.is_sorted_by(|a, b| a >= b)), "{kind:?}");
    }
}

#[test]
fn a_spoilt_token_spoils_only_its_own_row() {
    for kind in KINDS {
        let config = small(kind);
        let weights = Weights::random(&config, 3);
        let input = random_input(&config, 4, 4);
        let clean = forward(&config, &weights, &input).unwrap();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX] {
            let mut spoilt = input.clone();
            spoilt[2 * config.hidden_size + 1] = bad;
            let found = forward(&config, &weights, &spoilt).unwrap();
            let h = config.hidden_size;
            assert_eq!(found.output[..2 * h], clean.output[..2 * h], "{kind:?} {bad}");
            assert_eq!(found.output[3 * h..], clean.output[3 * h..], "{kind:?} {bad}");
            assert!(found.slots.iter().all(|&slot| (slot as usize) < config.slots()), "{kind:?} {bad}");
            let row = &found.output[2 * h..3 * h];
            assert_eq!(row.iter().all(|y| y.is_finite()), bad == f32::MAX, "{kind:?} {bad}: {row:?}");
        }
    }
}

#[test]
fn no_tokens_give_no_output() {
    let config = small(Kind::UltraMem);
    let found = forward(&config, &Weights::random(&config, 0), &[]).unwrap();
    assert!(found.output.is_empty() && found.slots.is_empty() && found.scores.is_empty());
}

/// Asserts that an error is one line and says each of `words`.
fn assert_says<T: std::fmt::Debug>(found: Result<T, Error>, words: &[&str]) {
    let message = found.unwrap_err().to_string();
    assert!(!message.contains('\n'), "{message}");
    for word in words {
        assert!(message.contains(word), "{message:?} does not say {word:?}");
    }
}

#[test]
fn wrong_lengths_and_indices_are_refused() {
    let config = small(Kind::UltraMem);
    let weights = Weights::random(&config, 0);
    let input = random_input(&config, 2, 0);
    let queries = query(&config, &weights, &input).unwrap();
    let kept = score(&config, &weights, &queries).unwrap();
    let chosen = combine(&config, &weights, &kept).unwrap();

    assert_says(forward(&config, &weights, &input[1..]), &["input", "21", "hidden_size 11"]);
    assert_says(score(&config, &weights, &queries[1..]), &["query", "19", "10"]);
    let short = Kept { keys: kept.keys[8..].to_vec(), ..kept.clone() };
    assert_says(combine(&config, &weights, &short), &["kept.keys", "40", "24"]);
    let short = Kept { scores: kept.scores[1..].to_vec(), ..kept.clone() };
    assert_says(combine(&config, &weights, &short), &["kept.scores", "95", "96"]);
    let mut wild = kept.clone();
    wild.keys[3] = 8;
    assert_says(combine(&config, &weights, &wild), &["kept.keys", "entry 3 is 8", "less than 8"]);
    let (slots, scores) = (&chosen.slots, &chosen.scores);
    assert_says(expand(&config, &weights, &input, &slots[1..], scores), &["slots", "23", "24"]);
    assert_says(expand(&config, &weights, &input, slots, &scores[1..]), &["scores", "47", "48"]);
    let mut wild = slots.clone();
    wild[5] = 64;
    assert_says(expand(&config, &weights, &input, &wild, scores), &["slots", "entry 5 is 64", "less than 64"]);
}

/// A gate multiplies one block; additive scores are one number.
#[test]
fn capabilities_that_do_not_go_together_are_refused() {
    let additive = Dimensions { expansion: 4, ..(*small(Kind::ProductKey)).clone() };
    let gated = Capabilities { gated: true, ..additive.capabilities };
    for (dims, what) in [
        (Dimensions { tucker_rank: 2, ..additive.clone() }, "tucker_rank is 2"),
        (Dimensions { cores: 2, ..additive.clone() }, "cores is 2"),
        (Dimensions { capabilities: gated, ..additive.clone() }, "expansion is 4"),
    ] {
        let error = MemoryConfig::new(dims).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
    }
    assert_eq!(config(additive).kind(), Some(Kind::ProductKey));
}

#[test]
fn weights_that_do_not_fit_are_refused_by_name() {
    let config = small(Kind::UltraMem);
    let good = Weights::random(&config, 0);
    good.check(&config).unwrap();
    let odd = tensor(&[1, 1], &[0.0]);
    let with = |change: &dyn Fn(&mut Weights<'static>)| {
        let mut weights = good.clone();
        change(&mut weights);
        weights.check(&config)
    };
    assert_says(
        with(&|w| w.tensors[Weight::QueryProj] = Some(odd.clone())),
        &["query_proj.weight", "[1, 1]", "[10, 11]"],
    );
    assert_says(with(&|w| w.tensors[Weight::QueryNorm] = Some(odd.clone())), &["query_norm.weight", "[5]"]);
    assert_says(with(&|w| w.tensors[Weight::Keys] = Some(odd.clone())), &["\"keys\"", "[3, 2, 8, 5, 2]"]);
    assert_says(with(&|w| w.tensors[Weight::KeysNorm] = Some(odd.clone())), &["keys_norm.weight", "[5]"]);
    assert_says(with(&|w| w.tensors[Weight::Values] = Some(odd.clone())), &["\"values_for_look_up\"", "[16, 6]"]);
    assert_says(with(&|w| w.tensors[Weight::ValuesProj] = Some(odd.clone())), &["values_proj.weight", "[11, 24]"]);
    assert_says(with(&|w| w.tensors[Weight::GateProj] = Some(odd.clone())), &["swilu_projection.weight"]);
    assert_says(with(&|w| w.tensors[Weight::Cores] = None), &["tucker_core", "missing"]);
    assert_says(with(&|w| w.core_u.push(0.0)), &["tucker_core_u", "7", "6"]);
    assert_says(with(&|w| w.core_v.push(0.0)), &["tucker_core_v", "7", "6"]);
    assert_says(with(&|w| w.shuffle_index = None), &["shuffle_index", "missing"]);
    assert_says(with(&|w| w.shuffle_index = Some(vec![0; 63])), &["shuffle_index", "63", "64"]);
    assert_says(with(&|w| w.shuffle_index = Some(vec![64; 64])), &["shuffle_index", "entry 0 is 64", "64"]);
    let plus = small(Kind::MemoryPlus);
    let mut weights = Weights::random(&plus, 0);
    weights.tensors[Weight::GateProj] = None;
    assert_says(weights.check(&plus), &["swilu_projection.weight", "missing"]);
    let mut weights = Weights::random(&plus, 0);
    weights.shuffle_index = Some(vec![0; 64]);
    assert_says(weights.check(&plus), &["shuffle_index", "addresses"]);
}

#[test]
fn shapes_that_overflow_are_refused() {
    assert_says(HostTensor::new([usize::MAX, 2], ultramem::ElementType::F32, vec![0u8; 8]), &["holds 2"]);
}

#[test]
fn a_row_is_read_alone() {
    let matrix = tensor(&[3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    assert_eq!(matrix.row(2), Some(vec![5.0, 6.0]));
    assert_eq!(matrix.row(3), None);
    assert_eq!(matrix.cast(ultramem::ElementType::BF16).row(1), Some(vec![3.0, 4.0]));
}

/// Mean and standard deviation.
fn moments(tensor: &HostTensor<'_>) -> (f64, f64) {
    let numbers = tensor.to_f32();
    let mean = numbers.iter().map(|&x| f64::from(x)).sum::<f64>() / numbers.len() as f64;
    let variance = numbers.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / numbers.len() as f64;
    (mean, variance.sqrt())
}

#[test]
fn initial_weights_follow_the_paper() {
    let config = config(Dimensions { hidden_size: 64, key_dim: 16, tucker_rank: 3, ..Dimensions::default() });
    let weights = Weights::random(&config, 7);
    weights.check(&config).unwrap();
    for (tensor, deviation) in [
        (&weights[Weight::Values], 0.02),
        (&weights[Weight::Keys], 0.25),
        (&weights[Weight::QueryProj], 0.25),
        (&weights[Weight::ValuesProj], 1.0 / 16.0),
    ] {
        let (mean, found) = moments(tensor);
        assert!(mean.abs() < 0.1 * deviation, "mean {mean} for deviation {deviation}");
        assert!((found / deviation - 1.0).abs() < 0.05, "deviation {found}, expected {deviation}");
    }
    assert!(weights.numbers(Weight::QueryNorm).iter().all(|&x| x == 16f32.powf(-0.33)));
    assert_eq!(weights[Weight::QueryNorm], weights[Weight::KeysNorm]);
    assert!(weights.numbers(Weight::Cores).iter().all(|core| (0.0..1.0).contains(core)));
    let shuffle = weights.shuffle_index.clone().unwrap();
    assert!(!shuffle.is_sorted());
    let mut sorted = shuffle;
    sorted.sort_unstable();
    assert!(sorted.iter().enumerate().all(|(place, &address)| place == address as usize));
}

/// `C v = σ u` and `Cᵀ u = σ v` with σ the largest: no other unit vector is stretched further.
#[test]
fn singular_vectors_lead() {
    let config = config(Dimensions { tucker_rank: 3, ..Dimensions::default() });
    let weights = Weights::random(&config, 11);
    let cores = weights.numbers(Weight::Cores);
    for head in 0..config.heads {
        let summed = |a: usize, b: usize| -> f64 {
            (0..config.cores).map(|core| f64::from(cores[((core * config.heads + head) * 3 + a) * 3 + b])).sum()
        };
        let u = &weights.core_u[head * 3..][..3];
        let v = &weights.core_v[head * 3..][..3];
        let cv: Vec<f64> = (0..3).map(|a| (0..3).map(|b| summed(a, b) * f64::from(v[b])).sum()).collect();
        let ctu: Vec<f64> = (0..3).map(|b| (0..3).map(|a| summed(a, b) * f64::from(u[a])).sum()).collect();
        let sigma = cv.iter().map(|x| x * x).sum::<f64>().sqrt();
        let scaled = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| f64::from(x) * sigma).collect() };
        assert!(relative_l2(&cv, &scaled(u)) < 1e-6 && relative_l2(&ctu, &scaled(v)) < 1e-6, "head {head}");
        // The squares of all singular values sum to the squares of all entries: σ must hold the largest share, and for
        // positive matrices the leading vectors are the only ones of one sign.
        assert!(u.iter().chain(v).all(|&x| x > 0.0), "head {head}: {u:?} {v:?}");
    }
}

#[test]
fn a_seed_names_its_weights() {
    let config = small(Kind::MemoryPlus);
    assert_eq!(Weights::random(&config, 1), Weights::random(&config, 1));
    assert_ne!(Weights::random(&config, 1), Weights::random(&config, 2));
}

/// Two slots of equal totals may change places; two of unequal ones, a slot twice or one that there is not are wrong.
#[test]
fn chosen_slots_are_judged_by_their_scores() {
    for kind in KINDS {
        let config = small(kind);
        let start = Weights::random(&config, 4);
        // Of the row keys two in a row are the same: every slot has another one of its total.
        let width = config.key_dim * config.tucker_rank;
        let mut keys = start.numbers(Weight::Keys);
        for side in keys.chunks_mut(config.side_keys * width).step_by(2) {
            side.chunks_mut(2 * width).for_each(|two| two.copy_within(..width, width));
        }
        let keys = HostTensor::from_f32(start[Weight::Keys].shape(), &keys).unwrap();
        let weights = start.with(Weight::Keys, keys);
        let input = random_input(&config, 5, 8);
        let expected = forward(&config, &weights, &input).unwrap().slots;
        let judge = |found: &[u32]| judge(&config, &weights, &input, found, &expected, 1e-9).unwrap();
        let exact = judge(&expected);
        assert!(exact.right() && exact.equal == expected.len() && exact.tokens.is_empty(), "{exact:?}");
        let totals = score_slots(&config, &weights, &input, &expected).unwrap().totals;
        let of_head = |place: usize| place % config.top_m + 1 < config.top_m;
        let equal = (0..totals.len() - 1).find(|&at| of_head(at) && totals[at] == totals[at + 1]).unwrap();
        let unequal = (0..totals.len() - 1).find(|&at| of_head(at) && totals[at] != totals[at + 1]).unwrap();
        let swapped = |at: usize| {
            let mut found = expected.clone();
            found.swap(at, at + 1);
            judge(&found)
        };
        let token = |at: usize| vec![at / (config.heads * config.top_m)];
        let found = swapped(equal);
        assert_eq!((found.right(), found.swapped, &found.tokens), (true, 2, &token(equal)), "{kind:?}: {found:?}");
        let found = swapped(unequal);
        assert_eq!(
            (found.right(), found.wrong.len(), &found.tokens),
            (false, 2, &token(unequal)),
            "{kind:?}: {found:?}"
        );
        for other in [expected[equal], config.slots() as u32] {
            let mut found = expected.clone();
            found[equal + 1] = other;
            assert_eq!(judge(&found).wrong.len(), 1, "{kind:?}: slot {other} in place of {}", expected[equal + 1]);
        }
    }
}
