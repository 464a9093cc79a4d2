//! What several tests share: where the golden files are, how results are compared, small layers.

// Each test is a crate of its own and uses a part of this.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

use rand::{Rng, SeedableRng, rngs::StdRng};
use ultramem::{Checkpoint, Dimensions, ElementType, Kind, MemoryConfig, PerWeight, SharedTable, Weight, Weights};

/// The golden file `name`, without its ending: in `$ULTRAMEM_FIXTURES` where tests run without their sources.
pub fn fixture(name: &str) -> PathBuf {
    packed().unwrap_or_else(|| source("tests/fixtures")).join(name).with_extension("safetensors")
}

/// The folder of a whole model.
pub fn model(name: &str) -> PathBuf {
    packed().unwrap_or_else(|| source("tests/fixtures")).join("models").join(name)
}

/// A folder of the repository, of which the crate that is tested may be any part.
fn source(folder: &str) -> PathBuf {
    let roots = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    roots.map(|root| root.join(folder)).find(|it| it.is_dir()).expect("a folder of the repository")
}

fn packed() -> Option<PathBuf> {
    std::env::var_os("ULTRAMEM_FIXTURES").map(PathBuf::from)
}

/// The layer trained on real text that the command carries.
pub fn trained_layer() -> PathBuf {
    packed().unwrap_or_else(|| source("cli/data")).join("kjv_layer.safetensors")
}

/// Opens every golden file that this library can run, the trained layer included.
pub fn golden_files() -> Vec<(String, Checkpoint)> {
    let names = [
        "ultramem_v1_tiny",
        "ultramem_v1_two_heads",
        "ultramem_v1_layernorm_single_core",
        "ultramem_v1_mid",
        "ultramem_v1_many_slots",
        "ultramem_v2_tiny",
        "ultramem_v2_glu",
        "memory_plus_tiny",
        "lingua_memory_plus",
        "lingua_peer",
    ];
    let mut paths: Vec<_> = names.into_iter().map(fixture).collect();
    paths.push(trained_layer());
    paths.iter().map(|path| (path.display().to_string(), Checkpoint::open(path).unwrap())).collect()
}

/// `‖found - expected‖ / ‖expected‖`. NaN if a number of either is NaN.
pub fn relative_l2<A: Copy + Into<f64>, B: Copy + Into<f64>>(found: &[A], expected: &[B]) -> f64 {
    assert_eq!(found.len(), expected.len(), "lengths");
    let pairs = || found.iter().map(|&x| x.into()).zip(expected.iter().map(|&x| x.into()));
    let difference: f64 = pairs().map(|(found, expected)| (found - expected) * (found - expected)).sum();
    let norm: f64 = pairs().map(|(_, expected)| expected * expected).sum();
    (difference / norm).sqrt()
}

/// A small layer of each kind, no two sizes of which are equal.
pub fn small(kind: Kind) -> MemoryConfig {
    let dims = Dimensions {
        capabilities: kind.capabilities(),
        hidden_size: 11,
        heads: 3,
        side_keys: 8,
        key_dim: 5,
        top_m: 4,
        value_dim: 6,
        ..Dimensions::default()
    };
    let additive = Dimensions { tucker_rank: 1, cores: 1, expansion: 1, ..dims.clone() };
    MemoryConfig::new(match kind {
        Kind::UltraMem => dims,
        // Its rows wrap around the table's end.
        Kind::UltraMemV2 => Dimensions { pre_dim: 7, shared: Some(SharedTable { rows: 41, offset: 33 }), ..dims },
        Kind::ProductKey | Kind::MemoryPlus | Kind::LinguaMemoryPlus => additive,
        Kind::Peer => Dimensions { pre_dim: 11, value_dim: 11, ..additive },
    })
    .unwrap()
}

/// Every kind of layer.
pub const KINDS: [Kind; 6] = Kind::ALL;

/// `[tokens, hidden_size]` uniform in -1 to 1.
pub fn random_input(config: &MemoryConfig, tokens: usize, seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..tokens * config.hidden_size).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// The same weights with every large tensor in another element type.
pub fn cast<'a>(weights: &'a Weights<'_>, dtype: ElementType) -> Weights<'a> {
    let cast = |weight: Weight| if weight == Weight::Cores { ElementType::F32 } else { dtype };
    let tensors = PerWeight::from_fn(|weight| weights.get(weight).map(|tensor| tensor.cast(cast(weight))));
    Weights { tensors, ..weights.clone() }
}
