//! The plans of a pass are its launches: kernel, cubes, units and shared memory, in order, none missing and none too many. Forward passes of layers
//! of the whole family, by every strategy, on two GPUs; whole steps of training, by every optimiser; tables and shuffles in pages; and where the plan
//! is an error, so is the pass.

use std::collections::BTreeSet;

use cubecl::Runtime;
use cubecl::client::ComputeClient;
use cubecl::future::block_on;
use ultramem::kernels::launch::{Device, Launch};
use ultramem::kernels::optimiser::{Rule, Step};
use ultramem::kernels::{JoinPlans, ScatterPlan, empty, u32_storage};
use ultramem::kernels::{expand::ExpandStrategy, linear::ProjectStrategy, score::ScoreStrategy};
use ultramem::{
    Capabilities, Dimensions, ElementType, Kind, LayerWeights, MemoryConfig, MemoryLayer, Norm, RowGradients,
    SharedTable, Strategies, ValueTable,
};
use ultramem_offline::trace::{Tracer, tracing_device};
use ultramem_offline::{Gpu, LaunchReport, OfflineDevice, OfflineRuntime, Target};

/// The kernel of a launch by its function's name; none for those of CubeCL and cubek.
fn kernel(launch: &LaunchReport) -> Option<&str> {
    let own = launch.kernel.name.split("::").find(|part| part.ends_with("_kernel"));
    own.filter(|_| launch.kernel.name.contains("ultramem"))
}

/// Bytes by which the shared memory of a launch may differ from its plan's: what lies between arrays, of which each begins at a multiple of its
/// vectors' bytes, and arrays of one number that a variant of the kernel never touches.
const PADDING: usize = 48;

/// Holds a launch against its plan, which may count up to `words` words a unit of shared memory that a variant of the kernel does not touch.
fn assert_planned(what: &str, plan: &Launch, launch: &LaunchReport, words: usize) {
    let what = format!("{what}: {plan:?}");
    assert_eq!(Some(plan.kernel), kernel(launch), "{what}");
    assert_eq!(launch.kernel.dim, [plan.units as u32, 1, 1], "{what}");
    assert_eq!(launch.count.iter().map(|&count| count as usize).product::<usize>(), plan.cubes, "{what}");
    let (shared, most) = (launch.kernel.shared, plan.shared_bytes + PADDING);
    assert!((shared..=shared + 2 * PADDING + 4 * words * plan.units).contains(&most), "{what}: {shared} bytes");
}

/// Holds all launches against all plans. Others' launches are cubek's products: there are none where it is not asked for a product.
fn assert_all_planned(what: &str, plans: &[Launch], launches: &[LaunchReport], cubek: bool, words: usize) {
    let own: Vec<_> = launches.iter().filter(|launch| kernel(launch).is_some()).collect();
    let names: Vec<_> = own.iter().filter_map(|launch| kernel(launch)).collect();
    let planned: Vec<_> = plans.iter().map(|plan| plan.kernel).collect();
    assert_eq!(names, planned, "{what}");
    assert!(cubek || own.len() == launches.len(), "{what}: {} launches, {} planned", launches.len(), own.len());
    for (plan, launch) in plans.iter().zip(own) {
        // A norm's parts are planned in vectors of four, be they narrower or not.
        let words = if plan.kernel == "norm_backward_kernel" { 3 } else { words };
        assert_planned(what, plan, launch, words);
    }
}

/// What has been launched since the last call.
fn taken(client: &ComputeClient<OfflineRuntime>, device: &OfflineDevice) -> Vec<LaunchReport> {
    block_on(client.sync()).unwrap();
    device.take_reports()
}

/// A layer of each kind and what else its stages may do, in sizes that whole vectors fill and in odd ones.
fn layers() -> Vec<Dimensions> {
    let real = Dimensions { side_keys: 256, ..Dimensions::ultramem_v1_1b() };
    let additive = Dimensions { tucker_rank: 1, cores: 1, expansion: 1, ..real.clone() };
    let of = |capabilities: Capabilities| Dimensions { capabilities, ..additive.clone() };
    let odd =
        Dimensions { hidden_size: 13, side_keys: 34, key_dim: 7, top_m: 5, value_dim: 22, norm: Norm::Layer, ..real };
    let shared = Some(SharedTable { rows: 1 << 16, offset: 1 << 15 });
    let v2 = Kind::UltraMemV2.capabilities();
    let gated = Capabilities { output_gated: true, ..Kind::UltraMem.capabilities() };
    let (hidden_size, peer) = (additive.hidden_size, of(Kind::Peer.capabilities()));
    vec![
        Dimensions { capabilities: v2, heads: 1, pre_dim: 192, shared, ..real.clone() },
        Dimensions { capabilities: gated, ..real.clone() },
        Dimensions { top_m: 250, ..real.clone() },
        real,
        odd,
        of(Kind::ProductKey.capabilities()),
        of(Kind::MemoryPlus.capabilities()),
        of(Capabilities { output_gated: true, ..Kind::LinguaMemoryPlus.capabilities() }),
        Dimensions { value_dim: hidden_size, pre_dim: hidden_size, ..peer },
    ]
}

/// Each stage by each of its strategies.
fn strategies() -> [Strategies; 6] {
    let (tile, matrix, cubek) = (ProjectStrategy::Tile, ProjectStrategy::Matrix, ProjectStrategy::Cubek);
    let split = |splits| ScoreStrategy::Split { splits };
    let by = |query, score, expand| Strategies { query, score, expand };
    [
        by(tile, ScoreStrategy::Whole, ExpandStrategy::Fused),
        by(tile, split(3), ExpandStrategy::Pooled(tile)),
        by(cubek, split(20), ExpandStrategy::Pooled(cubek)),
        by(cubek, split(2), ExpandStrategy::Fused),
        by(matrix, split(2), ExpandStrategy::Pooled(matrix)),
        by(matrix, ScoreStrategy::Filtered, ExpandStrategy::Pooled(matrix)),
    ]
}

const TOKENS: [usize; 6] = [1, 2, 9, 100, 1000, 4096];

#[test]
fn every_launch_of_a_forward_pass_is_its_plan() {
    for gpu in [Gpu::H100, Gpu::Rtx4090] {
        let device = tracing_device(gpu, Target::Cuda);
        for (dims, dtype) in layers().into_iter().zip([ElementType::F32, ElementType::BF16].into_iter().cycle()) {
            let config = MemoryConfig::new(dims).unwrap();
            let tracer = Tracer::new(&device, &config, dtype).unwrap();
            let layer = tracer.layer();
            // A sum a unit is planned for the norm of queries, be there one or not.
            let sums = usize::from(!config.capabilities.normalises_queries);
            for tokens in TOKENS {
                for strategies in strategies().into_iter().chain([layer.strategies(tokens)]) {
                    let what = format!("{gpu:?}, {:?}, {dtype}, {tokens} tokens, {strategies:?}", config.kind());
                    let found = layer.plans(tokens, strategies);
                    let of_config = config.plans(&Device::of(layer.client()), tokens, dtype, strategies);
                    assert_eq!(format!("{found:?}"), format!("{of_config:?}"), "{what}");
                    let plans = match found {
                        Ok(plans) => plans,
                        Err(error) => {
                            assert_ne!(strategies, layer.strategies(tokens), "{what}");
                            let refused = tracer.forward(tokens, Some(strategies)).map(drop).unwrap_err();
                            assert_eq!(refused.to_string(), error.to_string(), "{what}");
                            // The stages before it have run.
                            block_on(layer.client().sync()).unwrap();
                            device.take_reports();
                            continue;
                        }
                    };
                    let traced = tracer.forward(tokens, Some(strategies)).unwrap();
                    let stages: Vec<_> = traced.iter().filter(|it| kernel(&it.launch).is_some()).collect();
                    let plans = plans.launches();
                    assert!(plans.iter().map(|(stage, _)| *stage).eq(stages.iter().map(|it| it.stage)), "{what}");
                    let plans: Vec<_> = plans.into_iter().map(|(_, plan)| plan).collect();
                    let launches: Vec<_> = traced.into_iter().map(|it| it.launch).collect();
                    let cubek = ProjectStrategy::Cubek;
                    let cubek = strategies.query == cubek || strategies.expand == ExpandStrategy::Pooled(cubek);
                    assert_all_planned(&what, &plans, &launches, cubek, sums);
                }
            }
        }
    }
}

/// A layer whose tables and shuffle have so many pages each, one or three.
fn layer(
    client: &ComputeClient<OfflineRuntime>,
    config: &MemoryConfig,
    dtype: ElementType,
    pages: usize,
) -> MemoryLayer<OfflineRuntime> {
    let weights =
        LayerWeights::make(config, dtype, |name, shape, storage| Ok(empty(client, name, shape, storage)?)).unwrap();
    if pages == 1 {
        return MemoryLayer::from_device(client, config.clone(), weights).unwrap();
    }
    let cut = |rows: usize| [rows / 2, rows / 4, rows - rows / 2 - rows / 4];
    let table = |width: usize| {
        let page = |rows| empty(client, "page", &[rows, width], dtype.storage()).unwrap();
        ValueTable::from_pages(cut(config.table_rows()).map(page).to_vec()).unwrap()
    };
    let page = |entries| empty(client, "page", &[entries], u32_storage()).unwrap();
    let shuffle = if weights.shuffle.is_empty() { vec![] } else { cut(config.slots()).map(page).to_vec() };
    let pre_values = weights.pre_values.as_ref().map(|_| table(config.pre_dim));
    let weights = LayerWeights { shuffle, values: table(config.value_dim), pre_values, ..weights };
    MemoryLayer::from_device(client, config.clone(), weights).unwrap()
}

const RULES: [Rule; 4] = [
    Rule::Sgd { momentum: 0.0 },
    Rule::Sgd { momentum: 0.9 },
    Rule::Adagrad { eps: 1e-8 },
    Rule::Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, decoupled: true },
];

/// Holds a step of training over so many tokens: the forward pass that keeps what the backward pass needs, that one, and an update by each rule.
/// Returns the kernels.
fn assert_step(
    what: &str,
    device: &OfflineDevice,
    layer: &mut MemoryLayer<OfflineRuntime>,
    tokens: usize,
) -> BTreeSet<&'static str> {
    let (client, config) = (layer.client().clone(), layer.config().clone());
    let strategies = layer.saving_strategies(tokens);
    let product = if layer.dtype() == ElementType::F16 { ProjectStrategy::Tile } else { strategies.query };
    let bare = |launches: Vec<(&str, Launch)>| launches.into_iter().map(|(_, launch)| launch).collect::<Vec<_>>();
    let forward = bare(layer.plans(tokens, strategies).unwrap().launches());
    let backward = bare(layer.backward_plans(tokens).unwrap().launches());
    let states = |name| empty(&client, name, &[tokens, config.hidden_size], layer.dtype().storage()).unwrap();
    let (input, grad_output) = (states("input"), states("gradient of the output"));
    taken(&client, device);
    let (_, saved) = layer.forward_saving(&input).unwrap();
    let sums = usize::from(!config.capabilities.normalises_queries);
    let cubek = strategies.query == ProjectStrategy::Cubek || tokens == 0;
    assert_all_planned(&format!("{what}, forward"), &forward, &taken(&client, device), cubek, sums);
    let gradients = layer.backward(&input, &saved, &grad_output).unwrap();
    // Of no tokens, CubeCL fills the weights' gradients with zeros.
    let cubek = product == ProjectStrategy::Cubek || tokens == 0;
    let launches = taken(&client, device);
    assert_all_planned(&format!("{what}, backward"), &backward, &launches, cubek, 0);
    let mut kernels: BTreeSet<_> = forward.iter().chain(&backward).map(|plan| plan.kernel).collect();
    for rule in RULES {
        let what = format!("{what}, {rule:?}");
        let plans = layer.update_plans(tokens, &rule).unwrap().launches();
        kernels.extend(plans.iter().map(|plan| plan.kernel));
        let mut values = layer.value_optimiser(rule).unwrap();
        let mut pre_values = gradients.pre_values.as_ref().map(|_| layer.pre_value_optimiser(rule).unwrap());
        taken(&client, device);
        layer.update_values(&mut values, &gradients.values, &Step::new(0.1)).unwrap();
        for (optimiser, gradients) in pre_values.iter_mut().zip(&gradients.pre_values) {
            layer.update_pre_values(optimiser, gradients, &Step::new(0.1)).unwrap();
        }
        assert_all_planned(&what, &plans, &taken(&client, device), false, 0);
    }
    kernels
}

/// All kernels of a training step.
const KERNELS: [&str; 40] = [
    "accumulate_kernel",
    "adagrad_kernel",
    "adam_kernel",
    "add_bias_kernel",
    "add_kernel",
    "add_parts_kernel",
    "approximate_kernel",
    "approximate_matrix_kernel",
    "cast_kernel",
    "column_sum_kernel",
    "combine_kernel",
    "count_heads_kernel",
    "count_kernel",
    "expand_kernel",
    "filter_keys_kernel",
    "finish_backward_kernel",
    "finish_kernel",
    "gate_backward_kernel",
    "grad_core_kernel",
    "grad_queries_kernel",
    "grad_sides_kernel",
    "list_keys_kernel",
    "locate_kernel",
    "matrix_kernel",
    "norm_backward_kernel",
    "outer_kernel",
    "pool_kernel",
    "project_kernel",
    "retrieve_kernel",
    "round_kernel",
    "row_products_kernel",
    "scatter_kernel",
    "score_kernel",
    "select_keys_kernel",
    "sgd_kernel",
    "shuffle_kernel",
    "sum_blocks_kernel",
    "sum_rows_kernel",
    "weigh_backward_kernel",
    "weigh_kernel",
];

#[test]
fn every_launch_of_a_training_step_is_its_plan() {
    let device = tracing_device(Gpu::H100, Target::Cuda);
    let client = OfflineRuntime::client(&device);
    let mut kernels = BTreeSet::new();
    let dtypes = [ElementType::F32, ElementType::BF16, ElementType::F16];
    for (at, dims) in layers().into_iter().enumerate() {
        let config = MemoryConfig::new(dims).unwrap();
        for (dtype, pages) in dtypes.map(|dtype| (dtype, 1)).into_iter().chain([(dtypes[at % 3], 3)]) {
            let mut layer = layer(&client, &config, dtype, pages);
            for tokens in [0, 1, 64, 301, 2049] {
                let what = format!("{:?}, layer {at}, {dtype}, {pages} pages, {tokens} tokens", config.kind());
                kernels.extend(assert_step(&what, &device, &mut layer, tokens));
            }
        }
    }
    assert_eq!(kernels.into_iter().collect::<Vec<_>>(), KERNELS);
}

#[test]
fn a_layer_with_one_page_has_the_plans_of_its_config() {
    let device = tracing_device(Gpu::H100, Target::Cuda);
    let client = OfflineRuntime::client(&device);
    let of_client = Device::of(&client);
    for dims in layers() {
        let config = MemoryConfig::new(dims).unwrap();
        let layer = layer(&client, &config, ElementType::F32, 1);
        for tokens in [0, 1, 301] {
            let product = layer.strategies(tokens).query;
            let plans = config.backward_plans(&of_client, tokens, ElementType::F32, product).unwrap();
            assert_eq!(plans, layer.backward_plans(tokens).unwrap());
            for rule in RULES {
                let plans = config.update_plans(&of_client, tokens, &rule).unwrap();
                assert_eq!(plans, layer.update_plans(tokens, &rule).unwrap());
            }
        }
    }
}

#[test]
fn a_page_is_a_launch() {
    let device = tracing_device(Gpu::H100, Target::Cuda);
    let client = OfflineRuntime::client(&device);
    let config = MemoryConfig::new(layers().swap_remove(0)).unwrap();
    let layer = layer(&client, &config, ElementType::F32, 3);
    taken(&client, &device);
    for tokens in [0, 1, 4096] {
        let input = empty(&client, "input", &[tokens, config.hidden_size], layer.dtype().storage()).unwrap();
        let plans = layer.plans(tokens, layer.strategies(tokens)).unwrap().launches();
        layer.forward(&input).unwrap();
        let plans: Vec<_> = plans.into_iter().map(|(_, plan)| plan).collect();
        assert_all_planned(&format!("{tokens} tokens"), &plans, &taken(&client, &device), false, 0);
        for (kernel, tables) in [("pool_kernel", 1), ("weigh_kernel", 1), ("shuffle_kernel", 2)] {
            let launches = plans.iter().filter(|plan| plan.kernel == kernel).count();
            assert_eq!(launches, if tokens == 0 { 0 } else { 3 * tables }, "{kernel}");
        }
    }
}

#[test]
fn the_stages_of_a_backward_pass_are_those_of_its_plans() {
    let device = tracing_device(Gpu::H100, Target::Cuda);
    for dims in layers() {
        let config = MemoryConfig::new(dims).unwrap();
        let mut tracer = Tracer::new(&device, &config, ElementType::F32).unwrap();
        let traced = tracer.training(64, &[]).unwrap();
        let found: Vec<_> = traced.iter().filter_map(|it| Some((it.stage, kernel(&it.launch)?))).collect();
        let plans = tracer.layer().backward_plans(64).unwrap().launches();
        let planned: Vec<_> = plans.iter().map(|(stage, plan)| (*stage, plan.kernel)).collect();
        assert_eq!(found, planned, "{:?}", config.kind());
    }
}

#[test]
fn lists_of_rows_are_joined_as_planned() {
    let device = tracing_device(Gpu::H100, Target::Cuda);
    let client = OfflineRuntime::client(&device);
    let of_client = Device::of(&client);
    for (capacity, rows, width) in
        [(1, 1, 1), (64, 1000, 13), (301, 100, 48), (70_001, 1 << 20, 64), (1 << 25, 1 << 20, 1)]
    {
        let what = format!("{capacity} of {rows} rows of {width}");
        let listed = empty(&client, "rows", &[capacity], u32_storage()).unwrap();
        let count = empty(&client, "count", &[1], u32_storage()).unwrap();
        let gradients = empty(&client, "gradients", &[capacity, width], ElementType::F32.storage()).unwrap();
        taken(&client, &device);
        let one = RowGradients::new(&client, &listed, &count, &gradients, rows).unwrap();
        let plans = JoinPlans::of(&of_client, &[capacity], rows, width).launches();
        assert_all_planned(&what, &plans, &taken(&client, &device), false, 0);
        let capacities = [one.rows().shape()[0]; 2];
        let sum = RowGradients::sum(&client, &[one.clone(), one], rows).unwrap();
        let plans = JoinPlans::of(&of_client, &capacities, rows, width).launches();
        assert_all_planned(&what, &plans, &taken(&client, &device), false, 0);
        sum.dense(&client, rows).unwrap();
        let plan = ScatterPlan::of(&of_client, sum.rows().shape()[0], rows, width).launch;
        // CubeCL fills the table with zeros first.
        assert_all_planned(&what, &[plan], &taken(&client, &device), true, 0);
    }
}
