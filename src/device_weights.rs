//! A layer's weights on the device, as training changes them.

use cubecl::prelude::*;
use ultramem_kernels::{ElementType, Tensor, check, from_f32, from_u32, supports, u32_storage};

use crate::table::{ValueTable, upload};
use crate::{Error, HostTensor, MemoryConfig, Result, Weights};

/// A layer's weights on the device, shaped as a checkpoint has them, contiguous. Cheap to clone: the buffers are shared.
pub struct LayerWeights<R: Runtime> {
    /// `W_q` `[query_heads · 2 · key_dim, hidden_size]`, in the layer's element type.
    pub query_proj: Tensor<R>,
    /// f32 `[key_dim]`.
    pub query_norm: Tensor<R>,
    /// `[heads, 2, side_keys, key_dim, tucker_rank]`, in the layer's element type.
    pub keys: Tensor<R>,
    /// f32 `[key_dim]`.
    pub keys_norm: Tensor<R>,
    /// f32 `[cores, heads, tucker_rank, tucker_rank]`, and `u` and `v` f32 `[heads, tucker_rank]`; None for product keys.
    pub core: Option<TuckerCore<R>>,
    /// u32 `[side_keys²]`: slot to virtual address; None where a slot is its own address.
    pub shuffle: Option<Tensor<R>>,
    /// `[rows, value_dim]`, in the layer's element type.
    pub values: ValueTable<R>,
    /// `W_o` `[hidden_size, expansion · value_dim]`, in the layer's element type.
    pub values_proj: Tensor<R>,
    /// `W_g` `[value_dim, hidden_size]`, in the layer's element type, for Memory+ alone.
    pub gate_proj: Option<Tensor<R>>,
}

/// The Tucker core of UltraMem and the vectors that judge a side apart.
pub struct TuckerCore<R: Runtime> {
    /// f32 `[cores, heads, tucker_rank, tucker_rank]`.
    pub cores: Tensor<R>,
    /// f32 `[heads, tucker_rank]`: the leading left singular vector of the summed core.
    pub u: Tensor<R>,
    /// f32 `[heads, tucker_rank]`: the leading right singular vector.
    pub v: Tensor<R>,
}

impl<R: Runtime> Clone for TuckerCore<R> {
    fn clone(&self) -> Self {
        Self { cores: self.cores.clone(), u: self.u.clone(), v: self.v.clone() }
    }
}

impl<R: Runtime> Clone for LayerWeights<R> {
    fn clone(&self) -> Self {
        Self {
            query_proj: self.query_proj.clone(),
            query_norm: self.query_norm.clone(),
            keys: self.keys.clone(),
            keys_norm: self.keys_norm.clone(),
            core: self.core.clone(),
            shuffle: self.shuffle.clone(),
            values: self.values.clone(),
            values_proj: self.values_proj.clone(),
            gate_proj: self.gate_proj.clone(),
        }
    }
}

impl<R: Runtime> LayerWeights<R> {
    /// Uploads `weights`, matrices, keys and values rounded to `dtype`.
    ///
    /// # Errors
    /// Weights that do not fit `config`, an element type that the device lacks, or a tensor other than the values, or a row of
    /// them, that is larger than one buffer binding of the device.
    pub fn upload(
        client: &ComputeClient<R>,
        config: &MemoryConfig,
        weights: &Weights<'_>,
        dtype: ElementType,
    ) -> Result<Self> {
        supports(client, dtype)?;
        weights.check(config)?;
        let full = |name, tensor: &HostTensor<'_>| upload(client, name, tensor, ElementType::F32);
        let stored = |name, tensor: &HostTensor<'_>| upload(client, name, tensor, dtype);
        let (heads, rank) = (config.heads, config.tucker_rank);
        let core = || -> Result<TuckerCore<R>> {
            Ok(TuckerCore {
                cores: from_f32(client, &[config.cores, heads, rank, rank], &weights.cores)?,
                u: from_f32(client, &[heads, rank], &weights.core_u)?,
                v: from_f32(client, &[heads, rank], &weights.core_v)?,
            })
        };
        let keys = stored("keys", &weights.keys)?;
        let key_shape = vec![heads, 2, config.side_keys, config.key_dim, rank];
        Ok(Self {
            query_proj: stored("query_proj", &weights.query_proj)?,
            query_norm: full("query_norm", &weights.query_norm)?,
            keys: keys.reshaped(key_shape),
            keys_norm: full("keys_norm", &weights.keys_norm)?,
            core: config.tucker().then(core).transpose()?,
            shuffle: match &weights.shuffle_index {
                Some(index) => Some(from_u32(client, &[config.slots()], index)?),
                None => None,
            },
            values: ValueTable::upload(client, &weights.values, dtype)?,
            values_proj: stored("values_proj", &weights.values_proj)?,
            gate_proj: match &weights.gate_proj {
                Some(gate) => Some(stored("gate_proj", gate)?),
                None => None,
            },
        })
    }

    /// Checks every shape and type against `config`.
    pub(crate) fn check(&self, client: &ComputeClient<R>, config: &MemoryConfig) -> Result<()> {
        let stored = self.values.dtype().storage();
        let full = ElementType::F32.storage();
        let (heads, rank, key_dim) = (config.heads, config.tucker_rank, config.key_dim);
        let queries = config.query_heads() * 2 * key_dim;
        check(client, &self.query_proj, "query_proj", &[queries, config.hidden_size], stored)?;
        check(client, &self.query_norm, "query_norm", &[key_dim], full)?;
        check(client, &self.keys, "keys", &[heads, 2, config.side_keys, key_dim, rank], stored)?;
        check(client, &self.keys_norm, "keys_norm", &[key_dim], full)?;
        self.values.check(client, config.rows(), config.value_dim)?;
        check(client, &self.values_proj, "values_proj", &[config.hidden_size, config.pooled_dim()], stored)?;
        present("shuffle", self.shuffle.is_some(), config.capabilities.shuffled)?;
        present("core", self.core.is_some(), config.tucker())?;
        present("gate_proj", self.gate_proj.is_some(), config.capabilities.gated)?;
        if let Some(core) = &self.core {
            check(client, &core.cores, "core", &[config.cores, heads, rank, rank], full)?;
            check(client, &core.u, "core_u", &[heads, rank], full)?;
            check(client, &core.v, "core_v", &[heads, rank], full)?;
        }
        if let Some(gate) = &self.gate_proj {
            check(client, gate, "gate_proj", &[config.value_dim, config.hidden_size], stored)?;
        }
        if let Some(shuffle) = &self.shuffle {
            check(client, shuffle, "shuffle", &[config.slots()], u32_storage())?;
        }
        Ok(())
    }
}

/// Checks that a layer has a tensor if its configuration calls for it.
fn present(name: &str, found: bool, expected: bool) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    let problem = if expected { "is missing" } else { "does not belong to this layer" };
    Err(Error::Tensor { name: name.into(), problem: problem.into() })
}
