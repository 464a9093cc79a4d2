//! What launches may ask of the caches, by the shapes alone.

use ultramem::{ElementType, MemoryConfig};
use ultramem_offline::SECTOR;

/// What the launches of a stage may ask of the caches, in bytes of sectors, by the shapes alone: what tokens share once for each eight of
/// them, what columns share once for each 32 of them, and a sector for each number that lies by itself.
pub struct Raw {
    tokens: u64,
    element: u64,
    hidden: u64,
    /// `heads · top_m · tokens`.
    slots: u64,
    heads: u64,
    side_keys: u64,
    query_width: u64,
    key_dim: u64,
    rank: u64,
    cores: u64,
    top_m: u64,
    value_dim: u64,
    pooled_dim: u64,
    /// 0 where nothing weighs.
    pre_dim: u64,
    /// Widths of what the input is mapped to, besides queries.
    maps: Vec<u64>,
    /// Bytes of bias and output gate, read and written with each number of the output.
    finish: u64,
    gated: bool,
    biased: bool,
}

impl Raw {
    pub fn new(config: &MemoryConfig, tokens: usize, dtype: ElementType) -> Self {
        let wide = |size: usize| size as u64;
        let of = &config.capabilities;
        let finishes = !of.projects || of.biased || of.output_gated;
        Self {
            tokens: wide(tokens),
            element: wide(dtype.size()),
            hidden: wide(config.hidden_size),
            slots: wide(config.heads * config.top_m * tokens),
            heads: wide(config.heads),
            side_keys: wide(config.side_keys),
            query_width: wide(config.query_pairs() * 2 * config.key_dim),
            key_dim: wide(config.key_dim),
            rank: wide(config.tucker_rank),
            cores: wide(config.cores),
            top_m: wide(config.top_m),
            value_dim: wide(config.value_dim),
            pooled_dim: wide(config.pooled_dim()),
            pre_dim: wide(config.pre_dim),
            maps: maps(config),
            finish: if finishes { 6 * 4 } else { 0 },
            gated: of.gated,
            biased: of.biased,
        }
    }

    /// `[tokens, depth] · [depth, columns]`, of numbers of `left` and `right` bytes.
    pub fn product(&self, depth: u64, columns: u64, left: u64, right: u64) -> u64 {
        let read = self.tokens * row(depth * left) * columns.div_ceil(32);
        read + self.tokens.div_ceil(8) * depth * row(columns * right) + self.tokens * row(columns * 4)
    }

    /// `[m, tokens] · [tokens, n]`, likewise.
    pub fn outer(&self, m: u64, n: u64, left: u64, right: u64) -> u64 {
        self.tokens * (row(m * left) * n.div_ceil(32) + row(n * right) * m.div_ceil(32)) + m * row(n * 4)
    }

    /// The value rows of all slots, the slots' numbers, scores and addresses.
    pub fn gather(&self) -> u64 {
        self.slots * (3 * SECTOR + row(self.value_dim * self.element))
    }

    pub fn query(&self) -> u64 {
        self.product(self.hidden, self.query_width, self.element, self.element) + self.bias(self.query_width)
    }

    /// A bias, read with what it is added to, which is read and written.
    fn bias(&self, width: u64) -> u64 {
        if self.biased { 3 * self.tokens * row(width * 4) } else { 0 }
    }

    /// All keys' scores, all ranks of the kept keys, and all pairs of them.
    pub fn retrieve(&self) -> u64 {
        let all = 2 * self.heads * self.product(self.key_dim, self.side_keys, 4, 4);
        let kept = 2 * self.slots * self.rank * (row(self.key_dim * 4) + SECTOR);
        all + kept + self.slots * self.top_m * (self.rank * SECTOR + self.rank * self.rank * 4)
    }

    pub fn expand(&self) -> u64 {
        let gate = |width| self.product(self.hidden, width, self.element, self.element) + self.bias(width);
        let gates = self.maps.iter().map(|&width| gate(width));
        let finish = self.tokens * row(self.hidden * self.finish);
        self.gather()
            + self.product(self.pooled_dim, self.hidden, self.element, self.element)
            + gates.sum::<u64>()
            + finish
    }

    /// The pre-value rows of all slots, `z` and how it was made, scores read and written.
    pub fn weigh(&self) -> u64 {
        let z = self.product(self.hidden, self.pre_dim, self.element, self.element);
        z + self.slots * ((4 + 2 * self.cores) * SECTOR + row(self.pre_dim * self.element) + row(self.pre_dim * 4))
    }

    /// The pre-value rows for `z`, `z` again for the rows, and every slot's numbers.
    pub fn weigh_backward(&self) -> u64 {
        let rows = row(self.pre_dim * self.element) + 3 * row(self.pre_dim * 4);
        self.slots * ((8 + 4 * self.cores) * SECTOR + rows) + 3 * self.tokens * row(self.pre_dim * 4)
    }

    /// Through W_o and to it; rows and what is pooled for the scores, what is pooled again for the rows, and their sorting.
    pub fn expand_backward(&self) -> u64 {
        let gate = if self.gated { self.expand() } else { 2 * self.tokens * row(self.hidden * self.finish) };
        let weight = self.product(self.hidden, self.pooled_dim, self.element, self.element)
            + self.outer(self.hidden, self.pooled_dim, self.element, 4);
        gate + weight + self.gather() + 3 * self.slots * row(self.value_dim * 4) + SORT * self.slots
    }

    /// Each slot's pair again, with every product of two ranks.
    pub fn combine_backward(&self) -> u64 {
        self.slots * SECTOR * (2 * self.rank * self.rank + 3 * self.rank + self.cores)
    }

    /// The queries through their norm, both keys of each slot, what goes to them and their way through the norm, and their sorting.
    pub fn score_backward(&self) -> u64 {
        let queries = self.tokens * self.query_width.div_ceil(self.key_dim) * row(self.key_dim * 4);
        let keys = 2 * self.slots * self.rank * row(self.key_dim * 4);
        6 * queries + 5 * keys + 2 * SORT * self.slots
    }

    pub fn query_backward(&self) -> u64 {
        let weight = |width| {
            self.product(width, self.hidden, 4, self.element)
                + self.outer(width, self.hidden, 4, self.element)
                + self.bias(width)
        };
        let sums = 4 * self.tokens * row(self.hidden * 4) * (self.maps.len() as u64 + 1);
        weight(self.query_width) + self.maps.iter().map(|&width| weight(width)).sum::<u64>() + sums
    }
}

/// Widths of what the input of a layer is mapped to, besides queries.
fn maps(config: &MemoryConfig) -> Vec<u64> {
    let of = &config.capabilities;
    let projects = of.weigh.is_some_and(|weigh| weigh.projected);
    let all = [(projects, config.pre_dim), (of.gated, config.value_dim), (of.output_gated, 1)];
    all.into_iter().filter(|(there, _)| *there).map(|(_, width)| width as u64).collect()
}

/// Bytes of sectors of a row of `width` bytes, which may begin inside one.
pub fn row(width: u64) -> u64 {
    width.next_multiple_of(SECTOR) + if width.is_multiple_of(SECTOR) { 0 } else { SECTOR }
}

/// What grouping entries by rows or keys asks for an entry: four passes of counting and scattering at most, each with a sector for the key and
/// one for the place, read and written, and the lists of what was found.
const SORT: u64 = 4 * 4 * SECTOR + 4 * SECTOR;
