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

    /// A table of one page that is on the device already, `[rows, value_dim]`.
    ///
    /// # Errors
    /// [`Type`](ultramem_kernels::Error::Type) for elements that are no f32, f16 or bf16.
    pub fn from_device(values: Tensor<R>) -> Result<Self> {
        let dtype = ElementType::from_storage(values.dtype).ok_or_else(|| ultramem_kernels::Error::Type {
            tensor: "values",
            found: values.dtype.to_string(),
            expected: "f32, f16 or bf16".to_string(),
        })?;
        Ok(Self { pages: vec![values], dtype })
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
