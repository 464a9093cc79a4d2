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
use super::backend::{Call, MemoryBackend, device_tensor, stored};
use super::pending::Learning;
use crate::{Checkpoint, Error, HostTensor, Kind, MemoryConfig, MemoryLayer, Result, Weights};

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

/// A Memory+ layer with a table of its own: a [`Memory`] with additive scores and softmax, a query for each head, keys taken as they are, and a
/// gate.
#[derive(Module, Debug)]
pub struct MemoryPlus<B: Backend> {
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
    /// Slot to virtual address, `[side_keys²]`, where a slot is not its own. A list, for Burn passes over the record of an optional
    /// parameter of integers.
    shuffle: Vec<Param<Tensor<B, 1, Int>>>,
    pub(super) values: Param<Tensor<B, 2>>,
    values_proj: Param<Tensor<B, 2>>,
    /// Where the pooled value is gated.
    gate_proj: Option<Param<Tensor<B, 2>>>,
    #[module(skip)]
    pub(super) config: MemoryConfig,
    /// Where the table learns sparsely, its gradients that no step has used yet.
    pub(super) learning: Learning<B>,
}

/// The Tucker core. No gradient reaches `u` and `v`: they follow the cores.
#[derive(Module, Debug)]
pub struct Core<B: Backend> {
    pub(super) cores: Param<Tensor<B, 4>>,
    pub(super) u: Param<Tensor<B, 2>>,
    pub(super) v: Param<Tensor<B, 2>>,
}

impl<B: MemoryBackend> Memory<B> {
    /// A layer of given weights, a checkpoint's for instance. `sparse`: as in [`UltraMemConfig`](super::UltraMemConfig).
    ///
    /// # Errors
    /// Weights that do not fit `config`, or more slots than Burn's integers count.
    pub fn from_weights(config: MemoryConfig, weights: &Weights<'_>, sparse: bool, device: &B::Device) -> Result<Self> {
        weights.check(&config)?;
        if config.slots() > i32::MAX as usize {
            let (what, value) = ("side_keys", config.side_keys.to_string());
            return Err(Error::Config { what, value, expected: "at most 46340: Burn's integers are i32" });
        }
        let (heads, rank) = (config.heads, config.tucker_rank);
        let vector = |numbers: &[f32]| fixed(floats(numbers, [heads, rank], device));
        let core = config.tucker().then(|| Core {
            cores: learned(floats(&weights.cores, [config.cores, heads, rank, rank], device)),
            u: vector(&weights.core_u),
            v: vector(&weights.core_v),
        });
        let shuffle = |index: &Vec<u32>| Param::initialized(ParamId::new(), integers(index, device));
        let values = upload(&weights.values, [config.rows(), config.value_dim], device);
        Ok(Self {
            query_proj: learned(upload(
                &weights.query_proj,
                [config.query_heads() * 2 * config.key_dim, config.hidden_size],
                device,
            )),
            query_norm: learned(upload(&weights.query_norm, [config.key_dim], device)),
            keys: learned(upload(&weights.keys, [heads, 2, config.side_keys, config.key_dim, rank], device)),
            keys_norm: learned(upload(&weights.keys_norm, [config.key_dim], device)),
            core,
            shuffle: weights.shuffle_index.iter().map(shuffle).collect(),
            values: if sparse { fixed(values) } else { learned(values) },
            values_proj: learned(upload(&weights.values_proj, [config.hidden_size, config.pooled_dim()], device)),
            gate_proj: (weights.gate_proj.as_ref())
                .map(|gate| learned(upload(gate, [config.value_dim, config.hidden_size], device))),
            learning: Learning::new(sparse),
            config,
        })
    }

    /// The layer of a checkpoint, of whatever kind. `sparse`: as in [`UltraMemConfig`](super::UltraMemConfig).
    ///
    /// # Errors
    /// A file that lacks a weight or holds one of another shape, or more slots than Burn's integers count.
    pub fn from_checkpoint(file: &Checkpoint, sparse: bool, device: &B::Device) -> Result<Self> {
        Self::from_weights(file.config().clone(), &file.weights()?, sparse, device)
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
        self.learning.pending.is_some()
    }

    /// Whether the table can be updated in place: one that was put in another's place may not be contiguous. A table that is new or
    /// loaded is.
    ///
    /// # Errors
    /// [`NotContiguous`](ultramem_kernels::Error::NotContiguous) with shape and strides.
    pub(super) fn check_table(&self) -> Result<()> {
        let table = device_tensor(B::float_cube(primitive(self.values.val())));
        let (shape, storage) = ([self.config.rows(), self.config.value_dim], table.dtype);
        Ok(ultramem_kernels::check(table.client(), &table, "values", &shape, storage)?)
    }

    /// The layer's output for `input` `[.., hidden_size]`, in the same shape; empty for an empty batch, whose gradients are zeros.
    ///
    /// # Panics
    /// Where [`try_forward`](Self::try_forward) gives an error.
    pub fn forward<const D: usize>(&self, input: Tensor<B, D>) -> Tensor<B, D> {
        self.try_forward(input).unwrap_or_else(|error| panic!("memory layer: {error}"))
    }

    /// The layer's output for `input` `[.., hidden_size]`, in the same shape.
    ///
    /// # Errors
    /// An input of another width, or an element type that the device lacks.
    pub fn try_forward<const D: usize>(&self, input: Tensor<B, D>) -> Result<Tensor<B, D>> {
        let shape = input.shape();
        let (width, hidden_size) = (shape.as_slice().last().copied().unwrap_or(0), self.config.hidden_size);
        let tokens = shape.as_slice().iter().rev().skip(1).product::<usize>();
        if width != hidden_size {
            let (found, expected) = (shape.to_vec(), vec![tokens, hidden_size]);
            return Err(ultramem_kernels::Error::Shape { tensor: "input", found, expected }.into());
        }
        let output = B::memory(self.call(input.reshape([tokens, width])))?;
        Ok(Tensor::<B, 2>::from_primitive(TensorPrimitive::Float(output)).reshape(shape))
    }

    /// The layer for serving and for files, as it is now: its weights are prepared once, here. It shares the table until the module's next
    /// step, which copies it: while both live then, there are two.
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
            shuffle: self.shuffle.first().map(|shuffle| shuffle.val().into_primitive()),
            values: primitive(self.values.val()),
            values_proj: primitive(self.values_proj.val()),
            gate_proj: self.gate_proj.as_ref().map(|gate| primitive(gate.val())),
            input: primitive(input),
            pending: self.learning.pending.clone(),
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

/// What the modules of each kind have in common.
macro_rules! layers {
    ($($layer:ident: $kind:ident),*) => {
        $(
            impl<B: MemoryBackend> $layer<B> {
                /// The layer of a checkpoint. `sparse`: as in [`UltraMemConfig`](super::UltraMemConfig).
                ///
                /// # Errors
                /// A file with a layer of another kind, that lacks a weight or holds one of another shape, or more slots than Burn's integers
                /// count.
                pub fn from_checkpoint(file: &Checkpoint, sparse: bool, device: &B::Device) -> Result<Self> {
                    Ok(Self { memory: of_kind(file, Kind::$kind, sparse, device)? })
                }
            }

            impl<B: Backend> From<$layer<B>> for Memory<B> {
                fn from(layer: $layer<B>) -> Self {
                    layer.memory
                }
            }

            impl<B: Backend> Deref for $layer<B> {
                type Target = Memory<B>;

                fn deref(&self) -> &Memory<B> {
                    &self.memory
                }
            }

            impl<B: Backend> DerefMut for $layer<B> {
                fn deref_mut(&mut self) -> &mut Memory<B> {
                    &mut self.memory
                }
            }

            impl<B: MemoryBackend + AutodiffBackend> MemoryModel<B> for $layer<B> {
                fn memories(&mut self) -> Vec<&mut Memory<B>> {
                    vec![&mut self.memory]
                }
            }
        )*
    };
}

layers!(UltraMem: UltraMem, ProductKeyMemory: ProductKey, MemoryPlus: MemoryPlus);

/// The layer of a checkpoint that must be of a kind.
fn of_kind<B: MemoryBackend>(file: &Checkpoint, kind: Kind, sparse: bool, device: &B::Device) -> Result<Memory<B>> {
    let found = file.config().kind();
    if found == Some(kind) {
        return Memory::from_checkpoint(file, sparse, device);
    }
    let value = found.map_or("none with a name", Kind::name).to_string();
    Err(Error::Config { what: "kind of the checkpoint's layer", value, expected: kind.name() })
}
