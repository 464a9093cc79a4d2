//! 64-bit addresses in the CUDA code: a table past 2³² elements, of which the host commits the pages that are touched.

#[path = "../../tests/common/large.rs"]
mod large;

use cubecl::Runtime;
use large::{WIDTH, hold};
use ultramem::ElementType;
use ultramem_offline::{Gpu, OfflineDevice, OfflineRuntime};

#[test]
fn a_table_past_32_bits_of_elements_is_read() {
    let device = OfflineDevice::of(Gpu::H100);
    let rows = (1 << 32) / WIDTH + 1000;
    hold(&OfflineRuntime::client(&device), rows, ElementType::BF16).unwrap();
    let reports = device.take_reports();
    assert!(reports.iter().all(|report| report.executed && report.faults.is_empty()));
    let table = (rows * WIDTH * 2) as u64;
    assert_eq!(reports.iter().filter(|report| report.lengths.contains(&table)).count(), 2, "expand and pool");
}
