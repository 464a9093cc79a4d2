//! What is compared are designs, not efforts: a mixture of experts takes at most 1.5 times as much longer than its floor as a dense FFN with a
//! memory layer takes than theirs, by what the model of an H100 predicts of both.

use ultramem::{ElementType, StageCost, Weights};
use ultramem_offline::Gpu;
use ultramem_offline::profile::Rates;
use ultramem_offline::profile::passes::{Staged, Subject, Versus, hidden_states};
use ultramem_versus::{Design, Plan, Scale};

const GPU: Gpu = Gpu::H100;
const DTYPE: ElementType = ElementType::BF16;
/// How much further from its floor the mixture may be.
const FURTHER: f64 = 1.5;
/// From one token to a prefill.
const BATCHES: [usize; 7] = [1, 4, 16, 64, 256, 1024, 4096];

/// Microseconds that the parts of a step must take, one after the other: each the longer of its bytes at the bandwidth and its
/// operations at the rate of matrix units. Norms are left out: all designs have the same.
fn floor(plan: &Plan, batch: usize, rates: &Rates) -> f64 {
    // A product of 16 by 16 with 16 by 8, on each quarter of each multiprocessor.
    let products = f64::from(GPU.specification().multiprocessors) * 4.0 * rates.clock / rates.matrix_cycles;
    let operations = 2.0 * 16.0 * 16.0 * 8.0 * products * 1000.0;
    let part = |cost: StageCost| (cost.bytes as f64 / rates.memory / 1000.0).max(cost.flops as f64 / operations);
    plan.cost(batch, DTYPE, None).into_iter().filter(|(name, _)| *name != "norms").map(|(_, cost)| part(cost)).sum()
}

fn predicted(staged: &[Staged]) -> f64 {
    staged.iter().map(|it| it.profile.predicted).sum()
}

#[test]
fn a_mixture_is_about_as_near_to_its_floor_as_a_memory_layer() {
    let (rates, scale) = (Rates::of(GPU), Scale::block(768));
    let [experts, memory] = [Design::Moe, Design::UltraMem].map(|design| Plan::new(design, &scale).unwrap());
    let config = memory.memory.as_ref().unwrap();
    let weights = Weights::random_without_tables(config, 1);
    let mut further = Vec::new();
    for tokens in BATCHES {
        let versus = Versus { scale, tokens, cached: 1, dtype: DTYPE, gpu: GPU, rates: &rates };
        let input = hidden_states(scale.hidden_size, tokens, 1);
        let subject = Subject::new(config, &weights, &input, DTYPE, (GPU, &rates));
        let ours = predicted(&versus.ffn(&memory).unwrap()) + predicted(&subject.forward().unwrap());
        let theirs = predicted(&versus.ffn(&experts).unwrap());
        let over = [ours / floor(&memory, tokens, &rates), theirs / floor(&experts, tokens, &rates)];
        println!("{tokens} tokens: {ours:.1} µs, {:.2} floors; experts {theirs:.1} µs, {:.2} floors", over[0], over[1]);
        if over[1] > FURTHER * over[0] {
            further.push((tokens, over));
        }
    }
    assert!(further.is_empty(), "a mixture is further from its floor than {FURTHER} times a memory layer: {further:?}");
}
