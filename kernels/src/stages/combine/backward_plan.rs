//! How the stage's backward pass is launched, from sizes and a device alone.

use super::CombineSizes;
use crate::Result;
use crate::launch::device::Device;
use crate::launch::plan::{Launch, check_all};
use crate::linear::column_sum::ColumnSumPlans;

/// What is fixed when the kernels are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct CombineBackwardPlan {
    pub heads: usize,
    pub side_keys: usize,
    pub top_m: usize,
    pub rank: usize,
    pub cores: usize,
    pub additive: bool,
    pub units: usize,
}

impl CombineBackwardPlan {
    /// Loop iterations of a unit that takes one slot's scores back to its sides.
    fn sides_loops(&self) -> usize {
        let find = 2 * (1 + self.top_m.next_power_of_two().ilog2() as usize);
        let inner = if self.additive { self.top_m } else { self.rank * (1 + self.cores * (1 + self.rank)) };
        find + inner
    }
}

/// The launches of the stage's backward pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CombineBackwardPlans {
    pub(super) plan: CombineBackwardPlan,
    /// From the slots' scores to those of their keys.
    pub sides: Launch,
    /// The core's gradient; None for additive pairs.
    pub core: Option<CorePlans>,
}

/// The launches of a core's gradient.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CorePlans {
    /// How tokens are shared out among parts.
    pub shares: CoreShares,
    /// Sums the parts.
    pub parts: Launch,
    /// Adds them up.
    pub sum: ColumnSumPlans,
}

impl CombineBackwardPlans {
    /// Plans [`combine_backward`](super::combine_backward).
    ///
    /// # Errors
    /// Sizes that don't fit the device, or more keys than slots can be counted of.
    pub fn of(device: &Device, sizes: &CombineSizes) -> Result<Self> {
        sizes.check()?;
        let CombineSizes { tokens, heads, side_keys, top_m, rank, cores, additive } = *sizes;
        let entries = tokens.saturating_mul(heads).saturating_mul(top_m);
        let units = device.flat(entries);
        let plan = CombineBackwardPlan { heads, side_keys, top_m, rank, cores, additive, units };
        let launch = |kernel, items: usize, loops| {
            let cubes = items.div_ceil(units);
            Launch { kernel, cubes, units, shared_bytes: 0, loops }
        };
        let core = |numbers| {
            let shares = core_shares(tokens, numbers);
            let loops = shares.share.saturating_mul(1 + top_m);
            CorePlans {
                shares,
                parts: launch("grad_core_kernel", shares.shares.saturating_mul(numbers), loops),
                sum: ColumnSumPlans::of(device, &[shares.shares], numbers),
            }
        };
        let core = (!additive).then(|| core(cores * heads * rank * rank));
        let plans = Self { plan, sides: launch("grad_sides_kernel", entries, plan.sides_loops()), core };
        check_all("combine backward", device, &plans.launches())?;
        Ok(plans)
    }

    /// The launches in their order; of no cubes where there are no tokens.
    pub fn launches(&self) -> Vec<Launch> {
        let core = self.core.iter().flat_map(|core| [vec![core.parts], core.sum.launches()].concat());
        core::iter::once(self.sides).chain(core).collect()
    }
}

/// How the tokens are shared out among parts of the core's gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CoreShares {
    /// Tokens of a part.
    pub share: usize,
    /// Parts.
    pub shares: usize,
}

/// The parts that the gradient of a core of `numbers` numbers is summed in; none for no tokens or numbers.
pub fn core_shares(tokens: usize, numbers: usize) -> CoreShares {
    let share = tokens.saturating_mul(numbers).div_ceil(PARTS).max(1);
    CoreShares { share, shares: tokens.div_ceil(share) }
}

/// Numbers that the parts of the core's gradient hold at most, or one part.
const PARTS: usize = 1 << 22;
