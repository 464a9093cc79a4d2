//! Each stage of a layer of the 1B model's sizes on the processor, 64 tokens, f32; pooling beside a copy of as many bytes.

#![allow(missing_docs, reason = "criterion makes functions of its own")]

use std::borrow::Cow;
use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use rayon::prelude::*;
use ultramem_cpu::stages::{combine, expand, query, score};
use ultramem_cpu::{Layer, Linear, Numbers, Place, Result, Shape, Weights};
use ultramem_kernels::Norm;

const TOKENS: usize = 64;

fn shape() -> Shape {
    let norm = Some((Norm::Rms, 1e-5));
    Shape {
        hidden_size: 768,
        heads: 2,
        query_pairs: 1,
        heads_per_pair: 2,
        side_keys: 1616,
        key_dim: 192,
        tucker_rank: 2,
        top_m: 80,
        cores: 2,
        tucker: true,
        query_norm: norm,
        keys_norm: norm,
        value_dim: 384,
        pre_dim: 0,
        activation: None,
        rows: 1616 * 1616 / 4,
        table_rows: 1616 * 1616 / 4,
        offset: 0,
        pooled_blocks: 4,
    }
}

/// `count` numbers in [-1, 1) that look like chance, the same ones every time.
fn numbers(count: usize) -> Vec<f32> {
    let stirred = |at: u32| {
        let x = (at ^ at >> 16).wrapping_mul(0x7feb_352d);
        let x = (x ^ x >> 15).wrapping_mul(0x846c_a68b);
        x ^ x >> 16
    };
    (0..count as u32).into_par_iter().map(|at| (stirred(at) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

fn weights(shape: &Shape) -> Weights<'static> {
    let vector = |count: usize| Cow::Owned(numbers(count));
    let slots = shape.side_keys * shape.side_keys;
    Weights {
        query: Linear::new(vector(shape.query_width() * shape.hidden_size), None),
        query_norm: vector(shape.key_dim),
        keys: Numbers::F32(vector(shape.all_keys() * shape.key_dim * shape.tucker_rank)),
        keys_norm: vector(shape.key_dim),
        cores: vector(shape.cores * shape.heads * shape.tucker_rank * shape.tucker_rank),
        core_u: vector(shape.heads * shape.tucker_rank),
        core_v: vector(shape.heads * shape.tucker_rank),
        // An odd factor and a remainder make a permutation where the two share no divisor.
        shuffle: Some((0..slots as u64).map(|slot| (slot * 1_000_003 % slots as u64) as u32).collect()),
        values: Numbers::F32(vector(shape.table_rows * shape.value_dim)),
        pre_values: None,
        pre_projection: None,
        gate: None,
        projection: Some(Linear::new(vector(shape.hidden_size * shape.pooled_dim()), None)),
        output_gate: None,
    }
}

fn stages(bench: &mut Criterion) {
    measure(bench).expect("the sizes fit each other");
}

fn measure(bench: &mut Criterion) -> Result<()> {
    let shape = shape();
    let layer = Layer::new(shape.clone(), weights(&shape))?.prepared();
    let input = numbers(TOKENS * shape.hidden_size);
    let queries = query::normalised(&layer, query::forward(&layer, &input)?)?;
    let kept = score::forward(&layer, &queries)?;
    let chosen = combine::forward(&layer, &kept)?;
    let places = expand::places(&layer, &chosen.slots)?;
    bench.bench_function("query", |it| {
        it.iter(|| query::forward(&layer, &input).and_then(|queries| query::normalised(&layer, queries)))
    });
    bench.bench_function("score", |it| it.iter(|| score::forward(&layer, &queries)));
    bench.bench_function("combine", |it| it.iter(|| combine::forward(&layer, &kept)));
    bench.bench_function("places", |it| it.iter(|| expand::places(&layer, &chosen.slots)));
    // Other rows each time: of 250 MB, which no cache holds.
    let others: Vec<Vec<Place>> = (0..16).map(|turn| moved(&places, turn * 40_503, shape.table_rows)).collect();
    let mut turn = 0;
    bench.bench_function("pool", |it| {
        it.iter(|| {
            turn = (turn + 1) % others.len();
            expand::pool(&layer, &others[turn], &chosen.scores)
        })
    });
    let table = numbers(shape.table_rows * shape.value_dim);
    let bytes = places.len() * shape.value_dim;
    let mut out = vec![0.0; bytes];
    // Another part of the table each time, as pooling finds its rows in no cache.
    let mut first = 0;
    bench.bench_function("copy of as many bytes as pool reads", |it| {
        it.iter(|| {
            first = (first + bytes) % (table.len() - bytes);
            let pieces = out.par_chunks_mut(1 << 16).zip(table[first..][..bytes].par_chunks(1 << 16));
            pieces.for_each(|(out, table)| out.copy_from_slice(table));
            black_box(&out);
        });
    });
    bench.bench_function("expand", |it| it.iter(|| expand::forward(&layer, &input, &places, &chosen.scores)));
    bench.bench_function("forward", |it| it.iter(|| layer.forward(&input)));
    Ok(())
}

/// The same places, so many rows on.
fn moved(places: &[Place], rows: usize, of: usize) -> Vec<Place> {
    let moved = |place: &Place| Place { row: ((place.row as usize + rows) % of) as u32, ..*place };
    places.iter().map(moved).collect()
}

criterion_group! {
    name = processor;
    config = Criterion::default().measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_millis(300)).sample_size(30);
    targets = stages
}
criterion_main!(processor);
