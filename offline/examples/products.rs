//! Registers, spills, cubes and the predicted time of products on an H100: `products M N K f32|bf16(out) turned(0|1) strategy [left f32]`.
use cubecl::Runtime;
use cubecl::future::block_on;
use ultramem::kernels::empty;
use ultramem::kernels::linear::{ProjectStrategy, project};
use ultramem::kernels::query::{Map, query_backward};
use ultramem::ElementType;
use ultramem_offline::profile::{Profile, Rates};
use ultramem_offline::{Blocks, Execution, Gpu, OfflineDevice, OfflineRuntime, Options};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let n: Vec<usize> = args.iter().take(3).map(|it| it.parse().unwrap()).collect();
    let [rows, columns, depth] = n[..] else { panic!() };
    let strategy = match args[4].as_str() {
        "matrix" => ProjectStrategy::Matrix,
        "cubek" => ProjectStrategy::Cubek,
        _ => ProjectStrategy::Tile,
    };
    let output = if args[3] == "f32" { ElementType::F32 } else { ElementType::BF16 };
    let rates = Rates::of(Gpu::H100);
    let device = OfflineDevice::new(Options { gpu: Gpu::H100, execution: Execution::Counted, ..Options::default() });
    let client = OfflineRuntime::client(&device);
    let bf16 = ElementType::BF16.storage();
    device.count(Blocks::Spread { whole: 0 });
    if args[3] == "backward" {
        // tokens, width, hidden
        let input = empty(&client, "input", &[rows, depth], bf16).unwrap();
        let weight = empty(&client, "weight", &[columns, depth], bf16).unwrap();
        let grad = empty(&client, "grad", &[rows, columns], ElementType::F32.storage()).unwrap();
        query_backward(&client, &input, &[Map { weight: &weight, biased: false, grad: &grad }], None, strategy).unwrap();
    } else {
        let input = empty(&client, "input", &[rows, depth], bf16).unwrap();
        let weight = empty(&client, "weight", &[depth, columns], bf16).unwrap();
        project(&client, &input, &weight, output.storage(), strategy).unwrap();
    }
    block_on(client.sync()).unwrap();
    for report in device.take_reports() {
        let spills = ultramem_offline::compile::compile(
            &report.kernel, ultramem_offline::compile::Architecture::of(Gpu::H100)).unwrap().resources;
        if let Ok(path) = std::env::var("DUMP") {
            let code = ultramem_offline::compile::machine_code(&report.kernel, ultramem_offline::compile::Architecture::of(Gpu::H100)).unwrap();
            std::fs::write(format!("{path}.sass"), code.as_str()).unwrap();
            std::fs::write(format!("{path}.cu"), &report.kernel.source).unwrap();
        }
        let Some(it) = Profile::of(&report, Gpu::H100, &rates).unwrap() else { continue };
        let times: Vec<String> = it.times.iter().filter(|(_, t)| *t > 0.5).map(|(n, t)| format!("{n} {t:.1}")).collect();
        if std::env::var("LINES").is_ok() { for line in it.lines.iter().take(12) { println!("{line:?}"); } }
        println!("{:40.40} cubes {:5} x {:3} regs {:3} spills {:?} shared {:6} resident {} counted {} pred {:7.1} | {}",
            it.kernel, it.cubes, it.units, it.registers, (spills.spill_stores, spills.spill_loads, spills.stack), it.shared, it.resident, it.counted, it.predicted, times.join(", "));
    }
}
