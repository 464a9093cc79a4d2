//! `burn-train`'s learner trains a model with a sparse table, stops, resumes from its checkpoint, and finds the same bits.

#[path = "../src/main.rs"]
mod learner;

use burn::tensor::backend::Backend;
use ultramem::Weights;

use learner::{Model, Training, train};

fn weights<B: ultramem::burn::MemoryBackend>(model: &Model<B>) -> Weights<'static> {
    model.memory().layer(&Default::default()).unwrap().read_weights().unwrap()
}

#[test]
fn a_learner_stops_and_resumes_with_the_same_bits() {
    let device = Default::default();
    let folder = tempfile::tempdir().unwrap();
    let (whole, broken) = (folder.path().join("whole"), folder.path().join("broken"));
    Training::seed(&device, 7);
    let start = Model::<Training>::new(&device).unwrap();
    let expected = weights(&train(start.clone(), &whole, 4, None).unwrap());
    assert!(weights(&start).values != expected.values, "the table learns, and a clone is a copy");
    let halfway = weights(&train(start.clone(), &broken, 2, None).unwrap());
    assert!(halfway != expected);
    // A model of other weights: what it learned comes from the checkpoint.
    let other = Model::<Training>::new(&device).unwrap();
    let found = weights(&train(other, &broken, 4, Some(2)).unwrap());
    assert!(found == expected);
    let loss = |epoch: usize, part: &str| -> f64 {
        let log = std::fs::read_to_string(broken.join(format!("{part}/epoch-{epoch}/Loss.log"))).unwrap();
        let values: Vec<f64> = log.lines().filter_map(|line| line.split(',').next()?.parse().ok()).collect();
        values.iter().sum::<f64>() / values.len() as f64
    };
    assert!(loss(4, "valid") < loss(1, "valid") && loss(4, "train") < loss(1, "train"));
}
