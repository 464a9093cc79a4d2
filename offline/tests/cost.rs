//! The model of cost against what launches were measured to move, stage by stage, and how many launches a layer makes. What a
//! mixture of experts moves: the weights of the experts that it touches, once.

use cubecl::Runtime;
use cubecl::future::block_on;
use ultramem::kernels::baseline::{Activation, Experts, moe};
use ultramem::kernels::from_f32;
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

/// Tokens that all choose the first two of eight experts: the others' weights are not read, and theirs once where a cache holds
/// them, once for each tile of tokens where none does.
#[test]
fn a_mixture_reads_the_weights_of_the_experts_that_it_touches_once() {
    let (tokens, hidden, inner, count) = (40, 64, 96, 8);
    let device = OfflineDevice::of(Gpu::H100);
    let client = OfflineRuntime::client(&device);
    let numbers: Vec<f32> = (0..count * hidden * inner).map(|i| ((i * 7919) % 2003) as f32 / 1001.0 - 1.0).collect();
    let tensor = |shape: &[usize]| from_f32(&client, shape, &numbers[..shape.iter().product()]).unwrap();
    let (input, router) = (tensor(&[tokens, hidden]), from_f32(&client, &[hidden, count], &vec![0.0; hidden * count]));
    let (router, up, down) = (router.unwrap(), tensor(&[count, hidden, inner]), tensor(&[count, inner, hidden]));
    let experts = Experts { router: &router, up: &up, down: &down, activation: Activation::Gelu, top_k: 2 };
    moe(&client, &input, &experts).unwrap();
    block_on(client.sync()).unwrap();
    let launches = device.take_reports();
    let products: Vec<_> = launches.iter().filter(|it| it.kernel.entry.starts_with("grouped_product")).collect();
    assert_eq!(products.len(), 2);
    for launch in products {
        let weights = &launch.traffic[1].read;
        assert_eq!(weights.distinct_bytes, (2 * hidden * inner * 4) as u64, "{}", launch.kernel.entry);
        assert_eq!(weights.distinct_sectors * 32, weights.distinct_bytes, "{}", launch.kernel.entry);
        let tiles = (tokens as u64).div_ceil(8);
        assert_eq!(weights.sectors, tiles * weights.distinct_sectors, "{}", launch.kernel.entry);
    }
}
