//! What holds on backends of every element type.

use burn::{
    backend::Autodiff,
    module::Module,
    record::{BinBytesRecorder, FullPrecisionSettings, Recorder},
};
use ultramem::{
    Kind, Weight, Weights,
    burn::{Memory, MemoryBackend, Trainer, TrainerConfig},
    reference,
};

use super::common::{random_input, relative_l2, small};
use super::modules::{field, gradients_by_field, numbers, rounded};
use super::{KINDS, One, memory, step, tensor, weights_of};

/// Output and gradients of weights and inputs that are rounded by `round` first.
pub fn hold_gradients<B: MemoryBackend>(round: fn(&[f32]) -> Vec<f32>, tolerance: f64) {
    for config in KINDS.map(small) {
        let weights = rounded(&Weights::random(&config, 3), round);
        let memory = Memory::<Autodiff<B>>::from_weights(config.clone(), &weights, false, &Default::default()).unwrap();
        let (input, grad_output) = (round(&random_input(&config, 7, 4)), round(&random_input(&config, 7, 5)));
        let x = tensor::<Autodiff<B>>(&input, config.hidden_size).require_grad();
        let output = memory.forward(x.clone());
        let forward = reference::forward(&config, &weights, &input).unwrap();
        assert!(relative_l2(&numbers(output.clone()), &forward.output) < tolerance, "{:?}", config.kind());
        let gradients = (output * tensor(&grad_output, config.hidden_size)).sum().backward();
        let expected = reference::backward(&config, &weights, &input, &forward.slots, &grad_output).unwrap();
        let mut found = gradients_by_field(&memory, &gradients);
        found.insert("input".into(), numbers(x.grad(&gradients).unwrap()));
        let learnt = Weight::ALL.into_iter().filter(|weight| weight.learns(&config));
        let mut all: Vec<_> = learnt.map(|weight| (field(weight), expected.dense(&config, weight))).collect();
        all.push(("input".to_string(), expected.input.clone()));
        assert_eq!(found.len(), all.len(), "{:?}", found.keys());
        for (name, expected) in all {
            let off = relative_l2(&found[&name], &expected);
            assert!(off < tolerance, "{:?} {name}: {off}", config.kind());
        }
    }
}

/// A trainer that was saved, and the layer with it.
pub fn trainer_goes_on_with_the_same_bits<B: MemoryBackend>() {
    for (config, sparse) in
        [(small(Kind::UltraMem), true), (small(Kind::UltraMem), false), (small(Kind::ProductKey), true)]
    {
        let new = || Trainer::<Autodiff<B>, One<Autodiff<B>>>::new(TrainerConfig::new(10));
        let mut trainer = new();
        let mut model = One { memory: memory(&config, 11, sparse).0 };
        for seed in 0..2 {
            model = step::<B>(&mut trainer, model, seed);
        }
        let recorder = BinBytesRecorder::<FullPrecisionSettings>::default();
        let state = Recorder::<Autodiff<B>>::record(&recorder, trainer.to_record(), ()).unwrap();
        let weights = Recorder::<Autodiff<B>>::record(&recorder, model.clone().into_record(), ()).unwrap();
        for seed in 2..4 {
            model = step::<B>(&mut trainer, model, seed);
        }
        let device = Default::default();
        let mut again = One { memory: memory(&config, 12, sparse).0 }
            .load_record(Recorder::<Autodiff<B>>::load(&recorder, weights, &device).unwrap());
        let state = Recorder::<Autodiff<B>>::load(&recorder, state, &device).unwrap();
        let mut trainer = new().load_record(state).unwrap();
        assert_eq!(trainer.steps(), 2);
        for seed in 2..4 {
            again = step::<B>(&mut trainer, again, seed);
        }
        let same = weights_of(&again.memory) == weights_of(&model.memory);
        assert!(same, "{:?}, sparse {sparse}", config.kind());
    }
}
