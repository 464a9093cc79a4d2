//! The layers as Burn modules.

use std::ops::{Deref, DerefMut};

use burn::{
    module::{Module, Param, ParamId},
    tensor::{
        Int, Tensor, TensorData, TensorPrimitive,
        backend::{AutodiffBackend, Backend},
    },
};
use burn_cubecl::tensor::CubeTensor;

use super::MemoryModel;
use super::backend::{Call, MemoryBackend, Pending, stored};
use crate::{Error, HostTensor, Kind, MemoryConfig, MemoryLayer, Result, Weights};

/// An UltraMem layer: a [`Memory`] with Tucker-decomposed scores.
#[derive(Module, Debug)]
pub struct UltraMem<B: Backend> {
    pub(super) memory: Memory<B>,
}

/// A product-key memory: a [`Memory`] with additive scores and softmax.
#[derive(Module, Debug)]
pub struct ProductKeyMemory<B: Backend> {
    pub(super) memory: Memory<B>,
}

/// What every memory layer is made of. Its record holds all of it but the configuration.
#[derive(Module, Debug)]
pub struct Memory<B: Backend> {
    query_proj: Param<Tensor<B, 2>>,
    query_norm: Param<Tensor<B, 1>>,
    keys: Param<Tensor<B, 5>>,
    keys_norm: Param<Tensor<B, 1>>,
    pub(super) core: Option<Core<B>>,
    pub(super) values: Param<Tensor<B, 2>>,
    values_proj: Param<Tensor<B, 2>>,
    #[module(skip)]
    pub(super) config: MemoryConfig,
    /// Where the table learns sparsely: its gradients that no step has used yet.
    #[module(skip)]
    pub(super) pending: Option<Pending>,
}

/// What UltraMem has beside product keys: the Tucker core, and the shuffle of its slots. No gradient reaches `u` and `v`: they follow the
/// cores.
#[derive(Module, Debug)]
pub struct Core<B: Backend> {
    pub(super) cores: Param<Tensor<B, 4>>,
    pub(super) u: Param<Tensor<B, 2>>,
    pub(super) v: Param<Tensor<B, 2>>,
    /// Slot to virtual address, `[side_keys²]`. Here, for Burn passes over the record of an optional parameter of integers.
    shuffle: Param<Tensor<B, 1, Int>>,
}

impl<B: MemoryBackend> Memory<B> {
    /// A layer of given weights, a checkpoint's for instance. `sparse`: as in [`UltraMemConfig`](super::UltraMemConfig).
    ///
    /// # Errors
    /// Weights that do not fit `config`, and Memory+, which has no module here.
    pub fn from_weights(config: MemoryConfig, weights: &Weights<'_>, sparse: bool, device: &B::Device) -> Result<Self> {
        weights.check(&config)?;
        if config.kind == Kind::MemoryPlus {
            let expected = "UltraMem or ProductKey";
            return Err(Error::Config { what: "kind of a Burn module", value: "MemoryPlus".into(), expected });
        }
        if config.slots() > i32::MAX as usize {
            let (what, value) = ("side_keys", config.side_keys.to_string());
            return Err(Error::Config { what, value, expected: "at most 46340: Burn's integers are i32" });
        }
        let (heads, rank) = (config.heads, config.tucker_rank);
        let vector = |numbers: &[f32]| fixed(floats(numbers, [heads, rank], device));
        let core = weights.shuffle_index.as_ref().map(|index| Core {
            cores: learned(floats(&weights.cores, [config.cores, heads, rank, rank], device)),
            u: vector(&weights.core_u),
            v: vector(&weights.core_v),
            shuffle: Param::initialized(ParamId::new(), integers(index, device)),
        });
        let values = upload(&weights.values, [config.rows(), config.value_dim], device);
        Ok(Self {
            query_proj: learned(upload(&weights.query_proj, [2 * config.key_dim, config.hidden_size], device)),
            query_norm: learned(upload(&weights.query_norm, [config.key_dim], device)),
            keys: learned(upload(&weights.keys, [heads, 2, config.side_keys, config.key_dim, rank], device)),
            keys_norm: learned(upload(&weights.keys_norm, [config.key_dim], device)),
            core,
            values: if sparse { fixed(values) } else { learned(values) },
            values_proj: learned(upload(&weights.values_proj, [config.hidden_size, config.pooled_dim()], device)),
            pending: sparse.then(Pending::default),
            config,
        })
    }

    /// The checked dimensions.
    pub fn config(&self) -> &MemoryConfig {
        &self.config
    }

    /// Whether these gradients have come through the layer.
    pub(super) fn took_part(&self, gradients: &B::Gradients) -> bool
    where
        B: AutodiffBackend,
    {
        self.query_proj.val().grad(gradients).is_some() || self.values_proj.val().grad(gradients).is_some()
    }

    /// Whether the table learns sparsely.
    pub fn is_sparse(&self) -> bool {
        self.pending.is_some()
    }

    /// Whether the table can be updated in place: one that was put in another's place may not be contiguous. A table that is new or
    /// loaded is.
    ///
    /// # Errors
    /// [`NotContiguous`](ultramem_kernels::Error::NotContiguous) with shape and strides.
    pub(super) fn check_table(&self) -> Result<()> {
        let table = ultramem_kernels::Tensor::from(B::float_cube(primitive(self.values.val())));
        let (shape, storage) = ([self.config.rows(), self.config.value_dim], table.dtype);
        Ok(ultramem_kernels::check(&table, "values", &shape, storage)?)
    }

    /// The layer's output for `input` `[.., hidden_size]`, in the same shape.
    ///
    /// # Panics
    /// Where [`try_forward`](Self::try_forward) gives an error.
    pub fn forward<const D: usize>(&self, input: Tensor<B, D>) -> Tensor<B, D> {
        self.try_forward(input).unwrap_or_else(|error| panic!("memory layer: {error}"))
    }

    /// The layer's output for `input` `[.., hidden_size]`, in the same shape.
    ///
    /// # Errors
    /// An input of another width or without a token, or an element type that the device lacks.
    pub fn try_forward<const D: usize>(&self, input: Tensor<B, D>) -> Result<Tensor<B, D>> {
        let shape = input.shape();
        let (width, hidden_size) = (shape.as_slice().last().copied().unwrap_or(0), self.config.hidden_size);
        if width != hidden_size || shape.num_elements() == 0 {
            let (found, expected) = (shape.to_vec(), vec![shape.num_elements() / width.max(1), hidden_size]);
            return Err(ultramem_kernels::Error::Shape { tensor: "input", found, expected }.into());
        }
        let tokens = shape.num_elements() / width;
        let output = B::memory(self.call(input.reshape([tokens, width])))?;
        Ok(Tensor::<B, 2>::from_primitive(TensorPrimitive::Float(output)).reshape(shape))
    }

    /// The layer for serving and for files: its weights are prepared once, here. It sees later changes of the table, and none of
    /// the other weights.
    ///
    /// # Errors
    /// An element type that the device lacks.
    pub fn layer(&self, device: &B::Device) -> Result<MemoryLayer<B::Runtime>> {
        let nothing = Tensor::zeros([1, self.config.hidden_size], device);
        Ok(self.call(nothing).layer()?.0)
    }

    fn call(&self, input: Tensor<B, 2>) -> Call<B> {
        Call {
            config: self.config.clone(),
            query_proj: primitive(self.query_proj.val()),
            query_norm: primitive(self.query_norm.val()),
            keys: primitive(self.keys.val()),
            keys_norm: primitive(self.keys_norm.val()),
            core: self
                .core
                .as_ref()
                .map(|core| [primitive(core.cores.val()), primitive(core.u.val()), primitive(core.v.val())]),
            shuffle: self.core.as_ref().map(|core| core.shuffle.val().into_primitive()),
            values: primitive(self.values.val()),
            values_proj: primitive(self.values_proj.val()),
            input: primitive(input),
            pending: self.pending.clone(),
        }
    }
}

pub(super) fn primitive<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> B::FloatTensorPrimitive {
    tensor.into_primitive().tensor()
}

/// A parameter that optimisers train, contiguous also when it has been loaded.
fn learned<B: MemoryBackend, const D: usize>(tensor: Tensor<B, D>) -> Param<Tensor<B, D>> {
    Param::from_tensor(tensor).load_mapper(packed)
}

/// As [`learned`], for what no optimiser of Burn's trains.
fn fixed<B: MemoryBackend, const D: usize>(tensor: Tensor<B, D>) -> Param<Tensor<B, D>> {
    Param::initialized(ParamId::new(), tensor).load_mapper(packed)
}

/// The tensor contiguous, so that no call has to copy it. Autodiff lets go of it.
fn packed<B: MemoryBackend, const D: usize>(tensor: Tensor<B, D>) -> Tensor<B, D> {
    let tensor = stored(B::float_cube(primitive(tensor)));
    Tensor::from_primitive(TensorPrimitive::Float(B::float_from_cube(tensor)))
}

/// Uploaded flat, for an allocator may pad rows.
fn floats<B: MemoryBackend, const D: usize>(numbers: &[f32], shape: [usize; D], device: &B::Device) -> Tensor<B, D> {
    let data = TensorData::new(numbers.to_vec(), [numbers.len()]);
    let flat = B::float_cube(primitive(Tensor::<B, 1>::from_data(data, device)));
    let tensor = CubeTensor::new_contiguous(flat.client, flat.device, shape.into(), flat.handle, flat.dtype);
    Tensor::from_primitive(TensorPrimitive::Float(B::float_from_cube(tensor)))
}

/// The addresses are below 2³¹.
fn integers<B: Backend>(numbers: &[u32], device: &B::Device) -> Tensor<B, 1, Int> {
    let numbers: Vec<i32> = numbers.iter().map(|&number| number as i32).collect();
    let count = numbers.len();
    Tensor::from_data(TensorData::new(numbers, [count]), device)
}

fn upload<B: MemoryBackend, const D: usize>(
    tensor: &HostTensor<'_>,
    shape: [usize; D],
    device: &B::Device,
) -> Tensor<B, D> {
    floats(&tensor.to_f32(), shape, device)
}

impl<B: Backend> From<UltraMem<B>> for Memory<B> {
    fn from(layer: UltraMem<B>) -> Self {
        layer.memory
    }
}

impl<B: Backend> From<ProductKeyMemory<B>> for Memory<B> {
    fn from(layer: ProductKeyMemory<B>) -> Self {
        layer.memory
    }
}

impl<B: Backend> Deref for UltraMem<B> {
    type Target = Memory<B>;

    fn deref(&self) -> &Memory<B> {
        &self.memory
    }
}

impl<B: Backend> DerefMut for UltraMem<B> {
    fn deref_mut(&mut self) -> &mut Memory<B> {
        &mut self.memory
    }
}

impl<B: Backend> Deref for ProductKeyMemory<B> {
    type Target = Memory<B>;

    fn deref(&self) -> &Memory<B> {
        &self.memory
    }
}

impl<B: Backend> DerefMut for ProductKeyMemory<B> {
    fn deref_mut(&mut self) -> &mut Memory<B> {
        &mut self.memory
    }
}

impl<B: MemoryBackend + AutodiffBackend> MemoryModel<B> for UltraMem<B> {
    fn memories(&mut self) -> Vec<&mut Memory<B>> {
        vec![&mut self.memory]
    }
}

impl<B: MemoryBackend + AutodiffBackend> MemoryModel<B> for ProductKeyMemory<B> {
    fn memories(&mut self) -> Vec<&mut Memory<B>> {
        vec![&mut self.memory]
    }
}
