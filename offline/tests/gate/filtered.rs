//! Scoring in one launch on matrix units keeps what two launches keep, to the bit: of any rows, and with more keys at a bound than a row has room for.

use super::*;

/// The number of which a key is made.
type Number = fn(usize) -> f32;

/// A side's keys, each of one number by its place: all equal, better and better, only a few numbers among NaN, and many equal among others.
const KEYS: [(&str, Number); 4] = [
    ("equal", |_| 0.5),
    ("ascending", |key| key as f32 / 64.0),
    ("NaN", |key| if key % 20 == 3 { key as f32 } else { f32::NAN }),
    ("few numbers", |key| (key * 7919 % 5) as f32 - 2.0),
];

/// The queries of tokens, of which the first are zero, NaN, infinite, and larger than others.
fn queries(tokens: usize, width: usize) -> Vec<f32> {
    let first = [0.0, f32::NAN, f32::INFINITY, 1e30];
    let factor = |at: usize| first.get(at / width).copied().unwrap_or(1.0);
    numbers(tokens * width, 5).into_iter().enumerate().map(|(at, number)| number * factor(at)).collect()
}

/// The kept keys, and their scores' bits, one for every NaN.
fn kept(case: &Case, numbers: &[f32], tokens: usize, strategy: ScoreStrategy) -> (Vec<u32>, Vec<u32>, Vec<String>) {
    let (layer, client) = (&case.layer, case.layer.client());
    let query = from_f32(client, &[tokens, numbers.len() / tokens], numbers).unwrap();
    let Kept { keys, scores } = layer.score(&query, strategy).unwrap();
    let keys = layer.read_slots(&Chosen { slots: keys, scores: scores.clone() }).unwrap();
    let bits = |score: f32| if score.is_nan() { u32::MAX } else { score.to_bits() };
    let scores = layer.read(&scores).unwrap().into_iter().map(bits).collect();
    let reports = case.reports();
    assert_clean("scores", &reports);
    (keys, scores, reports.into_iter().map(|it| it.kernel.entry.clone()).collect())
}

#[test]
fn one_launch_keeps_what_two_keep() {
    let wide = Dimensions { side_keys: 328, key_dim: 64, top_m: 24, ..dimensions() };
    let unnormed = Dimensions { side_keys: 328, key_dim: 64, top_m: 24, ..product_keys(Kind::LinguaMemoryPlus) };
    for (what, dims, tokens, dtype) in [
        ("UltraMem", wide.clone(), 130, ElementType::BF16),
        ("half of a tile, rank 4", Dimensions { side_keys: 150, tucker_rank: 4, ..wide }, 40, ElementType::F16),
        ("product keys", unnormed, 130, ElementType::BF16),
    ] {
        let config = MemoryConfig::new(dims).unwrap();
        let shape = Weight::Keys.shape(&config);
        let random = Weights::random(&config, 3);
        let (width, side) = (config.query_pairs() * 2 * config.key_dim, config.key_dim * config.tucker_rank);
        let numbers = queries(tokens, width);
        let made = KEYS.map(|(name, number)| {
            let count = shape.iter().product::<usize>();
            let numbers: Vec<f32> = (0..count).map(|at| number(at / side % config.side_keys)).collect();
            (name, random.clone().with(Weight::Keys, HostTensor::from_f32(shape.clone(), &numbers).unwrap()))
        });
        for (name, weights) in [("random", random)].into_iter().chain(made) {
            let case = Case::new(&config, &weights, &[], &[], dtype);
            let (keys, scores, kernels) = kept(&case, &numbers, tokens, ScoreStrategy::Filtered);
            assert!(kernels.iter().any(|it| it.starts_with("filter_keys")), "{what}: {kernels:?}");
            let (expected, of_expected, kernels) = kept(&case, &numbers, tokens, ScoreStrategy::Split { splits: 1 });
            assert!(kernels.iter().any(|it| it.starts_with("approximate_matrix")), "{what}: {kernels:?}");
            assert!(keys == expected, "{what}, {name}: other keys");
            assert!(scores == of_expected, "{what}, {name}: other scores");
        }
    }
}
