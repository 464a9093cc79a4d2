//! The layer on the offline H100 against the oracle: each launch executed and watched.

use cubecl::Runtime;
use ultramem::{Dimensions, ElementType, MemoryConfig, MemoryLayer, Weights, reference};
use ultramem_offline::{Gpu, OfflineDevice, OfflineRuntime};

#[test]
fn a_layer_agrees_with_the_oracle() {
    let device = OfflineDevice::of(Gpu::H100);
    let client = OfflineRuntime::client(&device);
    let dims =
        Dimensions { hidden_size: 16, side_keys: 16, key_dim: 8, top_m: 4, value_dim: 16, ..Dimensions::default() };
    let config = MemoryConfig::new(dims).unwrap();
    let weights = Weights::random(&config, 1);
    let layer = MemoryLayer::new(&client, config.clone(), &weights, ElementType::F32).unwrap();
    for tokens in [1, 5] {
        let input: Vec<f32> = (0..tokens * 16).map(|i| ((i * 37 % 19) as f32 - 9.0) / 9.0).collect();
        let found = layer.forward(&layer.upload(&input).unwrap()).unwrap();
        let output = layer.read(&found.output).unwrap();
        let expected = reference::forward(&config, &weights, &input).unwrap();
        assert_eq!(layer.read_slots(&found.chosen).unwrap(), expected.slots);
        let error: f64 = output.iter().zip(&expected.output).map(|(&f, e)| (f64::from(f) - e).powi(2)).sum();
        let norm: f64 = expected.output.iter().map(|e| e * e).sum();
        assert!(error <= 1e-10 * norm, "{error} of {norm}");
    }
    let reports = device.take_reports();
    assert!(!reports.is_empty() && reports.iter().all(|it| it.executed && it.faults.is_empty()));
}
