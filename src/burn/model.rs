//! What a model with memory layers is, and what is read of it.

use burn::{
    module::AutodiffModule,
    tensor::{
        FloatDType, Tensor,
        backend::{AutodiffBackend, Backend},
    },
};

use super::{Memory, MemoryBackend};
use crate::{Error, Result};

/// A model with memory layers.
pub trait MemoryModel<B: MemoryBackend + AutodiffBackend>: AutodiffModule<B> {
    /// All memory layers of the model. A step refuses a list that leaves one out.
    fn memories(&mut self) -> Vec<&mut Memory<B>>;
}

/// The numbers of a tensor on the host.
pub(super) fn read<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Result<Vec<f32>> {
    let data = tensor.try_into_data().map_err(|error| Error::Device(error.to_string()))?;
    Ok(data.iter::<f32>().collect())
}

/// The sum of the squares in f32, row by row and then of the rows: Burn's `sum` adds with atomics, in another order each time.
pub(super) fn square_sum<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Tensor<B, 1> {
    let width = tensor.dims()[D - 1];
    let rows = tensor.shape().num_elements() / width.max(1);
    tensor.cast(FloatDType::F32).reshape([rows, width]).square().sum_dim(1).sum_dim(0).reshape([1])
}
