use cubecl::future::block_on;
use cubecl::prelude::*;
use cubecl::wgpu::{WgpuDevice, WgpuRuntime};
use std::time::Instant;
use ultramem::kernels::{combine::*, expand::*, query::*, score::*};
use ultramem::{ElementType, MemoryLayer};
use ultramem_benches::Case;
fn main() {
    for case in Case::all() {
        let (config, weights, input) = case.random().unwrap();
        let client = WgpuRuntime::client(&WgpuDevice::default());
        let layer = MemoryLayer::new(&client, config.clone(), &weights, ElementType::F32).unwrap();
        let input = layer.upload(&input).unwrap();
        let st = layer.strategies(case.tokens);
        let q = layer.query(&input, st.query).unwrap();
        let kept = layer.score(&q, st.score).unwrap();
        let chosen = layer.combine(&kept).unwrap();
        let out = layer.expand(&input, &chosen, st).unwrap();
        let lw = ultramem::LayerWeights::upload(&client, &config, &weights, ElementType::F32).unwrap();
        let wt = ultramem::kernels::transpose(&client, &lw.values_proj).unwrap();
        let memory = Memory { values: &lw.values.pages()[0], weight: &wt, shuffle: lw.shuffle.as_ref(), gate: None };
        let core = lw.core.as_ref().unwrap();
        let ps = PairScore::Tucker(&core.cores);
        let prepared = prepare_keys(
            &client,
            &lw.keys,
            &KeyFactors {
                norm: Some((config.norm, config.norm_eps, &lw.keys_norm)),
                vectors: Some((&core.u, &core.v)),
            },
        )
        .unwrap();
        let eb = expand_backward(&client, &chosen, &memory, &lw.values_proj, &out, st.query).unwrap();
        let cb = combine_backward(&client, &kept, config.side_keys, &ps, &chosen, &eb.scores).unwrap();
        let scored = Scored {
            query: &q,
            query_norm: &lw.query_norm,
            norm: config.norm,
            eps: config.norm_eps,
            keys: &lw.keys,
            keys_norm: Some(&lw.keys_norm),
            prepared: &prepared,
            slots: &chosen.slots,
        };
        let sb = score_backward(&client, &scored, &cb.sides).unwrap();
        let map = Map { weight: &lw.query_proj, grad: &sb.query };
        let runs: Vec<(&str, Box<dyn Fn()>)> = vec![
            (
                "query fwd",
                Box::new(|| {
                    drop(layer.query(&input, st.query).unwrap());
                }),
            ),
            (
                "expand fwd",
                Box::new(|| {
                    drop(layer.expand(&input, &chosen, st).unwrap());
                }),
            ),
            (
                "grad_pooled-like query(out,W_o)",
                Box::new(|| {
                    drop(query(&client, &out, &lw.values_proj, st.query).unwrap());
                }),
            ),
            (
                "pool",
                Box::new(|| {
                    drop(pool(&client, &chosen, &memory).unwrap());
                }),
            ),
            (
                "expand bwd",
                Box::new(|| {
                    drop(expand_backward(&client, &chosen, &memory, &lw.values_proj, &out, st.query).unwrap());
                }),
            ),
            (
                "combine bwd",
                Box::new(|| {
                    drop(combine_backward(&client, &kept, config.side_keys, &ps, &chosen, &eb.scores).unwrap());
                }),
            ),
            (
                "score bwd",
                Box::new(|| {
                    drop(score_backward(&client, &scored, &cb.sides).unwrap());
                }),
            ),
            (
                "query bwd",
                Box::new(|| {
                    drop(query_backward(&client, &input, &map, None, st.query).unwrap());
                }),
            ),
        ];
        for (name, run) in runs {
            run();
            block_on(client.sync()).unwrap();
            let mut t: Vec<f64> = (0..25)
                .map(|_| {
                    let s = Instant::now();
                    run();
                    block_on(client.sync()).unwrap();
                    s.elapsed().as_secs_f64() * 1e3
                })
                .collect();
            t.sort_by(f64::total_cmp);
            println!("{} {name}: {:.2} ms (least {:.2})", case.name, t[12], t[0]);
        }
    }
}
