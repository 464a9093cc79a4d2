//! The shapes at which layers are compared, with random weights and inputs of the paper's initialisation.

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use ultramem::{Dimensions, HostTensor, MemoryConfig, Result, Weight, Weights};

/// A layer and a number of tokens to put through it.
#[derive(Debug, Clone)]
pub struct Case {
    /// How reports call it.
    pub name: &'static str,
    /// Rows of the input.
    pub tokens: usize,
    /// The layer's dimensions.
    pub dims: Dimensions,
}

impl Case {
    /// The shapes that a layer of ours must run four times as fast as the composition.
    pub fn all() -> [Self; 2] {
        let small = Dimensions::default();
        let large =
            Dimensions { hidden_size: 768, side_keys: 512, key_dim: 96, value_dim: 192, top_m: 32, ..small.clone() };
        [Self { name: "small", tokens: 256, dims: small }, Self { name: "large", tokens: 64, dims: large }]
    }

    /// The shape of that name, if there is one.
    pub fn named(name: &str) -> Option<Self> {
        Self::all().into_iter().find(|shape| shape.name == name)
    }

    /// The checked configuration, weights and an input `[tokens, hidden_size]`; always the same ones.
    ///
    /// # Errors
    /// What [`MemoryConfig::new`] finds wrong with the dimensions.
    pub fn random(&self) -> Result<(MemoryConfig, Weights<'static>, Vec<f32>)> {
        let config = MemoryConfig::new(self.dims.clone())?;
        let mut rng = StdRng::seed_from_u64(1);
        let weights = random_weights(&config, &mut rng)?;
        let input = uniform(self.tokens * config.hidden_size, 1.0, &mut rng);
        Ok((config, weights, input))
    }
}

fn random_weights(config: &MemoryConfig, rng: &mut StdRng) -> Result<Weights<'static>> {
    let (heads, n, d, r) = (config.heads, config.side_keys, config.key_dim, config.tucker_rank);
    let key_std = (d as f32).powf(-0.5);
    let pooled = config.pooled_dim();
    let mut shuffle: Vec<u32> = (0..config.slots() as u32).collect();
    shuffle.shuffle(rng);
    // The leading singular vectors of a core of equal numbers; those of U(0, 1) cores lie close to them.
    let leading = vec![(r as f32).powf(-0.5); heads * r];
    let norm = HostTensor::from_f32([d], &vec![(d as f32).powf(-0.33); d])?;
    let cores: Vec<f32> = (0..config.cores * heads * r * r).map(|_| rng.random()).collect();
    let weights =
        Weights { core_u: leading.clone(), core_v: leading, shuffle_index: Some(shuffle), ..Weights::default() };
    Ok(weights
        .with(Weight::QueryProj, random_tensor([2 * d, config.hidden_size], key_std, rng)?)
        .with(Weight::QueryNorm, norm.clone())
        .with(Weight::Keys, random_tensor([heads, 2, n, d, r], key_std, rng)?)
        .with(Weight::KeysNorm, norm)
        .with(Weight::Cores, HostTensor::from_f32([config.cores, heads, r, r], &cores)?)
        .with(Weight::Values, random_tensor([config.rows(), config.value_dim], 0.02, rng)?)
        .with(Weight::ValuesProj, random_tensor([config.hidden_size, pooled], (pooled as f32).powf(-0.5), rng)?))
}

fn random_tensor<const D: usize>(shape: [usize; D], std: f32, rng: &mut StdRng) -> Result<HostTensor<'static>> {
    HostTensor::from_f32(shape, &uniform(shape.iter().product(), std, rng))
}

/// Numbers of mean 0 and standard deviation `std`, evenly spread.
fn uniform(count: usize, std: f32, rng: &mut StdRng) -> Vec<f32> {
    let limit = 3f32.sqrt() * std;
    (0..count).map(|_| rng.random_range(-limit..limit)).collect()
}
