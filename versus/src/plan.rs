//! Equal budgets: what each design makes of the same computation and the same sparse parameters, as arXiv 2411.12364 compares
//! them.
//!
//! *Activated* are the weights that a token is multiplied with in all blocks, half the operations of a step; *sparse* are the
//! parameters beyond those. Embeddings count for neither: they are the same everywhere.

use std::fmt;

use ultramem::{Dimensions, ElementType, Error, Kind, MemoryConfig, Result, SharedTable};

/// What a model spends its sparse parameters on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Design {
    /// No sparse parameters: the computation goes to a wider FFN.
    Dense,
    /// A mixture of experts in place of every FFN, the best two for each token.
    Moe,
    /// Product-key memory (arXiv 1907.05242) in a few places.
    ProductKey,
    /// Memory+ (arXiv 2412.09764) in a few places, with a table in each.
    MemoryPlus,
    /// PEER (arXiv 2407.04153) in a few places, with two tables in each.
    Peer,
    /// UltraMemV2 (arXiv 2508.18756) in every block, with tables that all layers share.
    UltraMemV2,
    /// UltraMem (arXiv 2411.12364) in a few places.
    UltraMem,
}

impl Design {
    /// Every design, the one without sparse parameters first.
    pub const ALL: [Self; 7] =
        [Self::Dense, Self::Moe, Self::ProductKey, Self::MemoryPlus, Self::Peer, Self::UltraMemV2, Self::UltraMem];

    /// What tables and pictures call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Moe => "MoE",
            Self::ProductKey => "PKM",
            Self::MemoryPlus => "Memory+",
            Self::Peer => "PEER",
            Self::UltraMemV2 => "UltraMemV2",
            Self::UltraMem => "UltraMem",
        }
    }

    fn kind(self) -> Option<Kind> {
        match self {
            Self::Dense | Self::Moe => None,
            Self::ProductKey => Some(Kind::ProductKey),
            Self::MemoryPlus => Some(Kind::MemoryPlus),
            Self::Peer => Some(Kind::Peer),
            Self::UltraMemV2 => Some(Kind::UltraMemV2),
            Self::UltraMem => Some(Kind::UltraMem),
        }
    }
}

/// The budget of a model and what all designs share of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scale {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Heads of attention.
    pub attention_heads: usize,
    /// Transformer blocks.
    pub blocks: usize,
    /// Memory layers of a design that has them.
    pub memory_layers: usize,
    /// Slots that a memory layer keeps a head.
    pub top_m: usize,
    /// Weights that a token is multiplied with.
    pub activated: u64,
    /// Parameters beyond those.
    pub sparse: u64,
}

impl Scale {
    /// A model for software devices: 8 blocks of width 256, 7.3 M activated weights and 12 times the dense model's as sparse ones.
    pub fn small() -> Self {
        Self {
            hidden_size: 256,
            attention_heads: 4,
            blocks: 8,
            memory_layers: 3,
            top_m: 16,
            activated: 7_300_000,
            sparse: 75_500_000,
        }
    }

    /// The paper's smallest comparison: 0.35 GFLOP a token, 2.04 B parameters (a dense model of 151 M, 12 times).
    pub fn paper_151m() -> Self {
        Self::paper(1024, 12, 3, 175_000_000, 2_040_000_000)
    }

    /// The paper's second comparison: 1.50 GFLOP a token, 8.95 B parameters (a dense model of 680 M, 12 times).
    pub fn paper_680m() -> Self {
        Self::paper(1536, 24, 6, 750_000_000, 8_950_000_000)
    }

    /// The paper's largest comparison: 3.52 GFLOP a token, 21.36 B parameters (a dense model of 1.6 B, 12 times).
    pub fn paper_1_6b() -> Self {
        Self::paper(2048, 32, 8, 1_760_000_000, 21_360_000_000)
    }

    /// One block of width `hidden_size` with a memory layer, in the proportions of the paper's comparisons: a token is multiplied with
    /// 13 · hidden_size² weights, and there are 11 times as many sparse parameters.
    pub fn block(hidden_size: usize) -> Self {
        let attention_heads =
            (1..=hidden_size / 64).rev().find(|heads| hidden_size.is_multiple_of(*heads)).unwrap_or(1);
        let activated = 13 * square(hidden_size);
        let sparse = 11 * activated;
        Self { hidden_size, attention_heads, blocks: 1, memory_layers: 1, top_m: 42, activated, sparse }
    }

    /// A memory layer in every fourth block, heads of 64, and 42 slots a head as in [`Dimensions::ultramem_151m`].
    fn paper(hidden_size: usize, blocks: usize, memory_layers: usize, activated: u64, parameters: u64) -> Self {
        Self {
            hidden_size,
            attention_heads: hidden_size / 64,
            blocks,
            memory_layers,
            top_m: 42,
            activated,
            sparse: parameters - activated,
        }
    }

    /// The same model with other sparse parameters.
    pub fn with_sparse(self, sparse: u64) -> Self {
        Self { sparse, ..self }
    }

    /// The first blocks of the same model, with their share of everything; at least one memory layer.
    pub fn with_blocks(self, blocks: usize) -> Self {
        let share = |of: u64| of * blocks as u64 / self.blocks as u64;
        let memory_layers = (self.memory_layers * blocks).div_ceil(self.blocks);
        let sparse = self.sparse / self.memory_layers as u64 * memory_layers as u64;
        Self { blocks, memory_layers, activated: share(self.activated), sparse, ..self }
    }

    /// Weights of attention: query, key, value and output, in every block.
    fn attention(&self) -> u64 {
        4 * square(self.hidden_size) * self.blocks as u64
    }

    /// Inner width of an FFN in every block that multiplies a token with `weights` weights in all: a multiple of [`STEP`].
    fn inner(&self, weights: u64) -> usize {
        let steps = weights / (2 * STEP * self.blocks * self.hidden_size) as u64;
        steps as usize * STEP
    }

    /// The memory layer of `kind` that holds its share of the sparse parameters. All read as much of their tables: value rows are
    /// half as wide as the model, keys of all kinds hold as many numbers as UltraMem's. PEER's rows are as wide as the model, twice, so it
    /// reads a quarter of the slots; UltraMemV2's layers, one in each block, share out the slots of the others.
    fn memory(&self, kind: Kind) -> Result<MemoryConfig> {
        match kind {
            Kind::Peer => return self.peer(),
            Kind::UltraMemV2 => return self.ultramem_v2(),
            _ => {}
        }
        let value_dim = self.value_dim();
        let base = Dimensions::default();
        let entries = base.heads * self.top_m;
        let share = self.sparse as f64 / (self.memory_layers * value_dim) as f64;
        let rows = share + entries as f64;
        let shape = match kind {
            Kind::UltraMem => Dimensions { key_dim: self.hidden_size / 4, ..base },
            _ => Dimensions { key_dim: self.hidden_size / 2, tucker_rank: 1, cores: 1, expansion: 1, ..base },
        };
        // The side's square is a multiple of the expansion where the side is a multiple of its root.
        let step = shape.expansion.isqrt();
        let side_keys = ((rows * shape.expansion as f64).sqrt() / step as f64).round() as usize * step;
        MemoryConfig::new(Dimensions {
            capabilities: kind.capabilities(),
            hidden_size: self.hidden_size,
            side_keys,
            top_m: self.top_m,
            value_dim,
            ..shape
        })
    }

    fn value_dim(&self) -> usize {
        (self.hidden_size / 2).next_multiple_of(STEP)
    }

    fn peer(&self) -> Result<MemoryConfig> {
        let top_m = self.top_m.div_ceil(4);
        let base = Dimensions::default();
        let share = self.sparse as f64 / (self.memory_layers * 2 * self.hidden_size) as f64;
        MemoryConfig::new(Dimensions {
            capabilities: Kind::Peer.capabilities(),
            hidden_size: self.hidden_size,
            side_keys: (share + (base.heads * top_m) as f64).sqrt().round() as usize,
            key_dim: self.hidden_size / 2,
            tucker_rank: 1,
            top_m,
            cores: 1,
            expansion: 1,
            value_dim: self.hidden_size,
            pre_dim: self.hidden_size,
            ..base
        })
    }

    /// One of the layers. Each reads half of the table, from its own place on; pre-values are half as wide as values.
    fn ultramem_v2(&self) -> Result<MemoryConfig> {
        let value_dim = self.value_dim();
        let pre_dim = (value_dim / 2).next_multiple_of(STEP);
        let top_m = (2 * self.memory_layers * self.top_m).div_ceil(self.blocks);
        let touched = self.blocks * top_m;
        let rows = (self.sparse as f64 / (value_dim + pre_dim) as f64).round() as usize + touched;
        let shared = SharedTable { rows, offset: 0 };
        MemoryConfig::new(Dimensions {
            capabilities: Kind::UltraMemV2.capabilities(),
            hidden_size: self.hidden_size,
            heads: 1,
            side_keys: (rows / 2).isqrt(),
            key_dim: self.hidden_size / 4,
            top_m,
            expansion: 1,
            value_dim,
            pre_dim,
            shared: Some(shared),
            ..Dimensions::default()
        })
    }
}

/// One design's way to spend a [`Scale`]. Made by [`Plan::new`], which checks that it spends it.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The design.
    pub design: Design,
    /// What it was given.
    pub scale: Scale,
    /// Inner width of the dense FFN of each block; 0 where experts take its place.
    pub inner: usize,
    /// Experts of each block; 0 where there are none.
    pub experts: usize,
    /// Experts that a token uses.
    pub top_k: usize,
    /// Inner width of an expert.
    pub expert_inner: usize,
    /// Each of the memory layers, where there are some.
    pub memory: Option<MemoryConfig>,
}

/// Widths are multiples of this, so that rows are read in full loads.
const STEP: usize = 8;
/// How far a plan may be off its budget.
const TOLERANCE: f64 = 0.02;
const TOP_K: usize = 2;

impl Plan {
    /// The dimensions with which `design` spends the budget of `scale`: activated weights and sparse parameters within 2 %.
    ///
    /// # Errors
    /// [`Error::Config`] where no dimensions do, with what comes closest; a memory layer that can't be.
    pub fn new(design: Design, scale: &Scale) -> Result<Self> {
        let plan = Self {
            design,
            scale: *scale,
            inner: 0,
            experts: 0,
            top_k: 0,
            expert_inner: 0,
            memory: design.kind().map(|kind| scale.memory(kind)).transpose()?,
        };
        let plan = if design == Design::Moe { plan.with_experts() } else { plan.with_inner() };
        plan.spends("activated weights", plan.activated(), scale.activated)?;
        let sparse = if design == Design::Dense { 0 } else { scale.sparse };
        plan.spends("sparse parameters", plan.sparse(), sparse)?;
        Ok(plan)
    }

    /// Gives the FFN what attention and memory leave.
    fn with_inner(self) -> Self {
        let taken = self.scale.attention() + self.memory_weights();
        Self { inner: self.scale.inner(self.scale.activated.saturating_sub(taken)), ..self }
    }

    /// Experts that share out what attention and router leave, as many as the sparse parameters make; the router takes a weight an
    /// expert of each number, which a second look accounts for.
    fn with_experts(self) -> Self {
        let scale = self.scale;
        (0..2).fold(Self { top_k: TOP_K, ..self }, |plan, _| {
            let taken = scale.attention() + plan.router_weights();
            let expert_inner = scale.inner(scale.activated.saturating_sub(taken)) / TOP_K / STEP * STEP;
            let expert = (2 * scale.hidden_size * expert_inner * scale.blocks).max(1) as f64;
            Self { expert_inner, experts: TOP_K + (scale.sparse as f64 / expert).round() as usize, ..plan }
        })
    }

    fn spends(&self, what: &'static str, found: u64, expected: u64) -> Result<()> {
        if (found as f64 - expected as f64).abs() <= TOLERANCE * expected as f64 {
            return Ok(());
        }
        let value = format!("{found} in the closest {} ({self}) to a budget of {expected}", self.design.name());
        Err(Error::Config { what, value, expected: "within 2 %" })
    }

    /// Weights that a token is multiplied with, of all blocks.
    pub fn activated(&self) -> u64 {
        let Scale { hidden_size, blocks, .. } = self.scale;
        let ffn = (2 * hidden_size * (self.inner + self.top_k * self.expert_inner) * blocks) as u64;
        self.scale.attention() + ffn + self.router_weights() + self.memory_weights()
    }

    /// Parameters that a token does not touch: experts that it does not use, value rows that it does not read.
    pub fn sparse(&self) -> u64 {
        let Scale { hidden_size, blocks, .. } = self.scale;
        let idle = self.experts.saturating_sub(self.top_k);
        let experts = (2 * hidden_size * self.expert_inner) as u64 * (idle * blocks) as u64;
        let rows = |memory: &MemoryConfig| {
            let touched = memory.heads * memory.top_m * self.memory_layers();
            let idle = (memory.table_rows() * self.tables()).saturating_sub(touched);
            idle as u64 * (memory.value_dim + memory.pre_dim) as u64
        };
        experts + self.memory.as_ref().map_or(0, rows)
    }

    /// Memory layers: one in each block where they share tables, else as many as the scale says.
    pub fn memory_layers(&self) -> usize {
        if self.shares_tables() { self.scale.blocks } else { self.scale.memory_layers }
    }

    /// Tables of values that the memory layers have together.
    pub fn tables(&self) -> usize {
        if self.shares_tables() { 1 } else { self.scale.memory_layers }
    }

    /// The layer at a place: where layers share tables, each begins somewhere else.
    ///
    /// # Errors
    /// A place that the plan does not have.
    pub fn memory_at(&self, config: &MemoryConfig, place: usize) -> Result<MemoryConfig> {
        let layers = self.memory_layers();
        let shared = config.shared.map(|table| SharedTable { offset: place * table.rows / layers.max(1), ..table });
        MemoryConfig::new(Dimensions { shared, ..(**config).clone() })
    }

    fn shares_tables(&self) -> bool {
        self.memory.as_ref().is_some_and(|memory| memory.shared.is_some())
    }

    fn router_weights(&self) -> u64 {
        (self.scale.hidden_size * self.experts * self.scale.blocks) as u64
    }

    /// What the memory layers multiply a token with: half their operations.
    fn memory_weights(&self) -> u64 {
        let layers = self.memory_layers() as u64;
        self.memory.as_ref().map_or(0, |memory| memory.cost(1, ElementType::F32).total().flops / 2 * layers)
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(memory) = &self.memory else {
            return match self.experts {
                0 => write!(f, "FFN of {}", self.inner),
                experts => write!(f, "{} of {experts} experts of width {}", self.top_k, self.expert_inner),
            };
        };
        let (tables, rows, value_dim) = (self.tables(), memory.table_rows(), memory.value_dim);
        let tables = if tables == 1 { "1 table".to_string() } else { format!("{tables} tables") };
        let width = match memory.pre_dim {
            0 => value_dim.to_string(),
            pre_dim => format!("({value_dim} + {pre_dim})"),
        };
        write!(f, "FFN of {}, {tables} of {rows} × {width}", self.inner)
    }
}

fn square(size: usize) -> u64 {
    size as u64 * size as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plans(scale: &Scale) -> Vec<Plan> {
        Design::ALL.map(|design| Plan::new(design, scale).unwrap()).into()
    }

    /// `Plan::new` refuses what is off by more than 2 %; here the budgets are counted again from the dimensions.
    #[test]
    fn budgets_are_equal() {
        let grown = [1, 2, 4, 8, 16, 32].map(|factor| Scale::small().with_sparse(2_600_000 * factor));
        let paper = [Scale::paper_151m(), Scale::paper_680m(), Scale::paper_1_6b(), Scale::small()];
        let fewer = [Scale::paper_1_6b().with_blocks(4), Scale::paper_151m().with_blocks(4)];
        let alone = [768, 1024, 2048].map(Scale::block);
        for scale in grown.iter().chain(&paper).chain(&fewer).chain(&alone) {
            for plan in plans(scale) {
                let near = |found: f64, expected: f64| {
                    assert!((found / expected - 1.0).abs() <= 0.02, "{plan}: {found}, expected {expected}");
                };
                let (hidden, blocks) = (scale.hidden_size as f64, scale.blocks as f64);
                let mut activated = blocks * hidden * (4.0 * hidden + 2.0 * plan.inner as f64);
                let mut sparse = 0.0;
                if plan.design == Design::Moe {
                    let expert = 2.0 * hidden * plan.expert_inner as f64;
                    activated += blocks * (2.0 * expert + hidden * plan.experts as f64);
                    sparse = blocks * (plan.experts as f64 - 2.0) * expert;
                }
                if let Some(memory) = &plan.memory {
                    let layers = plan.memory_layers() as f64;
                    let width = memory.value_dim + memory.pre_dim;
                    sparse = plan.tables() as f64 * (memory.table_rows() * width) as f64;
                    // Query and keys, and the output: nearly all that a memory layer multiplies with. A key counts once for its
                    // approximate score, whatever the rank, and again where it is kept.
                    let exact = if memory.tucker_rank > 1 { memory.top_m * memory.tucker_rank } else { 0 };
                    let keys = memory.heads * 2 * (memory.side_keys + exact) * memory.key_dim;
                    let queries = memory.query_pairs() * 2 * memory.key_dim * memory.hidden_size;
                    let gate = if memory.capabilities.gated { memory.value_dim * memory.hidden_size } else { 0 };
                    let of = &memory.capabilities;
                    let output = if of.projects { memory.pooled_dim() * memory.hidden_size } else { 0 };
                    let projected = of.weigh.is_some_and(|weigh| weigh.projected);
                    let z = if projected { memory.pre_dim * memory.hidden_size } else { 0 };
                    let gathered = memory.heads * memory.top_m * width;
                    activated += layers * (keys + queries + gate + output + z + gathered) as f64;
                }
                near(activated, scale.activated as f64);
                if plan.design != Design::Dense {
                    near(sparse, scale.sparse as f64);
                }
            }
        }
    }

    #[test]
    fn experts_are_the_papers() {
        let scales = [Scale::paper_151m(), Scale::paper_680m(), Scale::paper_1_6b()];
        let experts = scales.map(|scale| Plan::new(Design::Moe, &scale).unwrap().experts);
        assert_eq!(experts, [32, 33, 34]);
    }

    #[test]
    fn a_budget_that_nothing_spends_is_an_error() {
        let error = Plan::new(Design::UltraMem, &Scale { activated: 1000, ..Scale::small() }).unwrap_err();
        assert!(error.to_string().contains("budget of 1000"), "{error}");
        let error = Plan::new(Design::Moe, &Scale::small().with_sparse(100_000)).unwrap_err();
        assert!(error.to_string().contains("sparse parameters"), "{error}");
    }
}
