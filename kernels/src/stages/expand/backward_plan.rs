//! How the stage's backward pass is launched, from sizes and a device alone.

use super::finish::{FinishPlan, FinishSizes};
use super::{ExpandPlans, ExpandSizes, ExpandStrategy, PoolPlans};
use crate::launch::device::Device;
use crate::launch::plan::{Launch, Planned, check_all};
use crate::launch::tensor::index;
use crate::linear::cast::cast_launch;
use crate::linear::column_sum::ColumnSumPlans;
use crate::linear::outer::{OuterPlans, OuterSizes};
use crate::linear::{ProductPlans, ProjectSizes, ProjectStrategy};
use crate::table::group::SortPlans;
use crate::table::locate::LOCATE;
use crate::table::row_products::ProductPlan;
use crate::table::segment_sum::{SumPlans, SumSizes};
use crate::table::source::ShufflePlan;
use crate::{ElementType, Result};

/// The sizes of the stage's backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpandBackwardSizes {
    /// Those of the stage.
    pub forward: ExpandSizes,
    /// Whether the forward pass has left the pooled values.
    pub pooled: bool,
    /// Whether it has left the projected values, which an output gate alone needs.
    pub projected: bool,
}

/// The launches of the stage's backward pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpandBackwardPlans {
    /// Pools and projects anew, for an output gate that has nothing left to it.
    pub projected: Option<ExpandPlans>,
    /// Goes back through the output gate, or makes the output's gradient f32 where projected values are finished otherwise.
    pub finish: Option<Launch>,
    /// The pooled values' gradient; None where nothing projects, or cubek.
    pub project: Option<ProductPlans>,
    /// Pools anew, where the pooled values are not left.
    pub pool: Option<PoolPlans>,
    /// Goes back through the gate.
    pub gate: Option<Launch>,
    /// Looks slots up in a shuffle of several pages.
    pub shuffle: ShufflePlan,
    /// Lists the rows of the slots, and counts their first digits.
    pub locate: Launch,
    /// Multiplies the rows of one page.
    pub products: Planned<ProductPlan>,
    /// Pages, each with a launch of its own.
    pub pages: usize,
    /// Groups the slots by row.
    pub sort: SortPlans,
    /// Sums the rows' gradients.
    pub sums: SumPlans,
    /// The weight's gradient; None where nothing projects, or cubek.
    pub weight: Option<OuterPlans>,
    /// The bias's.
    pub bias: Option<ColumnSumPlans>,
}

impl ExpandBackwardPlans {
    /// Plans [`expand_backward`](super::expand_backward) by `strategy`.
    ///
    /// # Errors
    /// Sizes that don't fit each other or the device.
    pub fn of(device: &Device, sizes: &ExpandBackwardSizes, strategy: ProjectStrategy) -> Result<Self> {
        let forward = &sizes.forward;
        forward.check()?;
        index("width of the output", forward.hidden_size)?;
        let ExpandSizes { tokens, slots, cores, address, value_dim, hidden_size, dtype, pages, .. } = *forward;
        let (entries, pooled_dim) = (tokens.saturating_mul(slots), forward.pooled_dim());
        let ungated = ExpandSizes { gated: false, ..*forward };
        let anew = forward.output_gated && !sizes.projected;
        let anew = anew.then(|| ExpandPlans::of(device, forward, ExpandStrategy::Pooled(strategy))).transpose()?;
        let of_product = ProjectSizes { tokens, depth: hidden_size, width: pooled_dim, dtype };
        let project = if forward.projects { strategy.plan(device, &of_product)? } else { None };
        let slice = value_dim / cores / forward.width(device);
        let product = ProductPlan::of(device, entries, cores, slice, pages > 1);
        let products = Planned { plan: product, launch: product.launch("row_products_kernel", entries, 0) };
        let sort = SortPlans::of(device, entries, address.table_rows);
        let sums = SumSizes { factors: cores, slice: value_dim / cores, shared: false };
        let of_outer = OuterSizes { tokens, m: hidden_size, n: pooled_dim, dtype };
        let outer = || OuterPlans::of(device, &of_outer, strategy);
        let gate = || Launch::flat(device, "gate_backward_kernel", tokens.saturating_mul(value_dim), 0);
        let plans = Self {
            projected: anew.map(ExpandPlans::unfinished),
            finish: finish(device, forward),
            project,
            pool: (!sizes.pooled).then(|| PoolPlans::of(device, &ungated, false)).transpose()?,
            gate: forward.gated.then(gate),
            shuffle: forward.shuffle(device),
            locate: sort.listing(LOCATE),
            products,
            pages,
            sort,
            sums: SumPlans::of(device, &sort, &sums),
            weight: forward.projects.then(outer).flatten(),
            bias: forward.biased.then(|| ColumnSumPlans::of(device, &[tokens], hidden_size)),
        };
        check_all("expand backward", device, &plans.launches())?;
        Ok(plans)
    }

    /// The launches in their order; of no cubes where there are no tokens.
    pub fn launches(&self) -> Vec<Launch> {
        let anew = self.projected.iter().flat_map(ExpandPlans::launches);
        let project = self.project.iter().flat_map(ProductPlans::launches);
        let pooled = anew.chain(self.finish).chain(project).chain(self.pool.iter().flat_map(PoolPlans::launches));
        let products = vec![self.products.launch; self.pages];
        let places = [self.shuffle.launches(), vec![self.locate], products].concat();
        let rows = [self.sort.launches(), self.sums.launches()].concat();
        let weight = self.weight.iter().flat_map(OuterPlans::launches);
        let bias = self.bias.iter().flat_map(ColumnSumPlans::launches);
        pooled.chain(self.gate).chain(places).chain(rows).chain(weight).chain(bias).collect()
    }
}

/// What brings the output's gradient to the projected values.
fn finish(device: &Device, sizes: &ExpandSizes) -> Option<Launch> {
    let ExpandSizes { tokens, hidden_size, dtype, output_gated, .. } = *sizes;
    if output_gated {
        return Some(FinishPlan::backward(device, &FinishSizes::from(sizes)).launch);
    }
    let casts = sizes.finishes() && dtype != ElementType::F32;
    casts.then(|| cast_launch(device, tokens.saturating_mul(hidden_size)))
}
