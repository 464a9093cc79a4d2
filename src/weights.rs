//! A layer's weights on the host: what a checkpoint holds, what the oracle reads and what [`MemoryLayer`] uploads.
//!
//! [`MemoryLayer`]: crate::MemoryLayer

use std::borrow::Cow;

use half::{bf16, f16};
use ultramem_kernels::ElementType;

use crate::{Error, Result};

/// A row-major tensor on the host, its bytes owned or borrowed (from a memory-mapped file).
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor<'a> {
    shape: Vec<usize>,
    dtype: ElementType,
    bytes: Cow<'a, [u8]>,
}

impl<'a> HostTensor<'a> {
    /// A tensor over the little-endian `bytes` of `dtype` numbers.
    ///
    /// # Errors
    /// [`Error::Length`] if `bytes` is not as long as `shape` and `dtype` say.
    pub fn new(shape: impl Into<Vec<usize>>, dtype: ElementType, bytes: impl Into<Cow<'a, [u8]>>) -> Result<Self> {
        let (shape, bytes) = (shape.into(), bytes.into());
        let expected = shape.iter().product::<usize>();
        if bytes.len() != expected * dtype.size() {
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

    /// The numbers, widened.
    pub fn to_f32(&self) -> Vec<f32> {
        match self.dtype {
            ElementType::F32 => bytemuck::pod_collect_to_vec(&self.bytes),
            ElementType::F16 => {
                bytemuck::pod_collect_to_vec::<u8, f16>(&self.bytes).iter().map(|x| x.to_f32()).collect()
            }
            ElementType::BF16 => {
                bytemuck::pod_collect_to_vec::<u8, bf16>(&self.bytes).iter().map(|x| x.to_f32()).collect()
            }
        }
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

/// Every weight of one layer, by its name in this project; the checkpoint's names are in [`Checkpoint`](crate::Checkpoint).
#[derive(Debug, Clone, PartialEq)]
pub struct Weights<'a> {
    /// `W_q` `[query_heads · 2 · key_dim, hidden_size]`.
    pub query_proj: HostTensor<'a>,
    /// `[key_dim]`.
    pub query_norm: HostTensor<'a>,
    /// `[heads, 2, side_keys, key_dim, tucker_rank]`; product keys leave the last dimension out.
    pub keys: HostTensor<'a>,
    /// `[key_dim]`.
    pub keys_norm: HostTensor<'a>,
    /// `[cores, heads, tucker_rank, tucker_rank]`; empty for product keys.
    pub cores: Vec<f32>,
    /// `u`: `[heads, tucker_rank]`; empty for product keys
    pub core_u: Vec<f32>,
    /// `v`: `[heads, tucker_rank]`.
    pub core_v: Vec<f32>,
    /// Slot → virtual address, `[side_keys²]`; None is the identity (product keys)
    pub shuffle_index: Option<Vec<u32>>,
    /// `[rows, value_dim]`.
    pub values: HostTensor<'a>,
    /// `W_o` `[hidden_size, expansion · value_dim]`.
    pub values_proj: HostTensor<'a>,
    /// `W_g` `[value_dim, hidden_size]`, for Memory+ only.
    pub gate_proj: Option<HostTensor<'a>>,
}
