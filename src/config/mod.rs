//! What a memory layer looks like: [`Dimensions`] as a person writes them, [`MemoryConfig`] once they are checked.
//!
//! Names follow the paper (arXiv 2411.12364) and the table in each field's documentation.

mod kind;
mod presets;

use std::ops::Deref;

pub use kind::{Blocks, Capabilities, Kind, Queries, Scores, Weigh};
pub use presets::SharedSizes;
use ultramem_kernels::Error as Limit;
pub use ultramem_kernels::weigh::Activation;
pub use ultramem_kernels::{ElementType, Norm};

use crate::{Error, Result};

/// A table that has more rows than one layer reads, because layers share it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SharedTable {
    /// Rows of the table.
    pub rows: usize,
    /// The table's row that the layer's row 0 is. Behind the table's last row comes its first.
    pub offset: usize,
}

/// The dimensions of a layer, not yet checked: fill in what differs from a preset and give it to
/// [`MemoryConfig::new`].
#[derive(Debug, Clone, PartialEq)]
pub struct Dimensions {
    /// What the stages do; those of a kind are [`Kind::capabilities`].
    pub capabilities: Capabilities,
    /// Width of input and output.
    pub hidden_size: usize,
    /// Independent retrievals per token.
    pub heads: usize,
    /// Keys on each side, row and column (the paper's n). `side_keys² = expansion · rows`.
    pub side_keys: usize,
    /// Width of one key (d_k).
    pub key_dim: usize,
    /// Width of a side's score vector (r). 1 for additive scores.
    pub tucker_rank: usize,
    /// Slots kept per head (m).
    pub top_m: usize,
    /// Scores per slot, one per slice of the value (multi-core scoring, h). 1 for additive scores.
    pub cores: usize,
    /// Virtual blocks per physical table (implicit value expansion, E).
    pub expansion: usize,
    /// Width of one value row (d_v).
    pub value_dim: usize,
    /// Width of one pre-value row; 0 for a layer that does not weigh.
    pub pre_dim: usize,
    /// Where the layer's rows lie in a table that is larger; None: the table has this layer's rows.
    pub shared: Option<SharedTable>,
    /// How queries and keys are normalised over `key_dim`.
    pub norm: Norm,
    /// The epsilon under the norm's root.
    pub norm_eps: f32,
}

impl Default for Dimensions {
    /// The settings that UltraMem's layers share: 2 heads, rank 2, 2 cores, expansion 4, RMSNorm. The sizes that
    /// make the table are small; set them.
    fn default() -> Self {
        Self {
            capabilities: Kind::UltraMem.capabilities(),
            hidden_size: 256,
            heads: 2,
            side_keys: 128,
            key_dim: 32,
            tucker_rank: 2,
            top_m: 16,
            cores: 2,
            expansion: 4,
            value_dim: 64,
            pre_dim: 0,
            shared: None,
            norm: Norm::Rms,
            norm_eps: 1e-5,
        }
    }
}

/// A checked configuration. Reads like [`Dimensions`]; can only be made by [`MemoryConfig::new`], so that whoever
/// holds one need not check again.
#[derive(Debug, Clone, PartialEq)]
pub struct MemoryConfig(Dimensions);

impl Deref for MemoryConfig {
    type Target = Dimensions;

    fn deref(&self) -> &Dimensions {
        &self.0
    }
}

impl MemoryConfig {
    /// Checks the dimensions against each other and against the limits of the kernels.
    ///
    /// # Errors
    /// [`Error::Kernel`] or [`Error::Config`] with the numbers, for instance "top_m 80 exceeds side_keys 64".
    pub fn new(dims: Dimensions) -> Result<Self> {
        for (what, value) in [
            ("hidden_size", dims.hidden_size),
            ("heads", dims.heads),
            ("side_keys", dims.side_keys),
            ("key_dim", dims.key_dim),
            ("tucker_rank", dims.tucker_rank),
            ("top_m", dims.top_m),
            ("cores", dims.cores),
            ("expansion", dims.expansion),
            ("value_dim", dims.value_dim),
        ] {
            if value == 0 {
                return Err(Limit::Zero { what }.into());
            }
        }
        at_most("hidden_size", dims.hidden_size, "the limit", MAX_WIDTH)?;
        at_most("key_dim", dims.key_dim, "the limit", MAX_WIDTH)?;
        at_most("value_dim", dims.value_dim, "the limit", MAX_WIDTH)?;
        at_most("heads", dims.heads, "the limit", MAX_HEADS)?;
        at_most("side_keys", dims.side_keys, "the limit", MAX_SIDE_KEYS)?;
        at_most("tucker_rank", dims.tucker_rank, "the limit", MAX_RANK)?;
        at_most("cores", dims.cores, "the limit", MAX_CORES)?;
        at_most("expansion", dims.expansion, "the limit", MAX_EXPANSION)?;
        at_most("top_m", dims.top_m, "side_keys", dims.side_keys)?;
        multiple("side_keys squared", dims.side_keys * dims.side_keys, "expansion", dims.expansion)?;
        multiple("value_dim", dims.value_dim, "cores", dims.cores)?;
        if !(dims.norm_eps.is_finite() && dims.norm_eps >= 0.0) {
            return Err(Error::Config {
                what: "norm_eps",
                value: dims.norm_eps.to_string(),
                expected: "a finite number, zero or more",
            });
        }
        check_capabilities(&dims)?;
        let config = Self(dims);
        config.check_table()?;
        Ok(config)
    }

    /// The sizes that every layer has, by name.
    pub fn sizes(&self) -> [(&'static str, usize); 9] {
        [
            ("hidden_size", self.hidden_size),
            ("heads", self.heads),
            ("side_keys", self.side_keys),
            ("key_dim", self.key_dim),
            ("tucker_rank", self.tucker_rank),
            ("top_m", self.top_m),
            ("cores", self.cores),
            ("expansion", self.expansion),
            ("value_dim", self.value_dim),
        ]
    }

    /// Checks that a shared table has the layer's rows.
    fn check_table(&self) -> Result<()> {
        let Some(SharedTable { rows, offset }) = self.shared else { return Ok(()) };
        at_most("rows of the layer", self.rows(), "rows of the shared table", rows)?;
        at_most("rows of the shared table", rows, "the limit", MAX_SHARED_ROWS)?;
        if offset >= rows {
            let (value, limit) = (offset as u64, rows as u64 - 1);
            return Err(
                Limit::Exceeds { what: "offset", value, limit_name: "the shared table's last row", limit }.into()
            );
        }
        Ok(())
    }

    /// Value rows that the layer reads (N): `side_keys² / expansion`.
    pub fn rows(&self) -> usize {
        self.slots() / self.expansion
    }

    /// Rows of the table, which may be shared.
    pub fn table_rows(&self) -> usize {
        self.shared.map_or(self.rows(), |table| table.rows)
    }

    /// The table's row that the layer's row 0 is.
    pub fn offset(&self) -> usize {
        self.shared.map_or(0, |table| table.offset)
    }

    /// Where an address below `side_keys²` is: its virtual block, and the row of the table.
    pub fn place(&self, address: usize) -> (usize, usize) {
        let (block, row) = (address / self.rows(), address % self.rows());
        (block, (row + self.offset()) % self.table_rows())
    }

    /// Virtual slots that a head can choose from: `side_keys²`.
    pub fn slots(&self) -> usize {
        self.side_keys * self.side_keys
    }

    /// Query pairs per token.
    pub fn query_pairs(&self) -> usize {
        match self.capabilities.queries {
            Queries::PerHead => self.heads,
            Queries::Shared => 1,
            Queries::PerTwoHeads => self.tucker_rank,
        }
    }

    /// Heads that share a query pair: head h uses pair `h / heads_per_pair`.
    pub fn heads_per_pair(&self) -> usize {
        match self.capabilities.queries {
            Queries::PerHead => 1,
            Queries::Shared => self.heads,
            Queries::PerTwoHeads => 2,
        }
    }

    /// Whether pairs are scored through a Tucker core.
    pub fn tucker(&self) -> bool {
        self.capabilities.scores == Scores::Tucker
    }

    /// Whether the layer trains with the auxiliary loss of its cores: with Tucker scores that no pre-values weigh.
    pub fn has_auxiliary_loss(&self) -> bool {
        self.tucker() && self.capabilities.weigh.is_none()
    }

    /// The kind that makes these choices, if one does.
    pub fn kind(&self) -> Option<Kind> {
        Kind::of(&self.capabilities)
    }

    /// Pooled values of a token: one for each virtual block that is projected apart.
    pub fn pooled_blocks(&self) -> usize {
        match self.capabilities.blocks {
            Blocks::Apart => self.expansion,
            Blocks::Summed => 1,
        }
    }

    /// Width of the pooled value before the output projection: `pooled_blocks · value_dim`.
    pub fn pooled_dim(&self) -> usize {
        self.pooled_blocks() * self.value_dim
    }
}

/// Checks what the capabilities ask of the sizes.
fn check_capabilities(dims: &Dimensions) -> Result<()> {
    let Capabilities { scores, queries, blocks, gated, projects, weigh, .. } = dims.capabilities;
    let wrong = |what, value: usize, expected| Err(Error::Config { what, value: value.to_string(), expected });
    if scores == Scores::Additive {
        for (what, value) in [("tucker_rank", dims.tucker_rank), ("cores", dims.cores)] {
            if value != 1 {
                return wrong(what, value, "1 for additive scores");
            }
        }
    }
    if queries == Queries::PerTwoHeads && dims.heads > 2 * dims.tucker_rank {
        return wrong(
            "heads",
            dims.heads,
            "at most 2 · tucker_rank for a query pair per two heads, of which there are tucker_rank",
        );
    }
    let apart = if blocks == Blocks::Apart { dims.expansion } else { 1 };
    if gated && apart != 1 {
        return wrong("expansion", dims.expansion, "1 for a layer with a gate");
    }
    if gated && !projects {
        return Err(Error::Config {
            what: "gate",
            value: "there".into(),
            expected: "none for a layer without an output projection",
        });
    }
    if !projects && apart * dims.value_dim != dims.hidden_size {
        return wrong("value_dim", dims.value_dim, "hidden_size, for a layer without an output projection");
    }
    match weigh {
        None if dims.pre_dim != 0 => wrong("pre_dim", dims.pre_dim, "0 for a layer that does not weigh"),
        Some(weigh) if !weigh.projected && dims.pre_dim != dims.hidden_size => {
            wrong("pre_dim", dims.pre_dim, "hidden_size, where the input itself is multiplied with the pre-values")
        }
        Some(_) if dims.pre_dim == 0 => Err(Limit::Zero { what: "pre_dim" }.into()),
        _ => at_most("pre_dim", dims.pre_dim, "the limit", MAX_WIDTH),
    }
}

/// A row and an offset below it add up to less than 2³².
const MAX_SHARED_ROWS: usize = 1 << 31;
const MAX_WIDTH: usize = 1 << 20;
const MAX_HEADS: usize = 1 << 10;
/// Slots are counted in a u32: `side_keys²` must be below 2³².
const MAX_SIDE_KEYS: usize = u16::MAX as usize;
const MAX_RANK: usize = 16;
const MAX_CORES: usize = 64;
const MAX_EXPANSION: usize = 1 << 10;

fn at_most(what: &'static str, value: usize, limit_name: &'static str, limit: usize) -> Result<()> {
    if value > limit {
        return Err(Limit::Exceeds { what, value: value as u64, limit_name, limit: limit as u64 }.into());
    }
    Ok(())
}

fn multiple(what: &'static str, value: usize, divisor_name: &'static str, divisor: usize) -> Result<()> {
    if !value.is_multiple_of(divisor) {
        return Err(Limit::NotMultiple { what, value: value as u64, divisor_name, divisor: divisor as u64 }.into());
    }
    Ok(())
}
