//! The model: a transformer over bytes with causal attention, RMSNorm before each part and a GELU feed-forward network.
//!
//! | part | in | out |
//! |---|---|---|
//! | embedding of byte and position | `[rows, context]` | `[rows · context, width]` |
//! | each block: attention, feed-forward network, both added to what they read | `[rows · context, width]` | the same |
//! | norm and head | `[rows · context, width]` | logits `[rows · context, 256]` |

use burn::{
    module::{Module, Param},
    nn::{Embedding, EmbeddingConfig, Initializer, Linear, LinearConfig, RmsNorm, RmsNormConfig},
    prelude::*,
    tensor::{
        activation::{gelu, log_softmax, softmax},
        backend::AutodiffBackend,
    },
};
use serde::{Deserialize, Serialize};
use ultramem::burn::{
    Memories, Memory, MemoryBackend, MemoryModel, ProductKeyMemoryConfig, UltraMemConfig, UltraMemV2Config,
};

use crate::{Result, data::Batch};

/// Symbols: one a byte.
const SYMBOLS: usize = 256;

/// The sizes of the model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, clap::Args)]
pub struct Sizes {
    /// Transformer blocks
    #[arg(long, default_value_t = 4)]
    pub blocks: usize,
    /// Width of the hidden states
    #[arg(long, default_value_t = 128)]
    pub width: usize,
    /// Attention heads
    #[arg(long, default_value_t = 4)]
    pub heads: usize,
    /// Width of the feed-forward network
    #[arg(long, default_value_t = 512)]
    pub ffn: usize,
    /// Bytes that a prediction can see
    #[arg(long, default_value_t = 128)]
    pub context: usize,
    /// The memory layer
    #[arg(long, value_enum, default_value = "none")]
    #[serde(default)]
    pub memory: Kind,
    /// Where it reads and where it adds
    #[arg(long, default_value = "1:2")]
    #[serde(default = "skip")]
    pub skip: String,
    /// Keys on each side of UltraMem are twice as many; product keys have this many
    #[arg(long)]
    pub knum: Option<usize>,
}

fn skip() -> String {
    "1:2".into()
}

/// The memory layer of a model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A dense model
    #[default]
    None,
    /// Product keys: knum 91, kdim 32, vdim 128, knn 16, 2 heads
    Pkm,
    /// UltraMem: knum 128, kdim 32, vdim 64, knn 16, 2 heads, 2 cores, E 4
    Ultramem,
    /// UltraMemV2, a layer in every block: knum 52, kdim 32, vdim 64, pre_vdim 32, knn 16, 1 head, 2 cores, share_ratio 0.5
    #[serde(rename = "ultramem-v2")]
    UltramemV2,
}

/// The language model.
#[derive(Module, Debug)]
pub struct Model<B: Backend> {
    bytes: Embedding<B>,
    positions: Param<Tensor<B, 2>>,
    blocks: Vec<Block<B>>,
    memories: Option<Memories<B>>,
    norm: RmsNorm<B>,
    head: Linear<B>,
}

/// One block.
#[derive(Module, Debug)]
struct Block<B: Backend> {
    attention_norm: RmsNorm<B>,
    /// Queries, keys and values in one product.
    attention_in: Linear<B>,
    attention_out: Linear<B>,
    ffn_norm: RmsNorm<B>,
    ffn_in: Linear<B>,
    ffn_out: Linear<B>,
    heads: usize,
}

impl<B: MemoryBackend> Model<B> {
    /// A model to start training from. The device's seed gives its weights.
    ///
    /// # Errors
    /// A memory that can't be placed in the model.
    pub fn new(sizes: &Sizes, device: &B::Device) -> Result<Self> {
        let width = sizes.width;
        Ok(Self {
            bytes: EmbeddingConfig::new(SYMBOLS, width).with_initializer(SMALL).init(device),
            positions: SMALL.init([sizes.context, width], device),
            blocks: (0..sizes.blocks).map(|_| Block::new(sizes, device)).collect(),
            norm: RmsNormConfig::new(width).init(device),
            head: linear(width, SYMBOLS, device),
            memories: memories(sizes, device)?,
        })
    }

    /// The first memory layer, for files. It has the tables, where layers share them.
    pub fn memory(&self) -> Option<&Memory<B>> {
        self.memories.as_ref()?.layers().first()
    }

    /// What the first memory layer reads, `[rows · context, width]`, for `bytes` `[rows, context]`.
    pub fn memory_input(&self, bytes: Tensor<B, 2, Int>) -> Option<Tensor<B, 2>> {
        let at = self.memories.as_ref()?.placement().first()?.0;
        self.run(bytes, Some(at)).1
    }

    /// Logits `[rows · context, 256]` for `bytes` `[rows, context]`.
    pub fn forward(&self, bytes: Tensor<B, 2, Int>) -> Tensor<B, 2> {
        self.run(bytes, None).0
    }

    /// The logits, and the normalised FFN input of the block `watched`.
    fn run(&self, bytes: Tensor<B, 2, Int>, watched: Option<usize>) -> (Tensor<B, 2>, Option<Tensor<B, 2>>) {
        let [rows, context] = bytes.dims();
        let positions = self.positions.val().narrow(0, 0, context).unsqueeze();
        let mask = Tensor::<B, 2, Bool>::tril_mask([context, context], 0, &bytes.device());
        let mut hidden = (self.bytes.forward(bytes) + positions).flatten(0, 1);
        let mut carried = self.memories.as_ref().map(Memories::carry);
        let mut seen = None;
        for (at, block) in self.blocks.iter().enumerate() {
            hidden = block.attention(hidden, rows, &mask);
            let read = block.ffn_norm.forward(hidden.clone());
            if watched == Some(at) {
                seen = Some(read.clone());
            }
            if let Some(carried) = &mut carried {
                carried.read(at, &read);
            }
            hidden = hidden + block.ffn(read);
            if let Some(carried) = &mut carried {
                hidden = carried.add(at, hidden);
            }
        }
        (self.head.forward(self.norm.forward(hidden)), seen)
    }

    /// The mean loss of a batch in nats per byte.
    pub fn loss(&self, batch: &Batch, device: &B::Device) -> Tensor<B, 1> {
        let part = |from: usize, less: usize| {
            let rows = batch.rows.iter();
            let bytes: Vec<i32> =
                rows.flat_map(|row| row[from..row.len() - less].iter().map(|&byte| i32::from(byte))).collect();
            let shape = [batch.rows.len(), bytes.len() / batch.rows.len()];
            Tensor::<B, 2, Int>::from_data(TensorData::new(bytes, shape), device)
        };
        let targets = part(1, 0).flatten::<1>(0, 1).unsqueeze_dim(1);
        -log_softmax(self.forward(part(0, 1)), 1).gather(1, targets).mean()
    }
}

impl<B: MemoryBackend + AutodiffBackend> MemoryModel<B> for Model<B> {
    fn memories(&mut self) -> Vec<&mut Memory<B>> {
        self.memories.as_mut().map_or_else(Vec::new, Memories::layers_mut)
    }
}

/// The layers of the kind that `sizes` names, where it says.
fn memories<B: MemoryBackend>(sizes: &Sizes, device: &B::Device) -> Result<Option<Memories<B>>> {
    let (width, heads) = (sizes.width, 2);
    let make = || -> ultramem::Result<Memory<B>> {
        Ok(match sizes.memory {
            Kind::Pkm => {
                let config = ProductKeyMemoryConfig::new(width, sizes.knum.unwrap_or(91), 32, 128, 16);
                config.with_heads(heads).init(device)?.into()
            }
            _ => {
                let config = UltraMemConfig::new(width, 2 * sizes.knum.unwrap_or(128), 32, 64, 16);
                config.with_heads(heads).init(device)?.into()
            }
        })
    };
    match sizes.memory {
        Kind::None => Ok(None),
        Kind::UltramemV2 => {
            let knum = sizes.knum.unwrap_or(52);
            let config = UltraMemV2Config::new(width, sizes.blocks, knum, 32, 64, 32, 16);
            Ok(Some(config.init(device)?.into()))
        }
        _ => Ok(Some(Memories::new(sizes.skip.parse()?, sizes.blocks, make)?)),
    }
}

impl<B: Backend> Block<B> {
    fn new(sizes: &Sizes, device: &B::Device) -> Self {
        let width = sizes.width;
        Self {
            attention_norm: RmsNormConfig::new(width).init(device),
            attention_in: linear(width, 3 * width, device),
            attention_out: linear(width, width, device),
            ffn_norm: RmsNormConfig::new(width).init(device),
            ffn_in: linear(width, sizes.ffn, device),
            ffn_out: linear(sizes.ffn, width, device),
            heads: sizes.heads,
        }
    }

    /// `hidden` and what each position attends to. `mask` `[context, context]` is true where a position may not look.
    fn attention(&self, hidden: Tensor<B, 2>, rows: usize, mask: &Tensor<B, 2, Bool>) -> Tensor<B, 2> {
        let [tokens, width] = hidden.dims();
        let head_dim = width / self.heads;
        let all = self.attention_in.forward(self.attention_norm.forward(hidden.clone()));
        let part = |at: usize| {
            let part = all.clone().narrow(1, at * width, width);
            part.reshape([rows, tokens / rows, self.heads, head_dim]).swap_dims(1, 2)
        };
        let scores = part(0).matmul(part(1).transpose()).div_scalar((head_dim as f32).sqrt());
        let scores = scores.mask_fill(mask.clone().unsqueeze(), f32::NEG_INFINITY);
        let seen = softmax(scores, 3).matmul(part(2)).swap_dims(1, 2).reshape([tokens, width]);
        hidden + self.attention_out.forward(seen)
    }

    fn ffn(&self, read: Tensor<B, 2>) -> Tensor<B, 2> {
        self.ffn_out.forward(gelu(self.ffn_in.forward(read)))
    }
}

const SMALL: Initializer = Initializer::Normal { mean: 0.0, std: 0.02 };

fn linear<B: Backend>(from: usize, to: usize, device: &B::Device) -> Linear<B> {
    LinearConfig::new(from, to).with_bias(false).with_initializer(SMALL).init(device)
}
