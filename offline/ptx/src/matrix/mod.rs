//! Matrix units: `wmma`, `mma.sync`, `ldmatrix`, `stmatrix`, `movmatrix` (section 9.7.14).
//!
//! All 32 lanes execute such an instruction together. Which element of a matrix lies in which lane is said by
//! [`Fragment`](fragment::Fragment); what becomes of the numbers by [`product`]; what is read from memory and written there by
//! [`tile`].

mod decode;
mod fragment;
mod product;
mod tile;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_memory;

pub use decode::decode;

use crate::error::Stop;
use crate::lanes::{ALL, Mask, Word};
use crate::observe::{At, Observer};
use crate::operand::{Address, Register, Source, Space, Vector};
use crate::warp::{Context, Warp, site};
use fragment::Fragment;

/// An instruction of the matrix units.
#[derive(Debug, Clone)]
pub enum Matrix {
    /// `wmma.load`
    Load(Tile, Vector),
    /// `wmma.store`
    Store(Tile, Box<[Source]>),
    /// `wmma.mma` and `mma.sync`
    Product(Box<Product>),
    /// `ldmatrix`: rows of 8 numbers of 16 bits.
    LoadRows(Space, Transposed, Vector, Address),
    /// `stmatrix`
    StoreRows(Space, Transposed, Box<[Source]>, Address),
    /// `movmatrix`
    Transpose(Register, Source),
}

/// Whether a matrix of 8 rows and columns is transposed on its way.
pub type Transposed = bool;

/// A matrix in memory, and how registers hold it.
#[derive(Debug, Clone)]
pub struct Tile {
    fragment: Fragment,
    /// Whether a line in memory is a row.
    by_rows: bool,
    space: Space,
    address: Address,
    /// Numbers from line to line; None where lines touch.
    stride: Option<Source>,
}

/// A product and a sum: `d = a b + c`.
#[derive(Debug, Clone)]
pub struct Product {
    products: Products,
    a: (Fragment, Box<[Source]>),
    /// Of b the fragment of its transpose.
    b: (Fragment, Box<[Source]>),
    c: (Fragment, Box<[Source]>),
    d: (Fragment, Vector),
    /// Whether sums of integers stop at the largest and smallest number.
    saturates: bool,
}

/// What is multiplied: `m` rows by `k` with `k` by `n` columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Products {
    /// Rows of the product.
    pub m: usize,
    /// Columns of the product.
    pub n: usize,
    /// Numbers that each number of the product sums over.
    pub k: usize,
    /// What is multiplied.
    pub input: Number,
    /// What is summed up and returned.
    pub output: Number,
}

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

impl Matrix {
    /// What it multiplies; None where it only moves numbers.
    pub fn products(&self) -> Option<Products> {
        match self {
            Self::Product(product) => Some(product.products),
            _ => None,
        }
    }
}

impl Warp {
    /// Executes one. The lanes wait for each other before it and after it.
    pub(crate) fn multiply<O: Observer>(
        &mut self,
        at: &At,
        mask: Mask,
        matrix: &Matrix,
        context: &mut Context<'_, '_, O>,
    ) -> Result<(), Stop> {
        if mask != ALL {
            return Err(Stop::DivergentWarp { at: site(at, mask), missing: !mask });
        }
        self.step += 1;
        let at = &At { step: self.step, ..*at };
        self.step += 1;
        match matrix {
            Matrix::Load(tile, targets) => tile::load(self, at, tile, targets, context)?,
            Matrix::Store(tile, sources) => tile::store(self, at, tile, sources, context)?,
            Matrix::LoadRows(space, transposed, targets, address) => {
                tile::load_rows(self, at, (*space, *transposed), targets, address, context)?;
            }
            Matrix::StoreRows(space, transposed, sources, address) => {
                tile::store_rows(self, at, (*space, *transposed), sources, address, context)?;
            }
            Matrix::Transpose(target, source) => {
                let word = self.word(source, context);
                self.set_word(*target, &tile::transposed(&word), ALL);
            }
            Matrix::Product(product) => product::run(self, product, context),
        }
        Ok(())
    }

    /// The registers of a fragment.
    fn registers<O>(&self, sources: &[Source], context: &Context<'_, '_, O>) -> Vec<Word> {
        sources.iter().map(|source| self.word(source, context)).collect()
    }

    /// Writes the registers of a fragment.
    fn set_registers(&mut self, targets: &Vector, words: &[Word]) {
        for (target, word) in targets.iter().zip(words) {
            if let Some(target) = target {
                self.set_word(*target, word, ALL);
            }
        }
    }
}
