//! What the stages of a layer do, as a choice of capabilities, and the choices that have a name.

use super::Activation;

/// A member of the family: a choice of [`Capabilities`] that has a name. What its publications leave open stays open: see [`Kind::of`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// UltraMem (arXiv 2411.12364): Tucker-decomposed scores, no softmax, implicit value expansion.
    UltraMem,
    /// UltraMemV2 (arXiv 2508.18756): UltraMem whose layers share one table, each from an offset on, with pre-values, a query pair for
    /// two heads, and blocks that are summed before one projection.
    UltraMemV2,
    /// Product-key memory (arXiv 1907.05242): additive scores, softmax over the kept slots.
    ProductKey,
    /// Memory+ (arXiv 2412.09764) as OLMo checkpoints have it: product keys with a query per head, keys taken as they are, and
    /// the pooled value gated by `silu(W_g x)`.
    MemoryPlus,
    /// Memory+ as lingua checkpoints have it: no norms, biases, and gates that may be there or not.
    LinguaMemoryPlus,
    /// PEER (arXiv 2407.04153) as lingua checkpoints have it: each slot's score is multiplied by `gelu(x · u)`, and the pooled value is
    /// the output.
    Peer,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 6] =
        [Self::UltraMem, Self::UltraMemV2, Self::ProductKey, Self::MemoryPlus, Self::LinguaMemoryPlus, Self::Peer];

    /// What it is called.
    pub const fn name(self) -> &'static str {
        match self {
            Self::UltraMem => "UltraMem",
            Self::UltraMemV2 => "UltraMemV2",
            Self::ProductKey => "ProductKey",
            Self::MemoryPlus => "MemoryPlus",
            Self::LinguaMemoryPlus => "LinguaMemoryPlus",
            Self::Peer => "Peer",
        }
    }

    /// What its stages do.
    pub const fn capabilities(self) -> Capabilities {
        let product_key = Capabilities {
            queries: Queries::Shared,
            normalises_queries: true,
            normalises_keys: true,
            scores: Scores::Additive,
            weigh: None,
            shuffled: false,
            shares_table: false,
            blocks: Blocks::Apart,
            gated: false,
            projects: true,
            output_gated: false,
            biased: false,
        };
        let lingua = Capabilities {
            queries: Queries::PerHead,
            normalises_queries: false,
            normalises_keys: false,
            biased: true,
            ..product_key
        };
        let ultramem = Capabilities { scores: Scores::Tucker, shuffled: true, ..product_key };
        match self {
            Self::UltraMem => ultramem,
            Self::UltraMemV2 => Capabilities {
                queries: Queries::PerTwoHeads,
                weigh: Some(Weigh { projected: true, activation: Activation::Identity }),
                shares_table: true,
                blocks: Blocks::Summed,
                ..ultramem
            },
            Self::ProductKey => product_key,
            Self::MemoryPlus => Capabilities {
                queries: Queries::PerHead,
                normalises_keys: false,
                shares_table: true,
                gated: true,
                ..product_key
            },
            Self::LinguaMemoryPlus => Capabilities { shares_table: true, gated: true, ..lingua },
            Self::Peer => Capabilities {
                weigh: Some(Weigh { projected: false, activation: Activation::Gelu }),
                shares_table: true,
                projects: false,
                ..lingua
            },
        }
    }

    /// The kind that makes these choices, if one does. Open are UltraMemV2's activation and blocks, the gates, the table and, without a
    /// gate, the projection of lingua's Memory+, and PEER's output gate and table.
    pub fn of(capabilities: &Capabilities) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.with_choices_of(capabilities) == *capabilities)
    }

    /// The kind's capabilities, with what it leaves open as `other` has it.
    fn with_choices_of(self, other: &Capabilities) -> Capabilities {
        let own = self.capabilities();
        let Capabilities { shares_table, gated, projects, output_gated, blocks, weigh, .. } = *other;
        match self {
            Self::UltraMemV2 => {
                let activation = weigh.map_or(Activation::Identity, |weigh| weigh.activation);
                Capabilities { blocks, weigh: own.weigh.map(|weigh| Weigh { activation, ..weigh }), ..own }
            }
            Self::LinguaMemoryPlus => Capabilities { shares_table, gated, projects, output_gated, ..own },
            Self::Peer => Capabilities { shares_table, output_gated, ..own },
            Self::UltraMem | Self::ProductKey | Self::MemoryPlus => own,
        }
    }
}

/// What the stages of a layer do, a choice for each. Code asks for the choice that it depends on, and never for a kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Capabilities {
    /// Query: which heads share a pair of queries.
    pub queries: Queries,
    /// Query: whether queries are normalised with `query_norm.weight`, or taken as they are.
    pub normalises_queries: bool,
    /// Score: whether keys are normalised with `keys_norm.weight`, or taken as they are.
    pub normalises_keys: bool,
    /// Combine: how a pair of kept keys is scored.
    pub scores: Scores,
    /// Weigh: whether scores are multiplied by what a second table, the pre-values, makes of the input.
    pub weigh: Option<Weigh>,
    /// Expand: whether a slot's address is `shuffle_index[slot]`, or the slot itself.
    pub shuffled: bool,
    /// Expand: whether files keep the table in a module that layers share.
    pub shares_table: bool,
    /// Expand: whether each virtual block is projected by itself, or their sum.
    pub blocks: Blocks,
    /// Expand: whether the pooled value is multiplied by `silu(W_g x)` before the output projection.
    pub gated: bool,
    /// Expand: whether there is an output projection; else the pooled value is the output.
    pub projects: bool,
    /// Expand: whether the output is multiplied by `sigmoid(w · x + b)`, one number a token.
    pub output_gated: bool,
    /// Whether the query, output and gate projections have a bias each.
    pub biased: bool,
}

/// Which heads share a pair of queries, one for the row side and one for the column side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Queries {
    /// All of them.
    Shared,
    /// None: each has its own.
    PerHead,
    /// Two each. There are `tucker_rank` pairs, as the authors' release has them, be they used or not.
    PerTwoHeads,
}

/// How a pair of kept keys is scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scores {
    /// `S_row[i]ᵀ · C_k · S_col[j]`, one score a core (arXiv 2411.12364 section 3.1).
    Tucker,
    /// `S_row[i] + S_col[j]`, and a softmax over a head's chosen slots (arXiv 1907.05242 section 3.2). Rank 1, one core.
    Additive,
}

/// What a slot's scores are multiplied by: `act(z · P[row])` with the pre-values `P` `[rows, pre_dim]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Weigh {
    /// Whether `z = W_p x`; else `z = x`, and `pre_dim` is `hidden_size` (arXiv 2407.04153).
    pub projected: bool,
    /// What is done to the product.
    pub activation: Activation,
}

/// What becomes of the pooled values of several virtual blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Blocks {
    /// Each has columns of `W_o` of its own.
    Apart,
    /// They are summed, and `W_o` has the columns of one.
    Summed,
}
