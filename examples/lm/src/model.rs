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
    tensor::activation::{gelu, log_softmax, softmax},
};
use serde::{Deserialize, Serialize};

use crate::data::Batch;

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
}

/// The language model.
#[derive(Module, Debug)]
pub struct Model<B: Backend> {
    bytes: Embedding<B>,
    positions: Param<Tensor<B, 2>>,
    blocks: Vec<Block<B>>,
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

impl<B: Backend> Model<B> {
    /// A model to start training from. The device's seed gives its weights.
    pub fn new(sizes: &Sizes, device: &B::Device) -> Self {
        let width = sizes.width;
        Self {
            bytes: EmbeddingConfig::new(SYMBOLS, width).with_initializer(SMALL).init(device),
            positions: SMALL.init([sizes.context, width], device),
            blocks: (0..sizes.blocks).map(|_| Block::new(sizes, device)).collect(),
            norm: RmsNormConfig::new(width).init(device),
            head: linear(width, SYMBOLS, device),
        }
    }

    /// Logits `[rows · context, 256]` for `bytes` `[rows, context]`.
    pub fn forward(&self, bytes: Tensor<B, 2, Int>) -> Tensor<B, 2> {
        let [rows, context] = bytes.dims();
        let positions = self.positions.val().slice([0..context]).unsqueeze();
        let mask = Tensor::<B, 2, Bool>::tril_mask([context, context], 0, &bytes.device());
        let mut hidden = (self.bytes.forward(bytes) + positions).flatten(0, 1);
        for block in &self.blocks {
            hidden = block.attention(hidden, rows, &mask);
            let read = block.ffn_norm.forward(hidden.clone());
            hidden = hidden + block.ffn(read);
        }
        self.head.forward(self.norm.forward(hidden))
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
