//! Tables in pages: one that is larger than a buffer binding lies in several buffers, each with some of its rows. Rows are numbered through
//! the table; a kernel that reads or writes rows is launched once a page, reads the whole
//! list of rows (4 bytes each) and touches those of its page alone.

use cubecl::prelude::*;

use crate::launch::tensor::{Tensor, check, positive};
use crate::{Error, Result};

/// Which rows of a table a page has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Window {
    pub first_row: usize,
    pub rows: usize,
    /// Rows of the whole table.
    pub all_rows: usize,
}

/// A window in a kernel.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Page {
    pub first_row: u32,
    pub rows: u32,
}

#[cube]
impl Page {
    /// A row of the table as a row of the page. One that the page lacks gets a number past its last: an earlier one wraps around.
    pub fn place(&self, row: u32) -> u32 {
        row - self.first_row
    }
}

/// The windows of `pages`, each `[rows of the page, …]`, in their order.
pub(crate) fn windows<R: Runtime>(pages: &[Tensor<R>]) -> Vec<Window> {
    let rows = |page: &Tensor<R>| page.shape().first().copied().unwrap_or(0);
    let all_rows = pages.iter().map(rows).sum();
    let mut first_row = 0;
    let window = |page| {
        let window = Window { first_row, rows: rows(page), all_rows };
        first_row += window.rows;
        window
    };
    pages.iter().map(window).collect()
}

/// Checks that `pages`, in one type, have `rows` rows of `width` numbers together.
pub(crate) fn check_pages<R: Runtime>(
    client: &ComputeClient<R>,
    name: &'static str,
    pages: &[Tensor<R>],
    rows: usize,
    width: usize,
) -> Result<()> {
    let windows = windows(pages);
    let first = pages.first().ok_or(Error::Zero { what: "pages of a table" })?;
    for (page, window) in pages.iter().zip(&windows) {
        positive(&[("rows of a page", window.rows)])?;
        let last = window.first_row + window.rows == window.all_rows;
        let expected = if last { rows.saturating_sub(window.first_row) } else { window.rows };
        check(client, page, name, &[expected, width], first.dtype)?;
    }
    Ok(())
}
