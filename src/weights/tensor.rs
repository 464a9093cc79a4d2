//! Tensors on the host.

use std::borrow::Cow;

use half::{bf16, f16};

use crate::{ElementType, Error, Result};

/// A row-major tensor on the host, its bytes owned or borrowed (from a memory-mapped file).
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor<'a> {
    pub(super) shape: Vec<usize>,
    pub(super) dtype: ElementType,
    pub(super) bytes: Cow<'a, [u8]>,
}

impl<'a> HostTensor<'a> {
    /// A tensor over the little-endian `bytes` of `dtype` numbers.
    ///
    /// # Errors
    /// [`Error::Length`] if `bytes` is not as long as `shape` and `dtype` say.
    pub fn new(shape: impl Into<Vec<usize>>, dtype: ElementType, bytes: impl Into<Cow<'a, [u8]>>) -> Result<Self> {
        let (shape, bytes) = (shape.into(), bytes.into());
        let expected = count(&shape);
        if bytes.len() != expected.saturating_mul(dtype.size()) {
            let found = bytes.len() / dtype.size();
            return Err(Error::Length { tensor: format!("{shape:?}"), found, expected });
        }
        Ok(Self { shape, dtype, bytes })
    }

    /// A tensor that owns `numbers`.
    ///
    /// # Errors
    /// [`Error::Length`] if there are more or fewer numbers than `shape` calls for.
    pub fn from_f32(shape: impl Into<Vec<usize>>, numbers: &[f32]) -> Result<HostTensor<'static>> {
        HostTensor::new(shape, ElementType::F32, bytemuck::cast_slice(numbers).to_vec())
    }

    /// Sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Element type.
    pub fn dtype(&self) -> ElementType {
        self.dtype
    }

    /// The little-endian bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The little-endian bytes, without the rest.
    #[cfg(feature = "files")]
    pub(crate) fn into_bytes(self) -> Cow<'a, [u8]> {
        self.bytes
    }

    /// The numbers, widened.
    pub fn to_f32(&self) -> Vec<f32> {
        widen(&self.bytes, self.dtype)
    }

    /// Row `index` of the tensor seen as a matrix with its outermost size as the number of rows, widened; None if there
    /// is no such row.
    pub fn row(&self, index: usize) -> Option<Vec<f32>> {
        let rows = *self.shape.first()?;
        if index >= rows {
            return None;
        }
        let width = self.bytes.len() / rows;
        Some(widen(&self.bytes[index * width..][..width], self.dtype))
    }

    /// The tensor with bytes of its own.
    pub fn into_owned(self) -> HostTensor<'static> {
        HostTensor { shape: self.shape, dtype: self.dtype, bytes: Cow::Owned(self.bytes.into_owned()) }
    }

    /// The same tensor in another element type, rounded to nearest even.
    pub fn cast(&self, dtype: ElementType) -> HostTensor<'_> {
        let bytes: Cow<'_, [u8]> = if dtype == self.dtype {
            Cow::Borrowed(&self.bytes)
        } else {
            let wide = self.to_f32();
            Cow::Owned(match dtype {
                ElementType::F32 => bytemuck::cast_slice(&wide).to_vec(),
                ElementType::F16 => wide.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
                ElementType::BF16 => wide.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
            })
        };
        HostTensor { shape: self.shape.clone(), dtype, bytes }
    }
}

/// How many numbers a tensor of `shape` holds. Saturates where that overflows: no buffer is as long as usize::MAX.
pub(crate) fn count(shape: &[usize]) -> usize {
    shape.iter().fold(1, |product: usize, &size| product.saturating_mul(size))
}

fn widen(bytes: &[u8], dtype: ElementType) -> Vec<f32> {
    match dtype {
        ElementType::F32 => bytemuck::pod_collect_to_vec(bytes),
        ElementType::F16 => bytemuck::pod_collect_to_vec::<u8, f16>(bytes).iter().map(|x| x.to_f32()).collect(),
        ElementType::BF16 => bytemuck::pod_collect_to_vec::<u8, bf16>(bytes).iter().map(|x| x.to_f32()).collect(),
    }
}
