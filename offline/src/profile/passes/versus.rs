//! What memory layers are compared with, in one block: a dense FFN and a mixture of experts at equal budgets, and attention.
//!
//! The router's product runs whole, so that tokens choose their experts by what it gives; the experts' weights and the caches are memory
//! that nobody has written.

use rand::{Rng, SeedableRng, rngs::StdRng};
use ultramem::kernels::linear::{ProjectStrategy, project};
use ultramem::{ElementType, HostTensor, Result, Tensor};
use ultramem_versus::kernels::{Activation, Experts, attention, dense, moe};
use ultramem_versus::{Design, Plan, Scale};

use super::{Counting, Staged, hidden_states};
use crate::profile::Rates;
use crate::{Blocks, Gpu, OfflineRuntime};

const ACTIVATION: Activation = Activation::Gelu;
/// Blocks side by side that are counted: tiles of one expert lie next to each other, and read the same weights.
const BESIDE: usize = 4;

/// A step of a block's parts, and the GPU that it is counted for.
#[derive(Debug, Clone, Copy)]
pub struct Versus<'a> {
    /// The model; one of its blocks is looked at.
    pub scale: Scale,
    /// Sequences, each with one new token.
    pub tokens: usize,
    /// Positions before that in each.
    pub cached: usize,
    /// Element type of weights and activations.
    pub dtype: ElementType,
    /// The GPU.
    pub gpu: Gpu,
    /// Its rates.
    pub rates: &'a Rates,
}

impl Versus<'_> {
    /// The plans of the dense FFN and of the mixture.
    ///
    /// # Errors
    /// A budget that no dimensions spend.
    pub fn plans(&self) -> Result<[Plan; 2]> {
        Ok([Plan::new(Design::Dense, &self.scale)?, Plan::new(Design::Moe, &self.scale)?])
    }

    /// What the dense FFN, the experts and attention launch.
    ///
    /// # Errors
    /// A budget that no dimensions spend, an element type that the GPU lacks, tensors too large for it, compilers that are not installed.
    pub fn step(&self) -> Result<Vec<Staged>> {
        let [dense, experts] = self.plans()?;
        let mut staged = self.ffn(&dense)?;
        staged.extend(self.ffn(&experts)?);
        let (counting, input) = self.counting()?;
        staged.extend(self.attention(&counting, &input)?);
        Ok(staged)
    }

    /// What the FFN of a plan launches: a dense one's, or the experts'.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn ffn(&self, plan: &Plan) -> Result<Vec<Staged>> {
        let (counting, input) = self.counting()?;
        match plan.experts {
            0 => self.dense(&counting, &input, plan),
            _ => self.experts(&counting, &input, plan),
        }
    }

    /// A device, and the tokens' hidden states on it.
    fn counting(&self) -> Result<(Counting<'_>, Tensor<OfflineRuntime>)> {
        let counting = Counting::new(self.gpu, None, self.rates);
        let hidden = self.scale.hidden_size;
        let input = self.uploaded(&counting, &[self.tokens, hidden], &hidden_states(hidden, self.tokens, 1))?;
        counting.run(Blocks::Spread { whole: 0 })?;
        Ok((counting, input))
    }

    fn dense(&self, counting: &Counting<'_>, input: &Tensor<OfflineRuntime>, plan: &Plan) -> Result<Vec<Staged>> {
        let hidden = self.scale.hidden_size;
        let up = counting.unwritten("up", &[hidden, plan.inner], self.dtype)?;
        let down = counting.unwritten("down", &[plan.inner, hidden], self.dtype)?;
        dense(&counting.client, input, &up, &down, ACTIVATION, self.strategy(counting))?;
        counting.taken("dense")
    }

    fn experts(&self, counting: &Counting<'_>, input: &Tensor<OfflineRuntime>, plan: &Plan) -> Result<Vec<Staged>> {
        let Plan { experts, expert_inner: inner, top_k, .. } = *plan;
        let hidden = self.scale.hidden_size;
        let (mut random, side) = (StdRng::seed_from_u64(2), (3.0 / hidden as f32).sqrt());
        let numbers: Vec<f32> = (0..hidden * experts).map(|_| random.random_range(-side..side)).collect();
        let router = &self.uploaded(counting, &[hidden, experts], &numbers)?;
        let up = &counting.unwritten("up", &[experts, hidden, inner], self.dtype)?;
        let down = &counting.unwritten("down", &[experts, inner, hidden], self.dtype)?;
        counting.run(Blocks::Beside { whole: 1, blocks: BESIDE })?;
        moe(&counting.client, input, &Experts { router, up, down, activation: ACTIVATION, top_k })?;
        counting.taken("experts")
    }

    fn attention(&self, counting: &Counting<'_>, input: &Tensor<OfflineRuntime>) -> Result<Vec<Staged>> {
        let Scale { hidden_size: hidden, attention_heads: heads, .. } = self.scale;
        let cache = [self.tokens, heads, self.cached, hidden / heads];
        let keys = counting.unwritten("cached keys", &cache, self.dtype)?;
        let values = counting.unwritten("cached values", &cache, self.dtype)?;
        let into = counting.unwritten("projection", &[hidden, 3 * hidden], self.dtype)?;
        let out = counting.unwritten("projection", &[hidden; 2], self.dtype)?;
        let (client, strategy) = (&counting.client, self.strategy(counting));
        let projected = project(client, input, &into, self.dtype.storage(), strategy)?;
        let attended = attention(client, &projected, &keys, &values)?;
        project(client, &attended, &out, self.dtype.storage(), strategy)?;
        counting.taken("attention")
    }

    fn strategy(&self, counting: &Counting<'_>) -> ProjectStrategy {
        ProjectStrategy::choose(&counting.client, self.tokens, self.dtype.storage())
    }

    fn uploaded(&self, counting: &Counting<'_>, shape: &[usize], numbers: &[f32]) -> Result<Tensor<OfflineRuntime>> {
        let tensor = HostTensor::from_f32(shape, numbers)?;
        let handle = counting.client.create_from_slice(tensor.cast(self.dtype).bytes());
        Ok(Tensor::new_contiguous(&counting.client, shape.to_vec(), handle, self.dtype.storage()))
    }
}
