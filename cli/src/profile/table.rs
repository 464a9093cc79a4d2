//! The launches of a pass as a table. Those of one kernel in one stage share a row: their times are added up.

use ultramem_offline::profile::passes::{Staged, by_kernel};

use super::microseconds;
use crate::numbers::bytes;
use crate::report::Table;

/// Columns of times: a name in the library, and a short one.
const TIMES: [(&str, &str); 10] = [
    ("memory", "memory"),
    ("cache", "L2"),
    ("shared and lines", "shared"),
    ("FMA", "FMA"),
    ("ALU", "ALU"),
    ("IMAD", "IMAD"),
    ("conversion", "conv"),
    ("special", "special"),
    ("matrix", "matrix"),
    ("issue", "issue"),
];

/// Letters of a kernel's name.
const NAME: usize = 28;

/// The table.
pub fn table(staged: &[Staged]) -> String {
    let mut table = Table::default();
    let head = ["stage", "kernel", "launches", "cubes", "counted", "units", "regs", "shared memory", "occupancy"];
    let head = head.into_iter().chain(TIMES.map(|it| it.1)).chain(["binds", "predicted"]);
    table.row(head.map(str::to_string));
    for row in by_kernel(staged) {
        let (stage, profile) = (row[0].stage, &row[0].profile);
        let sum = |of: &dyn Fn(&Staged) -> f64| row.iter().map(|it| of(it)).sum::<f64>();
        let mut cells = vec![
            stage.to_string(),
            profile.kernel.chars().take(NAME).collect(),
            row.len().to_string(),
            profile.cubes.to_string(),
            profile.counted.to_string(),
            profile.units.to_string(),
            profile.registers.to_string(),
            bytes(profile.shared as u64),
            format!("{:.0} %", 100.0 * profile.occupancy),
        ];
        cells.extend(TIMES.map(|(name, _)| microseconds(sum(&|it| it.profile.time(name)))));
        cells.extend([profile.binds().to_string(), microseconds(sum(&|it| it.profile.predicted))]);
        table.row(cells);
    }
    table.text()
}
