//! The launches of a forward pass, before any is made.

use cubecl::prelude::*;
use ultramem_kernels::combine::CombineSizes;
use ultramem_kernels::expand::{ExpandPlans, ExpandSizes, ExpandStrategy};
use ultramem_kernels::launch::{Device, Launch, Planned};
use ultramem_kernels::linear::{ProductPlans, ProjectSizes, ProjectStrategy};
use ultramem_kernels::query::QueryPlans;
use ultramem_kernels::score::{ScoreSizes, ScoreStrategy};
use ultramem_kernels::weigh::{WeighPlan, WeighSizes};
use ultramem_kernels::{AddressPlan, RetrievePlans, ShufflePlan};

use crate::{Blocks, ElementType, MemoryConfig, MemoryLayer, Result, Weight};

/// How each stage is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Strategies {
    /// The query projection, and the gate's.
    pub query: ProjectStrategy,
    /// Scoring the keys.
    pub score: ScoreStrategy,
    /// Reading and projecting the values.
    pub expand: ExpandStrategy,
}

impl Strategies {
    /// Strategies for `layer` by which a token's output has the same bits in a call of any number of tokens, [`MemoryLayer::forward`] or
    /// [`MemoryLayer::forward_saving`]: each sum is taken in one order, by one unit or plane. For one device and one version of its compiler, that
    /// is: neither rounds all operations alike everywhere. Costs time where few tokens leave the device idle; docs/performance.md tells how much.
    ///
    /// How keys are scored may hang on the number of tokens: it does not change the bits.
    pub fn invariant<R: Runtime>(layer: &MemoryLayer<R>, tokens: usize) -> Self {
        let (client, device) = (&layer.client, Device::of(&layer.client));
        let product = ProjectStrategy::invariant(client, layer.dtype().storage());
        let score = ScoreStrategy::choose(client, &layer.pass(tokens, &device).score());
        Self { query: product, score, expand: ExpandStrategy::Pooled(product) }
    }
}

/// What a forward pass over so many tokens launches: of each launch its cubes, their units and shared memory, and what its busiest unit
/// goes through. The forward pass makes its launches of these very plans.
///
/// Not listed are cubek's products, which plan themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plans {
    /// Tokens of the pass.
    pub tokens: usize,
    /// Tokens that share one reading of a weight, at least, in a product that plans itself.
    pub tile: usize,
    /// The query projection.
    pub query: QueryPlans,
    /// Scoring the keys and combining what is kept.
    pub retrieve: RetrievePlans,
    /// Weighing, where the layer does.
    pub weigh: Option<WeighPlans>,
    /// The map to the gate.
    pub gate: Option<QueryPlans>,
    /// The map to the output gate.
    pub output_gate: Option<QueryPlans>,
    /// Reading and projecting the values.
    pub expand: ExpandPlans,
}

/// The launches of weighing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeighPlans {
    /// The map to `z`, where it is not the input itself.
    pub z: Option<ProductPlans>,
    /// Looks slots up in a shuffle of several pages.
    pub shuffle: ShufflePlan,
    /// Reads the rows of one page of the pre-values and multiplies the scores.
    pub weigh: Planned<WeighPlan>,
    /// Pages, each with a launch of its own.
    pub pages: usize,
}

impl Plans {
    /// Each launch with its stage, in their order; none for no tokens.
    pub fn launches(&self) -> Vec<(&'static str, Launch)> {
        let retrieve = self.retrieve.launches();
        let last = retrieve.len() - 1;
        let retrieve = retrieve.into_iter().enumerate();
        let weigh = self.weigh.iter().flat_map(WeighPlans::launches);
        let gates = self.gate.iter().chain(&self.output_gate).flat_map(QueryPlans::launches);
        let in_stage = |stage: &'static str| move |launch: Launch| (stage, launch);
        let stages = self.query.launches().into_iter().map(in_stage("query"));
        let stages = stages.chain(retrieve.map(|(at, it)| (if at == last { "combine" } else { "score" }, it)));
        let stages = stages.chain(weigh.map(in_stage("weigh"))).chain(gates.map(in_stage("expand")));
        let stages = stages.chain(self.expand.launches().into_iter().map(in_stage("expand")));
        stages.filter(|(_, launch)| launch.cubes > 0).collect()
    }
}

impl WeighPlans {
    /// The launches in their order.
    fn launches(&self) -> Vec<Launch> {
        let z = self.z.iter().flat_map(ProductPlans::launches);
        let weigh = vec![self.weigh.launch; self.pages];
        z.chain(self.shuffle.launches()).chain(weigh).collect()
    }
}

/// Where a layer's tables lie.
#[derive(Clone, Copy)]
pub(super) struct Tables {
    /// How slots find their rows.
    address: AddressPlan,
    /// Pages of the shuffle, of the values, and of the pre-values.
    pub shuffle: usize,
    pub values: usize,
    pub pre_values: usize,
}

impl MemoryConfig {
    /// What a forward pass over `tokens` tokens launches on `device` by given strategies, weights and activations being of `dtype`, and tables and
    /// shuffle of one page each.
    ///
    /// # Errors
    /// Strategies that the device can't run.
    pub fn plans(&self, device: &Device, tokens: usize, dtype: ElementType, strategies: Strategies) -> Result<Plans> {
        self.pass(device, tokens, dtype).plans(strategies)
    }

    /// A pass with tables and shuffle of one page each.
    pub(super) fn pass<'a>(&'a self, device: &'a Device, tokens: usize, dtype: ElementType) -> Pass<'a> {
        let (rows, table_rows) = (self.rows(), self.table_rows());
        let address = AddressPlan {
            blocks: self.expansion,
            rows,
            table_rows,
            shuffled: self.capabilities.shuffled,
            summed: self.capabilities.blocks == Blocks::Summed,
            shared: table_rows != rows || self.offset() > 0,
        };
        let shuffle = usize::from(self.capabilities.shuffled);
        let tables = Tables { address, shuffle, values: 1, pre_values: 1 };
        Pass { config: self, device, tokens, dtype, tables }
    }
}

impl<R: Runtime> MemoryLayer<R> {
    /// The strategies that [`forward`](Self::forward) picks for this device and number of tokens.
    pub fn strategies(&self, tokens: usize) -> Strategies {
        if self.invariant {
            return Strategies::invariant(self, tokens);
        }
        let (client, device) = (&self.client, Device::of(&self.client));
        let pass = self.pass(tokens, &device);
        Strategies {
            query: ProjectStrategy::choose(client, tokens, self.dtype().storage()),
            score: ScoreStrategy::choose(client, &pass.score()),
            expand: ExpandStrategy::choose(client, &pass.expand()),
        }
    }

    /// The strategies of [`forward_saving`](Self::forward_saving): pooled values, which the way back needs, are kept but where a gate
    /// alone comes behind them.
    pub fn saving_strategies(&self, tokens: usize) -> Strategies {
        let (strategies, of) = (self.strategies(tokens), &self.config.capabilities);
        let expand = match of.gated && !of.output_gated {
            true => strategies.expand,
            false => ExpandStrategy::Pooled(strategies.query),
        };
        Strategies { expand, ..strategies }
    }

    /// What [`forward_with`](Self::forward_with) launches for `tokens` tokens.
    ///
    /// # Errors
    /// Strategies that the device can't run.
    pub fn plans(&self, tokens: usize, strategies: Strategies) -> Result<Plans> {
        self.pass(tokens, &Device::of(&self.client)).plans(strategies)
    }

    pub(super) fn pass<'a>(&'a self, tokens: usize, device: &'a Device) -> Pass<'a> {
        let pre_values = self.pre_table().map_or(1, |table| table.pages().len());
        let (shuffle, values) = (self.weights.shuffle.len(), self.table().pages().len());
        let tables = Tables { address: self.rows().plan(), shuffle, values, pre_values };
        Pass { config: &self.config, device, tokens, dtype: self.dtype(), tables }
    }
}

/// A pass on a device, forward or backward.
pub(super) struct Pass<'a> {
    pub config: &'a MemoryConfig,
    pub device: &'a Device,
    pub tokens: usize,
    pub dtype: ElementType,
    pub tables: Tables,
}

impl Pass<'_> {
    fn plans(&self, strategies: Strategies) -> Result<Plans> {
        let (config, of) = (self.config, &self.config.capabilities);
        let gate = |there: bool, width, bias| there.then(|| self.map(width, bias, strategies.query)).transpose();
        Ok(Plans {
            tokens: self.tokens,
            tile: self.device.tile,
            query: self.map(config.query_pairs() * 2 * config.key_dim, Weight::QueryBias, strategies.query)?,
            retrieve: RetrievePlans::of(self.device, &self.score(), strategies.score, &self.combine())?,
            weigh: self.weigh(strategies.query)?,
            gate: gate(of.gated, config.value_dim, Weight::GateBias)?,
            output_gate: gate(of.output_gated, 1, Weight::OutputGateBias)?,
            expand: ExpandPlans::of(self.device, &self.expand(), strategies.expand)?,
        })
    }

    /// A map of the input.
    fn map(&self, width: usize, bias: Weight, strategy: ProjectStrategy) -> Result<QueryPlans> {
        Ok(QueryPlans::of(self.device, &self.product(width), bias.is_in(self.config), strategy)?)
    }

    fn product(&self, width: usize) -> ProjectSizes {
        ProjectSizes { tokens: self.tokens, depth: self.config.hidden_size, width, dtype: self.dtype }
    }

    pub(super) fn score(&self) -> ScoreSizes {
        let config = self.config;
        ScoreSizes {
            tokens: self.tokens,
            heads: config.heads,
            query_pairs: config.query_pairs(),
            heads_per_pair: config.heads_per_pair(),
            side_keys: config.side_keys,
            key_dim: config.key_dim,
            rank: config.tucker_rank,
            top_m: config.top_m,
            norm: config.capabilities.normalises_queries.then_some(config.norm),
            direct: !config.tucker(),
            dtype: self.dtype,
        }
    }

    pub(super) fn combine(&self) -> CombineSizes {
        let config = self.config;
        CombineSizes {
            tokens: self.tokens,
            heads: config.heads,
            side_keys: config.side_keys,
            top_m: config.top_m,
            rank: config.tucker_rank,
            cores: config.cores,
            additive: !config.tucker(),
        }
    }

    fn weigh(&self, strategy: ProjectStrategy) -> Result<Option<WeighPlans>> {
        let Some(sizes) = self.weighing() else { return Ok(None) };
        let z = match Weight::PreValuesProj.is_in(self.config) {
            true => strategy.plan(self.device, &self.product(self.config.pre_dim))?,
            false => None,
        };
        let shuffle = ShufflePlan::of(self.device, self.tokens.saturating_mul(sizes.slots), self.tables.shuffle);
        Ok(Some(WeighPlans { z, shuffle, weigh: WeighPlan::of(self.device, &sizes)?, pages: sizes.pages }))
    }

    /// The sizes of weighing, where the layer does.
    pub(super) fn weighing(&self) -> Option<WeighSizes> {
        let config = self.config;
        Some(WeighSizes {
            tokens: self.tokens,
            slots: config.heads * config.top_m,
            cores: config.cores,
            address: self.tables.address,
            pre_dim: config.pre_dim,
            dtype: self.dtype,
            activation: config.capabilities.weigh?.activation,
            pages: self.tables.pre_values,
        })
    }

    pub(super) fn expand(&self) -> ExpandSizes {
        let (config, of) = (self.config, &self.config.capabilities);
        ExpandSizes {
            tokens: self.tokens,
            slots: config.heads * config.top_m,
            cores: config.cores,
            address: self.tables.address,
            value_dim: config.value_dim,
            hidden_size: config.hidden_size,
            dtype: self.dtype,
            gated: of.gated,
            projects: of.projects,
            biased: Weight::ValuesBias.is_in(config),
            output_gated: of.output_gated,
            pages: self.tables.values,
            shuffle_pages: self.tables.shuffle,
        }
    }
}
