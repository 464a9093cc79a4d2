//! A layer's weights on the host: what a checkpoint holds, what the oracle reads and what [`MemoryLayer`] uploads.
//!
//! [`MemoryLayer`]: crate::MemoryLayer

mod init;
pub(crate) mod names;
mod tensor;

use std::ops::Index;

pub use names::{PerWeight, Weight};
pub use tensor::HostTensor;
#[cfg(feature = "files")]
pub(crate) use tensor::count;

use crate::{ElementType, Error, MemoryConfig, Result};

/// Every weight of one layer. The checkpoint's names are on the page of [`checkpoint`](crate::checkpoint), shapes on that of [`Weight`].
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Weights<'a> {
    /// What the layer learns; those that its configuration does not call for are not there.
    pub tensors: PerWeight<Option<HostTensor<'a>>>,
    /// `u`: `[heads, tucker_rank]`; empty for additive scores.
    pub core_u: Vec<f32>,
    /// `v`: `[heads, tucker_rank]`; empty for additive scores.
    pub core_v: Vec<f32>,
    /// Slot → virtual address, `[side_keys²]`; None where a slot is its own address.
    pub shuffle_index: Option<Vec<u32>>,
}

impl<'a> Index<Weight> for Weights<'a> {
    type Output = HostTensor<'a>;

    /// # Panics
    /// If the layer does not have this weight: one that has been checked has those that [`Weight::is_in`] says.
    fn index(&self, weight: Weight) -> &HostTensor<'a> {
        self.get(weight).unwrap_or_else(|| panic!("the layer has no {}", weight.olmo()))
    }
}

impl<'a> Weights<'a> {
    /// One of the tensors, if the layer has it.
    pub fn get(&self, weight: Weight) -> Option<&HostTensor<'a>> {
        self.tensors[weight].as_ref()
    }

    /// The numbers of one of the tensors, widened; none if the layer does not have it.
    pub fn numbers(&self, weight: Weight) -> Vec<f32> {
        self.get(weight).map_or_else(Vec::new, HostTensor::to_f32)
    }

    /// The same weights with another tensor in the place of one.
    pub fn with(mut self, weight: Weight, tensor: HostTensor<'a>) -> Self {
        self.tensors[weight] = Some(tensor);
        self
    }

    /// The weights of a layer in `dtype`: matrices, keys and tables rounded to it, the rest in f32.
    pub fn rounded(&self, dtype: ElementType) -> Weights<'static> {
        let cast = self.cast(dtype);
        let own = |weight| cast.get(weight).map(|tensor| tensor.clone().into_owned());
        Weights {
            tensors: PerWeight::from_fn(own),
            core_u: cast.core_u,
            core_v: cast.core_v,
            shuffle_index: cast.shuffle_index,
        }
    }

    /// The same, borrowed where they have the type already.
    pub fn cast(&self, dtype: ElementType) -> Weights<'_> {
        let of = |weight: Weight| if weight.is_full() { ElementType::F32 } else { dtype };
        Weights {
            tensors: PerWeight::from_fn(|weight| self.get(weight).map(|tensor| tensor.cast(of(weight)))),
            core_u: self.core_u.clone(),
            core_v: self.core_v.clone(),
            shuffle_index: self.shuffle_index.clone(),
        }
    }

    /// Checks that the layer has the weights that `config` calls for, each in its shape, and that `shuffle_index` stays inside the virtual table.
    ///
    /// # Errors
    /// [`Error::Tensor`] or [`Error::Length`] with the checkpoint's name of the tensor.
    pub fn check(&self, config: &MemoryConfig) -> Result<()> {
        for weight in Weight::ALL {
            let problem = match self.get(weight) {
                Some(_) if !weight.is_in(config) => "does not belong to this layer".into(),
                None if weight.is_in(config) => "is missing".into(),
                Some(tensor) if tensor.shape() != weight.shape(config) => {
                    format!("has shape {:?}, expected {:?}", tensor.shape(), weight.shape(config))
                }
                _ => continue,
            };
            return Err(Error::Tensor { name: weight.name(config), problem });
        }
        self.check_vectors(config)?;
        self.check_shuffle(config)
    }

    fn check_vectors(&self, config: &MemoryConfig) -> Result<()> {
        let expected = if config.tucker() { config.heads * config.tucker_rank } else { 0 };
        for (name, found) in [(names::CORE_U, self.core_u.len()), (names::CORE_V, self.core_v.len())] {
            if found != expected {
                return Err(Error::Length { tensor: name.into(), found, expected });
            }
        }
        Ok(())
    }

    fn check_shuffle(&self, config: &MemoryConfig) -> Result<()> {
        let wrong = |problem: String| Err(Error::Tensor { name: names::SHUFFLE.into(), problem });
        let shuffle = match &self.shuffle_index {
            Some(shuffle) if config.capabilities.shuffled => shuffle,
            None if !config.capabilities.shuffled => return Ok(()),
            None => return wrong("is missing".into()),
            Some(_) => return wrong("does not belong to this layer, whose slots are their own addresses".into()),
        };
        let slots = config.slots();
        if shuffle.len() != slots {
            return wrong(format!("has {} entries, expected side_keys² = {slots}", shuffle.len()));
        }
        match shuffle.iter().position(|&address| address as usize >= slots) {
            Some(at) => wrong(format!("entry {at} is {}, expected less than side_keys² = {slots}", shuffle[at])),
            None => Ok(()),
        }
    }
}
