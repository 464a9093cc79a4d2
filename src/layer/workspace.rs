//! Device memory of one call, beyond weights, input and output.

use cubecl::prelude::*;
use ultramem_kernels::expand::ExpandPlans;
use ultramem_kernels::launch::Device;
use ultramem_kernels::{RetrievePlans, Tensor, in_one_allocation};

use crate::{MemoryLayer, Plans, Strategies};

/// Bytes of an f32 or of a u32.
const WORD: usize = 4;

impl<R: Runtime> MemoryLayer<R> {
    /// Bytes that [`forward_with`](Self::forward_with) allocates besides its output, of its [`plans`](Self::plans). Bytes per token:
    ///
    /// | what | bytes per token | when |
    /// |---|---|---|
    /// | queries | `4 · query_pairs · 2 · key_dim` | |
    /// | approximate scores | `4 · heads · 2 · side_keys`, [of so many tokens](ultramem_kernels::RetrievePlans::approximate_numbers) | keys are split |
    /// | kept keys and scores | `4 · heads · 2 · top_m · (1 + tucker_rank)` | |
    /// | slots and scores | `4 · heads · top_m · (1 + cores)` | |
    /// | addresses | `4 · heads · top_m`, for each table | the shuffle has several pages |
    /// | z, products, weighed scores | `4 · (pre_dim + heads · top_m · (1 + cores))`; no z where it is the input | the layer weighs |
    /// | gate | `4 · value_dim` | the layer has one |
    /// | output gate | 4 | the layer has one |
    /// | pooled values | element size · `pooled_blocks · value_dim`; in f32 for a table of several pages or without a projection | values are pooled |
    /// | projected values | `4 · hidden_size` | they are projected, and there is a bias or an output gate |
    ///
    /// Products on matrix units that are cut along their depth take [`parts_bytes`](ultramem_kernels::linear::ProductPlans::parts_bytes) more.
    ///
    /// Slots and scores live as long as the [`Forward`](crate::Forward) that holds them, the others as long as the call. Up to 64 tokens, on CUDA, what comes
    /// before pooling is one allocation, which lives as long as slots and scores do. The
    /// allocator rounds each of these buffers up to its alignment, 256 bytes on most devices, and keeps what it
    /// has reserved for the next call.
    pub fn workspace_bytes(&self, plans: &Plans) -> usize {
        let config = self.config();
        let queries = WORD * config.query_pairs() * 2 * config.key_dim;
        let kept = WORD * config.heads * 2 * config.top_m * (1 + config.tucker_rank);
        let chosen = WORD * config.heads * config.top_m * (1 + config.cores);
        let of = &config.capabilities;
        let when = |there: bool, bytes: usize| if there { bytes } else { 0 };
        let slots = config.heads * config.top_m;
        let tables = 1 + usize::from(of.weigh.is_some());
        let addresses = when(self.weights.shuffle.len() > 1, WORD * slots * tables);
        let z = when(of.weigh.is_some_and(|weigh| weigh.projected), WORD * config.pre_dim);
        let weighed = z + when(of.weigh.is_some(), WORD * slots * (1 + config.cores));
        let gates = when(of.gated, WORD * config.value_dim) + when(of.output_gated, WORD);
        let wide = self.table().pages().len() > 1 || !of.projects;
        let pooled = match plans.expand {
            ExpandPlans::Fused { .. } => 0,
            ExpandPlans::Pooled { .. } => config.pooled_dim() * if wide { WORD } else { self.dtype().size() },
        };
        let finished = of.projects && (of.biased || of.output_gated);
        let projected = when(finished, WORD * config.hidden_size);
        plans
            .tokens
            .saturating_mul(queries + kept + chosen + addresses + weighed + gates + pooled + projected)
            .saturating_add(plans.retrieve.approximate_numbers(plans.tokens)[0].saturating_mul(WORD))
            .saturating_add(parts(plans))
    }

    /// Runs `enqueue`, which launches the stages before [`expand`](Self::expand) for `input`, as [`forward_with`](Self::forward_with) does: what they write
    /// is one allocation on CUDA, up to 64 tokens.
    pub fn in_workspace<T>(&self, input: &Tensor<R>, strategies: Strategies, enqueue: impl FnOnce() -> T) -> T {
        let tokens = input.shape().first().copied().unwrap_or(0);
        in_one_allocation(self.client(), || self.shared_workspace(tokens, strategies), enqueue)
    }

    /// Bytes of each tensor that comes before pooling, if a call of so many tokens takes them in one allocation: for many, slots would keep too much.
    fn shared_workspace(&self, tokens: usize, strategies: Strategies) -> Vec<usize> {
        if tokens > MOST_SHARED || tokens == 0 {
            return Vec::new();
        }
        let (config, device) = (self.config(), Device::of(self.client()));
        let pass = self.pass(tokens, &device);
        // What can't be planned is told when it is launched.
        let retrieve = RetrievePlans::of(&device, &pass.score(), strategies.score, &pass.combine());
        let approximate = retrieve.map_or(0, |plans| plans.approximate_numbers(tokens)[0]);
        let (kept, slots) = (config.heads * 2 * config.top_m, config.heads * config.top_m);
        let per_token =
            [config.query_pairs() * 2 * config.key_dim, kept, kept * config.tucker_rank, slots, slots * config.cores];
        let weighed = match config.capabilities.weigh {
            Some(weigh) => [if weigh.projected { config.pre_dim } else { 0 }, slots, slots * config.cores],
            None => [0; 3],
        };
        let per_token = per_token.into_iter().chain(weighed);
        let numbers = per_token.map(|numbers| tokens.saturating_mul(numbers)).chain([approximate]);
        numbers.map(|numbers| numbers.saturating_mul(WORD)).collect()
    }
}

/// Tokens up to which a call's workspace is one allocation.
const MOST_SHARED: usize = 64;

/// Bytes of sums that products write in parts.
fn parts(plans: &Plans) -> usize {
    let maps = [Some(plans.query), plans.gate, plans.output_gate];
    let maps = maps.into_iter().flatten().filter_map(|map| map.product);
    let project = match plans.expand {
        ExpandPlans::Fused { .. } => None,
        ExpandPlans::Pooled { project, .. } => project,
    };
    maps.chain(plans.weigh.and_then(|weigh| weigh.z)).chain(project).map(|product| product.parts_bytes()).sum()
}
