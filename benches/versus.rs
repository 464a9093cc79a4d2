//! One step of whole models of equal budgets, design by design: the steps of `ultramem bench versus` (every FFN and sparse layer) and
//! of `growth` and `decode` (attention over a cache as well), at the small scale.
//!
//! `cargo bench -p ultramem-benches --bench versus -- MoE` runs a part: benchmarks are called `versus/design/batch` and
//! `decode/design/batch`. Every measurement ends with a synchronisation.

mod timing;

use criterion::{Criterion, criterion_group, criterion_main};
use cubecl::Runtime;
use timing::time;
use ultramem::ElementType;
use ultramem_benches::Adapter;
use ultramem_versus::{Cache, Decoder, Design, Plan, Scale};

/// Sequences that make a step together, without attention and with.
const BATCHES: [usize; 2] = [1, 16];
const DECODED: usize = 8;
const CACHED: usize = 2048;
const DTYPE: ElementType = ElementType::F32;

/// One design's model at a time is on the device.
fn versus(criterion: &mut Criterion) {
    let (client, scale) = (Adapter::client(&Default::default()), Scale::small());
    let sync = || timing::sync(&client);
    for design in Design::ALL {
        let plan = Plan::new(design, &scale).expect("the small budget can be spent");
        let decoder = Decoder::new(&client, &plan, DTYPE).expect("the model fits the device");
        let mut group = criterion.benchmark_group("versus");
        for batch in BATCHES {
            let stream = decoder.stream(batch).expect("the stream fits the device");
            time(&mut group, design.name(), batch, || decoder.step(&stream, None).expect("a step runs"), sync);
        }
        group.finish();
        let mut group = criterion.benchmark_group("decode");
        let stream = decoder.stream(DECODED).expect("the stream fits the device");
        let cache = Cache::new(&client, &scale, DECODED, CACHED, DTYPE).expect("the cache fits the device");
        time(&mut group, design.name(), DECODED, || decoder.step(&stream, Some(&cache)).expect("a step runs"), sync);
        group.finish();
    }
}

criterion_group! { name = benches; config = timing::criterion(); targets = versus }
criterion_main!(benches);
