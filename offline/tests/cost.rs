//! The model of cost against what launches were measured to move, stage by stage, and how many launches a layer makes.

use cubecl::Runtime;
use cubecl::future::block_on;
use ultramem::{Caches, Dimensions, ElementType, MemoryConfig, MemoryLayer, Strategies, Weights};
use ultramem_offline::trace::{Tracer, tracing_device};
use ultramem_offline::{Gpu, OfflineDevice, OfflineRuntime, Target};

/// A table of 1 MiB in f32, everything else far smaller.
fn dimensions() -> Dimensions {
    Dimensions { hidden_size: 64, side_keys: 128, key_dim: 16, top_m: 8, value_dim: 64, ..Dimensions::default() }
}

/// The norms' weights and the cores, which the model leaves out: 64 bytes each.
const LEFT_OUT: u64 = 128;

/// What each stage of a forward pass moves, with a cache of `cache` bytes.
fn measured(dtype: ElementType, tokens: usize, cache: u64) -> (Strategies, [u64; 4]) {
    let device = OfflineDevice::of(Gpu::H100);
    let client = OfflineRuntime::client(&device);
    let config = MemoryConfig::new(dimensions()).unwrap();
    let layer = MemoryLayer::new(&client, config.clone(), &Weights::random(&config, 3), dtype).unwrap();
    let numbers: Vec<f32> =
        (0..tokens * config.hidden_size).map(|i| ((i * 7919) % 2003) as f32 / 1001.0 - 1.0).collect();
    let (input, strategies) = (layer.upload(&numbers).unwrap(), layer.strategies(tokens));
    let moved = || {
        block_on(client.sync()).unwrap();
        device.take_reports().iter().map(|launch| launch.moved(cache)).sum::<u64>()
    };
    moved();
    let query = layer.query(&input, strategies.query).unwrap();
    let of_query = moved();
    let kept = layer.score(&query, strategies.score).unwrap();
    let of_score = moved();
    let chosen = layer.combine(&kept).unwrap();
    let of_combine = moved();
    layer.expand(&input, &chosen, strategies).unwrap();
    (strategies, [of_query, of_score, of_combine, moved()])
}

#[test]
fn no_stage_moves_more_than_the_model_says() {
    let config = MemoryConfig::new(dimensions()).unwrap();
    let (large, small) = (50 << 20, 256 << 10);
    for (dtype, tokens, cache) in [
        (ElementType::F32, 40, large),
        (ElementType::F32, 40, small),
        (ElementType::F32, 1, large),
        (ElementType::BF16, 96, large),
        (ElementType::BF16, 96, small),
        (ElementType::F16, 1, large),
    ] {
        let (strategies, measured) = measured(dtype, tokens, cache);
        let model = config.traffic(tokens, dtype, strategies, Caches { bytes: cache, tile: 8 });
        for ((stage, model), measured) in model.into_iter().zip(measured) {
            let about = format!("{stage}, {dtype}, {tokens} tokens, cache of {cache}: {measured} of {model} bytes");
            assert!(measured <= model + LEFT_OUT, "{about}");
            // Rows and keys that several tokens choose are moved once where a cache holds them; the model knows no input.
            assert!(2 * measured >= model, "{about}");
        }
    }
}

/// At the preset's dimensions: one a stage for a token or two and where one kernel pools and projects, one more where two do.
#[test]
fn a_layer_makes_few_launches() {
    let config = MemoryConfig::new(Dimensions::ultramem_v1_1b()).unwrap();
    let device = tracing_device(Gpu::H100, Target::Cuda);
    for dtype in [ElementType::F32, ElementType::F16, ElementType::BF16] {
        let tracer = Tracer::new(&device, &config, dtype).unwrap();
        for (tokens, most) in [(1, 4), (2, 4), (16, 5), (64, 5), (512, 5), (4096, 5)] {
            let launches = tracer.forward(tokens, None).unwrap();
            let entries: Vec<_> = launches.iter().map(|it| &it.launch.kernel.entry).collect();
            assert!((4..=most).contains(&launches.len()), "{dtype}, {tokens} tokens: {entries:?}");
        }
    }
}

/// One token's launches that read a weight or a table do so from many cubes.
#[test]
fn one_token_reaches_many_cubes() {
    let config = MemoryConfig::new(Dimensions::ultramem_v1_1b()).unwrap();
    let device = tracing_device(Gpu::H100, Target::Cuda);
    for dtype in [ElementType::F32, ElementType::F16, ElementType::BF16] {
        for traced in Tracer::new(&device, &config, dtype).unwrap().forward(1, None).unwrap() {
            let cubes: u32 = traced.launch.count.iter().product();
            assert!(cubes >= 24 || traced.stage == "combine", "{dtype}, {}: {cubes} cubes", traced.launch.kernel.entry);
        }
    }
}
