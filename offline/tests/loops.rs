//! Loop iterations: what each plan counts is held against what its kernel's busiest unit went through on the offline H100, from above and from
//! below: the plans of both passes and of an update as they are, others' counts as their launches tell them. A kernel that loops and counts nothing fails.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use cubecl::{Runtime, future::block_on};
use tracing::field::{Field, Visit};
use tracing_subscriber::{Layer, layer::Context, prelude::*};
use ultramem::kernels::LOOPS_TARGET;
use ultramem::kernels::launch::Launch;
use ultramem::kernels::optimiser::{Rule, Step};
use ultramem::kernels::{expand::ExpandStrategy, linear::ProjectStrategy, score::ScoreStrategy};
use ultramem::{Dimensions, ElementType, Kind, MemoryConfig, MemoryLayer, Norm, Strategies, Weights};
use ultramem_offline::{Gpu, LaunchReport, OfflineDevice, OfflineRuntime, Options};

/// Kernels that select.
const SELECTING: [&str; 5] =
    ["score_kernel", "select_keys_kernel", "retrieve_kernel", "combine_kernel", "top_m_kernel"];

/// What launches told, in their order.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<Count>>>);

#[derive(Debug, Clone, Default, PartialEq)]
struct Count {
    kernel: String,
    loops: u64,
}

impl Visit for Count {
    fn record_str(&mut self, _: &Field, value: &str) {
        self.kernel = value.to_string();
    }

    fn record_u64(&mut self, _: &Field, value: u64) {
        self.loops = value;
    }

    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

impl<S: tracing::Subscriber> Layer<S> for Told {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        if event.metadata().target() == LOOPS_TARGET {
            let mut count = Count::default();
            event.record(&mut count);
            self.0.lock().unwrap().push(count);
        }
    }
}

/// Runs `work`; returns what its launches told.
fn told(device: &OfflineDevice, work: impl FnOnce()) -> Vec<Count> {
    let told = Told::default();
    device.take_reports();
    tracing::subscriber::with_default(tracing_subscriber::registry().with(told.clone()), work);
    let counts = told.0.lock().unwrap();
    counts.clone()
}

/// Holds the iterations of every launch since the last call against what is `planned`; returns the kernels that loop.
fn hold(what: &str, device: &OfflineDevice, planned: &[Count]) -> Vec<String> {
    let mut seen: HashMap<String, usize> = HashMap::new();
    let mut kernels = Vec::new();
    for LaunchReport { kernel, loops, executed, .. } in device.take_reports() {
        assert!(executed, "{what}: {} did not run", kernel.name);
        let name = kernel.name.split("::").find(|part| part.ends_with("_kernel")).unwrap_or(&kernel.name).to_string();
        // cubek's kernels are another's, with bounds of their own.
        if loops == 0 || !kernel.name.contains("ultramem") {
            continue;
        }
        let turn = seen.entry(name.clone()).or_default();
        let count = planned.iter().filter(|count| count.kernel == name).nth(*turn);
        let Some(Count { loops: most, .. }) = count else {
            panic!("{what}: {name} loops {loops} times, nothing counts it")
        };
        *turn += 1;
        assert!(loops <= *most, "{what}: {name} loops {loops} times, its plan counts {most}");
        // How often a plane bisects, and how long, hangs on the numbers: few rows of few candidates need neither.
        let factor = if SELECTING.contains(&name.as_str()) { 8 } else { 4 };
        assert!(*most <= factor * loops + 300, "{what}: {name} loops {loops} times, its plan counts {most}");
        kernels.push(name);
    }
    kernels
}

#[test]
fn plans_count_the_iterations_that_execute() {
    let plain = Dimensions {
        hidden_size: 24,
        heads: 2,
        side_keys: 40,
        key_dim: 12,
        top_m: 11,
        value_dim: 16,
        ..Dimensions::default()
    };
    let additive = |kind: Kind| Dimensions {
        capabilities: kind.capabilities(),
        tucker_rank: 1,
        cores: 1,
        expansion: 1,
        ..plain.clone()
    };
    let (tile, whole, split) = (ProjectStrategy::Tile, ScoreStrategy::Whole, ScoreStrategy::Split { splits: 3 });
    let by = |score, expand| Strategies { query: tile, score, expand };
    let shapes = [
        ("UltraMem", 70, plain.clone(), by(whole, ExpandStrategy::Fused)),
        ("UltraMem, one token", 1, plain.clone(), by(split, ExpandStrategy::Pooled(tile))),
        (
            "UltraMem, split",
            9,
            Dimensions { norm: Norm::Layer, tucker_rank: 3, ..plain.clone() },
            by(split, ExpandStrategy::Fused),
        ),
        ("product keys", 300, additive(Kind::ProductKey), by(split, ExpandStrategy::Fused)),
        ("Memory+", 33, additive(Kind::MemoryPlus), by(whole, ExpandStrategy::Pooled(tile))),
        (
            "many slots",
            1,
            Dimensions { heads: 1, top_m: 150, side_keys: 160, ..plain.clone() },
            by(whole, ExpandStrategy::Fused),
        ),
        (
            "hot rows",
            400,
            Dimensions { heads: 1, side_keys: 2, top_m: 1, expansion: 1, ..plain },
            by(whole, ExpandStrategy::Fused),
        ),
    ];
    let mut seen = Vec::new();
    for (name, tokens, dims, strategies) in shapes {
        let device = OfflineDevice::new(Options { gpu: Gpu::H100, rolled_loops: true, ..Options::default() });
        let client = OfflineRuntime::client(&device);
        let config = MemoryConfig::new(dims).unwrap();
        let weights = Weights::random(&config, 1);
        let wait = || block_on(client.sync()).unwrap();
        let mut layer = None;
        let planned = told(&device, || {
            layer = Some(MemoryLayer::new(&client, config.clone(), &weights, ElementType::F32).unwrap());
            wait();
        });
        seen.extend(hold(&format!("{name}, weights"), &device, &planned));
        let mut layer = layer.unwrap();
        let numbers: Vec<f32> =
            (0..tokens * config.hidden_size).map(|at| ((at * 7919) % 2003) as f32 / 1001.0 - 1.0).collect();
        let input = layer.upload(&numbers).unwrap();
        let plans = layer.plans(tokens, strategies).unwrap().launches().into_iter();
        let count = |(_, it): (_, Launch)| Count { kernel: it.kernel.to_string(), loops: it.loops as u64 };
        let planned: Vec<_> = plans.map(count).collect();
        let forward = told(&device, || {
            layer.forward_with(&input, strategies).unwrap();
            wait();
        });
        assert_eq!(forward, planned, "{name}");
        seen.extend(hold(&format!("{name}, forward"), &device, &planned));
        let rule = Rule::Adagrad { eps: 1e-8 };
        let forward = layer.plans(tokens, layer.saving_strategies(tokens)).unwrap().launches();
        let backward = layer.backward_plans(tokens).unwrap().launches();
        let update = layer.update_plans(tokens, &rule).unwrap().launches();
        let planned: Vec<_> =
            forward.into_iter().chain(backward).chain(update.into_iter().map(|it| ("update", it))).map(count).collect();
        let trained = told(&device, || {
            let (_, saved) = layer.forward_saving(&input).unwrap();
            let gradients = layer.backward(&input, &saved, &input).unwrap();
            let mut optimiser = layer.value_optimiser(rule).unwrap();
            layer.update_values(&mut optimiser, &gradients.values, &Step::new(1e-3)).unwrap();
            wait();
        });
        assert_eq!(trained, planned, "{name}");
        seen.extend(hold(&format!("{name}, training"), &device, &planned));
    }
    let expected = [
        "prepare_kernel",
        "project_kernel",
        "score_kernel",
        "approximate_kernel",
        "select_keys_kernel",
        "retrieve_kernel",
        "combine_kernel",
        "expand_kernel",
        "pool_kernel",
        "row_products_kernel",
        "grad_sides_kernel",
        "grad_core_kernel",
        "grad_queries_kernel",
        "norm_backward_kernel",
        "column_sum_kernel",
        "outer_kernel",
        "list_keys_kernel",
        "locate_kernel",
        "count_kernel",
        "scatter_kernel",
        "count_heads_kernel",
        "sum_rows_kernel",
        "sum_blocks_kernel",
        "accumulate_kernel",
    ];
    for kernel in expected {
        assert!(seen.iter().any(|name| name == kernel), "{kernel} was not seen to loop");
    }
}
