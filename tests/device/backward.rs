//! Gradients on the device: PyTorch's, the oracle's, the same bits in every run, and how far a NaN goes.

use std::collections::BTreeMap;

use proptest::test_runner::TestError;
use ultramem::{Capabilities, Dimensions, ElementType, Kind, Norm, SharedTable, Weight, reference};

use crate::common::{golden_files, random_input, small};
use crate::device::{Case, Found, assert_close, poison};
use crate::shapes::{any_dimensions, plain, product_keys, random_case, runner};

/// One forward and one backward pass into poisoned memory.
fn gradients(case: &Case, input: &[f32], grad_output: &[f32]) -> (Found, reference::Gradients) {
    let layer = &case.layer;
    let (input, grad_output) = (layer.upload(input).unwrap(), layer.upload(grad_output).unwrap());
    poison(layer.client(), 1 << 20);
    let (forward, saved) = layer.forward_saving(&input).unwrap();
    poison(layer.client(), 1 << 20);
    let found = layer.backward(&input, &saved, &grad_output).unwrap();
    let read = |tensor| layer.read(tensor).unwrap();
    let slots = layer.read_slots(&forward.chosen).unwrap();
    let forward = Found { output: read(&forward.output), slots, scores: read(&forward.chosen.scores) };
    (forward, layer.read_gradients(&found).unwrap())
}

/// Every gradient by the name of its weight, dense but for the tables, whose rows are listed.
fn named(gradients: &reference::Gradients) -> Vec<(String, Vec<f64>)> {
    let listed = |rows: &BTreeMap<usize, Vec<f64>>| -> [Vec<f64>; 2] {
        [rows.keys().map(|&row| row as f64).collect(), rows.values().flatten().copied().collect()]
    };
    let tensors = Weight::ALL.into_iter().map(|weight| (format!("{weight:?}"), gradients.tensors[weight].clone()));
    let ([rows, values], [pre_rows, pre_values]) = (listed(&gradients.values), listed(&gradients.pre_values));
    let tables = [
        ("input", gradients.input.clone()),
        ("rows of values", rows),
        ("values", values),
        ("rows of pre-values", pre_rows),
        ("pre-values", pre_values),
    ];
    tensors.chain(tables.map(|(name, numbers)| (name.to_string(), numbers))).collect()
}

/// Holds the output and every gradient against the oracle's for the slots that the device chose.
pub fn hold(what: &str, case: &Case, tolerance: f64) {
    hold_with(what, case, &random_input(case.layer.config(), case.tokens(), 77), tolerance);
}

/// The same for a given gradient of the output.
pub fn hold_with(what: &str, case: &Case, grad_output: &[f32], tolerance: f64) {
    let config = case.layer.config();
    let grad_output = ultramem::HostTensor::from_f32([grad_output.len()], grad_output).unwrap();
    let grad_output = grad_output.cast(case.layer.dtype()).to_f32();
    let (forward, found) = gradients(case, &case.input, &grad_output);
    let Found { output, slots, scores } = forward;
    let chosen = reference::Chosen {
        slots: slots.clone(),
        scores: scores.iter().map(|&score| score.into()).collect(),
        totals: Vec::new(),
    };
    let weighed = reference::weigh(config, &case.weights, &case.input, &chosen).unwrap();
    let expected = reference::expand(config, &case.weights, &case.input, &slots, &weighed.scores).unwrap();
    assert_close(&format!("{what}: output"), &output, &expected, crate::shapes::tolerance(case.layer.dtype()));
    let expected = reference::backward(config, &case.weights, &case.input, &slots, &grad_output).unwrap();
    for ((name, found), (_, expected)) in named(&found).into_iter().zip(named(&expected)) {
        let found: Vec<f32> = found.iter().map(|&x| x as f32).collect();
        assert_close(&format!("{what}: {name}"), &found, &expected, tolerance);
    }
}

#[test]
fn gradients_agree_with_pytorch() {
    for (name, file) in golden_files() {
        let weights = file.weights().unwrap();
        let numbers = |tensor: &str| file.tensor(tensor).unwrap().to_f32();
        let input = numbers("input");
        let case = Case::new(file.config(), &weights, &input, ElementType::F32);
        let (_, found) = gradients(&case, &input, &numbers("grad_output"));
        let found = found.named(file.config()).unwrap();
        let expected: Vec<_> = file.names().filter(|tensor| tensor.starts_with("expected.grad")).collect();
        assert!(!expected.is_empty(), "{name} holds no gradient");
        for tensor in expected {
            let (_, found) = found.iter().find(|(name, _)| tensor.ends_with(name.as_str())).expect(tensor);
            let expected: Vec<f64> = numbers(tensor).iter().map(|&x| x.into()).collect();
            assert_close(&format!("{name}: {tensor}"), &found.to_f32(), &expected, 1e-4);
        }
    }
}

#[test]
fn awkward_shapes_agree_with_the_oracle() {
    let primes = Dimensions { hidden_size: 13, side_keys: 34, key_dim: 7, top_m: 5, value_dim: 22, ..plain() };
    let shapes = [
        ("primes", 17, primes.clone()),
        ("primes, many tokens", 301, primes),
        ("one token", 1, plain()),
        ("top_m 1", 9, Dimensions { top_m: 1, ..plain() }),
        ("every key kept", 3, Dimensions { top_m: 16, ..plain() }),
        ("one key", 70, Dimensions { side_keys: 1, top_m: 1, expansion: 1, ..plain() }),
        ("nine blocks", 5, Dimensions { expansion: 9, side_keys: 21, cores: 3, value_dim: 9, heads: 4, ..plain() }),
        ("rank 4", 6, Dimensions { tucker_rank: 4, heads: 3, norm: Norm::Layer, ..plain() }),
        ("product keys", 11, Dimensions { side_keys: 19, top_m: 7, value_dim: 5, ..product_keys(Kind::ProductKey) }),
        ("Memory+", 11, Dimensions { heads: 3, key_dim: 6, value_dim: 10, ..product_keys(Kind::MemoryPlus) }),
    ];
    for (at, (name, tokens, dims)) in shapes.into_iter().enumerate() {
        hold(name, &random_case(&dims, tokens, ElementType::F32, at as u64), 1e-4);
    }
}

fn hold_random_shapes(dtype: ElementType, cases: u32, tolerance: f64) {
    let drawn = (any_dimensions(), 1..=40usize, 0..1000u64);
    let result = runner(cases).run(&drawn, |(dims, tokens, seed)| {
        hold("random", &random_case(&dims, tokens, dtype, seed), tolerance);
        Ok(())
    });
    if let Err(TestError::Fail(reason, smallest)) = result {
        panic!("{reason}\nsmallest case: {smallest:?}");
    }
}

#[test]
fn random_shapes_agree_with_the_oracle() {
    hold_random_shapes(ElementType::F32, 16, 1e-4);
}

#[test]
fn random_shapes_agree_with_the_oracle_in_half_precision() {
    hold_random_shapes(ElementType::F16, 8, 1e-2);
}

#[test]
fn two_runs_give_the_same_bits() {
    let dims = Dimensions { hidden_size: 64, side_keys: 32, top_m: 8, ..plain() };
    let shared = Some(SharedTable { rows: 300, offset: 100 });
    let v2 = Dimensions { capabilities: Kind::UltraMemV2.capabilities(), pre_dim: 12, shared, ..dims.clone() };
    let gates = Capabilities { output_gated: true, ..Kind::LinguaMemoryPlus.capabilities() };
    let lingua = Dimensions { capabilities: gates, side_keys: 32, ..product_keys(Kind::LinguaMemoryPlus) };
    for dims in [dims, v2, lingua] {
        let case = random_case(&dims, 500, ElementType::F32, 5);
        let grad_output = random_input(case.layer.config(), 500, 6);
        let bits = || -> Vec<u64> {
            let (_, found) = gradients(&case, &case.input, &grad_output);
            named(&found).into_iter().flat_map(|(_, numbers)| numbers).map(f64::to_bits).collect()
        };
        let first = bits();
        for run in 0..3 {
            assert!(bits() == first, "{dims:?}: run {run} differs");
        }
    }
}

/// One token's NaN spoils its own input gradient, and the rows that its slots name. Other tokens keep their bits, and other rows their gradient but for
/// rounding: sorted entries are summed in blocks, and where a row is cut hangs on how many entries lie before it, of which the token now has others.
#[test]
fn a_nan_spoils_no_other_token_and_no_other_row() {
    let small = [Kind::UltraMemV2, Kind::Peer].map(|kind| (*small(kind)).clone());
    let older = [plain(), product_keys(Kind::ProductKey), product_keys(Kind::MemoryPlus)];
    for dims in older.into_iter().chain(small) {
        let (case, bad) = (random_case(&dims, 9, ElementType::F32, 3), 4);
        let config = case.layer.config();
        let grad_output = random_input(config, 9, 4);
        let hidden = config.hidden_size;
        let (Found { slots: clean_slots, .. }, clean) = gradients(&case, &case.input, &grad_output);
        let mut input = case.input.clone();
        input[bad * hidden + 1] = f32::NAN;
        let (Found { slots, .. }, spoilt) = gradients(&case, &input, &grad_output);
        for token in (0..9).filter(|&token| token != bad) {
            let row = token * hidden..(token + 1) * hidden;
            assert_eq!(spoilt.input[row.clone()], clean.input[row], "{dims:?}: token {token}");
        }
        assert!(spoilt.input[bad * hidden..][..hidden].iter().all(|x| x.is_nan()), "{dims:?}: the token itself");
        let entries = config.heads * config.top_m;
        let row_of = |&slot: &u32| {
            let address = case.weights.shuffle_index.as_ref().map_or(slot, |index| index[slot as usize]);
            config.place(address as usize).1
        };
        let own = |slots: &[u32]| slots[bad * entries..][..entries].iter().map(row_of).collect::<Vec<_>>();
        // With a number in its place, the token named other rows.
        let named = [own(&slots), own(&clean_slots)].concat();
        for (spoilt, clean) in [(&spoilt.values, &clean.values), (&spoilt.pre_values, &clean.pre_values)] {
            for (row, gradient) in spoilt.iter().filter(|(row, _)| !named.contains(row)) {
                let (clean, most) = (&clean[row], gradient.iter().fold(0.0, |most: f64, x| most.max(x.abs())));
                let same = gradient.iter().zip(clean).all(|(found, clean)| (found - clean).abs() <= 1e-6 * most);
                assert!(same && gradient.len() == clean.len(), "{dims:?}: row {row}: {gradient:?}, {clean:?}");
            }
        }
    }
}
