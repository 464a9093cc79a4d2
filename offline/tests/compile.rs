//! Every kernel that a layer launches, by every strategy and in every element type, compiles for four architectures: without
//! spills and stack but those that are listed with their reason, within the shared memory, and with loads of value rows as wide
//! as a row allows. NVRTC and `ptxas` are needed: `./scripts/cuda-tools`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use cubecl::Runtime;
use cubecl::future::block_on;
use ultramem::kernels::expand::{Memory, pool};
use ultramem::kernels::{RowSource, empty, top_m, u32_storage};
use ultramem::kernels::{expand::ExpandStrategy, linear::ProjectStrategy, optimiser::Rule, score::ScoreStrategy};
use ultramem::{
    Capabilities, Chosen, Dimensions, ElementType, Kind, MemoryConfig, Norm, RowGradients, SharedTable, Strategies,
};
use ultramem_offline::compile::{Architecture, Compiled, Resources, compile, compile_all};
use ultramem_offline::trace::{Traced, Tracer, step, tracing_device};
use ultramem_offline::{Argument, Kernel, LaunchReport, OfflineDevice, OfflineRuntime, Target, table};
use ultramem_versus::kernels::route;
use ultramem_versus::{Design, Plan, Scale};

/// Enough for whole tiles and matrix units.
const TOKENS: usize = 1000;
const TYPES: [ElementType; 3] = [ElementType::F32, ElementType::F16, ElementType::BF16];

/// Stack and spills that are known: the beginning of the entry point, the most bytes of a thread, and why.
const KNOWN: [(&str, usize, &str); 20] = [
    // `ptxas` stops at 32, 40, 56, 64, 80 or 128 registers of 255, for more warps at once, and keeps these few words on the stack.
    ("prepare_kernel", 8, OCCUPANCY),
    ("project_kernel", 16, OCCUPANCY),
    ("score_kernel", 72, OCCUPANCY),
    ("approximate_kernel", 12, OCCUPANCY),
    ("approximate_matrix_kernel", 8, OCCUPANCY),
    (
        "filter_keys_kernel",
        556,
        "512 units of a cube leave 128 registers; sums of a tile and the keys under way take more on compute capability 10.0, and at rank 1. With them the launch \
         is predicted to take half of what two take without",
    ),
    ("retrieve_kernel", 16, OCCUPANCY),
    ("pool_kernel", 16, OCCUPANCY),
    (
        "expand_kernel",
        112,
        "1,024 units of a cube, at few tokens, leave 64 registers, and sums of a projection take about as many",
    ),
    ("outer_kernel", 16, OCCUPANCY),
    ("sum_blocks_kernel", 32, OCCUPANCY),
    ("norm_backward_kernel", 8, OCCUPANCY),
    ("grad_queries_kernel", 8, OCCUPANCY),
    ("grouped_product_kernel", 32, OCCUPANCY),
    ("attention_kernel", 32, OCCUPANCY),
    ("matmul_entry_lhs_f32_lhs_size_4_rhs_f32", 272, UNITS),
    ("matmul_entry_lhs_f32_lhs_size_1_rhs_f32", 136, UNITS),
    ("matmul_entry_lhs_bf16_lhs_size_8_rhs_bf16", 700, CROWDED),
    ("matmul_entry_lhs_f16_lhs_size_8_rhs_f16", 700, CROWDED),
    (
        "matmul_entry_lhs_bf16_lhs_size_1_rhs_bf16",
        1000,
        "cubek: rows that are no whole vectors are staged number by number",
    ),
];
const OCCUPANCY: &str = "ptxas trades a few words for more warps at once";
const UNITS: &str =
    "cubek without matrix units: what a thread stages and its tile of the product are more than ptxas gives registers";
const CROWDED: &str = "cubek: 512 threads of a block leave 128 registers for its fragments and what it stages";

/// Value rows that are known to be loaded in parts: the entry point's beginning and where.
const NARROW: [(&str, Architecture, &str); 2] =
    [("row_products_kernel_e_f32", Architecture::Sm100, SPLIT), ("accumulate_kernel", Architecture::Sm100, SPLIT)];
const SPLIT: &str =
    "NVRTC 12.8 cuts every second unrolled load of four f32 into 4, 4 and 8 bytes there, and nowhere else";

/// The preset in its widths, with a smaller table, so that optimisers' states are small too.
fn real() -> Dimensions {
    Dimensions { side_keys: 256, ..Dimensions::ultramem_v1_1b() }
}

/// Layers that launch every variant of every kernel, and where: all types of the real one on all architectures, what the other
/// kinds, LayerNorm and odd widths add on fewer.
fn layers(architecture: Architecture) -> Vec<(Dimensions, ElementType)> {
    let product_keys = Dimensions { tucker_rank: 1, cores: 1, expansion: 1, ..real() };
    let memory_plus = Dimensions { capabilities: Kind::MemoryPlus.capabilities(), ..product_keys.clone() };
    let odd =
        Dimensions { hidden_size: 13, side_keys: 34, key_dim: 7, top_m: 5, value_dim: 22, norm: Norm::Layer, ..real() };
    let mut layers: Vec<_> = TYPES.map(|dtype| (real(), dtype)).to_vec();
    layers.push((memory_plus.clone(), ElementType::BF16));
    if architecture == Architecture::Sm90a {
        layers.extend([ElementType::F32, ElementType::F16].map(|dtype| (memory_plus.clone(), dtype)));
        layers.push((Dimensions { capabilities: Kind::ProductKey.capabilities(), ..product_keys }, ElementType::F32));
        layers.extend([ElementType::F32, ElementType::BF16].map(|dtype| (odd.clone(), dtype)));
        layers.extend(family().into_iter().map(|dims| (dims, ElementType::BF16)));
    }
    layers
}

/// What the other capabilities add: UltraMemV2, lingua's Memory+ with both gates, PEER.
fn family() -> [Dimensions; 3] {
    let shared = Some(SharedTable { rows: 1 << 16, offset: 1 << 15 });
    let v2 = Dimensions { capabilities: Kind::UltraMemV2.capabilities(), heads: 1, pre_dim: 192, shared, ..real() };
    let additive = Dimensions { tucker_rank: 1, cores: 1, expansion: 1, ..real() };
    let gates = Capabilities { output_gated: true, ..Kind::LinguaMemoryPlus.capabilities() };
    let (capabilities, hidden_size) = (Kind::Peer.capabilities(), additive.hidden_size);
    let peer = Dimensions { capabilities, value_dim: hidden_size, pre_dim: hidden_size, ..additive.clone() };
    [v2, Dimensions { capabilities: gates, ..additive }, peer]
}

/// Each stage by each of its strategies.
fn strategies() -> [Strategies; 4] {
    let (tile, matrix, cubek) = (ProjectStrategy::Tile, ProjectStrategy::Matrix, ProjectStrategy::Cubek);
    let whole = ScoreStrategy::Whole;
    [
        Strategies { query: tile, score: whole, expand: ExpandStrategy::Fused },
        Strategies { query: tile, score: ScoreStrategy::Split { splits: 2 }, expand: ExpandStrategy::Pooled(tile) },
        Strategies { query: cubek, score: whole, expand: ExpandStrategy::Pooled(cubek) },
        Strategies { query: matrix, score: ScoreStrategy::Filtered, expand: ExpandStrategy::Pooled(matrix) },
    ]
}

const RULES: [Rule; 4] = [
    Rule::Sgd { momentum: 0.0 },
    Rule::Sgd { momentum: 0.9 },
    Rule::Adagrad { eps: 1e-8 },
    Rule::Adam { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1, decoupled: true },
];

/// One launch, what its layer is, and what it compiles to.
struct Case {
    about: String,
    architecture: Architecture,
    traced: Traced,
    /// Bytes of the value table, and of a row's slice that one core scores.
    table: u64,
    slice: usize,
    compiled: Compiled,
}

impl Case {
    fn kernel(&self) -> &Kernel {
        &self.traced.launch.kernel
    }
}

/// Every launch on every architecture; launches of the same source once.
fn cases(architectures: &[Architecture]) -> Vec<Case> {
    let mut found: BTreeMap<(Architecture, String), (String, Traced, u64, usize)> = BTreeMap::new();
    for &architecture in architectures {
        let device = tracing_device(architecture.gpu(), Target::Cuda);
        for (dims, dtype) in layers(architecture) {
            let config = MemoryConfig::new(dims).unwrap();
            let (table, slice) = (config.rows() * config.value_dim, config.value_dim / config.cores);
            let sizes = ((table * dtype.size()) as u64, slice * dtype.size());
            for traced in launches(&device, &config, dtype) {
                let about = format!("{:?} layer, {dtype}, {}", config.kind(), traced.stage);
                let key = (architecture, traced.launch.kernel.source.clone());
                found.entry(key).or_insert((about, traced, sizes.0, sizes.1));
            }
        }
        for (plan, dtype, batch) in steps() {
            for traced in step(&device, &plan, dtype, batch, cached(batch)).unwrap() {
                let about = format!("{} step, {dtype}, batch {batch}", plan.design.name());
                let key = (architecture, traced.launch.kernel.source.clone());
                // No buffer is the size of this table, which is none.
                found.entry(key).or_insert((about, traced, u64::MAX - 512, 1));
            }
        }
    }
    let kernels: Vec<_> =
        found.iter().map(|((architecture, _), (_, traced, ..))| (&*traced.launch.kernel, *architecture)).collect();
    let compiled = compile_all(&kernels).unwrap();
    let with = |(((architecture, _), (about, traced, table, slice)), compiled)| Case {
        about,
        architecture,
        traced,
        table,
        slice,
        compiled,
    };
    found.into_iter().zip(compiled).map(with).collect()
}

/// What a mixture's and a dense model's decoding steps launch beside the stages: one block of the paper's smallest model, with
/// ten experts, at few tokens, at some for each expert, at more than one cube groups and at hundreds for each expert.
fn steps() -> Vec<(Plan, ElementType, usize)> {
    let scale = Scale { blocks: 1, memory_layers: 1, activated: 14_600_000, sparse: 41_500_000, ..Scale::paper_151m() };
    let plans = [Design::Dense, Design::Moe].map(|design| Plan::new(design, &scale).unwrap());
    let each = |plan: &Plan| TYPES.map(|dtype| [1, 16, 300, 4000].map(|batch| (plan.clone(), dtype, batch)));
    plans.iter().flat_map(each).flatten().collect()
}

/// Positions of a cache of keys that one binding of every target holds.
fn cached(batch: usize) -> usize {
    1024.min(300_000 / batch)
}

/// Storage buffers that a browser binds to a kernel, but for the one in which CubeCL hands over scalars and lengths.
const BINDINGS: usize = 8 - 1;

/// The kernels of `ultramem-kernels`, by their source.
fn kernel_names(folder: &Path) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            names.extend(kernel_names(&path));
            continue;
        }
        let source = std::fs::read_to_string(&path).unwrap();
        let launched = source.split("#[cube(launch").skip(1);
        let name =
            |it: &str| it.split_once("fn ").and_then(|(_, rest)| rest.split(['(', '<']).next()).map(String::from);
        names.extend(launched.filter_map(name));
    }
    names
}

/// What no layer and no step launches: routing without a product, a gradient of the whole table, the sort of more entries than one cube
/// adds up, and a shuffle in pages.
fn others(device: &OfflineDevice) -> Vec<LaunchReport> {
    let client = OfflineRuntime::client(device);
    let tensor = |shape: &[usize], storage| empty(&client, "tensor", shape, storage).unwrap();
    let float = ElementType::F32.storage();
    route(&client, &tensor(&[64, 8], float), 2).unwrap();
    top_m(&client, &tensor(&[64, 80], float), 8).unwrap();
    let (entries, rows) = (1 << 25, 1 << 20);
    let (listed, count) = (tensor(&[entries], u32_storage()), tensor(&[1], u32_storage()));
    let gradients = RowGradients::new(&client, &listed, &count, &tensor(&[entries, 1], float), rows).unwrap();
    gradients.dense(&client, rows).unwrap();
    // A shuffle in pages.
    let shuffle = [tensor(&[40], u32_storage()), tensor(&[24], u32_storage())];
    let memory = Memory {
        values: &[tensor(&[64, 8], float)],
        rows: RowSource::own(&shuffle, 1, 64),
        weight: None,
        bias: None,
        gate: None,
        output_gate: None,
    };
    let chosen = Chosen { slots: tensor(&[4, 2, 8], u32_storage()), scores: tensor(&[4, 2, 8, 1], float) };
    pool(&client, &chosen, &memory, false).unwrap();
    block_on(client.sync()).unwrap();
    device.take_reports()
}

/// Of every kernel there is, on CUDA and as a browser gets it.
#[test]
fn every_kernel_binds_no_more_buffers_than_a_browser_allows() {
    let mut unseen = kernel_names(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../kernels/src")));
    assert!(unseen.len() > 40 && unseen.contains("retrieve_kernel"), "{unseen:?}");
    let targets = [
        Target::Cuda,
        #[cfg(feature = "wgpu")]
        Target::Wgsl,
    ];
    let mut complaints = BTreeSet::new();
    for target in targets {
        let device = tracing_device(Architecture::Sm90a.gpu(), target);
        let client = OfflineRuntime::client(&device);
        let mut traced = Vec::new();
        let supported = |dtype: ElementType| client.properties().supports_type(dtype.storage());
        for (dims, dtype) in layers(Architecture::Sm90a).into_iter().filter(|(_, dtype)| supported(*dtype)) {
            traced.extend(launches(&device, &MemoryConfig::new(dims).unwrap(), dtype));
        }
        for (plan, dtype, batch) in steps().into_iter().filter(|(_, dtype, _)| supported(*dtype)) {
            traced.extend(step(&device, &plan, dtype, batch, cached(batch)).unwrap());
        }
        let traced = traced.into_iter().map(|it: Traced| it.launch);
        for launch in traced.chain(others(&device)) {
            unseen.retain(|name| !launch.kernel.name.split("::").any(|part| part == name));
            let bound = launch.kernel.buffers.len();
            if bound > BINDINGS {
                complaints.insert(format!("{} binds {bound}", launch.kernel.name));
            }
        }
    }
    assert!(complaints.is_empty(), "more than {BINDINGS} buffers: {complaints:#?}");
    assert!(unseen.is_empty(), "not launched, so not counted: {unseen:?}");
}

fn launches(device: &OfflineDevice, config: &MemoryConfig, dtype: ElementType) -> Vec<Traced> {
    let mut tracer = Tracer::new(device, config, dtype).unwrap();
    let mut launches = tracer.prepare().to_vec();
    launches.extend(tracer.forward(1, None).unwrap());
    let of = &config.capabilities;
    let fuses = of.projects && !of.biased && !of.output_gated;
    let matrix = ProjectStrategy::Matrix;
    let multiplies = !OfflineRuntime::client(device).properties().features.matmul.mma.is_empty();
    let on_units = |it: &Strategies| it.query == matrix || it.expand == ExpandStrategy::Pooled(matrix);
    let possible = strategies().into_iter().filter(|it| multiplies || !on_units(it));
    for strategies in possible.filter(|it| fuses || it.expand != ExpandStrategy::Fused) {
        launches.extend(tracer.forward(1, Some(strategies)).unwrap());
        launches.extend(tracer.forward(TOKENS, Some(strategies)).unwrap());
    }
    launches.extend(tracer.forward(4096, None).unwrap());
    launches.extend(tracer.training(TOKENS, &RULES).unwrap());
    launches.extend(tracer.sum(TOKENS).unwrap());
    launches
}

/// What is wrong with a kernel, in words.
fn complaints(case: &Case) -> Vec<String> {
    let kernel = case.kernel();
    let mut found = over_memory(kernel, &case.compiled.resources, case.architecture);
    found.extend(narrow_rows(case));
    found
        .into_iter()
        .map(|what| format!("{} ({}) on {}: {what}", kernel.entry, case.about, case.architecture))
        .collect()
}

fn over_memory(kernel: &Kernel, resources: &Resources, architecture: Architecture) -> Vec<String> {
    let mut found = Vec::new();
    let spilt = resources.stack.max(resources.spill_stores).max(resources.spill_loads);
    let known = KNOWN.iter().filter(|(entry, ..)| kernel.entry.starts_with(entry)).map(|(_, most, _)| *most).max();
    if spilt > known.unwrap_or(0) {
        found.push(format!(
            "{spilt} bytes of stack or spills at {} registers, {} are known",
            resources.registers,
            known.unwrap_or(0)
        ));
    }
    let (shared, limit) = (kernel.shared + resources.shared, architecture.gpu().specification().shared_per_block);
    if shared > limit {
        found.push(format!("{shared} bytes of shared memory, {limit} are there"));
    }
    found
}

/// Loads of the value table that are narrower than 16 bytes where a core's slice of a row is whole loads of 16.
fn narrow_rows(case: &Case) -> Vec<String> {
    let lengths = case.traced.launch.lengths.iter().zip(&case.kernel().buffers).enumerate();
    // The table is known by its size, which no other buffer of these layers has.
    let tables = lengths.filter(|(_, (length, argument))| {
        !argument.writable && **length >= case.table && **length < case.table + 512 && argument.element != "uint32"
    });
    let widths = tables.filter_map(|(at, _)| Some((at, case.compiled.resources.loads.get(&at)?)));
    let known = |entry: &str| NARROW.iter().any(|(it, on, _)| entry.starts_with(it) && *on == case.architecture);
    if known(&case.kernel().entry) {
        return Vec::new();
    }
    let narrow = widths.filter(|(_, widths)| case.slice.is_multiple_of(16) && widths.iter().any(|&width| width < 16));
    narrow.map(|(at, widths)| format!("value rows, buffer {at}, are loaded by {widths:?} bytes")).collect()
}

#[test]
fn every_kernel_compiles_without_spills_and_loads_rows_whole() {
    let cases = cases(&Architecture::ALL);
    let complaints: Vec<String> = cases.iter().flat_map(complaints).collect();
    assert!(complaints.is_empty(), "{} of {} kernels:\n{}", complaints.len(), cases.len(), complaints.join("\n"));
    for entry in [
        "prepare",
        "transpose",
        "project",
        "score",
        "approximate",
        "approximate_matrix",
        "filter_keys",
        "select_keys",
        "combine",
        "retrieve",
        "expand",
        "pool",
        "row_products",
        "matmul",
        "matrix",
        "norm_backward",
        "sum_rows",
        "join_rows",
        "top_m",
        "count",
        "group",
        "grouped_product",
        "grouped_matrix",
        "weighted_sum",
        "activate",
        "attention",
        "merge_attention",
        "residual",
        "random",
    ] {
        let of_entry = cases.iter().filter(|case| case.kernel().entry.starts_with(entry));
        assert!(of_entry.count() >= Architecture::ALL.len(), "no kernel {entry}");
    }
    let on_rows = cases.iter().filter(|case| case.slice.is_multiple_of(16) && !widths_of_rows(case).is_empty());
    assert!(on_rows.count() >= 3 * Architecture::ALL.len(), "the loads of value rows are not seen");
}

fn widths_of_rows(case: &Case) -> Vec<usize> {
    let loads = &case.compiled.resources.loads;
    let entry = &case.kernel().entry;
    let rows = entry.starts_with("pool_kernel") || entry.starts_with("expand_kernel");
    loads.get(&3).filter(|_| rows).into_iter().flatten().copied().collect()
}

/// A kernel of our own to break.
fn kernel(body: &str, threads: u32, shared: usize) -> Kernel {
    let source = format!(
        "struct info_st {{ unsigned scalars[2]; }};\nextern \"C\" __global__ void __launch_bounds__({threads}) broken(const float* \
         __restrict__ buffer_0, float* buffer_1, const __grid_constant__ info_st info) {{\n{body}\n}}\n"
    );
    let argument = |writable| Argument { element: "float".into(), size: 4, writable };
    Kernel {
        name: "broken".into(),
        entry: "broken".into(),
        source,
        binary: None,
        dim: [threads, 1, 1],
        shared,
        buffers: vec![argument(false), argument(true)],
        info: 8,
    }
}

#[test]
fn a_kernel_that_spills_is_caught() {
    // 128 sums a thread, where 1,024 threads of a block leave 64 registers.
    let body = "float sums[128];\n#pragma unroll\nfor (int i = 0; i < 128; ++i) sums[i] = buffer_0[i * 77];\n\
                for (unsigned k = 0; k < info.scalars[0]; ++k) {\nfloat x = buffer_0[k];\n#pragma unroll\n\
                for (int i = 0; i < 128; ++i) sums[i] = sums[i] * x + sums[(i + 1) % 128];\n}\n#pragma unroll\n\
                for (int i = 0; i < 128; ++i) buffer_1[threadIdx.x * 128 + i] = sums[i];";
    let kernel = kernel(body, 1024, 0);
    let resources = compile(&kernel, Architecture::Sm90a).unwrap().resources;
    assert!(resources.spill_stores > 0 && resources.registers <= 64, "{resources:?}");
    assert_eq!(over_memory(&kernel, &resources, Architecture::Sm90a).len(), 1);
}

#[test]
fn an_array_that_is_indexed_at_run_time_is_caught() {
    let body = "float sums[64];\nfor (int i = 0; i < 64; ++i) sums[i] = 0.0f;\n\
                for (unsigned k = 0; k < info.scalars[0]; ++k) sums[unsigned(buffer_0[k]) % 64] += buffer_0[k + 1];\n\
                for (int i = 0; i < 64; ++i) buffer_1[i] = sums[i];";
    let kernel = kernel(body, 32, 0);
    let resources = compile(&kernel, Architecture::Sm80).unwrap().resources;
    assert!(resources.stack >= 256, "{resources:?}");
    assert_eq!(over_memory(&kernel, &resources, Architecture::Sm80).len(), 1);
}

#[test]
fn shared_memory_over_the_limit_is_caught() {
    let kernel = kernel("buffer_1[threadIdx.x] = buffer_0[threadIdx.x];", 32, 100 << 10);
    let resources = compile(&kernel, Architecture::Sm89).unwrap().resources;
    assert_eq!(over_memory(&kernel, &resources, Architecture::Sm89).len(), 1);
    assert!(over_memory(&kernel, &resources, Architecture::Sm90a).is_empty());
}

#[test]
fn loads_of_a_number_at_a_time_are_seen() {
    let wide = kernel(
        "reinterpret_cast<float4*>(buffer_1)[threadIdx.x] = reinterpret_cast<const float4*>(buffer_0)[threadIdx.x];",
        32,
        0,
    );
    let narrow = kernel("buffer_1[threadIdx.x] = buffer_0[threadIdx.x];", 32, 0);
    let widths =
        |kernel| compile(kernel, Architecture::Sm90a).unwrap().resources.loads[&0].iter().copied().collect::<Vec<_>>();
    assert_eq!((widths(&wide), widths(&narrow)), (vec![16], vec![4]));
}

#[test]
fn what_a_compiler_refuses_is_told_with_its_reason() {
    let error = compile(&kernel("buffer_1[0] = no_such_thing;", 32, 0), Architecture::Sm80).unwrap_err().to_string();
    assert!(error.starts_with("NVRTC refuses broken") && error.contains("no_such_thing"), "{error}");
}

/// The columns of registers, spills, shared memory and occupancy. CubeCL numbers variables in an order that differs from build to build
/// of this program: `ptxas` then takes a few registers more or less, and what is left between arrays in shared memory is a few bytes
/// more or less. What they may be at most is held above.
const VARYING: [usize; 4] = [8, 9, 10, 11];

fn steady(line: &str) -> Vec<&str> {
    let columns = line.split('|').map(str::trim).enumerate();
    columns.filter(|(at, _)| !VARYING.contains(at)).map(|(_, column)| column).collect()
}

#[test]
fn the_tables_in_the_docs_are_current() {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/kernels.md")).unwrap();
    let [kernels, stages] = table::tables().unwrap();
    let written = |table: &str| {
        let head = table.lines().next().unwrap().to_string();
        page.lines().skip_while(move |line| *line != head).take_while(|line| line.starts_with('|'))
    };
    let current = written(&kernels).map(steady).eq(kernels.lines().map(steady)) && written(&stages).eq(stages.lines());
    assert!(
        current,
        "docs/kernels.md: write its tables anew with `ultramem kernels --table`; they should be\n{kernels}\n{stages}"
    );
}
