//! How Burn users write a layer down, and the layer to start training from.

use burn::{
    config::Config,
    tensor::{Distribution, ElementConversion, Int, Tensor},
};

use super::{Memories, Memory, MemoryBackend, MemoryPlus, Placement, ProductKeyMemory, UltraMem, UltraMemV2};
use crate::{Activation, Blocks, Capabilities, Dimensions, Kind, MemoryConfig, Norm, SharedSizes, Weigh, Weights};

/// An UltraMem layer. What the fields mean stands in [`Dimensions`].
#[derive(Config, Debug)]
pub struct UltraMemConfig {
    /// Width of input and output.
    pub hidden_size: usize,
    /// Keys on each side; `side_keys² = expansion · rows`.
    pub side_keys: usize,
    /// Width of one key.
    pub key_dim: usize,
    /// Width of one value row.
    pub value_dim: usize,
    /// Slots kept per head.
    pub top_m: usize,
    /// Independent retrievals per token.
    #[config(default = 2)]
    pub heads: usize,
    /// Width of a side's score vector.
    #[config(default = 2)]
    pub tucker_rank: usize,
    /// Scores per slot, one per slice of the value.
    #[config(default = 2)]
    pub cores: usize,
    /// Virtual blocks per physical table.
    #[config(default = 4)]
    pub expansion: usize,
    /// LayerNorm without bias instead of RMSNorm, for queries and keys.
    #[config(default = false)]
    pub layer_norm: bool,
    /// The epsilon under the norm's root.
    #[config(default = 1e-5)]
    pub norm_eps: f32,
    /// Whether the table learns sparsely: its gradient lists the rows that were read, and
    /// [`Trainer`](super::Trainer) updates those alone. Else it is a parameter like any other, with a dense gradient.
    #[config(default = true)]
    pub sparse: bool,
}

/// A product-key memory. What the fields mean stands in [`Dimensions`].
#[derive(Config, Debug)]
pub struct ProductKeyMemoryConfig {
    /// Width of input and output.
    pub hidden_size: usize,
    /// Keys on each side; the table has `side_keys²` rows.
    pub side_keys: usize,
    /// Width of one key.
    pub key_dim: usize,
    /// Width of one value row.
    pub value_dim: usize,
    /// Slots kept per head.
    pub top_m: usize,
    /// Independent retrievals per token.
    #[config(default = 2)]
    pub heads: usize,
    /// LayerNorm without bias instead of RMSNorm, for queries and keys.
    #[config(default = false)]
    pub layer_norm: bool,
    /// The epsilon under the norm's root.
    #[config(default = 1e-5)]
    pub norm_eps: f32,
    /// As for [`UltraMemConfig`].
    #[config(default = true)]
    pub sparse: bool,
}

/// A Memory+ layer with a table of its own. What the fields mean stands in [`Dimensions`].
#[derive(Config, Debug)]
pub struct MemoryPlusConfig {
    /// Width of input and output.
    pub hidden_size: usize,
    /// Keys on each side; the table has `side_keys²` rows.
    pub side_keys: usize,
    /// Width of one key.
    pub key_dim: usize,
    /// Width of one value row.
    pub value_dim: usize,
    /// Slots kept per head.
    pub top_m: usize,
    /// Independent retrievals per token, each with a query of its own.
    #[config(default = 4)]
    pub heads: usize,
    /// LayerNorm without bias instead of RMSNorm, for queries.
    #[config(default = false)]
    pub layer_norm: bool,
    /// The epsilon under the norm's root.
    #[config(default = 1e-5)]
    pub norm_eps: f32,
    /// As for [`UltraMemConfig`].
    #[config(default = true)]
    pub sparse: bool,
}

/// The layers of an UltraMemV2 model, which share their tables. What the fields mean stands in [`Dimensions`] and [`SharedSizes`].
#[derive(Config, Debug)]
pub struct UltraMemV2Config {
    /// Width of input and output.
    pub hidden_size: usize,
    /// Blocks of the model.
    pub blocks: usize,
    /// The square root of the rows that each layer brings to the table.
    pub knum: usize,
    /// Width of one key.
    pub key_dim: usize,
    /// Width of one value row.
    pub value_dim: usize,
    /// Width of one pre-value row.
    pub pre_dim: usize,
    /// Slots kept per head.
    pub top_m: usize,
    /// Where the layers are, as [`Placement`] writes it, or "full".
    #[config(default = "String::from(\"full\")")]
    pub placement: String,
    /// The share of the table that one layer reads.
    #[config(default = 0.5)]
    pub share_ratio: f64,
    /// Keys of a side for each of its rows: `key_expand_time²` virtual blocks.
    #[config(default = 1)]
    pub key_expand_time: usize,
    /// Whether virtual blocks are projected apart, rather than summed.
    #[config(default = false)]
    pub blocks_apart: bool,
    /// Whether the products with the pre-values go through the exact gelu.
    #[config(default = false)]
    pub gelu: bool,
    /// Independent retrievals per token.
    #[config(default = 1)]
    pub heads: usize,
    /// Width of a side's score vector.
    #[config(default = 2)]
    pub tucker_rank: usize,
    /// Scores per slot, one per slice of the value.
    #[config(default = 2)]
    pub cores: usize,
    /// LayerNorm without bias instead of RMSNorm, for queries and keys.
    #[config(default = false)]
    pub layer_norm: bool,
    /// The epsilon under the norm's root.
    #[config(default = 1e-5)]
    pub norm_eps: f32,
    /// As for [`UltraMemConfig`].
    #[config(default = true)]
    pub sparse: bool,
}

impl UltraMemV2Config {
    /// The dimensions of the layer at `place` of as many as there are places, checked.
    ///
    /// # Errors
    /// As [`MemoryConfig::new`], and a placement that the model does not have.
    pub fn dimensions(&self, place: usize) -> crate::Result<MemoryConfig> {
        let layers = Placement::parse(&self.placement, self.blocks)?.layers();
        let activation = if self.gelu { Activation::Gelu } else { Activation::Identity };
        let blocks = if self.blocks_apart { Blocks::Apart } else { Blocks::Summed };
        let dimensions = Dimensions {
            capabilities: Capabilities {
                weigh: Some(Weigh { projected: true, activation }),
                blocks,
                ..Kind::UltraMemV2.capabilities()
            },
            hidden_size: self.hidden_size,
            heads: self.heads,
            key_dim: self.key_dim,
            tucker_rank: self.tucker_rank,
            top_m: self.top_m,
            cores: self.cores,
            value_dim: self.value_dim,
            pre_dim: self.pre_dim,
            norm: norm(self.layer_norm),
            norm_eps: self.norm_eps,
            ..Dimensions::default()
        };
        let Self { knum, share_ratio, key_expand_time, .. } = *self;
        MemoryConfig::new(dimensions.sharing(&SharedSizes {
            knum,
            layers,
            layer: place,
            share_ratio,
            key_expand_time,
        })?)
    }

    /// As [`UltraMemConfig::init`].
    ///
    /// # Errors
    /// Dimensions that make no layer, or a placement that the model does not have.
    pub fn init<B: MemoryBackend>(&self, device: &B::Device) -> crate::Result<UltraMemV2<B>> {
        let placement = Placement::parse(&self.placement, self.blocks)?;
        let layer = |place| -> crate::Result<_> {
            let config = self.dimensions(place)?;
            let weights = Weights::random(&config, seed::<B>(device));
            Ok((config, weights))
        };
        let layers = (0..placement.layers()).map(layer).collect::<crate::Result<Vec<_>>>()?;
        Ok(UltraMemV2 { memories: Memories::sharing(placement, self.blocks, &layers, self.sparse, device)? })
    }
}

impl UltraMemConfig {
    /// The dimensions, checked.
    ///
    /// # Errors
    /// As [`MemoryConfig::new`].
    pub fn dimensions(&self) -> crate::Result<MemoryConfig> {
        MemoryConfig::new(Dimensions {
            capabilities: Kind::UltraMem.capabilities(),
            hidden_size: self.hidden_size,
            heads: self.heads,
            side_keys: self.side_keys,
            key_dim: self.key_dim,
            tucker_rank: self.tucker_rank,
            top_m: self.top_m,
            cores: self.cores,
            expansion: self.expansion,
            value_dim: self.value_dim,
            norm: norm(self.layer_norm),
            norm_eps: self.norm_eps,
            ..Dimensions::default()
        })
    }

    /// A layer to start training from, initialised as [`Weights::random`] says. The device's seed gives its weights.
    ///
    /// # Errors
    /// Dimensions that make no layer.
    pub fn init<B: MemoryBackend>(&self, device: &B::Device) -> crate::Result<UltraMem<B>> {
        Ok(UltraMem { memory: memory(self.dimensions()?, self.sparse, device)? })
    }
}

impl ProductKeyMemoryConfig {
    /// The dimensions, checked.
    ///
    /// # Errors
    /// As [`MemoryConfig::new`].
    pub fn dimensions(&self) -> crate::Result<MemoryConfig> {
        MemoryConfig::new(Dimensions {
            capabilities: Kind::ProductKey.capabilities(),
            hidden_size: self.hidden_size,
            heads: self.heads,
            side_keys: self.side_keys,
            key_dim: self.key_dim,
            tucker_rank: 1,
            top_m: self.top_m,
            cores: 1,
            expansion: 1,
            value_dim: self.value_dim,
            norm: norm(self.layer_norm),
            norm_eps: self.norm_eps,
            ..Dimensions::default()
        })
    }

    /// As [`UltraMemConfig::init`].
    ///
    /// # Errors
    /// Dimensions that make no layer.
    pub fn init<B: MemoryBackend>(&self, device: &B::Device) -> crate::Result<ProductKeyMemory<B>> {
        Ok(ProductKeyMemory { memory: memory(self.dimensions()?, self.sparse, device)? })
    }
}

impl MemoryPlusConfig {
    /// The dimensions, checked.
    ///
    /// # Errors
    /// As [`MemoryConfig::new`].
    pub fn dimensions(&self) -> crate::Result<MemoryConfig> {
        MemoryConfig::new(Dimensions {
            capabilities: Kind::MemoryPlus.capabilities(),
            hidden_size: self.hidden_size,
            heads: self.heads,
            side_keys: self.side_keys,
            key_dim: self.key_dim,
            tucker_rank: 1,
            top_m: self.top_m,
            cores: 1,
            expansion: 1,
            value_dim: self.value_dim,
            norm: norm(self.layer_norm),
            norm_eps: self.norm_eps,
            ..Dimensions::default()
        })
    }

    /// As [`UltraMemConfig::init`].
    ///
    /// # Errors
    /// Dimensions that make no layer.
    pub fn init<B: MemoryBackend>(&self, device: &B::Device) -> crate::Result<MemoryPlus<B>> {
        Ok(MemoryPlus { memory: memory(self.dimensions()?, self.sparse, device)? })
    }
}

fn norm(layer_norm: bool) -> Norm {
    if layer_norm { Norm::Layer } else { Norm::Rms }
}

fn memory<B: MemoryBackend>(config: MemoryConfig, sparse: bool, device: &B::Device) -> crate::Result<Memory<B>> {
    let weights = Weights::random(&config, seed::<B>(device));
    Memory::from_weights(config, &weights, sparse, device)
}

/// Drawn from the device's random numbers.
fn seed<B: MemoryBackend>(device: &B::Device) -> u64 {
    let draw = Tensor::<B, 1, Int>::random([2], Distribution::Uniform(0.0, f64::from(1 << 24)), device);
    draw.into_data().iter::<i64>().fold(0, |seed, part| seed << 24 | part.elem::<i64>() as u64)
}
