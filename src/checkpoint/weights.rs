//! A layer's weights from tensors that have the names of a checkpoint.

use super::{Integers, wrong};
use crate::weights::names::{CORE_U, CORE_V, SHARED, SHUFFLE, core_name};
use crate::{ElementType, HostTensor, MemoryConfig, PerWeight, Result, Weight, Weights};

/// Where tensors are found by the names that a file of one layer has.
pub(super) trait Lookup<'a> {
    /// Whether there is a tensor called `name`.
    fn has(&self, name: &str) -> bool;

    /// The tensor `name` of f32, f16 or bf16 numbers.
    fn floats(&self, name: &str) -> Result<HostTensor<'a>>;

    /// The tensor `name` of whole numbers.
    fn integers(&self, name: &str) -> Result<Integers>;
}

/// The weights of a layer of `config`, checked. The large ones borrow what `tensors` lends.
pub(super) fn read<'a>(config: &MemoryConfig, tensors: &impl Lookup<'a>) -> Result<Weights<'a>> {
    let mut weights = Weights { tensors: PerWeight::default(), ..Weights::default() };
    for weight in Weight::ALL.into_iter().filter(|weight| weight.is_in(config)) {
        let tensor = match weight {
            Weight::Cores => cores(config, tensors)?,
            _ => tensors.floats(&stored_name(config, weight, |name| tensors.has(name)))?,
        };
        weights.tensors[weight] = Some(tensor);
    }
    if config.tucker() {
        weights.core_u = shaped(tensors, CORE_U, &[1, config.heads, 1, config.tucker_rank])?;
        weights.core_v = shaped(tensors, CORE_V, &[1, config.heads, 1, config.tucker_rank])?;
    }
    if config.capabilities.shuffled {
        weights.shuffle_index = Some(shuffle(config, tensors)?);
    }
    weights.check(config)?;
    Ok(weights)
}

/// A table may be the layer's own or in a module that layers share, whatever its kind has.
pub(super) fn stored_name(config: &MemoryConfig, weight: Weight, has: impl Fn(&str) -> bool) -> String {
    let name = weight.name(config);
    let other = match name.strip_prefix(SHARED) {
        Some(own) => own.to_string(),
        None => format!("{SHARED}{name}"),
    };
    if weight.is_table() && !has(&name) && has(&other) { other } else { name }
}

/// `[cores, heads, tucker_rank, tucker_rank]`, from a tensor a core.
fn cores<'a>(config: &MemoryConfig, tensors: &impl Lookup<'a>) -> Result<HostTensor<'a>> {
    let shape = Weight::Cores.shape(config);
    let surplus = core_name(config.cores);
    if tensors.has(&surplus) {
        return Err(wrong(&surplus, format!("is one more than tucker_multihead {} calls for", config.cores)));
    }
    let of_core = |core| shaped(tensors, &core_name(core), &shape[1..]);
    let numbers = (0..config.cores).map(of_core).collect::<Result<Vec<_>>>()?.concat();
    HostTensor::new(shape, ElementType::F32, bytemuck::cast_slice(&numbers).to_vec())
}

fn shaped<'a>(tensors: &impl Lookup<'a>, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
    let tensor = tensors.floats(name)?;
    if tensor.shape() != shape {
        return Err(wrong(name, format!("has shape {:?}, expected {shape:?}", tensor.shape())));
    }
    Ok(tensor.to_f32())
}

fn shuffle<'a>(config: &MemoryConfig, tensors: &impl Lookup<'a>) -> Result<Vec<u32>> {
    let Integers { shape, numbers } = tensors.integers(SHUFFLE)?;
    let slots = config.slots();
    if shape != [slots] {
        return Err(wrong(SHUFFLE, format!("has shape {shape:?}, expected [{slots}]")));
    }
    let address = |(at, number): (usize, i64)| {
        u32::try_from(number)
            .map_err(|_| wrong(SHUFFLE, format!("entry {at} is {number}, expected 0 to {}", slots - 1)))
    };
    numbers.into_iter().enumerate().map(address).collect()
}
