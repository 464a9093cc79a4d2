//! The backward pass of a layer at a prefill: how many launches it makes, and what a row that every token chooses costs it.

use ultramem::kernels::optimiser::Rule;
use ultramem::{Dimensions, ElementType, MemoryConfig, Weights};
use ultramem_offline::profile::Rates;
use ultramem_offline::profile::passes::{Choices, Subject, hidden_states};
use ultramem_offline::trace::{Tracer, tracing_device};
use ultramem_offline::{Gpu, Target};

const TOKENS: usize = 4096;
/// Launches of a backward pass and of an update, at most.
const LAUNCHES: usize = 30;
const ADAM: Rule = Rule::Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, decoupled: true };

fn config() -> MemoryConfig {
    MemoryConfig::new(Dimensions::ultramem_v1_1b()).unwrap()
}

/// Counted as the device takes them down, without the zeros that an optimiser's state begins with.
#[test]
fn backward_and_update_make_few_launches() {
    let device = tracing_device(Gpu::H100, Target::Cuda);
    for dtype in [ElementType::F32, ElementType::F16, ElementType::BF16] {
        let training = Tracer::new(&device, &config(), dtype).unwrap().training(TOKENS, &[ADAM]).unwrap();
        let launches: Vec<_> = training.iter().filter(|it| it.stage != "state").collect();
        let entries: Vec<_> = launches.iter().map(|it| (it.stage, &it.launch.kernel.entry)).collect();
        assert!((20..=LAUNCHES).contains(&launches.len()), "{dtype}: {} launches: {entries:#?}", launches.len());
    }
}

/// A row that all tokens choose, and the two keys that name it, in every head: at most 1.3 times the usual backward pass.
#[test]
fn a_row_that_every_token_chooses_costs_no_tail() {
    let (config, rates) = (config(), Rates::of(Gpu::H100));
    let weights = Weights::random_without_tables(&config, 1);
    let input = hidden_states(config.hidden_size, TOKENS, 1);
    let (gpu, dtype) = (Gpu::H100, ElementType::BF16);
    let subject = Subject::new(&config, &weights, &input, dtype, (gpu, &rates));
    let predicted = |choices: &Choices| subject.backward(choices).unwrap().iter().map(|it| it.profile.predicted).sum();
    let usual = subject.choices().unwrap();
    let popular = usual.clone().choosing(config.side_keys as u32 * 700 + 300, config.heads, config.top_m);
    assert!(popular.popularity().most >= TOKENS * config.heads, "{:?}", popular.popularity());
    let (usual, popular): (f64, f64) = (predicted(&usual), predicted(&popular));
    assert!(popular <= 1.3 * usual && popular >= 0.9 * usual, "{popular} µs, usually {usual}");
}
