//! What a layer of a real size is predicted to take on an H100, at most: the bars that it has reached. `docs/performance.md` tells what is not reached yet.

use ultramem::kernels::optimiser::Rule;
use ultramem::{Dimensions, ElementType, MemoryConfig, Weights};
use ultramem_offline::Gpu;
use ultramem_offline::profile::Rates;
use ultramem_offline::profile::passes::{Staged, Subject, hidden_states};

/// What a pass costs: its predicted time on the device in µs, its launches, and tasks of the host.
#[derive(Debug)]
struct Cost {
    time: f64,
    launches: usize,
    tasks: usize,
}

impl Cost {
    fn of(staged: &[Staged]) -> Self {
        Self {
            time: staged.iter().map(|it| it.profile.predicted).sum(),
            launches: staged.len(),
            tasks: staged.iter().map(|it| it.profile.tasks).sum(),
        }
    }
}

/// What `run` makes of a layer of `ultramem_v1_1b` in bf16.
fn with_layer<T>(tokens: usize, invariant: bool, run: impl FnOnce(&Subject<'_>) -> T) -> T {
    let (config, rates) = (MemoryConfig::new(Dimensions::ultramem_v1_1b()).unwrap(), Rates::of(Gpu::H100));
    let weights = Weights::random_without_tables(&config, 1);
    let input = hidden_states(config.hidden_size, tokens, 1);
    run(&Subject { invariant, ..Subject::new(&config, &weights, &input, ElementType::BF16, (Gpu::H100, &rates)) })
}

fn forward(tokens: usize, invariant: bool) -> Cost {
    with_layer(tokens, invariant, |subject| Cost::of(&subject.forward().unwrap()))
}

/// One token: four launches, an allocation for what lies between them, and one for the output.
#[test]
fn few_tokens_take_few_tasks_and_little_time() {
    let one = forward(1, false);
    assert!(one.launches <= 4 && one.tasks <= 6 && one.time <= 54.0, "1 token: {one:?}");
    let few = forward(16, false);
    assert!(few.launches <= 5 && few.tasks <= 8 && few.time <= 55.0, "16 tokens: {few:?}");
    let some = forward(64, false);
    assert!(some.launches <= 5 && some.tasks <= 8 && some.time <= 60.0, "64 tokens: {some:?}");
}

/// The same bits in any batch cost less than half of the time at few tokens: sums in one piece leave much of the device without work.
#[test]
fn invariance_costs_little() {
    for tokens in [1, 64] {
        let (usual, invariant) = (forward(tokens, false), forward(tokens, true));
        assert!(invariant.time <= 1.5 * usual.time, "{tokens} tokens: {invariant:?}, usually {usual:?}");
    }
}

/// A step of training at 4,096 tokens: forward, backward and lazy Adam in 4.4 ms, of which forward is a quarter.
#[test]
fn a_step_of_training_takes_little_more_than_its_bytes() {
    let adam = Rule::Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, decoupled: true };
    let (forward, step) = with_layer(4096, false, |subject| {
        let choices = subject.choices().unwrap();
        let forward = Cost::of(&subject.forward().unwrap());
        let step = [subject.backward(&choices).unwrap(), subject.update(&choices, adam).unwrap()].concat();
        (forward, Cost::of(&step))
    });
    assert!(forward.time <= 560.0, "{forward:?}");
    assert!(forward.time + step.time <= 4400.0 && step.launches <= 30, "{forward:?}, then {step:?}");
}
