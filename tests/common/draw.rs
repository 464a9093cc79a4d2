//! What random calls of launches are drawn with: sizes of 0, 1, odd ones and round ones, now and then a tensor of another shape, type, length
//! or device than it should have.

// Each test is a crate of its own and uses a part of this.
#![allow(dead_code)]

use cubecl::ir::StorageType;
use cubecl::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use ultramem::ElementType;
use ultramem::kernels::linear::ProjectStrategy;
use ultramem::kernels::score::ScoreStrategy;
use ultramem::kernels::{Error, Norm, RowGradients, Tensor, u32_storage};

const SIZES: [usize; 12] = [0, 1, 1, 2, 3, 4, 5, 7, 8, 12, 16, 33];

/// What a call is drawn with.
pub struct Draw<'a, R: Runtime> {
    pub client: &'a ComputeClient<R>,
    /// Of another device.
    other: &'a ComputeClient<R>,
    pub rng: StdRng,
    /// Whether some tensor may be another than it should be.
    pub hostile: bool,
}

impl<'a, R: Runtime> Draw<'a, R> {
    /// What `seed` gives on `client`; now and then a tensor is of `other`, of another device.
    pub fn new(client: &'a ComputeClient<R>, other: &'a ComputeClient<R>, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let hostile = rng.random_range(0..2) == 0;
        Self { client, other, rng, hostile }
    }

    pub fn size(&mut self) -> usize {
        *SIZES.choose(&mut self.rng).unwrap()
    }

    /// A size that is mostly not 0.
    pub fn some(&mut self) -> usize {
        if self.one_in(12) { 0 } else { self.size().max(1) }
    }

    pub fn one_in(&mut self, turns: u32) -> bool {
        self.rng.random_range(0..turns) == 0
    }

    pub fn element(&mut self) -> StorageType {
        let types = [ElementType::F32, ElementType::F32, ElementType::F16, ElementType::BF16];
        types.choose(&mut self.rng).unwrap().storage()
    }

    pub fn float(&mut self, shape: &[usize]) -> Tensor<R> {
        self.tensor(shape, ElementType::F32.storage())
    }

    /// What is written in it is nobody's: zeros, so that words are rows that there are.
    pub fn tensor(&mut self, shape: &[usize], dtype: StorageType) -> Tensor<R> {
        let (mut shape, mut dtype, mut short, mut client) = (shape.to_vec(), dtype, 0, self.client);
        if self.hostile && self.one_in(8) {
            let at = self.rng.random_range(0..shape.len());
            match self.rng.random_range(0..6) {
                0 => shape[at] = self.size(),
                1 => drop(shape.remove(at)),
                2 => shape.push(self.size()),
                3 => dtype = if self.one_in(2) { u32_storage() } else { self.element() },
                4 => client = self.other,
                _ => short = 4,
            }
        }
        let bytes = shape.iter().product::<usize>() * dtype.size();
        let handle = client.create_from_slice(&vec![0; bytes.saturating_sub(short)]);
        Tensor::new_contiguous(client, shape, handle, dtype)
    }

    pub fn norm(&mut self) -> Norm {
        if self.one_in(2) { Norm::Rms } else { Norm::Layer }
    }

    pub fn product(&mut self) -> ProjectStrategy {
        // What the device would take for many tokens of 16 bits, too.
        let many = ProjectStrategy::choose(self.client, 1 << 10, ElementType::F16.storage());
        match self.rng.random_range(0..5) {
            0 => ProjectStrategy::Cubek,
            1 => many,
            2 => ProjectStrategy::InvariantTile,
            3 => ProjectStrategy::invariant(self.client, ElementType::F16.storage()),
            _ => ProjectStrategy::Tile,
        }
    }

    pub fn split(&mut self) -> ScoreStrategy {
        match self.rng.random_range(0..4) {
            0 => ScoreStrategy::Whole,
            1 => ScoreStrategy::Filtered,
            _ => ScoreStrategy::Split { splits: self.size() },
        }
    }

    pub fn rows(&mut self, rows: usize, width: usize) -> Result<RowGradients<R>, Error> {
        let capacity = self.size();
        let (listed, count) = (self.tensor(&[capacity], u32_storage()), self.tensor(&[1], u32_storage()));
        let gradients = self.float(&[capacity, width]);
        RowGradients::new(self.client, &listed, &count, &gradients, rows)
    }
}

pub fn shaped<R: Runtime>(what: &str, tensor: &Tensor<R>, shape: &[usize]) {
    assert_eq!(tensor.shape().to_vec(), shape, "{what}");
}
