//! A forward pass on a stream of its own: the same numbers in whatever order the streams go on, and what a missing wait would do.

use super::*;
use ultramem::{Stream, Tensor};
use ultramem_offline::Options;

const TOKENS: usize = 11;
const ROUNDS: usize = 4;

/// A layer on a device whose streams go on in an order drawn by `seed`, or in the order of what they are given.
fn case(shuffled: Option<u64>) -> Case {
    let config = MemoryConfig::new(dimensions()).unwrap();
    let weights = Weights::random(&config, 3);
    let device = OfflineDevice::new(Options { seed: shuffled, shuffled: shuffled.is_some(), ..Options::default() });
    let client = OfflineRuntime::client(&device);
    let layer = MemoryLayer::new(&client, config.clone(), &weights, ElementType::F32).unwrap();
    let input = numbers(ROUNDS * TOKENS * config.hidden_size, 7);
    Case { device, layer, weights, input, grad_output: Vec::new() }
}

/// Passes one after the other, beside which the thread's stream goes on; None where something is wrong with a launch.
fn passes(case: &Case, forward: impl Fn(&Tensor<OfflineRuntime>) -> Tensor<OfflineRuntime>) -> Option<Vec<f32>> {
    let (layer, width) = (&case.layer, case.layer.config().hidden_size);
    let mut outputs = Vec::new();
    for input in case.input.chunks(TOKENS * width) {
        let input = layer.upload(input).unwrap();
        let read = layer.forward(&input).unwrap().output;
        drop(input);
        let output = forward(&read);
        drop(read);
        // What the thread makes next takes whatever memory is free.
        let other = layer.forward(&layer.upload(&numbers(TOKENS * width, 9)).unwrap()).unwrap().output;
        outputs.push(layer.forward(&output).unwrap().output);
        outputs.push(other);
    }
    let found = outputs.iter().map(|output| layer.read(output)).collect::<Result<Vec<_>, _>>();
    let clean = case.device.take_reports().iter().all(|report| report.faults.is_empty());
    found.ok().filter(|_| clean).map(|outputs| outputs.concat())
}

#[test]
fn a_pass_on_a_stream_of_its_own_gives_the_same_numbers_in_any_order() {
    let in_order = case(None);
    let expected = passes(&in_order, |input| in_order.layer.forward(input).unwrap().output);
    assert!(expected.is_some());
    let stream = Stream::new();
    for seed in 0..8 {
        let case = case(Some(seed));
        let joined = |input: &_| case.layer.forward_on(&stream, input).unwrap().join().output;
        assert_eq!(passes(&case, joined), expected, "order {seed}");
    }
    // Without the wait before memory is free again some order gives other numbers, or reads what nobody has written.
    let wrong = (0..8).filter(|&seed| {
        let case = case(Some(seed));
        let unjoined = |input: &_| stream.fork(case.layer.client(), || case.layer.forward(input).unwrap().output);
        passes(&case, unjoined) != expected
    });
    assert!(wrong.count() > 0, "the shuffled order sees no missing wait");
}

/// The launches of a pass beside are on its stream alone, those of the thread on another; a pass that is refused leaves nothing behind.
#[test]
fn launches_tell_their_stream() {
    let case = case(Some(1));
    let (layer, stream) = (&case.layer, Stream::new());
    let width = layer.config().hidden_size;
    let input = layer.upload(&case.input[..TOKENS * width]).unwrap();
    let streams =
        |case: &Case| case.device.take_reports().iter().map(|it| it.stream).collect::<std::collections::BTreeSet<_>>();
    layer.read(&input).unwrap();
    let own = streams(&case);
    assert_eq!(own.len(), 1);
    let beside = layer.forward_on(&stream, &input).unwrap();
    let output = beside.join().output;
    layer.read(&output).unwrap();
    let others = streams(&case);
    assert!(others.len() == 1 && others.is_disjoint(&own), "{own:?} {others:?}");
    let short = layer.upload(&case.input[..width]).unwrap().reshaped(vec![width]);
    assert!(layer.forward_on(&stream, &short).is_err());
}
