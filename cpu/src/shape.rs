//! The sizes of a layer, and what its stages do with them.

use ultramem_kernels::weigh::Activation;
use ultramem_kernels::{Error, Norm};

use crate::Result;

/// The sizes of a layer by their names in the paper's table, and its stages' choices; fields that a layer has no use for are 0 or None.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    /// Width of input and output.
    pub hidden_size: usize,
    /// Independent retrievals per token.
    pub heads: usize,
    /// Query pairs per token.
    pub query_pairs: usize,
    /// Heads that share a query pair: head h uses pair `h / heads_per_pair`.
    pub heads_per_pair: usize,
    /// Keys on each side.
    pub side_keys: usize,
    /// Width of one key.
    pub key_dim: usize,
    /// Width of a side's score vector.
    pub tucker_rank: usize,
    /// Slots kept per head.
    pub top_m: usize,
    /// Scores per slot, one a slice of the value.
    pub cores: usize,
    /// Whether pairs are scored through a Tucker core; else their scores are added, and a softmax runs over a head's chosen.
    pub tucker: bool,
    /// How queries are normalised, and the epsilon under the root.
    pub query_norm: Option<(Norm, f32)>,
    /// How keys are normalised, and the epsilon under the root.
    pub keys_norm: Option<(Norm, f32)>,
    /// Width of one value row.
    pub value_dim: usize,
    /// Width of one pre-value row.
    pub pre_dim: usize,
    /// What is done to the product of the input with a pre-value row.
    pub activation: Option<Activation>,
    /// Rows that the layer reads: address `a` is in virtual block `a / rows`.
    pub rows: usize,
    /// Rows of the table, which layers may share.
    pub table_rows: usize,
    /// The table's row that the layer's row 0 is; behind the table's last row comes its first.
    pub offset: usize,
    /// Pooled values of a token, one for each virtual block that is projected apart.
    pub pooled_blocks: usize,
}

/// What a slot's address names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Row of the table.
    pub row: u32,
    /// The pooled value that the row is added to.
    pub block: u32,
}

impl Shape {
    /// Entries of a token: slots over all heads.
    pub fn entries(&self) -> usize {
        self.heads * self.top_m
    }

    /// Numbers of a token's queries, `query_pairs · 2 · key_dim`.
    pub fn query_width(&self) -> usize {
        self.query_pairs * 2 * self.key_dim
    }

    /// Numbers of a token's pooled values.
    pub fn pooled_dim(&self) -> usize {
        self.pooled_blocks * self.value_dim
    }

    /// Keys of all heads and both sides.
    pub fn all_keys(&self) -> usize {
        self.heads * 2 * self.side_keys
    }

    /// Where the query of a side of a head begins among a token's: `side_of_head` is `head · 2 + side`.
    pub(crate) fn query_of(&self, side_of_head: usize) -> usize {
        (side_of_head / 2 / self.heads_per_pair * 2 + side_of_head % 2) * self.key_dim
    }

    /// The virtual block and the table's row of an address.
    #[inline(always)]
    pub(crate) fn place(&self, address: usize) -> Place {
        let (block, row) = (address / self.rows, address % self.rows);
        let row = row + self.offset;
        let row = if row < self.table_rows { row } else { row - self.table_rows };
        Place { row: row as u32, block: (block % self.pooled_blocks) as u32 }
    }

    pub(crate) fn check(&self) -> Result<()> {
        for (what, value) in [
            ("hidden_size", self.hidden_size),
            ("heads", self.heads),
            ("query_pairs", self.query_pairs),
            ("heads_per_pair", self.heads_per_pair),
            ("side_keys", self.side_keys),
            ("key_dim", self.key_dim),
            ("tucker_rank", self.tucker_rank),
            ("top_m", self.top_m),
            ("cores", self.cores),
            ("value_dim", self.value_dim),
            ("rows", self.rows),
            ("pooled_blocks", self.pooled_blocks),
        ] {
            if value == 0 {
                return Err(Error::Zero { what });
            }
        }
        at_most("top_m", self.top_m, "side_keys", self.side_keys)?;
        at_most("side_keys", self.side_keys, "the limit", u16::MAX as usize)?;
        at_most("heads", self.heads, "query_pairs · heads_per_pair", self.query_pairs * self.heads_per_pair)?;
        at_most("rows of the layer", self.rows, "rows of the table", self.table_rows)?;
        at_most("offset", self.offset + 1, "rows of the table", self.table_rows)?;
        at_most("rows of the table", self.table_rows, "the limit", u32::MAX as usize)?;
        let additive = [("tucker_rank", self.tucker_rank), ("cores", self.cores)];
        if !self.tucker && additive.iter().any(|&(_, value)| value != 1) {
            let value = format!("{additive:?}");
            return Err(Error::Range { what: "sizes of additive scores", value, expected: "1 and 1" });
        }
        if !self.value_dim.is_multiple_of(self.cores) {
            let (value, divisor) = (self.value_dim as u64, self.cores as u64);
            return Err(Error::NotMultiple { what: "value_dim", value, divisor_name: "cores", divisor });
        }
        Ok(())
    }
}

fn at_most(what: &'static str, value: usize, limit_name: &'static str, limit: usize) -> Result<()> {
    if value > limit {
        return Err(Error::Exceeds { what, value: value as u64, limit_name, limit: limit as u64 });
    }
    Ok(())
}

/// Checks that there are as many of something as there must be.
pub(crate) fn number(what: &'static str, value: usize, expected: usize) -> Result<()> {
    if value != expected {
        return Err(Error::Number { what, value: value as u64, expected: expected as u64 });
    }
    Ok(())
}

/// How many rows of `width` there are.
pub(crate) fn whole_rows(
    what: &'static str,
    numbers: usize,
    divisor_name: &'static str,
    width: usize,
) -> Result<usize> {
    if !numbers.is_multiple_of(width) {
        return Err(Error::NotMultiple { what, value: numbers as u64, divisor_name, divisor: width as u64 });
    }
    Ok(numbers / width)
}
