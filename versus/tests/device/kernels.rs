//! The kernels against their oracle: fresh random inputs, poisoned memory, every element type that the device has.

use rand::{Rng, SeedableRng, rngs::StdRng};
use ultramem::kernels::linear::ProjectStrategy;
use ultramem::kernels::{empty, from_f32, from_u32};
use ultramem::{ElementType, HostTensor, Tensor};
use ultramem_versus::kernels::{Activation, Experts, Mixture, attention, dense, moe, residual, route};
use ultramem_versus::reference as oracle;

use crate::device::{Adapter, assert_close, client, poison, read, read_f32, read_u32, types};

const ACTIVATIONS: [Activation; 2] = [Activation::Gelu, Activation::SwiGlu];

/// Random numbers as a device and the oracle take them.
struct Numbers {
    host: Vec<f32>,
    tensor: Tensor<Adapter>,
}

/// Numbers in [-scale, scale), rounded to `dtype`.
fn numbers(rng: &mut StdRng, shape: &[usize], scale: f32, dtype: ElementType) -> Numbers {
    let drawn: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-scale..scale)).collect();
    stored(&drawn, shape, dtype)
}

fn stored(numbers: &[f32], shape: &[usize], dtype: ElementType) -> Numbers {
    let numbers = HostTensor::from_f32(shape, numbers).unwrap();
    let rounded = numbers.cast(dtype);
    let client = client();
    let handle = client.create_from_slice(rounded.bytes());
    Numbers { host: rounded.to_f32(), tensor: Tensor::new_contiguous(&client, shape.to_vec(), handle, dtype.storage()) }
}

fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// A mixture's weights and input.
struct Mix {
    hidden: usize,
    count: usize,
    top_k: usize,
    activation: Activation,
    input: Numbers,
    router: Numbers,
    up: Numbers,
    down: Numbers,
}

impl Mix {
    fn new(tokens: usize, hidden: usize, inner: usize, count: usize, top_k: usize, dtype: ElementType) -> Self {
        let activation = ACTIVATIONS[(tokens + hidden) % 2];
        let columns = if activation == Activation::SwiGlu { 2 * inner } else { inner };
        let mut rng = rng((tokens * 31 + inner) as u64);
        let scale = |depth: usize| (3.0 / depth as f32).sqrt();
        Self {
            hidden,
            count,
            top_k,
            activation,
            input: numbers(&mut rng, &[tokens, hidden], 1.7, dtype),
            router: numbers(&mut rng, &[hidden, count], scale(hidden), dtype),
            up: numbers(&mut rng, &[count, hidden, columns], scale(hidden), dtype),
            down: numbers(&mut rng, &[count, inner, hidden], scale(inner), dtype),
        }
    }

    fn on_device(&self) -> Experts<'_, Adapter> {
        Experts {
            router: &self.router.tensor,
            up: &self.up.tensor,
            down: &self.down.tensor,
            activation: self.activation,
            top_k: self.top_k,
        }
    }

    fn on_host(&self) -> oracle::Experts<'_> {
        oracle::Experts {
            router: &self.router.host,
            up: &self.up.host,
            down: &self.down.host,
            count: self.count,
            activation: self.activation,
            top_k: self.top_k,
        }
    }

    /// One run into poisoned memory.
    fn run(&self) -> Mixture<Adapter> {
        poison(&client(), 1 << 20);
        moe(&client(), &self.input.tensor, &self.on_device()).unwrap()
    }

    /// Holds the choice against the oracle's, but where two logits are equal within rounding, and the output against the oracle's for the
    /// choice that the device made.
    fn hold(&self, tolerance: f64) {
        let found = self.run();
        let (output, chosen) = (read(&found.output), read_u32(&client(), &found.routed.experts));
        let weights = read_f32(&client(), &found.routed.weights);
        let logits = oracle::logits(self.hidden, &self.input.host, &self.on_host()).unwrap();
        let expected = oracle::route(self.count, &logits, self.top_k).unwrap();
        for (entry, (&found, &best)) in chosen.iter().zip(&expected.experts).enumerate() {
            let row = &logits[entry / self.top_k * self.count..][..self.count];
            let gap = (row[found as usize] - row[best as usize]).abs();
            assert!(gap < 1e-5, "entry {entry}: expert {found} in the place of {best}, {gap} apart");
        }
        assert_close("weights", &weights, &expected.weights, 1e-5);
        let routed = oracle::Routed { experts: chosen, weights: weights.iter().map(|&w| w.into()).collect() };
        let expected = oracle::moe(self.hidden, &self.input.host, &self.on_host(), &routed).unwrap();
        assert_close("output", &output, &expected, tolerance);
    }
}

#[test]
fn mixtures_agree_with_the_oracle() {
    for (dtype, tolerance) in types() {
        for tokens in [1, 2, 5, 64, 300] {
            Mix::new(tokens, 32, 24, 34, 2, dtype).hold(tolerance);
        }
        // Odd widths, one expert, every expert, and more tokens than one cube routes.
        Mix::new(5, 33, 70, 3, 1, dtype).hold(tolerance);
        Mix::new(6, 33, 7, 1, 1, dtype).hold(tolerance);
        Mix::new(9, 8, 5, 4, 4, dtype).hold(tolerance);
    }
    Mix::new(1500, 8, 8, 64, 3, ElementType::F32).hold(1e-5);
}

/// Equal logits: every token takes the first experts, and the others' weights, NaN here, are not read.
#[test]
fn experts_that_no_token_chose_do_not_matter() {
    let mut mix = Mix::new(70, 16, 8, 5, 2, ElementType::F32);
    mix.router = stored(&vec![0.0; 16 * 5], &[16, 5], ElementType::F32);
    let poisoned = |weights: &Numbers| {
        let (shape, half) = (weights.tensor.shape().to_vec(), weights.host.len() / 5 * 2);
        let numbers = weights.host.iter().enumerate().map(|(i, &w)| if i < half { w } else { f32::NAN });
        stored(&numbers.collect::<Vec<_>>(), &shape, ElementType::F32)
    };
    (mix.up, mix.down) = (poisoned(&mix.up), poisoned(&mix.down));
    mix.hold(1e-5);
    assert_eq!(read_u32(&client(), &mix.run().routed.experts), [0, 1].repeat(70));
}

#[test]
fn a_nan_spoils_its_own_token_and_runs_give_the_same_bits() {
    let mut mix = Mix::new(40, 32, 24, 34, 2, ElementType::F32);
    let bits = |mix: &Mix| -> Vec<u32> { read(&mix.run().output).iter().map(|x| x.to_bits()).collect() };
    let before = bits(&mix);
    assert_eq!(before, bits(&mix), "two runs");
    let mut spoilt = mix.input.host.clone();
    spoilt[7 * 32 + 3] = f32::NAN;
    mix.input = stored(&spoilt, &[40, 32], ElementType::F32);
    let after = bits(&mix);
    for (token, (before, after)) in before.chunks(32).zip(after.chunks(32)).enumerate() {
        if token == 7 {
            assert!(after.iter().all(|&bits| f32::from_bits(bits).is_nan()), "the spoilt token");
        } else {
            assert_eq!(before, after, "token {token}");
        }
    }
}

#[test]
fn routing_alone_keeps_the_best() {
    let logits = [1.0, f32::NAN, 3.0, 3.0, f32::NEG_INFINITY, 2.0, f32::NAN, 0.0, 0.0, -0.0, 0.0, 0.0];
    let logits = from_f32(&client(), &[2, 6], &logits).unwrap();
    poison(&client(), 4096);
    let routed = route(&client(), &logits, 4).unwrap();
    assert_eq!(read_u32(&client(), &routed.experts), [2, 3, 5, 0, 1, 2, 3, 4]);
    let weights = read(&routed.weights);
    assert_close("weights", &weights[4..], &[0.25; 4], 1e-6);
    assert!((weights[..4].iter().sum::<f32>() - 1.0).abs() < 1e-6 && weights[0] == weights[1], "{weights:?}");
}

#[test]
fn dense_ffns_agree_with_the_oracle() {
    for (dtype, tolerance) in types() {
        for (tokens, hidden, inner) in [(1, 32, 64), (5, 33, 70), (64, 32, 24)] {
            for activation in ACTIVATIONS {
                let mut rng = rng(tokens as u64);
                let columns = if activation == Activation::SwiGlu { 2 * inner } else { inner };
                let input = numbers(&mut rng, &[tokens, hidden], 3.0, dtype);
                let up = numbers(&mut rng, &[hidden, columns], 1.0, dtype);
                let down = numbers(&mut rng, &[inner, hidden], 0.2, dtype);
                for strategy in [ProjectStrategy::Tile, ProjectStrategy::Cubek] {
                    poison(&client(), 1 << 16);
                    let run = dense(&client(), &input.tensor, &up.tensor, &down.tensor, activation, strategy);
                    let expected = oracle::dense(hidden, &input.host, &up.host, &down.host, activation).unwrap();
                    let what = format!("{tokens} tokens, {activation:?}, {strategy:?}, {dtype}");
                    assert_close(&what, &read(&run.unwrap()), &expected, tolerance);
                }
            }
        }
    }
}

#[test]
fn attention_agrees_with_the_oracle() {
    for (dtype, tolerance) in types() {
        // The last: more scores than shared memory holds, in parts.
        for (batch, heads, cached, head_dim) in
            [(1, 2, 1, 16), (3, 2, 7, 80), (2, 1, 2048, 64), (1, 3, 100, 5), (2, 2, 9001, 8)]
        {
            let mut rng = rng(cached as u64);
            let projected = numbers(&mut rng, &[batch, 3 * heads * head_dim], 2.0, dtype);
            let keys = numbers(&mut rng, &[batch, heads, cached, head_dim], 2.0, dtype);
            let values = numbers(&mut rng, &[batch, heads, cached, head_dim], 1.0, dtype);
            poison(&client(), 1 << 16);
            let found = attention(&client(), &projected.tensor, &keys.tensor, &values.tensor).unwrap();
            let expected = oracle::attention(heads, head_dim, &projected.host, &keys.host, &values.host).unwrap();
            assert_close(&format!("{cached} positions, {dtype}"), &read(&found), &expected, tolerance);
        }
    }
}

#[test]
fn residuals_agree_with_the_oracle() {
    for (dtype, tolerance) in types() {
        for (tokens, width) in [(1, 1024), (7, 33), (300, 64)] {
            let mut rng = rng(width as u64);
            let (stream, update) =
                (numbers(&mut rng, &[tokens, width], 2.0, dtype), numbers(&mut rng, &[tokens, width], 1.0, dtype));
            let weight = numbers(&mut rng, &[width], 1.5, ElementType::F32);
            poison(&client(), 1 << 18);
            let (sum, normed) = residual(&client(), &stream.tensor, &update.tensor, &weight.tensor, 1e-5).unwrap();
            let expected = oracle::residual(&stream.host, &update.host, &weight.host, 1e-5).unwrap();
            assert_close("sum", &read(&sum), &expected.0, tolerance);
            assert_close("normed", &read(&normed), &expected.1, tolerance);
        }
    }
}

#[test]
fn what_does_not_fit_is_an_error_with_its_numbers() {
    let client = client();
    let tensor = |shape: &[usize]| empty(&client, "tensor", shape, ElementType::F32.storage()).unwrap();
    let says = |error: Option<ultramem::kernels::Error>, words: &str| {
        let error = error.map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains(words), "{error:?} does not say {words:?}");
    };
    let mix = Mix::new(4, 8, 8, 3, 2, ElementType::F32);
    let with = |change: &dyn Fn(&mut Experts<'_, Adapter>)| {
        let mut experts = mix.on_device();
        change(&mut experts);
        moe(&client, &mix.input.tensor, &experts).err()
    };
    says(with(&|experts| experts.top_k = 4), "top_k 4 exceeds experts 3");
    says(with(&|experts| experts.top_k = 0), "must be at least 1");
    let (wide, flat) = (tensor(&[8, 4]), tensor(&[3, 8]));
    says(
        moe(&client, &mix.input.tensor, &Experts { router: &wide, ..mix.on_device() }).err(),
        "router has shape [8, 4]",
    );
    says(moe(&client, &mix.input.tensor, &Experts { down: &flat, ..mix.on_device() }).err(), "down has shape [3, 8]");
    let none = mix.input.tensor.reshaped(vec![0, 8]);
    assert_eq!(moe(&client, &none, &mix.on_device()).unwrap().output.shape().to_vec(), [0, 8]);
    let words = from_u32(&client, &[2, 3], &[0; 6]).unwrap();
    says(route(&client, &words, 1).err(), "logits holds u32, expected f32");
    let run =
        dense(&client, &tensor(&[2, 8]), &tensor(&[8, 6]), &tensor(&[5, 8]), Activation::Gelu, ProjectStrategy::Tile);
    says(run.err(), "up has shape [8, 6], expected [8, 5]");
    let (keys, values) = (tensor(&[2, 1, 4, 8]), tensor(&[2, 1, 3, 8]));
    says(attention(&client, &tensor(&[2, 24]), &keys, &values).err(), "values has shape [2, 1, 3, 8]");
    says(attention(&client, &tensor(&[2, 16]), &keys, &keys).err(), "projected has shape [2, 16], expected [2, 24]");
    let wide = tensor(&[1, 1, 1, 1 << 16]);
    says(attention(&client, &tensor(&[1, 3 << 16]), &wide, &wide).err(), "bytes of shared memory");
    says(residual(&client, &tensor(&[2, 8]), &tensor(&[2, 7]), &tensor(&[8]), 0.0).err(), "update has shape [2, 7]");
}
