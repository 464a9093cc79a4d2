//! `burn-train`'s learner trains a model with a sparse table, stops, resumes from its checkpoint, and finds the same bits.

use burn::{module::Module, tensor::backend::Backend};
use ultramem::{Weight, Weights};
use ultramem_learner::{EPOCHS, Model, Training, train};

fn weights<B: ultramem::burn::MemoryBackend>(model: &Model<B>) -> Weights<'static> {
    model.memory().weights().unwrap()
}

#[test]
fn a_learner_stops_and_resumes_with_the_same_bits() {
    let device = Default::default();
    let folder = tempfile::tempdir().unwrap();
    let (whole, broken) = (folder.path().join("whole"), folder.path().join("broken"));
    Training::seed(&device, 7);
    let start = Model::<Training>::new(&device).unwrap();
    // Burn draws a linear layer's weights when they are first asked for, in each clone anew.
    start.devices();
    let expected = weights(&train(start.clone(), &whole, EPOCHS, None).unwrap());
    assert!(weights(&start)[Weight::Values] != expected[Weight::Values], "the table learns, and a clone is a copy");
    let halfway = weights(&train(start.clone(), &broken, EPOCHS / 2, None).unwrap());
    assert!(halfway != expected);
    // A model of other weights: what it learned comes from the checkpoint.
    let other = Model::<Training>::new(&device).unwrap();
    let found = weights(&train(other, &broken, EPOCHS, Some(EPOCHS / 2)).unwrap());
    assert!(found == expected);
    // Its threads write metrics after it has returned: those of the first run are there by now.
    let loss = |epoch: usize| -> f64 {
        let log = std::fs::read_to_string(whole.join(format!("train/epoch-{epoch}/Loss.log"))).unwrap();
        let values: Vec<f64> = log.lines().filter_map(|line| line.split(',').next()?.parse().ok()).collect();
        values.iter().sum::<f64>() / values.len() as f64
    };
    assert!(loss(EPOCHS) < 0.8 * loss(1), "{} then {}", loss(1), loss(EPOCHS));
}
