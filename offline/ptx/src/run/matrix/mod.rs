//! Matrix units: `wmma`, `mma.sync`, `ldmatrix`, `stmatrix`, `movmatrix` (section 9.7.14).
//!
//! All 32 lanes execute such an instruction together. Which element of a matrix lies in which lane is said by
//! [`fragment`](crate::program::fragment); what becomes of the numbers by [`product`]; what is read from memory and written there by
//! [`tile`].

mod product;
mod tile;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_memory;

use crate::error::Stop;
use crate::lanes::{ALL, Mask};
use crate::program::matrix::Matrix;
use crate::run::context::Context;
use crate::run::observe::{At, Observer};
use crate::run::warp::Warp;

impl Warp {
    /// Executes one. The lanes wait for each other before it and after it.
    pub(in crate::run) fn multiply<O: Observer>(
        &mut self,
        at: &At,
        mask: Mask,
        matrix: &Matrix,
        context: &mut Context<'_, '_, O>,
    ) -> Result<(), Stop> {
        if mask != ALL {
            return Err(Stop::DivergentWarp { at: at.site(mask), missing: !mask });
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
}
