//! What a forward pass, a backward pass and an update must cost: the bytes that each stage has to move and the operations it has to
//! do, counted from the dimensions alone; and, beside that, what our launches do move.
//!
//! Bytes are counted once for everything that all tokens share (weights, keys), and once per token for what a token
//! reads by itself: the value rows above all, of which no cache can be counted on to hold a large table. What stays in
//! shared memory or registers counts nothing. Sizes too large for a `u64` saturate.

mod backward;

use ultramem_kernels::block_of;
use ultramem_kernels::expand::ExpandPlans;
use ultramem_kernels::linear::ProductPlans;

use crate::{ElementType, MemoryConfig, Plans, Scores};

/// The cost of one forward pass, or of one backward pass, stage by stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    /// The query projection.
    pub query: StageCost,
    /// Scoring the keys.
    pub score: StageCost,
    /// Pairing the kept keys.
    pub combine: StageCost,
    /// Reading the pre-values and multiplying the scores; nothing for a layer without them.
    pub weigh: StageCost,
    /// Reading, pooling and projecting the values, and the gates where there are some.
    pub expand: StageCost,
}

/// The least that a stage can do with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StageCost {
    /// Bytes read and written.
    pub bytes: u64,
    /// Floating-point operations; a multiplication and an addition are two.
    pub flops: u64,
}

impl Cost {
    /// The stages that cost something with their names, in their order.
    pub fn stages(&self) -> Vec<(&'static str, StageCost)> {
        let all = [
            ("query", self.query),
            ("score", self.score),
            ("combine", self.combine),
            ("weigh", self.weigh),
            ("expand", self.expand),
        ];
        all.into_iter().filter(|(_, stage)| stage.bytes > 0).collect()
    }

    /// The stages together, each as if it ran alone: what one hands to the next is written once and read once.
    pub fn total(&self) -> StageCost {
        let all = |part: fn(&StageCost) -> u64| -> Vec<u128> {
            self.stages().iter().map(|(_, stage)| u128::from(part(stage))).collect()
        };
        StageCost { bytes: sum(&all(|stage| stage.bytes)), flops: sum(&all(|stage| stage.flops)) }
    }
}

impl MemoryConfig {
    /// What a forward pass over `tokens` tokens must cost with weights and activations of `dtype`.
    pub fn cost(&self, tokens: usize, dtype: ElementType) -> Cost {
        let sizes = Sizes::new(self, tokens, dtype);
        Cost {
            query: sizes.query(),
            score: sizes.score(),
            combine: sizes.combine(),
            weigh: sizes.weigh(),
            expand: sizes.expand(),
        }
    }

    /// Bytes that one token reads of the memory itself: its value rows, its pre-value rows where there are some, and, where slots are
    /// shuffled, their addresses.
    pub fn bytes_read_per_token(&self, dtype: ElementType) -> u64 {
        let sizes = Sizes::new(self, 1, dtype);
        sum(&[sizes.shuffle(), sizes.rows(), sizes.pre_rows()])
    }
}

/// The memory of a device, as far as the bytes that launches move hang on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caches {
    /// Bytes of the last cache before device memory.
    pub bytes: u64,
}

impl Caches {
    /// Whether a tensor of `bytes` stays in the cache for the length of a launch.
    fn hold(&self, bytes: u128) -> bool {
        2 * bytes <= u128::from(self.bytes)
    }

    /// What a weight of `bytes` moves that every `tile` of the tokens reads whole.
    fn weight(&self, bytes: u128, tokens: usize, tile: usize) -> u128 {
        if self.hold(bytes) { bytes } else { bytes * wide(tokens.div_ceil(tile.max(1))) }
    }

    /// What a table of `table` bytes moves of which each of `reads` reads takes `width` bytes, `distinct` of them different.
    fn gather(&self, table: u128, reads: u128, distinct: u128, width: u128) -> u128 {
        if self.hold(table) { (distinct * sectors(width)).min(table) } else { reads * sectors(width) }
    }
}

/// How many different things the tokens of a pass choose, which hangs on the input: what several choose is moved once where a cache holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choices {
    /// Slots.
    pub slots: usize,
    /// Rows of the value table.
    pub rows: usize,
    /// Keys that are kept, of all heads and both sides.
    pub kept: usize,
    /// Keys of the chosen slots, likewise.
    pub keys: usize,
    /// Parts, each in a block of sorted entries ([`block_of`](ultramem_kernels::block_of)), of the rows that lie in several blocks.
    pub row_parts: usize,
    /// The same of keys.
    pub key_parts: usize,
}

impl Choices {
    /// The most that `tokens` tokens can choose: as if no two chose the same, as far as there are so many.
    pub fn most(config: &MemoryConfig, tokens: usize) -> Self {
        let entries = tokens.saturating_mul(config.heads * config.top_m);
        let keys = entries.saturating_mul(2).min(config.heads * 2 * config.side_keys);
        let (slots, rows) = (entries.min(config.slots()), entries.min(config.rows()));
        // A block's first row and its last may lie in others, too, where several entries have one row.
        let parts = |entries: usize, rows: usize| match entries.div_ceil(block_of(entries, rows)) {
            blocks if entries > rows => 2 * (blocks - 1),
            _ => 0,
        };
        let (row_parts, key_parts) = (parts(entries, rows), parts(entries.saturating_mul(2), keys));
        Self { slots, rows, kept: keys, keys, row_parts, key_parts }
    }
}

/// Bytes of a sector, the least that a GPU moves.
const SECTOR: u128 = 32;

impl MemoryConfig {
    /// Bytes that the launches of a forward pass move between device memory and chip, stage by stage, given their plans. A tensor
    /// that takes up to half of the cache is moved once a launch, however often it is read; a larger one as often as it is read, in
    /// whole sectors. What the cubes that share out a few tokens' projection gather again comes from the cache that the first of them left
    /// it in. Where scoring and combining are one kernel, what the first keeps is not read again, and they move that much less.
    pub fn traffic(&self, dtype: ElementType, plans: &Plans, caches: Caches) -> Vec<(&'static str, u64)> {
        self.traffic_of(Choices::most(self, plans.tokens), dtype, plans, caches)
    }

    /// The same for tokens that choose as many different rows and keys as `choices` says.
    pub fn traffic_of(
        &self,
        choices: Choices,
        dtype: ElementType,
        plans: &Plans,
        caches: Caches,
    ) -> Vec<(&'static str, u64)> {
        let sizes = Sizes::new(self, plans.tokens, dtype);
        let weight = |bytes, tile| caches.weight(bytes, plans.tokens, tile);
        let tile_of = |product: Option<ProductPlans>| product.map_or(plans.tile, |it| it.tile());
        // Parts are written by the product and read by their sum.
        let parts = |product: Option<ProductPlans>| 2 * wide(product.map_or(0, |it| it.parts_bytes()));
        let gather = |table, reads, distinct, width| caches.gather(table, reads, wide(distinct), width);
        let (heads, side_keys) = (wide(self.heads), wide(self.side_keys));
        let key = sizes.key_dim * sizes.element;
        let keys = heads * 2 * side_keys * key;
        let projected = heads * 2 * wide(plans.retrieve.keys_read()) * key;
        let [_, approximate] = plans.retrieve.approximate_numbers(plans.tokens).map(wide);
        let chunks = wide(plans.retrieve.chunks());
        let exact = if self.tucker() { sizes.rank } else { 0 };
        let kept_rows = sizes.tokens * sizes.entries * 2;
        // Each chunk of tokens reads the keys anew. Matrix units multiply every normalised key; elsewhere the kept ones are read.
        let of_chunk = plans.tokens.div_ceil(plans.retrieve.chunks().max(1));
        let projected = chunks * caches.weight(projected, of_chunk, plans.retrieve.tile());
        let on_units = plans.retrieve.on_matrix_units();
        // Scores of split keys are written, all of them, and read, the approximate ones and those of what is kept.
        let kept = if on_units && exact > 0 { wide(self.top_m) * sectors(sizes.rank * WORD) } else { 0 };
        let read = if approximate > 0 { sizes.tokens * heads * 2 * (side_keys * WORD + kept) } else { 0 };
        let scores = approximate * WORD + read;
        let normalised = match on_units {
            true => 0,
            false => chunks * gather(keys * exact, kept_rows / chunks.max(1), choices.kept, exact * key),
        };
        // A layer may have more pairs of queries than its heads use.
        let pairs = wide(self.heads.div_ceil(self.heads_per_pair()));
        let queries = sizes.queries() / wide(self.query_pairs()) * pairs;
        let query_reads = if approximate > 0 && !on_units { 2 * queries } else { queries };
        let shuffle = if self.capabilities.shuffled {
            gather(wide(self.slots()) * WORD, sizes.tokens * sizes.entries, choices.slots, WORD)
        } else {
            0
        };
        let rows_of = |width: u128| {
            let row = width * sizes.element;
            gather(wide(self.rows()) * row, sizes.tokens * sizes.entries, choices.rows, row)
        };
        let map = |product, width: u128, biased: bool| {
            // The bias itself, and what it is added to, read and written again.
            let bias = if biased { (1 + 2 * sizes.tokens) * width * WORD } else { 0 };
            let map = weight(width * sizes.hidden * sizes.element, tile_of(product)) + sizes.tokens * width * WORD;
            sizes.input() + map + parts(product) + bias
        };
        let of = &self.capabilities;
        let mut stages = vec![
            ("query", sum(&[map(plans.query.product, sizes.query_width(), of.biased)])),
            ("score", sum(&[query_reads, projected, scores, normalised, sizes.kept()])),
            ("combine", sum(&[sizes.kept(), sizes.chosen()])),
        ];
        if let Some(weigh) = of.weigh {
            let (projected, z) = match weigh.projected {
                true => {
                    (map(plans.weigh.and_then(|it| it.z), sizes.pre_dim, false), sizes.tokens * sizes.pre_dim * WORD)
                }
                false => (0, sizes.input()),
            };
            let moved = [projected, z, sizes.chosen(), shuffle, rows_of(sizes.pre_dim), sizes.weighed()];
            stages.push(("weigh", sum(&moved)));
        }
        let (pooled, tile) = match plans.expand {
            ExpandPlans::Fused { expand, .. } => (0, expand.plan.tile),
            ExpandPlans::Pooled { project, .. } => {
                let pooled = 2 * sizes.tokens * wide(self.pooled_dim()) * sizes.pooled_element();
                (pooled + parts(project), tile_of(project))
            }
        };
        let finished = if of.projects && sizes.finishes() { 2 * sizes.tokens * sizes.hidden * WORD } else { 0 };
        let bias = if of.projects && of.biased { sizes.hidden * WORD } else { 0 };
        let read = |bytes: u128| sizes.tokens * bytes * WORD;
        let gate = if of.gated {
            map(plans.gate.and_then(|it| it.product), sizes.value_dim, of.biased) + read(sizes.value_dim)
        } else {
            0
        };
        let output_gate =
            if of.output_gated { map(plans.output_gate.and_then(|it| it.product), 1, true) + read(1) } else { 0 };
        let output = weight(sizes.output() * sizes.element, tile);
        let (rows, chosen) = (rows_of(sizes.value_dim), sizes.chosen());
        let moved = [chosen, shuffle, rows, pooled, output, sizes.input(), gate, output_gate, finished, bias];
        stages.push(("expand", sum(&moved)));
        stages
    }
}

/// Bytes that a read of `width` bytes moves: its sectors, and one more where they need not begin at one.
fn sectors(width: u128) -> u128 {
    if width.is_multiple_of(SECTOR) || SECTOR.is_multiple_of(width.max(1)) {
        return width.next_multiple_of(SECTOR);
    }
    width.next_multiple_of(SECTOR) + SECTOR
}

/// The dimensions as wide numbers, and the tensors that more than one stage moves, in bytes.
struct Sizes<'a> {
    config: &'a MemoryConfig,
    tokens: u128,
    element: u128,
    hidden: u128,
    /// `heads · top_m`.
    entries: u128,
    rank: u128,
    key_dim: u128,
    value_dim: u128,
    pre_dim: u128,
}

/// Bytes of an f32 or a u32.
const WORD: u128 = 4;

impl<'a> Sizes<'a> {
    fn new(config: &'a MemoryConfig, tokens: usize, dtype: ElementType) -> Self {
        Self {
            config,
            tokens: wide(tokens),
            element: wide(dtype.size()),
            hidden: wide(config.hidden_size),
            entries: wide(config.heads) * wide(config.top_m),
            rank: wide(config.tucker_rank),
            key_dim: wide(config.key_dim),
            value_dim: wide(config.value_dim),
            pre_dim: wide(config.pre_dim),
        }
    }

    fn query(&self) -> StageCost {
        let weight = self.hidden * self.query_width();
        let bytes = [self.input(), weight * self.element, self.queries()];
        StageCost { bytes: sum(&bytes), flops: sum(&[2 * self.tokens * weight]) }
    }

    fn score(&self) -> StageCost {
        let (heads, side_keys) = (wide(self.config.heads), wide(self.config.side_keys));
        let projected = heads * 2 * self.key_dim * side_keys * self.element;
        let exact = if self.config.tucker() { self.rank } else { 0 };
        let rows = (self.tokens * wide(self.config.top_m)).min(side_keys);
        let normalised = rows * heads * 2 * exact * self.key_dim * self.element;
        let dots = side_keys + wide(self.config.top_m) * exact;
        StageCost {
            bytes: sum(&[self.queries(), projected, normalised, self.kept()]),
            flops: sum(&[2 * self.tokens * heads * 2 * dots * self.key_dim]),
        }
    }

    fn combine(&self) -> StageCost {
        let top_m = self.config.top_m;
        let pairs = match self.config.capabilities.scores {
            Scores::Additive => (1..=top_m).map(|x| wide(top_m / x)).sum(),
            Scores::Tucker => wide(top_m) * wide(top_m) * 2 * self.rank,
        };
        StageCost {
            bytes: sum(&[self.kept(), self.chosen()]),
            flops: sum(&[self.tokens * wide(self.config.heads) * pairs]),
        }
    }

    fn weigh(&self) -> StageCost {
        let Some(weigh) = self.config.capabilities.weigh else { return StageCost { bytes: 0, flops: 0 } };
        let projection = if weigh.projected { self.hidden * self.pre_dim } else { 0 };
        let bytes =
            [self.input(), projection * self.element, self.chosen(), self.shuffle(), self.pre_rows(), self.weighed()];
        let flops = 2 * self.tokens * (projection + self.entries * self.pre_dim);
        StageCost { bytes: sum(&bytes), flops: sum(&[flops]) }
    }

    fn expand(&self) -> StageCost {
        let of = &self.config.capabilities;
        let (output, gate) = (self.output(), if of.gated { self.value_dim * self.hidden } else { 0 });
        let gating = match of.gated {
            true => self.input() + gate * self.element + 2 * self.tokens * self.value_dim * WORD,
            false => 0,
        };
        let (output_gate, output_gating) = match of.output_gated {
            true => (self.hidden, self.input() + self.hidden * self.element + 2 * self.tokens * WORD),
            false => (0, 0),
        };
        StageCost {
            bytes: sum(&[
                self.chosen(),
                self.shuffle(),
                self.rows(),
                output * self.element,
                self.input(),
                gating,
                output_gating,
            ]),
            flops: sum(&[2 * self.tokens * (self.entries * self.value_dim + output + gate + output_gate)]),
        }
    }

    /// Numbers of W_o.
    fn output(&self) -> u128 {
        if self.config.capabilities.projects { wide(self.config.pooled_dim()) * self.hidden } else { 0 }
    }

    /// Whether something is done to pooled or projected values before they are the output.
    fn finishes(&self) -> bool {
        let of = &self.config.capabilities;
        !of.projects || of.biased || of.output_gated
    }

    /// Bytes of a pooled number.
    fn pooled_element(&self) -> u128 {
        if self.config.capabilities.projects { self.element } else { WORD }
    }

    fn query_width(&self) -> u128 {
        wide(self.config.query_pairs()) * 2 * self.key_dim
    }

    fn input(&self) -> u128 {
        self.tokens * self.hidden * self.element
    }

    fn queries(&self) -> u128 {
        self.tokens * self.query_width() * WORD
    }

    /// The kept keys of both sides and their scores.
    fn kept(&self) -> u128 {
        self.tokens * self.entries * 2 * (WORD + WORD * self.rank)
    }

    /// The chosen slots and their scores.
    fn chosen(&self) -> u128 {
        self.tokens * self.entries * (WORD + WORD * wide(self.config.cores))
    }

    fn shuffle(&self) -> u128 {
        if self.config.capabilities.shuffled { self.tokens * self.entries * WORD } else { 0 }
    }

    fn rows(&self) -> u128 {
        self.tokens * self.entries * self.value_dim * self.element
    }

    fn pre_rows(&self) -> u128 {
        self.tokens * self.entries * self.pre_dim * self.element
    }

    /// What weighing writes: scores, and a product a slot.
    fn weighed(&self) -> u128 {
        self.tokens * self.entries * WORD * (1 + wide(self.config.cores))
    }
}

// No product below overflows: a checked configuration keeps the dimensions beside `tokens` below 2⁶⁰ in any product here.
fn wide(size: usize) -> u128 {
    size as u128
}

fn sum(parts: &[u128]) -> u64 {
    u64::try_from(parts.iter().sum::<u128>()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use cubecl::ir::HardwareProperties;
    use ultramem_kernels::launch::{Device, Features};
    use ultramem_kernels::{expand::ExpandStrategy, linear::ProjectStrategy, score::ScoreStrategy};

    use super::*;
    use crate::{Dimensions, Kind, Strategies};

    fn preset() -> MemoryConfig {
        MemoryConfig::new(Dimensions::ultramem_v1_1b()).expect("the preset is sound")
    }

    #[test]
    fn one_token_of_the_preset_reads_160_rows() {
        assert_eq!(preset().bytes_read_per_token(ElementType::BF16), 160 * (768 + 4));
        let score = preset().cost(1, ElementType::BF16).score.flops;
        assert_eq!(score, 2 * 2 * 2 * (1616 + 80 * 2) * 192);
    }

    #[test]
    fn the_paper_s_small_model_has_its_parameters() {
        let config = MemoryConfig::new(Dimensions::ultramem_151m()).expect("the preset is sound");
        let sparse = 3 * config.rows() * config.value_dim;
        let total = sparse as f64 + 0.172e9;
        assert!((total / 2.03e9 - 1.0).abs() < 0.005, "{total} parameters, 2.03 billion in the paper's Table 1");
    }

    #[test]
    fn stages_count_what_they_move() {
        let dims = Dimensions {
            hidden_size: 8,
            heads: 1,
            side_keys: 4,
            key_dim: 2,
            top_m: 2,
            value_dim: 6,
            ..Dimensions::default()
        };
        let config = MemoryConfig::new(dims).expect("the dimensions are sound");
        let cost = config.cost(3, ElementType::F16);
        let (kept, chosen) = (3 * 2 * 2 * 12, 3 * 2 * 12);
        assert_eq!(cost.query, StageCost { bytes: 3 * 8 * 2 + 8 * 4 * 2 + 3 * 4 * 4, flops: 2 * 3 * 8 * 4 });
        let score = 3 * 4 * 4 + 2 * 2 * 4 * 2 + 4 * 2 * 2 * 2 * 2 + kept;
        assert_eq!(cost.score, StageCost { bytes: score, flops: 2 * 3 * 2 * (4 + 2 * 2) * 2 });
        assert_eq!(cost.combine, StageCost { bytes: kept + chosen, flops: 3 * 4 * 2 * 2 });
        let expand = chosen + 3 * 2 * 4 + 3 * 2 * 6 * 2 + 24 * 8 * 2 + 3 * 8 * 2;
        assert_eq!(cost.expand, StageCost { bytes: expand, flops: 2 * 3 * (2 * 6 + 24 * 8) });
        assert_eq!(cost.total().bytes, cost.stages().iter().map(|(_, stage)| stage.bytes).sum::<u64>());
    }

    #[test]
    fn product_keys_look_at_few_pairs_and_pay_for_the_gate() {
        let plain = Dimensions {
            capabilities: Kind::ProductKey.capabilities(),
            tucker_rank: 1,
            cores: 1,
            expansion: 1,
            top_m: 4,
            ..Dimensions::default()
        };
        let gated = Dimensions { capabilities: Kind::MemoryPlus.capabilities(), ..plain.clone() };
        let cost = |dims: Dimensions| MemoryConfig::new(dims).map(|config| config.cost(1, ElementType::F32));
        let (plain, gated) = (cost(plain).expect("sound"), cost(gated).expect("sound"));
        assert_eq!(plain.combine.flops, 2 * (4 + 2 + 1 + 1));
        assert_eq!(gated.expand.bytes - plain.expand.bytes, 256 * 4 + 64 * 256 * 4 + 2 * 64 * 4);
        assert_eq!(gated.query.flops, 2 * plain.query.flops);
    }

    fn h100() -> Device {
        let hardware = HardwareProperties {
            load_width: 128,
            plane_size_min: 32,
            plane_size_max: 32,
            max_bindings: 1024,
            max_shared_memory_size: 227 << 10,
            max_cube_count: (i32::MAX as u32, u16::MAX.into(), u16::MAX.into()),
            max_units_per_cube: 1024,
            max_cube_dim: (1024, 1024, 64),
            num_streaming_multiprocessors: Some(132),
            num_tensor_cores: Some(4),
            min_tensor_cores_dim: Some(8),
            num_cpu_cores: None,
            max_vector_size: 16,
        };
        Device::new(&hardware, hardware.max_cube_count, Features { exchange: true, matrix: [true; 2] })
    }

    /// What an H100 launches for 4,096 tokens of the preset, by what it chooses in bf16, and in f32.
    fn prefill() -> [(ElementType, Plans); 2] {
        let (tile, cubek) = (ProjectStrategy::Tile, ProjectStrategy::Cubek);
        let (whole, split) = (ScoreStrategy::Whole, ScoreStrategy::Split { splits: 2 });
        let plans = |dtype, query, score, expand| {
            let strategies = Strategies { query, score, expand };
            (dtype, preset().plans(&h100(), 4096, dtype, strategies).expect("the preset fits an H100"))
        };
        [
            plans(ElementType::BF16, cubek, split, ExpandStrategy::Pooled(cubek)),
            plans(ElementType::F32, tile, whole, ExpandStrategy::Fused),
        ]
    }

    const H100: Caches = Caches { bytes: 50 << 20 };

    #[test]
    fn a_prefill_moves_little_more_than_the_rows_it_gathers() {
        for (dtype, plans) in prefill() {
            let gather = 4096 * 160 * 384 * dtype.size() as u64;
            let moved: u64 = preset().traffic(dtype, &plans, H100).iter().map(|(_, bytes)| bytes).sum();
            // Matrix units write a score of 4 bytes for each of 3 ranks of each key, of which a third and more is read.
            let scores = if dtype == ElementType::F32 { 0 } else { 4096 * 4 * 3 * 1616 * 4 * 3 / 2 };
            let most = 13 * gather / 10 + scores;
            assert!((gather..=most).contains(&moved), "{dtype}: {moved} bytes for a gather of {gather}");
        }
    }

    #[test]
    fn what_no_cache_holds_is_read_again() {
        let [(dtype, plans), _] = prefill();
        let small = Caches { bytes: 1 << 20 };
        let keys = 2 * 2 * 1616 * 192 * 2u64;
        let score = |caches| preset().traffic(dtype, &plans, caches)[1].1;
        // Each of 32 tiles of tokens reads the projected keys and those of both ranks.
        assert_eq!(score(small) - score(H100), 31 * 3 * keys);
        assert_eq!((sectors(768), sectors(4), sectors(44)), (768, 32, 96));
    }

    #[test]
    fn absurd_numbers_of_tokens_saturate() {
        let cost = preset().cost(usize::MAX, ElementType::F32);
        assert_eq!(cost.total(), StageCost { bytes: u64::MAX, flops: u64::MAX });
    }
}
