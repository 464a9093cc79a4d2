//! Plans of devices that are nobody's here: planes of 64, no planes at all, 16 KiB of shared memory, 64 units a cube. Each launch is executed
//! and watched, on the offline device that reports so, and holds against the oracle.

use cubecl::Runtime;
use ultramem::{Dimensions, ElementType, Kind, MemoryConfig, MemoryLayer, Weights, reference};
use ultramem_offline::{Adapter, OfflineDevice, OfflineRuntime, Options};

fn layers() -> [Dimensions; 2] {
    let plain = Dimensions {
        hidden_size: 16,
        heads: 2,
        side_keys: 36,
        key_dim: 8,
        top_m: 5,
        value_dim: 12,
        ..Dimensions::default()
    };
    let memory_plus = Dimensions {
        capabilities: Kind::MemoryPlus.capabilities(),
        tucker_rank: 1,
        cores: 1,
        expansion: 1,
        ..plain.clone()
    };
    [plain, memory_plus]
}

fn assert_close(what: &str, found: impl Iterator<Item = f64>, expected: &[f64], bound: f64) {
    let error: f64 = found.zip(expected).map(|(f, e)| (f - e).powi(2)).sum();
    let norm: f64 = expected.iter().map(|e| e * e).sum();
    assert!(error.sqrt() <= bound * norm.sqrt(), "{what}: {} of {}", error.sqrt(), norm.sqrt());
}

fn hold(adapter: Adapter, dims: Dimensions, tokens: usize) {
    let what = format!("{adapter:?}, {:?}, {tokens} tokens", dims.capabilities.scores);
    let device = OfflineDevice::new(Options { adapter: Some(adapter), ..Options::default() });
    let client = OfflineRuntime::client(&device);
    let config = MemoryConfig::new(dims).unwrap();
    let weights = Weights::random(&config, 1);
    let layer = MemoryLayer::new(&client, config.clone(), &weights, ElementType::F32).unwrap();
    let numbers = |seed: usize| -> Vec<f32> {
        (0..tokens * config.hidden_size).map(|i| (((i + seed) * 7919) % 2003) as f32 / 1001.0 - 1.0).collect()
    };
    let (input, grad) = (numbers(0), numbers(1));
    let (on_device, grad_on_device) = (layer.upload(&input).unwrap(), layer.upload(&grad).unwrap());

    let found = layer.forward(&on_device).unwrap();
    let expected = reference::forward(&config, &weights, &input).unwrap();
    assert_eq!(layer.read_slots(&found.chosen).unwrap(), expected.slots, "{what}");
    let output = layer.read(&found.output).unwrap();
    assert_close(&format!("{what}: output"), output.iter().map(|&x| x.into()), &expected.output, 1e-5);

    let (_, saved) = layer.forward_saving(&on_device).unwrap();
    let found = layer.backward(&on_device, &saved, &grad_on_device).unwrap();
    let found = layer.read_gradients(&found).unwrap().named(&config).unwrap();
    let expected = reference::backward(&config, &weights, &input, &expected.slots, &grad).unwrap();
    for ((name, found), (_, expected)) in found.iter().zip(expected.named(&config).unwrap()) {
        let expected: Vec<f64> = expected.to_f32().iter().map(|&x| x.into()).collect();
        assert_close(&format!("{what}: {name}"), found.to_f32().iter().map(|&x| x.into()), &expected, 1e-4);
    }

    let reports = device.take_reports();
    assert!(!reports.is_empty());
    for launch in reports {
        let kernel = &launch.kernel;
        assert!(launch.executed && launch.faults.is_empty(), "{what}: {}: {:?}", kernel.name, launch.faults);
        let units: u32 = kernel.dim.iter().product();
        assert!(units <= adapter.units, "{what}: {} has {units} units", kernel.name);
        assert!(kernel.shared <= adapter.shared_bytes, "{what}: {} shares {} bytes", kernel.name, kernel.shared);
    }
}

#[test]
fn planes_of_64() {
    let adapter = Adapter { plane_size: 64, shared_bytes: 64 << 10, units: 1024 };
    layers().into_iter().for_each(|dims| hold(adapter, dims, 5));
}

#[test]
fn no_planes_and_what_a_browser_has_of_shared_memory() {
    let adapter = Adapter { plane_size: 0, shared_bytes: 16 << 10, units: 256 };
    layers().into_iter().for_each(|dims| hold(adapter, dims, 5));
    // A head's list of pairs and a side's scores are what takes room.
    hold(adapter, Dimensions { side_keys: 1024, top_m: 48, heads: 1, expansion: 4, ..layers()[0].clone() }, 2);
}

#[test]
fn few_units_and_narrow_planes() {
    let adapter = Adapter { plane_size: 4, shared_bytes: 16 << 10, units: 64 };
    layers().into_iter().for_each(|dims| hold(adapter, dims, 5));
}
