//! `ultramem info`: what a layer is made of and what it costs, from its dimensions alone.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use ultramem::checkpoint::Model;
use ultramem::{Dimensions, ElementType, Kind, MemoryConfig, Weight};

use crate::failure::{Failure, Result};
use crate::numbers::{bytes, counted, grouped};
use crate::report::{Report, Table, dimensions_json};
use crate::source::ModelLayer;

/// Arguments of `info`.
#[derive(Debug, Args)]
pub struct InfoArgs {
    /// A safetensors file that holds a layer, or a whole model: a file or folder as training left it
    #[arg(required_unless_present = "preset", conflicts_with = "preset")]
    file: Option<PathBuf>,
    #[command(flatten)]
    layer: ModelLayer,
    /// A layer from a paper, instead of a file
    #[arg(long)]
    preset: Option<Preset>,
}

/// Layers whose dimensions are known by name.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Preset {
    /// One of the four layers of the 1B-parameter model of UltraMem's release
    #[value(name = "ultramem_v1_1b")]
    UltramemV1With1b,
    /// One of the three layers of the paper's model of 151M activated parameters
    #[value(name = "ultramem_151m")]
    Ultramem151m,
    /// The first of the 20 layers of UltraMemV2's model of 227M activated parameters
    #[value(name = "ultramem_v2_227m")]
    UltramemV2With227m,
    /// The first of the 16 layers of UltraMemV2's model of 1B activated parameters
    #[value(name = "ultramem_v2_1b")]
    UltramemV2With1b,
}

impl Preset {
    /// The preset's dimensions.
    pub fn dimensions(self) -> Result<Dimensions> {
        Ok(match self {
            Self::UltramemV1With1b => Dimensions::ultramem_v1_1b(),
            Self::Ultramem151m => Dimensions::ultramem_151m(),
            Self::UltramemV2With227m => Dimensions::ultramem_v2_227m(0)?,
            Self::UltramemV2With1b => Dimensions::ultramem_v2_1b(0)?,
        })
    }
}

const TYPES: [ElementType; 3] = [ElementType::F32, ElementType::F16, ElementType::BF16];

/// Runs the verb.
pub fn run(args: &InfoArgs) -> Result<Report> {
    match (&args.file, args.preset) {
        (Some(path), _) => match args.layer.open_any(path)? {
            Ok(source) => source.weights().map(|_| of_layer(source.config())),
            Err(model) => of_model(path, &model),
        },
        (None, Some(preset)) => Ok(of_layer(&MemoryConfig::new(preset.dimensions()?)?)),
        (None, None) => Err(Failure::new("a file or --preset is needed")),
    }
}

/// A whole model: a line a layer, and the sizes of those that have the same.
fn of_model(path: &Path, model: &Model) -> Result<Report> {
    let (mut table, mut layers) = (Table::default(), Vec::new());
    table.line(["layer", "blocks", "kind", "name", "table"]);
    for layer in model.layers() {
        model.weights(layer)?;
        let (config, owner) = (layer.config(), model.table_of(layer).map(|owner| model.layers()[owner].number()));
        let kind = config.kind().map_or("–", Kind::name);
        let place = layer.place().map_or("–".into(), |(from, to)| format!("{from}:{to}"));
        table.line([&layer.number().to_string(), &place, kind, layer.name(), &table_text(config, owner)]);
        layers.push(json!({
            "layer": layer.number(),
            "name": layer.name(),
            "place": layer.place(),
            "config": dimensions_json(config),
            "pre_dim": config.pre_dim,
            "rows": config.rows(),
            "table_rows": config.table_rows(),
            "offset": config.offset(),
            "table_of": owner,
        }));
    }
    let (path, tensors) = (path.display().to_string(), model.tensors().names().count());
    let counts = format!("{} in {}", counted(layers.len(), "memory layer"), counted(tensors, "tensor"));
    let text = format!("{path}: {counts}\n{}Sizes\n{}", table.text(), sizes_text(model));
    Ok(Report { text, json: json!({ "model": path, "tensors": tensors, "layers": layers }), passed: true })
}

/// A line for each run of layers that have the same sizes.
fn sizes_text(model: &Model) -> String {
    let sizes = |config: &MemoryConfig| {
        let Dimensions { hidden_size, heads, side_keys, key_dim, top_m, cores, value_dim, pre_dim, .. } = **config;
        [hidden_size, heads, side_keys, key_dim, top_m, cores, value_dim, pre_dim, config.rows()].map(grouped)
    };
    let names = ["hidden_size", "heads", "side_keys", "key_dim", "top_m", "cores", "value_dim", "pre_dim", "rows"];
    let mut table = Table::default();
    table.row(["layers"].into_iter().chain(names).map(String::from));
    for run in model.layers().chunk_by(|one, other| sizes(one.config()) == sizes(other.config())) {
        let (first, last) = (&run[0], &run[run.len() - 1]);
        let numbers = match run.len() {
            1 => first.number().to_string(),
            2 => format!("{}, {}", first.number(), last.number()),
            _ => format!("{} to {}", first.number(), last.number()),
        };
        table.row([numbers].into_iter().chain(sizes(first.config())));
    }
    table.text()
}

/// Where a layer's rows are; `owner` is the layer whose table it reads.
fn table_text(config: &MemoryConfig, owner: Option<usize>) -> String {
    let whose = owner.map_or("own".to_string(), |owner| format!("layer {owner}'s"));
    match config.shared {
        Some(table) => format!("shared: {} rows, from {}", grouped(table.rows), grouped(table.offset)),
        None => whose,
    }
}

/// One layer.
fn of_layer(config: &MemoryConfig) -> Report {
    let (groups, reads) = (groups(config), TYPES.map(|dtype| (dtype, config.bytes_read_per_token(dtype))));
    let parameters: u64 = groups.iter().map(|(_, _, count)| count).sum();
    let memory = TYPES.map(|dtype| (dtype, parameters * dtype.size() as u64 + shuffle_bytes(config)));
    let by_type = |numbers: &[(ElementType, u64); 3]| -> Value {
        numbers
            .iter()
            .map(|(dtype, number)| (dtype.to_string(), json!(number)))
            .collect::<serde_json::Map<_, _>>()
            .into()
    };
    let counts = groups.iter().map(|(name, _, count)| (name.to_string(), json!(count)));
    let json = json!({
        "config": dimensions_json(config),
        "rows": config.rows(),
        "slots": config.slots(),
        "parameters": counts.collect::<serde_json::Map<_, _>>(),
        "total_parameters": parameters,
        "slots_read_per_token": config.heads * config.top_m,
        "bytes_read_per_token": by_type(&reads),
        "memory_bytes": by_type(&memory),
        "prepared_key_bytes": prepared_key_bytes(config),
    });
    let text = config_text(config) + &counts_text(config, &groups, parameters) + &bytes_text(config, &reads, &memory);
    Report { text, json, passed: true }
}

/// Parameters by what they belong to: name, shape in words, count.
fn groups(config: &MemoryConfig) -> Vec<(&'static str, String, u64)> {
    let group = |(name, of): &(&'static str, Vec<Weight>)| {
        let shape_of = |weight: &Weight| ultramem::device_shape(config, *weight);
        let shapes: Vec<_> = of.iter().filter(|weight| weight.is_in(config)).map(shape_of).collect();
        let count: u64 = shapes.iter().map(|shape| shape.iter().map(|&size| size as u64).product::<u64>()).sum();
        let words = |shape: &Vec<usize>| shape.iter().map(|&size| grouped(size)).collect::<Vec<_>>().join(" × ");
        (*name, shapes.iter().map(words).collect::<Vec<_>>().join(", "), count)
    };
    let groups = [
        ("query projection", vec![Weight::QueryProj, Weight::QueryBias]),
        ("keys", vec![Weight::Keys]),
        ("query and key norm", vec![Weight::QueryNorm, Weight::KeysNorm]),
        ("Tucker cores", vec![Weight::Cores]),
        ("pre-values", vec![Weight::PreValues]),
        ("pre-value projection", vec![Weight::PreValuesProj]),
        ("values", vec![Weight::Values]),
        ("output projection", vec![Weight::ValuesProj, Weight::ValuesBias]),
        ("gate projection", vec![Weight::GateProj, Weight::GateBias]),
        ("output gate", vec![Weight::OutputGate, Weight::OutputGateBias]),
    ];
    groups.iter().map(group).filter(|(.., count)| *count > 0).collect()
}

/// The shuffle, and the vectors `u` and `v` of the cores: not trained, but kept in memory.
fn shuffle_bytes(config: &MemoryConfig) -> u64 {
    let shuffle = if config.capabilities.shuffled { config.slots() } else { 0 };
    let vectors = if config.tucker() { 2 * config.heads * config.tucker_rank } else { 0 };
    4 * (shuffle + vectors) as u64
}

/// Normalised and projected keys, which a device makes for itself in f32.
fn prepared_key_bytes(config: &MemoryConfig) -> u64 {
    4 * (config.heads * 2 * config.side_keys * config.key_dim * (config.tucker_rank + 1)) as u64
}

fn config_text(config: &MemoryConfig) -> String {
    let name = match config.kind() {
        Some(Kind::UltraMem) => "UltraMem",
        Some(Kind::ProductKey) => "Product-key memory",
        Some(Kind::MemoryPlus) => "Memory+",
        Some(Kind::LinguaMemoryPlus) => "Memory+ (lingua)",
        Some(Kind::Peer) => "PEER",
        Some(Kind::UltraMemV2) => "UltraMemV2",
        None => "A memory layer of no kind with a name",
    };
    let mut table = Table::default();
    for (name, value) in config.sizes() {
        table.line([name, &grouped(value)]);
    }
    if config.pre_dim > 0 {
        table.line(["pre_dim", &grouped(config.pre_dim)]);
    }
    if config.shared.is_some() {
        let text = format!("{} rows, this layer's from {} on", grouped(config.table_rows()), grouped(config.offset()));
        table.line(["shared table", &text]);
    }
    table.line(["norm", &format!("{:?}, eps {:e}", config.norm, config.norm_eps)]);
    format!("{name} layer\n{}", table.text())
}

fn counts_text(config: &MemoryConfig, groups: &[(&str, String, u64)], parameters: u64) -> String {
    let mut table = Table::default();
    for (name, shape, count) in groups {
        table.line([name, shape, &grouped(*count as usize)]);
    }
    table.line(["together", "", &grouped(parameters as usize)]);
    let (rows, slots) = (grouped(config.rows()), grouped(config.slots()));
    format!("Parameters: {rows} physical rows behind {slots} virtual slots\n{}", table.text())
}

fn bytes_text(config: &MemoryConfig, reads: &[(ElementType, u64); 3], memory: &[(ElementType, u64); 3]) -> String {
    let mut table = Table::default();
    table.line(["", "f32", "f16", "bf16"]);
    let mut line = |name: &str, [a, b, c]: [u64; 3]| table.line([name, &bytes(a), &bytes(b), &bytes(c)]);
    let entries = (config.heads * config.top_m) as u64;
    line("value rows read per token", TYPES.map(|dtype| entries * (config.value_dim * dtype.size()) as u64));
    line("with pre-values, addresses", reads.map(|(_, bytes)| bytes));
    line("weights in memory", memory.map(|(_, bytes)| bytes));
    line("prepared keys on a device", [prepared_key_bytes(config); 3]);
    let read = grouped(config.heads * config.top_m);
    format!("Bytes: a token reads {read} of {} rows\n{}", grouped(config.rows()), table.text())
}
