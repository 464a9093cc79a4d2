//! A whole forward pass and each of its stages on the same device and inputs: ours and, with the feature `composition`, that of
//! stock Burn operations.
//!
//! `cargo bench -p ultramem-benches --bench layer -- small/forward` runs a part: benchmarks are called
//! `case/stage/implementation`. Every measurement ends with a synchronisation.

mod timing;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use cubecl::Runtime;
use timing::time;
use ultramem::{ElementType, MemoryLayer};
use ultramem_benches::{Adapter, Case};

fn layer(criterion: &mut Criterion) {
    for case in Case::all() {
        let mut group = criterion.benchmark_group(case.name);
        group.throughput(Throughput::Elements(case.tokens as u64));
        ours(&mut group, &case);
        #[cfg(feature = "composition")]
        stock::composition::<burn::backend::Wgpu>(&mut group, &case, &Default::default());
        group.finish();
    }
}

fn ours(group: &mut BenchmarkGroup<'_, WallTime>, case: &Case) {
    let (config, weights, input) = case.random().expect("the case is valid");
    let client = Adapter::client(&Default::default());
    let layer = MemoryLayer::new(&client, config, &weights, ElementType::F32).expect("the layer fits the device");
    let input = layer.upload(&input).expect("the input fits the device");
    let strategies = layer.strategies(case.tokens);
    let query = layer.query(&input, strategies.query).expect("query runs");
    let kept = layer.score(&query, strategies.score).expect("score runs");
    let chosen = layer.combine(&kept).expect("combine runs");
    let sync = || timing::sync(&client);
    sync();
    time(group, "forward", OURS, || layer.forward(&input).expect("forward runs"), sync);
    time(group, "query", OURS, || layer.query(&input, strategies.query).expect("query runs"), sync);
    time(group, "score", OURS, || layer.score(&query, strategies.score).expect("score runs"), sync);
    time(group, "combine", OURS, || layer.combine(&kept).expect("combine runs"), sync);
    time(group, "expand", OURS, || layer.expand(&input, &chosen, strategies).expect("expand runs"), sync);
}

const OURS: &str = "ultramem";

#[cfg(feature = "composition")]
mod stock {
    use burn::tensor::backend::Backend;
    use burn::tensor::{Tensor, TensorData};
    use ultramem_benches::Composition;

    use super::*;

    pub fn composition<B: Backend>(group: &mut BenchmarkGroup<'_, WallTime>, case: &Case, device: &B::Device) {
        let (config, weights, input) = case.random().expect("the case is valid");
        let input = Tensor::<B, 2>::from_data(TensorData::new(input, [case.tokens, config.hidden_size]), device);
        let layer = Composition::<B>::new(config, &weights, device);
        let query = layer.query(input.clone());
        let kept = layer.score(query.clone());
        let chosen = layer.combine(kept.clone());
        let sync = || B::sync(device).expect("the device ran what it was given");
        sync();
        time(group, "forward", STOCK, || layer.forward(input.clone()), sync);
        time(group, "query", STOCK, || layer.query(input.clone()), sync);
        time(group, "score", STOCK, || layer.score(query.clone()), sync);
        time(group, "combine", STOCK, || layer.combine(kept.clone()), sync);
        time(group, "expand", STOCK, || layer.expand(chosen.clone()), sync);
    }

    const STOCK: &str = "composition";
}

criterion_group! { name = benches; config = timing::criterion(); targets = layer }
criterion_main!(benches);
