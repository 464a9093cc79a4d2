//! How the stage's backward pass is launched, from sizes and a device alone.

use super::WeighSizes;
use crate::launch::device::Device;
use crate::launch::plan::{Launch, check_all};
use crate::linear::cast::cast_launch;
use crate::stages::expand::{ExpandSizes, PoolPlans};
use crate::table::group::SortPlans;
use crate::table::segment_sum::{SumPlans, SumSizes};
use crate::table::source::AddressPlan;
use crate::{ElementType, Result};

/// The sizes of the stage's backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeighBackwardSizes {
    /// Those of the stage.
    pub forward: WeighSizes,
    /// Pages of the shuffle; 0 where there is none.
    pub shuffle_pages: usize,
    /// Element type of `z`.
    pub z: ElementType,
}

/// The launches of the stage's backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeighBackwardPlans {
    /// The gradients of scores and of products.
    pub products: Launch,
    /// The gradient of `z`.
    pub pool: PoolPlans,
    /// Makes `z` f32.
    pub cast: Option<Launch>,
    /// Sums the rows' gradients, over the groups of the values'.
    pub sums: SumPlans,
}

impl WeighBackwardPlans {
    /// Plans [`weigh_backward`](super::weigh_backward).
    ///
    /// # Errors
    /// Sizes that don't fit each other or the device.
    pub fn of(device: &Device, sizes: &WeighBackwardSizes) -> Result<Self> {
        let WeighBackwardSizes { forward, shuffle_pages, z } = *sizes;
        forward.check()?;
        let WeighSizes { tokens, slots, cores, address, pre_dim, dtype, pages, .. } = forward;
        let entries = tokens.saturating_mul(slots);
        // `z`'s gradient is what the products' gradients pool.
        let pooling = ExpandSizes {
            tokens,
            slots,
            cores: 1,
            address: AddressPlan { summed: true, ..address },
            value_dim: pre_dim,
            hidden_size: pre_dim,
            dtype,
            gated: false,
            projects: false,
            biased: false,
            output_gated: false,
            pages,
            shuffle_pages,
        };
        let sort = SortPlans::of(device, entries, address.table_rows);
        let sums = SumSizes { factors: 1, slice: pre_dim, shared: false };
        let plans = Self {
            products: Launch::flat(device, "weigh_backward_kernel", entries, 1 + cores),
            pool: PoolPlans::of(device, &pooling, false)?,
            cast: (z != ElementType::F32).then(|| cast_launch(device, tokens.saturating_mul(pre_dim))),
            sums: SumPlans::of(device, &sort, &sums),
        };
        check_all("weigh backward", device, &plans.launches())?;
        Ok(plans)
    }

    /// The launches in their order; of no cubes where there are no tokens.
    pub fn launches(&self) -> Vec<Launch> {
        let pooled = core::iter::once(self.products).chain(self.pool.launches());
        pooled.chain(self.cast).chain(self.sums.launches()).collect()
    }
}
