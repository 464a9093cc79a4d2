//! The layers that publications configure, and the sizes of a table that layers share.

use super::{Dimensions, Kind, SharedTable};
use crate::{Error, Result};

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

    /// Layer `layer` of the 20 of the 227M-parameter UltraMemV2 model, with 1.2 B sparse parameters, that the authors' release configures:
    /// hidden 768, knum 360, kdim 192, vdim 192, pre_vdim 192, knn 32, one head, share_ratio 0.5, no expansion; a layer in every block.
    ///
    /// # Errors
    /// A layer that the model does not have.
    pub fn ultramem_v2_227m(layer: usize) -> Result<Self> {
        let sizes = SharedSizes { knum: 360, layers: 20, layer, share_ratio: 0.5, key_expand_time: 1 };
        let own = Self { hidden_size: 768, key_dim: 192, value_dim: 192, pre_dim: 192, ..Self::v2() };
        own.sharing(&sizes)
    }

    /// Layer `layer` of the 16 of the 1B-parameter UltraMemV2 model that the authors' release configures: hidden 2048, knum 128, kdim 512, vdim 768,
    /// pre_vdim 256, knn 32, share_ratio 0.0625, key_expand_time 2; a layer in every block. Its script names no number of heads; this has
    /// one, as the smaller model.
    ///
    /// # Errors
    /// A layer that the model does not have.
    pub fn ultramem_v2_1b(layer: usize) -> Result<Self> {
        let sizes = SharedSizes { knum: 128, layers: 16, layer, share_ratio: 0.0625, key_expand_time: 2 };
        let own = Self { hidden_size: 2048, key_dim: 512, value_dim: 768, pre_dim: 256, ..Self::v2() };
        own.sharing(&sizes)
    }

    /// What both presets of UltraMemV2 have in common.
    fn v2() -> Self {
        Self { capabilities: Kind::UltraMemV2.capabilities(), heads: 1, top_m: 32, ..Self::default() }
    }

    /// The same with the keys, the blocks and the part of the table that `sizes` make.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::Kernel`] for sizes that make no layer.
    pub fn sharing(self, sizes: &SharedSizes) -> Result<Self> {
        let expansion = sizes.key_expand_time.saturating_mul(sizes.key_expand_time);
        Ok(Self { side_keys: sizes.side_keys()?, expansion, shared: Some(sizes.table()?), ..self })
    }
}

/// What UltraMemV2's configuration says of a table that layers share, and what follows from it (arXiv 2508.18756; the authors' release).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SharedSizes {
    /// The square root of the rows that each layer brings to the table.
    pub knum: usize,
    /// Layers that share it (mem_layer_num).
    pub layers: usize,
    /// The layer, from 0 on.
    pub layer: usize,
    /// The share of the table that one layer reads, above 0 and at most 1.
    pub share_ratio: f64,
    /// Keys of a side for each of its rows: `key_expand_time²` virtual blocks.
    pub key_expand_time: usize,
}

impl SharedSizes {
    /// The table, `knum² · layers` rows, and where the layer begins, `layer · knum²`.
    ///
    /// # Errors
    /// [`Error::Config`] for a layer that there is not, or a size that is none.
    pub fn table(&self) -> Result<SharedTable> {
        for (what, value) in [("knum", self.knum), ("number of layers", self.layers)] {
            if !(1..=MAX_SIZE).contains(&value) {
                return Err(Error::Config { what, value: value.to_string(), expected: "1 to 65535" });
            }
        }
        if self.layer >= self.layers {
            return Err(Error::Config {
                what: "layer",
                value: format!("{} of {}", self.layer, self.layers),
                expected: "one of the model's, from 0 on",
            });
        }
        let own = self.knum * self.knum;
        Ok(SharedTable { rows: own * self.layers, offset: own * self.layer })
    }

    /// Keys of a side: `key_expand_time · ⌊√(rows of the table · share_ratio)⌋`.
    ///
    /// # Errors
    /// As [`table`](Self::table), and for a share or an expansion that makes no sense.
    pub fn side_keys(&self) -> Result<usize> {
        let rows = self.table()?.rows as f64;
        if !(self.share_ratio > 0.0 && self.share_ratio <= 1.0) {
            let value = self.share_ratio.to_string();
            return Err(Error::Config { what: "share_ratio", value, expected: "above 0 and at most 1" });
        }
        if !(1..=MAX_SIZE).contains(&self.key_expand_time) {
            let value = self.key_expand_time.to_string();
            return Err(Error::Config { what: "key_expand_time", value, expected: "1 to 65535" });
        }
        Ok((rows * self.share_ratio).sqrt() as usize * self.key_expand_time)
    }
}

/// Larger sizes make more keys than [`MemoryConfig::new`](crate::MemoryConfig::new) takes.
const MAX_SIZE: usize = u16::MAX as usize;
