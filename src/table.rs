//! The value table: where its rows live on the device.

use cubecl::prelude::*;
use ultramem_kernels::{ElementType, Tensor, fits_binding};

use crate::{HostTensor, Result};

/// `[rows, value_dim]` values on the device, in pages. A table has one page today, so it must fit one buffer binding;
/// the kernels' addresses are wide enough for more.
#[derive(Clone)]
pub struct ValueTable<R: Runtime> {
    pages: Vec<Tensor<R>>,
    dtype: ElementType,
}

impl<R: Runtime> ValueTable<R> {
    /// Uploads a table, rounding it to `dtype`.
    ///
    /// # Errors
    /// [`Binding`](ultramem_kernels::Error::Binding) with both sizes if it is larger than one binding of the device.
    pub fn upload(client: &ComputeClient<R>, values: &HostTensor<'_>, dtype: ElementType) -> Result<Self> {
        Ok(Self { pages: vec![upload(client, "values", values, dtype)?], dtype })
    }

    /// The pages, each `[rows of the page, value_dim]`.
    pub fn pages(&self) -> &[Tensor<R>] {
        &self.pages
    }

    /// Element type of the rows.
    pub fn dtype(&self) -> ElementType {
        self.dtype
    }
}

/// Brings a host tensor to the device in its own shape, rounded to `dtype`. Checked before anything is converted.
pub(crate) fn upload<R: Runtime>(
    client: &ComputeClient<R>,
    name: &'static str,
    tensor: &HostTensor<'_>,
    dtype: ElementType,
) -> Result<Tensor<R>> {
    fits_binding(client, name, tensor.shape(), dtype.storage())?;
    let handle = client.create_from_slice(tensor.cast(dtype).bytes());
    Ok(Tensor::new_contiguous(tensor.shape().to_vec(), handle, dtype.storage()))
}

/// The transpose of a matrix, as `upload`: the stages read weights with their outputs innermost.
pub(crate) fn upload_transposed<R: Runtime>(
    client: &ComputeClient<R>,
    name: &'static str,
    matrix: &HostTensor<'_>,
    dtype: ElementType,
) -> Result<Tensor<R>> {
    let (rows, columns) = (matrix.shape()[0], matrix.shape()[1]);
    fits_binding(client, name, matrix.shape(), dtype.storage())?;
    let numbers = matrix.to_f32();
    let transposed: Vec<f32> =
        (0..columns).flat_map(|c| (0..rows).map(move |r| (r, c))).map(|(r, c)| numbers[r * columns + c]).collect();
    upload(client, name, &HostTensor::from_f32([columns, rows], &transposed)?, dtype)
}
