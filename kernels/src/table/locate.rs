//! Lists of the rows that slots read: what gradients of a table are grouped by. Writes 8 bytes a slot, and counts the rows' first digits, as the sort
//! takes them.

use cubecl::prelude::*;

use super::group::{Listed, One, SortPlan, count_digits, first_of, step_of};
use super::source::{AddressPlan, RowSource, address};
use crate::Result;
use crate::launch::device::Device;
use crate::launch::tensor::{Tensor, arg, empty, u32_storage};

/// Where each slot reads.
pub(crate) struct Places<R: Runtime> {
    /// The row of the table of each slot.
    pub rows: Listed<R>,
    /// u32 `[slots]`: `token · pooled_blocks + block`, a row of the pooled values as `[tokens · pooled_blocks, value_dim]`.
    pub source: Tensor<R>,
}

/// What is fixed when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct LocatePlan {
    /// Slots of a token.
    entries: usize,
    address: AddressPlan,
    sort: SortPlan,
}

/// The kernel that locates slots.
pub(crate) const LOCATE: &str = "locate_kernel";

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
        rows: Listed::empty(client, count, source.table_rows)?,
        source: empty(client, "sources", &[count], u32_storage())?,
    };
    let sort = places.rows.plans;
    let launch = sort.listing(LOCATE);
    let plan = LocatePlan { entries, address: source.plan(), sort: sort.plan };
    let (grid, cube_dim) = launch.start(&device)?;
    // SAFETY: a unit reads its own slots and writes its own entries, and a cube its own counts; addresses stay inside the table.
    unsafe {
        locate_kernel::launch_unchecked::<R>(
            client,
            grid,
            cube_dim,
            arg(&slots, 1),
            arg(source.shuffle_or(&slots), 1),
            arg(&places.rows.keys, 1),
            arg(&places.source, 1),
            arg(&places.rows.counts, 1),
            source.offset as u32,
            count as u32,
            sort.chunk as u32,
            launch.cubes as u32,
            plan,
        );
    }
    Ok(places)
}

#[cube(launch_unchecked)]
fn locate_kernel(
    slots: &Array<u32>,
    shuffle: &Array<u32>,
    rows: &mut Array<Vector<u32, One>>,
    source: &mut Array<u32>,
    counts: &mut Array<u32>,
    offset: u32,
    count: u32,
    chunk: u32,
    cubes: u32,
    #[comptime] plan: LocatePlan,
) {
    if CUBE_POS >= cubes as usize {
        terminate!();
    }
    let table_rows = comptime!(plan.address.table_rows as u32);
    let first = first_of(chunk, comptime!(plan.sort));
    for at in 0..chunk {
        let item = (first + at * comptime!(step_of(plan.sort))) as usize;
        if item < count as usize {
            let address = address(slots, shuffle, item, offset, comptime!(plan.address));
            let block = address / table_rows;
            rows[item] = Vector::new(address - block * table_rows);
            source[item] = (item / plan.entries * comptime!(plan.address.pooled_blocks())) as u32 + block;
        }
    }
    // A unit counts what it has written itself.
    count_digits::<One>(rows, counts, count, chunk, 0u32, comptime!(plan.sort));
}
