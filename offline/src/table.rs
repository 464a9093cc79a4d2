//! The table of kernels in `docs/kernels.md`: what each launch of a forward pass needs of an H100, as NVIDIA's compilers say.

use std::collections::BTreeMap;

use ultramem::{Dimensions, ElementType, MemoryConfig};

use crate::compile::{Architecture, Compiled, compile_all};
use crate::trace::{Traced, Tracer, tracing_device};
use crate::{Gpu, Kernel, Target};

/// Tokens of the launches: one by one, and a prefill.
const TOKENS: [usize; 2] = [1, 4096];
const GPU: Gpu = Gpu::H100;

/// The table, in Markdown.
///
/// # Errors
/// Compilers that are not installed, or what they refuse.
pub fn table() -> Result<String, Box<dyn std::error::Error + Send + Sync>> {
    let config = MemoryConfig::new(Dimensions::ultramem_v1_1b())?;
    let device = tracing_device(GPU, Target::Cuda);
    let mut lines = vec![HEAD.to_string()];
    for dtype in [ElementType::F32, ElementType::BF16] {
        let tracer = Tracer::new(&device, &config, dtype)?;
        for tokens in TOKENS {
            let launches = tracer.forward(tokens, None)?;
            let kernels: Vec<(&Kernel, Architecture)> =
                launches.iter().map(|it| (&*it.launch.kernel, Architecture::of(GPU))).collect();
            let compiled = compile_all(&kernels)?;
            lines
                .extend(launches.iter().zip(&compiled).map(|(traced, compiled)| line(dtype, tokens, traced, compiled)));
        }
    }
    Ok(lines.join("\n") + "\n")
}

const HEAD: &str = "| type | tokens | stage | kernel | cubes | threads | registers | spills | shared memory | occupancy | loads, bytes |\n\
                    |---|---|---|---|---|---|---|---|---|---|---|";

fn line(dtype: ElementType, tokens: usize, traced: &Traced, compiled: &Compiled) -> String {
    let (launch, resources) = (&traced.launch, &compiled.resources);
    let threads: u32 = launch.kernel.dim.iter().product();
    let cubes: u32 = launch.count.iter().product();
    let shared = launch.kernel.shared + resources.shared;
    let occupancy = GPU.occupancy(threads as usize, resources.registers, shared);
    let spills = resources.stack.max(resources.spill_stores).max(resources.spill_loads);
    format!(
        "| {dtype} | {tokens} | {} | `{}` | {cubes} | {threads} | {} | {spills} | {shared} | {:.0} % | {} |",
        traced.stage,
        launch.kernel.entry,
        resources.registers,
        100.0 * occupancy,
        widths(&resources.loads),
    )
}

/// `0: 16, 3: 8+16`: of each buffer that is loaded from, how wide.
fn widths(loads: &BTreeMap<usize, std::collections::BTreeSet<usize>>) -> String {
    let widths =
        |widths: &std::collections::BTreeSet<usize>| widths.iter().map(usize::to_string).collect::<Vec<_>>().join("+");
    loads.iter().map(|(buffer, found)| format!("{buffer}: {}", widths(found))).collect::<Vec<_>>().join(", ")
}
