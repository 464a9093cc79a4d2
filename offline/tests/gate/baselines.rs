//! What memory layers are compared with, on the offline H100: every kernel in every element type against the oracle, every launch watched.

use cubecl::{Runtime, client::ComputeClient};
use ultramem::kernels::{from_f32, linear::ProjectStrategy};
use ultramem::{ElementType, HostTensor, Tensor};
use ultramem_offline::{Gpu, OfflineDevice, OfflineRuntime};
use ultramem_versus::kernels::{Activation, Experts, attention, dense, moe, residual, route};
use ultramem_versus::reference as oracle;

use super::{TYPES, assert_clean, assert_close, numbers, tolerances, wide};

/// Numbers on an offline device and, rounded as they are there, on the host.
pub struct Numbers {
    host: Vec<f32>,
    pub tensor: Tensor<OfflineRuntime>,
}

/// What a baseline is tried with: one device, one element type.
pub struct Bench {
    device: OfflineDevice,
    pub client: ComputeClient<OfflineRuntime>,
    dtype: ElementType,
}

impl Bench {
    pub fn new(dtype: ElementType) -> Self {
        let device = OfflineDevice::of(Gpu::H100);
        Self { client: OfflineRuntime::client(&device), device, dtype }
    }

    pub fn numbers(&self, shape: &[usize], seed: usize, dtype: ElementType) -> Numbers {
        let host = HostTensor::from_f32(shape, &numbers(shape.iter().product(), seed)).unwrap();
        let handle = self.client.create_from_slice(host.cast(dtype).bytes());
        let tensor = Tensor::new_contiguous(&self.client, shape.to_vec(), handle, dtype.storage());
        Numbers { host: host.cast(dtype).to_f32(), tensor }
    }

    pub fn stored(&self, shape: &[usize], seed: usize) -> Numbers {
        self.numbers(shape, seed, self.dtype)
    }

    /// A tensor's bytes, without what pads its buffer.
    pub fn bytes(&self, tensor: &Tensor<OfflineRuntime>) -> Vec<u8> {
        let count: usize = tensor.shape().iter().product();
        self.client.read_one(tensor.handle.clone()).unwrap()[..count * tensor.dtype.size()].to_vec()
    }

    pub fn hold(&self, what: &str, found: &Tensor<OfflineRuntime>, expected: &[f64]) {
        let what = format!("{what}, {}", self.dtype);
        let dtype = ElementType::from_storage(found.dtype).unwrap();
        let found = HostTensor::new(found.shape().to_vec(), dtype, self.bytes(found)).unwrap();
        assert_close(&what, &wide(&found.to_f32()), expected, tolerances(self.dtype).0);
        assert_clean(&what, &self.device.take_reports());
    }

    /// A mixture, against the oracle's for the experts that the device chose.
    fn hold_mixture(&self, tokens: usize, [hidden, inner, count, top_k]: [usize; 4], activation: Activation) {
        let columns = if activation == Activation::SwiGlu { 2 * inner } else { inner };
        let (input, router) = (self.stored(&[tokens, hidden], 1), self.stored(&[hidden, count], 2));
        let (up, down) = (self.stored(&[count, hidden, columns], 3), self.stored(&[count, inner, hidden], 4));
        let experts = Experts { router: &router.tensor, up: &up.tensor, down: &down.tensor, activation, top_k };
        let found = moe(&self.client, &input.tensor, &experts).unwrap();
        let (router, up, down) = (&router.host, &up.host, &down.host);
        let on_host = oracle::Experts { router, up, down, count, activation, top_k };
        let logits = oracle::logits(hidden, &input.host, &on_host).unwrap();
        let mut routed = oracle::route(count, &logits, top_k).unwrap();
        let words = self.bytes(&found.routed.experts);
        let chosen: Vec<u32> = words.as_chunks().0.iter().map(|&word| u32::from_le_bytes(word)).collect();
        let largest = logits.iter().fold(0.0f64, |most, logit| most.max(logit.abs()));
        for (at, (&found, &expected)) in chosen.iter().zip(&routed.experts).enumerate() {
            let [found, expected] = [found, expected].map(|expert| logits[at / top_k * count + expert as usize]);
            assert!((found - expected).abs() <= 1e-5 * largest, "place {at}: a logit of {found} for {expected}");
        }
        routed.experts = chosen;
        let expected = oracle::moe(hidden, &input.host, &on_host, &routed).unwrap();
        self.hold(&format!("mixture, {tokens} tokens"), &found.output, &expected);
    }
}

/// Few tokens and many, an expert alone and more experts than tokens, rows of odd sizes and such that fill no whole load, stage or tile.
#[test]
fn mixtures_agree_with_the_oracle() {
    for dtype in TYPES {
        let bench = Bench::new(dtype);
        for tokens in [1, 7, 40] {
            bench.hold_mixture(tokens, [32, 16, 5, 2], Activation::Gelu);
        }
        bench.hold_mixture(9, [13, 7, 3, 1], Activation::SwiGlu);
        bench.hold_mixture(3, [24, 136, 40, 2], Activation::SwiGlu);
        bench.hold_mixture(150, [70, 34, 4, 3], Activation::Gelu);
        bench.hold_mixture(290, [136, 104, 1, 1], Activation::SwiGlu);
    }
    // So many tokens of one expert that its tiles are the largest.
    Bench::new(ElementType::BF16).hold_mixture(2700, [768, 768, 1, 1], Activation::Gelu);
    // More tokens than one cube groups, and more experts than there is room for with all units.
    Bench::new(ElementType::F32).hold_mixture(1100, [8, 8, 300, 3], Activation::Gelu);
    Bench::new(ElementType::BF16).hold_mixture(600, [16, 8, 40, 2], Activation::Gelu);
}

/// Equal logits: every token takes the first expert, and the others, which nobody has written, are not read.
#[test]
fn experts_that_no_token_chose_do_not_matter() {
    let bench = Bench::new(ElementType::BF16);
    let (tokens, hidden, inner, count) = (70, 32, 16, 5);
    let input = bench.stored(&[tokens, hidden], 1);
    let stored = |shape: &[usize], numbers: Vec<f32>| {
        let host = HostTensor::from_f32(shape, &numbers).unwrap();
        let handle = bench.client.create_from_slice(host.cast(bench.dtype).bytes());
        let tensor = Tensor::new_contiguous(&bench.client, shape.to_vec(), handle, bench.dtype.storage());
        Numbers { host: host.cast(bench.dtype).to_f32(), tensor }
    };
    let router = stored(&[hidden, count], vec![0.0; hidden * count]);
    let first = |size: usize, seed| {
        let mut all = numbers(size, seed);
        all.resize(count * size, f32::NAN);
        all
    };
    let up = stored(&[count, hidden, inner], first(hidden * inner, 3));
    let down = stored(&[count, inner, hidden], first(inner * hidden, 4));
    let (activation, top_k) = (Activation::Gelu, 1);
    let experts = Experts { router: &router.tensor, up: &up.tensor, down: &down.tensor, activation, top_k };
    let run = || moe(&bench.client, &input.tensor, &experts).unwrap().output;
    let found = run();
    let on_host = oracle::Experts { router: &router.host, up: &up.host, down: &down.host, count, activation, top_k };
    let routed = oracle::Routed { experts: vec![0; tokens], weights: vec![1.0; tokens] };
    bench.hold("mixture", &found, &oracle::moe(hidden, &input.host, &on_host, &routed).unwrap());
    assert_eq!(bench.bytes(&found), bench.bytes(&run()), "other bits");
}

/// Ties, both zeros, infinities and NaN, which is never chosen before a number.
#[test]
fn routing_alone_keeps_the_best() {
    let bench = Bench::new(ElementType::F32);
    let logits = [1.0, f32::NAN, 3.0, 3.0, f32::NEG_INFINITY, 2.0, f32::NAN, 0.0, 0.0, -0.0, 0.0, 0.0];
    let logits = from_f32(&bench.client, &[2, 6], &logits).unwrap();
    let routed = route(&bench.client, &logits, 4).unwrap();
    let chosen: Vec<u32> =
        bench.bytes(&routed.experts).as_chunks().0.iter().map(|&it| u32::from_le_bytes(it)).collect();
    assert_eq!(chosen, [2, 3, 5, 0, 1, 2, 3, 4]);
    let powers: Vec<f64> = [3.0f64, 3.0, 2.0, 1.0].map(|logit| (logit - 3.0).exp()).to_vec();
    let sum: f64 = powers.iter().sum();
    let expected: Vec<f64> = powers.iter().map(|power| power / sum).chain([0.25; 4]).collect();
    bench.hold("weights", &routed.weights, &expected);
}

#[test]
fn dense_ffns_attention_and_residuals_agree_with_the_oracle() {
    for dtype in TYPES {
        let bench = Bench::new(dtype);
        let (hidden, inner) = (32, 24);
        for (tokens, strategy) in
            [(3, ProjectStrategy::Tile), (70, ProjectStrategy::Cubek), (70, ProjectStrategy::Matrix)]
        {
            let (input, up) = (bench.stored(&[tokens, hidden], 1), bench.stored(&[hidden, 2 * inner], 2));
            let down = bench.stored(&[inner, hidden], 3);
            let activation = Activation::SwiGlu;
            let found = dense(&bench.client, &input.tensor, &up.tensor, &down.tensor, activation, strategy).unwrap();
            let expected = oracle::dense(hidden, &input.host, &up.host, &down.host, activation).unwrap();
            bench.hold("FFN", &found, &expected);
        }
        // A cube a head, and parts of the positions, the last of which is not full.
        for (batch, heads, cached, head_dim) in [(1, 2, 1, 16), (3, 2, 128, 8), (2, 1, 300, 20), (1, 3, 513, 5)] {
            let (projected, keys) =
                (bench.stored(&[batch, 3 * heads * head_dim], 4), bench.stored(&[batch, heads, cached, head_dim], 5));
            let values = bench.stored(&[batch, heads, cached, head_dim], 6);
            let found = attention(&bench.client, &projected.tensor, &keys.tensor, &values.tensor).unwrap();
            let expected = oracle::attention(heads, head_dim, &projected.host, &keys.host, &values.host).unwrap();
            bench.hold("attention", &found, &expected);
        }
        let (stream, update) = (bench.stored(&[5, 33], 7), bench.stored(&[5, 33], 8));
        let weight = bench.numbers(&[33], 9, ElementType::F32);
        let (sum, normed) = residual(&bench.client, &stream.tensor, &update.tensor, &weight.tensor, 1e-5).unwrap();
        let expected = oracle::residual(&stream.host, &update.host, &weight.host, 1e-5).unwrap();
        bench.hold("sum", &sum, &expected.0);
        bench.hold("normed", &normed, &expected.1);
    }
}
