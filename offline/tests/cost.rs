//! The model of cost against what launches were measured to move, stage by stage, forwards and backwards, and how many launches a layer
//! makes. What a
//! mixture of experts moves: the weights of the experts that it touches, once.

use std::collections::BTreeSet;

use cubecl::Runtime;
use cubecl::client::ComputeClient;
use cubecl::future::block_on;
use ultramem::kernels::block_of;
use ultramem::kernels::optimiser::{Rule, Step};
use ultramem::{
    Caches, Capabilities, Choices, Chosen, Dimensions, ElementType, HostTensor, Kept, Kind, MapGradients, MemoryConfig,
    MemoryLayer, SharedTable, Strategies, Tensor, Weights,
};
use ultramem_offline::trace::{Tracer, tracing_device};
use ultramem_offline::{Gpu, OfflineDevice, OfflineRuntime, Target};
use ultramem_versus::kernels::{Activation, Experts, moe};

/// A table of 1 MiB in f32, everything else far smaller.
fn dimensions() -> Dimensions {
    Dimensions { hidden_size: 64, side_keys: 128, key_dim: 16, top_m: 8, value_dim: 64, ..Dimensions::default() }
}

/// The norms' weights and the cores, which the model leaves out: 64 bytes each.
const LEFT_OUT: u64 = 128;

/// The same for a stage of the backward pass, and the counts of one number, a sector each, that its dozens of launches pass on.
const COUNTS: u64 = 64 * 32;

/// The blocks that each of the sorted entries' `rows` rows, at most, which lies in several, lies in.
fn parts<T: Ord>(mut entries: Vec<T>, rows: usize) -> usize {
    entries.sort();
    let block = block_of(entries.len(), rows.min(entries.len()));
    let mut first = 0;
    let ranges = entries.chunk_by(|a, b| a == b).map(|group| {
        first += group.len();
        first - group.len()..first
    });
    let blocks = ranges.map(|range| (range.end - 1) / block - range.start / block + 1);
    blocks.filter(|&blocks| blocks > 1).sum()
}

/// A layer on a device that measures what its launches move.
struct Scale {
    device: OfflineDevice,
    client: ComputeClient<OfflineRuntime>,
    layer: MemoryLayer<OfflineRuntime>,
    input: Tensor<OfflineRuntime>,
    /// Slot to address; none for product keys.
    shuffle: Option<Vec<u32>>,
}

impl Scale {
    fn new(dims: Dimensions, dtype: ElementType, tokens: usize) -> Self {
        let device = OfflineDevice::of(Gpu::H100);
        let client = OfflineRuntime::client(&device);
        let config = MemoryConfig::new(dims).unwrap();
        let weights = Weights::random(&config, 3);
        let layer = MemoryLayer::new(&client, config.clone(), &weights, dtype).unwrap();
        let shuffle = weights.shuffle_index.clone();
        let numbers: Vec<f32> =
            (0..tokens * config.hidden_size).map(|i| ((i * 7919) % 2003) as f32 / 1001.0 - 1.0).collect();
        let input = layer.upload(&numbers).unwrap();
        let scale = Self { device, client, layer, input, shuffle };
        scale.moved(0);
        scale
    }

    /// Bytes moved since the last call, with a cache of `cache` bytes.
    fn moved(&self, cache: u64) -> u64 {
        block_on(self.client.sync()).unwrap();
        self.device.take_reports().iter().map(|launch| launch.moved(cache)).sum()
    }

    /// How many different rows and keys the tokens have chosen.
    fn choices(&self, kept: &Kept<OfflineRuntime>, chosen: &Chosen<OfflineRuntime>) -> Choices {
        let config = self.layer.config();
        let keys = Chosen { slots: kept.keys.clone(), scores: kept.scores.clone() };
        let (keys, slots) = (self.layer.read_slots(&keys).unwrap(), self.layer.read_slots(chosen).unwrap());
        let address = |slot: &u32| self.shuffle.as_ref().map_or(*slot, |shuffle| shuffle[*slot as usize]) as usize;
        let sides = |(place, slot): (usize, &u32)| {
            let head = place / config.top_m % config.heads;
            let slot = *slot as usize;
            [(head, 0, slot / config.side_keys), (head, 1, slot % config.side_keys)]
        };
        let side_of = |place: usize| place / config.top_m % (2 * config.heads);
        let rows: Vec<_> = slots.iter().map(|slot| config.place(address(slot)).1).collect();
        let chosen: Vec<_> = slots.iter().enumerate().flat_map(sides).collect();
        Choices {
            slots: slots.iter().collect::<BTreeSet<_>>().len(),
            rows: rows.iter().collect::<BTreeSet<_>>().len(),
            kept: keys.iter().enumerate().map(|(place, key)| (side_of(place), key)).collect::<BTreeSet<_>>().len(),
            keys: chosen.iter().collect::<BTreeSet<_>>().len(),
            row_parts: parts(rows, config.table_rows()),
            key_parts: parts(chosen, config.heads * 2 * config.side_keys),
        }
    }

    /// What each stage of a forward pass moves, and what the tokens chose.
    fn forward(&self, strategies: Strategies, cache: u64) -> (Vec<u64>, Choices) {
        let query = self.layer.query(&self.input, strategies.query).unwrap();
        let of_query = self.moved(cache);
        let kept = self.layer.score(&query, strategies.score).unwrap();
        let of_score = self.moved(cache);
        let chosen = self.layer.combine(&kept).unwrap();
        let of_combine = self.moved(cache);
        let mut moved = vec![of_query, of_score, of_combine];
        let weighed = self.layer.weigh(&self.input, &chosen, strategies.query).unwrap();
        let weighed = weighed.map(|(_, weighed)| weighed.chosen);
        if weighed.is_some() {
            moved.push(self.moved(cache));
        }
        self.layer.expand(&self.input, weighed.as_ref().unwrap_or(&chosen), strategies).unwrap();
        moved.push(self.moved(cache));
        (moved, self.choices(&kept, &chosen))
    }

    /// What each stage of a backward pass moves, in the order of their launches; how many value rows were used, and what an update of
    /// them by each of `rules` moves.
    fn backward(&mut self, cache: u64, rules: &[Rule]) -> (Vec<u64>, Choices, Vec<u64>) {
        let tokens = self.input.shape()[0];
        let (_, choices) = self.forward(self.layer.strategies(tokens), cache);
        let (_, saved) = self.layer.forward_saving(&self.input).unwrap();
        self.moved(cache);
        let expand = self.layer.expand_backward(&saved, &self.input).unwrap();
        let mut moved = vec![self.moved(cache)];
        let weigh = self.layer.weigh_backward(&saved, &expand).unwrap();
        if weigh.is_some() {
            moved.push(self.moved(cache));
        }
        let grad_scores = weigh.as_ref().map_or(&expand.scores, |weigh| &weigh.scores);
        let combine = self.layer.combine_backward(&saved, grad_scores).unwrap();
        moved.push(self.moved(cache));
        let score = self.layer.score_backward(&saved, &combine.sides).unwrap();
        moved.push(self.moved(cache));
        let z = weigh.map(|weigh| weigh.z);
        let maps = MapGradients { gate: expand.gate, output_gate: expand.output_gate, z };
        self.layer.query_backward(&self.input, &score.query, &maps).unwrap();
        moved.push(self.moved(cache));
        assert_eq!(self.layer.used_rows(&expand.values).unwrap(), choices.rows);
        let update = |rule: &Rule| {
            let mut optimiser = self.layer.value_optimiser(*rule).unwrap();
            self.moved(cache);
            self.layer.update_values(&mut optimiser, &expand.values, &Step::new(0.1)).unwrap();
            self.moved(cache)
        };
        (moved, choices, rules.iter().map(update).collect())
    }
}

/// No stage moves more than the model says, nor less than nine tenths of it, where the model knows how much was chosen.
fn hold(about: &str, model: Vec<(&str, u64)>, measured: Vec<u64>, left_out: u64) {
    for ((stage, model), measured) in model.into_iter().zip(measured) {
        let about = format!("{stage}, {about}: {measured} of {model} bytes");
        assert!(measured <= model + left_out, "{about}");
        assert!(10 * (measured + left_out) >= 9 * model, "{about}");
    }
}

const LARGE: u64 = 50 << 20;
const SMALL: u64 = 256 << 10;

#[test]
fn no_stage_moves_more_than_the_model_says() {
    for (dtype, tokens, cache) in [
        (ElementType::F32, 40, LARGE),
        (ElementType::F32, 40, SMALL),
        (ElementType::F32, 1, LARGE),
        (ElementType::BF16, 96, LARGE),
        (ElementType::BF16, 96, SMALL),
        (ElementType::F16, 1, LARGE),
    ] {
        let scale = Scale::new(dimensions(), dtype, tokens);
        let strategies = scale.layer.strategies(tokens);
        let (measured, choices) = scale.forward(strategies, cache);
        let (plans, caches) = (scale.layer.plans(tokens, strategies).unwrap(), Caches { bytes: cache });
        let model = scale.layer.config().traffic_of(choices, dtype, &plans, caches);
        let most = scale.layer.config().traffic(dtype, &plans, caches);
        assert!(model.iter().zip(&most).all(|((_, model), (_, most))| model <= most), "{model:?}, {most:?}");
        hold(&format!("{dtype}, {tokens} tokens, cache of {cache}"), model, measured, LEFT_OUT);
    }
}

const RULES: [Rule; 4] = [
    Rule::Sgd { momentum: 0.0 },
    Rule::Sgd { momentum: 0.9 },
    Rule::Adagrad { eps: 1e-8 },
    Rule::Adam { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.0, decoupled: true },
];

#[test]
fn no_stage_moves_more_backwards_than_the_model_says() {
    let product_keys = Dimensions { tucker_rank: 1, cores: 1, expansion: 1, ..dimensions() };
    let memory_plus = Dimensions { capabilities: Kind::MemoryPlus.capabilities(), ..product_keys.clone() };
    let plain = Dimensions { capabilities: Kind::ProductKey.capabilities(), ..product_keys };
    for (dims, dtype, tokens, cache) in [
        (dimensions(), ElementType::F32, 200, LARGE),
        (dimensions(), ElementType::F32, 1, LARGE),
        (dimensions(), ElementType::BF16, 96, LARGE),
        (dimensions(), ElementType::F16, 40, SMALL),
        (plain, ElementType::F32, 40, LARGE),
        (memory_plus, ElementType::BF16, 40, LARGE),
    ] {
        let mut scale = Scale::new(dims, dtype, tokens);
        let (measured, choices, updates) = scale.backward(cache, &RULES);
        let caches = Caches { bytes: cache };
        let model = scale.layer.backward_traffic_of(tokens, choices, caches);
        assert!(scale.layer.backward_traffic(0, caches).iter().all(|(_, bytes)| *bytes == 0));
        let (most, many) = [tokens, 1 << 40].map(|tokens| scale.layer.backward_traffic(tokens, caches)).into();
        assert!(model.iter().zip(&most).all(|((_, model), (_, most))| model <= most), "{model:?}, {most:?}");
        assert!(many.iter().zip(&model).all(|((_, many), (_, few))| many > few), "{many:?}");
        let config = scale.layer.config();
        let about = format!("{:?}, {dtype}, {tokens} tokens, cache of {cache}", config.kind());
        hold(&about, model, measured, COUNTS);
        let used = choices.rows;
        for (rule, measured) in RULES.into_iter().zip(updates) {
            let least = config.update_cost(used, dtype, rule).bytes;
            let most = config.update_traffic(used, dtype, rule, caches) + LEFT_OUT;
            assert!(
                (least..=most).contains(&measured),
                "{rule:?}, {used} rows, {about}: {measured} of {least}..={most}"
            );
        }
    }
}

/// What the rest of the family adds: pre-values, shared tables, biases, gates, no projection.
#[test]
fn no_stage_of_the_family_moves_more_than_the_model_says() {
    let product_keys = Dimensions { tucker_rank: 1, cores: 1, expansion: 1, ..dimensions() };
    let of = |kind: Kind| kind.capabilities();
    let rows = dimensions().side_keys.pow(2) / dimensions().expansion;
    let shared = Some(SharedTable { rows: 2 * rows, offset: rows + rows / 2 });
    let v2 = Dimensions { capabilities: of(Kind::UltraMemV2), pre_dim: 32, shared, ..dimensions() };
    let gates = Capabilities { output_gated: true, ..of(Kind::LinguaMemoryPlus) };
    let lingua = Dimensions { capabilities: gates, ..product_keys.clone() };
    let (capabilities, hidden_size) = (of(Kind::Peer), product_keys.hidden_size);
    let peer = Dimensions { capabilities, value_dim: hidden_size, pre_dim: hidden_size, ..product_keys };
    for (dims, dtype) in
        [(v2.clone(), ElementType::F32), (v2, ElementType::BF16), (lingua, ElementType::BF16), (peer, ElementType::F32)]
    {
        let (tokens, caches) = (96, Caches { bytes: LARGE });
        let mut scale = Scale::new(dims, dtype, tokens);
        let strategies = scale.layer.strategies(tokens);
        let plans = scale.layer.plans(tokens, strategies).unwrap();
        let (measured, choices) = scale.forward(strategies, LARGE);
        let config = scale.layer.config().clone();
        let about = format!("{:?}, {dtype}", config.kind());
        hold(&about, config.traffic_of(choices, dtype, &plans, caches), measured, LEFT_OUT);
        let (measured, choices, _) = scale.backward(LARGE, &RULES[..1]);
        hold(
            &format!("{about}, backwards"),
            scale.layer.backward_traffic_of(tokens, choices, caches),
            measured,
            COUNTS,
        );
    }
}

/// At the preset's dimensions: one a stage for a token and where one kernel pools and projects, one more where two do. Split keys are
/// scored and selected from in two launches, which few tokens share with the choice among pairs, and many tokens go through in chunks.
#[test]
fn a_layer_makes_few_launches() {
    let config = MemoryConfig::new(Dimensions::ultramem_v1_1b()).unwrap();
    let device = tracing_device(Gpu::H100, Target::Cuda);
    for dtype in [ElementType::F32, ElementType::F16, ElementType::BF16] {
        let tracer = Tracer::new(&device, &config, dtype).unwrap();
        for (tokens, most) in [(1, 4), (2, 5), (16, 5), (64, 5), (512, 6), (4096, 6)] {
            let launches = tracer.forward(tokens, None).unwrap();
            let entries: Vec<_> = launches.iter().map(|it| &it.launch.kernel.entry).collect();
            assert!((4..=most).contains(&launches.len()), "{dtype}, {tokens} tokens: {entries:?}");
        }
    }
}

/// One token's launches that read a weight or a table do so from many cubes.
#[test]
fn one_token_reaches_many_cubes() {
    let config = MemoryConfig::new(Dimensions::ultramem_v1_1b()).unwrap();
    let device = tracing_device(Gpu::H100, Target::Cuda);
    for dtype in [ElementType::F32, ElementType::F16, ElementType::BF16] {
        for traced in Tracer::new(&device, &config, dtype).unwrap().forward(1, None).unwrap() {
            let cubes: u32 = traced.launch.count.iter().product();
            assert!(cubes >= 24 || traced.stage == "combine", "{dtype}, {}: {cubes} cubes", traced.launch.kernel.entry);
        }
    }
}

/// Tokens that all choose the first two of eight experts: the others' weights are not read, and theirs once where a cache holds
/// them, once for each tile of tokens where none does; through the caches and on matrix units.
#[test]
fn a_mixture_reads_the_weights_of_the_experts_that_it_touches_once() {
    // Two stages of the depth at least, whatever the tile.
    let (tokens, hidden, inner, count) = (40, 256, 256, 8);
    for (dtype, kernel, least) in
        [(ElementType::F32, "grouped_product_kernel", 8), (ElementType::BF16, "grouped_matrix_kernel", 16)]
    {
        let device = OfflineDevice::of(Gpu::H100);
        let client = OfflineRuntime::client(&device);
        let numbers: Vec<f32> =
            (0..count * hidden * inner).map(|i| ((i * 7919) % 2003) as f32 / 1001.0 - 1.0).collect();
        let stored = |shape: &[usize], numbers: &[f32]| {
            let host = HostTensor::from_f32(shape, &numbers[..shape.iter().product()]).unwrap();
            let handle = client.create_from_slice(host.cast(dtype).bytes());
            Tensor::new_contiguous(&client, shape.to_vec(), handle, dtype.storage())
        };
        let router = stored(&[hidden, count], &vec![0.0; hidden * count]);
        let (up, down) = (stored(&[count, hidden, inner], &numbers), stored(&[count, inner, hidden], &numbers));
        let experts = Experts { router: &router, up: &up, down: &down, activation: Activation::Gelu, top_k: 2 };
        moe(&client, &stored(&[tokens, hidden], &numbers), &experts).unwrap();
        block_on(client.sync()).unwrap();
        let launches = device.take_reports();
        let products: Vec<_> = launches.iter().filter(|it| it.kernel.entry.starts_with(kernel)).collect();
        assert_eq!(products.len(), 2, "{dtype}");
        for launch in products {
            let weights = &launch.traffic[1].read;
            let entry = &launch.kernel.entry;
            assert_eq!(weights.distinct_bytes, (2 * hidden * inner * dtype.size()) as u64, "{entry}");
            assert_eq!(weights.distinct_sectors * 32, weights.distinct_bytes, "{entry}");
            let times = weights.sectors.div_ceil(weights.distinct_sectors);
            // A stage is fetched while the one before it is multiplied, behind the end of the depth the last line again: half as much more at most.
            let tiles = tokens.div_ceil(least) as u64;
            assert!((1..=(3 * tiles).div_ceil(2)).contains(&times), "{entry}: {times} times");
        }
    }
}
