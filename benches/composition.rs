//! The UltraMem forward pass in stock Burn tensor operations: the yardstick that our kernels are held against.
//!
//! One method a stage, under the names that the layer uses:
//!
//! | stage | in | out |
//! |---|---|---|
//! | query | `[tokens, hidden_size]` | `[2, tokens, key_dim]` |
//! | score | `[2, tokens, key_dim]` | [`Kept`]: `top_m` keys a side |
//! | combine | [`Kept`] | [`Chosen`]: `top_m` slots a head |
//! | expand | [`Chosen`] | `[tokens, hidden_size]` |
//!
//! What it does to be quick: whatever hangs on the weights alone is computed once, in [`Composition::new`]; the ranking
//! of the keys is one batched matrix product and their score vectors another; the largest are found on the device
//! (`argtopk`; `topk_with_indices` sorts on the host); the cores are applied to the kept rows, not to every pair;
//! and the weighted rows are added up by `scatter`, whose threads own a column of a token each, so that none of them wait.

use burn::prelude::*;
use burn::tensor::IndexingUpdateOp;
use burn::tensor::backend::AutodiffBackend;
use ultramem::{HostTensor, Kind, MemoryConfig, Norm, Weight, Weights};

/// The layer's weights on a device, in the layouts that the forward pass reads.
#[derive(Debug, Clone)]
pub struct Composition<B: Backend> {
    config: MemoryConfig,
    /// `[hidden_size, 2 · key_dim]`.
    query_proj: Tensor<B, 2>,
    /// `[1, 1, key_dim]`.
    query_norm: Tensor<B, 3>,
    /// Normalised keys `[2, key_dim, heads · side_keys · tucker_rank]`.
    keys: Tensor<B, 3>,
    /// Normalised keys projected on `u` and `v`: `[2, key_dim, heads · side_keys]`.
    ranking_keys: Tensor<B, 3>,
    /// The cores' rows, `tucker_rank` tensors `[1, heads, 1, (cores + 1) · tucker_rank]`; the last core is the sum of
    /// the others.
    core_rows: Vec<Tensor<B, 4>>,
    /// Slot → virtual address, `[side_keys²]`.
    shuffle_index: Tensor<B, 1, Int>,
    /// `[rows, value_dim]`.
    values: Tensor<B, 2>,
    /// `[expansion · value_dim, hidden_size]`.
    values_proj: Tensor<B, 2>,
}

/// What `score` keeps: the best keys of each side, best first.
#[derive(Debug, Clone)]
pub struct Kept<B: Backend> {
    /// Key numbers `[2, tokens · heads · top_m]`.
    pub keys: Tensor<B, 2, Int>,
    /// Score vectors `[2, tokens · heads · top_m, tucker_rank]`.
    pub scores: Tensor<B, 3>,
}

/// What `combine` chooses: the slots that a token reads, best first within a head.
#[derive(Debug, Clone)]
pub struct Chosen<B: Backend> {
    /// Slots before the shuffle `[tokens · heads · top_m]`.
    pub slots: Tensor<B, 1, Int>,
    /// A score for each slice of the value `[tokens · heads · top_m, cores]`.
    pub scores: Tensor<B, 2>,
}

impl<B: Backend> Composition<B> {
    /// Uploads the weights and prepares what the forward pass would otherwise recompute.
    ///
    /// # Panics
    /// If the layer is not of kind [`Kind::UltraMem`] or has no `shuffle_index`.
    pub fn new(config: MemoryConfig, weights: &Weights, device: &B::Device) -> Self {
        assert_eq!(config.kind(), Some(Kind::UltraMem), "the composition computes UltraMem only");
        let (heads, n, d, r) = (config.heads, config.side_keys, config.key_dim, config.tucker_rank);
        let keys_norm = upload::<B, 1>(&weights[Weight::KeysNorm], device).reshape([1, 1, 1, d, 1]);
        let keys = normalise(upload::<B, 5>(&weights[Weight::Keys], device), 3, keys_norm, &config);
        let sides = [&weights.core_u, &weights.core_v].map(|side| floats(side, [heads, 1, 1, 1, r], device));
        let ranking_keys = (keys.clone() * Tensor::cat(sides.to_vec(), 1)).sum_dim(4);
        let shuffle: Vec<i32> =
            weights.shuffle_index.as_ref().expect("UltraMem shuffles its slots").iter().map(|&a| a as i32).collect();
        Self {
            query_proj: upload::<B, 2>(&weights[Weight::QueryProj], device).transpose(),
            query_norm: upload::<B, 1>(&weights[Weight::QueryNorm], device).reshape([1, 1, d]),
            keys: keys.permute([1, 3, 0, 2, 4]).reshape([2, d, heads * n * r]),
            ranking_keys: ranking_keys.permute([1, 3, 0, 2, 4]).reshape([2, d, heads * n]),
            core_rows: core_rows(&config, &weights.numbers(Weight::Cores), device),
            shuffle_index: Tensor::from_ints(shuffle.as_slice(), device),
            values: upload(&weights[Weight::Values], device),
            values_proj: upload::<B, 2>(&weights[Weight::ValuesProj], device).transpose(),
            config,
        }
    }

    /// The same layer with weights that gradients are taken for.
    pub fn require_grad(mut self) -> Self
    where
        B: AutodiffBackend,
    {
        self.query_proj = self.query_proj.require_grad();
        self.query_norm = self.query_norm.require_grad();
        self.keys = self.keys.require_grad();
        self.core_rows = self.core_rows.into_iter().map(Tensor::require_grad).collect();
        self.values = self.values.require_grad();
        self.values_proj = self.values_proj.require_grad();
        self
    }

    /// The value table.
    pub fn values(&self) -> Tensor<B, 2> {
        self.values.clone()
    }

    /// The same layer with another value table.
    pub fn with_values(self, values: Tensor<B, 2>) -> Self {
        Self { values, ..self }
    }

    /// The layer's output `[tokens, hidden_size]` for `input` `[tokens, hidden_size]`.
    pub fn forward(&self, input: Tensor<B, 2>) -> Tensor<B, 2> {
        let query = self.query(input);
        let kept = self.score(query);
        let chosen = self.combine(kept);
        self.expand(chosen)
    }

    /// Row and column queries `[2, tokens, key_dim]`, normalised.
    pub fn query(&self, input: Tensor<B, 2>) -> Tensor<B, 3> {
        let query = input.matmul(self.query_proj.clone()).reshape([-1, 2, self.config.key_dim as i64]);
        normalise(query, 2, self.query_norm.clone(), &self.config).swap_dims(0, 1)
    }

    /// The `top_m` best keys of each side and head, judged by their projected score.
    pub fn score(&self, query: Tensor<B, 3>) -> Kept<B> {
        let (n, m, r) = (self.config.side_keys, self.config.top_m, self.config.tucker_rank);
        let lists = 2 * query.dims()[1] * self.config.heads;
        let ranking = query.clone().matmul(self.ranking_keys.clone()).reshape([lists, n]);
        let scores = query.matmul(self.keys.clone()).reshape([lists * n, r]);
        let keys = largest(ranking, m);
        let at = (keys.clone() + starts(lists, n, &keys.device())).reshape([lists * m]);
        Kept { keys: keys.reshape([2, -1]), scores: scores.select(0, at).reshape([2, -1, r as i64]) }
    }

    /// The `top_m` best pairs of a kept row key and a kept column key, judged by the sum of the cores' scores.
    pub fn combine(&self, kept: Kept<B>) -> Chosen<B> {
        let (m, r, cores) = (self.config.top_m, self.config.tucker_rank, self.config.cores);
        let lists = kept.keys.dims()[1] / m;
        let device = kept.keys.device();
        let [row_scores, col_scores] = halves(kept.scores);
        let [row_keys, col_keys] = halves(kept.keys);
        let cored = self.apply_cores(row_scores.reshape([-1, self.config.heads as i32, m as i32, r as i32]));
        let pair = largest(self.pair_totals(cored.clone(), col_scores.clone().reshape([lists, m, r])), m);
        let list = starts::<B>(lists, m, &device);
        let row = (pair.clone() / m as i32 + list.clone()).reshape([lists * m]);
        let col = (pair % m as i32 + list).reshape([lists * m]);
        let slots = row_keys.reshape([lists * m]).select(0, row.clone()) * self.config.side_keys as i32
            + col_keys.reshape([lists * m]).select(0, col.clone());
        let cored = cored.narrow(2, 0, cores * r).reshape([lists * m, cores * r]).select(0, row);
        let col_scores = col_scores.reshape([lists * m, r]).select(0, col);
        let scores = cored.reshape([lists * m, cores, r]) * col_scores.reshape([lists * m, 1, r]);
        Chosen { slots, scores: scores.sum_dim(2).reshape([lists * m, cores]) }
    }

    /// `S_rowᵀ · C_k` for every core and for their sum: `[tokens · heads, top_m, (cores + 1) · tucker_rank]` from
    /// `[tokens, heads, top_m, tucker_rank]`.
    fn apply_cores(&self, rows: Tensor<B, 4>) -> Tensor<B, 3> {
        let m = self.config.top_m as i64;
        let terms = self.core_rows.iter().enumerate().map(|(rho, core)| rows.clone().narrow(3, rho, 1) * core.clone());
        let width = (self.config.cores + 1) * self.config.tucker_rank;
        sum(terms).reshape([-1, m, width as i64])
    }

    /// The totals `[tokens · heads, top_m²]` of every pair of kept keys.
    fn pair_totals(&self, cored: Tensor<B, 3>, cols: Tensor<B, 3>) -> Tensor<B, 2> {
        let (m, r, cores) = (self.config.top_m, self.config.tucker_rank, self.config.cores);
        let terms = (0..r)
            .map(|rho| cored.clone().narrow(2, cores * r + rho, 1) * cols.clone().narrow(2, rho, 1).swap_dims(1, 2));
        sum(terms).reshape([-1, (m * m) as i64])
    }

    /// Reads the chosen rows, pools them block by block and projects the blocks.
    pub fn expand(&self, chosen: Chosen<B>) -> Tensor<B, 2> {
        let (expansion, width) = (self.config.expansion, self.config.value_dim);
        let (rows, slice) = (self.config.rows() as i32, width / self.config.cores);
        let [count, cores] = chosen.scores.dims();
        let per_token = self.config.heads * self.config.top_m;
        let tokens = count / per_token;
        let address = self.shuffle_index.clone().select(0, chosen.slots);
        let read = self.values.clone().select(0, address.clone() % rows).reshape([tokens, per_token, cores, slice]);
        let weights = chosen.scores.reshape([tokens, per_token, cores, 1]);
        let weighted = (read * weights).reshape([tokens, per_token, width]);
        let block = (address / rows).reshape([tokens, per_token, 1]).expand([tokens, per_token, width]);
        let pooled = Tensor::zeros([tokens, expansion, width], &weighted.device()).scatter(
            1,
            block,
            weighted,
            IndexingUpdateOp::Add,
        );
        pooled.reshape([tokens, expansion * width]).matmul(self.values_proj.clone())
    }
}

/// The positions of the `k` largest numbers of each row, largest first.
fn largest<B: Backend>(rows: Tensor<B, 2>, k: usize) -> Tensor<B, 2, Int> {
    let [count, width] = rows.dims();
    // `argtopk` refuses to keep everything.
    if k == width {
        return Tensor::arange(0..k as i64, &rows.device()).reshape([1, k]).expand([count, k]);
    }
    rows.argtopk(k, 1)
}

/// Where each of `lists` lists of `length` begins when they lie one behind the other: `[lists, 1]`.
fn starts<B: Backend>(lists: usize, length: usize, device: &B::Device) -> Tensor<B, 2, Int> {
    (Tensor::arange(0..lists as i64, device) * length as i32).reshape([lists, 1])
}

fn sum<B: Backend, const D: usize>(terms: impl Iterator<Item = Tensor<B, D>>) -> Tensor<B, D> {
    terms.reduce(|a, b| a + b).expect("a rank of one or more")
}

/// The row half and the column half of a tensor `[2, …]`, the leading dimension kept.
fn halves<B: Backend, const D: usize, K: burn::tensor::BasicOps<B>>(both: Tensor<B, D, K>) -> [Tensor<B, D, K>; 2] {
    [both.clone().narrow(0, 0, 1), both.narrow(0, 1, 1)]
}

/// RMSNorm or LayerNorm over `dim`.
fn normalise<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    dim: usize,
    weight: Tensor<B, D>,
    config: &MemoryConfig,
) -> Tensor<B, D> {
    let x = match config.norm {
        Norm::Rms => x,
        Norm::Layer => x.clone() - x.mean_dim(dim),
    };
    let scale = (x.clone() * x.clone()).mean_dim(dim).add_scalar(config.norm_eps).sqrt();
    x / scale * weight
}

/// Row ρ of every core, and of their sum behind them, one tensor a ρ.
fn core_rows<B: Backend>(config: &MemoryConfig, cores: &[f32], device: &B::Device) -> Vec<Tensor<B, 4>> {
    let (heads, r) = (config.heads, config.tucker_rank);
    let cores = floats::<B, 4>(cores, [config.cores, heads, r, r], device);
    let all = Tensor::cat(vec![cores.clone(), cores.sum_dim(0)], 0).permute([2, 1, 0, 3]);
    (0..r).map(|rho| all.clone().narrow(0, rho, 1).reshape([1, heads, 1, (config.cores + 1) * r])).collect()
}

fn upload<B: Backend, const D: usize>(tensor: &HostTensor, device: &B::Device) -> Tensor<B, D> {
    Tensor::from_data(TensorData::new(tensor.to_f32(), tensor.shape().to_vec()), device)
}

fn floats<B: Backend, const D: usize>(numbers: &[f32], shape: [usize; D], device: &B::Device) -> Tensor<B, D> {
    Tensor::from_data(TensorData::new(numbers.to_vec(), shape), device)
}
