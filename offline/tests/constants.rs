//! The microbenchmarks of `ultramem constants` do what their names say: each is counted, and the time that is predicted for it gives back the
//! constant that the prediction assumes.

use ultramem_offline::Gpu;
use ultramem_offline::constants::{DOUBLE, Grid, PROBES, Probe, Runs, chain};
use ultramem_offline::profile::pipes::Pipe;
use ultramem_offline::profile::{Profile, Rates};

/// What a round of one block has more of, and how many of it.
fn meant(probe: &Probe) -> (fn(&Profile) -> f64, f64) {
    let warps = f64::from(probe.threads / 32);
    match probe.constant {
        "same_address" => (|it| it.conflicts, 8.0 * warps),
        "tags" => (|it| it.tags, 16.0 * 32.0 * warps),
        "cache" => (|it| it.cache_bytes, (1u32 << 20).into()),
        // A half is read and a half is written.
        "memory" => (|it| it.memory_bytes, (1u64 << 30) as f64 / f64::from(probe.blocks(132))),
        "matrix_cycles" => (|it| machine(it, Pipe::Matrix), 32.0 * warps),
        "latency_matrix" => (|it| machine(it, Pipe::Matrix), 64.0),
        "latency_memory" | "latency_cache" | "latency_first_level" => (|it| f64::from(it.chain), 64.0),
        "latency_shared" => (|it| it.shared_cycles, 64.0),
        "latency_barrier" => (|it| it.barriers, 16.0 * warps),
        "latency_alu" => (|it| machine(it, Pipe::Fma), 64.0),
        "latency_special" => (|it| machine(it, Pipe::Special), 64.0),
        "fma" => (|it| machine(it, Pipe::Fma), 128.0 * warps),
        "alu" => (|it| machine(it, Pipe::Alu), 128.0 * warps),
        "imad" => (|it| machine(it, Pipe::Imad), 128.0 * warps),
        "double" => (|it| machine(it, Pipe::Double), 128.0 * warps),
        "special" => (|it| machine(it, Pipe::Special), 128.0 * warps),
        "conversion" => (|it| machine(it, Pipe::Conversion), 128.0 * warps),
        "issue" => (|it| it.machine.iter().map(|it| it.1).sum(), 128.0 * warps),
        other => panic!("nothing is known of {other}"),
    }
}

fn machine(profile: &Profile, pipe: Pipe) -> f64 {
    profile.machine[pipe as usize].1
}

fn known() -> Vec<Probe> {
    PROBES.into_iter().chain([DOUBLE]).collect()
}

/// Two runs of a probe.
fn runs(probe: &Probe, gpu: Gpu) -> [Profile; 2] {
    [1, 2].map(|times| times * probe.few()).map(|rounds| probe.profile(gpu, &Rates::of(gpu), rounds).unwrap())
}

#[test]
fn each_does_what_its_name_says_and_gives_its_constant_back() {
    let (gpu, mut wrong) = (Gpu::H100, Vec::new());
    let rates = serde_json::to_value(Rates::of(gpu)).unwrap();
    let multiprocessors = gpu.specification().multiprocessors;
    for probe in known() {
        let [short, long] = runs(&probe, gpu);
        let (count, of_block) = meant(&probe);
        // The longest chain of loads is of one block, all else of all.
        let all = if probe.grid == Grid::One { 1.0 } else { f64::from(probe.blocks(multiprocessors)) };
        let rounds = probe.few();
        let (found, expected) = ((count(&long) - count(&short)) / f64::from(rounds), of_block * all);
        // A loop has a few instructions of its own; the last pass through a buffer is not whole in every block.
        if !(0.999..=1.04).contains(&(found / expected)) {
            wrong.push(format!("{}: {found} a round, not {expected}", probe.constant));
        }
        let assumed = rates[probe.constant].as_f64().unwrap();
        let times = Runs { rounds, short: short.predicted, long: long.predicted };
        let given = probe.value(times, Rates::of(gpu).clock, multiprocessors);
        println!("{}: {given:.2} for {assumed:.2}; {:.1} µs by {}", probe.constant, long.predicted, long.binds());
        // Loops and the unit of loads take an issue slot or a cycle besides.
        if (given / assumed - 1.0).abs() > 0.05 {
            wrong.push(format!("{}: {given:.2}, assumed {assumed:.2}", probe.constant));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_gpu_compiles_and_runs_them() {
    for gpu in [Gpu::A100, Gpu::B200, Gpu::Rtx4090] {
        for probe in known().into_iter().filter(|probe| probe.bytes() <= 16 << 20) {
            let profile = probe.profile(gpu, &Rates::of(gpu), 1).unwrap();
            assert_eq!(profile.counted, 1, "{}", probe.constant);
        }
    }
}

#[test]
fn a_chain_goes_through_all_places_once() {
    let bytes = 1000 * 128;
    let next: std::collections::HashMap<usize, usize> = chain(bytes).into_iter().collect();
    let (mut at, mut steps) = (0, 0);
    while steps == 0 || at != 0 {
        at = next[&at];
        steps += 1;
        assert!(steps <= 1000);
    }
    assert_eq!(steps, 1000);
}
