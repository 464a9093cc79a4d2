//! What the tests on a device share: the client, every strategy, poisoned memory, and the comparison of a layer with the
//! oracle stage by stage.

// Each test is a crate of its own and uses a part of this.
#![allow(dead_code, unused_imports)]

use cubecl::future::block_on;
use cubecl::prelude::*;
use ultramem::kernels::{expand::ExpandStrategy, linear::ProjectStrategy, score::ScoreStrategy, supports};
use ultramem::{
    Capabilities, Dimensions, ElementType, HostTensor, Kept, Kind, MemoryConfig, MemoryLayer, PerWeight, Strategies,
    Tensor, Weight, Weights, reference,
};

pub type Client = ComputeClient<Adapter>;
pub type Layer = MemoryLayer<Adapter>;

#[cfg(not(feature = "wgpu"))]
pub use cubecl::cuda::CudaRuntime as Adapter;
#[cfg(feature = "wgpu")]
pub use cubecl::wgpu::WgpuRuntime as Adapter;

/// The client that the whole process shares.
#[cfg(not(feature = "wgpu"))]
pub fn client() -> Client {
    Adapter::client(&Default::default())
}

#[cfg(all(feature = "wgpu", not(feature = "vulkan")))]
pub use self::adapter::webgpu_client;
#[cfg(feature = "wgpu")]
pub use self::adapter::{client, paged_client};

#[cfg(feature = "wgpu")]
mod adapter {
    use std::panic::catch_unwind;
    use std::sync::OnceLock;

    use cubecl::prelude::*;
    use cubecl::wgpu::{
        AutoGraphicsApi, MemoryConfiguration, RuntimeOptions, WgpuDevice, WgpuRuntime, WgpuSetup, init_device,
        init_setup,
    };
    use cubecl_runtime::memory_management::{MemoryPoolOptions, PoolType};

    use super::Client;

    /// Set to `webgpu`, the tests run on a device that has no more than WebGPU's default limits.
    fn limited() -> bool {
        match std::env::var("ULTRAMEM_LIMITS") {
            Ok(limits) => {
                assert_eq!(limits, "webgpu", "ULTRAMEM_LIMITS");
                true
            }
            Err(_) => false,
        }
    }

    /// The default adapter, opened once for the whole process.
    fn setup() -> &'static WgpuSetup {
        static SETUP: OnceLock<WgpuSetup> = OnceLock::new();
        SETUP.get_or_init(|| {
            let open = || init_setup::<AutoGraphicsApi>(&WgpuDevice::default(), RuntimeOptions::default());
            let setup = catch_unwind(open).unwrap_or_else(|_| {
                panic!(
                    "no Vulkan adapter answers, and these tests need one: on Debian, `apt-get update && apt-get install -y \
                     mesa-vulkan-drivers` installs a software adapter"
                )
            });
            if limited() { ultramem::webgpu_limits(&setup).unwrap() } else { setup }
        })
    }

    /// The client that the whole process shares.
    pub fn client() -> Client {
        static DEVICE: OnceLock<WgpuDevice> = OnceLock::new();
        let limited_device = || init_device(setup().clone(), RuntimeOptions::default());
        let open = || if limited() { limited_device() } else { Default::default() };
        setup();
        WgpuRuntime::client(DEVICE.get_or_init(open))
    }

    /// A client of the same adapter that has no more than WebGPU's default limits.
    pub fn webgpu_client() -> Client {
        let limited = ultramem::webgpu_limits(setup()).unwrap();
        WgpuRuntime::client(&init_device(limited, RuntimeOptions::default()))
    }

    /// A client of the same adapter whose threads have allocators of their own, in which every buffer has a page of its size, to
    /// be used again by buffers of that size alone (the next 16 KiB): what a thread has reserved is what it had in use at once, as
    /// long as no two buffers have one size.
    pub fn paged_client() -> Client {
        let pool = |max_alloc_size| MemoryPoolOptions {
            pool_type: PoolType::ExclusivePages { max_alloc_size },
            dealloc_period: None,
        };
        let pool_options = (1..=200).map(|pages| pool(pages << 14)).collect();
        let options =
            RuntimeOptions { memory_config: MemoryConfiguration::Custom { pool_options }, ..Default::default() };
        WgpuRuntime::client(&init_device(setup().clone(), options))
    }
}

/// A client of another device, where the tests have one; else the same.
pub fn other_client() -> Client {
    #[cfg(feature = "wgpu")]
    return paged_client();
    #[cfg(not(feature = "wgpu"))]
    client()
}

/// Every way to compute a layer, the keys whole and cut in two and in five.
pub fn every_strategy() -> Vec<Strategies> {
    let products = [ProjectStrategy::Tile, ProjectStrategy::Cubek];
    let scores = [ScoreStrategy::Whole, ScoreStrategy::Split { splits: 2 }, ScoreStrategy::Split { splits: 5 }];
    let expands = [ExpandStrategy::Fused].into_iter().chain(products.map(ExpandStrategy::Pooled));
    let all = expands.flat_map(|expand| scores.map(|score| products.map(|query| Strategies { query, score, expand })));
    all.flatten().collect()
}

/// Fills the memory that the allocator hands out next with NaN bits, at least `bytes` of it, so that an element that no
/// kernel writes is seen.
pub fn poison(client: &Client, bytes: usize) {
    let blocks = [1 << 22, 1 << 20, 1 << 16, 1 << 12, 1 << 8].into_iter();
    let held: Vec<_> = blocks
        .filter(|&block| block < 4 * bytes)
        .flat_map(|block| vec![block; bytes.div_ceil(block).min(16)])
        .map(|block| client.create_from_slice(&vec![0xff; block]))
        .collect();
    // What the device still works on is not free to be handed out again.
    block_on(client.sync()).unwrap();
    drop(held);
}

/// Poisons what a call will allocate.
pub fn poison_for(layer: &Layer, tokens: usize, strategies: Strategies) {
    let output = tokens * layer.config().hidden_size * layer.dtype().size();
    let plans = layer.plans(tokens, strategies).unwrap();
    poison(layer.client(), layer.workspace_bytes(&plans) + output);
}

/// Downloads whole numbers.
pub fn read_u32(client: &Client, tensor: &Tensor<Adapter>) -> Vec<u32> {
    let bytes = client.read_one(tensor.handle.clone()).unwrap();
    bytemuck::pod_collect_to_vec(&bytes)
}

/// Downloads numbers.
pub fn read_f32(client: &Client, tensor: &Tensor<Adapter>) -> Vec<f32> {
    let bytes = client.read_one(tensor.handle.clone()).unwrap();
    bytemuck::pod_collect_to_vec(&bytes)
}

/// Downloads a tensor of any element type, and tells of a launch that failed.
pub fn read(tensor: &Tensor<Adapter>) -> Vec<f32> {
    let client = client();
    let bytes = client.read_one(tensor.handle.clone()).unwrap().to_vec();
    client.flush().unwrap();
    let dtype = ElementType::from_storage(tensor.dtype).unwrap();
    HostTensor::new(tensor.shape().to_vec(), dtype, bytes).unwrap().to_f32()
}

/// The element types of this device, and how far what is stored in them may be off.
pub fn types() -> Vec<(ElementType, f64)> {
    let all = [(ElementType::F32, 1e-5), (ElementType::F16, 1e-2), (ElementType::BF16, 1e-2)];
    all.into_iter().filter(|(dtype, _)| supports(&client(), *dtype).is_ok()).collect()
}

/// A layer on the device with its weights and input on the host, both rounded as the device holds them.
pub struct Case {
    pub layer: Layer,
    pub weights: Weights<'static>,
    pub input: Vec<f32>,
}

impl Case {
    pub fn new(config: &MemoryConfig, weights: &Weights<'_>, input: &[f32], dtype: ElementType) -> Self {
        let weights = weights.rounded(dtype);
        let layer = MemoryLayer::new(&client(), config.clone(), &weights, dtype).unwrap();
        let input = HostTensor::from_f32([input.len()], input).unwrap().cast(dtype).to_f32();
        Self { layer, weights, input }
    }

    pub fn tokens(&self) -> usize {
        self.input.len() / self.layer.config().hidden_size
    }

    /// The strategies, without one kernel for pooling and projecting where the layer does something to what is projected.
    pub fn runnable(&self, strategies: Strategies) -> Strategies {
        let of = &self.layer.config().capabilities;
        let fused = strategies.expand == ExpandStrategy::Fused && of.projects && !of.biased && !of.output_gated;
        let pooled = ExpandStrategy::Pooled(strategies.query);
        match strategies.expand {
            ExpandStrategy::Fused if !fused => Strategies { expand: pooled, ..strategies },
            _ => strategies,
        }
    }

    /// One forward pass over `input` into poisoned memory.
    pub fn run(&self, input: &[f32], strategies: Strategies) -> Found {
        let (on_device, strategies) = (self.layer.upload(input).unwrap(), self.runnable(strategies));
        poison_for(&self.layer, self.tokens(), strategies);
        let found = self.layer.forward_with(&on_device, strategies).unwrap();
        Found {
            output: self.layer.read(&found.output).unwrap(),
            slots: self.layer.read_slots(&found.chosen).unwrap(),
            scores: self.layer.read(&found.chosen.scores).unwrap(),
        }
    }
}

/// What one forward pass gave.
#[derive(Clone)]
pub struct Found {
    pub output: Vec<f32>,
    pub slots: Vec<u32>,
    pub scores: Vec<f32>,
}

impl Found {
    /// The bits of everything that a token gave.
    pub fn bits(&self, tokens: usize, token: usize) -> Vec<u32> {
        fn row<T>(numbers: &[T], tokens: usize, token: usize) -> &[T] {
            let width = numbers.len() / tokens;
            &numbers[token * width..][..width]
        }
        let floats = row(&self.output, tokens, token).iter().chain(row(&self.scores, tokens, token));
        floats.map(|x| x.to_bits()).chain(row(&self.slots, tokens, token).iter().copied()).collect()
    }
}

/// Tokens that were compared, and how many of them chose otherwise than the oracle because two scores are equal but for
/// rounding.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    pub tokens: usize,
    pub excused: usize,
}

impl Tally {
    pub fn add(&mut self, other: Tally) {
        self.tokens += other.tokens;
        self.excused += other.excused;
    }

    /// Near ties are rare: where they are not, an excuse hides a fault.
    pub fn assert_rare(&self) {
        assert!(self.excused * 50 <= self.tokens, "more than 2% of tokens chose otherwise: {self:?}");
    }
}

/// Asserts that `found` differs from `expected` by at most `tolerance` of it in L2. All zeros must be found as zeros.
pub fn assert_close(what: &str, found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths");
    let difference: f64 = found.iter().zip(expected).map(|(&f, e)| (f64::from(f) - e) * (f64::from(f) - e)).sum();
    let norm: f64 = expected.iter().map(|e| e * e).sum();
    assert!(difference <= tolerance * tolerance * norm, "{what}: {} of {}", difference.sqrt(), norm.sqrt());
}

/// Two scores this close, relative to the largest of their row, may change places.
const NEAR: f64 = 1e-5;

/// Holds every stage against the oracle's stage on the *same* inputs, and the layer against the oracle's forward.
///
/// Stages in f32 must agree within 1e-5; `tolerance` is for what is stored in the layer's element type.
pub fn hold(case: &Case, strategies: Strategies, tolerance: f64) -> Tally {
    let (layer, weights, config) = (&case.layer, &case.weights, case.layer.config());
    let (input, strategies) = (layer.upload(&case.input).unwrap(), case.runnable(strategies));
    poison_for(layer, case.tokens(), strategies);

    let query = layer.query(&input, strategies.query).unwrap();
    let products = layer.read(&query).unwrap();
    assert_close("query", &products, &products_of(config, weights, &case.input), tolerance);

    let kept = layer.score(&query, strategies.score).unwrap();
    let queries = normalised(config, weights, &products);
    let found = host(layer.client(), &kept);
    judge_kept(config, weights, &found, &reference::score(config, weights, &queries).unwrap());

    let chosen = layer.combine(&kept).unwrap();
    let (slots, scores) = (layer.read_slots(&chosen).unwrap(), layer.read(&chosen.scores).unwrap());
    let expected = reference::combine(config, weights, &found).unwrap();
    judge_chosen(config, weights, &found, &expected, &slots, &scores);

    let wide = |scores: &[f32]| -> Vec<f64> { scores.iter().map(|&s| s.into()).collect() };
    let of_oracle = reference::Chosen { slots: slots.clone(), scores: wide(&scores), totals: Vec::new() };
    let expected = reference::weigh(config, weights, &case.input, &of_oracle).unwrap();
    let weighed = layer.weigh(&input, &chosen, strategies.query).unwrap();
    assert_eq!(weighed.is_some(), config.capabilities.weigh.is_some());
    let weighed = weighed.map_or_else(|| chosen.clone(), |(_, weighed)| weighed.chosen);
    let weighed_scores = layer.read(&weighed.scores).unwrap();
    assert_close("weigh", &weighed_scores, &expected.scores, tolerance);

    let output = layer.read(&layer.expand(&input, &weighed, strategies).unwrap()).unwrap();
    let expected = reference::expand(config, weights, &case.input, &slots, &wide(&weighed_scores)).unwrap();
    assert_close("expand", &output, &expected, tolerance);

    hold_forward(case, strategies, tolerance, &Found { output, slots, scores })
}

/// The layer as a whole: the bits of its stages one by one, and the oracle's output wherever the slots are the oracle's.
fn hold_forward(case: &Case, strategies: Strategies, tolerance: f64, stages: &Found) -> Tally {
    let tokens = case.tokens();
    let found = case.run(&case.input, strategies);
    let expected = reference::forward(case.layer.config(), &case.weights, &case.input).unwrap();
    let (mut outputs, mut expected_outputs) = (Vec::new(), Vec::new());
    let mut tally = Tally { tokens, excused: 0 };
    let (slots, hidden_size) = (expected.slots.len() / tokens, case.layer.config().hidden_size);
    for token in 0..tokens {
        assert_eq!(found.bits(tokens, token), stages.bits(tokens, token), "token {token}: forward and its stages");
        if found.slots[token * slots..][..slots] == expected.slots[token * slots..][..slots] {
            outputs.extend(&found.output[token * hidden_size..][..hidden_size]);
            expected_outputs.extend(&expected.output[token * hidden_size..][..hidden_size]);
        } else {
            tally.excused += 1;
        }
    }
    assert_close("forward", &outputs, &expected_outputs, tolerance);
    tally
}

/// What was kept, on the host, as the oracle takes it.
pub fn host(client: &Client, kept: &Kept<Adapter>) -> reference::Kept {
    let scores = read_f32(client, &kept.scores).iter().map(|&score| score.into()).collect();
    reference::Kept { keys: read_u32(client, &kept.keys), approximate: Vec::new(), scores }
}

/// `W_q x + b_q`, before the norm.
fn products_of(config: &MemoryConfig, weights: &Weights<'_>, input: &[f32]) -> Vec<f64> {
    let (matrix, bias) = (weights.numbers(Weight::QueryProj), weights.numbers(Weight::QueryBias));
    let dot = |x: &[f32], w: &[f32]| -> f64 { x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum() };
    let bias = |row: usize| bias.get(row).map_or(0.0, |&bias| f64::from(bias));
    let rows = |x| matrix.chunks(config.hidden_size).enumerate().map(move |(row, w)| dot(x, w) + bias(row));
    input.chunks(config.hidden_size).flat_map(rows).collect()
}

/// The oracle's norm of what the device projected: the oracle's query with the identity for `W_q`.
pub fn normalised(config: &MemoryConfig, weights: &Weights<'_>, products: &[f32]) -> Vec<f64> {
    let width = config.query_pairs() * 2 * config.key_dim;
    let plain = Capabilities {
        queries: config.capabilities.queries,
        scores: config.capabilities.scores,
        normalises_queries: config.capabilities.normalises_queries,
        ..Kind::ProductKey.capabilities()
    };
    let dims = Dimensions { capabilities: plain, hidden_size: width, pre_dim: 0, shared: None, ..(**config).clone() };
    let wide = MemoryConfig::new(dims).unwrap();
    let identity: Vec<f32> = (0..width * width).map(|i| f32::from(u8::from(i / width == i % width))).collect();
    let mut own = Weights::random(&wide, 0);
    own.tensors[Weight::QueryProj] = Some(HostTensor::from_f32([width, width], &identity).unwrap());
    // The oracle rounds queries to the type of the keys.
    let dtype = keys_type(weights);
    own.tensors[Weight::Keys] = own.get(Weight::Keys).map(|keys| keys.cast(dtype).into_owned());
    own.tensors[Weight::QueryNorm] = weights.get(Weight::QueryNorm).map(|norm| norm.clone().into_owned());
    reference::query(&wide, &own, products).unwrap()
}

fn keys_type(weights: &Weights<'_>) -> ElementType {
    weights.get(Weight::Keys).unwrap().dtype()
}

/// A unit in the last place of a half, relative to its number. The oracle rounds f64 numbers and a kernel f32 ones, off by a few of f32's units, so that
/// now and then a number falls to the other neighbour.
fn last_place(dtype: ElementType) -> Option<f64> {
    match dtype {
        ElementType::F32 => None,
        ElementType::F16 => Some(2f64.powi(-10)),
        ElementType::BF16 => Some(2f64.powi(-7)),
    }
}

/// How far `count` scores of rounded numbers may be from the oracle's: of the numbers behind them a share of 8 of f32's units in one of the half's
/// falls to the other neighbour; four times as many, and three, are allowed for.
fn rounding(dtype: ElementType, count: usize) -> f64 {
    let of_halves = |place: f64| {
        let flips = 8.0 * f64::from(f32::EPSILON) / place * count as f64;
        place * ((3.0 + 4.0 * flips) / count.max(1) as f64).sqrt()
    };
    last_place(dtype).map_or(1e-5, of_halves)
}

/// Asserts that the best keys were kept, but for keys whose scores are the last kept one's within [`NEAR`], or within what one number that was rounded
/// otherwise makes, and that they have their scores.
pub fn judge_kept(config: &MemoryConfig, weights: &Weights<'_>, found: &reference::Kept, expected: &reference::Kept) {
    let dtype = keys_type(weights);
    let near = last_place(dtype).unwrap_or(NEAR);
    assert_eq!(found.keys.len(), expected.keys.len(), "kept keys");
    let (mut scores, mut expected_scores) = (Vec::new(), Vec::new());
    let rows = expected.approximate.chunks(config.side_keys).enumerate();
    for (row, approximate) in rows {
        let places = row * config.top_m..(row + 1) * config.top_m;
        let (keys, best) = (&found.keys[places.clone()], &expected.keys[places.clone()]);
        assert!(keys.is_sorted_by(|a, b| a < b), "row {row}: kept keys out of order, {keys:?}");
        assert!(keys.iter().all(|&key| (key as usize) < config.side_keys), "row {row}: no such key, {keys:?}");
        let score = |key: &u32| approximate[*key as usize];
        let scale = approximate.iter().fold(0.0, |scale: f64, p| scale.max(p.abs()));
        let last = best.iter().map(score).fold(f64::INFINITY, f64::min);
        for key in keys.iter().filter(|key| !best.contains(key)) {
            assert!(score(key) >= last - near * scale, "row {row}: key {key} of {} kept before {last}", score(key));
        }
        for (place, key) in places.clone().zip(keys) {
            if let Some(at) = best.iter().position(|other| other == key) {
                scores.extend(score_at(config, found, place).iter().map(|&s| s as f32));
                expected_scores.extend(score_at(config, expected, places.start + at));
            }
        }
    }
    assert_close("kept scores", &scores, &expected_scores, rounding(dtype, scores.len()));
}

fn score_at<'a>(config: &MemoryConfig, kept: &'a reference::Kept, place: usize) -> &'a [f64] {
    &kept.scores[place * config.tucker_rank..][..config.tucker_rank]
}

/// Asserts that the chosen slots are the oracle's, but for slots whose totals are equal within [`NEAR`], and that they
/// have their scores.
pub fn judge_chosen(
    config: &MemoryConfig,
    weights: &Weights<'_>,
    kept: &reference::Kept,
    expected: &reference::Chosen,
    slots: &[u32],
    scores: &[f32],
) {
    assert_eq!(slots.len(), expected.slots.len(), "slots");
    let (mut found_scores, mut expected_scores, mut own) = (Vec::new(), Vec::new(), Vec::new());
    for (row, best) in expected.slots.chunks(config.top_m).enumerate() {
        let places = row * config.top_m..(row + 1) * config.top_m;
        let (slots, totals) = (&slots[places.clone()], &expected.totals[places.clone()]);
        own.extend(slots.iter().zip(best.iter().zip(totals)).map(|(slot, (other, total))| match slot == other {
            true => *total,
            false => total_of(config, weights, kept, row, *slot),
        }));
        for (place, slot) in places.clone().zip(slots) {
            if let Some(at) = best.iter().position(|other| other == slot) {
                found_scores.extend(&scores[place * config.cores..][..config.cores]);
                expected_scores.extend(&expected.scores[(places.start + at) * config.cores..][..config.cores]);
            }
        }
    }
    let found = reference::Chosen { slots: slots.to_vec(), scores: Vec::new(), totals: own };
    let judged = reference::judge_chosen(config, &found, expected, NEAR).unwrap();
    if let Some(&place) = judged.wrong.first() {
        let (slot, other) = (found.slots[place], expected.slots[place]);
        let (own, total) = (found.totals[place], expected.totals[place]);
        panic!("place {place}: slot {slot} of {own} in the place of {other} of {total}: {judged:?}");
    }
    assert_close("scores", &found_scores, &expected_scores, 1e-5);
}

/// The total of a slot that the oracle did not choose, from the kept scores of its row and column. `row` counts tokens and
/// heads.
fn total_of(config: &MemoryConfig, weights: &Weights<'_>, kept: &reference::Kept, row: usize, slot: u32) -> f64 {
    let place = |side: usize, key: usize| {
        let first = (row * 2 + side) * config.top_m;
        let at = kept.keys[first..][..config.top_m].iter().position(|&other| other as usize == key);
        first + at.unwrap_or_else(|| panic!("row {row}: slot {slot} is no pair of kept keys"))
    };
    let (i, j) = (slot as usize / config.side_keys, slot as usize % config.side_keys);
    let (left, right) = (score_at(config, kept, place(0, i)), score_at(config, kept, place(1, j)));
    if !config.tucker() {
        return left[0] + right[0];
    }
    let (rank, head, cores) = (config.tucker_rank, row % config.heads, weights.numbers(Weight::Cores));
    let entry = |core: usize, a: usize, b: usize| {
        f64::from(cores[((core * config.heads + head) * rank + a) * rank + b]) * left[a] * right[b]
    };
    (0..config.cores)
        .flat_map(|k| (0..rank * rank).map(move |at| (k, at / rank, at % rank)))
        .fold(0.0, |sum, (k, a, b)| sum + entry(k, a, b))
}
