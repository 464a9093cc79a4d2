//! The tables of `docs/kernels.md`: what each kernel needs of an H100, as NVIDIA's compilers say, and what each stage moves of its
//! memory, as the model of cost has it.

use std::collections::{BTreeMap, BTreeSet};

use ultramem::kernels::optimiser::Rule;
use ultramem::{Caches, Dimensions, ElementType, MemoryConfig};
use ultramem_versus::{Design, Plan, Scale};

use crate::compile::{Architecture, Compiled, compile_all};
use crate::trace::{Traced, Tracer, step, tracing_device};
use crate::{Gpu, Kernel, OfflineDevice, Target};

/// What can go wrong: compilers that are not installed, or what they refuse.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Tokens of a forward pass: one, and a prefill; of a backward pass, the latter.
const TOKENS: [usize; 2] = [1, PREFILL];
const PREFILL: usize = 4096;
const GPU: Gpu = Gpu::H100;
const TYPES: [ElementType; 2] = [ElementType::F32, ElementType::BF16];
/// Sequences of a decoding step of the models that memory layers are compared with, and positions before.
const BATCH: usize = 64;
const CACHED: usize = 2048;

/// How the value table learns.
const RULE: Rule = Rule::Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, decoupled: true };

/// Both tables, in Markdown.
///
/// # Errors
/// Compilers that are not installed, or what they refuse.
pub fn tables() -> Result<[String; 2], Failure> {
    let config = MemoryConfig::new(Dimensions::ultramem_v1_1b())?;
    let device = tracing_device(GPU, Target::Cuda);
    let (mut kernels, mut stages) = (vec![KERNELS.to_string()], vec![STAGES.to_string()]);
    for dtype in TYPES {
        let mut tracer = Tracer::new(&device, &config, dtype)?;
        let mut add = |tokens: &str, launches: &[Traced]| -> Result<(), Failure> {
            kernels.extend(kernel_lines(dtype, tokens, launches)?);
            Ok(())
        };
        add("any", tracer.prepare())?;
        for tokens in TOKENS {
            let launches = tracer.forward(tokens, None)?;
            add(&tokens.to_string(), &launches)?;
            stages.extend(forward_lines(&tracer, tokens, &launches)?);
        }
        let launches = tracer.training(PREFILL, &[RULE])?;
        add(&PREFILL.to_string(), &launches)?;
        stages.extend(training_lines(&tracer, &launches));
    }
    for design in [Design::Dense, Design::Moe] {
        let launches = baseline(&device, design)?;
        kernels.extend(kernel_lines(ElementType::BF16, &format!("{BATCH}, {}", design.name()), &launches)?);
    }
    Ok([kernels, stages].map(|lines| lines.join("\n") + "\n"))
}

/// A decoding step of one block of the paper's smallest model.
fn baseline(device: &OfflineDevice, design: Design) -> Result<Vec<Traced>, Failure> {
    let scale = Scale { blocks: 1, memory_layers: 1, activated: 14_600_000, sparse: 41_500_000, ..Scale::paper_151m() };
    Ok(step(device, &Plan::new(design, &scale)?, ElementType::BF16, BATCH, CACHED)?)
}

const KERNELS: &str = "| type | tokens | stage | kernel | launches | cubes | threads | registers | spills | shared memory | occupancy | loads, bytes |\n\
                       |---|---|---|---|---|---|---|---|---|---|---|---|";

/// A line for each kernel of each stage; where it is launched several times, its largest launch.
fn kernel_lines(dtype: ElementType, tokens: &str, launches: &[Traced]) -> Result<Vec<String>, Failure> {
    let mut lines: Vec<(usize, &Traced)> = Vec::new();
    for traced in launches {
        let same = |(_, other): &&mut (usize, &Traced)| {
            (other.stage, &other.launch.kernel.entry) == (traced.stage, &traced.launch.kernel.entry)
        };
        match lines.iter_mut().find(same) {
            Some((count, largest)) => {
                *count += 1;
                if cubes(traced) > cubes(largest) {
                    *largest = traced;
                }
            }
            None => lines.push((1, traced)),
        }
    }
    let kernels: Vec<(&Kernel, Architecture)> =
        lines.iter().map(|(_, traced)| (&*traced.launch.kernel, Architecture::of(GPU))).collect();
    let compiled = compile_all(&kernels)?;
    let line = |((count, traced), compiled): (&(usize, &Traced), &Compiled)| {
        format!("| {dtype} | {tokens} | {}", kernel_line(*count, traced, compiled))
    };
    Ok(lines.iter().zip(&compiled).map(line).collect())
}

fn cubes(traced: &Traced) -> u32 {
    traced.launch.count.iter().product()
}

fn kernel_line(count: usize, traced: &Traced, compiled: &Compiled) -> String {
    let (launch, resources) = (&traced.launch, &compiled.resources);
    let threads: u32 = launch.kernel.dim.iter().product();
    let shared = launch.kernel.shared + resources.shared;
    let occupancy = GPU.occupancy(threads as usize, resources.registers, shared);
    let spills = resources.stack.max(resources.spill_stores).max(resources.spill_loads);
    format!(
        "{} | `{}` | {count} | {} | {threads} | {} | {spills} | {shared} | {:.0} % | {} |",
        traced.stage,
        launch.kernel.entry,
        cubes(traced),
        resources.registers,
        100.0 * occupancy,
        widths(&resources.loads),
    )
}

/// `0: 16, 3: 8+16`: of each buffer that is loaded from, how wide.
fn widths(loads: &BTreeMap<usize, BTreeSet<usize>>) -> String {
    let widths = |widths: &BTreeSet<usize>| widths.iter().map(usize::to_string).collect::<Vec<_>>().join("+");
    loads.iter().map(|(buffer, found)| format!("{buffer}: {}", widths(found))).collect::<Vec<_>>().join(", ")
}

const STAGES: &str =
    "| type | tokens | stage | launches | moves | must move | over the minimum |\n|---|---|---|---|---|---|---|";

fn caches() -> Caches {
    Caches { bytes: GPU.specification().cache }
}

fn forward_lines(tracer: &Tracer, tokens: usize, launches: &[Traced]) -> Result<Vec<String>, Failure> {
    let (layer, config, dtype) = (tracer.layer(), tracer.layer().config(), tracer.layer().dtype());
    let moved = config.traffic(dtype, &layer.plans(tokens, layer.strategies(tokens))?, caches());
    let least = config.cost(tokens, dtype).stages();
    let line = |((stage, moved), (_, least)): ((&str, u64), (_, ultramem::StageCost))| {
        stage_line(dtype, tokens, stage, launches, moved, least.bytes)
    };
    Ok(moved.into_iter().zip(least).map(line).collect())
}

fn training_lines(tracer: &Tracer, launches: &[Traced]) -> Vec<String> {
    let (layer, config, dtype) = (tracer.layer(), tracer.layer().config(), tracer.layer().dtype());
    let least = config.backward_cost(PREFILL, dtype);
    let line = |(stage, moved): (&str, u64)| {
        let least = least.stages().into_iter().find(|(name, _)| *name == stage).map_or(0, |(_, cost)| cost.bytes);
        stage_line(dtype, PREFILL, &format!("{stage}-backward"), launches, moved, least)
    };
    let mut lines: Vec<String> = layer.backward_traffic(PREFILL, caches()).into_iter().map(line).collect();
    let rows = (PREFILL * config.heads * config.top_m).min(config.rows());
    let (moved, least) =
        (config.update_traffic(rows, dtype, RULE, caches()), config.update_cost(rows, dtype, RULE).bytes);
    lines.push(stage_line(dtype, PREFILL, "update", launches, moved, least));
    lines
}

fn stage_line(dtype: ElementType, tokens: usize, stage: &str, launches: &[Traced], moved: u64, least: u64) -> String {
    let count = launches.iter().filter(|traced| traced.stage == stage).count();
    let (over, megabytes) = (moved as f64 / least as f64, |bytes: u64| bytes as f64 / 1e6);
    let (moved, least) = (megabytes(moved), megabytes(least));
    format!("| {dtype} | {tokens} | {stage} | {count} | {moved:.2} MB | {least:.2} MB | {over:.2} |")
}
