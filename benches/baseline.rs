//! The kernels that memory layers are compared with, each alone, at the widths of the small models of `ultramem bench versus`.
//!
//! `cargo bench -p ultramem-benches --bench baseline -- moe` runs a part: benchmarks are called `baseline/kernel/tokens`. Every
//! measurement ends with a synchronisation.

mod timing;

use criterion::{Criterion, criterion_group, criterion_main};
use cubecl::prelude::*;
use timing::time;
use ultramem::ElementType;
use ultramem::kernels::linear::ProjectStrategy;
use ultramem::kernels::{Tensor, random};
use ultramem_benches::Adapter;
use ultramem_versus::kernels::{Activation, Experts, attention, dense, moe, residual};
use ultramem_versus::{Design, Plan, Scale};

type Client = ComputeClient<Adapter>;

const TOKENS: [usize; 3] = [1, 16, 256];
/// Sequences whose caches fit one binding of any device.
const SEQUENCES: [usize; 2] = [1, 16];
const CACHED: usize = 2048;
const DTYPE: ElementType = ElementType::F32;

fn baseline(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("baseline");
    let client = Adapter::client(&Default::default());
    let sync = || timing::sync(&client);
    let hidden = Scale::small().hidden_size;
    let (ffn, mixture) = (Ffn::new(&client), Mixture::new(&client));
    for tokens in TOKENS {
        let input = tensor(&client, &[tokens, hidden], 1);
        time(&mut group, "dense", tokens, || ffn.run(&client, &input), sync);
        time(&mut group, "moe", tokens, || mixture.run(&client, &input), sync);
        let (update, weight) = (tensor(&client, &[tokens, hidden], 1), tensor(&client, &[hidden], 1));
        let run = || residual(&client, &input, &update, &weight, 1e-5).expect("residual runs");
        time(&mut group, "residual", tokens, run, sync);
    }
    for sequences in SEQUENCES {
        let heads = Scale::small().attention_heads;
        let projected = tensor(&client, &[sequences, 3 * hidden], 1);
        let cache = || tensor(&client, &[sequences, heads, CACHED, hidden / heads], 1);
        let (keys, values) = (cache(), cache());
        let run = || attention(&client, &projected, &keys, &values).expect("attention runs");
        time(&mut group, "attention", sequences, run, sync);
    }
    group.finish();
}

/// The FFN of one block of the dense model.
struct Ffn {
    up: Tensor<Adapter>,
    down: Tensor<Adapter>,
}

impl Ffn {
    fn new(client: &Client) -> Self {
        let Plan { scale: Scale { hidden_size, .. }, inner, .. } = plan(Design::Dense);
        let (up, down) = ([hidden_size, inner], [inner, hidden_size]);
        Self { up: tensor(client, &up, hidden_size), down: tensor(client, &down, inner) }
    }

    fn run(&self, client: &Client, input: &Tensor<Adapter>) -> Tensor<Adapter> {
        let strategy = ProjectStrategy::choose(client, input.shape()[0], DTYPE.storage());
        dense(client, input, &self.up, &self.down, Activation::Gelu, strategy).expect("dense runs")
    }
}

/// The experts of one block of the mixture.
struct Mixture {
    router: Tensor<Adapter>,
    up: Tensor<Adapter>,
    down: Tensor<Adapter>,
    top_k: usize,
}

impl Mixture {
    fn new(client: &Client) -> Self {
        let Plan { scale: Scale { hidden_size, .. }, experts, expert_inner, top_k, .. } = plan(Design::Moe);
        let (up, down) = ([experts, hidden_size, expert_inner], [experts, expert_inner, hidden_size]);
        Self {
            router: tensor(client, &[hidden_size, experts], hidden_size),
            up: tensor(client, &up, hidden_size),
            down: tensor(client, &down, expert_inner),
            top_k,
        }
    }

    fn run(&self, client: &Client, input: &Tensor<Adapter>) -> Tensor<Adapter> {
        let (router, up, down) = (&self.router, &self.up, &self.down);
        let experts = Experts { router, up, down, activation: Activation::Gelu, top_k: self.top_k };
        moe(client, input, &experts).expect("moe runs").output
    }
}

fn plan(design: Design) -> Plan {
    Plan::new(design, &Scale::small()).expect("the small budget can be spent")
}

/// Random numbers, the same ones every time: inputs with `depth` 1, weights that a sum of `depth` terms is taken with.
fn tensor(client: &Client, shape: &[usize], depth: usize) -> Tensor<Adapter> {
    let (scale, seed) = ((3.0 / depth as f32).sqrt(), shape.iter().sum::<usize>() as u32);
    random(client, "tensor", shape, DTYPE, scale, seed).expect("the tensor fits the device")
}

criterion_group! { name = benches; config = timing::criterion(); targets = baseline }
criterion_main!(benches);
