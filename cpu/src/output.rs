//! The output of a product, `[rows, columns]`, of which tasks on several cores write parts that do not overlap.

use std::marker::PhantomData;
use std::ops::Range;

/// The numbers, borrowed for as long as tasks write them.
pub(crate) struct Output<'a> {
    first: *mut f32,
    rows: usize,
    columns: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

// SAFETY: what is shared is an address; whoever writes there sees to it that no two tasks write one number.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    /// # Panics
    /// If `out` is not `[rows, columns]`.
    pub fn new(out: &'a mut [f32], rows: usize, columns: usize) -> Self {
        assert_eq!(out.len(), rows * columns, "a product of [{rows}, {columns}] in {} numbers", out.len());
        Self { first: out.as_mut_ptr(), rows, columns, borrowed: PhantomData }
    }

    /// Some columns of a row.
    ///
    /// # Safety
    /// Two pieces in use at one time share no number.
    #[inline(always)]
    pub unsafe fn piece(&self, row: usize, columns: Range<usize>) -> &'a mut [f32] {
        assert!(
            row < self.rows && columns.start <= columns.end && columns.end <= self.columns,
            "a piece of the output"
        );
        // SAFETY: it lies within the output, which was just checked, and the caller sees to it that no one else has it.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(row * self.columns + columns.start), columns.len()) }
    }

    /// Where a block begins, and how far its rows lie apart. Two blocks that are written at one time share no number.
    pub fn block(&self, rows: &Range<usize>, columns: &Range<usize>) -> (*mut f32, usize) {
        assert!(rows.end <= self.rows && columns.end <= self.columns, "a block of the output");
        (self.first.wrapping_add(rows.start * self.columns + columns.start), self.columns)
    }
}
