//! How the stage is launched, from sizes and a device alone.

use super::Activation;
use crate::launch::device::Device;
use crate::launch::plan::Planned;
use crate::launch::tensor::{index, positive};
use crate::table::row_products::ProductPlan;
use crate::table::source::AddressPlan;
use crate::{ElementType, Result};

/// The sizes of the stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeighSizes {
    /// Tokens; none is no launch.
    pub tokens: usize,
    /// Slots of a token: `heads · top_m`.
    pub slots: usize,
    /// Scores of a slot.
    pub cores: usize,
    /// How slots find rows; blocks count as one, for a pre-value row has none.
    pub address: AddressPlan,
    /// Width of a pre-value row.
    pub pre_dim: usize,
    /// Element type of the pre-values.
    pub dtype: ElementType,
    /// What is done to a product.
    pub activation: Activation,
    /// Pages of the table.
    pub pages: usize,
}

impl WeighSizes {
    pub(super) fn check(&self) -> Result<()> {
        let Self { slots, cores, pre_dim, pages, .. } = *self;
        positive(&[("slots", slots), ("cores", cores), ("pre_dim", pre_dim), ("pages of the pre-values", pages)])?;
        AddressPlan { summed: true, ..self.address }.check()?;
        index("scores of a token", slots.saturating_mul(cores))?;
        index("numbers of a row", pre_dim).map(drop)
    }
}

/// What is fixed when the stage's kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WeighPlan {
    /// How units share out rows and slots.
    pub product: ProductPlan,
    /// Numbers of a load of a row.
    pub width: usize,
    /// Slots of a token.
    pub entries: usize,
    /// Scores of a slot.
    pub cores: usize,
    /// How slots find rows.
    pub address: AddressPlan,
    /// What is done to a product.
    pub activation: Activation,
}

impl WeighPlan {
    /// Plans [`weigh`](super::weigh()), whose kernel is launched once a page of the table.
    ///
    /// # Errors
    /// Sizes that don't fit each other or the device.
    pub fn of(device: &Device, sizes: &WeighSizes) -> Result<Planned<Self>> {
        sizes.check()?;
        let WeighSizes { tokens, slots, cores, pre_dim, dtype, activation, pages, .. } = *sizes;
        let address = AddressPlan { summed: true, ..sizes.address };
        let (entries, width) = (tokens.saturating_mul(slots), device.width(dtype.size(), &[pre_dim]));
        let product = ProductPlan::of(device, entries, 1, pre_dim / width, pages > 1);
        let launch = product.launch("weigh_kernel", entries, 1 + cores);
        Planned { plan: Self { product, width, entries: slots, cores, address, activation }, launch }
            .checked("weigh", device)
    }
}
