//! The launches of a backward pass and of an update of the tables, before any is made.

use cubecl::prelude::*;
use ultramem_kernels::combine::CombineBackwardPlans;
use ultramem_kernels::expand::{ExpandBackwardPlans, ExpandBackwardSizes};
use ultramem_kernels::launch::{Device, Launch};
use ultramem_kernels::linear::ProjectStrategy;
use ultramem_kernels::optimiser::{Rule, StepPlans, StepSizes};
use ultramem_kernels::query::{MapSizes, QueryBackwardPlans, QueryBackwardSizes};
use ultramem_kernels::score::ScoreBackwardPlans;
use ultramem_kernels::weigh::{WeighBackwardPlans, WeighBackwardSizes};

use super::plans::Pass;
use crate::{ElementType, MemoryConfig, MemoryLayer, Result, Weight};

/// What a backward pass over so many tokens launches, stage by stage. The backward pass makes its launches of these very plans.
///
/// Not listed are cubek's products, which plan themselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackwardPlans {
    /// Reading and projecting the values.
    pub expand: ExpandBackwardPlans,
    /// Weighing, where the layer does.
    pub weigh: Option<WeighBackwardPlans>,
    /// Combining what was kept.
    pub combine: CombineBackwardPlans,
    /// Scoring the keys.
    pub score: ScoreBackwardPlans,
    /// The maps of the input.
    pub query: QueryBackwardPlans,
}

impl BackwardPlans {
    /// Each launch with its stage, in their order; none for no tokens.
    pub fn launches(&self) -> Vec<(&'static str, Launch)> {
        let weigh = self.weigh.as_ref().map_or(Vec::new(), WeighBackwardPlans::launches);
        let stages = [
            ("expand-backward", self.expand.launches()),
            ("weigh-backward", weigh),
            ("combine-backward", self.combine.launches()),
            ("score-backward", self.score.launches()),
            ("query-backward", self.query.launches()),
        ];
        let launches = stages.into_iter().flat_map(|(stage, launches)| launches.into_iter().map(move |it| (stage, it)));
        launches.filter(|(_, launch)| launch.cubes > 0).collect()
    }
}

/// What an update of a layer's tables launches, by the gradients of a backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UpdatePlans {
    /// Of the values.
    pub values: StepPlans,
    /// Of the pre-values, where the layer has them.
    pub pre_values: Option<StepPlans>,
}

impl UpdatePlans {
    /// The launches in their order, the values' first; none for no tokens.
    pub fn launches(&self) -> Vec<Launch> {
        let tables = [Some(self.values), self.pre_values];
        let launches = tables.iter().flatten().flat_map(StepPlans::launches);
        launches.filter(|launch| launch.cubes > 0).collect()
    }
}

impl MemoryConfig {
    /// What a backward pass over `tokens` tokens launches on `device`, its products computed by `product`, weights and activations being of `dtype`,
    /// and tables and shuffle of one page each.
    ///
    /// # Errors
    /// Sizes that the device can't run.
    pub fn backward_plans(
        &self,
        device: &Device,
        tokens: usize,
        dtype: ElementType,
        product: ProjectStrategy,
    ) -> Result<BackwardPlans> {
        self.pass(device, tokens, dtype).backward_plans(product)
    }

    /// What an update of the tables by `rule` launches on `device`, by the gradients of `tokens` tokens, the tables being of one page each.
    ///
    /// # Errors
    /// Sizes that the device can't run.
    pub fn update_plans(&self, device: &Device, tokens: usize, rule: &Rule) -> Result<UpdatePlans> {
        self.pass(device, tokens, ElementType::F32).update_plans(rule)
    }
}

impl<R: Runtime> MemoryLayer<R> {
    /// What [`backward`](Self::backward) launches for `tokens` tokens.
    ///
    /// # Errors
    /// Sizes that the device can't run.
    pub fn backward_plans(&self, tokens: usize) -> Result<BackwardPlans> {
        self.pass(tokens, &Device::of(&self.client)).backward_plans(self.backward_product(tokens))
    }

    /// What [`update_values`](Self::update_values) launches by `rule`, for the gradients of `tokens` tokens, and
    /// [`update_pre_values`](Self::update_pre_values) where the layer has pre-values. A buffer that somebody else holds is copied first, which is not
    /// listed.
    ///
    /// # Errors
    /// Sizes that the device can't run.
    pub fn update_plans(&self, tokens: usize, rule: &Rule) -> Result<UpdatePlans> {
        self.pass(tokens, &Device::of(&self.client)).update_plans(rule)
    }
}

impl Pass<'_> {
    fn backward_plans(&self, product: ProjectStrategy) -> Result<BackwardPlans> {
        let (device, config, of) = (self.device, self.config, &self.config.capabilities);
        let expand = ExpandBackwardSizes { forward: self.expand(), pooled: !of.gated, projected: of.output_gated };
        let keys_norm = of.normalises_keys.then_some(config.norm);
        let weigh = self.weighing().map(|forward| WeighBackwardSizes {
            forward,
            shuffle_pages: self.tables.shuffle,
            z: if Weight::PreValuesProj.is_in(config) { ElementType::F32 } else { self.dtype },
        });
        Ok(BackwardPlans {
            expand: ExpandBackwardPlans::of(device, &expand, product)?,
            weigh: weigh.map(|sizes| WeighBackwardPlans::of(device, &sizes)).transpose()?,
            combine: CombineBackwardPlans::of(device, &self.combine())?,
            score: ScoreBackwardPlans::of(device, &self.score(), keys_norm)?,
            query: QueryBackwardPlans::of(device, &self.maps(), product)?,
        })
    }

    /// The maps of the input, in the order in which they are gone back through.
    fn maps(&self) -> QueryBackwardSizes {
        let config = self.config;
        let maps = [
            (Weight::QueryProj, Some(Weight::QueryBias), config.query_pairs() * 2 * config.key_dim),
            (Weight::PreValuesProj, None, config.pre_dim),
            (Weight::GateProj, Some(Weight::GateBias), config.value_dim),
            (Weight::OutputGate, Some(Weight::OutputGateBias), 1),
        ];
        let maps = maps.into_iter().filter(|(weight, ..)| weight.is_in(config));
        let sizes = |(_, bias, width): (Weight, Option<Weight>, usize)| MapSizes {
            width,
            biased: bias.is_some_and(|bias| bias.is_in(config)),
        };
        QueryBackwardSizes {
            tokens: self.tokens,
            hidden_size: config.hidden_size,
            dtype: self.dtype,
            maps: maps.map(sizes).collect(),
            more: Weight::PreValues.is_in(config) && !Weight::PreValuesProj.is_in(config),
        }
    }

    fn update_plans(&self, rule: &Rule) -> Result<UpdatePlans> {
        let config = self.config;
        let entries = self.tokens.saturating_mul(config.heads * config.top_m);
        let rows = entries.min(config.table_rows());
        let step = |width, pages| StepPlans::of(self.device, rule, &StepSizes { rows, width, pages });
        let values = step(config.value_dim, self.tables.values)?;
        let pre_values = Weight::PreValues.is_in(config).then(|| step(config.pre_dim, self.tables.pre_values));
        Ok(UpdatePlans { values, pre_values: pre_values.transpose()? })
    }
}
