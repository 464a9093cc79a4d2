//! Many slots a token, many keys a side, and many tokens that choose alike: sizes at which work that grows as a square, or a sum that is
//! taken one term after another, gives wrong numbers.

use ultramem::HostTensor;
use ultramem::Weight;
use ultramem::kernels::combine::{PairScore, combine};
use ultramem::kernels::score::Queries;
use ultramem::kernels::score::{KeyFactors, ScoreSizes, ScoreStrategy, prepare_keys, score};
use ultramem::kernels::{Error, from_f32};
use ultramem::{Dimensions, ElementType, Kept, Kind, MemoryConfig, MemoryLayer, Norm, Weights, reference};

use crate::backward;
use crate::common::random_input;
use crate::device::{Case, client, every_strategy, hold, host, judge_chosen, judge_kept, normalised, read_u32};
use crate::shapes::{plain, product_keys, random_case};

fn many(dims: Dimensions) -> Dimensions {
    Dimensions { hidden_size: 24, value_dim: 8, key_dim: 8, ..dims }
}

/// The shapes that were found wrong, with what the device takes for each by itself.
#[test]
fn layers_of_many_slots_agree_with_the_oracle() {
    let ultra = |heads, top_m, side_keys| many(Dimensions { heads, top_m, side_keys, ..plain() });
    let additive = |kind, heads, top_m, side_keys| many(Dimensions { heads, top_m, side_keys, ..product_keys(kind) });
    let weighing = |kind: Kind, heads, top_m, side_keys| {
        let base = if kind == Kind::Peer { product_keys(kind) } else { plain() };
        many(Dimensions { capabilities: kind.capabilities(), heads, top_m, side_keys, ..base })
    };
    let shapes = [
        ("2 heads of 255", 2, ultra(2, 255, 256)),
        ("top_m 160 of 256", 8, Dimensions { expansion: 1, ..ultra(1, 160, 256) }),
        ("top_m 512", 2, ultra(1, 512, 512)),
        ("32 heads of 16", 2, ultra(32, 16, 32)),
        ("product keys, top_m 512", 2, additive(Kind::ProductKey, 1, 512, 512)),
        ("Memory+, 4 heads of 128", 9, additive(Kind::MemoryPlus, 4, 128, 130)),
        (
            "UltraMemV2 at its largest top_m",
            2,
            Dimensions { pre_dim: 6, ..weighing(Kind::UltraMemV2, 1, most_slots().min(768), 768) },
        ),
        ("PEER, 8 heads of 64", 5, Dimensions { pre_dim: 24, value_dim: 24, ..weighing(Kind::Peer, 8, 64, 64) }),
    ];
    for (at, (name, tokens, dims)) in shapes.into_iter().enumerate() {
        let case = random_case(&dims, tokens, ElementType::F32, at as u64);
        println!("{name}");
        hold(&case, case.layer.strategies(tokens), 1e-5);
        backward::hold(name, &case, 1e-4);
    }
}

/// Slots of a head: the most there may be, or, where shared memory is a browser's 16 KiB, as many as it holds; more are refused there.
fn most_slots() -> usize {
    if client().properties().hardware.max_shared_memory_size < 32 << 10 { 400 } else { 1024 }
}

/// The most slots that a token may read, by every strategy.
#[test]
fn the_most_slots_agree_with_the_oracle() {
    for (kind, expansion) in [(Kind::UltraMem, 16), (Kind::ProductKey, 1)] {
        let base = if kind == Kind::UltraMem { plain() } else { product_keys(kind) };
        let top_m = most_slots();
        let dims = many(Dimensions { heads: 2, top_m, side_keys: 1024, expansion, value_dim: 2, ..base });
        let case = random_case(&dims, 1, ElementType::F32, 3);
        // The query's product has nothing to do with slots.
        for strategies in every_strategy().into_iter().step_by(4).chain([case.layer.strategies(1)]) {
            hold(&case, strategies, 1e-5);
        }
        backward::hold("most slots", &case, 1e-4);
    }
}

/// The most keys of a side, of which a token keeps the most.
#[test]
fn the_most_keys_of_a_side_agree_with_the_oracle() {
    let (client, tokens, side_keys, key_dim) = (client(), 3, 16_384, 4);
    for top_m in [most_slots(), 48] {
        let dims = Dimensions { heads: 1, side_keys, key_dim, top_m, value_dim: 1, ..product_keys(Kind::ProductKey) };
        let config = MemoryConfig::new(dims).unwrap();
        let few = MemoryConfig::new(Dimensions { side_keys: top_m, ..(*config).clone() }).unwrap();
        let keys = random_input(
            &MemoryConfig::new(Dimensions { hidden_size: key_dim, ..(*few).clone() }).unwrap(),
            2 * side_keys,
            1,
        );
        let table = HostTensor::new([config.rows(), 1], ElementType::F16, vec![0; config.rows() * 2]).unwrap();
        let own_keys = HostTensor::from_f32([1, 2, side_keys, key_dim], &keys).unwrap();
        let weights = Weights::random(&few, 2).with(Weight::Keys, own_keys).with(Weight::Values, table);
        let norm = from_f32(&client, &[key_dim], &weights.numbers(Weight::KeysNorm)).unwrap();
        let factors = KeyFactors { norm: Some((config.norm, config.norm_eps, &norm)), vectors: None };
        let on_device = from_f32(&client, &[1, 2, side_keys, key_dim, 1], &keys).unwrap();
        let prepared = prepare_keys(&client, &on_device, &factors).unwrap();
        let query_norm = from_f32(&client, &[key_dim], &weights.numbers(Weight::QueryNorm)).unwrap();
        let products: Vec<f32> = (0..tokens * 2 * key_dim).map(|i| ((i * 37 % 23) as f32 - 11.0) / 7.0).collect();
        let query = from_f32(&client, &[tokens, 2 * key_dim], &products).unwrap();
        let sizes = ScoreSizes {
            tokens,
            heads: 1,
            query_pairs: 1,
            heads_per_pair: 1,
            side_keys,
            key_dim,
            rank: 1,
            top_m,
            norm: Some(config.norm),
            direct: true,
            dtype: ElementType::F32,
        };
        let strategy = ScoreStrategy::choose(&client, &sizes);
        let norm = Some((config.norm, config.norm_eps, &query_norm));
        let queries = Queries { numbers: &query, norm, heads_per_pair: 1 };
        let kept: Kept<_> = score(&client, &queries, &prepared, top_m, strategy).unwrap();
        let found = host(&client, &kept);
        let queries = normalised(&config, &weights, &products);
        judge_kept(&config, &weights, &found, &reference::score(&config, &weights, &queries).unwrap());
        let chosen = combine(&client, &kept, side_keys, &PairScore::Additive).unwrap();
        let expected = reference::combine(&config, &weights, &found).unwrap();
        let scores = crate::device::read_f32(&client, &chosen.scores);
        judge_chosen(&config, &weights, &found, &expected, &read_u32(&client, &chosen.slots), &scores);
    }
}

/// Equal tokens all read the same rows and keys: what each has in a gradient is the same, and sums are as long as they can be.
#[test]
fn rows_that_every_token_chooses_have_the_oracles_gradient() {
    let dims = Dimensions {
        hidden_size: 4,
        heads: 1,
        side_keys: 8,
        key_dim: 4,
        top_m: 2,
        value_dim: 4,
        expansion: 4,
        norm: Norm::Rms,
        ..plain()
    };
    for tokens in [30_000, 60_000, 140_000, 262_144] {
        let config = MemoryConfig::new(dims.clone()).unwrap();
        let input = random_input(&config, 1, 5).repeat(tokens);
        let case = Case::new(&config, &Weights::random(&config, 9), &input, ElementType::F32);
        let grad_output = random_input(&config, 1, 6).repeat(tokens);
        backward::hold_with(&format!("{tokens} equal tokens"), &case, &grad_output, 1e-5);
        backward::hold(&format!("{tokens} tokens of equal inputs"), &case, 1e-5);
    }
}

/// What no unit could go through is refused with the numbers, and nothing is launched.
#[test]
fn more_iterations_than_a_device_takes_are_refused() {
    let dims = many(Dimensions { heads: 1, top_m: 4, side_keys: 8, ..plain() });
    let config = MemoryConfig::new(Dimensions { hidden_size: 300_000, ..dims }).unwrap();
    let layer = MemoryLayer::new(&client(), config.clone(), &Weights::random(&config, 1), ElementType::F32).unwrap();
    let input = layer.upload(&vec![0.5; 300_000]).unwrap();
    let strategies = every_strategy()[0];
    let error = layer.query(&input, strategies.query).map(|_| ()).unwrap_err();
    let message = error.to_string();
    assert!(matches!(error, ultramem::Error::Kernel(Error::Loops { loops: 75_000, .. })), "{message}");
    assert!(message.contains("75000") && message.contains("65535"), "{message}");
}
