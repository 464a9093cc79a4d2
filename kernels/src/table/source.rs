//! The row source: from the slots that a token reads to virtual blocks and rows of the table (DESIGN §2.5).
//!
//! `a = shuffle[slot]`, or the slot itself; block `a / rows`; row `(a mod rows + offset) mod table_rows`. Pooling, the products of rows and the
//! lists of rows that gradients are made of all take an *address* from here, `block · table_rows + row`, block 0 where blocks are summed.
//!
//! Reads 4 bytes a slot, and 4 of the shuffle. A shuffle that is larger than one binding lies in pages as values do: then
//! [`RowSource::resolve`] looks addresses up first, page by page, and who follows takes them for slots that nobody shuffles.

use cubecl::prelude::*;

use super::pages::{Page, windows};
use crate::launch::device::Device;
use crate::launch::plan::Launch;
use crate::launch::tensor::{Tensor, arg, check, empty, index, positive, u32_storage};
use crate::{Error, Result};

/// Where a layer's slots find their rows.
pub struct RowSource<'a, R: Runtime> {
    /// u32 `[blocks · rows]`: a slot's virtual address, in pages of some entries each; none: a slot is its own address.
    pub shuffle: &'a [Tensor<R>],
    /// Virtual blocks.
    pub blocks: usize,
    /// Rows that the layer reads.
    pub rows: usize,
    /// Rows of the table.
    pub table_rows: usize,
    /// The table's row that the layer's row 0 is; behind the table's last comes its first.
    pub offset: usize,
    /// Whether the blocks' values are summed.
    pub summed: bool,
}

impl<R: Runtime> Clone for RowSource<'_, R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<R: Runtime> Copy for RowSource<'_, R> {}

/// What is fixed when a kernel is compiled. The offset is not: layers that share a table share their kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AddressPlan {
    /// Virtual blocks.
    pub blocks: usize,
    /// Rows that the layer reads.
    pub rows: usize,
    /// Rows of the table.
    pub table_rows: usize,
    /// Whether the kernel looks slots up in a shuffle; one of several pages is looked up first.
    pub shuffled: bool,
    /// Whether the blocks' values are summed.
    pub summed: bool,
    /// Whether the layer's rows are others than the table's own, or in another order.
    pub shared: bool,
}

impl AddressPlan {
    /// Blocks that are pooled apart.
    pub fn pooled_blocks(&self) -> usize {
        if self.summed { 1 } else { self.blocks }
    }

    /// Checks the sizes against each other.
    pub(crate) fn check(&self) -> Result<()> {
        let Self { blocks, rows, table_rows, .. } = *self;
        positive(&[("blocks", blocks), ("rows of the layer", rows), ("rows of the table", table_rows)])?;
        at_most("rows of the layer", rows, "those of the table", table_rows)?;
        index("virtual rows", blocks.saturating_mul(rows))?;
        index("rows of all blocks", self.pooled_blocks().saturating_mul(table_rows)).map(drop)
    }

    /// Whether an address is the shuffled slot as it is.
    fn plain(&self) -> bool {
        !self.shared && (!self.summed || self.blocks == 1)
    }
}

/// How slots are looked up in a shuffle of several pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShufflePlan {
    /// Looks slots up in one page.
    pub page: Launch,
    /// Pages, each with a launch of its own; 0 where the shuffle is not looked up first.
    pub pages: usize,
}

impl ShufflePlan {
    /// Plans the look-up of `slots` slots in a shuffle of `pages` pages; none is no shuffle, and one is looked up by those who read rows.
    pub fn of(device: &Device, slots: usize, pages: usize) -> Self {
        let page = Launch::flat(device, "shuffle_kernel", slots, 0);
        Self { page, pages: if pages > 1 { pages } else { 0 } }
    }

    /// The launches in their order.
    pub fn launches(&self) -> Vec<Launch> {
        vec![self.page; self.pages]
    }
}

impl<'a, R: Runtime> RowSource<'a, R> {
    /// A table of this layer's rows alone, its blocks apart.
    pub fn own(shuffle: &'a [Tensor<R>], blocks: usize, rows: usize) -> Self {
        Self { shuffle, blocks, rows, table_rows: rows, offset: 0, summed: false }
    }

    /// Checks the sizes, and the shuffle's pages against them.
    pub(crate) fn check(&self, client: &ComputeClient<R>) -> Result<()> {
        let Self { blocks, rows, table_rows, offset, .. } = *self;
        self.plan().check()?;
        at_most("offset", offset, "the last row of the table", table_rows - 1)?;
        index("rows of the layer and its offset", rows.saturating_add(offset))?;
        let windows = windows(self.shuffle);
        for (page, window) in self.shuffle.iter().zip(&windows) {
            positive(&[("entries of a page of the shuffle", window.rows)])?;
            let last = window.first_row + window.rows == window.all_rows;
            let expected = if last { (blocks * rows).saturating_sub(window.first_row) } else { window.rows };
            check(client, page, "shuffle", &[expected], u32_storage())?;
        }
        Ok(())
    }

    /// What kernels are compiled for.
    pub fn plan(&self) -> AddressPlan {
        let Self { blocks, rows, table_rows, summed, .. } = *self;
        let shared = table_rows != rows || self.offset > 0;
        AddressPlan { blocks, rows, table_rows, shuffled: self.shuffle.len() == 1, summed, shared }
    }

    /// Slots that [`address`] takes with this source's plan: `slots` themselves, or the addresses that the pages of a shuffle give them.
    pub(crate) fn resolve(&self, client: &ComputeClient<R>, slots: &Tensor<R>) -> Result<Tensor<R>> {
        let count = slots.shape().iter().product::<usize>();
        if self.shuffle.len() <= 1 || count == 0 {
            return Ok(slots.clone());
        }
        let device = Device::of(client);
        let addresses = empty(client, "addresses", slots.shape(), u32_storage())?;
        let ShufflePlan { page: launch, .. } = ShufflePlan::of(&device, count, self.shuffle.len());
        for (page, window) in self.shuffle.iter().zip(windows(self.shuffle)) {
            let (grid, cube_dim) = launch.start(&device)?;
            // SAFETY: `check` has seen the pages; a unit writes the address of its own slot, below `count`.
            unsafe {
                shuffle_kernel::launch_unchecked::<R>(
                    client,
                    grid,
                    cube_dim,
                    arg(slots, 1),
                    arg(page, 1),
                    arg(&addresses, 1),
                    window.first_row as u32,
                    window.rows as u32,
                    count as u32,
                    (window.all_rows - 1) as u32,
                    launch.units,
                );
            }
        }
        Ok(addresses)
    }

    /// The shuffle as a kernel's argument; `stand_in` where the kernel reads none.
    pub(crate) fn shuffle_or<'t>(&'t self, stand_in: &'t Tensor<R>) -> &'t Tensor<R> {
        if let [shuffle] = self.shuffle { shuffle } else { stand_in }
    }
}

fn at_most(what: &'static str, value: usize, limit_name: &'static str, limit: usize) -> Result<()> {
    if value > limit {
        return Err(Error::Exceeds { what, value: value as u64, limit_name, limit: limit as u64 });
    }
    Ok(())
}

/// Addresses of the slots that one page of the shuffle has.
#[cube(launch_unchecked)]
fn shuffle_kernel(
    slots: &Array<u32>,
    shuffle: &Array<u32>,
    addresses: &mut Array<u32>,
    first_row: u32,
    page_rows: u32,
    count: u32,
    last: u32,
    #[comptime] units: usize,
) {
    let item = CUBE_POS * units + UNIT_POS as usize;
    if item < count as usize {
        let page = Page { first_row, rows: page_rows };
        let entry = page.place(min(slots[item], last));
        if entry < page.rows {
            addresses[item] = shuffle[entry as usize];
        }
    }
}

/// The address of the slot at `at`, `block · table_rows + row`, inside the table whatever slot and shuffle hold.
#[cube]
pub(crate) fn address(
    slots: &Array<u32>,
    shuffle: &Array<u32>,
    at: usize,
    offset: u32,
    #[comptime] plan: AddressPlan,
) -> u32 {
    let last = comptime!((plan.blocks * plan.rows - 1) as u32);
    let mut address = min(slots[at], last);
    if plan.shuffled {
        address = min(shuffle[address as usize], last);
    }
    if comptime!(!plan.plain()) {
        let block = address / comptime!(plan.rows as u32);
        let mut row = address - block * comptime!(plan.rows as u32) + offset;
        if row >= comptime!(plan.table_rows as u32) {
            row -= comptime!(plan.table_rows as u32);
        }
        address = row;
        if comptime!(!plan.summed) {
            address = block * comptime!(plan.table_rows as u32) + row;
        }
    }
    address
}
