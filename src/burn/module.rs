//! The layers as Burn modules.

use std::ops::{Deref, DerefMut};

use burn::{
    module::{Module, Param, ParamId},
    tensor::{
        DType, Int, Tensor, TensorData, TensorMetadata, TensorPrimitive,
        backend::{AutodiffBackend, Backend},
    },
};
use burn_cubecl::CubeRuntime;

use super::backend::{Buffer, Call, MemoryBackend};
use super::engine::Engine;
use super::kernels::Kernels;
use super::model::read;
use super::pending::{Learning, Pending};
use super::{Memories, MemoryModel, Placement};
use crate::{
    Checkpoint, ElementType, Error, HostTensor, Kind, MemoryConfig, MemoryLayer, PerWeight, Result, Stream, Weight,
    Weights,
};

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

/// An UltraMemV2 memory: layers that share a table, in the blocks of a model where [`Placement`](super::Placement) puts them; "full" puts one in each.
/// Steps of the trainers update the table once, by the gradients of all layers.
#[derive(Module, Debug)]
pub struct UltraMemV2<B: Backend> {
    pub(super) memories: Memories<B>,
}

/// A Memory+ layer as lingua's checkpoints have it, with a table of its own: a [`Memory`] without norms, with biases, and with gates that may be there or not.
#[derive(Module, Debug)]
pub struct LinguaMemoryPlus<B: Backend> {
    pub(super) memory: Memory<B>,
}

/// PEER (arXiv 2407.04153), with tables of its own: a [`Memory`] whose scores are multiplied by the gelu of the input's products with a second table.
#[derive(Module, Debug)]
pub struct Peer<B: Backend> {
    pub(super) memory: Memory<B>,
}

/// What every memory layer is made of. Its record holds all of it but the configuration.
#[derive(Module, Debug)]
pub struct Memory<B: Backend> {
    query_proj: Param<Tensor<B, 2>>,
    query_bias: Option<Param<Tensor<B, 1>>>,
    query_norm: Option<Param<Tensor<B, 1>>>,
    keys: Param<Tensor<B, 5>>,
    keys_norm: Option<Param<Tensor<B, 1>>>,
    pub(super) core: Option<Core<B>>,
    /// Slot to virtual address, `[side_keys²]`, where a slot is not its own. A list, for Burn passes over the record of an optional
    /// parameter of integers.
    shuffle: Vec<Param<Tensor<B, 1, Int>>>,
    pre_values_proj: Option<Param<Tensor<B, 2>>>,
    /// None where the tables are another layer's.
    pub(super) tables: Option<Tables<B>>,
    values_proj: Option<Param<Tensor<B, 2>>>,
    values_bias: Option<Param<Tensor<B, 1>>>,
    /// Where the pooled value is gated.
    gate_proj: Option<Param<Tensor<B, 2>>>,
    gate_bias: Option<Param<Tensor<B, 1>>>,
    /// Where the output is gated.
    output_gate: Option<Param<Tensor<B, 2>>>,
    output_gate_bias: Option<Param<Tensor<B, 1>>>,
    #[module(skip)]
    pub(super) config: MemoryConfig,
    /// Where the tables learn sparsely, their gradients that no step has used yet.
    pub(super) learning: Learning<B>,
}

/// The tables of a layer, or of layers that share them.
#[derive(Module, Debug)]
pub struct Tables<B: Backend> {
    /// `[table_rows, value_dim]`.
    pub(super) values: Param<Tensor<B, 2>>,
    /// `[table_rows, pre_dim]`, where the layer weighs.
    pub(super) pre_values: Option<Param<Tensor<B, 2>>>,
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
        fits_integers(&config)?;
        let table = |weight: Weight| {
            let rows = weights.get(weight).map(|rows| upload(rows, device));
            rows.map(|rows| if sparse { fixed(rows) } else { learned(rows) })
        };
        let tables = table(Weight::Values).map(|values| Tables { values, pre_values: table(Weight::PreValues) });
        Ok(Self { tables, learning: Learning::new(sparse), ..Self::without_tables(config, weights, device) })
    }

    /// A layer of given weights that reads the tables of `owner`, which learn as that layer's do. It runs by
    /// [`try_forward_with`](Self::try_forward_with); those of `weights` are passed over.
    ///
    /// # Errors
    /// Weights that do not fit `config`, a table of `owner` of another shape, or more slots than Burn's integers count.
    pub fn sharing(config: MemoryConfig, weights: &Weights<'_>, owner: &Self, device: &B::Device) -> Result<Self> {
        weights.check(&config)?;
        fits_integers(&config)?;
        let layer = Self::without_tables(config, weights, device);
        layer.check_owner(owner)?;
        Ok(layer)
    }

    /// Of weights that fit `config`.
    fn without_tables(config: MemoryConfig, weights: &Weights<'_>, device: &B::Device) -> Self {
        let (heads, rank) = (config.heads, config.tucker_rank);
        let vector = |numbers: &[f32]| fixed(floats(numbers, [heads, rank], device));
        let core = config.tucker().then(|| Core {
            cores: learned(upload(&weights[Weight::Cores], device)),
            u: vector(&weights.core_u),
            v: vector(&weights.core_v),
        });
        let shuffle = |index: &Vec<u32>| Param::initialized(ParamId::new(), integers(index, device));
        let keys = floats(&weights.numbers(Weight::Keys), [heads, 2, config.side_keys, config.key_dim, rank], device);
        let matrix = |weight: Weight| weights.get(weight).map(|tensor| learned(upload::<B, 2>(tensor, device)));
        let bias = |weight: Weight| weights.get(weight).map(|tensor| learned(upload::<B, 1>(tensor, device)));
        Self {
            query_proj: learned(upload(&weights[Weight::QueryProj], device)),
            query_bias: bias(Weight::QueryBias),
            query_norm: bias(Weight::QueryNorm),
            keys: learned(keys),
            keys_norm: bias(Weight::KeysNorm),
            core,
            shuffle: weights.shuffle_index.iter().map(shuffle).collect(),
            pre_values_proj: matrix(Weight::PreValuesProj),
            tables: None,
            values_proj: matrix(Weight::ValuesProj),
            values_bias: bias(Weight::ValuesBias),
            gate_proj: matrix(Weight::GateProj),
            gate_bias: bias(Weight::GateBias),
            output_gate: matrix(Weight::OutputGate),
            output_gate_bias: bias(Weight::OutputGateBias),
            learning: Learning::new(false),
            config,
        }
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
        self.query_proj.val().grad(gradients).is_some() || self.keys.val().grad(gradients).is_some()
    }

    /// What tells it from other layers.
    pub(super) fn id(&self) -> ParamId {
        self.keys.id
    }

    /// Whether the tables learn sparsely.
    pub fn is_sparse(&self) -> bool {
        self.learning.pending.is_some()
    }

    /// Its tables, for a step.
    pub(super) fn tables_mut(&mut self) -> Vec<TableMut<'_, B>> {
        let Some(Tables { values, pre_values }) = &mut self.tables else { return Vec::new() };
        let (rows, config, pending) = (self.config.table_rows(), &self.config, self.learning.pending.as_ref());
        let values = TableMut { param: values, pending: pending.map(|all| &all.values), rows, width: config.value_dim };
        let of_pre =
            |param| TableMut { param, pending: pending.map(|all| &all.pre_values), rows, width: config.pre_dim };
        std::iter::once(values).chain(pre_values.as_mut().map(of_pre)).collect()
    }

    /// Checks that this layer can read the tables of `owner`.
    fn check_owner(&self, owner: &Self) -> Result<()> {
        let (own, theirs) = (&self.config, &owner.config);
        for (what, found, expected) in [
            ("rows of the shared table", theirs.table_rows(), own.table_rows()),
            ("value_dim of the shared table", theirs.value_dim, own.value_dim),
            ("pre_dim of the shared table", theirs.pre_dim, own.pre_dim),
            ("tables of the layer that shares its own", usize::from(owner.tables.is_some()), 1),
        ] {
            if found != expected {
                let (value, expected) = (found as u64, expected as u64);
                return Err(ultramem_kernels::Error::Number { what, value, expected }.into());
            }
        }
        Ok(())
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
        self.try_forward_with(self, input)
    }

    /// [`try_forward`](Self::try_forward) with the tables of `owner`, another layer.
    ///
    /// # Errors
    /// As [`try_forward`](Self::try_forward), and tables of another shape, or none.
    pub fn try_forward_with<const D: usize>(&self, owner: &Self, input: Tensor<B, D>) -> Result<Tensor<B, D>> {
        self.try_forward_on(None, owner, input)
    }

    /// The same in a stream of the device, where there are any. The caller keeps the input until the output is used.
    pub(super) fn try_forward_on<const D: usize>(
        &self,
        stream: Option<Stream>,
        owner: &Self,
        input: Tensor<B, D>,
    ) -> Result<Tensor<B, D>> {
        self.check_owner(owner)?;
        let shape = input.shape();
        let (width, hidden_size) = (shape.as_slice().last().copied().unwrap_or(0), self.config.hidden_size);
        let tokens = shape.as_slice().iter().rev().skip(1).product::<usize>();
        if width != hidden_size {
            let (found, expected) = (shape.to_vec(), vec![tokens, hidden_size]);
            return Err(ultramem_kernels::Error::Shape { tensor: "input", found, expected }.into());
        }
        let call = self.call(owner, input.reshape([tokens, width]));
        let output = B::memory(Call { stream, ..call })?;
        Ok(Tensor::<B, 2>::from_primitive(TensorPrimitive::Float(output)).reshape(shape))
    }

    /// The weights as they are now, read from the device: for files, and for layers without Burn.
    ///
    /// # Errors
    /// A layer without tables of its own, an element type that no layer has, or a device that failed.
    pub fn weights(&self) -> Result<Weights<'static>> {
        self.weights_with(self)
    }

    /// [`weights`](Self::weights) with the tables of `owner`, another layer.
    ///
    /// # Errors
    /// As [`weights`](Self::weights), and tables of another shape.
    pub fn weights_with(&self, owner: &Self) -> Result<Weights<'static>> {
        self.check_owner(owner)?;
        let mut call = self.call(owner, self.query_proj.val());
        let mut weights = Weights::default();
        for weight in Weight::ALL {
            let tensor = call.tensors[weight].take().map(|tensor| host::<B>(&self.config, weight, tensor));
            weights.tensors[weight] = tensor.transpose()?;
        }
        if let Some(core) = &self.core {
            (weights.core_u, weights.core_v) = (read(core.u.val())?, read(core.v.val())?);
        }
        if let Some(shuffle) = self.shuffle.first() {
            let data = shuffle.val().try_into_data().map_err(|error| Error::Device(error.to_string()))?;
            weights.shuffle_index = Some(data.iter::<u32>().collect());
        }
        Ok(weights)
    }

    fn call(&self, owner: &Self, input: Tensor<B, 2>) -> Call<B> {
        let tables = owner.tables.as_ref();
        let tensors = PerWeight::from_fn(|weight| match weight {
            Weight::QueryProj => Some(primitive(self.query_proj.val())),
            Weight::QueryBias => optional(&self.query_bias),
            Weight::QueryNorm => optional(&self.query_norm),
            Weight::Keys => Some(primitive(self.keys.val())),
            Weight::KeysNorm => optional(&self.keys_norm),
            Weight::Cores => self.core.as_ref().map(|core| primitive(core.cores.val())),
            Weight::PreValuesProj => optional(&self.pre_values_proj),
            Weight::PreValues => tables.and_then(|tables| optional(&tables.pre_values)),
            Weight::Values => tables.map(|tables| primitive(tables.values.val())),
            Weight::ValuesProj => optional(&self.values_proj),
            Weight::ValuesBias => optional(&self.values_bias),
            Weight::GateProj => optional(&self.gate_proj),
            Weight::GateBias => optional(&self.gate_bias),
            Weight::OutputGate => optional(&self.output_gate),
            Weight::OutputGateBias => optional(&self.output_gate_bias),
        });
        Call {
            config: self.config.clone(),
            tensors,
            vectors: self.core.as_ref().map(|core| [primitive(core.u.val()), primitive(core.v.val())]),
            shuffle: self.shuffle.first().map(|shuffle| shuffle.val().into_primitive()),
            input: primitive(input),
            pending: owner.learning.pending.clone(),
            stream: None,
        }
    }
}

impl<R: CubeRuntime, B: MemoryBackend<Engine = Kernels<R>>> Memory<B> {
    /// The layer for serving, as it is now: its weights are prepared once, here. It shares the table until the module's next step, which copies
    /// it: while both live then, there are two.
    ///
    /// # Errors
    /// An element type that the device lacks.
    pub fn layer(&self, device: &B::Device) -> Result<MemoryLayer<R>> {
        self.layer_with(self, device)
    }

    /// [`layer`](Self::layer) with the tables of `owner`, another layer.
    ///
    /// # Errors
    /// As [`layer`](Self::layer), and tables of another shape, or none.
    pub fn layer_with(&self, owner: &Self, device: &B::Device) -> Result<MemoryLayer<R>> {
        self.check_owner(owner)?;
        let nothing = Tensor::zeros([1, self.config.hidden_size], device);
        self.call(owner, nothing).buffers().layer().map(|(layer, _)| layer)
    }
}

/// A table of a layer, for a step.
pub(super) struct TableMut<'a, B: Backend> {
    pub(super) param: &'a mut Param<Tensor<B, 2>>,
    /// Where it learns sparsely.
    pub(super) pending: Option<&'a Pending>,
    pub(super) rows: usize,
    pub(super) width: usize,
}

impl<B: MemoryBackend> TableMut<'_, B> {
    /// Whether the table can be updated in place: one that was put in another's place may not be contiguous. A table that is new or
    /// loaded is.
    ///
    /// # Errors
    /// [`NotContiguous`](ultramem_kernels::Error::NotContiguous) with shape and strides.
    pub(super) fn check(&self) -> Result<()> {
        B::Engine::check_table(&B::float_buffer(primitive(self.param.val())), [self.rows, self.width])
    }
}

fn fits_integers(config: &MemoryConfig) -> Result<()> {
    if config.slots() > i32::MAX as usize {
        let (what, value) = ("side_keys", config.side_keys.to_string());
        return Err(Error::Config { what, value, expected: "at most 46340: Burn's integers are i32" });
    }
    Ok(())
}

fn optional<B: Backend, const D: usize>(param: &Option<Param<Tensor<B, D>>>) -> Option<B::FloatTensorPrimitive> {
    param.as_ref().map(|param| primitive(param.val()))
}

pub(super) fn primitive<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> B::FloatTensorPrimitive {
    tensor.into_primitive().tensor()
}

/// An engine's tensor as Burn's.
pub(super) fn from_buffer<B: MemoryBackend, const D: usize>(buffer: Buffer<B>) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(B::float_from_buffer(buffer)))
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
    from_buffer(B::Engine::packed(B::float_buffer(primitive(tensor))))
}

/// A weight on the host, in f32 where every layer has it so.
fn host<B: MemoryBackend>(
    config: &MemoryConfig,
    weight: Weight,
    tensor: B::FloatTensorPrimitive,
) -> Result<HostTensor<'static>> {
    let flat = Tensor::<B, 1>::from_primitive(TensorPrimitive::Float(B::float_reshape(
        tensor.clone(),
        [tensor.shape().num_elements()].into(),
    )));
    let data = flat.try_into_data().map_err(|error| Error::Device(error.to_string()))?;
    let dtype = element_type(data.dtype).ok_or_else(|| Error::Tensor {
        name: weight.name(config),
        problem: format!("is {:?}, expected F32, F16 or BF16", data.dtype),
    })?;
    let tensor = HostTensor::new(weight.shape(config), dtype, data.as_bytes().to_vec())?;
    let full = weight.is_full() && dtype != ElementType::F32;
    Ok(if full { tensor.cast(ElementType::F32).into_owned() } else { tensor })
}

/// The element type of a layer's tensor; None for one that no layer has.
pub(super) fn element_type(dtype: DType) -> Option<ElementType> {
    match dtype {
        DType::F32 | DType::Flex32 => Some(ElementType::F32),
        DType::F16 => Some(ElementType::F16),
        DType::BF16 => Some(ElementType::BF16),
        _ => None,
    }
}

/// Uploaded flat, for an allocator may pad rows.
fn floats<B: MemoryBackend, const D: usize>(numbers: &[f32], shape: [usize; D], device: &B::Device) -> Tensor<B, D> {
    let data = TensorData::new(numbers.to_vec(), [numbers.len()]);
    let flat = B::float_buffer(primitive(Tensor::<B, 1>::from_data(data, device)));
    from_buffer(B::Engine::shaped(flat, shape.into()))
}

/// The addresses are below 2³¹.
fn integers<B: Backend>(numbers: &[u32], device: &B::Device) -> Tensor<B, 1, Int> {
    let numbers: Vec<i32> = numbers.iter().map(|&number| number as i32).collect();
    let count = numbers.len();
    Tensor::from_data(TensorData::new(numbers, [count]), device)
}

/// A tensor of as many dimensions as the file has.
fn upload<B: MemoryBackend, const D: usize>(tensor: &HostTensor<'_>, device: &B::Device) -> Tensor<B, D> {
    let mut shape = [1; D];
    shape.iter_mut().zip(tensor.shape()).for_each(|(own, size)| *own = *size);
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

layers!(
    UltraMem: UltraMem,
    ProductKeyMemory: ProductKey,
    MemoryPlus: MemoryPlus,
    LinguaMemoryPlus: LinguaMemoryPlus,
    Peer: Peer
);

/// The layer of a checkpoint that must be of a kind.
fn of_kind<B: MemoryBackend>(file: &Checkpoint, kind: Kind, sparse: bool, device: &B::Device) -> Result<Memory<B>> {
    check_kind(file, kind)?;
    Memory::from_checkpoint(file, sparse, device)
}

fn check_kind(file: &Checkpoint, kind: Kind) -> Result<()> {
    let found = file.config().kind();
    if found == Some(kind) {
        return Ok(());
    }
    let value = found.map_or("none with a name", Kind::name).to_string();
    Err(Error::Config { what: "kind of the checkpoint's layer", value, expected: kind.name() })
}

impl<B: MemoryBackend> UltraMemV2<B> {
    /// The one layer of a checkpoint, for a model of one block. `sparse`: as in [`UltraMemConfig`](super::UltraMemConfig).
    ///
    /// # Errors
    /// As [`UltraMem::from_checkpoint`].
    pub fn from_checkpoint(file: &Checkpoint, sparse: bool, device: &B::Device) -> Result<Self> {
        check_kind(file, Kind::UltraMemV2)?;
        let layer = (file.config().clone(), file.weights()?);
        Ok(Self { memories: Memories::sharing(Placement::full(1), 1, &[layer], sparse, device)? })
    }
}

impl<B: Backend> From<UltraMemV2<B>> for Memories<B> {
    fn from(layers: UltraMemV2<B>) -> Self {
        layers.memories
    }
}

impl<B: Backend> Deref for UltraMemV2<B> {
    type Target = Memories<B>;

    fn deref(&self) -> &Memories<B> {
        &self.memories
    }
}

impl<B: MemoryBackend + AutodiffBackend> MemoryModel<B> for UltraMemV2<B> {
    fn memories(&mut self) -> Vec<&mut Memory<B>> {
        self.memories.layers_mut()
    }
}
