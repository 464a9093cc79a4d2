//! The lines of a kernel's source that cost most.

use ultramem_offline::profile::Profile;
use ultramem_offline::profile::pipes::Pipe;

use super::microseconds;
use crate::report::Table;

/// Columns for machine instructions, in thousands of warps.
const PIPES: [(Pipe, &str); 7] = [
    (Pipe::Fma, "FMA"),
    (Pipe::Alu, "ALU"),
    (Pipe::Imad, "IMAD"),
    (Pipe::Conversion, "conv"),
    (Pipe::Special, "special"),
    (Pipe::Matrix, "matrix"),
    (Pipe::Memory, "memory"),
];

/// Letters of a line that are printed.
const WIDTH: usize = 80;

/// The `count` dearest lines of a launch, as a table: counts in thousands.
pub fn table(profile: &Profile, count: usize) -> String {
    let mut table = Table::default();
    let head = ["line", "µs", "binds"].into_iter().chain(PIPES.map(|it| it.1));
    table.row(head.chain(["shared", "conflicts", "sectors"]).map(str::to_string));
    for line in profile.lines.iter().take(count) {
        let warps = |pipe: Pipe| line.machine.iter().find(|it| it.0 == pipe).map_or(0.0, |it| it.1);
        let mut cells = vec![line.line.to_string(), microseconds(line.time), line.binds.clone()];
        cells.extend(PIPES.map(|(pipe, _)| thousands(warps(pipe))));
        cells.extend([line.shared_cycles, line.conflicts, line.sectors].map(thousands));
        table.row(cells);
    }
    let texts = profile.lines.iter().map(|line| line.text.chars().take(WIDTH).collect::<String>());
    let texts = std::iter::once("source, counts in thousands".to_string()).chain(texts);
    table.text().lines().zip(texts).map(|(cells, text)| format!("{cells}  {text}\n")).collect()
}

/// A count in thousands.
fn thousands(count: f64) -> String {
    microseconds(count / 1000.0)
}
