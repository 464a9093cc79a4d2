//! A whole forward pass and each of its stages, ours and the composition's, on the same device and inputs.
//!
//! `cargo bench -p ultramem-benches --bench layer -- small/forward` runs a part: benchmarks are called
//! `case/stage/implementation`. Every measurement ends with a synchronisation.

use std::hint::black_box;
use std::time::Duration;

use burn::backend::Wgpu;
use burn::backend::wgpu::{WgpuDevice, WgpuRuntime};
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use cubecl::Runtime;
use cubecl::future::block_on;
use ultramem::{ElementType, MemoryLayer};
use ultramem_benches::{Case, Composition};

fn layer(criterion: &mut Criterion) {
    for case in Case::all() {
        let mut group = criterion.benchmark_group(case.name);
        group
            .sample_size(20)
            .measurement_time(Duration::from_secs(3))
            .throughput(Throughput::Elements(case.tokens as u64));
        ours(&mut group, &case);
        composition::<Wgpu>(&mut group, &case, &WgpuDevice::default());
        group.finish();
    }
}

fn ours(group: &mut BenchmarkGroup<WallTime>, case: &Case) {
    let (config, weights, input) = case.random().expect("the case is valid");
    let client = WgpuRuntime::client(&WgpuDevice::default());
    let layer = MemoryLayer::new(&client, config, &weights, ElementType::F32).expect("the layer fits the device");
    let input = layer.upload(&input).expect("the input fits the device");
    let strategies = layer.strategies(case.tokens);
    let query = layer.query(&input, strategies.query).expect("query runs");
    let kept = layer.score(&query, strategies.score).expect("score runs");
    let chosen = layer.combine(&kept).expect("combine runs");
    let sync = || block_on(client.sync()).expect("the device ran what it was given");
    sync();
    time(group, "forward", "ultramem", || layer.forward(&input), sync);
    time(group, "query", "ultramem", || layer.query(&input, strategies.query), sync);
    time(group, "score", "ultramem", || layer.score(&query, strategies.score), sync);
    time(group, "combine", "ultramem", || layer.combine(&kept), sync);
    time(group, "expand", "ultramem", || layer.expand(&input, &chosen, strategies), sync);
}

fn composition<B: Backend>(group: &mut BenchmarkGroup<WallTime>, case: &Case, device: &B::Device) {
    let (config, weights, input) = case.random().expect("the case is valid");
    let input = Tensor::<B, 2>::from_data(TensorData::new(input, [case.tokens, config.hidden_size]), device);
    let layer = Composition::<B>::new(config, &weights, device);
    let query = layer.query(input.clone());
    let kept = layer.score(query.clone());
    let chosen = layer.combine(kept.clone());
    let sync = || B::sync(device).expect("the device ran what it was given");
    sync();
    time(group, "forward", "composition", || layer.forward(input.clone()), sync);
    time(group, "query", "composition", || layer.query(input.clone()), sync);
    time(group, "score", "composition", || layer.score(query.clone()), sync);
    time(group, "combine", "composition", || layer.combine(kept.clone()), sync);
    time(group, "expand", "composition", || layer.expand(chosen.clone()), sync);
}

/// Measures `stage` of `implementation` until the device has finished it.
fn time<T>(
    group: &mut BenchmarkGroup<WallTime>,
    stage: &str,
    implementation: &str,
    run: impl Fn() -> T,
    sync: impl Fn(),
) {
    group.bench_function(BenchmarkId::new(stage, implementation), |bencher| {
        bencher.iter(|| {
            let result = black_box(run());
            sync();
            result
        });
    });
}

criterion_group!(benches, layer);
criterion_main!(benches);
