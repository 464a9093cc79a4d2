//! What a memory layer looks like: [`Dimensions`] as a person writes them, [`MemoryConfig`] once they are checked.
//!
//! Names follow the paper (arXiv 2411.12364) and the table in each field's documentation.

use std::ops::Deref;

use ultramem_kernels::Error as Limit;
pub use ultramem_kernels::{ElementType, Norm};

use crate::{Error, Result};

/// A member of the family: a choice of [`Capabilities`] that has a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// UltraMem (arXiv 2411.12364): Tucker-decomposed scores, no softmax, implicit value expansion.
    UltraMem,
    /// Product-key memory (arXiv 1907.05242): additive scores, softmax over the kept slots.
    ProductKey,
    /// Memory+ (arXiv 2412.09764) as released: product keys with a query per head, keys taken as they are, and
    /// the pooled value gated by `silu(W_g x)`.
    MemoryPlus,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::UltraMem, Self::ProductKey, Self::MemoryPlus];

    /// What it is called.
    pub const fn name(self) -> &'static str {
        match self {
            Self::UltraMem => "UltraMem",
            Self::ProductKey => "ProductKey",
            Self::MemoryPlus => "MemoryPlus",
        }
    }

    /// What its stages do.
    pub const fn capabilities(self) -> Capabilities {
        let product_key = Capabilities {
            queries: Queries::Shared,
            normalises_keys: true,
            scores: Scores::Additive,
            shuffled: false,
            shares_table: false,
            gated: false,
        };
        match self {
            Self::UltraMem => Capabilities { scores: Scores::Tucker, shuffled: true, ..product_key },
            Self::ProductKey => product_key,
            Self::MemoryPlus => Capabilities {
                queries: Queries::PerHead,
                normalises_keys: false,
                shares_table: true,
                gated: true,
                ..product_key
            },
        }
    }
}

/// What the stages of a layer do, a choice for each. Code asks for the choice that it depends on, and never for a kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Capabilities {
    /// Query: which heads share a pair of queries.
    pub queries: Queries,
    /// Score: whether keys are normalised with `keys_norm.weight`, or taken as they are.
    pub normalises_keys: bool,
    /// Combine: how a pair of kept keys is scored.
    pub scores: Scores,
    /// Expand: whether a slot's address is `shuffle_index[slot]`, or the slot itself.
    pub shuffled: bool,
    /// Expand: whether files keep the table in a module that layers share.
    pub shares_table: bool,
    /// Expand: whether the pooled value is multiplied by `silu(W_g x)` before the output projection.
    pub gated: bool,
}

/// Which heads share a pair of queries, one for the row side and one for the column side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Queries {
    /// All of them.
    Shared,
    /// None: each has its own.
    PerHead,
}

/// How a pair of kept keys is scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scores {
    /// `S_row[i]ᵀ · C_k · S_col[j]`, one score a core (arXiv 2411.12364 section 3.1).
    Tucker,
    /// `S_row[i] + S_col[j]`, and a softmax over a head's chosen slots (arXiv 1907.05242 section 3.2). Rank 1, one core.
    Additive,
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
            norm: Norm::Rms,
            norm_eps: 1e-5,
        }
    }
}

impl Dimensions {
    /// One of the four memory layers of the 1B-parameter model that the authors' release configures: hidden 768, knum
    /// 808, kdim 192, vdim 384, knn 80. 20 transformer blocks carry four of them.
    pub fn ultramem_v1_1b() -> Self {
        Self { hidden_size: 768, side_keys: 1616, key_dim: 192, value_dim: 384, top_m: 80, ..Self::default() }
    }

    /// One of the three memory layers of the paper's smallest model, UltraMem-151M-x12 (arXiv 2411.12364): hidden 1024, knum
    /// 1100, vdim 512.
    ///
    /// Derived from the paper's tables, which do not print a layer: 12 dense blocks of width 1024 have the 151 M parameters of
    /// Table 1, and 2.03 B parameters less the 0.17 B dense ones of Table 2 are 3 layers · 1100² rows · 512. In Table 2,
    /// implicit value expansion adds 10.73 M: `3 · (3 · 512 · 1024 + 2 heads · 2 sides · 1000 · k)` at knum 1000, so a key
    /// holds k = 501 numbers, here `key_dim` 256 at rank 2. Rank, cores and expansion are Table 5's. Of `top_m`, 42 a
    /// head, no count of parameters tells anything: it is the one number that could not be checked.
    pub fn ultramem_151m() -> Self {
        Self { hidden_size: 1024, side_keys: 2200, key_dim: 256, value_dim: 512, top_m: 42, ..Self::default() }
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
        if dims.capabilities.scores == Scores::Additive {
            for (what, value) in [("tucker_rank", dims.tucker_rank), ("cores", dims.cores)] {
                if value != 1 {
                    return Err(Error::Config { what, value: value.to_string(), expected: "1 for additive scores" });
                }
            }
        }
        if dims.capabilities.gated && dims.expansion != 1 {
            let (what, value) = ("expansion", dims.expansion.to_string());
            return Err(Error::Config { what, value, expected: "1 for a layer with a gate" });
        }
        Ok(Self(dims))
    }

    /// Physical value rows (N): `side_keys² / expansion`.
    pub fn rows(&self) -> usize {
        self.slots() / self.expansion
    }

    /// Virtual slots that a head can choose from: `side_keys²`.
    pub fn slots(&self) -> usize {
        self.side_keys * self.side_keys
    }

    /// Query pairs per token: one per head, or one that all heads share.
    pub fn query_heads(&self) -> usize {
        match self.capabilities.queries {
            Queries::PerHead => self.heads,
            Queries::Shared => 1,
        }
    }

    /// Whether pairs are scored through a Tucker core.
    pub fn tucker(&self) -> bool {
        self.capabilities.scores == Scores::Tucker
    }

    /// The kind that makes these choices, if one does.
    pub fn kind(&self) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.capabilities() == self.capabilities)
    }

    /// Width of the pooled value before the output projection: `expansion · value_dim`.
    pub fn pooled_dim(&self) -> usize {
        self.expansion * self.value_dim
    }
}

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
