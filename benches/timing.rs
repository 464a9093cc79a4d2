//! How the benchmarks measure.

use std::fmt::Display;
use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion};
use cubecl::future::block_on;
use cubecl::prelude::ComputeClient;
use ultramem_benches::Adapter;

/// Criterion's settings; `--sample-size`, `--warm-up-time` and `--measurement-time` replace them.
pub fn criterion() -> Criterion {
    Criterion::default().sample_size(20).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(3))
}

/// Measures `name` at `parameter` until the device has finished it.
pub fn time<T>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    parameter: impl Display,
    run: impl Fn() -> T,
    sync: impl Fn(),
) {
    group.bench_function(BenchmarkId::new(name, parameter), |bencher| {
        bencher.iter(|| {
            let result = black_box(run());
            sync();
            result
        });
    });
}

/// Waits until the device has run what it was given.
pub fn sync(client: &ComputeClient<Adapter>) {
    block_on(client.sync()).expect("the device ran what it was given");
}
