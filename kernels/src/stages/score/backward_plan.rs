//! How the stage's backward pass is launched, from sizes and a device alone.

use super::ScoreSizes;
use crate::launch::device::Device;
use crate::launch::plan::{Launch, Planned, check_all};
use crate::linear::column_sum::ColumnSumPlans;
use crate::stages::norm::{Norm, NormPlan, NormSizes};
use crate::table::group::SortPlans;
use crate::table::segment_sum::{SumPlans, SumSizes};
use crate::{ElementType, Result};

/// Ranks whose products are added in one go.
pub(super) const FEW_RANKS: usize = 4;

/// What is fixed when the kernels are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ScoreBackwardPlan {
    pub heads: usize,
    pub query_pairs: usize,
    pub heads_per_pair: usize,
    pub side_keys: usize,
    pub key_dim: usize,
    pub rank: usize,
    pub top_m: usize,
    /// Vectors of a key that a unit takes; divides their number.
    pub block: usize,
    /// Slots whose keys are loaded at once.
    pub flight: usize,
    /// Units of a cube, launch by launch.
    pub units: usize,
}

impl ScoreBackwardPlan {
    /// Loop iterations of a unit that sums a query's gradient.
    fn grad_loops(&self) -> usize {
        let ranks = if self.rank <= FEW_RANKS { 0 } else { self.rank };
        self.heads_per_pair.saturating_mul(self.top_m.saturating_mul(1 + ranks).saturating_add(1))
    }
}

/// The launches of the stage's backward pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScoreBackwardPlans {
    pub(super) plan: ScoreBackwardPlan,
    /// Rounds the queries that no norm normalises; None where f32 queries are taken as they are.
    pub round: Option<Launch>,
    /// The normalised queries' gradient.
    pub queries: Launch,
    /// Its way back through the queries' norm, which leaves them normalised and rounded.
    pub query_norm: Option<Planned<NormPlan>>,
    /// Lists the keys of the slots, and counts their first digits.
    pub list: Launch,
    /// Groups the slots by key.
    pub sort: SortPlans,
    /// Sums the normalised keys' gradient.
    pub sums: SumPlans,
    /// Its way back through the keys' norm.
    pub keys_norm: Option<Planned<NormPlan>>,
    /// Adds up the parts of the gradients of the norms' weights.
    pub sum: Option<ColumnSumPlans>,
}

impl ScoreBackwardPlans {
    /// Plans [`score_backward`](super::score_backward), of keys that `keys_norm` normalises.
    ///
    /// # Errors
    /// Sizes that don't fit the device.
    pub fn of(device: &Device, sizes: &ScoreSizes, keys_norm: Option<Norm>) -> Result<Self> {
        sizes.check_keys()?;
        let ScoreSizes { tokens, heads, query_pairs, heads_per_pair, side_keys, key_dim, rank, top_m, .. } = *sizes;
        let vectors = key_dim / device.width(sizes.dtype.size(), &[key_dim]);
        let block = device.run(vectors);
        let plan = ScoreBackwardPlan {
            heads,
            query_pairs,
            heads_per_pair,
            side_keys,
            key_dim,
            rank,
            top_m,
            block,
            flight: if device.on_cpu || rank > FEW_RANKS { 1 } else { 4 },
            units: 0,
        };
        let all = |sizes: &[usize]| sizes.iter().fold(1, |all: usize, &size| all.saturating_mul(size));
        let (queries, entries) = (all(&[tokens, query_pairs, 2]), all(&[tokens, heads, top_m, 2]));
        let limit = heads * 2 * side_keys;
        let sort = SortPlans::of(device, entries, limit);
        let sums = SumSizes { factors: rank, slice: key_dim, shared: true };
        let of_norm = |norm, groups, step, listed| {
            NormPlan::of(device, &NormSizes { norm, groups, size: key_dim, step, listed, normalised: !listed })
        };
        let query_norm = sizes.norm.map(|norm| of_norm(norm, queries, 1, false));
        let keys_norm = keys_norm.map(|norm| of_norm(norm, sort.capacity, rank, true));
        let parts: Vec<_> = [query_norm, keys_norm].iter().flatten().map(|norm| norm.launch.cubes).collect();
        let rounds = sizes.norm.is_none() && sizes.dtype != ElementType::F32;
        let pieces = queries.saturating_mul(vectors / block);
        let plans = Self {
            plan,
            round: rounds.then(|| {
                Launch::flat(device, "round_kernel", queries.saturating_mul(key_dim / device.width(4, &[key_dim])), 0)
            }),
            queries: Launch::flat(device, "grad_queries_kernel", pieces, plan.grad_loops()),
            query_norm,
            list: sort.listing("list_keys_kernel"),
            sort,
            sums: SumPlans::of(device, &sort, &sums),
            keys_norm,
            sum: (!parts.is_empty()).then(|| ColumnSumPlans::of(device, &parts, key_dim)),
        };
        check_all("score backward", device, &plans.launches())?;
        Ok(plans)
    }

    /// The launches in their order; of no cubes where there are no tokens.
    pub fn launches(&self) -> Vec<Launch> {
        let norm = |norm: Option<Planned<NormPlan>>| norm.map(|planned| planned.launch);
        let queries = core::iter::once(self.queries).chain(self.round).chain(norm(self.query_norm));
        let keys = [vec![self.list], self.sort.launches(), self.sums.launches()].concat();
        let sum = self.sum.iter().flat_map(ColumnSumPlans::launches);
        queries.chain(keys).chain(norm(self.keys_norm)).chain(sum).collect()
    }

    /// What the kernel of `launch` is compiled for.
    pub(super) fn compiled(&self, launch: Launch) -> ScoreBackwardPlan {
        ScoreBackwardPlan { units: launch.units, ..self.plan }
    }
}
