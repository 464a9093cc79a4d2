//! `lm export`: the trained memory layer as a safetensors file, with hidden states of real text, and the outputs, slots, scores and
//! gradients that the oracle gives for them: what `ultramem check` holds a device against.

use std::{collections::BTreeMap, path::Path};

use burn::prelude::*;
use ultramem::{
    Checkpoint, HostTensor,
    burn::MemoryBackend,
    checkpoint::{FileTensor, Integers},
    reference,
};

use crate::{Result, data::Text, train};

/// Writes the layer of the run in `folder` to `output`, with the hidden states of `windows` windows of the validation text.
pub fn export<B: MemoryBackend>(folder: &Path, output: &Path, windows: usize) -> Result<()> {
    let device = Default::default();
    let (settings, model) = train::open::<B>(folder, &device)?;
    let Some(memory) = model.memory() else { return Err("the run has no memory layer".into()) };
    let context = settings.sizes.context;
    let text = Text::load()?;
    let batches = text.validation(windows, context, windows);
    let read: Vec<u8> = batches.iter().flat_map(|batch| &batch.rows).flat_map(|row| row[..context].to_vec()).collect();
    let bytes: Vec<i32> = read.iter().map(|&byte| i32::from(byte)).collect();
    let bytes = Tensor::<B, 2, Int>::from_data(TensorData::new(bytes, [read.len() / context, context]), &device);
    let input = model.memory_input(bytes).map(Tensor::into_data);
    let Some(input) = input.and_then(|data| data.into_vec::<f32>().ok()) else { return Err("no hidden states".into()) };
    let weights = memory.weights()?;
    let config = memory.config();
    let expected = reference::forward(config, &weights, &input)?;
    let (tokens, width, entries) = (read.len(), config.hidden_size, config.heads * config.top_m);
    let floats = |shape: Vec<usize>, numbers: &[f32]| -> Result<FileTensor<'static>> {
        Ok(FileTensor::Floats(HostTensor::from_f32(shape, numbers)?))
    };
    let narrow = |numbers: &[f64]| numbers.iter().map(|&x| x as f32).collect::<Vec<_>>();
    let slots = expected.slots.iter().map(|&slot| i64::from(slot)).collect();
    let tensors = [
        ("input", floats(vec![tokens, width], &input)?),
        ("expected.output", floats(vec![tokens, width], &narrow(&expected.output))?),
        ("expected.indices", FileTensor::Integers(Integers { shape: vec![tokens, entries], numbers: slots })),
        ("expected.scores", floats(vec![tokens, entries, config.cores], &narrow(&expected.scores))?),
    ];
    let metadata = BTreeMap::from([
        ("text".to_string(), String::from_utf8_lossy(&read).into_owned()),
        ("sequence_length".to_string(), context.to_string()),
    ]);
    Ok(Checkpoint::write(output, config, &weights, &tensors, &metadata)?)
}
