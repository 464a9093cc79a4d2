//! Device memory of a call, against the documented formula.

use std::thread;

use ultramem::{Dimensions, ElementType, Kind, MemoryConfig, MemoryLayer, Strategies, Tensor, Weights};

use crate::common::random_input;
use crate::device::{Adapter, Client, Layer, client, every_strategy, paged_client};

/// Buffers that a call may have, and how far the allocator may round up each.
const ROUNDING: usize = 9 * 256;
const TOKENS: usize = 1024;

/// A layer and its input, of sizes such that no buffer of a call can take the place of one that it has dropped.
fn layer(client: &Client, kind: Kind, dtype: ElementType) -> (Layer, Tensor<Adapter>) {
    let (tucker_rank, cores, expansion) = if kind == Kind::UltraMem { (3, 2, 4) } else { (1, 1, 1) };
    let dims = Dimensions {
        capabilities: kind.capabilities(),
        hidden_size: 24,
        heads: 2,
        side_keys: 40,
        key_dim: 5,
        tucker_rank,
        top_m: 7,
        cores,
        expansion,
        value_dim: 30,
        ..Dimensions::default()
    };
    let config = MemoryConfig::new(dims).unwrap();
    let layer = MemoryLayer::new(client, config.clone(), &Weights::random(&config, 0), dtype).unwrap();
    let input = layer.upload(&random_input(&config, TOKENS, 0)).unwrap();
    (layer, input)
}

fn reserved(client: &Client) -> usize {
    client.memory_usage().unwrap().bytes_reserved as usize
}

/// The first call reserves what the formula says, no more and no less, and the ten after it nothing.
fn assert_formula(client: &Client, kind: Kind, dtype: ElementType, strategies: Strategies) {
    let (layer, input) = layer(client, kind, dtype);
    let before = reserved(client);
    let first = layer.forward_with(&input, strategies).unwrap();
    let used = reserved(client) - before;
    let output = TOKENS * layer.config().hidden_size * dtype.size();
    let expected = output + layer.workspace_bytes(&layer.plans(TOKENS, strategies).unwrap());
    let what = format!("{kind:?}, {dtype}, {strategies:?}");
    assert!((expected..=expected + ROUNDING).contains(&used), "{what}: {used} bytes, expected {expected}");
    drop(first);
    for _ in 0..10 {
        layer.forward_with(&input, strategies).unwrap();
    }
    assert_eq!(reserved(client) - before, used, "{what}: ten more calls");
}

/// Every strategy in a thread of its own: what another one reserved would hide what this one needs.
fn assert_formula_for(kind: Kind, dtype: ElementType, strategies: impl IntoIterator<Item = Strategies>) {
    let client = paged_client();
    for strategies in strategies {
        thread::scope(|scope| scope.spawn(|| assert_formula(&client, kind, dtype, strategies)).join().unwrap());
    }
}

#[test]
fn a_call_reserves_what_the_formula_says() {
    assert_formula_for(Kind::UltraMem, ElementType::F32, every_strategy());
}

#[test]
fn a_gate_is_in_the_formula() {
    assert_formula_for(Kind::MemoryPlus, ElementType::F32, every_strategy().into_iter().step_by(7));
}

#[test]
fn half_precision_is_in_the_formula() {
    assert_formula_for(Kind::UltraMem, ElementType::F16, every_strategy().into_iter().step_by(7));
}

/// The results of the stages, held one by one in the allocator that everyone uses.
#[test]
fn results_take_the_bytes_of_their_shapes() {
    let client = client();
    let (layer, input) = layer(&client, Kind::UltraMem, ElementType::F32);
    let used = || client.memory_usage().unwrap().bytes_in_use as usize;
    let strategies = every_strategy()[0];
    let before = used();
    let query = layer.query(&input, strategies.query).unwrap();
    let kept = layer.score(&query, strategies.score).unwrap();
    let chosen = layer.combine(&kept).unwrap();
    let output = layer.expand(&input, &chosen, strategies).unwrap();
    let taken = used() - before;
    let results = [&query, &kept.keys, &kept.scores, &chosen.slots, &chosen.scores];
    let bytes: usize = results.iter().map(|result| result.shape().iter().product::<usize>() * 4).sum();
    let plans = layer.plans(TOKENS, strategies).unwrap();
    assert_eq!(layer.workspace_bytes(&plans), bytes, "{strategies:?}");
    assert_eq!(taken, bytes + output.shape().iter().product::<usize>() * 4, "{strategies:?}");
}
