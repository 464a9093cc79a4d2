//! What a backward pass and an update of the value table cost.
//!
//! A row, or a key, that several slots read has one gradient; how many there are hangs on the input. Where nothing else is said
//! ([`Choices`]), the figures of a backward pass are those of slots that all differ, as far as the table has so many.

use cubecl::Runtime;
use ultramem_kernels::combine::core_shares;
use ultramem_kernels::launch::Device;
use ultramem_kernels::linear::ProjectSizes;
use ultramem_kernels::optimiser::Rule;
use ultramem_kernels::{NormPlan, NormSizes, OuterPlans, OuterSizes, SortPlans};

use super::{Caches, Choices, Cost, Sizes, StageCost, WORD, sum, wide};
use crate::{ElementType, MemoryConfig, MemoryLayer, Scores};

impl MemoryConfig {
    /// What a backward pass over `tokens` tokens must cost with weights and activations of `dtype`.
    pub fn backward_cost(&self, tokens: usize, dtype: ElementType) -> Cost {
        let sizes = Sizes::new(self, tokens, dtype);
        Cost {
            query: sizes.query_backward(),
            score: sizes.score_backward(),
            combine: sizes.combine_backward(),
            weigh: sizes.weigh_backward(),
            expand: sizes.expand_backward(),
        }
    }

    /// What an update of `rows` rows of the value table by `rule` must cost: each row's gradient, the row and its state.
    pub fn update_cost(&self, rows: usize, dtype: ElementType, rule: Rule) -> StageCost {
        let (rows, element) = (wide(rows), wide(dtype.size()));
        let numbers = rows * wide(self.value_dim);
        // Operations of a number, counted in the formulas at the head of `kernels::optimiser`.
        let (state, operations) = match rule {
            Rule::Sgd { momentum: 0.0 } => (0, 2),
            Rule::Sgd { .. } => (numbers, 4),
            Rule::Adagrad { .. } => (rows, 5),
            Rule::Adam { .. } => (2 * numbers, 14),
        };
        let bytes = [rows * WORD, numbers * WORD, 2 * numbers * element, 2 * state * WORD];
        StageCost { bytes: sum(&bytes), flops: sum(&[operations * numbers]) }
    }

    /// Bytes that the launches of an update of `rows` rows move. Adagrad reads the gradients twice: for the rows' accumulators first.
    pub fn update_traffic(&self, rows: usize, dtype: ElementType, rule: Rule, caches: Caches) -> u64 {
        let (used, value_dim) = (wide(rows), wide(self.value_dim));
        let gradients = used * (1 + value_dim) * WORD;
        let access = |width: u128| caches.gather(wide(self.rows()) * width, used, used, width);
        let state = match rule {
            Rule::Sgd { momentum: 0.0 } => 0,
            Rule::Sgd { .. } => 2 * access(value_dim * WORD),
            Rule::Adagrad { .. } => gradients + 3 * access(WORD),
            Rule::Adam { .. } => 4 * access(value_dim * WORD),
        };
        sum(&[gradients, 2 * access(value_dim * wide(dtype.size())), state])
    }
}

impl Sizes<'_> {
    fn cores(&self) -> u128 {
        wide(self.config.cores)
    }

    fn pooled_dim(&self) -> u128 {
        wide(self.config.pooled_dim())
    }

    /// Entries of all tokens.
    fn slots(&self) -> u128 {
        self.tokens * self.entries
    }

    /// Distinct value rows at most.
    fn used_rows(&self) -> u128 {
        self.slots().min(wide(self.config.rows()))
    }

    /// Distinct keys of chosen slots at most.
    fn used_keys(&self) -> u128 {
        (2 * self.slots()).min(self.all_keys())
    }

    fn all_keys(&self) -> u128 {
        wide(self.config.heads) * 2 * wide(self.config.side_keys)
    }

    /// The gradient of the slots' scores, in bytes.
    fn grad_scores(&self) -> u128 {
        self.slots() * self.cores() * WORD
    }

    /// The gradient of the slots' keys' score vectors, in bytes.
    fn grad_sides(&self) -> u128 {
        self.slots() * 2 * self.rank * WORD
    }

    /// The bytes of the gradient of a key of every rank.
    fn key(&self) -> u128 {
        self.rank * self.key_dim * WORD
    }

    /// The gate, f32 `[tokens, value_dim]`, in bytes.
    fn gate(&self) -> u128 {
        if self.config.capabilities.gated { self.tokens * self.value_dim * WORD } else { 0 }
    }

    /// A number for each slot, in bytes.
    fn slot_numbers(&self) -> u128 {
        self.slots() * WORD
    }

    /// Numbers of the cores.
    fn core(&self) -> u128 {
        if self.config.tucker() { self.cores() * wide(self.config.heads) * self.rank * self.rank } else { 0 }
    }

    fn expand_backward(&self) -> StageCost {
        let of = &self.config.capabilities;
        let pooled = if of.gated { 0 } else { self.tokens * self.pooled_dim() * self.pooled_element() };
        let projected = if of.output_gated { self.tokens * (self.hidden + 2) * WORD } else { 0 };
        let bytes = [
            self.input(),
            pooled,
            projected,
            self.output() * (self.element + WORD),
            self.chosen(),
            self.shuffle(),
            self.rows(),
            self.grad_scores(),
            self.used_rows() * (WORD + self.value_dim * WORD),
            2 * self.gate(),
        ];
        // The gradients of pooled values and of W_o; scores and rows slot by slot, and the pooled values where a gate came between.
        let by_slot = if of.gated { 3 } else { 2 };
        let flops = 2 * self.tokens * (2 * self.output() + by_slot * self.entries * self.value_dim);
        StageCost { bytes: sum(&bytes), flops: sum(&[flops]) }
    }

    fn weigh_backward(&self) -> StageCost {
        if self.config.capabilities.weigh.is_none() {
            return StageCost { bytes: 0, flops: 0 };
        }
        let bytes = [
            self.slot_numbers(),
            self.weighed(),
            2 * self.grad_scores(),
            self.shuffle(),
            self.pre_rows(),
            2 * self.z(),
            self.used_rows() * (WORD + self.pre_dim * WORD),
        ];
        StageCost { bytes: sum(&bytes), flops: sum(&[2 * 2 * self.slots() * self.pre_dim]) }
    }

    fn combine_backward(&self) -> StageCost {
        // A softmax's gradient hangs on the scores alone.
        let forward = if self.config.tucker() { self.kept() + self.slot_numbers() } else { self.slot_numbers() };
        let bytes = [forward, self.grad_scores(), self.grad_sides(), self.core() * WORD];
        let flops = if self.config.tucker() { self.cores() * 7 * self.rank * self.rank } else { 4 };
        StageCost { bytes: sum(&bytes), flops: sum(&[self.slots() * flops]) }
    }

    fn score_backward(&self) -> StageCost {
        let through_norm = if self.config.capabilities.normalises_keys { self.element } else { 0 };
        let keys = self.used_keys() * (2 * self.key() + WORD + self.rank * self.key_dim * through_norm);
        StageCost {
            bytes: sum(&[2 * self.queries(), self.slot_numbers(), self.grad_sides(), keys]),
            flops: sum(&[2 * self.slots() * 2 * 2 * self.rank * self.key_dim]),
        }
    }

    fn query_backward(&self) -> StageCost {
        let width: u128 = self.maps().iter().map(|map| map.width).sum();
        let weights = self.hidden * width;
        let more = if self.weighs_input() { self.z() } else { 0 };
        StageCost {
            bytes: sum(&[self.tokens * width * WORD, more, 2 * self.input(), weights * (self.element + WORD)]),
            flops: sum(&[2 * 2 * self.tokens * weights]),
        }
    }

    /// `z`, f32 `[tokens, pre_dim]`, in bytes.
    fn z(&self) -> u128 {
        self.tokens * self.pre_dim * WORD
    }

    /// Whether `z` is the input itself.
    fn weighs_input(&self) -> bool {
        self.config.capabilities.weigh.is_some_and(|weigh| !weigh.projected)
    }

    /// The linear maps of the input.
    fn maps(&self) -> Vec<InputMap> {
        let of = &self.config.capabilities;
        let projects = of.weigh.is_some_and(|weigh| weigh.projected);
        let all = [
            (true, self.query_width(), of.biased),
            (projects, self.pre_dim, false),
            (of.gated, self.value_dim, of.biased),
            (of.output_gated, 1, true),
        ];
        let there = all.into_iter().filter(|(there, ..)| *there);
        there.map(|(_, width, biased)| InputMap { width, biased }).collect()
    }
}

/// A linear map of the input.
struct InputMap {
    width: u128,
    biased: bool,
}

impl<R: Runtime> MemoryLayer<R> {
    /// Bytes that the launches of [`backward`](Self::backward) move between device memory and chip, stage by stage, in the order of
    /// their launches. What [`MemoryConfig::traffic`] says of caches holds here too. For a table of
    /// one page: each further one is a launch more that reads places and pooled gradients. Zeros for no tokens.
    pub fn backward_traffic(&self, tokens: usize, caches: Caches) -> Vec<(&'static str, u64)> {
        self.backward_traffic_of(tokens, Choices::most(&self.config, tokens), caches)
    }

    /// The same for tokens that choose as many different rows and keys as `choices` says.
    pub fn backward_traffic_of(&self, tokens: usize, choices: Choices, caches: Caches) -> Vec<(&'static str, u64)> {
        let stages = ["expand", "weigh", "combine", "score", "query"];
        let weighs = self.config.capabilities.weigh.is_some();
        let stages = stages.into_iter().filter(|&stage| weighs || stage != "weigh");
        if tokens == 0 {
            return stages.map(|stage| (stage, 0)).collect();
        }
        let sizes = Sizes::new(&self.config, tokens, self.dtype());
        let moves = Moves { layer: self, device: Device::of(&self.client), sizes, tokens, choices, caches };
        let of_stage = |stage| match stage {
            "expand" => moves.expand(),
            "weigh" => moves.weigh(),
            "combine" => moves.combine(),
            "score" => moves.score(),
            _ => moves.query(),
        };
        stages.map(|stage| (stage, sum(&[of_stage(stage)]))).collect()
    }
}

/// What is moved, kernel by kernel.
struct Moves<'a, R: Runtime> {
    layer: &'a MemoryLayer<R>,
    device: Device,
    sizes: Sizes<'a>,
    tokens: usize,
    choices: Choices,
    caches: Caches,
}

/// Entries that are summed by rows.
struct Summed {
    sort: SortPlans,
    /// Factors of an entry.
    factors: u128,
    /// What is summed: so many rows of `width` bytes.
    sources: u128,
    width: u128,
    /// Sums, of `row` bytes each.
    rows: usize,
    row: u128,
    /// Parts of rows that lie in several blocks.
    parts: usize,
}

impl<R: Runtime> Moves<'_, R> {
    /// The output's gradient through gate, bias and W_o, scores, rows, W_o's gradient; with a gate, the pooled values again and their way
    /// through it.
    fn expand(&self) -> u128 {
        let (sizes, config) = (&self.sizes, self.sizes.config);
        let of = &config.capabilities;
        let pooled = sizes.tokens * sizes.pooled_dim();
        let output = sizes.tokens * sizes.hidden;
        let grad_element = if of.output_gated { WORD } else { sizes.element };
        // Through the gate, or to f32 alone, for the bias or where nothing projects.
        let through = of.output_gated || sizes.finishes() && sizes.element != WORD;
        let finished = if through { sizes.input() + output * WORD } else { 0 };
        let output_gate = if of.output_gated { (output + 2 * sizes.tokens) * WORD } else { 0 };
        let through_weight = match of.projects {
            true => {
                let weight = self.weight(sizes.output() * sizes.element);
                output * grad_element + weight + pooled * WORD + self.parts(config.hidden_size, config.pooled_dim())
            }
            false => 0,
        };
        let rows = self.rows(sizes.value_dim);
        let pool = sizes.chosen() + self.shuffle() + rows + pooled * sizes.pooled_element();
        let gate = sizes.gate() + pooled * sizes.pooled_element() + sizes.gate() + 3 * sizes.gate();
        let gate = if of.gated { pool + gate } else { 0 };
        let pooled_rows = sizes.tokens * wide(config.pooled_blocks());
        let of_pooled =
            self.caches.gather(pooled * WORD, sizes.slots(), pooled_rows.min(sizes.slots()), sizes.value_dim * WORD);
        let scores = 2 * sizes.slot_numbers() + rows + of_pooled + sizes.grad_scores();
        let sort = self.row_sort();
        let sums = self.sum_rows(&Summed {
            sort,
            factors: sizes.cores(),
            sources: pooled_rows,
            width: sizes.value_dim * WORD,
            rows: self.choices.rows,
            row: sizes.value_dim * WORD,
            parts: self.choices.row_parts,
        });
        let gated = if of.gated { WORD } else { sizes.pooled_element() };
        let weight = match of.projects {
            true => self.outer(config.hidden_size, config.pooled_dim(), grad_element, gated),
            false => 0,
        };
        let bias = if of.projects && of.biased { self.column_sum(self.tokens, sizes.hidden) } else { 0 };
        let groups = self.locate() + self.group(&sort);
        finished + output_gate + through_weight + gate + scores + groups + sums + weight + bias
    }

    /// How the slots are sorted by their rows.
    fn row_sort(&self) -> SortPlans {
        SortPlans::of(&self.device, self.entries(), self.sizes.config.table_rows())
    }

    /// The list of rows.
    fn locate(&self) -> u128 {
        3 * self.sizes.slot_numbers() + self.shuffle()
    }

    /// The products' gradients, `z`'s as a pooling of the pre-values, and the used rows'.
    fn weigh(&self) -> u128 {
        let sizes = &self.sizes;
        let products = 3 * sizes.grad_scores() + 2 * sizes.slot_numbers();
        let pool = 2 * sizes.slot_numbers() + self.shuffle() + self.rows(sizes.pre_dim) + sizes.z();
        let cast = if sizes.weighs_input() && sizes.element != WORD { sizes.input() + sizes.z() } else { 0 };
        let sums = self.sum_rows(&Summed {
            sort: self.row_sort(),
            factors: 1,
            sources: sizes.tokens,
            width: sizes.pre_dim * WORD,
            rows: self.choices.rows,
            row: sizes.pre_dim * WORD,
            parts: self.choices.row_parts,
        });
        products + pool + cast + sums
    }

    /// The side scores' gradient, and the core's in parts.
    fn combine(&self) -> u128 {
        let (sizes, core) = (&self.sizes, self.sizes.core());
        let forward = match sizes.config.capabilities.scores {
            Scores::Additive => sizes.chosen() + 2 * sizes.slot_numbers(),
            Scores::Tucker => sizes.slot_numbers() + sizes.kept(),
        };
        let sides = forward + sizes.grad_scores() + sizes.grad_sides() + sizes.slot_numbers();
        if core == 0 {
            return sides;
        }
        let parts = core_shares(self.tokens, core as usize).shares;
        let of_core = sizes.slot_numbers() + sizes.grad_scores() + sizes.slots() * 2 * sizes.rank * WORD;
        sides + of_core + wide(parts) * core * WORD + self.column_sum(parts, core)
    }

    /// The queries' gradient, its way through the norm, which leaves them normalised, or the queries rounded; the keys' likewise.
    fn score(&self) -> u128 {
        let (sizes, config) = (&self.sizes, self.sizes.config);
        let normalised = config.capabilities.normalises_queries;
        let rounds = !normalised && sizes.element < WORD;
        let round = if rounds { 2 * sizes.queries() } else { 0 };
        let key = sizes.rank * sizes.key_dim * sizes.element;
        let of_keys = self.caches.gather(sizes.all_keys() * key, 2 * sizes.slots(), wide(self.choices.keys), key);
        let grad_queries = sizes.slot_numbers() + sizes.grad_sides() + of_keys + sizes.queries();
        let vectors = self.tokens.saturating_mul(config.query_pairs() * 2);
        let through_norm = if normalised { 4 * sizes.queries() + self.norm_parts(vectors, 1) } else { 0 };
        let list = sizes.slot_numbers() + 4 * sizes.slot_numbers();
        let sort = SortPlans::of(&self.device, self.entries().saturating_mul(2), sizes.all_keys() as usize);
        let groups = self.group(&sort);
        let sums = self.sum_rows(&Summed {
            sort,
            factors: sizes.rank,
            sources: sizes.tokens * wide(config.query_pairs() * 2),
            width: sizes.key_dim * WORD,
            rows: self.choices.keys,
            row: sizes.key(),
            parts: self.choices.key_parts,
        });
        let keys = wide(self.choices.keys);
        let keys_norm = if config.capabilities.normalises_keys {
            let stored = sizes.rank * sizes.key_dim * sizes.element;
            let read = self.caches.gather(sizes.all_keys() * stored, keys, keys, stored);
            keys * (WORD + 2 * sizes.key()) + read + self.norm_parts(keys as usize, config.tucker_rank)
        } else {
            0
        };
        round + grad_queries + through_norm + list + groups + sums + keys_norm
    }

    /// The gradients of what the input is mapped to, through the maps' weights, and these weights' own; of several maps, their sum.
    fn query(&self) -> u128 {
        let (sizes, maps) = (&self.sizes, self.sizes.maps());
        let strategy = self.layer.backward_product(self.tokens);
        let of_map = |map: &InputMap| {
            let bias = if map.biased { self.column_sum(self.tokens, map.width) } else { 0 };
            let through = self.weight(sizes.hidden * map.width * sizes.element);
            let grad = sizes.tokens * map.width;
            // For matrix units it is rounded first.
            let (element, cast) =
                match strategy.rounds(self.layer.dtype(), [map.width as usize, sizes.config.hidden_size]) {
                    true => (sizes.element, grad * (WORD + sizes.element)),
                    false => (WORD, 0),
                };
            let own = self.outer(map.width as usize, sizes.config.hidden_size, element, sizes.element);
            let parts = self.parts(map.width as usize, sizes.config.hidden_size);
            cast + grad * element + through + parts + own + bias
        };
        let parts = wide(maps.len() + usize::from(sizes.weighs_input()));
        let part = sizes.tokens * sizes.hidden * WORD;
        // Each map's part is written, and each addition reads two sums and writes one, the last in the input's type.
        let sum = if parts > 1 { (wide(maps.len()) + 2 * (parts - 1) + parts - 2) * part } else { 0 };
        maps.iter().map(of_map).sum::<u128>() + sum + sizes.input()
    }

    /// What a weight of `bytes` moves that every tile of tokens reads whole.
    fn weight(&self, bytes: u128) -> u128 {
        self.caches.weight(bytes, self.tokens, self.device.tile)
    }

    /// What a product `[tokens, depth] · [depth, width]` writes in parts, and reads to add them up.
    fn parts(&self, depth: usize, width: usize) -> u128 {
        let sizes = ProjectSizes { tokens: self.tokens, depth, width, dtype: self.layer.dtype() };
        let plans = self.layer.backward_product(self.tokens).plan(&self.device, &sizes).ok().flatten();
        2 * wide(plans.map_or(0, |plans| plans.parts_bytes()))
    }

    /// Entries of all tokens.
    fn entries(&self) -> usize {
        self.tokens.saturating_mul(self.sizes.config.heads * self.sizes.config.top_m)
    }

    /// Rows of a table of `width` numbers.
    fn rows(&self, width: u128) -> u128 {
        let (sizes, row) = (&self.sizes, width * self.sizes.element);
        self.caches.gather(wide(sizes.config.rows()) * row, sizes.slots(), wide(self.choices.rows), row)
    }

    fn shuffle(&self) -> u128 {
        if !self.sizes.config.capabilities.shuffled {
            return 0;
        }
        let slots = wide(self.choices.slots);
        self.caches.gather(wide(self.sizes.config.slots()) * WORD, self.sizes.slots(), slots, WORD)
    }

    /// Sorting listed entries by their keys, and counting the keys that begin. A pass but the first counts digits; each brings the entries, which it
    /// reads twice, to places that lie apart.
    fn group(&self, sort: &SortPlans) -> u128 {
        let (count, passes) = (wide(sort.entries), u128::from(sort.passes));
        let twice = |bytes: u128| if self.caches.hold(bytes) { bytes } else { 2 * bytes };
        let (keys, pairs, counts) = (count * WORD, 2 * count * WORD, wide(sort.counts()) * WORD);
        // Each cube adds up the counts of all.
        let of_cubes = if self.caches.hold(counts) { counts } else { counts * wide(sort.scatter.cubes) };
        let scatter = of_cubes + self.caches.gather(pairs, count, count, 2 * WORD);
        // Whoever lists the keys reads them again to count their digits.
        let first = keys + counts + twice(keys) + scatter;
        let more = (passes - 1) * (pairs + counts + twice(pairs) + scatter);
        first + more + pairs + wide(sort.heads.words()) * WORD
    }

    /// What summing entries by their rows moves: each entry's pair, source, `factors` numbers and what is summed, and the sums; then the pairs again for
    /// the list of rows, and the parts of rows that lie in several blocks.
    fn sum_rows(&self, of: &Summed) -> u128 {
        let (entries, parts) = (wide(of.sort.entries), wide(of.parts));
        let each = |numbers: u128| self.caches.gather(entries * numbers * WORD, entries, entries, numbers * WORD);
        let (pairs, factors) = (2 * entries * WORD, each(of.factors));
        let sources = self.caches.gather(of.sources * of.width, entries, of.sources.min(entries), of.width);
        let heads = wide(of.sort.heads.words()) * WORD;
        2 * (pairs + heads) + each(1) + factors + sources + wide(of.rows) * (WORD + of.row) + 2 * parts * of.row
    }

    /// The gradient of a weight `[m, n]`, of which the left factor's numbers have `left` bytes and the right one's `right`.
    fn outer(&self, m: usize, n: usize, left: u128, right: u128) -> u128 {
        let (tokens, area) = (self.sizes.tokens, wide(m) * wide(n) * WORD);
        let factor = |bytes: u128, times: usize| if self.caches.hold(bytes) { bytes } else { bytes * wide(times) };
        let read = |rows: usize, columns: usize| {
            factor(tokens * wide(m) * left, columns) + factor(tokens * wide(n) * right, rows)
        };
        let of_outer = OuterSizes { tokens: self.tokens, m, n, dtype: self.layer.dtype() };
        let cut = match OuterPlans::of(&self.device, &of_outer, self.layer.backward_product(self.tokens)) {
            Some(OuterPlans::Tile { tiles, .. }) => tiles,
            Some(OuterPlans::Matrix(plans)) => {
                let plan = plans.product.plan;
                let parts = 2 * wide(plans.parts_bytes());
                return read(m.div_ceil(plan.rows()), n.div_ceil(plan.columns())) + parts + area;
            }
            // cubek's tiles are not known here.
            None => return read(1, 1) + area,
        };
        let (read, splits, chunks) = (read(cut.rows, cut.columns), cut.splits, cut.chunks());
        let added = if splits > 1 { self.column_sum(splits, wide(m) * wide(n)) } else { 0 };
        // A part's sums are written after each chunk, and read again before the next is added.
        let sums = wide(splits) * area;
        let again = if self.caches.hold(sums) { 0 } else { 2 * sums * (wide(chunks) - 1) };
        read + sums + again + added
    }

    /// The parts that the tiles of `groups` groups of `step` vectors have in the gradient of a norm's weight, and their sum.
    fn norm_parts(&self, groups: usize, step: usize) -> u128 {
        let key_dim = self.sizes.config.key_dim;
        let sizes =
            NormSizes { norm: self.sizes.config.norm, groups, size: key_dim, step, listed: false, normalised: false };
        let tiles = NormPlan::of(&self.device, &sizes).launch.cubes;
        wide(tiles) * wide(key_dim) * WORD + self.column_sum(tiles, wide(key_dim))
    }

    /// Adding up `rows` rows of `width` numbers.
    fn column_sum(&self, rows: usize, width: u128) -> u128 {
        (wide(rows) + 1) * width * WORD
    }
}
