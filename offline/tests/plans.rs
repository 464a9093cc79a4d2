//! The plans of a forward pass are its launches: kernel, cubes, units and shared memory, for layers of the whole family, by every strategy, on
//! two GPUs; tables in pages; and where the plan is an error, so is the pass.

use cubecl::Runtime;
use cubecl::client::ComputeClient;
use cubecl::future::block_on;
use ultramem::kernels::launch::{Device, Launch};
use ultramem::kernels::{NormPlan, NormSizes, SortPlans, WeightTiles, empty, u32_storage};
use ultramem::kernels::{expand::ExpandStrategy, linear::ProjectStrategy, score::ScoreStrategy};
use ultramem::{
    Capabilities, Dimensions, ElementType, Kind, LayerWeights, MemoryConfig, MemoryLayer, Norm, SharedTable,
    Strategies, ValueTable,
};
use ultramem_offline::trace::{Tracer, tracing_device};
use ultramem_offline::{Gpu, LaunchReport, OfflineRuntime, Target};

/// Kernels that give each unit a number and have nothing else to choose.
const PLAIN: [&str; 3] = ["add_bias_kernel", "finish_kernel", "shuffle_kernel"];

/// The kernel of a launch by its function's name; none for cubek's and those that are not planned.
fn kernel(launch: &LaunchReport) -> Option<&str> {
    let own = launch.kernel.name.split("::").find(|part| part.ends_with("_kernel"));
    own.filter(|name| launch.kernel.name.contains("ultramem") && !PLAIN.contains(name))
}

/// Bytes by which the shared memory of a launch may differ from its plan's: what lies between arrays, of which each begins at a multiple of its
/// vectors' bytes, and arrays of one number that a variant of the kernel never touches.
const PADDING: usize = 32;

/// Holds a launch against its plan, which may count up to `words` words a unit of shared memory that a variant of the kernel does not touch.
fn assert_planned(what: &str, plan: &Launch, launch: &LaunchReport, words: usize) {
    let what = format!("{what}: {plan:?}");
    assert_eq!(Some(plan.kernel), kernel(launch), "{what}");
    assert_eq!(launch.kernel.dim, [plan.units as u32, 1, 1], "{what}");
    assert_eq!(launch.count.iter().map(|&count| count as usize).product::<usize>(), plan.cubes, "{what}");
    let (shared, most) = (launch.kernel.shared, plan.shared_bytes + PADDING);
    assert!((shared..=shared + 2 * PADDING + 4 * words * plan.units).contains(&most), "{what}: {shared} bytes");
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
fn strategies() -> [Strategies; 4] {
    let (tile, cubek) = (ProjectStrategy::Tile, ProjectStrategy::Cubek);
    let split = |splits| ScoreStrategy::Split { splits };
    let by = |query, score, expand| Strategies { query, score, expand };
    [
        by(tile, ScoreStrategy::Whole, ExpandStrategy::Fused),
        by(tile, split(3), ExpandStrategy::Pooled(tile)),
        by(cubek, split(20), ExpandStrategy::Pooled(cubek)),
        by(cubek, split(2), ExpandStrategy::Fused),
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
                    let launches = tracer.forward(tokens, Some(strategies)).unwrap();
                    let launches: Vec<_> = launches.iter().filter(|it| kernel(&it.launch).is_some()).collect();
                    assert_eq!(launches.len(), plans.launches().len(), "{what}");
                    for ((stage, plan), traced) in plans.launches().iter().zip(launches) {
                        assert_eq!(*stage, traced.stage, "{what}");
                        assert_planned(&what, plan, &traced.launch, sums);
                    }
                }
            }
        }
    }
}

/// A layer whose tables and shuffle have three pages.
fn paged(client: &ComputeClient<OfflineRuntime>, config: &MemoryConfig) -> MemoryLayer<OfflineRuntime> {
    let dtype = ElementType::F32;
    let weights =
        LayerWeights::make(config, dtype, |name, shape, storage| Ok(empty(client, name, shape, storage)?)).unwrap();
    let cut = |rows: usize| [rows / 2, rows / 4, rows - rows / 2 - rows / 4];
    let table = |width: usize| {
        let page = |rows| empty(client, "page", &[rows, width], dtype.storage()).unwrap();
        ValueTable::from_pages(cut(config.table_rows()).map(page).to_vec()).unwrap()
    };
    let page = |entries| empty(client, "page", &[entries], u32_storage()).unwrap();
    let shuffle = cut(config.slots()).map(page).to_vec();
    let pre_values = weights.pre_values.as_ref().map(|_| table(config.pre_dim));
    let weights = LayerWeights { shuffle, values: table(config.value_dim), pre_values, ..weights };
    MemoryLayer::from_device(client, config.clone(), weights).unwrap()
}

#[test]
fn a_page_is_a_launch() {
    let device = tracing_device(Gpu::H100, Target::Cuda);
    let client = OfflineRuntime::client(&device);
    let config = MemoryConfig::new(layers().swap_remove(0)).unwrap();
    let layer = paged(&client, &config);
    block_on(client.sync()).unwrap();
    device.take_reports();
    for tokens in [0, 1, 4096] {
        let input = empty(&client, "input", &[tokens, config.hidden_size], layer.dtype().storage()).unwrap();
        let plans = layer.plans(tokens, layer.strategies(tokens)).unwrap().launches();
        layer.forward(&input).unwrap();
        block_on(client.sync()).unwrap();
        let launches = device.take_reports();
        let launches: Vec<_> = launches.iter().filter(|launch| kernel(launch).is_some()).collect();
        assert_eq!(launches.len(), plans.len(), "{tokens} tokens");
        let pools = plans.iter().filter(|(_, plan)| plan.kernel == "pool_kernel").count();
        assert_eq!(pools, if tokens == 0 { 0 } else { 3 });
        for ((_, plan), launch) in plans.iter().zip(launches) {
            assert_planned(&format!("{tokens} tokens"), plan, launch, 0);
        }
    }
}

/// The sorts, norms and outer products of a backward pass, whose plans the model of cost takes, too, stage by stage.
fn backward_plans(device: &Device, config: &MemoryConfig, tokens: usize) -> Vec<(&'static str, Vec<Launch>)> {
    let (entries, keys) = (tokens * config.heads * config.top_m, config.heads * 2 * config.side_keys);
    let of = &config.capabilities;
    let sort = |entries, limit| SortPlans::of(device, entries, limit).launches();
    let outer = |there: bool, m, n| there.then(|| WeightTiles::of(device, tokens, m, n).outer.launch);
    let norm = |there: bool, groups, step, listed| {
        let sizes = NormSizes { norm: config.norm, groups, size: config.key_dim, step, listed };
        there.then(|| NormPlan::of(device, &sizes).launch)
    };
    let hidden_size = config.hidden_size;
    let queries = norm(of.normalises_queries, tokens * config.query_pairs() * 2, 1, false);
    let of_keys = norm(of.normalises_keys, keys.min(2 * entries), config.tucker_rank, true);
    let score = queries.into_iter().chain(sort(2 * entries, keys)).chain(of_keys).collect();
    let expand = outer(of.projects, hidden_size, config.pooled_dim());
    let maps = [
        (true, config.query_pairs() * 2 * config.key_dim),
        (of.weigh.is_some_and(|weigh| weigh.projected), config.pre_dim),
        (of.gated, config.value_dim),
        (of.output_gated, 1),
    ];
    let maps = maps.into_iter().filter_map(|(there, width)| outer(there, width, hidden_size)).collect();
    let expand = sort(entries, config.table_rows()).into_iter().chain(expand).collect();
    vec![("expand-backward", expand), ("score-backward", score), ("query-backward", maps)]
}

#[test]
fn the_sorts_norms_and_outer_products_of_a_backward_pass_are_their_plans() {
    let device = tracing_device(Gpu::H100, Target::Cuda);
    for dims in layers() {
        let config = MemoryConfig::new(dims).unwrap();
        let mut tracer = Tracer::new(&device, &config, ElementType::F32).unwrap();
        for tokens in [1, 300, 4096] {
            let what = format!("{:?}, {tokens} tokens", config.kind());
            let launches = tracer.training(tokens, &[]).unwrap();
            for (stage, plans) in backward_plans(&Device::of(tracer.layer().client()), &config, tokens) {
                let planned = |name: &str| plans.iter().any(|plan| plan.kernel == name);
                let of_stage =
                    launches.iter().filter(|it| it.stage == stage && kernel(&it.launch).is_some_and(planned));
                let of_stage: Vec<_> = of_stage.collect();
                assert_eq!(of_stage.len(), plans.len(), "{what}, {stage}");
                for (plan, traced) in plans.iter().zip(of_stage) {
                    // A norm's parts are planned in vectors of four, be they narrower or not.
                    let parts = if plan.kernel == "norm_backward_kernel" { 3 } else { 0 };
                    assert_planned(&format!("{what}, {stage}"), plan, &traced.launch, parts);
                }
            }
        }
    }
}
