//! A table, of values or of pre-values: where its rows live on the device.

use cubecl::prelude::*;
use ultramem_kernels::{ElementType, Tensor, check, fits_binding};

use crate::{Error, HostTensor, Result};

/// `[rows, value_dim]` values on the device. A table that is larger than one buffer binding lies in pages, each a buffer with some of the
/// rows; stages that read or write rows are launched once a page. A clone shares the pages until one of the two is updated.
#[derive(Clone)]
pub struct ValueTable<R: Runtime> {
    pages: Vec<Tensor<R>>,
    dtype: ElementType,
}

impl<R: Runtime> ValueTable<R> {
    /// Uploads a table, rounding it to `dtype`: in one page if a binding of the device holds it, else in pages of which one holds the f32
    /// state of an optimiser, too. A table of half precision between half a binding and a whole one is read fastest in its one page but
    /// has no room for such a state: [`upload_in_pages`](Self::upload_in_pages) makes it.
    ///
    /// # Errors
    /// [`Binding`](ultramem_kernels::Error::Binding) with both sizes if not even a row fits one.
    pub fn upload(client: &ComputeClient<R>, values: &HostTensor<'_>, dtype: ElementType) -> Result<Self> {
        let rows = values.shape().first().copied().unwrap_or(0);
        let whole = fits_binding(client, "values", values.shape(), dtype.storage()).is_ok();
        let row_bytes = values.shape().iter().skip(1).product::<usize>().saturating_mul(ElementType::F32.size());
        let limit = usize::try_from(client.properties().memory.max_page_size).unwrap_or(usize::MAX);
        let page_rows = if whole { rows } else { (limit / row_bytes.max(1)).max(1) };
        Self::upload_in_pages(client, values, dtype, page_rows)
    }

    /// Uploads a table in pages of `page_rows` rows, the last of what is left.
    ///
    /// # Errors
    /// [`Binding`](ultramem_kernels::Error::Binding) if a page is larger than one binding of the device;
    /// [`Zero`](ultramem_kernels::Error::Zero) for a table or pages of no rows.
    pub fn upload_in_pages(
        client: &ComputeClient<R>,
        values: &HostTensor<'_>,
        dtype: ElementType,
        page_rows: usize,
    ) -> Result<Self> {
        let rows = values.shape().first().copied().unwrap_or(0);
        if rows == 0 || page_rows == 0 {
            return Err(ultramem_kernels::Error::Zero { what: "rows of a table or of its pages" }.into());
        }
        let lengths: Vec<usize> = (0..rows).step_by(page_rows).map(|first| page_rows.min(rows - first)).collect();
        let pages = cut("values", values, &lengths)?;
        let pages = pages.iter().map(|page| upload(client, "values", page, dtype)).collect::<Result<_>>()?;
        Ok(Self { pages, dtype })
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

    /// A table in pages that are on the device already, each `[rows of the page, width]`.
    ///
    /// # Errors
    /// [`Zero`](ultramem_kernels::Error::Zero) for no page; as [`from_device`](Self::from_device). Their shapes are checked with the layer's.
    pub fn from_pages(pages: Vec<Tensor<R>>) -> Result<Self> {
        let first = pages.first().ok_or(ultramem_kernels::Error::Zero { what: "pages of a table" })?;
        let dtype = Self::from_device(first.clone())?.dtype;
        Ok(Self { pages, dtype })
    }

    /// What stands in a table's place while that is away.
    pub(crate) fn nothing(dtype: ElementType) -> Self {
        Self { pages: Vec::new(), dtype }
    }

    /// The pages, each `[rows of the page, value_dim]`.
    pub fn pages(&self) -> &[Tensor<R>] {
        &self.pages
    }

    /// The pages, for an update.
    pub(crate) fn pages_mut(&mut self) -> &mut [Tensor<R>] {
        &mut self.pages
    }

    /// Rows of each page.
    pub fn page_rows(&self) -> Vec<usize> {
        self.pages.iter().map(|page| page.shape().first().copied().unwrap_or(0)).collect()
    }

    /// Element type of the rows.
    pub fn dtype(&self) -> ElementType {
        self.dtype
    }

    /// Checks that the pages, of which there is one at least, are `[rows, width]` together.
    pub(crate) fn check(&self, client: &ComputeClient<R>, name: &'static str, rows: usize, width: usize) -> Result<()> {
        let found = self.page_rows();
        let all: usize = found.iter().sum();
        for (at, (page, &found)) in self.pages.iter().zip(&found).enumerate() {
            let last = at + 1 == self.pages.len();
            let expected = if last { rows.saturating_sub(all - found) } else { found };
            check(client, page, name, &[expected, width], self.dtype.storage())?;
        }
        Ok(())
    }
}

/// A host tensor in pages of so many rows each.
///
/// # Errors
/// [`Error::Tensor`] if the tensor has not as many rows as all of them.
pub(crate) fn cut<'a>(name: &str, tensor: &'a HostTensor<'_>, rows: &[usize]) -> Result<Vec<HostTensor<'a>>> {
    let (all, found): (usize, usize) = (rows.iter().sum(), tensor.shape().first().copied().unwrap_or(0));
    if all != found {
        let problem = format!("has {found} rows, expected {all}");
        return Err(Error::Tensor { name: name.into(), problem });
    }
    let row_bytes = tensor.bytes().len() / all.max(1);
    let mut bytes = tensor.bytes();
    let mut pages = Vec::new();
    for &rows in rows {
        let (page, rest) = bytes.split_at(rows * row_bytes);
        let mut shape = tensor.shape().to_vec();
        shape[0] = rows;
        pages.push(HostTensor::new(shape, tensor.dtype(), page)?);
        bytes = rest;
    }
    Ok(pages)
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
    Ok(Tensor::new_contiguous(client, tensor.shape().to_vec(), handle, dtype.storage()))
}
