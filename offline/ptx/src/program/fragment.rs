//! Which element of a matrix lies in which lane and register.
//!
//! For `mma.sync` the manual says it (the figures of sections 9.7.14.5.7 and following): a matrix falls into blocks of 8 rows, lane
//! `l` has row `l / 4` of each block, and in it the `l % 4`th of 4 groups of neighbours, as many as fill a register. Blocks follow
//! each other downwards, then to the right. Of the second factor the same holds with rows and columns exchanged. For `wmma` the
//! manual leaves it open; it is the same here. Registers that are more than the matrix needs hold it again.

use crate::lanes::{WARP, Word};

/// Numbers that matrix units take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names are PTX's")]
pub enum Number {
    F16,
    Bf16,
    /// Of 32 bits the lowest 13 are not looked at.
    Tf32,
    F32,
    S8,
    U8,
    S32,
}

impl Number {
    /// Bytes in a register and in memory.
    pub fn size(self) -> usize {
        match self {
            Self::S8 | Self::U8 => 1,
            Self::F16 | Self::Bf16 => 2,
            Self::Tf32 | Self::F32 | Self::S32 => 4,
        }
    }
}

/// How the lanes' registers hold a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fragment {
    /// What the elements are.
    pub number: Number,
    /// Rows; a multiple of 8.
    pub rows: usize,
    /// Columns; a multiple of four times `width`.
    pub columns: usize,
    /// Neighbours of a row that a lane holds.
    width: usize,
    /// Whether the matrix in question has these rows as its columns.
    pub transposed: bool,
    /// Registers of a lane.
    pub registers: usize,
}

/// A place for a matrix's elements one after the other: steps from row to row and from column to column.
#[derive(Debug, Clone, Copy)]
pub struct Steps {
    /// From row to row.
    pub down: usize,
    /// From column to column.
    pub across: usize,
}

/// Elements of the largest matrix.
pub const MOST: usize = 512;

impl Fragment {
    /// A first factor.
    pub fn first(number: Number, rows: usize, columns: usize) -> Self {
        Self::of(number, rows, columns, 4 / number.size())
    }

    /// A second factor of `rows` rows.
    pub fn second(number: Number, rows: usize, columns: usize) -> Self {
        Self { transposed: true, ..Self::first(number, columns, rows) }
    }

    /// What is added, or the result.
    pub fn sum(number: Number, rows: usize, columns: usize) -> Self {
        Self::of(number, rows, columns, 2)
    }

    /// The same in so many registers.
    pub fn in_registers(self, registers: usize) -> Self {
        Self { registers, ..self }
    }

    fn of(number: Number, rows: usize, columns: usize, width: usize) -> Self {
        let registers = rows * columns * number.size() / 4 / WARP;
        Self { number, rows, columns, width, transposed: false, registers }
    }

    /// Elements that a lane holds, each once.
    fn own(&self) -> usize {
        self.rows * self.columns / WARP
    }

    /// Hands `visit` every element once: its register, the bits that it begins at, and each lane's place.
    fn each(&self, steps: Steps, mut visit: impl FnMut(usize, usize, &[usize; WARP])) {
        let in_register = 4 / self.number.size();
        let first: [usize; WARP] =
            std::array::from_fn(|lane| lane / 4 * steps.down + lane % 4 * self.width * steps.across);
        for slot in 0..self.own() {
            let (block, neighbour) = (slot / self.width, slot % self.width);
            let (row, column) = (block % (self.rows / 8) * 8, block / (self.rows / 8) * 4 * self.width + neighbour);
            let start = row * steps.down + column * steps.across;
            let shift = slot % in_register * self.number.size() * 8;
            visit(slot / in_register, shift, &first.map(|place| start + place));
        }
    }

    /// Takes elements' bits out of the registers.
    pub fn take(&self, words: &[Word], steps: Steps, mut visit: impl FnMut(&[usize; WARP], &Word)) {
        let kept = u32::MAX >> (32 - 8 * self.number.size());
        self.each(steps, |register, shift, places| {
            visit(places, &words[register].map(|word| word >> shift & kept));
        });
    }

    /// Puts elements' bits into registers.
    pub fn put(&self, steps: Steps, mut bits: impl FnMut(&[usize; WARP]) -> Word) -> Vec<Word> {
        let once = self.own() * self.number.size() / 4;
        let mut words = vec![[0; WARP]; self.registers];
        self.each(steps, |register, shift, places| {
            let found = bits(places);
            words[register].iter_mut().zip(found).for_each(|(word, bits)| *word |= bits << shift);
        });
        // What is more than the matrix needs holds it again.
        (once..self.registers).for_each(|register| words[register] = words[register - once]);
        words
    }
}
