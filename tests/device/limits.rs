//! What is refused, with the numbers, and what is near a limit and runs.

use std::fmt::Display;

use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;
use rand::{Rng, SeedableRng, rngs::StdRng};
use ultramem::Weight;
use ultramem::kernels::RowSource;
use ultramem::kernels::combine::{Chosen, PairScore, combine};
use ultramem::kernels::expand::{ExpandStrategy, Memory, expand, pool};
use ultramem::kernels::linear::ProjectStrategy;
use ultramem::kernels::optimiser::{Rule, Step};
use ultramem::kernels::query::query;
use ultramem::kernels::score::Queries;
use ultramem::kernels::score::{
    Kept, KeyFactors, PreparedKeys, ScorePlans, ScoreSizes, ScoreStrategy, prepare_keys, score,
};
use ultramem::kernels::{from_f32, from_u32, launch};
use ultramem::{
    Dimensions, ElementType, HostTensor, Kind, LayerWeights, MemoryConfig, MemoryLayer, Norm, Tensor, ValueTable,
    Weights, reference,
};

use crate::common::small;
#[cfg(feature = "wgpu")]
use crate::device::other_client;
use crate::device::{Adapter, client, host, judge_kept, normalised, poison};

type Device = Tensor<Adapter>;

/// Asserts that an error is one line and says each of `words`.
fn assert_says<T, E: Display>(found: Result<T, E>, words: &[&str]) {
    let Err(error) = found else { panic!("accepted, expected an error that says {words:?}") };
    let message = error.to_string();
    assert!(!message.contains('\n'), "{message}");
    for word in words {
        assert!(message.contains(word), "{message:?} does not say {word:?}");
    }
}

fn floats(shape: &[usize]) -> Device {
    from_f32(&client(), shape, &vec![0.5; shape.iter().product()]).unwrap()
}

fn indices(shape: &[usize]) -> Device {
    from_u32(&client(), shape, &vec![0; shape.iter().product()]).unwrap()
}

/// A matrix read column by column.
fn transposed(rows: usize, columns: usize) -> Device {
    let stored = floats(&[columns, rows]);
    Tensor::new(&client(), TensorHandle::new(stored.handle.clone(), [rows, columns], [1, rows], stored.dtype))
}

#[test]
fn query_refuses_what_does_not_fit() {
    let (client, tile) = (client(), ProjectStrategy::Tile);
    let run = |input: &Device, weight: &Device| query(&client, input, weight, None, tile);
    assert_says(run(&floats(&[3, 7]), &floats(&[8, 4])), &["input", "[3, 7]", "[3, 8]"]);
    assert_says(run(&floats(&[3, 8]), &floats(&[8])), &["weight", "[8]"]);
    assert_eq!(run(&floats(&[0, 8]), &floats(&[8, 4])).unwrap().shape().to_vec(), [0, 4]);
    assert_says(run(&indices(&[3, 8]), &floats(&[8, 4])), &["input", "u32", "f32"]);
    assert_says(run(&transposed(3, 8), &floats(&[8, 4])), &["input", "[1, 3]", "contiguous"]);
    let short = floats(&[3, 8]).reshaped(vec![4, 8]);
    assert_says(run(&short, &floats(&[8, 4])), &["input", "128", "96"]);
}

/// Keys of 3 heads, 8 keys a side, width 5, rank 2.
fn prepared() -> PreparedKeys<Adapter> {
    let factors = KeyFactors { norm: None, vectors: Some((&floats(&[3, 2]), &floats(&[3, 2]))) };
    prepare_keys(&client(), &floats(&[3, 2, 8, 5, 2]), &factors).unwrap()
}

#[test]
fn prepare_keys_refuses_what_does_not_fit() {
    let (client, keys, vector) = (client(), floats(&[3, 2, 8, 5, 2]), floats(&[3, 2]));
    let run = |keys: &Device, u: &Device, v: &Device, norm: &Device| {
        let factors = KeyFactors { norm: Some((Norm::Rms, 1e-5, norm)), vectors: Some((u, v)) };
        prepare_keys(&client, keys, &factors)
    };
    let norm = floats(&[5]);
    assert_says(run(&floats(&[2, 8, 5]), &vector, &vector, &norm), &["keys", "[2, 8, 5]"]);
    assert_says(run(&floats(&[3, 3, 8, 5, 2]), &vector, &vector, &norm), &["keys", "[3, 3, 8, 5, 2]"]);
    assert_says(run(&indices(&[3, 2, 8, 5, 2]), &vector, &vector, &norm), &["keys", "u32"]);
    assert_says(run(&keys, &floats(&[2, 3]), &vector, &norm), &["core_u", "[2, 3]", "[3, 2]"]);
    assert_says(run(&keys, &vector, &floats(&[6]), &norm), &["core_v", "[6]", "[3, 2]"]);
    assert_says(run(&keys, &vector, &vector, &floats(&[4])), &["keys_norm", "[4]", "[5]"]);
}

#[test]
fn score_refuses_what_does_not_fit() {
    let (client, keys) = (client(), prepared());
    let run = |query: &Device, norm: &Device, top_m| {
        let queries = Queries { numbers: query, norm: Some((Norm::Rms, 1e-5, norm)), heads_per_pair: 1 };
        score(&client, &queries, &keys, top_m, ScoreStrategy::Whole)
    };
    let (query, norm) = (floats(&[4, 30]), floats(&[5]));
    assert_says(run(&floats(&[4, 12]), &norm, 2), &["query", "[4, 12]", "[4, 3, 2, 5]"]);
    assert_eq!(run(&floats(&[0, 30]), &norm, 2).unwrap().scores.shape().to_vec(), [0, 3, 2, 2, 2]);
    assert_says(run(&indices(&[4, 30]), &norm, 2), &["query", "u32", "f32"]);
    assert_says(run(&query, &floats(&[6]), 2), &["query_norm", "[6]", "[5]"]);
    assert_says(run(&query, &norm, 0), &["top_m", "0"]);
    assert_says(run(&query, &norm, 9), &["top_m 9 exceeds side_keys 8"]);
    let mut odd = keys.clone();
    odd.projected = floats(&[3, 2, 5, 4]);
    let queries = Queries { numbers: &query, norm: Some((Norm::Rms, 1e-5, &norm)), heads_per_pair: 1 };
    let found = score(&client, &queries, &odd, 2, ScoreStrategy::Whole);

    assert_says(found, &["projected keys", "[3, 2, 5, 4]", "[3, 2, 5, 16]"]);
}

#[test]
fn combine_refuses_what_does_not_fit() {
    let client = client();
    let run = |keys: Device, scores: Device, core: &Device| {
        combine(&client, &Kept { keys, scores }, 8, &PairScore::Tucker(core))
            .map(|chosen| chosen.slots.shape().to_vec())
    };
    let (keys, scores, core) = (indices(&[4, 3, 2, 5]), floats(&[4, 3, 2, 5, 2]), floats(&[2, 3, 2, 2]));
    assert_says(run(keys.clone(), floats(&[4, 3, 2, 5]), &core), &["kept scores", "[4, 3, 2, 5]"]);
    assert_says(run(indices(&[4, 3, 2, 4]), scores.clone(), &core), &["kept keys", "[4, 3, 2, 4]", "[4, 3, 2, 5]"]);
    assert_says(run(floats(&[4, 3, 2, 5]), scores.clone(), &core), &["kept keys", "f32", "u32"]);
    assert_says(run(keys.clone(), scores.clone(), &floats(&[2, 3, 2])), &["core", "[2, 3, 2]", "[2, 3, 2, 2]"]);
    assert_eq!(run(indices(&[0, 3, 2, 5]), floats(&[0, 3, 2, 5, 2]), &core), Ok(vec![0, 3, 5]));
    let additive = combine(&client, &Kept { keys, scores }, 8, &PairScore::Additive);
    assert_says(additive, &["kept scores", "[4, 3, 2, 5, 2]", "[4, 3, 2, 5, 1]"]);
}

#[test]
fn expand_refuses_what_does_not_fit() {
    let client = client();
    let chosen = || Chosen { slots: indices(&[4, 3, 5]), scores: floats(&[4, 3, 5, 2]) };
    let (values, weight) = ([floats(&[9, 6]), floats(&[7, 6])], floats(&[24, 11]));
    let rows = RowSource::own(&[], 4, 16);
    let memory = || Memory { values: &values, rows, weight: Some(&weight), bias: None, gate: None, output_gate: None };
    let run = |chosen: Chosen<Adapter>, memory: Memory<'_, Adapter>| {
        let pooled = pool(&client, &chosen, &memory, false).map(|_| ()).unwrap_err();
        let fused = expand(&client, &chosen, &memory, ExpandStrategy::Fused).map(|_| ());
        assert_eq!(fused, Err(pooled), "pool and expand refuse the same");
        fused
    };
    let fused = expand(&client, &chosen(), &memory(), ExpandStrategy::Fused).map(|_| ());
    assert_says(fused, &["pages of values for one kernel: 2, expected 1"]);
    assert_says(run(chosen(), Memory { values: &[], ..memory() }), &["pages of the values"]);
    let wider = [floats(&[9, 6]), floats(&[7, 8])];
    assert_says(run(chosen(), Memory { values: &wider, ..memory() }), &["values", "[7, 8]", "[7, 6]"]);
    assert_says(run(Chosen { slots: indices(&[4, 3, 4]), ..chosen() }, memory()), &["slots", "[4, 3, 4]", "[4, 3, 5]"]);
    assert_says(run(Chosen { slots: floats(&[4, 3, 5]), ..chosen() }, memory()), &["slots", "f32", "u32"]);
    assert_says(run(Chosen { scores: floats(&[4, 15, 2]), ..chosen() }, memory()), &["scores", "[4, 15, 2]"]);
    assert_says(run(Chosen { scores: floats(&[4, 3, 5, 4]), ..chosen() }, memory()), &["value_dim 6", "cores 4"]);
    let none = Chosen { slots: indices(&[0, 3, 5]), scores: floats(&[0, 3, 5, 2]) };
    assert_eq!(pool(&client, &none, &memory(), true).unwrap().shape().to_vec(), [0, 24]);
    let (odd, table) = (floats(&[23, 11]), [indices(&[16, 6])]);
    assert_says(run(chosen(), Memory { weight: Some(&odd), ..memory() }), &["weight", "[23, 11]", "[24, 11]"]);
    assert_says(run(chosen(), Memory { values: &table, ..memory() }), &["values", "u32"]);
    let (shuffle, gate) = ([indices(&[63])], floats(&[4, 6]));
    let short = RowSource { shuffle: &shuffle, ..rows };
    assert_says(run(chosen(), Memory { rows: short, ..memory() }), &["shuffle", "[63]", "[64]"]);
    for (rows, says) in [
        (RowSource { rows: 17, ..rows }, ["rows of the layer 17", "16"]),
        (RowSource { table_rows: 17, ..rows }, ["values", "[8, 6]"]),
        (RowSource { offset: 16, ..rows }, ["offset 16", "15"]),
        (RowSource { blocks: 0, ..rows }, ["blocks", "0"]),
    ] {
        assert_says(run(chosen(), Memory { rows, ..memory() }), &says);
    }
    let bias = floats(&[10]);
    assert_says(run(chosen(), Memory { bias: Some(&bias), ..memory() }), &["bias", "[10]", "[11]"]);
    assert_says(run(chosen(), Memory { output_gate: Some(&bias), ..memory() }), &["output gate", "[10]", "[4]"]);
    assert_says(run(chosen(), Memory { gate: Some(&gate), ..memory() }), &["expansion 4", "1"]);
    let (narrow, one_block) = (floats(&[4, 5]), floats(&[6, 11]));
    let summed = RowSource { summed: true, ..rows };
    let gated = Memory { rows: summed, weight: Some(&one_block), gate: Some(&narrow), ..memory() };
    assert_says(run(chosen(), gated), &["gate", "[4, 5]", "[4, 6]"]);
}

#[test]
fn a_layer_refuses_what_does_not_fit() {
    let config = small(Kind::UltraMem);
    let weights = Weights::random(&config, 0);
    let layer = MemoryLayer::new(&client(), config.clone(), &weights, ElementType::F32).unwrap();
    assert_says(layer.upload(&[0.0; 23]), &["23", "22"]);
    assert_eq!(layer.forward(&layer.upload(&[]).unwrap()).unwrap().output.shape().to_vec(), [0, 11]);
    assert_says(layer.forward(&floats(&[2, 12])).map(|_| ()), &["input", "[2, 12]", "[2, 11]"]);
    assert_says(layer.forward(&indices(&[2, 11])).map(|_| ()), &["input", "u32", "f32"]);
    let half = MemoryLayer::new(&client(), config.clone(), &weights, ElementType::F16).unwrap();
    assert_says(half.forward(&floats(&[2, 11])).map(|_| ()), &["input", "f32", "f16"]);
    let short = weights.with(Weight::Values, HostTensor::from_f32([15, 6], &[0.0; 90]).unwrap());
    let found = MemoryLayer::new(&client(), config.clone(), &short, ElementType::F32);
    assert_says(found.map(|_| ()), &["values_for_look_up", "[15, 6]", "[16, 6]"]);
    assert_says(MemoryConfig::new(Dimensions { top_m: 9, ..(*config).clone() }), &["top_m 9 exceeds side_keys 8"]);
}

/// CubeCL would drop such a launch without a word, and panic at such a read.
#[cfg(feature = "wgpu")]
#[test]
fn tensors_of_another_device_are_refused() {
    let config = small(Kind::UltraMem);
    let weights = Weights::random(&config, 0);
    let [here, there] = [client(), other_client()].map(|client| {
        let layer = MemoryLayer::new(&client, config.clone(), &weights, ElementType::F32).unwrap();
        let input = layer.upload(&[0.5; 22]).unwrap();
        let (forward, saved) = layer.forward_saving(&input).unwrap();
        let gradients = layer.backward(&input, &saved, &forward.output).unwrap();
        (layer, input, forward, saved, gradients)
    });
    let (layer, input, forward, saved, _) = &here;
    let (_, other_input, other, other_saved, other_gradients) = &there;
    let chosen = &other.chosen;
    assert_says(layer.forward(other_input).map(|_| ()), &["input is on another device"]);
    let query = there.0.query(other_input, ProjectStrategy::Tile).unwrap();
    assert_says(layer.score(&query, ScoreStrategy::Whole).map(|_| ()), &["query is on another device"]);
    let kept = there.0.score(&query, ScoreStrategy::Whole).unwrap();
    assert_says(layer.combine(&kept).map(|_| ()), &["kept scores is on another device"]);
    assert_says(layer.expand(input, chosen, layer.strategies(2)).map(|_| ()), &["scores is on another device"]);
    assert_says(layer.backward(other_input, saved, &forward.output).map(|_| ()), &["on another device"]);
    assert_says(layer.backward(input, other_saved, &forward.output).map(|_| ()), &["on another device"]);
    assert_says(layer.backward(input, saved, &other.output).map(|_| ()), &["on another device"]);
    assert_says(layer.read(&other.output), &["tensor is on another device"]);
    assert_says(layer.read_slots(chosen), &["tensor is on another device"]);
    let (mut layer, _, _, _, gradients) = here;
    let mut optimiser = layer.value_optimiser(Rule::Sgd { momentum: 0.0 }).unwrap();
    let step = Step::new(0.1);
    let found = layer.update_values(&mut optimiser, &other_gradients.values, &step);
    assert_says(found, &["row gradients is on another device"]);
    let mut of_other = there.0.value_optimiser(Rule::Adagrad { eps: 1e-8 }).unwrap();
    assert_says(layer.update_values(&mut of_other, &gradients.values, &step), &["is on another device"]);
    layer.update_values(&mut optimiser, &gradients.values, &step).unwrap();
    let elsewhere = LayerWeights::upload(&client(), &config, &weights, ElementType::F32).unwrap();
    let found = MemoryLayer::from_device(&other_client(), config, elsewhere);
    assert_says(found.map(|_| ()), &["query_proj.weight is on another device"]);
}

/// So is a table without rows.
#[test]
fn a_row_larger_than_a_binding_is_refused_with_both_sizes() {
    let client = client();
    let limit = client.properties().memory.max_page_size as usize;
    // Nobody touches it, so it takes no memory.
    let row = HostTensor::new([1, limit / 2 + 1], ElementType::F16, vec![0; limit + 2]).unwrap();
    let found = ValueTable::upload(&client, &row, ElementType::F16).map(|_| ());
    assert_says(found, &["values", &(limit + 2).to_string(), &limit.to_string()]);
    for shape in [vec![0, 4], vec![0]] {
        let none = HostTensor::new(shape, ElementType::F16, vec![]).unwrap();
        assert_says(ValueTable::upload(&client, &none, ElementType::F16).map(|_| ()), &["rows of a table"]);
    }
}

/// More keys than shared memory holds scores: they must be split.
#[test]
fn more_keys_than_shared_memory_holds_are_split() {
    let client = client();
    let side_keys = client.properties().hardware.max_shared_memory_size / 4 + 808;
    let dims =
        Dimensions { side_keys, key_dim: 4, heads: 1, value_dim: 1, top_m: 50, ..(*small(Kind::ProductKey)).clone() };
    let config = MemoryConfig::new(dims).unwrap();
    // The oracle wants a whole table; nobody touches it, so it takes no memory.
    let table = HostTensor::new([config.rows(), 1], ElementType::F16, vec![0; config.rows() * 2]).unwrap();
    let shape = [1, 2, side_keys, config.key_dim];
    let keys = random_numbers(shape.iter().product(), 1);
    let start = Weights::random(&MemoryConfig::new(Dimensions { side_keys: 50, ..(*config).clone() }).unwrap(), 2);
    let own_keys = HostTensor::from_f32(shape, &keys).unwrap();
    let weights = start.with(Weight::Values, table).with(Weight::Keys, own_keys);
    let norm = from_f32(&client, &[4], &weights.numbers(Weight::KeysNorm)).unwrap();
    let factors = KeyFactors { norm: Some((config.norm, config.norm_eps, &norm)), vectors: None };
    let prepared =
        prepare_keys(&client, &from_f32(&client, &[1, 2, side_keys, 4, 1], &keys).unwrap(), &factors).unwrap();
    for tokens in [2, 70] {
        let products = random_numbers(tokens * 8, tokens as u64);
        let query = from_f32(&client, &[tokens, 8], &products).unwrap();
        let norm = Some((config.norm, config.norm_eps, &norm));
        let queries = Queries { numbers: &query, norm, heads_per_pair: 1 };
        let run = |strategy| score(&client, &queries, &prepared, config.top_m, strategy);
        let refused = run(ScoreStrategy::Whole).map(|_| ());
        assert_says(refused.clone(), &["score", "shared memory"]);
        let sizes = ScoreSizes {
            tokens,
            heads: 1,
            query_pairs: 1,
            heads_per_pair: 1,
            side_keys,
            key_dim: 4,
            rank: 1,
            top_m: config.top_m,
            norm: Some(config.norm),
            direct: true,
            dtype: ElementType::F32,
        };
        let plan = |strategy| ScorePlans::of(&launch::Device::of(&client), &sizes, strategy);
        assert_eq!(plan(ScoreStrategy::Whole).map(|_| ()), refused, "the plan says it before");
        let strategy = ScoreStrategy::choose(&client, &sizes);
        assert!(matches!(strategy, ScoreStrategy::Split { .. }), "{tokens} tokens: {strategy:?}");
        assert!(plan(strategy).unwrap().approximate_numbers() >= tokens * 2 * side_keys);
        poison(&client, 1 << 20);
        let kept = run(strategy).unwrap();
        let queries = normalised(&config, &weights, &products);
        judge_kept(&config, &weights, &host(&client, &kept), &reference::score(&config, &weights, &queries).unwrap());
    }
}

/// What a browser guarantees is all that such a device has, and a layer that does not fit is told so with the numbers.
#[cfg(all(feature = "wgpu", not(feature = "vulkan")))]
#[test]
fn a_device_within_webgpus_limits_says_what_does_not_fit() {
    let client = crate::device::webgpu_client();
    let properties = client.properties();
    let hardware = &properties.hardware;
    // One of eight bindings is CubeCL's own.
    assert_eq!((hardware.max_bindings, hardware.max_shared_memory_size), (7, 16 << 10));
    assert_eq!(properties.memory.max_page_size, 128 << 20);

    let dims = Dimensions { hidden_size: 1 << 13, value_dim: 1026, ..(*small(Kind::UltraMem)).clone() };
    let config = MemoryConfig::new(dims).unwrap();
    let weights = Weights::random(&config, 0);
    let too_wide = MemoryLayer::new(&client, config, &weights, ElementType::F32).map(|_| ());
    assert_says(too_wide, &["values_proj", "134479872", "134217728"]);

    // 1,024 keys a side that are all kept: the list of one token, its pairs and what selects among them.
    let dims = Dimensions { side_keys: 1024, top_m: 1024, heads: 1, ..(*small(Kind::UltraMem)).clone() };
    let config = MemoryConfig::new(dims).unwrap();
    let layer = MemoryLayer::new(&client, config.clone(), &Weights::random(&config, 0), ElementType::F32).unwrap();
    let input = layer.upload(&vec![0.5; config.hidden_size]).unwrap();
    match layer.forward(&input) {
        Ok(found) => assert_eq!(layer.read_slots(&found.chosen).unwrap().len(), 1024),
        found => assert_says(found.map(|_| ()), &["shared memory", "16384"]),
    }
}

#[cube(launch)]
fn write_ones(numbers: &mut Array<f32>) {
    numbers[ABSOLUTE_POS] = 1.0;
}

/// A launch that the device refuses leaves no result; reading must say so.
#[test]
fn a_failed_launch_is_an_error_when_it_is_read() {
    let config = small(Kind::UltraMem);
    let client = client();
    let layer = MemoryLayer::new(&client, config.clone(), &Weights::random(&config, 0), ElementType::F32).unwrap();
    let numbers = floats(&[4]);
    let units = CubeDim::new_1d(2 * client.properties().hardware.max_units_per_cube);
    // SAFETY: the array has the length of its buffer, and this launch must be refused.
    let array = unsafe { ArrayArg::from_raw_parts(numbers.handle.clone(), 4) };
    write_ones::launch::<Adapter>(&client, CubeCount::Static(1, 1, 1), units, array);
    assert_says(layer.read(&numbers), &["device", "exceeds maximum"]);
    assert_eq!(layer.read(&numbers).unwrap(), [0.5; 4], "the error is told once");
}

/// As many numbers, uniform in -1 to 1.
fn random_numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
}
