//! The launches of a forward pass, before any is made.

use cubecl::prelude::*;
use ultramem_kernels::combine::CombineSizes;
use ultramem_kernels::expand::{ExpandPlans, ExpandSizes, ExpandStrategy};
use ultramem_kernels::launch::{Device, Launch, Planned};
use ultramem_kernels::linear::{ProjectPlan, ProjectSizes, ProjectStrategy};
use ultramem_kernels::score::{ScoreSizes, ScoreStrategy};
use ultramem_kernels::weigh::{WeighPlan, WeighSizes};
use ultramem_kernels::{AddressPlan, RetrievePlans};

use crate::{Blocks, ElementType, MemoryConfig, MemoryLayer, Result};

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

/// What a forward pass over so many tokens launches: of each launch its cubes, their units and shared memory, and what its busiest unit
/// goes through. The forward pass makes its launches of these very plans.
///
/// Not listed are cubek's products, which plan themselves, and kernels that give each unit a number and have nothing else to choose: those
/// that add a bias, apply the output gate, round what is not projected, or look up a shuffle of several pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plans {
    /// Tokens of the pass.
    pub tokens: usize,
    /// Tokens that share one reading of a weight, at least, in a product that plans itself.
    pub tile: usize,
    /// The query projection.
    pub query: Option<Planned<ProjectPlan>>,
    /// Scoring the keys and combining what is kept.
    pub retrieve: RetrievePlans,
    /// Weighing, where the layer does.
    pub weigh: Option<WeighPlans>,
    /// The map to the gate.
    pub gate: Option<Planned<ProjectPlan>>,
    /// The map to the output gate.
    pub output_gate: Option<Planned<ProjectPlan>>,
    /// Reading and projecting the values.
    pub expand: ExpandPlans,
}

/// The launches of weighing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeighPlans {
    /// The map to `z`, where it is not the input itself.
    pub z: Option<Planned<ProjectPlan>>,
    /// Reads the rows of one page of the pre-values and multiplies the scores.
    pub weigh: Planned<WeighPlan>,
    /// Pages, each with a launch of its own.
    pub pages: usize,
}

impl Plans {
    /// Each launch with its stage, in their order; none for no tokens.
    pub fn launches(&self) -> Vec<(&'static str, Launch)> {
        let product = |planned: Option<Planned<ProjectPlan>>| planned.map(|planned| planned.launch);
        let retrieve = self.retrieve.launches();
        let last = retrieve.len() - 1;
        let retrieve = retrieve.into_iter().enumerate();
        let weigh = self
            .weigh
            .iter()
            .flat_map(|it| product(it.z).into_iter().chain(std::iter::repeat_n(it.weigh.launch, it.pages)));
        let gates = product(self.gate).into_iter().chain(product(self.output_gate));
        let in_stage = |stage: &'static str| move |launch: Launch| (stage, launch);
        let stages = product(self.query).into_iter().map(in_stage("query"));
        let stages = stages.chain(retrieve.map(|(at, it)| (if at == last { "combine" } else { "score" }, it)));
        let stages = stages.chain(weigh.map(in_stage("weigh"))).chain(gates.map(in_stage("expand")));
        let stages = stages.chain(self.expand.launches().into_iter().map(in_stage("expand")));
        stages.filter(|(_, launch)| launch.cubes > 0).collect()
    }
}

/// Where a layer's tables lie.
#[derive(Clone, Copy)]
struct Tables {
    /// How slots find their rows.
    address: AddressPlan,
    /// Pages of the values, and of the pre-values.
    values: usize,
    pre_values: usize,
}

impl MemoryConfig {
    /// What a forward pass over `tokens` tokens launches on `device` by given strategies, weights and activations being of `dtype`, and tables and
    /// shuffle of one page each.
    ///
    /// # Errors
    /// Strategies that the device can't run.
    pub fn plans(&self, device: &Device, tokens: usize, dtype: ElementType, strategies: Strategies) -> Result<Plans> {
        let (rows, table_rows) = (self.rows(), self.table_rows());
        let address = AddressPlan {
            blocks: self.expansion,
            rows,
            table_rows,
            shuffled: self.capabilities.shuffled,
            summed: self.capabilities.blocks == Blocks::Summed,
            shared: table_rows != rows || self.offset() > 0,
        };
        let tables = Tables { address, values: 1, pre_values: 1 };
        Pass { config: self, device, tokens, dtype, tables }.plans(strategies)
    }
}

impl<R: Runtime> MemoryLayer<R> {
    /// The strategies that [`forward`](Self::forward) picks for this device and number of tokens.
    pub fn strategies(&self, tokens: usize) -> Strategies {
        let (client, config) = (&self.client, &self.config);
        let (side_keys, key_dim, top_m) = (config.side_keys, config.key_dim, config.top_m);
        Strategies {
            query: ProjectStrategy::choose(client, tokens, self.dtype().storage()),
            score: ScoreStrategy::choose(client, tokens, config.heads, side_keys, key_dim, top_m),
            expand: ExpandStrategy::choose(client, &self.pass(tokens, &Device::of(client)).expand()),
        }
    }

    /// What [`forward_with`](Self::forward_with) launches for `tokens` tokens.
    ///
    /// # Errors
    /// Strategies that the device can't run.
    pub fn plans(&self, tokens: usize, strategies: Strategies) -> Result<Plans> {
        self.pass(tokens, &Device::of(&self.client)).plans(strategies)
    }

    fn pass<'a>(&'a self, tokens: usize, device: &'a Device) -> Pass<'a> {
        let pre_values = self.pre_table().map_or(1, |table| table.pages().len());
        let tables = Tables { address: self.rows().plan(), values: self.table().pages().len(), pre_values };
        Pass { config: &self.config, device, tokens, dtype: self.dtype(), tables }
    }
}

/// A forward pass on a device.
struct Pass<'a> {
    config: &'a MemoryConfig,
    device: &'a Device,
    tokens: usize,
    dtype: ElementType,
    tables: Tables,
}

impl Pass<'_> {
    fn plans(&self, strategies: Strategies) -> Result<Plans> {
        let (config, of) = (self.config, &self.config.capabilities);
        let map = |there: bool, width: usize| match there {
            true => self.map(width, strategies.query),
            false => Ok(None),
        };
        Ok(Plans {
            tokens: self.tokens,
            tile: self.device.tile,
            query: map(true, config.query_pairs() * 2 * config.key_dim)?,
            retrieve: RetrievePlans::of(self.device, &self.score(), strategies.score, &self.combine())?,
            weigh: self.weigh(strategies.query)?,
            gate: map(of.gated, config.value_dim)?,
            output_gate: map(of.output_gated, 1)?,
            expand: ExpandPlans::of(self.device, &self.expand(), strategies.expand)?,
        })
    }

    /// A map of the input.
    fn map(&self, width: usize, strategy: ProjectStrategy) -> Result<Option<Planned<ProjectPlan>>> {
        let sizes = ProjectSizes { tokens: self.tokens, depth: self.config.hidden_size, width, dtype: self.dtype };
        Ok(strategy.plan(self.device, &sizes)?)
    }

    fn score(&self) -> ScoreSizes {
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
        }
    }

    fn combine(&self) -> CombineSizes {
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
        let config = self.config;
        let Some(weigh) = config.capabilities.weigh else { return Ok(None) };
        let pages = self.tables.pre_values;
        let sizes = WeighSizes {
            tokens: self.tokens,
            slots: config.heads * config.top_m,
            cores: config.cores,
            address: self.tables.address,
            pre_dim: config.pre_dim,
            dtype: self.dtype,
            activation: weigh.activation,
            pages,
        };
        let z = if weigh.projected { self.map(config.pre_dim, strategy)? } else { None };
        Ok(Some(WeighPlans { z, weigh: WeighPlan::of(self.device, &sizes)?, pages }))
    }

    fn expand(&self) -> ExpandSizes {
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
            finishes: !of.projects || of.biased || of.output_gated,
            pages: self.tables.values,
        }
    }
}
