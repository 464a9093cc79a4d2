//! Where a model's memory layers read and add, in the notation "2:5/6:9", and what is carried between the two.

use std::str::FromStr;

use burn::{
    module::Module,
    tensor::{Tensor, backend::Backend},
};

use super::module::primitive;
use super::{Engine, Memory, MemoryBackend};
#[cfg(feature = "files")]
use crate::checkpoint::Model;
use crate::{Error, MemoryConfig, Result, Stream, Weights};

/// Where the layers of a model are. "2:5/6:9": one layer reads the normalised FFN input of block 2, and its output is added after
/// block 5; another reads in block 6 and adds after block 9. Blocks are counted from 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement(Vec<(usize, usize)>);

impl FromStr for Placement {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |problem: String| Error::Placement { text: text.into(), problem };
        let number = |part: &str| part.parse::<usize>().map_err(|_| wrong(format!("{part:?} is no block's number")));
        let skip = |part: &str| {
            let Some((reads, adds)) = part.split_once(':') else {
                return Err(wrong(format!("{part:?} is not of the form 2:5")));
            };
            let (reads, adds) = (number(reads)?, number(adds)?);
            if reads > adds {
                return Err(wrong(format!(
                    "a layer can't read in block {reads} and add after the earlier block {adds}"
                )));
            }
            Ok((reads, adds))
        };
        text.split('/').map(skip).collect::<Result<_>>().map(Self)
    }
}

impl Placement {
    /// A layer in each of `blocks` blocks, whose output is added after the same block: what UltraMemV2 calls "full".
    pub fn full(blocks: usize) -> Self {
        Self((0..blocks).map(|block| (block, block)).collect())
    }

    /// `text` in the notation, or "full" for a model of `blocks` blocks.
    ///
    /// # Errors
    /// [`Error::Placement`] for what is neither, or a block that the model does not have.
    pub fn parse(text: &str, blocks: usize) -> Result<Self> {
        if text == "full" { Ok(Self::full(blocks)) } else { text.parse::<Self>()?.within(blocks) }
    }

    /// How many layers are placed.
    pub fn layers(&self) -> usize {
        self.0.len()
    }

    /// The same placement, if a model of `blocks` blocks has all of them.
    ///
    /// # Errors
    /// [`Error::Placement`] with both numbers.
    pub fn within(self, blocks: usize) -> Result<Self> {
        match self.0.iter().find(|(_, adds)| *adds >= blocks) {
            Some((reads, adds)) => {
                let text = format!("{reads}:{adds}");
                Err(Error::Placement {
                    text,
                    problem: format!("the model has blocks 0 to {} alone", blocks.max(1) - 1),
                })
            }
            None => Ok(self),
        }
    }
}

/// The memory layers of a model, with their places. Where layers share tables, the first of them has them.
///
/// ```ignore
/// let mut carried = self.memories.carry();
/// for (at, block) in self.blocks.iter().enumerate() {
///     let read = block.ffn_norm.forward(hidden.clone());
///     carried.read(at, &read);
///     hidden = carried.add(at, hidden + block.ffn(read));
/// }
/// ```
#[derive(Module, Debug)]
pub struct Memories<B: Backend> {
    pub(super) layers: Vec<Memory<B>>,
    #[module(skip)]
    placement: Placement,
}

impl<B: MemoryBackend> Memories<B> {
    /// A layer of `make` for each place. `blocks`: how many blocks the model has.
    ///
    /// # Errors
    /// A block that the model does not have, or what `make` gives.
    pub fn new(placement: Placement, blocks: usize, make: impl FnMut() -> Result<Memory<B>>) -> Result<Self> {
        let placement = placement.within(blocks)?;
        let layers = std::iter::repeat_with(make).take(placement.layers()).collect::<Result<_>>()?;
        Ok(Self { layers, placement })
    }

    /// Layers of given configurations and weights, one for each place, which share the tables of the first. `sparse`: as in
    /// [`UltraMemConfig`](super::UltraMemConfig).
    ///
    /// # Errors
    /// Another number of layers than of places, a block that the model does not have, weights that do not fit, or layers whose tables have
    /// other shapes.
    pub fn sharing(
        placement: Placement,
        blocks: usize,
        layers: &[(MemoryConfig, Weights<'_>)],
        sparse: bool,
        device: &B::Device,
    ) -> Result<Self> {
        let placement = placement.within(blocks)?;
        if placement.layers() != layers.len() || layers.is_empty() {
            let problem = format!("{} places for {} layers", placement.layers(), layers.len());
            return Err(Error::Placement { text: format!("{:?}", placement.0), problem });
        }
        let mut made: Vec<Memory<B>> = Vec::new();
        for (config, weights) in layers {
            let layer = match made.first() {
                None => Memory::from_weights(config.clone(), weights, sparse, device)?,
                Some(owner) => Memory::sharing(config.clone(), weights, owner, device)?,
            };
            made.push(layer);
        }
        Ok(Self { layers: made, placement })
    }

    /// All memory layers of a model's checkpoint, where its settings place them; layers that share the first one's table share it here. `sparse`: as
    /// in [`UltraMemConfig`](super::UltraMemConfig).
    ///
    /// # Errors
    /// A model without memory layers, or whose settings do not say where they are; weights that do not fit.
    #[cfg(feature = "files")]
    pub fn from_model(model: &Model, sparse: bool, device: &B::Device) -> Result<Self> {
        let mut made: Vec<Memory<B>> = Vec::new();
        let mut places = Vec::new();
        for layer in model.layers() {
            let place = layer.place().ok_or_else(|| Error::Placement {
                text: layer.name().into(),
                problem: "the model's settings do not say in which block it is".into(),
            })?;
            let (config, weights) = (layer.config().clone(), model.weights(layer)?);
            let shared = made.first().filter(|_| model.table_of(layer) == Some(0));
            let memory = match shared {
                Some(owner) => Memory::sharing(config, &weights, owner, device)?,
                None => Memory::from_weights(config, &weights, sparse, device)?,
            };
            made.push(memory);
            places.push(place);
        }
        if made.is_empty() {
            let text = model.tensors().path().display().to_string();
            return Err(Error::Placement { text, problem: "the model has no memory layer".into() });
        }
        Ok(Self { layers: made, placement: Placement(places) })
    }

    /// The layer whose tables the layer at `place` reads: itself, or the first.
    pub fn owner(&self, place: usize) -> &Memory<B> {
        let layer = &self.layers[place];
        if layer.tables.is_some() { layer } else { &self.layers[0] }
    }

    /// The output of the layer at `place` for `input` `[.., hidden_size]`, whatever its place says.
    ///
    /// # Errors
    /// As [`Memory::try_forward`].
    pub fn try_forward<const D: usize>(&self, place: usize, input: Tensor<B, D>) -> Result<Tensor<B, D>> {
        self.layers[place].try_forward_with(self.owner(place), input)
    }

    /// The block where each layer reads and the one after which it adds.
    pub fn placement(&self) -> &[(usize, usize)] {
        &self.placement.0
    }

    /// The layers, in the order of their places.
    pub fn layers(&self) -> &[Memory<B>] {
        &self.layers
    }

    /// As [`layers`](Self::layers), for [`MemoryModel`](super::MemoryModel).
    pub fn layers_mut(&mut self) -> Vec<&mut Memory<B>> {
        self.layers.iter_mut().collect()
    }

    /// For one forward pass through the blocks.
    pub fn carry<const D: usize>(&self) -> Carried<'_, B, D> {
        Carried { memories: self, reads: self.layers.iter().map(|_| None).collect() }
    }
}

/// Outputs on their way from the block where they were read to the block after which they are added. On a device with streams (CUDA) a layer whose
/// output is added some blocks later runs beside these.
pub struct Carried<'a, B: MemoryBackend, const D: usize> {
    memories: &'a Memories<B>,
    reads: Vec<Option<Read<B, D>>>,
}

/// A layer's output on its way.
struct Read<B: MemoryBackend, const D: usize> {
    output: Option<Tensor<B, D>>,
    /// What the layer's stream still reads.
    _input: Tensor<B, D>,
    stream: Option<Stream>,
}

impl<B: MemoryBackend, const D: usize> Read<B, D> {
    /// `hidden` and the output: adding it waits for the layer's stream.
    fn add(mut self, hidden: Tensor<B, D>) -> Tensor<B, D> {
        match self.output.take() {
            Some(output) => hidden + output,
            None => hidden,
        }
    }
}

impl<B: MemoryBackend, const D: usize> Drop for Read<B, D> {
    /// An output that nobody adds: the stream is waited for all the same, before what it reads is free again.
    fn drop(&mut self) {
        if let Some((output, stream)) = self.output.take().zip(self.stream.take()) {
            B::Engine::join(&stream, &B::float_buffer(primitive(output)));
        }
    }
}

impl<B: MemoryBackend, const D: usize> Carried<'_, B, D> {
    /// Runs the layers that read in `block`, on its normalised FFN input.
    ///
    /// # Panics
    /// As [`Memory::forward`].
    pub fn read(&mut self, block: usize, input: &Tensor<B, D>) {
        let places = self.memories.placement.0.iter().enumerate();
        for (read, (place, (reads, adds))) in self.reads.iter_mut().zip(places) {
            if *reads == block {
                let stream = (adds > reads).then(|| Stream::of_thread(place));
                let (layer, owner) = (&self.memories.layers[place], self.memories.owner(place));
                let output = layer.try_forward_on(stream.clone(), owner, input.clone());
                let output = Some(output.unwrap_or_else(|error| panic!("memory layer: {error}")));
                *read = Some(Read { output, _input: input.clone(), stream });
            }
        }
    }

    /// `hidden` after `block`, and the outputs that are added there.
    pub fn add(&mut self, block: usize, hidden: Tensor<B, D>) -> Tensor<B, D> {
        let places = self.reads.iter_mut().zip(&self.memories.placement.0);
        let here = places.filter(|(_, (_, adds))| *adds == block);
        here.filter_map(|(read, _)| read.take()).fold(hidden, |hidden, read| read.add(hidden))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_notation() {
        let placement: Placement = "2:5/6:9".parse().unwrap();
        assert_eq!(placement, Placement(vec![(2, 5), (6, 9)]));
        assert!(placement.clone().within(10).is_ok());
        let error = placement.within(9).unwrap_err().to_string();
        assert_eq!(error, "memory placement \"6:9\": the model has blocks 0 to 8 alone");
    }

    #[test]
    fn what_is_no_placement() {
        for (text, problem) in [
            ("", "\"\" is not of the form 2:5"),
            ("2", "\"2\" is not of the form 2:5"),
            ("2:5/", "\"\" is not of the form 2:5"),
            ("2:5:6", "\"5:6\" is no block's number"),
            ("-1:5", "\"-1\" is no block's number"),
            ("5:2", "a layer can't read in block 5 and add after the earlier block 2"),
        ] {
            let error = text.parse::<Placement>().unwrap_err().to_string();
            assert_eq!(error, format!("memory placement {text:?}: {problem}"));
        }
    }
}
