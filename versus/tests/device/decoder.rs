//! A decoding step of every design: every launch of a whole model in turn.

use ultramem::ElementType;
use ultramem_versus::{Cache, Decoder, Design, Plan, Scale};

use crate::device::{client, poison, read_f32};

/// Blocks of width 64, two of them with a memory layer.
fn scale() -> Scale {
    Scale {
        hidden_size: 64,
        attention_heads: 2,
        blocks: 3,
        memory_layers: 2,
        top_m: 8,
        activated: 250_000,
        sparse: 2_000_000,
    }
}

/// The same bits in two runs into poisoned memory, all of them finite, and another result with attention than without.
#[test]
fn every_design_takes_a_step() {
    let client = client();
    let cached = 9;
    for design in Design::ALL {
        let plan = Plan::new(design, &scale()).unwrap();
        let decoder = Decoder::new(&client, &plan, ElementType::F32).unwrap();
        assert_eq!(decoder.memory().is_some(), plan.memory.is_some(), "{design:?}");
        for batch in [1, 5] {
            let stream = decoder.stream(batch).unwrap();
            let cache = Cache::new(&client, &scale(), batch, cached, ElementType::F32).unwrap();
            let step = |cache| {
                poison(&client, 1 << 20);
                let output = read_f32(&client, &decoder.step(&stream, cache).unwrap());
                client.flush().unwrap();
                output
            };
            let (plain, attended) = (step(None), step(Some(&cache)));
            assert_eq!(plain.len(), batch * 64, "{plan}");
            assert!(plain.iter().chain(&attended).all(|x| x.is_finite()), "{plan}");
            assert_ne!(plain, attended, "{plan}");
            assert_eq!((plain, attended), (step(None), step(Some(&cache))), "{plan}");
        }
    }
}
