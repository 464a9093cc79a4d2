//! The gate: the layer, forward and backward, on the offline H100: every strategy and element type against the oracle, golden files and
//! awkward shapes, every launch watched. It fails on a wrong number, on anything that the sanitiser finds, on more bytes than
//! the model of cost has or the shapes call for, and where a strategy that only such a GPU has did not run.

mod baselines;
mod filtered;
mod invariant;
mod popular;
mod raw;
mod streams;

use std::collections::BTreeMap;

use baselines::Bench;
use cubecl::{Runtime, future::block_on};
use raw::Raw;
use ultramem::kernels::{expand::ExpandStrategy, from_f32, from_u32, linear::ProjectStrategy, score::ScoreStrategy};
use ultramem::{
    Blocks, Caches, Capabilities, Checkpoint, Chosen, Dimensions, ElementType, Gradients, HostTensor, InputGradients,
    Kept, Kind, LayerWeights, MapGradients, MemoryConfig, MemoryLayer, Norm, RowGradients, SharedTable, Strategies,
    ValueTable, Weigh, Weight, Weights, reference,
};
use ultramem_offline::{Gpu, LaunchReport, OfflineDevice, OfflineRuntime};

const TYPES: [ElementType; 3] = [ElementType::F32, ElementType::F16, ElementType::BF16];

/// Buffers that are not written in full by design: the lists of used rows and what belongs to them, of which only the first `count`
/// rows are set, the parts of rows that lie in several blocks, what several launches write, a part each, and what lies between tensors that
/// share a buffer.
const LISTS: [&str; 6] = [
    "sum_rows_kernel",
    "sum_blocks_kernel",
    "column_sum_kernel",
    "norm_backward_kernel",
    "join_rows_kernel",
    "retrieve_kernel",
];

/// What is stored in half precision may be off by this much.
fn tolerances(dtype: ElementType) -> (f64, f64) {
    if dtype == ElementType::F32 { (1e-5, 1e-4) } else { (1e-2, 1e-2) }
}

const PRODUCTS: [ProjectStrategy; 3] = [ProjectStrategy::Tile, ProjectStrategy::Matrix, ProjectStrategy::Cubek];

/// Every way to compute a layer.
fn every_strategy() -> Vec<Strategies> {
    let expands = [ExpandStrategy::Fused].into_iter().chain(PRODUCTS.map(ExpandStrategy::Pooled));
    let scores = [ScoreStrategy::Whole, ScoreStrategy::Split { splits: 3 }, ScoreStrategy::Filtered];
    // The query's product and the score's split are independent of the rest: each in turn is enough.
    expands
        .zip([0, 1, 2, 3])
        .flat_map(|(expand, turn)| {
            let (query, score) = (PRODUCTS[turn % 3], scores[(turn + 1) % 3]);
            [
                Strategies { query, score, expand },
                Strategies { query: PRODUCTS[(turn + 1) % 3], score: scores[turn % 3], expand },
            ]
        })
        .collect()
}

/// Numbers between -1 and 1, other ones for each seed.
fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|at| ((at * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 - 1.0).collect()
}

fn assert_close(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths");
    let error: f64 = found.iter().zip(expected).map(|(f, e)| (f - e) * (f - e)).sum();
    let norm: f64 = expected.iter().map(|e| e * e).sum();
    assert!(error <= tolerance * tolerance * norm, "{what}: {} of {}", error.sqrt(), norm.sqrt());
}

fn wide(numbers: &[f32]) -> Vec<f64> {
    numbers.iter().map(|&x| x.into()).collect()
}

/// Nothing is wrong with any launch; returns the kernels and the matrix units' products.
fn assert_clean(what: &str, reports: &[LaunchReport]) -> u64 {
    for report in reports {
        let name = &report.kernel.name;
        assert!(report.executed, "{what}: {name} did not run");
        assert!(report.faults.is_empty(), "{what}: {name}: {}", report.faults[0]);
        if !LISTS.iter().any(|list| name.contains(list)) {
            assert!(report.gaps.is_empty(), "{what}: {name}: {}", report.gaps[0]);
        }
    }
    reports.iter().map(|report| report.products).sum()
}

/// The caches of an H100.
const CACHES: Caches = Caches { bytes: 50 << 20 };

/// No more is moved in a stage than the model says, but for norms' weights, cores and counts of one number, which take up to four
/// sectors a launch; and no more is asked of the caches than the shapes call for, however often a cache answers.
fn assert_moves(what: &str, reports: &[LaunchReport], model: u64, raw: u64) {
    let moved: u64 = reports.iter().map(|report| report.moved(CACHES.bytes)).sum();
    let most = model + 4 * 32 * reports.len() as u64;
    assert!(moved <= most, "{what}: {moved} bytes are moved, the model has {most}");
    // A cache of no bytes keeps nothing. Twice: tiles at the edges are not full, and a warp's lanes may share a sector with another's.
    let asked: u64 = reports.iter().map(|report| report.moved(0)).sum();
    assert!(asked <= 2 * raw, "{what}: {asked} bytes of sectors are asked for, the shapes call for {raw}");
}

/// A layer on an offline device of its own, with what the oracle needs.
struct Case {
    device: OfflineDevice,
    layer: MemoryLayer<OfflineRuntime>,
    weights: Weights<'static>,
    input: Vec<f32>,
    grad_output: Vec<f32>,
}

impl Case {
    fn new(
        config: &MemoryConfig,
        weights: &Weights<'_>,
        input: &[f32],
        grad_output: &[f32],
        dtype: ElementType,
    ) -> Self {
        Self::on(Gpu::H100, config, weights, [input, grad_output], dtype)
    }

    fn on(
        gpu: Gpu,
        config: &MemoryConfig,
        weights: &Weights<'_>,
        [input, grad_output]: [&[f32]; 2],
        dtype: ElementType,
    ) -> Self {
        let device = OfflineDevice::of(gpu);
        let client = OfflineRuntime::client(&device);
        let weights = weights.rounded(dtype);
        let layer = MemoryLayer::new(&client, config.clone(), &weights, dtype).unwrap();
        let round = |numbers: &[f32]| HostTensor::from_f32([numbers.len()], numbers).unwrap().cast(dtype).to_f32();
        let case = Self { device, layer, weights, input: round(input), grad_output: round(grad_output) };
        assert_clean("preparing the weights", &case.reports());
        case
    }

    fn random(dims: Dimensions, tokens: usize, dtype: ElementType, seed: usize) -> Self {
        Self::random_on(Gpu::H100, dims, tokens, dtype, seed)
    }

    fn random_on(gpu: Gpu, dims: Dimensions, tokens: usize, dtype: ElementType, seed: usize) -> Self {
        let config = MemoryConfig::new(dims).unwrap();
        let weights = Weights::random(&config, seed as u64);
        let count = tokens * config.hidden_size;
        Self::on(gpu, &config, &weights, [&numbers(count, seed), &numbers(count, seed + 1)], dtype)
    }

    /// The forward pass by each of `strategies`; returns the matrix units' products.
    fn hold_forward(&self, what: &str, strategies: &[Strategies]) -> u64 {
        let (layer, config) = (&self.layer, self.layer.config());
        let expected = reference::forward(config, &self.weights, &self.input).unwrap();
        let input = layer.upload(&self.input).unwrap();
        let mut products = 0;
        for &strategies in strategies {
            let what = format!("{what}, {}, {strategies:?}", layer.dtype());
            let tokens = self.input.len() / config.hidden_size;
            let plans = layer.plans(tokens, strategies).unwrap();
            let modelled: BTreeMap<_, _> = config.traffic(layer.dtype(), &plans, CACHES).into_iter().collect();
            let most = Raw::new(config, tokens, layer.dtype());
            let queries = layer.query(&input, strategies.query).unwrap();
            products += self.hold_launches(&format!("{what}, query"), modelled["query"], most.query());
            let (_, chosen) = layer.retrieve(&queries, strategies.score).unwrap();
            // With the queries' norm weight, which the model leaves out.
            let retrieve = modelled["score"] + modelled["combine"] + 4 * config.key_dim as u64;
            products += self.hold_launches(&format!("{what}, retrieve"), retrieve, most.retrieve());
            let weighed = layer.weigh(&input, &chosen, strategies.query).unwrap();
            if weighed.is_some() {
                products += self.hold_launches(&format!("{what}, weigh"), modelled["weigh"], most.weigh());
            }
            let weighed = weighed.as_ref().map_or(&chosen, |(_, weighed)| &weighed.chosen);
            let output = layer.expand(&input, weighed, strategies).unwrap();
            products += self.hold_launches(&format!("{what}, expand"), modelled["expand"], most.expand());
            let (output, slots) = (layer.read(&output).unwrap(), layer.read_slots(&chosen).unwrap());
            assert_close(&what, &wide(&output), &self.expected(&what, &expected, &slots), tolerances(layer.dtype()).0);
        }
        products
    }

    /// The output that `slots` call for, every slot judged by its score: where two are equal but for rounding, a token may choose otherwise.
    fn expected(&self, what: &str, oracle: &reference::Forward, slots: &[u32]) -> Vec<f64> {
        let (config, weights) = (self.layer.config(), &self.weights);
        let judged = reference::judge(config, weights, &self.input, slots, &oracle.slots, 1e-5).unwrap();
        assert!(judged.right(), "{what}: {judged:?}");
        let (entries, width) = (config.heads * config.top_m, config.hidden_size);
        let mut output = oracle.output.clone();
        for &token in &judged.tokens {
            let row = &self.input[token * width..][..width];
            let chosen = reference::score_slots(config, weights, row, &slots[token * entries..][..entries]).unwrap();
            let weighed = reference::weigh(config, weights, row, &chosen).unwrap();
            let expanded = reference::expand(config, weights, row, &chosen.slots, &weighed.scores).unwrap();
            output[token * width..][..width].copy_from_slice(&expanded);
        }
        output
    }

    /// The backward pass, against the oracle's for the slots that the device chose.
    fn hold_backward(&self, what: &str) {
        let (layer, config) = (&self.layer, self.layer.config());
        let (input, grad_output) = (layer.upload(&self.input).unwrap(), layer.upload(&self.grad_output).unwrap());
        let (forward, saved) = layer.forward_saving(&input).unwrap();
        assert_clean(what, &self.reports());
        let tokens = self.input.len() / config.hidden_size;
        let most = Raw::new(config, tokens, layer.dtype());
        let modelled: BTreeMap<_, _> = layer.backward_traffic(tokens, CACHES).into_iter().collect();
        let hold =
            |stage: &str, most: u64| self.hold_launches(&format!("{what}, {stage} backward"), modelled[stage], most);
        let expand = layer.expand_backward(&saved, &grad_output).unwrap();
        hold("expand", most.expand_backward());
        let weigh = layer.weigh_backward(&saved, &expand).unwrap();
        if weigh.is_some() {
            hold("weigh", most.weigh_backward());
        }
        let grad_scores = weigh.as_ref().map_or(&expand.scores, |weigh| &weigh.scores);
        let combine = layer.combine_backward(&saved, grad_scores).unwrap();
        hold("combine", most.combine_backward());
        let score = layer.score_backward(&saved, &combine.sides).unwrap();
        hold("score", most.score_backward());
        let (z, pre_values) = weigh.map_or((None, None), |weigh| (Some(weigh.z), Some(weigh.pre_values)));
        let other = if config.capabilities.gated { None } else { Some(input.clone()) };
        let wrong = MapGradients { gate: other, output_gate: expand.output_gate.clone(), z: z.clone() };
        assert!(
            layer.query_backward(&input, &score.query, &wrong).is_err(),
            "{what}: a gate's gradient too many or too few"
        );
        let maps = MapGradients { gate: expand.gate, output_gate: expand.output_gate, z };
        let InputGradients { input: of_input, mut tensors } =
            layer.query_backward(&input, &score.query, &maps).unwrap();
        hold("query", most.query_backward());
        for (weight, gradient) in [
            (Weight::QueryNorm, score.query_norm),
            (Weight::KeysNorm, score.keys_norm),
            (Weight::Cores, combine.core),
            (Weight::ValuesProj, expand.weight),
            (Weight::ValuesBias, expand.bias),
        ] {
            tensors[weight] = gradient;
        }
        let gradients = Gradients { input: of_input, tensors, keys: score.keys, values: expand.values, pre_values };
        let slots = layer.read_slots(&forward.chosen).unwrap();
        let found = layer.read_gradients(&gradients).unwrap();
        let scores = wide(&layer.read(&forward.chosen.scores).unwrap());
        let chosen = reference::Chosen { slots: slots.clone(), scores, totals: Vec::new() };
        let weighed = reference::weigh(config, &self.weights, &self.input, &chosen).unwrap();
        let output = reference::expand(config, &self.weights, &self.input, &slots, &weighed.scores).unwrap();
        let found_output = wide(&layer.read(&forward.output).unwrap());
        assert_close(&format!("{what}, output"), &found_output, &output, tolerances(layer.dtype()).0);
        let expected = reference::backward(config, &self.weights, &self.input, &slots, &self.grad_output).unwrap();
        assert!(found.values.keys().eq(expected.values.keys()), "{what}: used rows");
        let (found, expected) = (found.named(config).unwrap(), expected.named(config).unwrap());
        for ((name, found), (_, expected)) in found.iter().zip(&expected) {
            let what = format!("{what}, {}, {name}", layer.dtype());
            assert_close(&what, &wide(&found.to_f32()), &wide(&expected.to_f32()), tolerances(layer.dtype()).1);
        }
    }

    /// What was launched since the last call is clean and moves no more than `model` and `raw` say, which are those of a table in one page: in
    /// several, a launch writes the scores' gradients of its own alone. Returns the matrix units' products.
    fn hold_launches(&self, what: &str, model: u64, raw: u64) -> u64 {
        let reports = self.reports();
        if self.layer.table().pages().len() == 1 {
            assert_moves(what, &reports, model, raw);
            return assert_clean(what, &reports);
        }
        let (by_page, others): (Vec<_>, Vec<_>) =
            reports.into_iter().partition(|report| report.kernel.name.contains("row_products_kernel"));
        assert!(by_page.iter().all(|report| report.executed && report.faults.is_empty()), "{what}: scores' gradients");
        assert_clean(what, &others)
    }

    /// The same layer with its table in pages of `page_rows` rows.
    fn in_pages(self, page_rows: usize) -> Self {
        let (client, config, dtype) = (self.layer.client(), self.layer.config().clone(), self.layer.dtype());
        let values = ValueTable::upload_in_pages(client, &self.weights[Weight::Values], dtype, page_rows).unwrap();
        let weights = LayerWeights::upload(client, &config, &self.weights, dtype).unwrap();
        let layer = MemoryLayer::from_device(client, config, LayerWeights { values, ..weights }).unwrap();
        let case = Self { layer, ..self };
        assert_clean("preparing the weights", &case.reports());
        case
    }

    /// What was launched since the last call.
    fn reports(&self) -> Vec<LaunchReport> {
        block_on(self.layer.client().sync()).unwrap();
        self.device.take_reports()
    }
}

fn dimensions() -> Dimensions {
    Dimensions { hidden_size: 32, side_keys: 16, key_dim: 16, top_m: 4, value_dim: 32, ..Dimensions::default() }
}

fn product_keys(kind: Kind) -> Dimensions {
    Dimensions { capabilities: kind.capabilities(), tucker_rank: 1, cores: 1, expansion: 1, ..dimensions() }
}

/// Scoring and combining in one kernel gives what the two stages give, to the bit.
#[test]
fn retrieving_is_scoring_and_combining() {
    for dims in [dimensions(), product_keys(Kind::ProductKey)] {
        let Case { layer, input, .. } = Case::random(dims, 5, ElementType::F32, 11);
        let query = layer.query(&layer.upload(&input).unwrap(), ProjectStrategy::Tile).unwrap();
        let split = ScoreStrategy::Split { splits: 3 };
        let (kept, chosen) = layer.retrieve(&query, split).unwrap();
        let apart = layer.score(&query, split).unwrap();
        let of_apart = layer.combine(&apart).unwrap();
        let keys = |kept: &Kept<_>| layer.read_slots(&Chosen { slots: kept.keys.clone(), scores: kept.scores.clone() });
        assert_eq!(keys(&kept).unwrap(), keys(&apart).unwrap());
        assert_eq!(layer.read(&kept.scores).unwrap(), layer.read(&apart.scores).unwrap());
        assert_eq!(layer.read_slots(&chosen).unwrap(), layer.read_slots(&of_apart).unwrap());
        assert_eq!(layer.read(&chosen.scores).unwrap(), layer.read(&of_apart.scores).unwrap());
    }
}

/// Matrix units take products of half-precision numbers, and must have been asked for some.
#[test]
fn every_strategy_and_type_agrees_with_the_oracle() {
    for dtype in TYPES {
        let case = Case::random(dimensions(), 33, dtype, 3);
        let products = case.hold_forward("forward", &every_strategy());
        assert_eq!(products > 0, dtype != ElementType::F32, "{dtype}: {products} products of matrix units");
    }
}

/// Keys that fill no whole tile, no whole group of 16 and no whole split, tokens that leave a tile half empty, and a tile of the smaller kind.
#[test]
fn scores_of_matrix_units_agree_with_the_oracle() {
    let wide = Dimensions { side_keys: 150, key_dim: 64, top_m: 24, ..dimensions() };
    let pairs = Dimensions { side_keys: 30, ..product_keys(Kind::ProductKey) };
    let v2 = Kind::UltraMemV2.capabilities();
    let shapes = [
        ("UltraMem", 70, ElementType::BF16, wide.clone()),
        ("rank 3, LayerNorm", 33, ElementType::F16, Dimensions { tucker_rank: 3, norm: Norm::Layer, ..wide.clone() }),
        ("long queries", 20, ElementType::BF16, Dimensions { key_dim: 256, ..wide.clone() }),
        ("product keys", 70, ElementType::F16, Dimensions { key_dim: 32, ..pairs }),
        ("a pair for two heads", 40, ElementType::BF16, Dimensions { capabilities: v2, heads: 4, pre_dim: 8, ..wide }),
    ];
    for (what, tokens, dtype, dims) in shapes {
        let case = Case::random(dims.clone(), tokens, dtype, tokens);
        let filtered = (ScoreStrategy::Filtered, "filter_keys_kernel");
        let split = |splits| (ScoreStrategy::Split { splits }, "approximate_matrix_kernel");
        // Three ranks do not fall into pairs, and few tokens fill no tile.
        let filters = dims.tucker_rank != 3 && tokens > 32;
        let all = [split(1), split(2), split(5), if filters { filtered } else { split(1) }];
        for (score, kernel) in all {
            let (query, expand) = (ProjectStrategy::Tile, ExpandStrategy::Fused);
            let strategies = Strategies { query, score, expand };
            let launches = case.layer.plans(tokens, strategies).unwrap().launches();
            assert!(launches.iter().any(|(_, it)| it.kernel == kernel), "{what}: {launches:?}");
            case.hold_forward(what, &[strategies]);
        }
    }
}

/// What NVRTC makes for sm_80 is other code: no matrix units of Hopper, another shared memory.
#[test]
fn an_a100_agrees_with_the_oracle() {
    for dtype in TYPES {
        let case = Case::random_on(Gpu::A100, dimensions(), 33, dtype, 13);
        let products = case.hold_forward("forward on sm_80", &every_strategy());
        assert_eq!(products > 0, dtype != ElementType::F32, "{dtype}: {products} products of matrix units");
    }
    Case::random_on(Gpu::A100, dimensions(), 33, ElementType::BF16, 15).hold_backward("sm_80");
}

#[test]
fn gradients_agree_with_the_oracle() {
    for dtype in TYPES {
        Case::random(dimensions(), 33, dtype, 5).hold_backward("UltraMem");
    }
    Case::random(product_keys(Kind::ProductKey), 20, ElementType::F32, 6).hold_backward("product keys");
    Case::random(product_keys(Kind::MemoryPlus), 20, ElementType::BF16, 7).hold_backward("Memory+");
}

/// As many tokens as matrix units take: gates, whose gradients are f32, too.
#[test]
fn gradients_by_matrix_units_agree_with_the_oracle() {
    let gates = Capabilities { output_gated: true, ..Kind::LinguaMemoryPlus.capabilities() };
    let gated = Dimensions { capabilities: gates, ..product_keys(Kind::Peer) };
    for (name, dims) in [("UltraMem", dimensions()), ("lingua's Memory+, both gates", gated)] {
        let case = Case::random(dims, 70, ElementType::BF16, 17);
        assert_eq!(case.layer.strategies(70).query, ProjectStrategy::Matrix);
        case.hold_backward(name);
    }
}

/// The capabilities that UltraMem and product keys don't have, each in its kind and in another type.
#[test]
fn the_family_agrees_with_the_oracle() {
    let shared = Some(SharedTable { rows: 80, offset: 70 });
    let v2 = Dimensions { capabilities: Kind::UltraMemV2.capabilities(), pre_dim: 16, shared, ..dimensions() };
    let gelu = Some(Weigh { projected: true, activation: ultramem::Activation::Gelu });
    let apart = Capabilities { weigh: gelu, blocks: Blocks::Apart, ..v2.capabilities };
    let gated = Capabilities { output_gated: true, ..Kind::LinguaMemoryPlus.capabilities() };
    let narrow = Capabilities { gated: false, ..gated };
    let peer = Dimensions { pre_dim: 32, ..product_keys(Kind::Peer) };
    for (name, dims, dtype) in [
        ("UltraMemV2", v2.clone(), ElementType::F32),
        ("UltraMemV2 in bf16", v2.clone(), ElementType::BF16),
        ("UltraMemV2, blocks apart, gelu", Dimensions { capabilities: apart, ..v2 }, ElementType::F16),
        ("lingua's Memory+", product_keys(Kind::LinguaMemoryPlus), ElementType::BF16),
        (
            "lingua's Memory+, both gates",
            Dimensions { capabilities: gated, ..product_keys(Kind::Peer) },
            ElementType::F32,
        ),
        (
            "lingua's Memory+, an output gate",
            Dimensions { capabilities: narrow, value_dim: 24, ..product_keys(Kind::Peer) },
            ElementType::F32,
        ),
        ("PEER", peer.clone(), ElementType::F32),
        ("PEER in bf16", peer, ElementType::BF16),
    ] {
        let case = Case::random(dims, 20, dtype, 8);
        case.hold_forward(name, &[case.layer.strategies(20)]);
        case.hold_backward(name);
    }
}

#[test]
fn awkward_shapes_agree_with_the_oracle() {
    let primes = Dimensions { hidden_size: 13, side_keys: 34, key_dim: 7, top_m: 5, value_dim: 22, ..dimensions() };
    let layer_norm = Dimensions { tucker_rank: 3, heads: 3, norm: Norm::Layer, ..dimensions() };
    let high_rank = Dimensions { tucker_rank: 16, heads: 1, cores: 1, norm: Norm::Layer, ..dimensions() };
    for (name, dims, tokens) in
        [("primes", primes, 9), ("one token", dimensions(), 1), ("rank 3", layer_norm, 6), ("rank 16", high_rank, 4)]
    {
        let case = Case::random(dims, tokens, ElementType::F32, 9);
        case.hold_forward(name, &[case.layer.strategies(tokens)]);
        case.hold_backward(name);
    }
}

/// 64 rows in pages of 25.
#[test]
fn tables_in_pages_agree_with_the_oracle() {
    for dtype in TYPES {
        let case = Case::random(dimensions(), 33, dtype, 13).in_pages(25);
        assert_eq!(case.layer.table().page_rows(), [25, 25, 14]);
        let strategies =
            PRODUCTS.map(|product| Strategies { expand: ExpandStrategy::Pooled(product), ..case.layer.strategies(33) });
        case.hold_forward("pages", &strategies);
        case.hold_backward("pages");
    }
    Case::random(product_keys(Kind::MemoryPlus), 20, ElementType::F32, 14)
        .in_pages(100)
        .hold_backward("pages, Memory+");
}

/// What two backward passes give, of which the first lists two rows of three and the second three of three.
#[test]
fn gradients_of_several_passes_add_up() {
    let bench = Bench::new(ElementType::F32);
    let part = |rows: [u32; 3], count: u32, first: f32| {
        let gradients: Vec<f32> = (0..12).map(|i| first + i as f32).collect();
        let rows = from_u32(&bench.client, &[3], &rows).unwrap();
        let count = from_u32(&bench.client, &[1], &[count]).unwrap();
        let gradients = from_f32(&bench.client, &[3, 4], &gradients).unwrap();
        RowGradients::new(&bench.client, &rows, &count, &gradients, 9).unwrap()
    };
    let parts = [part([2, 7, u32::MAX], 2, 10.0), part([0, 7, 8], 3, 100.0)];
    let dense = RowGradients::sum(&bench.client, &parts, 9).unwrap().dense(&bench.client, 9).unwrap();
    let mut expected = vec![0.0; 36];
    for (row, first) in [(2, 10.0), (7, 14.0), (0, 100.0), (7, 104.0), (8, 108.0)] {
        (0..4).for_each(|c| expected[row * 4 + c] += first + c as f64);
    }
    bench.hold("sum", &dense, &expected);
}

#[test]
fn golden_files_agree() {
    for name in ["ultramem_v1_tiny", "ultramem_v1_two_heads", "ultramem_v1_layernorm_single_core", "memory_plus_tiny"] {
        let path = format!("{}/../tests/fixtures/{name}.safetensors", env!("CARGO_MANIFEST_DIR"));
        let file = Checkpoint::open(path).unwrap();
        let (input, grad) = (file.tensor("input").unwrap().to_f32(), file.tensor("grad_output").unwrap().to_f32());
        let case = Case::new(file.config(), &file.weights().unwrap(), &input, &grad, ElementType::F32);
        let tokens = input.len() / file.config().hidden_size;
        case.hold_forward(name, &[case.layer.strategies(tokens)]);
        case.hold_backward(name);
    }
}
