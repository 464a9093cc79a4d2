//! The weights to start training from (DESIGN §2, "Around the layer").

use std::borrow::Cow;

use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use rand_distr::{Distribution, StandardNormal};

use super::{HostTensor, Weight, Weights, tensor::count};
use crate::{Capabilities, ElementType, MemoryConfig, PerWeight, Queries, Spectrum};

impl Weights<'_> {
    /// Weights to start training from, in f32; the same `seed` gives the same weights.
    ///
    /// Values are N(0, 0.02), and so are pre-values; keys and `W_q` N(0, key_dim^-½), `W_o` N(0, columns^-½), `W_g`, `W_p` and the output
    /// gate N(0, hidden_size^-½), biases 0, norms the constant key_dim^-0.33 (key_dim^-0.4 where two heads share a query pair), cores U(0, 1),
    /// `shuffle_index` a random permutation, `u` and `v` the leading singular vectors of the summed core, signed so that `u` sums to a
    /// positive number.
    pub fn random(config: &MemoryConfig, seed: u64) -> Weights<'static> {
        Self::drawn(config, seed, |shape, rng| normal(shape, 0.02, rng))
    }

    /// [`random`](Self::random) around tables of zeros in half precision, which take no memory until they are touched: for whoever asks which
    /// rows are read and not what they hold.
    pub fn random_without_tables(config: &MemoryConfig, seed: u64) -> Weights<'static> {
        let zeros = |shape: &[usize]| Cow::Owned(vec![0; count(shape) * ElementType::F16.size()]);
        Self::drawn(config, seed, |shape, _| HostTensor {
            shape: shape.into(),
            dtype: ElementType::F16,
            bytes: zeros(shape),
        })
    }

    /// Random weights around the tables that `table` makes.
    fn drawn(
        config: &MemoryConfig,
        seed: u64,
        table: impl Fn(&[usize], &mut StdRng) -> HostTensor<'static>,
    ) -> Weights<'static> {
        let rng = &mut StdRng::seed_from_u64(seed);
        let Capabilities { queries, shuffled, .. } = config.capabilities;
        let width = |size: usize| (size as f32).powf(-0.5);
        let norm = (config.key_dim as f32).powf(if queries == Queries::PerTwoHeads { -0.4 } else { -0.33 });
        let mut draw = |weight: Weight| {
            if !weight.is_in(config) || weight == Weight::Cores {
                return None;
            }
            let shape = weight.shape(config);
            Some(match weight {
                Weight::QueryProj | Weight::Keys => normal(&shape, width(config.key_dim), rng),
                Weight::QueryNorm | Weight::KeysNorm => constant(&shape, norm),
                Weight::Values | Weight::PreValues => table(&shape, rng),
                Weight::ValuesProj => normal(&shape, width(config.pooled_dim()), rng),
                Weight::PreValuesProj | Weight::GateProj | Weight::OutputGate => {
                    normal(&shape, width(config.hidden_size), rng)
                }
                Weight::Cores | Weight::QueryBias | Weight::ValuesBias | Weight::GateBias | Weight::OutputGateBias => {
                    constant(&shape, 0.0)
                }
            })
        };
        let mut weights = Weights { tensors: PerWeight::from_fn(&mut draw), ..Weights::default() };
        if config.tucker() {
            weights.draw_cores(config, rng);
        }
        weights.shuffle_index = shuffled.then(|| permutation(config.slots(), rng));
        weights
    }

    /// Cores `[cores, heads, r, r]` and the singular vectors `u`, `v` `[heads, r]` of their sum.
    fn draw_cores(&mut self, config: &MemoryConfig, rng: &mut StdRng) {
        let (heads, rank) = (config.heads, config.tucker_rank);
        let cores: Vec<f32> = (0..config.cores * heads * rank * rank).map(|_| rng.random()).collect();
        // Numbers between 0 and 1 have leading vectors without a negative component.
        let positive = vec![1.0; heads * rank];
        (self.core_u, self.core_v) = Spectrum::of(config, &cores).leading((&positive, &positive));
        let (shape, bytes) = (Weight::Cores.shape(config), bytemuck::cast_slice(&cores).to_vec());
        self.tensors[Weight::Cores] = Some(HostTensor { shape, dtype: ElementType::F32, bytes: Cow::Owned(bytes) });
    }
}

/// A tensor of normal numbers around 0.
fn normal(shape: &[usize], deviation: f32, rng: &mut StdRng) -> HostTensor<'static> {
    let mut bytes = vec![0; count(shape) * size_of::<f32>()];
    for number in bytes.chunks_exact_mut(size_of::<f32>()) {
        let standard: f32 = StandardNormal.sample(rng);
        number.copy_from_slice(&(standard * deviation).to_le_bytes());
    }
    HostTensor { shape: shape.into(), dtype: ElementType::F32, bytes: Cow::Owned(bytes) }
}

fn constant(shape: &[usize], number: f32) -> HostTensor<'static> {
    let bytes = Cow::Owned(number.to_le_bytes().repeat(count(shape)));
    HostTensor { shape: shape.into(), dtype: ElementType::F32, bytes }
}

fn permutation(count: usize, rng: &mut StdRng) -> Vec<u32> {
    let mut places: Vec<u32> = (0..count).map(|place| place as u32).collect();
    places.shuffle(rng);
    places
}
