//! `ultramem devices`: the adapters that a layer could run on and what each supports.

use cubecl::features::{AtomicUsage, Plane};
use cubecl::ir::{DeviceProperties, ElemType, FloatKind, StorageType, Type};
use serde_json::{Value, json};
use ultramem::ElementType;

use crate::backend::{Adapter, Backend, CURE, cuda_adapters, offline_adapters, processors, wgpu_adapters};
use crate::failure::{Result, guard};
use crate::numbers::bytes;
use crate::report::{Report, Table};

/// Runs the verb.
pub fn run(backend: Backend) -> Result<Report> {
    let mut text = String::new();
    let (mut devices, mut problems) = (Vec::new(), Vec::new());
    for (asked, find) in SEARCHES {
        // GPUs that are not there are listed for whoever asks for them.
        if backend != asked && (backend != Backend::Auto || asked == Backend::Offline) {
            continue;
        }
        match find() {
            Ok(adapters) => devices.extend(adapters),
            Err(reason) => problems.push(reason.to_string()),
        }
    }
    if !devices.iter().any(Adapter::compiles) && backend != Backend::Cpu {
        text += &format!("no CUDA device or wgpu adapter found; {CURE}\n");
    }
    let devices: Vec<(Adapter, Result<Option<DeviceProperties>>)> = devices
        .into_iter()
        .map(|adapter| {
            let found = open(&adapter);
            (adapter, found)
        })
        .collect();
    for (adapter, found) in &devices {
        text += &adapter_text(adapter, found);
    }
    text += &problems.iter().map(|problem| format!("{problem}\n")).collect::<String>();
    let devices: Vec<Value> = devices.iter().map(|(adapter, found)| adapter_json(adapter, found)).collect();
    Ok(Report { text, json: json!({ "devices": devices, "notes": problems }), passed: true })
}

/// A way to find the adapters of a backend.
type Search = fn() -> Result<Vec<Adapter>>;

const SEARCHES: [(Backend, Search); 4] = [
    (Backend::Cuda, cuda_adapters),
    (Backend::Wgpu, wgpu_adapters),
    (Backend::Cpu, processors),
    (Backend::Offline, offline_adapters),
];

/// What the device can do; None for the processor, which runs no kernels.
fn open(adapter: &Adapter) -> Result<Option<DeviceProperties>> {
    guard(|| Ok(adapter.properties()))
}

/// The element types that a layer can have.
const TYPES: [ElementType; 3] = [ElementType::F32, ElementType::F16, ElementType::BF16];

/// Element types that kernels can compute with.
fn types(properties: &DeviceProperties) -> Vec<String> {
    TYPES.into_iter().filter(|it| properties.supports_type(it.storage())).map(|it| it.to_string()).collect()
}

/// Element types of the left operand of matrix units.
fn matrix_units(properties: &DeviceProperties) -> Vec<String> {
    let mut types: Vec<String> = properties.features.matmul.cmma.iter().map(|unit| unit.a_type.to_string()).collect();
    types.dedup();
    types
}

fn atomic_add(properties: &DeviceProperties) -> bool {
    let atomic = StorageType::Atomic(ElemType::Float(FloatKind::F32));
    properties.atomic_type_usage(Type::new(atomic)).contains(AtomicUsage::Add)
}

fn adapter_text(adapter: &Adapter, found: &Result<Option<DeviceProperties>>) -> String {
    let title = format!("{}; {}, {}\n", adapter.name, adapter.backend, adapter.driver);
    let mut table = Table::default();
    let properties = match found {
        Ok(Some(properties)) => properties,
        Ok(None) => {
            table.line(["element types", &TYPES.map(|it| it.to_string()).join(", ")]);
            return title + &table.text();
        }
        Err(reason) => return format!("{title}  can't be opened: {reason}\n"),
    };
    let hardware = &properties.hardware;
    let yes = |it: bool| if it { "yes" } else { "no" };
    let none = |list: Vec<String>| if list.is_empty() { "none".to_string() } else { list.join(", ") };
    table.line(["element types", &none(types(properties))]);
    table.line(["plane size", &range(hardware.plane_size_min, hardware.plane_size_max)]);
    table.line(["plane operations", yes(properties.features.plane.contains(Plane::Ops))]);
    table.line(["matrix units", &none(matrix_units(properties))]);
    table.line(["f32 atomic add", yes(atomic_add(properties))]);
    table.line(["shared memory", &bytes(hardware.max_shared_memory_size as u64)]);
    table.line(["units per cube", &hardware.max_units_per_cube.to_string()]);
    table.line(["largest binding", &bytes(properties.memory.max_page_size)]);
    title + &table.text()
}

fn range(min: u32, max: u32) -> String {
    if min == max { min.to_string() } else { format!("{min} to {max}") }
}

fn adapter_json(adapter: &Adapter, found: &Result<Option<DeviceProperties>>) -> Value {
    let mut json = json!({ "backend": adapter.backend, "device": adapter.name, "driver": adapter.driver });
    match found {
        Ok(None) => json["types"] = json!(TYPES.map(|it| it.to_string())),
        Ok(Some(properties)) => {
            let hardware = &properties.hardware;
            json["types"] = json!(types(properties));
            json["plane_size"] = json!([hardware.plane_size_min, hardware.plane_size_max]);
            json["plane_operations"] = json!(properties.features.plane.contains(Plane::Ops));
            json["matrix_units"] = json!(matrix_units(properties));
            json["f32_atomic_add"] = json!(atomic_add(properties));
            json["shared_memory_bytes"] = json!(hardware.max_shared_memory_size);
            json["units_per_cube"] = json!(hardware.max_units_per_cube);
            json["max_binding_bytes"] = json!(properties.memory.max_page_size);
        }
        Err(reason) => json["error"] = json!(reason.to_string()),
    }
    json
}
