//! How the stage's backward pass is launched, from sizes and a device alone.

use super::ScoreSizes;
use crate::launch::device::Device;
use crate::launch::plan::{Launch, check_all};
use crate::stages::norm::{Norm, NormPlans, NormSizes};
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
    /// Vectors of a query that a unit sums; divides their number.
    pub block: usize,
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
    /// Normalises the queries and rounds them; None where f32 queries are taken as they are.
    pub normalise: Option<Launch>,
    /// The normalised queries' gradient.
    pub queries: Launch,
    /// Its way back through the queries' norm.
    pub query_norm: Option<NormPlans>,
    /// Lists the keys of the slots.
    pub list: Launch,
    /// Groups the slots by key.
    pub sort: SortPlans,
    /// Sums the normalised keys' gradient.
    pub sums: SumPlans,
    /// Its way back through the keys' norm.
    pub keys_norm: Option<NormPlans>,
}

impl ScoreBackwardPlans {
    /// Plans [`score_backward`](super::score_backward), of keys that `keys_norm` normalises.
    ///
    /// # Errors
    /// Sizes that don't fit the device.
    pub fn of(device: &Device, sizes: &ScoreSizes, keys_norm: Option<Norm>) -> Result<Self> {
        sizes.check_keys()?;
        let ScoreSizes { tokens, heads, query_pairs, heads_per_pair, side_keys, key_dim, rank, top_m, .. } = *sizes;
        let vectors = key_dim / device.width(4, &[key_dim]);
        let block = device.run(vectors);
        let plan =
            ScoreBackwardPlan { heads, query_pairs, heads_per_pair, side_keys, key_dim, rank, top_m, block, units: 0 };
        let all = |sizes: &[usize]| sizes.iter().fold(1, |all: usize, &size| all.saturating_mul(size));
        let (queries, entries) = (all(&[tokens, query_pairs, 2]), all(&[tokens, heads, top_m, 2]));
        let limit = heads * 2 * side_keys;
        let used = entries.min(limit);
        let sums = SumSizes { entries, rows: used, factors: rank, slice: key_dim, shared: true };
        let of_norm = |norm, groups, step, listed| {
            NormPlans::of(device, &NormSizes { norm, groups, size: key_dim, step, listed })
        };
        let normalises = sizes.norm.is_some() || sizes.dtype != ElementType::F32;
        let pieces = queries.saturating_mul(vectors / block);
        let plans = Self {
            plan,
            normalise: normalises.then(|| Launch::flat(device, "normalise_kernel", queries, 3 * key_dim)),
            queries: Launch::flat(device, "grad_queries_kernel", pieces, plan.grad_loops()),
            query_norm: sizes.norm.map(|norm| of_norm(norm, queries, 1, false)),
            list: Launch::flat(device, "list_keys_kernel", entries, 0),
            sort: SortPlans::of(device, entries, limit),
            sums: SumPlans::of(device, &sums),
            keys_norm: keys_norm.map(|norm| of_norm(norm, used, rank, true)),
        };
        check_all("score backward", device, &plans.launches())?;
        Ok(plans)
    }

    /// The launches in their order; of no cubes where there are no tokens.
    pub fn launches(&self) -> Vec<Launch> {
        let norm = |norm: &Option<NormPlans>| norm.as_ref().map_or(Vec::new(), NormPlans::launches);
        let queries = self.normalise.into_iter().chain([self.queries]).chain(norm(&self.query_norm));
        let keys = [vec![self.list], self.sort.launches(), self.sums.launches(), norm(&self.keys_norm)];
        queries.chain(keys.concat()).collect()
    }

    /// What the kernel of `launch` is compiled for.
    pub(super) fn compiled(&self, launch: Launch) -> ScoreBackwardPlan {
        ScoreBackwardPlan { units: launch.units, ..self.plan }
    }
}
