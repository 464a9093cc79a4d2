//! Lists of the rows that slots read: what gradients of a table are grouped by. Writes 8 bytes a slot.

use cubecl::prelude::*;

use super::source::{AddressPlan, RowSource, address};
use crate::Result;
use crate::launch::device::Device;
use crate::launch::plan::Launch;
use crate::launch::tensor::{Tensor, arg, empty, u32_storage};

/// Where each slot reads.
pub(crate) struct Places<R: Runtime> {
    /// u32 `[slots]`: the row of the table.
    pub rows: Tensor<R>,
    /// u32 `[slots]`: `token · pooled_blocks + block`, a row of the pooled values as `[tokens · pooled_blocks, value_dim]`.
    pub source: Tensor<R>,
}

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct LocatePlan {
    /// Slots of a token.
    entries: usize,
    address: AddressPlan,
    units: usize,
}

/// The launch that locates `slots` slots.
pub(crate) fn locate_launch(device: &Device, slots: usize) -> Launch {
    Launch::flat(device, "locate_kernel", slots, 0)
}

/// Locates `slots` `[tokens, heads, top_m]`, `entries` of them a token. The caller has checked the source.
pub(crate) fn locate<R: Runtime>(
    client: &ComputeClient<R>,
    slots: &Tensor<R>,
    entries: usize,
    source: &RowSource<'_, R>,
) -> Result<Places<R>> {
    let (device, count) = (Device::of(client), slots.shape().iter().product::<usize>());
    let slots = source.resolve(client, slots)?;
    let places = Places {
        rows: empty(client, "rows", &[count], u32_storage())?,
        source: empty(client, "sources", &[count], u32_storage())?,
    };
    let launch = locate_launch(&device, count);
    let plan = LocatePlan { entries, address: source.plan(), units: launch.units };
    let (grid, cube_dim) = launch.start(&device)?;
    // SAFETY: a unit reads its own slot and writes its own entry; addresses stay inside the table.
    unsafe {
        locate_kernel::launch_unchecked::<R>(
            client,
            grid,
            cube_dim,
            arg(&slots, 1),
            arg(source.shuffle_or(&slots), 1),
            arg(&places.rows, 1),
            arg(&places.source, 1),
            source.offset as u32,
            count as u32,
            plan,
        );
    }
    Ok(places)
}

#[cube(launch_unchecked)]
fn locate_kernel(
    slots: &Array<u32>,
    shuffle: &Array<u32>,
    rows: &mut Array<u32>,
    source: &mut Array<u32>,
    offset: u32,
    count: u32,
    #[comptime] plan: LocatePlan,
) {
    let item = CUBE_POS * plan.units + UNIT_POS as usize;
    if item >= count as usize {
        terminate!();
    }
    let table_rows = comptime!(plan.address.table_rows as u32);
    let address = address(slots, shuffle, item, offset, comptime!(plan.address));
    let block = address / table_rows;
    rows[item] = address - block * table_rows;
    source[item] = (item / plan.entries * comptime!(plan.address.pooled_blocks())) as u32 + block;
}
