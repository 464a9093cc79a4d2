//! Selection by itself, by planes of the offline H100: right for every kind of row, and no kind takes four times what random rows take.

#[path = "../../tests/common/top_m.rs"]
mod top_m;

use cubecl::Runtime;
use top_m::{KINDS, SIZES, hold, row};
use ultramem::kernels::from_f32;
use ultramem_offline::profile::{Profile, Rates};
use ultramem_offline::{Execution, Gpu, OfflineDevice, OfflineRuntime, Options};

#[test]
fn planes_select_from_every_kind_of_row() {
    let device = OfflineDevice::of(Gpu::H100);
    let client = OfflineRuntime::client(&device);
    for (seed, (count, keep)) in SIZES.into_iter().enumerate() {
        hold(&client, count, keep, seed as u64);
        for report in device.take_reports() {
            assert!(report.executed && report.faults.is_empty() && report.gaps.is_empty(), "{:?}", report.faults);
        }
    }
}

/// The pairs of a head that keeps 80 keys a side, and the keys of a side.
#[test]
fn no_kind_of_row_takes_four_times_as_long() {
    for count in [6400, 1616] {
        let times = KINDS.map(|kind| time(kind, count, 80));
        let random = times[0];
        for (kind, time) in KINDS.iter().zip(times) {
            println!("{count} {kind}: {time:.2} µs, {:.2} of random rows'", time / random);
            assert!(time <= 4.0 * random, "{kind}, {count}: {time} µs, random rows take {random}");
        }
    }
}

/// What 1,056 rows of a kind are predicted to take, in microseconds: a wave of cubes.
fn time(kind: &str, count: usize, keep: usize) -> f64 {
    let rows = 1056;
    let device = OfflineDevice::new(Options { execution: Execution::Counted, ..Options::default() });
    let client = OfflineRuntime::client(&device);
    let numbers: Vec<f32> = (0..rows).flat_map(|seed| row(kind, count, keep, seed)).collect();
    let scores = from_f32(&client, &[rows as usize, count], &numbers).unwrap();
    ultramem::kernels::top_m(&client, &scores, keep).unwrap();
    cubecl::future::block_on(client.sync()).unwrap();
    let reports = device.take_reports();
    assert_eq!(reports.len(), 1);
    Profile::of(&reports[0], Gpu::H100, &Rates::of(Gpu::H100)).unwrap().unwrap().predicted
}
