//! 64-bit addresses in the CUDA code: a table past 2³² elements, of which the host commits the pages that are touched.

#[path = "../../tests/common/large.rs"]
mod large;

use cubecl::Runtime;
use large::{WIDTH, hold};
use ultramem::kernels::optimiser::Rule;
use ultramem::{Dimensions, ElementType, MemoryConfig};
use ultramem_offline::trace::{Tracer, tracing_device};
use ultramem_offline::{Gpu, OfflineDevice, OfflineRuntime, Target};

#[test]
fn a_table_past_32_bits_of_elements_is_read_and_updated() {
    let device = OfflineDevice::of(Gpu::H100);
    let rows = (1 << 32) / WIDTH + 1000;
    hold(&OfflineRuntime::client(&device), rows, ElementType::BF16).unwrap();
    let reports = device.take_reports();
    assert!(reports.iter().all(|report| report.executed && report.faults.is_empty()));
    let table = (rows * WIDTH * 2) as u64;
    let on_table = reports.iter().filter(|report| report.lengths.contains(&table));
    let entries: Vec<_> = on_table.map(|report| report.kernel.entry.split("_kernel").next().unwrap()).collect();
    assert_eq!(entries, ["expand", "pool", "pool", "row_products", "sgd"]);
}

/// What an optimiser keeps is as large as the table, and no host holds it: its kernels are compiled for such a table, and not run.
#[test]
fn optimisers_of_a_table_past_32_bits_count_in_64() {
    let rules = [
        Rule::Sgd { momentum: 0.0 },
        Rule::Sgd { momentum: 0.9 },
        Rule::Adagrad { eps: 1e-8 },
        Rule::Adam { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.0, decoupled: true },
    ];
    let device = tracing_device(Gpu::H100, Target::Cuda);
    // 6704² slots over 4 blocks, 384 numbers each: 4.3 billion.
    for (side_keys, wide) in [(1616, false), (6704, true)] {
        let config = MemoryConfig::new(Dimensions { side_keys, ..Dimensions::ultramem_v1_1b() }).unwrap();
        let launches = Tracer::new(&device, &config, ElementType::BF16).unwrap().training(3, &rules).unwrap();
        let updates: Vec<_> = launches.iter().filter(|traced| traced.stage == "update").collect();
        assert_eq!(updates.len(), 5, "Adagrad makes two");
        for update in updates {
            let kernel = &update.launch.kernel;
            // Adagrad's accumulators are one number a row, and the gradients that it sums are those of three tokens.
            let on_table = wide && !kernel.entry.starts_with("accumulate");
            assert_eq!(kernel.source.contains("uint64 blockIdxGlobal"), on_table, "{}, {side_keys} keys", kernel.entry);
        }
    }
}
