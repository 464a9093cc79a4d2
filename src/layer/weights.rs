//! A layer's weights on the device, as training changes them.

use cubecl::ir::StorageType;
use cubecl::prelude::*;
use ultramem_kernels::{ElementType, Tensor, check, from_f32, from_u32, supports, u32_storage};

use crate::table::{ValueTable, upload};
use crate::weights::names;
use crate::{Error, MemoryConfig, PerWeight, Result, Weight, Weights};

/// A layer's weights on the device, contiguous. Cheap to clone: the buffers are shared.
pub struct LayerWeights<R: Runtime> {
    /// Those that are no table, shaped as a checkpoint has them, keys `[heads, 2, side_keys, key_dim, tucker_rank]`; in the layer's element
    /// type, or in f32 where [`Weight::is_full`] says so.
    pub tensors: PerWeight<Option<Tensor<R>>>,
    /// `u` and `v`, f32 `[heads, tucker_rank]`: the leading singular vectors of the summed core; None for additive scores.
    pub vectors: Option<(Tensor<R>, Tensor<R>)>,
    /// u32 `[side_keys²]`: slot to virtual address, in pages of some entries each; none where a slot is its own address.
    pub shuffle: Vec<Tensor<R>>,
    /// `[table_rows, value_dim]`, in the layer's element type.
    pub values: ValueTable<R>,
    /// `[table_rows, pre_dim]`, in the layer's element type, where the layer weighs.
    pub pre_values: Option<ValueTable<R>>,
}

impl<R: Runtime> Clone for LayerWeights<R> {
    fn clone(&self) -> Self {
        Self {
            tensors: self.tensors.clone(),
            vectors: self.vectors.clone(),
            shuffle: self.shuffle.clone(),
            values: self.values.clone(),
            pre_values: self.pre_values.clone(),
        }
    }
}

impl<R: Runtime> LayerWeights<R> {
    /// Uploads `weights`, matrices, keys and tables rounded to `dtype`.
    ///
    /// # Errors
    /// Weights that do not fit `config`, an element type that the device lacks, or a tensor other than the tables and the shuffle, or a row
    /// of them, that is larger than one buffer binding of the device.
    pub fn upload(
        client: &ComputeClient<R>,
        config: &MemoryConfig,
        weights: &Weights<'_>,
        dtype: ElementType,
    ) -> Result<Self> {
        let table =
            |weight: Weight| weights.get(weight).map(|rows| ValueTable::upload(client, rows, dtype)).transpose();
        weights.check(config)?;
        let values = table(Weight::Values)?.ok_or_else(|| absent(config, Weight::Values))?;
        Self::with_tables(client, config, weights, dtype, values, table(Weight::PreValues)?)
    }

    /// The same with tables that are on the device already: those of another layer that shares them.
    ///
    /// # Errors
    /// As [`upload`](Self::upload), and tables that do not fit `config`.
    pub fn with_tables(
        client: &ComputeClient<R>,
        config: &MemoryConfig,
        weights: &Weights<'_>,
        dtype: ElementType,
        values: ValueTable<R>,
        pre_values: Option<ValueTable<R>>,
    ) -> Result<Self> {
        weights.check(config)?;
        supports(client, dtype)?;
        let mut tensors = PerWeight::default();
        for weight in Weight::ALL.into_iter().filter(|weight| !weight.is_table()) {
            let Some(tensor) = weights.get(weight) else { continue };
            let dtype = if weight.is_full() { ElementType::F32 } else { dtype };
            tensors[weight] =
                Some(upload(client, weight.olmo(), tensor, dtype)?.reshaped(device_shape(config, weight)));
        }
        let vector = |numbers: &[f32]| from_f32(client, &[config.heads, config.tucker_rank], numbers);
        let vectors = match config.tucker() {
            true => Some((vector(&weights.core_u)?, vector(&weights.core_v)?)),
            false => None,
        };
        let shuffle = weights.shuffle_index.as_ref().map_or(Ok(Vec::new()), |index| upload_shuffle(client, index))?;
        let weights = Self { tensors, vectors, shuffle, values, pre_values };
        weights.check(client, config)?;
        Ok(weights)
    }

    /// A layer of `config` in `dtype` whose tensors `make` makes, each given its name within an OLMo layer, its shape and its element type, the
    /// shuffle (`shuffle_index`, u32) and the vectors (`tucker_core_u` and `tucker_core_v`) among them; tables and shuffle have one page each.
    ///
    /// # Errors
    /// Those of `make`, and tables of an element type that no layer has.
    pub fn make(
        config: &MemoryConfig,
        dtype: ElementType,
        mut make: impl FnMut(&'static str, &[usize], StorageType) -> Result<Tensor<R>>,
    ) -> Result<Self> {
        let full = ElementType::F32.storage();
        let mut tensors = PerWeight::default();
        for weight in Weight::ALL.into_iter().filter(|weight| weight.is_in(config)) {
            let storage = if weight.is_full() { full } else { dtype.storage() };
            tensors[weight] = Some(make(weight.olmo(), &device_shape(config, weight), storage)?);
        }
        let values = tensors[Weight::Values].take().ok_or_else(|| absent(config, Weight::Values))?;
        let vector = [config.heads, config.tucker_rank];
        let vectors = match config.tucker() {
            true => Some((make(names::CORE_U, &vector, full)?, make(names::CORE_V, &vector, full)?)),
            false => None,
        };
        let shuffle = match config.capabilities.shuffled {
            true => vec![make(names::SHUFFLE, &[config.slots()], u32_storage())?],
            false => Vec::new(),
        };
        let pre_values = tensors[Weight::PreValues].take().map(ValueTable::from_device).transpose()?;
        Ok(Self { tensors, vectors, shuffle, values: ValueTable::from_device(values)?, pre_values })
    }

    /// One of the tensors, which a checked layer of `config` has.
    pub(crate) fn get(&self, weight: Weight) -> Option<&Tensor<R>> {
        self.tensors[weight].as_ref()
    }

    /// Checks every shape and type against `config`.
    pub(crate) fn check(&self, client: &ComputeClient<R>, config: &MemoryConfig) -> Result<()> {
        let (dtype, full) = (self.values.dtype(), ElementType::F32.storage());
        for weight in Weight::ALL.into_iter().filter(|weight| !weight.is_table()) {
            present(weight.olmo(), self.tensors[weight].is_some(), weight.is_in(config))?;
            if let Some(tensor) = self.get(weight) {
                let storage = if weight.is_full() { full } else { dtype.storage() };
                check(client, tensor, weight.olmo(), &device_shape(config, weight), storage)?;
            }
        }
        present("core_u and core_v", self.vectors.is_some(), config.tucker())?;
        if let Some((u, v)) = &self.vectors {
            check(client, u, "core_u", &[config.heads, config.tucker_rank], full)?;
            check(client, v, "core_v", &[config.heads, config.tucker_rank], full)?;
        }
        present("shuffle", !self.shuffle.is_empty(), config.capabilities.shuffled)?;
        self.check_shuffle(client, config)?;
        self.values.check(client, "values", config.table_rows(), config.value_dim)?;
        present("pre-values", self.pre_values.is_some(), config.capabilities.weigh.is_some())?;
        if let Some(table) = &self.pre_values {
            table.check(client, "pre-values", config.table_rows(), config.pre_dim)?;
            if table.dtype() != dtype {
                let (found, expected) = (table.dtype().storage().to_string(), dtype.storage().to_string());
                return Err(ultramem_kernels::Error::Type { tensor: "pre-values", found, expected }.into());
            }
        }
        Ok(())
    }

    fn check_shuffle(&self, client: &ComputeClient<R>, config: &MemoryConfig) -> Result<()> {
        let mut left = config.slots();
        for (at, page) in self.shuffle.iter().enumerate() {
            let own = page.shape().iter().product::<usize>();
            let expected = if at + 1 == self.shuffle.len() { left } else { own };
            check(client, page, "shuffle", &[expected], u32_storage())?;
            left = left.saturating_sub(own);
        }
        Ok(())
    }
}

/// The shape that a weight has on the device: keys are always `[heads, 2, side_keys, key_dim, tucker_rank]`.
pub fn device_shape(config: &MemoryConfig, weight: Weight) -> Vec<usize> {
    match weight {
        Weight::Keys => vec![config.heads, 2, config.side_keys, config.key_dim, config.tucker_rank],
        _ => weight.shape(config),
    }
}

/// The shuffle in pages that each fit a binding.
fn upload_shuffle<R: Runtime>(client: &ComputeClient<R>, index: &[u32]) -> Result<Vec<Tensor<R>>> {
    let limit = usize::try_from(client.properties().memory.max_page_size).unwrap_or(usize::MAX);
    let pages = index.chunks((limit / size_of::<u32>()).max(1));
    pages.map(|page| Ok(from_u32(client, &[page.len()], page)?)).collect()
}

fn absent(config: &MemoryConfig, weight: Weight) -> Error {
    Error::Tensor { name: weight.name(config), problem: "is missing".into() }
}

/// Checks that a layer has a tensor if its configuration calls for it.
fn present(name: &str, found: bool, expected: bool) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    let problem = if expected { "is missing" } else { "does not belong to this layer" };
    Err(Error::Tensor { name: name.into(), problem: problem.into() })
}
