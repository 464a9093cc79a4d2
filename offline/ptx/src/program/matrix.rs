//! Instructions of the matrix units: `wmma`, `mma.sync`, `ldmatrix`, `stmatrix`, `movmatrix` (section 9.7.14).

use super::fragment::{Fragment, Number};
use crate::operand::{Address, Register, Source, Space, Vector};

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
    pub fragment: Fragment,
    /// Whether a line in memory is a row.
    pub by_rows: bool,
    pub space: Space,
    pub address: Address,
    /// Numbers from line to line; None where lines touch.
    pub stride: Option<Source>,
}

/// A product and a sum: `d = a b + c`.
#[derive(Debug, Clone)]
pub struct Product {
    pub products: Products,
    pub a: (Fragment, Box<[Source]>),
    /// Of b the fragment of its transpose.
    pub b: (Fragment, Box<[Source]>),
    pub c: (Fragment, Box<[Source]>),
    pub d: (Fragment, Vector),
    /// Whether sums of integers stop at the largest and smallest number.
    pub saturates: bool,
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

impl Matrix {
    /// What it multiplies; None where it only moves numbers.
    pub fn products(&self) -> Option<Products> {
        match self {
            Self::Product(product) => Some(product.products),
            _ => None,
        }
    }
}
