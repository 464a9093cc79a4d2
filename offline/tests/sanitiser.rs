//! The checks themselves: kernels that are broken on purpose, each found by the check that is meant for it, and kernels whose traffic
//! is known.

use cubecl::future::block_on;
use cubecl::prelude::*;
use cubecl::server::Handle;
use ultramem_offline::{Fault, Finding, Gap, Gpu, LaunchReport, OfflineDevice, OfflineRuntime, Options, Place, Space};

type R = OfflineRuntime;
type Client = ComputeClient<R>;

fn device(seed: u64) -> (OfflineDevice, Client) {
    let device = OfflineDevice::new(Options { gpu: Gpu::H100, seed: Some(seed), ..Options::default() });
    let client = R::client(&device);
    (device, client)
}

/// What the one launch of `launch` reported.
fn report(device: &OfflineDevice, client: &Client, launch: impl FnOnce(&Client)) -> LaunchReport {
    launch(client);
    // A faulty launch leaves an error behind, which says what did not even run.
    let error = block_on(client.sync()).err();
    let mut reports = device.take_reports();
    assert!(reports.iter().all(|report| report.executed), "{error:?}");
    assert_eq!(reports.len(), 1);
    reports.remove(0)
}

fn array(handle: &Handle, length: usize) -> ArrayArg<R> {
    // SAFETY: every test gives the length that it has allocated.
    unsafe { ArrayArg::from_raw_parts(handle.clone(), length) }
}

/// `numbers` of f32 on the device.
fn upload(client: &Client, length: usize) -> Handle {
    let numbers: Vec<f32> = (0..length).map(|i| i as f32).collect();
    client.create_from_slice(f32::as_bytes(&numbers))
}

fn download(client: &Client, handle: Handle) -> Vec<f32> {
    f32::from_bytes(&client.read_one(handle).unwrap()).to_vec()
}

fn only(report: &LaunchReport) -> Fault {
    assert_eq!(report.faults.len(), 1, "{:?}", report.faults);
    report.faults[0]
}

const LENGTH: usize = 96;

/// `output[i] = input[i + shift]`, and nothing where `i % keep != 0`.
#[cube(launch_unchecked)]
fn shifted(input: &Array<f32>, output: &mut Array<f32>, #[comptime] shift: usize, #[comptime] keep: usize) {
    let rest = ABSOLUTE_POS % keep;
    if rest == 0 {
        output[ABSOLUTE_POS] = input[ABSOLUTE_POS + shift];
    }
}

fn run_shifted(shift: usize, keep: usize, output: usize) -> LaunchReport {
    let (device, client) = device(1);
    let (from, to) = (upload(&client, LENGTH), client.empty(4 * output));
    let count = CubeCount::Static(1, 1, 1);
    // SAFETY: what is out of bounds is what the test is about; the device stops the launch there.
    report(&device, &client, |client| unsafe {
        let (from, to) = (array(&from, LENGTH), array(&to, output));
        shifted::launch_unchecked::<R>(client, count, CubeDim::new_1d(LENGTH as u32), from, to, shift, keep);
    })
}

#[test]
fn a_sound_kernel_is_clean() {
    let report = run_shifted(0, 1, LENGTH);
    assert!(report.is_clean(), "{report:?}");
}

#[test]
fn a_load_past_the_end_is_found() {
    let fault = only(&run_shifted(1, 1, LENGTH));
    let space = Space::Outside { buffer: 0, element: LENGTH as i64, length: LENGTH };
    assert_eq!(fault.place, Place { block: 0, thread: LENGTH - 1 });
    assert_eq!(fault.finding, Finding::OutOfBounds { space, size: 4, store: false });
    assert!(fault.line.is_some());
    let text = "thread 95 of block 0 reads 4 bytes out of bounds: element 96 of buffer 0, which has 96 (line ";
    assert!(fault.to_string().starts_with(text), "{fault}");
}

#[test]
fn a_store_past_the_end_is_found() {
    let Finding::OutOfBounds { space, store, .. } = only(&run_shifted(0, 1, 90)).finding else { panic!("no finding") };
    assert!(store && matches!(space, Space::Outside { buffer: 1, element: 90..96, length: 90 }), "{space}");
}

#[test]
fn what_stays_unwritten_is_found() {
    let report = run_shifted(0, 2, LENGTH);
    assert_eq!(report.gaps, [Gap { buffer: 1, element: 1, bytes: 4 * LENGTH / 2 }]);
    assert!(!report.is_clean());
}

#[test]
fn a_load_of_what_nothing_wrote_is_found() {
    let (device, client) = device(2);
    let (from, to) = (client.empty(4 * LENGTH), client.empty(4 * LENGTH));
    // SAFETY: every index is in bounds.
    let report = report(&device, &client, |client| unsafe {
        let (from, to) = (array(&from, LENGTH), array(&to, LENGTH));
        let count = CubeCount::Static(1, 1, 1);
        shifted::launch_unchecked::<R>(client, count, CubeDim::new_1d(LENGTH as u32), from, to, 0, 1);
    });
    assert!(matches!(only(&report).finding, Finding::Unwritten { space: Space::Buffer { buffer: 0, .. } }));
}

#[test]
fn a_load_of_what_nothing_wrote_can_be_no_error() {
    let options = Options { gpu: Gpu::H100, unwritten_loads: true, ..Options::default() };
    for (shift, good) in [(0, true), (1, false)] {
        let device = OfflineDevice::new(options);
        let client = R::client(&device);
        let (from, to) = (client.empty(4 * LENGTH), client.empty(4 * LENGTH));
        let (from, to, dim) = (array(&from, LENGTH), array(&to, LENGTH), CubeDim::new_1d(LENGTH as u32));
        // SAFETY: what is out of bounds is what the test is about; the device stops the launch there.
        unsafe { shifted::launch_unchecked::<R>(&client, CubeCount::Static(1, 1, 1), dim, from, to, shift, 1) };
        assert_eq!(block_on(client.sync()).is_ok(), good);
        assert!(device.take_reports().iter().any(|report| !report.faults.is_empty()));
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Broken {
    Nothing,
    NoBarrier,
    SomeWait,
    ReadsPast,
    WritesTooLittle,
}

/// Each unit gives its number to the one that mirrors it, through shared memory.
#[cube(launch_unchecked)]
fn mirrored(input: &Array<f32>, output: &mut Array<f32>, #[comptime] units: usize, #[comptime] broken: Broken) {
    let mut shared = SharedMemory::<f32>::new(units);
    let unit = UNIT_POS as usize;
    if comptime!(broken != Broken::WritesTooLittle) || unit < comptime!(units - 1) {
        shared[unit] = input[ABSOLUTE_POS];
    }
    if comptime!(broken == Broken::SomeWait) {
        if unit < 40 {
            sync_cube();
        }
    } else if comptime!(broken != Broken::NoBarrier) {
        sync_cube();
    }
    let past = comptime!(usize::from(broken == Broken::ReadsPast));
    output[ABSOLUTE_POS] = shared[units - 1 - unit + past];
}

fn run_mirrored(broken: Broken, seed: u64) -> LaunchReport {
    let (device, client) = device(seed);
    let (units, blocks) = (LENGTH, 3);
    let (from, to) = (upload(&client, units * blocks), client.empty(4 * units * blocks));
    // SAFETY: what is out of bounds is what the test is about; the device stops the launch there.
    let report = report(&device, &client, |client| unsafe {
        let (from, to) = (array(&from, units * blocks), array(&to, units * blocks));
        let (count, dim) = (CubeCount::Static(blocks as u32, 1, 1), CubeDim::new_1d(units as u32));
        mirrored::launch_unchecked::<R>(client, count, dim, from, to, units, broken);
    });
    if broken == Broken::Nothing {
        let mirror = |i: usize| (i / units * units + units - 1 - i % units) as f32;
        assert_eq!(download(&client, to), (0..units * blocks).map(mirror).collect::<Vec<_>>());
    }
    report
}

#[test]
fn a_barrier_makes_shared_memory_sound() {
    for seed in 0..4 {
        assert!(run_mirrored(Broken::Nothing, seed).is_clean());
    }
}

#[test]
fn a_missing_barrier_is_found() {
    // In whatever order the warps run, if not always by the same threads.
    for seed in 0..4 {
        let faults = run_mirrored(Broken::NoBarrier, seed).faults;
        let race = |fault: &Fault| match fault.finding {
            Finding::Race { space: Space::Shared { byte }, other, .. } => {
                byte % 4 == 0 && other.block == fault.place.block && other.thread + fault.place.thread == LENGTH - 1
            }
            _ => false,
        };
        assert!(faults.iter().any(race), "{faults:?}");
    }
}

#[test]
fn a_divergent_barrier_is_found() {
    // Those that don't wait also race with those that do.
    let faults = run_mirrored(Broken::SomeWait, 3).faults;
    let diverges = |fault: &Fault| match fault.finding {
        Finding::Divergent { other } => fault.place.thread < 40 && other.thread >= 40 && fault.line.is_some(),
        _ => false,
    };
    assert!(faults.iter().any(diverges), "{faults:?}");
}

#[test]
fn a_load_past_shared_memory_is_found() {
    let fault = only(&run_mirrored(Broken::ReadsPast, 4));
    let Finding::OutOfBounds { space, store: false, .. } = fault.finding else { panic!("{fault}") };
    assert_eq!(space, Space::OutsideShared { byte: 4 * LENGTH, length: 4 * LENGTH });
    assert_eq!(fault.place.thread, 0);
}

#[test]
fn a_load_of_shared_memory_that_nothing_wrote_is_found() {
    // What the block before has left there does not count.
    let report = run_mirrored(Broken::WritesTooLittle, 5);
    let space = Space::Shared { byte: 4 * (LENGTH - 1) };
    assert!(report.faults.iter().any(|fault| fault.finding == Finding::Unwritten { space }), "{:?}", report.faults);
}

/// Every block writes the same element.
#[cube(launch_unchecked)]
fn overwritten(output: &mut Array<f32>) {
    if UNIT_POS == 0 {
        output[0] = CUBE_POS as f32;
    }
}

#[test]
fn blocks_that_write_the_same_element_race() {
    let (device, client) = device(6);
    let to = client.empty(4);
    // SAFETY: the only index is 0.
    let report = report(&device, &client, |client| unsafe {
        let (count, dim) = (CubeCount::Static(2, 1, 1), CubeDim::new_1d(32));
        overwritten::launch_unchecked::<R>(client, count, dim, array(&to, 1));
    });
    let fault = only(&report);
    let Finding::Race { space, store: true, other, stored: true } = fault.finding else { panic!("{fault}") };
    assert_eq!(space, Space::Buffer { buffer: 0, element: 0 });
    assert_eq!(fault.place.block + other.block, 1);
}

/// Units take places in the order in which they come.
#[cube(launch_unchecked)]
fn queued(next: &mut Array<Atomic<u32>>, output: &mut Array<u32>) {
    let place = next[0].fetch_add(1u32);
    output[place as usize] = ABSOLUTE_POS as u32;
}

fn run_queued(seed: u64) -> (Vec<u32>, LaunchReport) {
    let (device, client) = device(seed);
    let (next, to) = (client.create_from_slice(u32::as_bytes(&[0])), client.empty(4 * 2 * LENGTH));
    // SAFETY: there are as many places as units.
    let report = report(&device, &client, |client| unsafe {
        let (count, dim) = (CubeCount::Static(2, 1, 1), CubeDim::new_1d(LENGTH as u32));
        let (next, to) = (array(&next, 1), array(&to, 2 * LENGTH));
        queued::launch_unchecked::<R>(client, count, dim, next, to);
    });
    (u32::from_bytes(&client.read_one(to).unwrap()).to_vec(), report)
}

#[test]
fn the_order_of_warps_is_the_seeds() {
    let orders: Vec<_> = (0..4).map(|seed| run_queued(seed).0).collect();
    assert_eq!(orders[0], run_queued(0).0);
    assert!(orders.iter().skip(1).any(|order| *order != orders[0]));
}

#[test]
fn an_atomic_operation_reads_and_writes_and_does_not_race() {
    let (_, report) = run_queued(7);
    assert!(report.is_clean());
    let warps = 2 * LENGTH as u64 / 32;
    for flow in [report.traffic[0].read, report.traffic[0].written] {
        assert_eq!((flow.requests, flow.bytes, flow.sectors), (warps, 4 * 32 * warps, warps));
        assert_eq!((flow.distinct_bytes, flow.distinct_sectors), (4, 1));
    }
}

/// Copies rows of `width` numbers; a unit takes every `stride`-th vector.
#[cube(launch_unchecked)]
fn copied<N: Size>(input: &Array<Vector<f32, N>>, output: &mut Array<Vector<f32, N>>, #[comptime] stride: usize) {
    output[UNIT_POS as usize] = input[UNIT_POS as usize * stride];
}

fn run_copied(width: usize, stride: usize, seed: u64) -> LaunchReport {
    let (device, client) = device(seed);
    let (from, to) = (upload(&client, 64 * width * stride), client.empty(4 * 64 * width));
    // SAFETY: every index is in bounds.
    report(&device, &client, |client| unsafe {
        let (from, to) = (array(&from, 64 * stride), array(&to, 64));
        copied::launch_unchecked::<R>(client, CubeCount::Static(1, 1, 1), CubeDim::new_1d(64), width, from, to, stride);
    })
}

#[test]
fn sectors_are_counted_by_warp() {
    // Bytes of a load, stride; requests and sectors of two warps.
    for (width, stride, sectors) in
        [(1, 1, 8), (1, 2, 16), (1, 8, 64), (1, 16, 64), (4, 1, 32), (4, 2, 64), (8, 1, 128)]
    {
        let report = run_copied(width, stride, 8);
        let read = report.traffic[0].read;
        // A vector of eight numbers is two loads, each of which touches half of its sector.
        let requests = if width == 8 { 4 } else { 2 };
        assert_eq!((read.requests, read.sectors), (requests, sectors), "{width} numbers, stride {stride}");
        assert_eq!(read.bytes, 64 * 4 * width as u64);
        assert_eq!(read.distinct_bytes, read.bytes);
        assert_eq!(read.widest, 4 * width.min(4) as u64);
        assert!(report.is_clean());
    }
}

#[test]
fn a_load_that_is_narrower_than_its_row_allows_is_found() {
    let row = 4 * 64;
    assert!(run_copied(1, 1, 9).traffic[0].read.is_narrow(row));
    assert!(run_copied(2, 1, 9).traffic[0].read.is_narrow(row));
    assert!(!run_copied(4, 1, 9).traffic[0].read.is_narrow(row));
    // A row of 8 bytes allows no more.
    assert!(!run_copied(2, 1, 9).traffic[0].read.is_narrow(8));
}

/// Each unit sums a window of `window` numbers.
#[cube(launch_unchecked)]
fn windows(input: &Array<f32>, output: &mut Array<f32>, #[comptime] window: usize) {
    let mut sum = 0.0f32;
    for i in 0..window {
        sum += input[ABSOLUTE_POS + i];
    }
    output[ABSOLUTE_POS] = sum;
}

#[test]
fn traffic_is_exact_and_does_not_depend_on_the_order() {
    let (window, blocks) = (8, 5);
    let units = LENGTH * blocks;
    let run = |seed| {
        let (device, client) = device(seed);
        let (from, to) = (upload(&client, units + window), client.empty(4 * units));
        // SAFETY: every index is in bounds.
        report(&device, &client, |client| unsafe {
            let (from, to) = (array(&from, units + window), array(&to, units));
            let (count, dim) = (CubeCount::Static(blocks as u32, 1, 1), CubeDim::new_1d(LENGTH as u32));
            windows::launch_unchecked::<R>(client, count, dim, from, to, window);
        })
    };
    let first = run(0);
    for seed in 1..4 {
        assert_eq!(run(seed).traffic, first.traffic);
    }
    let read = first.traffic[0].read;
    let warps = units as u64 / 32;
    // A window that starts within a sector ends in one more.
    assert_eq!((read.requests, read.sectors), (8 * warps, (4 + 7 * 5) * warps));
    assert_eq!(read.distinct_bytes, 4 * (units + window - 1) as u64);
    assert_eq!(read.moved(true), 32 * (units as u64 / 8 + 1));
    assert_eq!(read.moved(false), 32 * read.sectors);
}

/// What a plane does together.
#[cube(launch_unchecked)]
fn together(input: &Array<f32>, output: &mut Array<f32>, #[comptime] lengths: usize) {
    let own = input[ABSOLUTE_POS];
    let sum = plane_sum(own);
    let before = plane_exclusive_sum(own);
    let third = plane_broadcast(own, 3u32);
    let flipped = plane_shuffle_xor(own, 1u32);
    let any = plane_any(own > 70.0);
    output[ABSOLUTE_POS] = sum;
    output[lengths + ABSOLUTE_POS] = before;
    output[2 * lengths + ABSOLUTE_POS] = third;
    output[3 * lengths + ABSOLUTE_POS] = flipped;
    output[4 * lengths + ABSOLUTE_POS] = f32::cast_from(any);
}

#[test]
fn planes_of_32_work_together() {
    let (device, client) = device(10);
    let (from, to) = (upload(&client, LENGTH), client.empty(4 * 5 * LENGTH));
    // SAFETY: every index is in bounds.
    let report = report(&device, &client, |client| unsafe {
        let (from, to) = (array(&from, LENGTH), array(&to, 5 * LENGTH));
        let (count, dim) = (CubeCount::Static(1, 1, 1), CubeDim::new_1d(LENGTH as u32));
        together::launch_unchecked::<R>(client, count, dim, from, to, LENGTH);
    });
    assert!(report.is_clean(), "{:?}", report.faults);
    let plane = |i: usize| i / 32 * 32;
    let sum = |range: std::ops::Range<usize>| range.sum::<usize>() as f32;
    let expected = [
        Box::new(|i| sum(plane(i)..plane(i) + 32)) as Box<dyn Fn(usize) -> f32>,
        Box::new(|i| sum(plane(i)..i)),
        Box::new(|i| plane(i) as f32 + 3.0),
        Box::new(|i| (i ^ 1) as f32),
        Box::new(|i| f32::from(u8::from(plane(i) == 64))),
    ];
    let found = download(&client, to);
    for (what, expected) in expected.iter().enumerate() {
        let expected: Vec<f32> = (0..LENGTH).map(expected).collect();
        assert_eq!(found[what * LENGTH..][..LENGTH], expected, "{what}");
    }
}
