//! Counting: against what was counted by hand, against kernels whose counts are known, and a sample of blocks against all of them.

use cubecl::prelude::*;
use cubecl::{client::ComputeClient, future::block_on};
use ultramem::{Dimensions, ElementType, MemoryConfig, MemoryLayer, Weights};
use ultramem_offline::profile::{Counts, Profile, Rates, layer, layer::Staged, pipes::Pipe};
use ultramem_offline::{Adapter, Blocks, Execution, Gpu, LaunchReport, OfflineDevice, OfflineRuntime, Options};

type R = OfflineRuntime;

fn counting() -> (OfflineDevice, ComputeClient<R>) {
    let device = OfflineDevice::new(Options { execution: Execution::Counted, ..Options::default() });
    let client = R::client(&device);
    (device, client)
}

fn near(what: &str, found: f64, expected: f64, share: f64) {
    assert!((found / expected - 1.0).abs() <= share, "{what}: {found:.4e}, expected {expected:.4e} within {share}");
}

/// `output[i] = 2 · input[i] + 1`, a vector of four a unit.
#[cube(launch_unchecked)]
fn copied<N: Size>(input: &Array<Vector<f32, N>>, output: &mut Array<Vector<f32, N>>) {
    output[ABSOLUTE_POS] = input[ABSOLUTE_POS] * Vector::new(2.0) + Vector::new(1.0);
}

/// `numbers[i] = 2 · numbers[i]`, a vector of four a unit.
#[cube(launch_unchecked)]
fn doubled<N: Size>(numbers: &mut Array<Vector<f32, N>>) {
    numbers[ABSOLUTE_POS] = numbers[ABSOLUTE_POS] * Vector::new(2.0);
}

/// Units of a plane add to the same number `times` times, and read a column that they all lie in.
#[cube(launch_unchecked)]
fn conflicting(output: &mut Array<u32>, #[comptime] times: usize, #[comptime] stride: usize) {
    let shared = SharedMemory::<Atomic<u32>>::new(32usize);
    let mut column = SharedMemory::<u32>::new(comptime!(32 * stride));
    let unit = UNIT_POS as usize;
    shared[unit].store(0u32);
    column[unit * stride] = UNIT_POS;
    sync_cube();
    for _ in 0..times {
        shared[0].fetch_add(UNIT_POS);
    }
    sync_cube();
    output[unit] = column[unit * stride] + shared[0].load();
}

fn profiled(device: &OfflineDevice, client: &ComputeClient<R>) -> Profile {
    block_on(client.sync()).unwrap();
    let report = device.take_reports().pop().unwrap();
    Profile::of(&report, Gpu::H100, &Rates::of(Gpu::H100)).unwrap().unwrap()
}

/// A copy of so many blocks and units, of which some blocks run.
fn copy(ran: Blocks, blocks: usize, units: usize) -> Profile {
    let (device, client) = counting();
    device.count(ran);
    let length = blocks * units;
    let (from, to) = (client.create_from_slice(&vec![0; 16 * length]), client.empty(16 * length));
    let array = |handle: &cubecl::server::Handle| {
        // SAFETY: both have as many vectors.
        unsafe { ArrayArg::from_raw_parts(handle.clone(), length) }
    };
    // SAFETY: every index is in bounds.
    unsafe {
        let (count, dim) = (CubeCount::Static(blocks as u32, 1, 1), CubeDim::new_1d(units as u32));
        copied::launch_unchecked::<R>(&client, count, dim, 4, array(&from), array(&to));
    }
    profiled(&device, &client)
}

#[test]
fn blocks_that_are_spread_stand_for_all() {
    let (blocks, units) = (1 << 14, 256);
    let [all, some, seven] =
        [Blocks::All, Blocks::Spread { whole: 0 }, Blocks::Number(7)].map(|ran| copy(ran, blocks, units));
    assert_eq!((all.counted, seven.counted), (blocks, 7));
    assert!((4..blocks / 4).contains(&some.counted), "{}", some.counted);
    assert_eq!(copy(Blocks::Spread { whole: 1 }, 64, units).counted, 64);
    for few in [&some, &seven] {
        near("bytes", few.memory_bytes, all.memory_bytes, 1e-9);
        near("instructions", few.ptx[Pipe::Fma as usize].1, all.ptx[Pipe::Fma as usize].1, 1e-9);
    }
}

/// More than the second-level cache keeps: each byte comes and goes.
#[test]
fn what_is_changed_in_place_moves_twice() {
    let (device, client) = counting();
    device.count(Blocks::Number(64));
    let (blocks, units) = (1 << 13, 256);
    let numbers = client.empty(16 * blocks * units);
    // SAFETY: every index is in bounds.
    unsafe {
        let (count, dim) = (CubeCount::Static(blocks as u32, 1, 1), CubeDim::new_1d(units as u32));
        doubled::launch_unchecked::<R>(&client, count, dim, 4, ArrayArg::from_raw_parts(numbers, blocks * units));
    }
    let profile = profiled(&device, &client);
    near("bytes", profile.memory_bytes, (2 * 16 * blocks * units) as f64, 1e-9);
}

#[test]
fn a_copy_takes_what_its_bytes_take() {
    let (blocks, units) = (2048, 256);
    let length = blocks * units;
    let profile = copy(Blocks::All, blocks, units);
    let bytes = 2.0 * 16.0 * length as f64;
    assert_eq!((profile.memory_bytes, profile.cache_bytes), (bytes, bytes));
    // A device-to-device copy on an H100 with SXM moves 3.0 TB/s, as published.
    assert_eq!(profile.bound().0, "memory");
    near("time", profile.bound().1, bytes / 3.0e12 * 1e6, 1e-9);
    // Four multiply-adds a warp, whatever else.
    let warps = (length / 32) as f64;
    assert_eq!(profile.ptx[Pipe::Fma as usize], (Pipe::Fma, 4.0 * warps));
    // ptxas makes a constant with one more.
    let machine = profile.machine[Pipe::Fma as usize].1 / warps;
    assert!((4.0..=5.0).contains(&machine), "{machine}");
    assert_eq!((profile.chain, profile.idle), (1, 0.0));
}

#[test]
fn conflicts_in_shared_memory_are_counted() {
    let run = |times: usize, stride: usize| {
        let (device, client) = counting();
        let to = client.empty(4 * 32);
        // SAFETY: every index is in bounds.
        unsafe {
            let to = ArrayArg::from_raw_parts(to, 32);
            let (count, dim) = (CubeCount::Static(1, 1, 1), CubeDim::new_1d(32));
            conflicting::launch_unchecked::<R>(&client, count, dim, to, times, stride);
        }
        profiled(&device, &client)
    };
    // Every addition is one of 32 lanes to one address; a store and a load of a column with a stride of 32 words take 32 cycles each.
    let (once, more, strided) = (run(1, 1), run(11, 1), run(1, 32));
    assert_eq!(more.conflicts - once.conflicts, 10.0);
    assert_eq!(strided.shared_cycles - once.shared_cycles, 2.0 * 31.0);
    assert!(once.barriers >= 2.0);
}

fn counts(reports: Vec<LaunchReport>) -> Vec<std::sync::Arc<Counts>> {
    reports.into_iter().filter_map(|report| report.counts).collect()
}

#[test]
fn some_blocks_stand_for_all() {
    let dimensions =
        Dimensions { hidden_size: 64, side_keys: 64, key_dim: 16, top_m: 8, value_dim: 64, ..Dimensions::default() };
    let (tokens, period) = (512, 64);
    let config = MemoryConfig::new(dimensions).unwrap();
    let weights = Weights::random(&config, 3);
    let numbers: Vec<f32> = (0..period * 64).map(|at| ((at * 7919) % 2003) as f32 / 1001.0 - 1.0).collect();
    let run = |blocks| {
        let (device, client) = counting();
        let layer = MemoryLayer::new(&client, config.clone(), &weights, ElementType::F32).unwrap();
        let input = layer.upload(&numbers.repeat(tokens / period)).unwrap();
        block_on(client.sync()).unwrap();
        device.take_reports();
        device.count(blocks);
        let output = layer.read(&layer.forward(&input).unwrap().output).unwrap();
        (output, counts(device.take_reports()))
    };
    let ((all_output, all), (some_output, some)) = (run(Blocks::All), run(Blocks::Repeated { tokens, period }));
    assert_eq!(all_output, some_output);
    assert_eq!(all.len(), some.len());
    let mut fewer = 0;
    for (all, some) in all.iter().zip(&some) {
        fewer += usize::from(some.blocks < all.blocks);
        let issued = |it: &Counts| it.instructions.iter().map(|it| it.issued).sum::<u64>() as f64 / it.blocks as f64;
        near("instructions of a block", issued(some), issued(all), 0.01);
        let sectors = |it: &Counts| it.instructions.iter().map(|it| it.sectors).sum::<u64>() as f64 / it.blocks as f64;
        near("sectors of a block", sectors(some), sectors(all), 0.02);
    }
    assert!(fewer > 0, "every launch ran every block");
}

/// An H100 that says nothing of planes and matrix units: scoring and combining go by digits there, as on every device when they were counted by hand.
const BY_DIGITS: Option<Adapter> = Some(Adapter { plane_size: 32, shared_bytes: 227 << 10, units: 1024 });

/// Scoring and combining at `ultramem_v1_1b` in f32 over 4,096 tokens, and what pools.
fn counted(rates: &Rates) -> [Profile; 3] {
    let config = MemoryConfig::new(Dimensions::ultramem_v1_1b()).unwrap();
    let forward = |dtype, adapter| layer::forward(&config, 4096, dtype, Gpu::H100, adapter, rates).unwrap();
    let first = |staged: &[Staged], stage| staged.iter().find(|it| it.stage == stage).unwrap().profile.clone();
    let by_digits = forward(ElementType::F32, BY_DIGITS);
    let [score, combine] = ["score", "combine"].map(|stage| first(&by_digits, stage));
    [score, combine, first(&forward(ElementType::BF16, None), "expand")]
}

/// By hand 1,156, 1,581 and 2,201 µs of scoring, and 758, 1,025 and 1,334 of combining, where an atomic operation whose lanes hit one address takes 2, 32
/// and 64 cycles.
#[test]
fn scoring_and_combining_take_what_was_predicted_by_hand() {
    for (same_address, by_hand) in [(2.0, 1914.0), (32.0, 2606.0), (64.0, 3535.0)] {
        let [score, combine, _] = counted(&Rates { same_address, ..Rates::of(Gpu::H100) });
        let sum = score.predicted + combine.predicted;
        near(&format!("the sum for {same_address} cycles"), sum, by_hand, 0.25);
    }
}

/// Counted by hand, from machine code.
#[test]
fn scoring_and_combining_are_what_was_counted_by_hand() {
    let [score, combine, pool] = counted(&Rates::of(Gpu::H100));
    for (what, found, by_hand) in [
        ("score's bytes", score.time("memory"), 12.0),
        ("combine's bytes", combine.time("memory"), 8.0),
        ("pool's bytes", pool.time("memory"), 178.0),
        ("pool's sectors", pool.time("cache"), 99.0),
        ("score's logic", score.time("ALU"), 373.0),
        ("score's issue slots", score.time("issue"), 482.0),
        ("score's shared memory", score.time("shared and lines"), 1140.0),
    ] {
        near(what, found, by_hand, 0.15);
    }
    // By hand 2.54 and 2.01 GB, each sector once; with 17 KB of first-level cache a block some give way before their other half is read.
    assert!((4.1e9..6.4e9).contains(&score.cache_bytes), "{:e}", score.cache_bytes);
    // By hand 42,200 instructions a row, 35,111 of them ALU, and 256 atomics of 32 lanes on one address: in eight passes. With numbers
    // as drawn the passes end when the last key is known: to tell 6,400 sums apart takes log16(6,400) = 3.2 digits, so three passes at least.
    let rows = 16_384.0;
    let machine = combine.machine.iter().map(|it| it.1).sum::<f64>() / rows;
    let alu = combine.machine[Pipe::Alu as usize].1 / rows;
    assert!((0.375..=1.1).contains(&(machine / 42_200.0)), "{machine}");
    assert!((0.375..=1.1).contains(&(alu / 35_111.0)), "{alu}");
    near("share of ALU", alu / machine, 35_111.0 / 42_200.0, 0.1);
    assert!((0.375..=1.0).contains(&(combine.conflicts / rows / 256.0)), "{}", combine.conflicts / rows);
}
