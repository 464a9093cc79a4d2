//! Ties. All numbers are small integers, so that f32 and f64 agree exactly and nothing is left to tolerance: the slots must
//! be the oracle's, in its order.

use rand::{Rng, SeedableRng, rngs::StdRng};
use ultramem::Weight;
use ultramem::kernels::combine::{PairScore, combine};
use ultramem::kernels::{from_f32, from_u32};
use ultramem::{Dimensions, ElementType, HostTensor, Kept, Kind, MemoryConfig, MemoryLayer, Norm, Weights, reference};

use crate::device::{Case, assert_close, client, every_strategy, poison, read_f32, read_u32};

/// A layer whose query projection is the identity and whose norms leave ±1 as it is.
fn exact_config(kind: Kind, key_dim: usize) -> MemoryConfig {
    let (tucker_rank, cores, expansion) = if kind == Kind::UltraMem { (2, 2, 4) } else { (1, 1, 1) };
    let query_pairs = if kind == Kind::MemoryPlus { 2 } else { 1 };
    MemoryConfig::new(Dimensions {
        capabilities: kind.capabilities(),
        hidden_size: query_pairs * 2 * key_dim,
        heads: 2,
        side_keys: 22,
        key_dim,
        tucker_rank,
        top_m: 9,
        cores,
        expansion,
        value_dim: 6,
        norm: Norm::Rms,
        norm_eps: 0.0,
        ..Dimensions::default()
    })
    .unwrap()
}

/// As many numbers as `shape` calls for, each `of` the generator.
fn filled(shape: &[usize], mut of: impl FnMut() -> f32) -> HostTensor<'static> {
    let numbers: Vec<f32> = (0..shape.iter().product()).map(|_| of()).collect();
    HostTensor::from_f32(shape, &numbers).unwrap()
}

fn exact_weights(config: &MemoryConfig, rng: &mut StdRng) -> Weights<'static> {
    let start = Weights::random(config, rng.random());
    let width = config.hidden_size;
    let identity: Vec<f32> = (0..width * width).map(|i| f32::from(u8::from(i / width == i % width))).collect();
    let mut whole = |count: usize| -> Vec<f32> { (0..count).map(|_| rng.random_range(-2i8..=2).into()).collect() };
    let mut weights = Weights { core_u: whole(start.core_u.len()), core_v: whole(start.core_v.len()), ..start.clone() };
    for weight in [Weight::Cores, Weight::Values, Weight::ValuesProj] {
        let shape = weight.shape(config);
        let drawn = |_: &HostTensor<'_>| HostTensor::from_f32(shape.clone(), &whole(shape.iter().product())).unwrap();
        weights.tensors[weight] = start.get(weight).map(drawn);
    }
    weights
        .with(Weight::QueryProj, HostTensor::from_f32([width, width], &identity).unwrap())
        .with(Weight::QueryNorm, filled(&[config.key_dim], || 1.0))
        .with(Weight::KeysNorm, filled(&[config.key_dim], || 2.0))
        .with(Weight::Keys, filled(&Weight::Keys.shape(config), || sign(rng)))
}

fn sign(rng: &mut StdRng) -> f32 {
    if rng.random() { 1.0 } else { -1.0 }
}

/// Asserts that a layer chooses the oracle's slots exactly, by every strategy; and, where no softmax and no gate
/// rounds them, that scores and outputs are the oracle's too.
fn assert_exact(config: &MemoryConfig, weights: &Weights<'_>, seed: u64) -> Vec<u32> {
    let rng = &mut StdRng::seed_from_u64(seed);
    let input: Vec<f32> = (0..13 * config.hidden_size).map(|_| sign(rng)).collect();
    let case = Case::new(config, weights, &input, ElementType::F32);
    let expected = reference::forward(config, weights, &input).unwrap();
    for strategies in every_strategy() {
        let found = case.run(&input, strategies);
        assert_eq!(found.slots, expected.slots, "{config:?}, {strategies:?}");
        let tolerance = if config.tucker() { 0.0 } else { 1e-6 };
        assert_close("scores", &found.scores, &expected.scores, tolerance);
        assert_close("output", &found.output, &expected.output, tolerance);
    }
    expected.slots
}

/// The kinds whose numbers can be whole from end to end.
const KINDS: [Kind; 3] = [Kind::UltraMem, Kind::ProductKey, Kind::MemoryPlus];

/// Keys of two signs: four kinds of key, so that most of the 22 are equal to another one.
#[test]
fn duplicated_keys_go_by_their_place() {
    for (seed, kind) in KINDS.into_iter().enumerate() {
        let config = exact_config(kind, 2);
        let weights = exact_weights(&config, &mut StdRng::seed_from_u64(seed as u64));
        assert_exact(&config, &weights, 10 + seed as u64);
    }
}

#[test]
fn where_all_is_equal_the_first_are_chosen() {
    for kind in KINDS {
        let config = exact_config(kind, 3);
        let weights = exact_weights(&config, &mut StdRng::seed_from_u64(3));
        let weights = weights.with(Weight::Keys, filled(&Weight::Keys.shape(&config), || 1.0));
        let slots = assert_exact(&config, &weights, 4);
        let first: Vec<u32> = (0..config.top_m as u32).collect();
        assert!(slots.chunks(config.top_m).all(|slots| slots == first), "{kind:?}");
    }
}

/// Both heads choose the same slots, whose values are then added twice.
#[test]
fn heads_may_choose_the_same_slots() {
    let config = exact_config(Kind::UltraMem, 3);
    let mut weights = exact_weights(&config, &mut StdRng::seed_from_u64(5));
    let (keys, cores) = (weights.numbers(Weight::Keys), weights.numbers(Weight::Cores));
    let head = &keys[..keys.len() / 2];
    let shape = |weight: Weight| weight.shape(&config);
    weights.tensors[Weight::Keys] = Some(HostTensor::from_f32(shape(Weight::Keys), &head.repeat(2)).unwrap());
    let area = config.tucker_rank * config.tucker_rank;
    let cores: Vec<f32> = cores.chunks(2 * area).flat_map(|heads| heads[..area].repeat(2)).collect();
    weights.tensors[Weight::Cores] = Some(HostTensor::from_f32(shape(Weight::Cores), &cores).unwrap());
    weights.core_u = weights.core_u[..config.tucker_rank].repeat(2);
    weights.core_v = weights.core_v[..config.tucker_rank].repeat(2);
    let slots = assert_exact(&config, &weights, 6);
    for heads in slots.chunks(2 * config.top_m) {
        assert_eq!(heads[..config.top_m], heads[config.top_m..]);
    }
}

/// Scores of one number per key, combined by the product (a core of 1) or by the sum: 24 rows of two sides of 9.
fn combined(kind: Kind, pick: &mut dyn FnMut() -> f32) -> (Vec<u32>, Vec<f32>, reference::Chosen) {
    let dims = Dimensions { heads: 1, tucker_rank: 1, cores: 1, ..(*exact_config(kind, 1)).clone() };
    let config = MemoryConfig::new(dims).unwrap();
    let mut weights = Weights::random(&config, 0);
    let ones = weights.get(Weight::Cores).map(|cores| filled(cores.shape(), || 1.0));
    weights.tensors[Weight::Cores] = ones;
    let (client, tokens, top_m) = (client(), 24, config.top_m);
    let keys: Vec<u32> = (0..2 * tokens).flat_map(|side| (0..top_m as u32).map(move |i| side % 5 + 2 * i)).collect();
    let scores: Vec<f32> = (0..tokens as usize * 2 * top_m).map(|_| pick()).collect();
    let shape = [tokens as usize, 1, 2, top_m];
    let kept = Kept {
        keys: from_u32(&client, &shape, &keys).unwrap(),
        scores: from_f32(&client, &[&shape[..], &[1]].concat(), &scores).unwrap(),
    };
    let core = from_f32(&client, &[1, 1, 1, 1], &[1.0]).unwrap();
    let pair_score = if kind == Kind::UltraMem { PairScore::Tucker(&core) } else { PairScore::Additive };
    poison(&client, 1 << 12);
    let chosen = combine(&client, &kept, config.side_keys, &pair_score).unwrap();
    let wide = scores.iter().map(|&score| score.into()).collect();
    let expected = reference::Kept { keys, approximate: Vec::new(), scores: wide };
    let expected = reference::combine(&config, &weights, &expected).unwrap();
    (read_u32(&client, &chosen.slots), read_f32(&client, &chosen.scores), expected)
}

/// Picks one of `numbers` at random.
fn one_of<'a>(numbers: &'a [f32], seed: u64) -> impl FnMut() -> f32 + 'a {
    let mut rng = StdRng::seed_from_u64(seed);
    move || numbers[rng.random_range(0..numbers.len())]
}

/// Neither zero comes before the other, and negative totals have an order too.
#[test]
fn both_zeros_are_one_number() {
    for numbers in [[0.0, -0.0, 0.0, -0.0], [0.0, -0.0, 1.0, -1.0], [-1.0, -2.0, -3.0, -0.0]] {
        let (slots, scores, expected) = combined(Kind::UltraMem, &mut one_of(&numbers, 1));
        assert_eq!(slots, expected.slots, "product of {numbers:?}");
        assert_close("scores", &scores, &expected.scores, 0.0);
        let (slots, scores, expected) = combined(Kind::ProductKey, &mut one_of(&numbers, 2));
        assert_eq!(slots, expected.slots, "sum of {numbers:?}");
        assert_close("scores", &scores, &expected.scores, 1e-6);
    }
}

/// Infinities are numbers, and every NaN (zero times infinity is one) comes after them.
#[test]
fn nan_comes_after_every_number() {
    let (nan, infinity) = (f32::NAN, f32::INFINITY);
    for numbers in [[nan, 1.0, -1.0, 2.0], [infinity, -infinity, 1.0, 0.0], [nan, -infinity, -1.0, -nan]] {
        let (slots, scores, expected) = combined(Kind::UltraMem, &mut one_of(&numbers, 3));
        assert_eq!(slots, expected.slots, "product of {numbers:?}");
        for (found, expected) in scores.iter().zip(&expected.scores) {
            assert!(f64::from(*found) == *expected || (found.is_nan() && expected.is_nan()), "{found} for {expected}");
        }
    }
    let (slots, _, expected) = combined(Kind::ProductKey, &mut || nan);
    assert_eq!(slots, expected.slots, "sum of NaN");
}

/// The keys of a side may hold NaN and infinities: such scores are ordered like any other, whole or split.
#[test]
fn keys_without_a_number_are_kept_last() {
    let config = exact_config(Kind::MemoryPlus, 1);
    let weights = exact_weights(&config, &mut StdRng::seed_from_u64(7));
    let numbers = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1.0, 0.0, -0.0];
    let mut pick = one_of(&numbers, 8);
    let weights = weights.with(Weight::Keys, filled(&Weight::Keys.shape(&config), &mut pick));
    let layer = MemoryLayer::new(&client(), config.clone(), &weights, ElementType::F32).unwrap();
    let input: Vec<f32> = (0..3 * config.hidden_size).map(|i| if i % 3 == 0 { 1.0 } else { -1.0 }).collect();
    let expected = reference::score(&config, &weights, &reference::query(&config, &weights, &input).unwrap()).unwrap();
    let input = layer.upload(&input).unwrap();
    for strategies in every_strategy() {
        let query = layer.query(&input, strategies.query).unwrap();
        let kept = layer.score(&query, strategies.score).unwrap();
        assert_eq!(read_u32(layer.client(), &kept.keys), expected.keys, "{strategies:?}");
    }
}
